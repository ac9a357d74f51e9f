"""What `audit` shows of a catalogue, and how copies count in an evaluation."""

import dataclasses
import json
import shutil

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch.nn.functional import normalize

import clipfh
from clipfh import UserError
from clipfh.cli import main
from clipfh.data import audit
from clipfh.data.audit import CopiedPhoto, CopyGroup
from clipfh.retrieval import evaluate, metrics, review
from clipfh.retrieval.evaluate import EmbeddedSplits

ITEMS, VIEWS = 30, 4


def embeddings(spread: float = 0.4) -> tuple[torch.Tensor, list[str]]:
    """Views around the mean of their item, and the items."""
    generator = torch.Generator().manual_seed(0)
    means = torch.randn(ITEMS, 16, generator=generator).repeat_interleave(VIEWS, 0)
    noise = torch.randn(means.shape, generator=generator)
    return normalize(means + spread * noise), [f"item{row // VIEWS}" for row in range(len(means))]


def table(items: list[str]) -> pa.Table:
    paths = [f"{row}.jpg" for row in range(len(items))]
    return pa.table({"path": paths, "item_id": items, "split": ["train"] * len(items)})


def test_views_under_the_wrong_item_are_suspected():
    embedding, items = embeddings()
    wrong = {5: "item9", 42: "item2"}
    suspects = review.find_suspects(embedding, table([wrong.get(row, item) for row, item in enumerate(items)]))
    assert {(each.path, each.item_id, each.like) for each in suspects} == {
        ("5.jpg", "item9", "item1"),
        ("42.jpg", "item2", "item10"),
    }
    deviations = [each.deviation for each in suspects]
    assert deviations == sorted(deviations, reverse=True)
    assert review.find_suspects(embedding, table(items)) == []


def test_wrong_labels_that_a_model_has_learned_are_suspected():
    generator = torch.Generator().manual_seed(1)
    means = torch.randn(60, 32, generator=generator) + 3  # cosines of embeddings are large where models are small
    item = torch.arange(60).repeat_interleave(VIEWS)
    is_train = item < 40
    spread = torch.where(is_train, 0.1, 0.6)[:, None]  # what a model has learned lies close together
    embedding = means[item] + spread * torch.randn(len(item), 32, generator=generator)
    learned, seen_first_now = [5, 50, 101], [170, 201]
    for row in learned:  # drawn to the item that they were learned under, and still nearer to their own
        embedding[row] = 0.65 * means[item[row]] + 0.35 * means[item[row] + 1] + embedding[row] - means[item[row]]
    names = [f"item{number}" for number in item.tolist()]
    for row in learned + seen_first_now:
        names[row] = f"item{item[row] + 1}"
    rows = table(names).set_column(2, "split", [["train" if each else "query" for each in is_train.tolist()]])
    suspects = review.find_suspects(normalize(embedding), rows)
    assert {each.path for each in suspects} == {f"{row}.jpg" for row in learned + seen_first_now}
    assert all(each.like == f"item{item[int(each.path[:-4])]}" for each in suspects)


