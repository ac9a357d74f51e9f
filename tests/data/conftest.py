import pytest
from PIL import Image
from shop import SameProcess

from clipfh.data import prepare as prepare_module


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(prepare_module, "ProcessPoolExecutor", SameProcess)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
