import csv
import functools
import json
import math
import shlex
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clipfh import UserError, config, report

HOSTILE = "<script>alert('a & \"b\"')</script>"
VOID = {"meta", "br"}


class Page(HTMLParser):
    """A page's text, ids, links and table rows; unclosed or crossed elements are an error."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.rows: list[list[str]] = []
        self.source = file.read_text()
        self.feed(self.source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("th", "td"):
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" in self.open:
            return
        self.text += data
        if "td" in self.open or "th" in self.open:
            self.rows[-1][-1] += data

    def row(self, name: str) -> list[str]:
        return next(row[1:] for row in self.rows if row[0] == name)

    def values(self, name: str) -> list[str | None]:
        return [value for key, value in self.attributes if key == name]


def figures(mAP: float = 0.6, category: str = "Dresses", half: float = 0.02) -> dict:
    """What `metrics.json` holds; the same-variant figures of an evaluation without variants are null."""
    keys = ("mAP", *(f"rank{k}" for k in (1, 5, 10, 20, 30, 40, 50)), "mAP_at_R", "mINP")
    found = {key: min(1.0, mAP + 0.02 * i) for i, key in enumerate(keys)}
    found |= {"num_query": 14218, "num_gallery": 12612, "num_unmatched": 0}
    found["intervals"] = {key: [found[key] - half, found[key] + half] for key in keys}
    nothing = {**dict.fromkeys(keys), "num_query": 0, "num_gallery": 12612, "intervals": dict.fromkeys(keys)}
    group = {k: found[k] for k in ("mAP", "rank1", "num_query", "intervals")}
    return {
        **found,
        "variant": {"same": {**found, "num_query": 13593}, "cross": nothing},
        "by_category": {category: group, "Pants": {**group, "num_query": 12, "intervals": dict.fromkeys(keys)}},
        "by_gender": {"WOMEN": group},
        "random_splits": {key: {"mean": mAP, "std": 0.004, "values": [mAP] * 10} for key in keys},
        "text_to_image": found,
        "image_to_text": None,
    }


def make_evaluation(folder: Path, mAP: float = 0.6, category: str = "Dresses") -> Path:
    folder.mkdir(parents=True)
    (folder / "metrics.json").write_text(json.dumps(figures(mAP, category)))
    return folder


def reports(top: float, images: int = 60_000, count: int = 6) -> list[dict]:
    """Lines of `metrics.jsonl` that rise to a val mAP of `top`."""
    seen = [images * (i + 1) // count for i in range(count)]
    val = [top * (1 - math.exp(-4 * (i + 1) / count)) / (1 - math.exp(-4)) for i in range(count)]
    return [
        {
            "step": n // 128,
            "images": n,
            "epoch": n / 25882,
            "val_mAP": v,
            "loss": 4.5 - 3 * v,
            "loss_supcon": 4 - 3 * v,
            "floor_supcon": 1.1,
            "collapse_supcon": 4.844,
            "loss_center": 0.5 - 0.1 * v,
            "grad_norm": 3.2,
            "images_per_second": 251.0,
            "data_wait": 0.012,
            "image_text_cosine": 0.31,
            "lr": 1e-3 * (1 - n / images),
            "best_val_mAP": max(val[: i + 1]),
        }
        for i, (n, v) in enumerate(zip(seen, val, strict=True))
    ]


@functools.cache
def experiment_json() -> str:
    return config.to_json(config.resolve("image", None, {"model.name": "clipfh-small"}))


def make_run(folder: Path, lines: list[dict]) -> Path:
    folder.mkdir(parents=True)
    (folder / "experiment.json").write_text(experiment_json())
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return folder


SEARCHED = ["optimizer.lr", "batch.views", "loss.triplet"]


def make_sweep(folder: Path, trials: list[dict], zero_shot: float | None = 0.23, name: str = "demo") -> Path:
    """A sweep folder without its summary. trials: status, and val_mAP or error."""
    folder.mkdir(parents=True)
    (folder / "sweep.yaml").write_text(json.dumps({"name": name, "stage": "image", "trials": len(trials) + 3}))
    rows = [] if zero_shot is None else [{"trial": "0000", "status": "zero-shot", "val_mAP": zero_shot, "images": 0}]
    for i, trial in enumerate(trials, 1):
        settings = {"optimizer.lr": 1.23456e-4 * i, "batch.views": 4}
        rows.append({"trial": f"{i:04d}", "images": 60_000, "seconds": 75.5, **settings, **trial})
        if "val_mAP" in trial:
            make_run(folder / "trials" / f"{i:04d}", reports(trial["val_mAP"]))
    rows.sort(key=lambda row: float(row.get("val_mAP", -1)), reverse=True)
    with (folder / "leaderboard.csv").open("w", newline="") as file:
        columns = ["rank", "trial", "status", "val_mAP", "images", "seconds", *SEARCHED, "error"]
        writer = csv.DictWriter(file, columns, restval="")
        writer.writeheader()
        writer.writerows({"rank": i, **row} for i, row in enumerate(rows, 1))
    return folder


def finish(folder: Path, best: str, test: dict, zero_shot: dict) -> Path:
    """Write the summary of a sweep."""
    experiment = config.resolve(
        "image", None, {"model.name": "clipfh-small", "optimizer.lr": 2e-3, "loss.triplet": 0.5}
    )
    summary = {
        "name": "demo",
        "best_trial": best,
        "val_mAP": 0.7,
        "zero_shot_val_mAP": 0.23,
        "test": test,
        "zero_shot": zero_shot,
        "trials": 3,
        "failed": 0,
        "seconds": 3725.0,
        "experiment": config.flat(experiment),
        "searched": SEARCHED,
        "catalogue": {"path": "shop", "hash": "abc123", "counts": {"train": {"images": 25882, "items": 3997}}},
    }
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder


DONE = [
    {"status": "stopped", "val_mAP": 0.31},
    {"status": "done", "val_mAP": 0.7},
    {"status": "running", "val_mAP": 0.2},
]


def test_a_sweep_says_who_won_with_figures_intervals_and_the_command(tmp_path):
    folder = finish(make_sweep(tmp_path / "s", DONE), "0002", figures(0.612), figures(0.231))
    out = report.write([folder])
    assert out == folder / "report.html" and list(folder.glob("*.new")) == []
    page = Page(out)
    verdict = "The winner, trial 0002, finds the same item with mAP 0.612 [0.592, 0.632] against 0.231 [0.211, 0.251]"
    assert verdict in page.text and "chance" not in page.text
    assert page.row("mAP") == ["0.231 [0.211, 0.251]", "0.612 [0.592, 0.632]"]
    assert page.row("Rank-1") == ["0.251 [0.231, 0.271]", "0.632 [0.612, 0.652]"]
    assert page.row("Same-variant mAP") == page.row("mAP")
    assert "13,593 and 0" in page.text and not any(row[0].startswith("Cross-variant") for row in page.rows)
    assert page.row("Dresses")[0] == "14,218" and page.row("Pants") == ["12", "0.231", "0.251", "0.612", "0.632"]
    assert page.row("0002")[:5] == ["0.700", "done", "60,000", "1 min 16 s", "0.000247"]
    assert page.row("0000") == ["0.230", "zero-shot", "0", "–", "–", "–", "–", "–"]
    assert page.row("Trials") == ["1 done, 1 stopped, 1 running"]
    assert page.row("Images seen by all trials") == ["180,000"]
    assert page.row("Time from start to end") == ["1 h 02 min"]
    assert "clipfh train image CATALOGUE --out DIR" in page.text and "--optimizer.lr 0.002" in page.text
    assert page.tags.count("figure") == 2
    assert sorted(kind for kind in page.values("class") if kind in ("main", "quiet", "dashed")) == sorted(
        # a curve each and a key each: best so far; then the best trial, the two others, zero-shot
        ["main"] * 2 + ["main"] * 2 + ["quiet"] * 3 + ["dashed"] * 2
    )


@pytest.mark.parametrize(
    ("best", "after", "before", "said"),
    [
        ("0000", 0.231, 0.231, "Tuning made nothing better: zero-shot wins, with mAP 0.231"),
        ("0002", 0.25, 0.23, "The intervals overlap: the gain may be chance."),
        ("0002", 0.22, 0.23, "It was better on the validation items only."),
    ],
)
def test_a_sweep_claims_no_more_than_it_found(tmp_path, best, after, before, said):
    page = Page(report.write([finish(make_sweep(tmp_path / "s", DONE), best, figures(after), figures(before))]))
    assert said in page.text
    assert ("clipfh train" in page.text) == (best != "0000")


def test_a_sweep_with_nothing_but_a_failed_trial(tmp_path):
    failed = [{"status": "failed", "error": "RuntimeError: out of memory"}]
    page = Page(report.write([make_sweep(tmp_path / "s", failed, zero_shot=None)]))
    assert "1 of 4 trials ended. The leaderboard has no figure yet." in page.text
    assert page.row("0001")[:2] == ["–", "failed"] and page.row("0001")[-1] == "RuntimeError: out of memory"
    assert "figure" not in page.tags


def test_a_sweep_that_has_only_begun(tmp_path):
    (tmp_path / "sweep.yaml").write_text("name: fresh\ntrials: 64\n")
    assert "0 of 64 trials ended" in Page(report.write([tmp_path])).text


def test_a_running_sweep_of_200_trials(tmp_path):
    trials = [{"status": "done", "val_mAP": 0.2 + i / 1000} if i % 10 else {"status": "failed"} for i in range(200)]
    file = report.write([make_sweep(tmp_path / "s", trials)])
    page = Page(file)
    assert (
        "200 of 203 trials ended. So far trial 0200 leads with validation mAP 0.399 against 0.230 zero-shot"
        in page.text
    )
    assert [row[0] for row in page.rows if row[0].isdigit()][:2] == ["0200", "0199"]
    assert page.values("class").count("dots") == 181 + 1 and page.values("class").count("crosses") == 20 + 1
    assert page.values("class").count("quiet") == 179 + 1
    assert file.stat().st_size < 300_000


def test_a_trial_that_diverged_is_no_low_point_and_one_that_failed_keeps_its_figure(tmp_path):
    trials = [{"status": "failed", "val_mAP": 0.5}, {"status": "diverged", "val_mAP": 0.0}, {"status": "failed"}]
    page = Page(report.write([make_sweep(tmp_path / "s", trials)]))
    assert "trial 0001: 0.500" in page.text and "trial 0002 diverged" in page.text and "trial 0003 failed" in page.text
    assert page.values("class").count("dots") == 2 + 1 and page.values("class").count("crosses") == 2 + 1


def test_a_run_shows_its_curve_losses_and_settings(tmp_path):
    page = Page(report.write([make_run(tmp_path / "r", reports(0.7))]))
    assert "Best validation mAP 0.700, after 60,000 images; 60,000 seen of a budget of 60,000 images." in page.text
    assert page.row("supcon") == ["1.9", "1.1", "4.84", "21%"]  # (4 - 3 x .7 - 1.1) / (4.844 - 1.1)
    assert page.row("center") == ["0.43", "–", "–", "–"]
    assert page.row("optimizer.lr")[0] == "0.001"
    assert page.row("Share of time waiting for images") == ["0.012"]
    assert page.tags.count("figure") == 3


def test_a_run_that_diverged_keeps_its_best_and_says_why(tmp_path):
    end = {"step": 300, "images": 38400, "val_mAP": 0.0, "best_val_mAP": 0.0, "diverged": "nan & inf at step 300"}
    page = Page(report.write([make_run(tmp_path / "r", [*reports(0.7)[:3], end])]))
    assert "Diverged after 38,400 images: nan & inf at step 300." in page.text
    assert f"Best validation mAP {reports(0.7)[2]['val_mAP']:.3f}, after 30,000 images; 30,000 seen" in page.text
    assert "No validation figure yet. Diverged" in Page(report.write([make_run(tmp_path / "at-once", [end])])).text


def test_an_evaluation(tmp_path):
    page = Page(report.write([make_evaluation(tmp_path / "e", 0.6)], tmp_path / "new" / "page.html"))
    assert "mAP 0.600 [0.580, 0.620], Rank-1 0.620 [0.600, 0.640]." in page.text
    assert "14,218 queries, 12,612 gallery images" in page.text and "over 10 splits" in page.text
    assert ["mAP", "0.600 ± 0.004"] in page.rows and page.row("Text to image mAP") == ["0.600 [0.580, 0.620]"]
    assert page.row("WOMEN")[0] == "14,218"


def test_an_evaluation_of_the_bare_figures(tmp_path):
    (tmp_path / "metrics.json").write_text(
        '{"mAP": 0.5, "rank1": NaN, "num_query": 3, "num_gallery": 4, "by_gender": null}'
    )
    page = Page(report.write([tmp_path]))
    assert page.row("mAP") == ["0.500"] and page.row("Rank-1") == ["–"] and "nan" not in page.text.lower()


def test_several_are_compared_first(tmp_path):
    sweep = finish(make_sweep(tmp_path / "s", DONE), "0002", figures(0.612), figures(0.231))
    run, evaluation = make_run(tmp_path / "r", reports(0.7)), make_evaluation(tmp_path / "e")
    page = Page(report.write([sweep, run, evaluation], tmp_path / "page.html"))
    assert page.rows[0] == ["", "s", "r", "e"]
    assert page.row("Validation mAP") == ["0.700", "0.700", "–"]
    assert page.row("mAP") == ["0.612 [0.592, 0.632]", "–", "0.600 [0.580, 0.620]"]
    assert page.values("href") == ["#part-1", "#part-2", "#part-3"]
    assert {"part-1", "part-2", "part-3"} <= set(page.values("id"))
    assert "compare them with care" not in page.text


def test_a_comparison_over_different_images_is_said_to_be_one(tmp_path):
    first, second = make_evaluation(tmp_path / "a" / "eval"), make_evaluation(tmp_path / "b" / "eval")
    (second / "metrics.json").write_text(json.dumps({**figures(), "num_query": 10}))
    page = Page(report.write([first, second]))
    assert "compare them with care" in page.text
    assert page.rows[0] == ["", str(first), str(second)]  # their own names are alike


def test_text_from_files_stays_text_and_nothing_is_fetched(tmp_path):
    hostile = [{"status": "failed", "error": f"{HOSTILE}\nhttp://somewhere/x.js"}, {"status": "done", "val_mAP": 0.7}]
    zero_shot = figures(category=HOSTILE)
    sweep = finish(make_sweep(tmp_path / "s", hostile, name=HOSTILE), "0002", zero_shot, zero_shot)
    evaluation = make_evaluation(tmp_path / "<b onclick=x>&", category=HOSTILE)
    page = Page(report.write([sweep, evaluation], tmp_path / "page.html"))
    assert page.text.count(HOSTILE) == 4  # title, error, category twice
    assert "script" not in page.tags and "b" not in page.tags
    assert not {"src", "srcset", "onclick", "action", "data"} & {name for name, _ in page.attributes}
    assert all(link.startswith("#") for link in page.values("href"))
    assert "url(" not in page.source and "@import" not in page.source


@given(
    stage=st.sampled_from(["image", "joint"]),
    changed=st.fixed_dictionaries(
        {},
        optional={
            "model.name": st.sampled_from(["clipfh-small", "RN50"]),
            "model.pretrained": st.sampled_from(["", "my weights.pt", "it's"]),
            "model.freeze_patch": st.booleans(),
            "optimizer.lr": st.floats(1e-7, 1e-2),
            "loss.triplet": st.floats(0, 2),
            "batch.views": st.integers(2, 8),
            "budget.epochs": st.floats(0.5, 50),
        },
    ),
)
@settings(max_examples=15, deadline=None)
def test_the_command_trains_the_same_experiment(stage, changed):
    experiment = config.resolve(stage, None, changed)
    line = report.command(config.flat(experiment), ["optimizer.lr"])
    words = shlex.split(line.replace("\\\n", ""))
    assert words[:6] == ["clipfh", "train", stage, "CATALOGUE", "--out", "DIR"] and "--optimizer.lr" in words
    names = [word.removeprefix("--") for word in words[6::2]]
    given_back = {n: config.parse(n, value) for n, value in zip(names, words[7::2], strict=True)}
    assert config.resolve(stage, None, given_back) == experiment


@given(values=st.lists(st.floats(-1e6, 1e7) | st.just(0.5), min_size=1, max_size=5), least=st.sampled_from([0.0, 1.0]))
def test_an_axis_holds_its_values_between_few_round_ticks_with_distinct_labels(values, least):
    axis = report.Axis(values, least)
    assert 2 <= len(axis.ticks) <= 7
    assert all(-1e-6 <= float(axis.place(value)) <= 100 + 1e-6 for value in values)
    labels = [axis.label(tick) for tick in axis.ticks]
    assert len(set(labels)) == len(labels)


def test_a_foreign_folder_is_refused_in_one_line(tmp_path):
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    (checkpoint / "metrics.json").write_text('{"val_mAP": 0.5, "step": 3}')
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "metrics.json").write_text("{")
    for folder in (tmp_path, tmp_path / "missing", checkpoint, broken):
        with pytest.raises(UserError, match=str(folder)) as caught:
            report.write([folder])
        assert "\n" not in str(caught.value)
        assert not (folder / "report.html").exists()


def test_a_file_that_cannot_be_written_is_refused(tmp_path):
    evaluation = make_evaluation(tmp_path / "e")
    (tmp_path / "file").touch()
    for out in (tmp_path, tmp_path / "file" / "page.html"):
        with pytest.raises(UserError, match="--out"):
            report.write([evaluation], out)
    assert not tmp_path.with_name(f"{tmp_path.name}.new").exists()
