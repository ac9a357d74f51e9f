"""MLflow and Weights & Biases have each report once, also after a resume; where they are away, nothing fails."""

import json
import struct
import time

import pytest
import wandb
from wandb.proto import wandb_internal_pb2

from clipfh import UserError
from clipfh.cli import main
from clipfh.config import presets, schema
from clipfh.storage.store import Folder
from clipfh.train import track


@pytest.fixture
def sweep(tmp_path, monkeypatch):
    """A sweep's folder with one trial that has reported twice."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "sweep" / "trials" / "0001"
    folder.mkdir(parents=True)
    (folder / "experiment.json").write_text(schema.to_json(presets.resolve("joint")))
    report(folder, 10)
    report(folder, 20)
    return tmp_path / "sweep"


def report(folder, step):
    line = {"step": step, "val_mAP": step / 100, "images": 8 * step, "stream": "abc", "loss": float("nan")}
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")


def sent(tracker, sweep):
    """Send what there is, as one command would."""
    mirror = track.Mirror(tracker, Folder(sweep))
    mirror.send()
    mirror.send()
    mirror.finish()
    return json.loads((sweep / "trials/0001/track.json").read_text())[tracker]


def test_mlflow_has_each_report_once_in_one_run(sweep, tmp_path, monkeypatch):
    from mlflow import MlflowClient

    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    first = sent("mlflow", sweep)
    report(sweep / "trials/0001", 30)
    assert sent("mlflow", sweep) == {**first, "step": 30}
    client = MlflowClient()
    (run,) = client.search_runs([client.get_experiment_by_name("clipfh").experiment_id])
    history = client.get_metric_history(run.info.run_id, "val_mAP")
    assert [(each.step, each.value) for each in history] == [(10, 0.1), (20, 0.2), (30, 0.3)]
    assert (run.info.run_name, run.info.status) == ("sweep-0001", "FINISHED")
    assert {"images", "val_mAP"} == set(run.data.metrics)
    assert run.data.tags["sweep"] == "sweep" and run.data.tags["trial"] == "0001"
    assert run.data.params["batch.items"] == "64"


def test_wandb_offline_has_each_report_once_under_one_id(sweep, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    track.require("wandb")
    first = sent("wandb", sweep)
    report(sweep / "trials/0001", 30)
    assert sent("wandb", sweep) == {**first, "step": 30}
    wandb.teardown()  # its own process writes the files
    files = sorted((tmp_path / "wandb").glob(f"offline-run-*/run-{first['id']}.wandb"))
    assert [(step, value) for file in files for step, value in logged(file)] == [(10, 0.1), (20, 0.2), (30, 0.3)]


def logged(file):
    """Step and val_mAP of each report in a file of wandb's: 7 bytes, then records as LevelDB's log has them."""
    data, at = file.read_bytes(), 7
    while at < len(data):
        _, size, kind = struct.unpack("<IHB", data[at : at + 7])
        assert kind == 1, "a record in one piece"
        record = wandb_internal_pb2.Record.FromString(data[at + 7 : at + 7 + size])
        values = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
        if "val_mAP" in values:
            yield record.history.step.num, values["val_mAP"]
        at += 7 + size


def test_a_deleted_experiment_is_told_before_anything_starts(tmp_path, monkeypatch):
    from mlflow import MlflowClient

    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    track.require("mlflow")
    number = MlflowClient().create_experiment("clipfh")
    track.require("mlflow")
    MlflowClient().delete_experiment(number)
    with pytest.raises(UserError, match=f"the experiment clipfh is deleted: restore it .* --experiment-id {number}"):
        track.require("mlflow")


def test_a_server_that_is_away_is_told_and_awaited_no_longer_than_asking_takes(sweep, monkeypatch, capfd):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    with track.following("mlflow", sweep):
        begun = time.monotonic()
    assert time.monotonic() - begun < track.LAST_SECONDS
    assert "not all was sent to mlflow" in capfd.readouterr().out
    assert not (sweep / "trials/0001/track.json").exists()


def test_without_the_library_one_line_says_how_to_get_it(small_catalogue, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    words = ["train", "image", str(small_catalogue.path), "--out", str(tmp_path / "run"), "--track", "mlflow"]
    assert main.main(words) == 2
    assert "pip install mlflow-skinny" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
