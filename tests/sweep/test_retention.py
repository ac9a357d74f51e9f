"""What a sweep leaves on disk, without training: made-up runs as Ray Train lists them."""

import json
from pathlib import Path

import pytest
import yaml
from ray.train.v2._internal.execution.checkpoint.checkpoint_manager import _CheckpointManagerState

from clipfh import UserError
from clipfh.config import presets, schema, sweep_file
from clipfh.config.experiment import SMALL_MODEL
from clipfh.model import checkpoint
from clipfh.storage import layout, run_folder
from clipfh.storage.store import Folder
from clipfh.sweep import finalists, retention
from clipfh.train import driver

EXPERIMENT = presets.resolve("image", None, {"model.name": SMALL_MODEL, "optimizer.lr": 1e-3})


def make_run(folder: Path, *scores: float, lr: float = 1e-3) -> Path:
    """A run with a report for each score, and the checkpoints that Ray Train would keep: the best and the latest."""
    folder.mkdir(parents=True)
    (folder / layout.EXPERIMENT).write_text(schema.to_json(schema.replace(EXPERIMENT, {"optimizer.lr": lr})))
    lines = [{"step": 4 * i, "images": 4 * i, "val_mAP": score} for i, score in enumerate(scores, 1)]
    (folder / layout.REPORTS).write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    listed = sorted(lines, key=lambda line: line["val_mAP"])
    listed = [line for line in listed if line in (listed[-1], lines[-1])]
    results = [{"checkpoint_dir_name": f"checkpoint_{line['step']}", "metrics": line} for line in listed]
    latest = next(each for each in results if each["metrics"] == lines[-1])
    state = _CheckpointManagerState(
        checkpoint_results=results, checkpoint_report_indices=[r["metrics"]["step"] // 4 - 1 for r in results],
        latest_checkpoint_result=latest, pending_training_results=[], pending_validation_specs=[],
        current_report_index=len(lines), validated_checkpoint_dir_names=[],
        timed_out_validation_checkpoint_dir_names=[], failed_validation_checkpoint_dir_names=[],
    )  # fmt: skip
    for each in results:
        made = folder / "checkpoints" / each["checkpoint_dir_name"]
        made.mkdir(parents=True)
        for name in (layout.RAW_WEIGHTS, layout.AVERAGE_WEIGHTS, layout.TRAINING_STATE):
            (made / name).write_bytes(bytes(1000))
    (folder / "checkpoints" / layout.SNAPSHOT).write_text(state.json())
    return folder


def left(run: Path) -> list[str]:
    """Weights and state on disk, having checked that just the folders are there that the run is said to have."""
    state = _CheckpointManagerState.parse_raw((run / "checkpoints" / layout.SNAPSHOT).read_text())
    freed = run_folder.read_freed(run)
    names = {freed["kept"]} - {""} if freed else {each.checkpoint_dir_name for each in state.checkpoint_results}
    assert names == {folder.name for folder in (run / "checkpoints").glob("checkpoint_*/")}
    return sorted(f"{file.parent.name}/{file.name}" for file in (run / "checkpoints").glob("*/*"))


BOARD = [  # best first
    ("0003", "done", [0.5, 0.9, 0.8], 1e-3), ("0001", "running", [0.85], 1e-4), ("0004", "stopped", [0.7], 1e-3),
    ("0002", "stopped", [0.6], 2e-3), ("0005", "stopped", [0.5], 3e-3), ("0006", "failed", [0.4], 4e-3),
    ("0007", "diverged", [0.3], 5e-3),
]  # fmt: skip
BEST = ["checkpoint_8/ema.safetensors", "checkpoint_8/model.safetensors"]


@pytest.fixture
def make_keeper(tmp_path):
    def make(which: str, top: int = 2) -> retention.Keeper:
        (tmp_path / "sweep.yaml").write_text(
            yaml.safe_dump(
                {
                    "base": {"model.name": SMALL_MODEL},
                    "placement": {"keep_weights": which},
                    "final": {"top": top},
                }
            )
        )
        for name, _, scores, lr in BOARD:
            make_run(tmp_path / "trials" / name, *scores, lr=lr)
        return retention.Keeper(sweep_file.load(tmp_path / "sweep.yaml"), Folder(tmp_path))

    return make


ROWS = [{"trial": name, "status": status, "val_mAP": f"{max(scores)}"} for name, status, scores, _ in BOARD]


def with_weights(out: Path) -> list[str]:
    return sorted(run.name for run in (out / "trials").iterdir() if left(run))


def test_leaders_keep_their_best_weights_and_what_may_train_on_keeps_everything(make_keeper, tmp_path):
    keeper = make_keeper("leaders")
    keeper.trials(ROWS)
    # 0004 has the settings of 0003, so final would take 0003 and 0002; 0001 runs; 0006 may be tried again
    assert with_weights(tmp_path) == ["0001", "0002", "0003", "0006"]
    assert left(tmp_path / "trials/0003") == BEST, "its latest is not its best"
    assert list(finalists.leaders(ROWS, Folder(tmp_path), 2)) == ["0003", "0002"]
    assert "checkpoint_4/training.pt" in left(tmp_path / "trials/0001")
    assert "checkpoint_4/training.pt" in left(tmp_path / "trials/0006")
    # 6,000 - 2,000 of 0003, 1,000 of 0002, all 3,000 of three others
    assert keeper.freed == 4000 + 1000 + 3 * 3000
    keeper.trials(ROWS)
    assert keeper.freed == 14000, "again, nothing is left to free"
    assert str(keeper) == "kept the weights of 4 runs, 0.0 GiB; freed 0.0 GiB"


def test_only_the_best_or_all(make_keeper, tmp_path):
    make_keeper("best").trials(ROWS)
    assert with_weights(tmp_path) == ["0001", "0003", "0006"]


def test_all_is_all(make_keeper, tmp_path):
    keeper = make_keeper("all")
    make_run(tmp_path / "final" / "refit", 0.5)
    before = sorted(tmp_path.rglob("*"))
    keeper.trials(ROWS)
    keeper.finals(())
    assert sorted(tmp_path.rglob("*")) == before and keeper.freed == 0


def test_a_trial_without_weights_says_why_and_stays_where_it_ended(make_keeper, tmp_path):
    make_keeper("leaders").trials(ROWS)
    run = tmp_path / "trials/0005"
    with pytest.raises(UserError, match="0005: its weights were not kept: `placement: {keep_weights: all}`"):
        checkpoint.load(run)
    assert run_folder.latest_step(run) == 4 and run_folder.latest_step(tmp_path / "trials/0003") == 12
    assert run_folder.find_best_checkpoint(tmp_path / "trials/0003") == "checkpoint_8"
    driver.open_folder(schema.load_experiment(run / layout.EXPERIMENT), Folder(run))
    assert not (run / "checkpoints").exists(), "trained anew, it begins anew"


def test_what_a_kill_left_undone_is_done(make_keeper, tmp_path):
    keeper = make_keeper("leaders")
    run = tmp_path / "trials/0003"
    retention.free(Folder(run), weights=True)
    (run / "checkpoints/checkpoint_12").mkdir()
    (run / "checkpoints/checkpoint_12/model.safetensors").write_bytes(bytes(1000))
    (run / "checkpoints/checkpoint_8/training.pt").write_bytes(bytes(1000))
    keeper.trials(ROWS)
    assert left(run) == BEST
    retention.free(Folder(run), weights=False)
    retention.free(Folder(run), weights=True)
    assert left(run) == [], "what is gone does not come back"


def test_the_run_that_was_exported_keeps_its_weights_and_is_not_trained_again(make_keeper, tmp_path, monkeypatch):
    keeper = make_keeper("best")
    first, second = (make_run(tmp_path / "final" / f"0003-again-{n}", 0.5, 0.9, 0.8) for n in (1, 2))
    keeper.finals({Folder(second)})
    assert (left(first), left(second)) == ([], BEST)
    monkeypatch.setattr(driver, "is_over", lambda *_: True)
    assert all(finalists._is_over(EXPERIMENT, None, Folder(run)) for run in (first, second))
    another = schema.replace(EXPERIMENT, {"optimizer.lr": 2e-3})
    assert not finalists._is_over(another, None, Folder(first)), "the run of another winner"
