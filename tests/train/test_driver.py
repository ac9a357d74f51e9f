"""What the driver of a run asks Ray Train for."""

import pickle
from types import SimpleNamespace

import pytest
import ray.train
from ray.train.v2._internal.execution.checkpoint.checkpoint_manager import CheckpointManager
from ray.train.v2._internal.execution.storage import StorageContext

from clipfh import UserError
from clipfh.cluster import ray_private
from clipfh.cluster.resources import Resources
from clipfh.storage.store import Folder
from clipfh.train import driver, worker


def test_the_list_of_checkpoints_is_never_half_written(tmp_path):
    """Ray Train writes it in place: so it is given a file system, which reaches its controller, that does not."""
    asked = driver._run_config(Folder(tmp_path), retries=0, score="val_mAP")
    given = pickle.loads(pickle.dumps(asked.storage_filesystem))
    storage = StorageContext(asked.storage_path, "checkpoints", given)
    checkpoints = CheckpointManager(ray.train.CheckpointConfig(), storage)
    snapshot = tmp_path / "checkpoints" / "checkpoint_manager_snapshot.json"
    checkpoints._write_state_to_storage()
    whole = snapshot.read_text()
    assert whole.startswith("{")

    snapshot.with_name(f"{snapshot.name}.new").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left"):
        checkpoints._write_state_to_storage()
    assert snapshot.read_text() == whole and list(snapshot.parent.glob("*snapshot*")) == [snapshot]


def test_checkpoints_in_a_bucket_are_written_by_its_own_file_system():
    run = Folder("s3://shop/run")
    asked = driver._run_config(run, retries=0, score="val_mAP")
    assert (asked.storage_path, asked.storage_filesystem) == ("shop/run", run.filesystem)


def test_a_run_is_known_on_its_cluster_by_its_folder(monkeypatch, tmp_path, tiny):
    """With one name for all, the first run to end would free what another one holds."""
    names = []
    trainer = SimpleNamespace(fit=lambda: None)
    monkeypatch.setattr(ray_private, "make_trainer", lambda run, *_, **__: names.append(run) or trainer)
    for name in ("one", "other"):
        driver.run_training(tiny, SimpleNamespace(validation=None), tmp_path / name, Resources(1, 1, 0, 1))
    assert names == [str(tmp_path / "one"), str(tmp_path / "other")]


def test_more_workers_than_images_are_refused(tmp_path, tiny):
    with pytest.raises(UserError, match="--workers 17 is more than a batch has images, 16"):
        driver.run_training(tiny, SimpleNamespace(validation=None), tmp_path, Resources(17, 1, 0, 1))


@pytest.mark.parametrize("gpus", [0, 0.5, 1])
def test_a_worker_computes_on_what_its_run_takes(monkeypatch, tmp_path, tiny, gpus):
    jobs, asked = [], []

    def make_trainer(run, loop, train_loop_config, scaling_config, **_):
        jobs.append(train_loop_config["job"])
        asked.append(scaling_config.resources_per_worker.get("GPU", 0))
        return SimpleNamespace(fit=lambda: None)

    def choose_device(given):
        asked.append(given)
        raise UserError("no further")

    monkeypatch.setattr(ray_private, "make_trainer", make_trainer)
    monkeypatch.setattr(worker, "choose_device", choose_device)
    driver.run_training(tiny, SimpleNamespace(validation=None), tmp_path, Resources(1, 1, gpus, 1))
    with pytest.raises(UserError, match="no further"):
        worker.train_loop(jobs[0], None, None)
    assert asked == [gpus, gpus], "of Ray, and of torch"
