"""A catalogue that is whole, or refused."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from shop import SHOP, shop

from clipfh import UserError
from clipfh.data import catalogue
from clipfh.data.catalogue import open_catalogue
from clipfh.data.prepare import prepare


def test_open_catalogue_refuses_what_is_not_whole(tmp_path, quick):
    made = prepare(shop(tmp_path / "source"), tmp_path / "out")
    manifest = tmp_path / "out/catalogue.json"
    content = json.loads(manifest.read_text())
    shard = Path(made.shards("train")[0])
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(UserError, match="train-00000.*cut short"):
        open_catalogue(tmp_path / "out")
    elsewhere = shard.rename(tmp_path / shard.name)
    outside = {f"../{shard.name}": elsewhere.stat().st_size}
    manifest.write_text(json.dumps(content | {"shards": {**content["shards"], "train": outside}}))
    with pytest.raises(UserError, match=f"{shard.name}: missing"):
        open_catalogue(tmp_path / "out")
    manifest.write_text(json.dumps(content | {"version": 1}))
    with pytest.raises(UserError, match="version 1, and this clipfh reads version 2.*run clipfh prepare again"):
        open_catalogue(tmp_path / "out")
    manifest.write_text(json.dumps({"format": "other"}))
    with pytest.raises(UserError, match="not the manifest"):
        open_catalogue(tmp_path / "out")
    manifest.write_text(json.dumps(content)[:-9])
    with pytest.raises(UserError, match="can't be read"):
        open_catalogue(tmp_path / "out")
    with pytest.raises(UserError, match="not a catalogue"):
        open_catalogue(tmp_path / "source")
    (tmp_path / "other.partial").mkdir()
    with pytest.raises(UserError, match="half-written"):
        open_catalogue(tmp_path / "other")


def test_require(tmp_path, quick):
    rows = [row for row in SHOP if row[2] != "train" or row[1] == "item0"]
    made = prepare(shop(tmp_path / "source", rows=rows), tmp_path / "out")
    made.require("train", "query", "gallery")
    assert made.rows("val_query").num_rows == made.images("val_gallery").num_rows == 0
    assert made.rows("val_query").schema.names == list(catalogue.COLUMNS)
    assert any("no validation items" in note for note in made.manifest["notes"])
    with pytest.raises(UserError, match="no val_query images"):
        made.require("train", "val_query")


def test_importing_takes_neither_torch_nor_ray():
    code = "import clipfh.data.catalogue, sys; sys.exit(bool({'torch', 'ray', 'open_clip'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
