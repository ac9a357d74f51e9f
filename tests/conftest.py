"""One small drawn catalogue and one Ray cluster for the whole suite, or for each process that runs a part of it."""

import os
from pathlib import Path

import object_store
import pytest
import torch
from PIL import Image
from shop import SameProcess

from clipfh.config import presets
from clipfh.config.experiment import SMALL_MODEL, Experiment, Placement
from clipfh.data import catalogue
from clipfh.data import prepare as prepare_module
from clipfh.data.prepare import prepare
from clipfh.demo.source import write_source
from clipfh.storage import store

os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "60")
os.environ.setdefault("RAY_TRAIN_ENABLE_STATE_ACTOR_RECONCILIATION", "0")

# The tensors are small, and threads that wait for each other on a busy machine cost twenty times what they compute
torch.set_num_threads(1)

TINY = {
    "model.name": SMALL_MODEL,
    "batch.items": 8,
    "batch.views": 2,
    "budget.images": 192,
    "budget.report_every": 64,
    "augment.crop_min": 0.5,
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests come first: a process that begins one at the end keeps the others waiting."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(scope="session")
def source(tmp_path_factory) -> Path:
    """Photos of 40 drawn garments, as In-Shop is distributed."""
    out = tmp_path_factory.mktemp("source") / "photos"
    write_source(out, items=40, seed=1, size=64)
    return out


@pytest.fixture(scope="session")
def small_catalogue(source, tmp_path_factory) -> catalogue.Catalogue:
    return prepare(str(source), tmp_path_factory.mktemp("catalogue") / "tiny", image_size=64)


@pytest.fixture(scope="session")
def ray_cluster(tmp_path_factory):
    """The suite's own cluster, its files out of the way of any other."""
    import ray

    from clipfh.cluster import connect

    # A socket's path has room for no more than about 100 letters
    os.environ["RAY_TMPDIR"] = f"/tmp/clipfh-tests/{os.environ.get('PYTEST_XDIST_WORKER', 'alone')}"
    connect.connect("local", Placement(workers=2))
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def tiny() -> Experiment:
    return presets.resolve("image", None, TINY)


@pytest.fixture(scope="session")
def s3_server():
    with object_store.serve() as store:
        yield store


@pytest.fixture
def bucket(s3_server, monkeypatch):
    """An object store with an empty bucket, and what is set to use it."""
    for name, value in s3_server.env.items():
        monkeypatch.setenv(name, value)
    yield s3_server
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server.endpoint)
    store.Folder(f"s3://{object_store.BUCKET}").clear()
    s3_server.requests.clear()


@pytest.fixture(params=["local", "s3"])
def place(request, tmp_path) -> store.Folder:
    """A folder that is not there yet, on the disk and in a bucket."""
    if request.param == "local":
        return store.Folder(tmp_path / "place")
    return store.Folder(request.getfixturevalue("bucket").uri("place"))


@pytest.fixture
def quick(monkeypatch):
    """Prepare in this process: starting processes is most of a small catalogue's time."""
    monkeypatch.setattr(prepare_module, "ProcessPoolExecutor", SameProcess)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