@pytest.mark.parametrize("num_train", [60, 110], ids=["two groups", "too few others"])
def test_suspects_are_those_of_a_loop_and_single_views_are_none(num_train):
    embedding, items = embeddings(spread=0.8)
    items[:2] = ["single", "item7"]
    rows = table(items).set_column(2, "split", [["train"] * num_train + ["query"] * (len(items) - num_train)])
    suspects = {each.path: each for each in review.find_suspects(embedding, rows, 1e-9, -99)}
    assert len(suspects) == len(items) - 1 and "0.jpg" not in suspects
    views = {name: [row for row, its in enumerate(items) if its == name] for name in items}
    groups = [range(1, 60), range(60, len(items))] if num_train == 60 else [range(1, len(items))]

    def distances(row, its):
        """Of a view to the mean of views, and to the nearest."""
        mean = normalize(embedding[its].sum(0), dim=0)
        return [1 - float(embedding[row] @ mean), 1 - max(float(embedding[row] @ embedding[other]) for other in its)]

    for group in groups:
        own = {row: distances(row, [other for other in views[items[row]] if other != row]) for row in group}
        soft = [sorted(column)[(len(group) - 1) // 2] / 4 for column in zip(*own.values(), strict=True)]
        logs = {}
        for row in group:
            others = {name: distances(row, its) for name, its in views.items() if name != items[row]}
            like = min(others, key=lambda name: others[name][0])
            assert suspects[f"{row}.jpg"].like == like
            pairs = zip(own[row], others[like], soft, strict=True)
            logs[row] = np.mean([np.log((mine + much) / (its + much)) for mine, its, much in pairs])
            assert suspects[f"{row}.jpg"].ratio == pytest.approx(np.exp(logs[row]), rel=1e-4)
        median = sorted(logs.values())[(len(group) - 1) // 2]
        deviation = sorted(abs(log - median) for log in logs.values())[(len(group) - 1) // 2]
        for row in group:
            expected = (logs[row] - median) / (1.4826 * deviation)
            assert suspects[f"{row}.jpg"].deviation == pytest.approx(expected, abs=1e-2)


# Copies in an evaluation: items a and b with a query each, and gallery photos


def evaluation(copies: list[CopyGroup]) -> EmbeddedSplits:
    """Query a0 is nearest to its copy a1, then to b1, then to a2; query b0 finds b1 first."""
    query = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    gallery = normalize(torch.tensor([[1.0, 0.0], [0.5, 1.0], [0.2, 1.0]]))
    names = [["a", "b"], ["a", "b", "a"]]
    paths = [["a0", "b0"], ["a1", "b1", "a2"]]
    rows = [
        pa.table(
            {"item_id": n, "path": p, "variant": [""] * len(n), "category": ["c"] * len(n), "gender": ["g"] * len(n)}
        )
        for n, p in zip(names, paths, strict=True)
    ]
    codes = [torch.from_numpy(code) for code in evaluate._codes(rows, copies)]
    both = metrics.Embeddings(torch.cat([query, gallery]), *codes)
    split = both.select(torch.arange(2)), both.select(torch.arange(2, 5))
    return EmbeddedSplits(*split, *rows, None, [], copies)


def group(kind, *photos):
    return CopyGroup(kind, [CopiedPhoto(path, path[0], split) for path, split in photos])


BYTE = group("byte", ("a0", "query"), ("a1", "gallery"))
NEAR = dataclasses.replace(BYTE, kind="near")


def test_a_copy_of_the_query_does_not_count_as_found():
    plain, copied = (evaluate.compute_metrics(evaluation(copies), 0) for copies in ([], [BYTE]))
    assert plain["mAP"] == pytest.approx((np.mean([1, 2 / 3]) + 0.5) / 2)
    assert copied["mAP"] == pytest.approx((1 / 2 + 0.5) / 2), "without a1, a2 is the second"
    assert plain["without_copies"] is None and copied["without_copies"]["mAP"] == copied["mAP"]


def test_near_copies_count_as_found_and_figures_without_them_stand_beside():
    found = evaluate.compute_metrics(evaluation([NEAR]), 0)
    assert found["mAP"] == evaluate.compute_metrics(evaluation([]), 0)["mAP"]
    assert found["without_copies"]["mAP"] == evaluate.compute_metrics(evaluation([BYTE]), 0)["mAP"]


def test_leaks_are_left_out_of_the_figures_without_copies():
    leak = group("near", ("b0", "query"), ("t", "train"))
    found = evaluate.compute_metrics(evaluation([leak]), 0)
    assert (found["num_query"], found["without_copies"]["num_query"], found["without_copies"]["num_gallery"]) == (
        2,
        1,
        3,
    )


def test_figures_without_copies_follow_a_similarity_too():
    embedded = evaluation([NEAR, group("near", ("b1", "gallery"), ("t", "train"))])
    similarity = metrics.cosine(embedded.query, embedded.gallery)
    by_similarity, by_cosine = (evaluate.judge(embedded, 0, similarity=each)[0] for each in (similarity, None))
    assert by_similarity["without_copies"] == by_cosine["without_copies"]


def test_a_query_with_nothing_but_copies_is_counted_and_one_with_nothing_is_refused():
    only_copies = evaluation([group("byte", ("b0", "query"), ("b1", "gallery"))])
    found = evaluate.compute_metrics(only_copies, 0)
    assert (found["num_query"], found["num_unmatched"]) == (1, 1)
    lonely = dataclasses.replace(only_copies, gallery=only_copies.gallery.select(torch.tensor([0, 2])))
    lonely = dataclasses.replace(lonely, gallery_rows=only_copies.gallery_rows.take([0, 2]))
    with pytest.raises(UserError, match="1 of 2 queries have no other image"):
        evaluate.compute_metrics(lonely, 0)


def test_validation_counts_no_copies_and_refuses_nothing_but_copies():
    embedded = evaluation([BYTE])
    assert metrics.mean_average_precision(embedded.query, embedded.gallery) == pytest.approx(0.5)
    copies = embedded.gallery.select(torch.tensor([0]))
    with pytest.raises(UserError, match="no copy"):
        metrics.mean_average_precision(embedded.query.select(torch.tensor([0])), copies)


# The command


def test_the_page_shows_copies_and_the_list_keeps_the_test_photo(small_catalogue):
    leaked, kept = (small_catalogue.rows(split).to_pylist()[0] for split in ("train", "query"))
    copies = [CopyGroup("near", [CopiedPhoto(row["path"], row["item_id"], row["split"]) for row in (leaked, kept)])]
    without = audit.photos_to_leave_out(copies, audit.count_photos(small_catalogue))
    assert without == [leaked["path"]]
    page = review.render_page(small_catalogue, copies, None, without)
    assert page.count("data:image/webp") == 2 and kept["path"] in page and "a leak" in page


def test_a_model_names_suspects_and_those_of_train_alone_are_listed(small_catalogue, tmp_path, capsys, monkeypatch):
    folder = shutil.copytree(small_catalogue.path, tmp_path / "catalogue")
    assert main.main(["audit", str(folder), "--model", "clipfh-small"]) == 0
    assert "Not looked for" not in (folder / "audit.html").read_text()
    monkeypatch.setattr(review, "RATIO", 1.0)
    monkeypatch.setattr(review, "DEVIATIONS", -1.0)
    found = clipfh.audit(folder, settings={"model.name": "clipfh-small"})
    assert found.suspects and {each.split for each in found.suspects} > {"train"}
    of_train = [each.path for each in found.suspects if each.split == "train"]
    assert found.without == of_train == (folder / "without.txt").read_text().split()
    assert len(json.loads((folder / "audit.json").read_text())["suspects"]) == len(found.suspects)
    assert "views look like another item's" in capsys.readouterr().out
