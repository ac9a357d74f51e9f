import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from clipfh import UserError
from clipfh.demo import demo

ITEMS = 24


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("demo") / "source"
    demo.write_source(out, items=ITEMS, seed=3, size=32)
    return out


def rows(source: Path) -> list[list[str]]:
    count, header, *lines = (source / "Eval/list_eval_partition.txt").read_text().splitlines()
    assert header.split() == ["image_name", "item_id", "evaluation_status"]
    assert int(count) == len(lines)
    return [line.split() for line in lines]


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 10**6), st.sampled_from(demo.VIEWS))
def test_every_garment_can_be_photographed_and_described(seed, index, view):
    item = demo.garment(seed, index)
    for variant in range(len(item.colors)):
        photo = demo.draw(item, variant, view, seed, 48)
        assert photo.size == (48, 48) and photo.mode == "RGB"
        assert np.asarray(photo).std() > 5
    text = " ".join(demo.describe(item))
    words = [item.colors[0].name, item.kind, item.material, *(demo.WORDS[name] for name in item.details)]
    words += [] if item.pattern == "plain" else [item.pattern, item.accent.name]
    words += [demo.WORDS[item.neckline]] if demo.KINDS[item.kind].torso else []
    assert [word for word in words if word.lower() not in text.lower()] == []


def test_a_photo_is_a_function_of_its_arguments():
    item = replace(demo.garment(0, 1), colors=demo.garment(0, 1).colors * 2)
    base = demo.draw(item, 0, "1_front", 0, 48).tobytes()
    assert demo.garment(0, 1) == demo.garment(0, 1) != demo.garment(1, 1)
    assert base == demo.draw(item, 0, "1_front", 0, 48).tobytes()
    others = [demo.draw(item, 1, "1_front", 0, 48), demo.draw(item, 0, "2_side", 0, 48)]
    others += [demo.draw(item, 0, "1_front", 1, 48), demo.draw(replace(item, hem=item.hem + 0.2), 0, "1_front", 0, 48)]
    assert base not in [other.tobytes() for other in others]


@pytest.mark.parametrize("detail", ["logo", "zip", "buttons", "chest pocket", "pouch", "side pockets"])
def test_the_back_shows_nothing_of_the_front(detail):
    item = next(g for g in (demo.garment(0, i) for i in range(1, 99)) if g.kind == "hoodie")
    with_it, without = replace(item, details=(detail,)), replace(item, details=())
    front, back = (
        [demo.draw(g, 0, view, 0, 64).tobytes() for g in (with_it, without)] for view in ("1_front", "3_back")
    )
    assert front[0] != front[1]
    assert back[0] == back[1]


def test_the_same_seed_writes_the_same_bytes(source, tmp_path):
    demo.write_source(tmp_path / "again", items=ITEMS, seed=3, size=32)
    trees = [{p.relative_to(root): p.read_bytes() for p in root.rglob("*.*")} for root in (source, tmp_path / "again")]
    assert trees[0] == trees[1]


def test_layout(source):
    listed = rows(source)
    assert sorted(row[0] for row in listed) == sorted(str(p.relative_to(source)) for p in source.rglob("*.jpg"))
    for path, item_id, _ in listed:
        top, gender, _, folder, name = path.split("/")
        assert (top, folder) == ("img", item_id) and gender in ("MEN", "WOMEN")
        assert name[:2].isdigit() and name[3:-4] in demo.VIEWS
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


def test_colours_find_the_same_item_far_better_than_chance_and_not_always():
    """Otherwise the views would not show one garment, or there would be nothing to learn."""
    shots = [(i, view) for i in range(1, 41) for view in demo.VIEWS]
    photos = [np.asarray(demo.draw(demo.garment(0, i), 0, view, 0, 48))[12:36, 15:33] for i, view in shots]
    histograms = np.stack([np.bincount((photo // 43 @ [36, 6, 1]).ravel(), minlength=216) for photo in photos])
    overlap = np.minimum(histograms[:, None], histograms[None]).sum(-1)
    np.fill_diagonal(overlap, -1)
    item = np.array([i for i, _ in shots])
    others = len(demo.VIEWS) - 1
    found = (item[np.argsort(-overlap, 1)[:, :others]] == item[:, None]).mean()
    assert 0.4 < found < 0.9, "share of the nearest photos that show the same item; chance is .02"


def test_refuses_to_overwrite(tmp_path):
    with pytest.raises(UserError, match="there already"):
        demo.write_source(tmp_path, items=2, seed=0)


def test_a_failure_leaves_nothing_that_looks_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "describe", lambda item: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        demo.write_source(tmp_path / "source", items=2, seed=0, size=32)
    assert not (tmp_path / "source").exists()
    monkeypatch.undo()
    demo.write_source(tmp_path / "source", items=2, seed=0, size=32)
    assert (tmp_path / "source/Anno/list_description_inshop.json").exists()
