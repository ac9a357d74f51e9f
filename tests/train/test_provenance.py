"""What a run is made of beside its catalogue, known by its contents."""

import pytest

from clipfh import UserError
from clipfh.config import presets
from clipfh.config.experiment import SMALL_MODEL
from clipfh.train import provenance


def test_a_file_of_weights_is_the_same_until_a_checkpoint_has_all_of_them(tmp_path):
    file = tmp_path / "weights.pt"
    file.write_bytes(b"as it was")
    experiment = presets.resolve("image", None, {"model.name": SMALL_MODEL, "model.pretrained": str(file)})
    before = provenance.contents(experiment, None)
    provenance.require_same(before, provenance.contents(experiment, None), tmp_path)
    file.write_bytes(b"as it is")
    with pytest.raises(UserError, match="--resume: the file of --model.pretrained has changed since"):
        provenance.require_same(before, provenance.contents(experiment, None), tmp_path)
    provenance.require_same(before, provenance.contents(experiment, None, has_weights=True), tmp_path)
