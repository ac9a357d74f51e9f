"""The drawn source: In-Shop's layout, reproducible, whole or not there."""

import json
from pathlib import Path

import pytest
from PIL import Image

from clipfh import UserError
from clipfh.demo import source as read_module
from clipfh.demo.drawing import VIEWS
from clipfh.demo.source import write_source

ITEMS = 24


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("demo") / "source"
    write_source(out, items=ITEMS, seed=3, size=32)
    return out


def rows(source: Path) -> list[list[str]]:
    count, header, *lines = (source / "Eval/list_eval_partition.txt").read_text().splitlines()
    assert header.split() == ["image_name", "item_id", "evaluation_status"]
    assert int(count) == len(lines)
    return [line.split() for line in lines]


def test_the_same_seed_writes_the_same_bytes(source, tmp_path):
    write_source(tmp_path / "again", items=ITEMS, seed=3, size=32)
    trees = [{p.relative_to(root): p.read_bytes() for p in root.rglob("*.*")} for root in (source, tmp_path / "again")]
    assert trees[0] == trees[1]


def test_layout(source):
    listed = rows(source)
    assert sorted(row[0] for row in listed) == sorted(str(p.relative_to(source)) for p in source.rglob("*.jpg"))
    for path, item_id, _ in listed:
        top, gender, _, folder, name = path.split("/")
        assert (top, folder) == ("img", item_id) and gender in ("MEN", "WOMEN")
        assert name[:2].isdigit() and name[3:-4] in VIEWS
        assert Image.open(source / path).size == (32, 32)
    texts = json.loads((source / "Anno/list_description_inshop.json").read_text())
    assert [text["item"] for text in texts] == [f"id_{i:08d}" for i in range(1, ITEMS + 1)]
    assert all(text["color"] in text["description"][0] for text in texts)


def test_split(source):
    statuses: dict[str, list[str]] = {}
    for _, item_id, status in rows(source):
        statuses.setdefault(item_id, []).append(status)
    assert len(statuses) == ITEMS and min(map(len, statuses.values())) >= 2
    train = [item for item, seen in statuses.items() if set(seen) == {"train"}]
    test = [item for item, seen in statuses.items() if set(seen) == {"query", "gallery"}]
    assert len(train) == round(ITEMS * 0.75) and len(train) + len(test) == ITEMS


def test_refuses_to_overwrite(tmp_path):
    with pytest.raises(UserError, match="there already"):
        write_source(tmp_path, items=2, seed=0)


def test_a_failure_leaves_nothing_that_looks_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(read_module, "describe", lambda item: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_source(tmp_path / "source", items=2, seed=0, size=32)
    assert not (tmp_path / "source").exists()
    monkeypatch.undo()
    write_source(tmp_path / "source", items=2, seed=0, size=32)
    assert (tmp_path / "source/Anno/list_description_inshop.json").exists()
