"""What the driver of a run writes."""

from types import SimpleNamespace

import pyarrow.fs
import pytest
from ray.train import FailureConfig
from ray.train.v2._internal.exceptions import WorkerGroupStartupFailedError, WorkerGroupStartupTimeoutError
from ray.train.v2.api.exceptions import ControllerError, WorkerGroupError

from clipfh import UserError
from clipfh.cluster import resources as cluster
from clipfh.train import driver


def test_the_list_of_checkpoints_is_never_half_written(tmp_path):
    file = tmp_path / "list.json"
    file.write_text("whole")
    context = SimpleNamespace(
        storage_filesystem=pyarrow.fs.LocalFileSystem(), checkpoint_manager_snapshot_path=str(file)
    )
    manager = SimpleNamespace(_storage_context=context, _save_state=lambda: "new")
    (tmp_path / "list.json.new").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left"):
        driver._write_list(manager)
    assert file.read_text() == "whole"
    driver._write_list(manager)
    assert file.read_text() == "new"


@pytest.mark.parametrize(
    "error,decisions",
    [
        (ControllerError(WorkerGroupStartupTimeoutError(1)), ["RETRY"] * 4),  # others use the cluster: it waits
        (ControllerError(WorkerGroupStartupFailedError()), ["RETRY", "RAISE"]),
        (WorkerGroupError("", {0: RuntimeError("a bug")}), ["RETRY", "RAISE"]),
        (WorkerGroupError("", {0: RuntimeError(), 1: UserError("no memory")}), ["RAISE"]),
    ],
)
def test_what_is_tried_again(error, decisions):
    policy = driver._Patience(FailureConfig(max_failures=1, controller_failure_limit=1))
    assert [policy.make_decision(error).value for _ in decisions] == decisions


def test_a_run_is_known_on_its_cluster_by_its_folder(monkeypatch, tmp_path, tiny):
    """With one name for all, the first run to end would free what another one holds."""
    registered, ended = [], []

    class Trainer:
        def __init__(self, loop, run_config, **rest):
            registered.extend(each.run for each in run_config.callbacks if isinstance(each, cluster.Register))

        def fit(self):
            pass

    monkeypatch.setattr(driver, "_Trainer", Trainer)
    monkeypatch.setattr(cluster, "end", ended.append)
    for name in ("one", "other"):
        driver.fit(tiny, SimpleNamespace(validation=None), tmp_path / name, cluster.Resources(1, 1, 0, 1))
    assert registered == ended == [str(tmp_path / "one"), str(tmp_path / "other")]
