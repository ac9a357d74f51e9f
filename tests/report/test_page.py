import json
import re
import shlex
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from madeup import FILE, figures, finish, reports, write_sweep

from clipfh import UserError
from clipfh.config import presets, schema
from clipfh.report import examples, sweep_charts
from clipfh.report import page as page_module

HOSTILE = "<script>alert('a & \"b\"')</script>"
VOID = {"meta", "br", "img", "wbr"}


class Page(HTMLParser):
    """A page's text, attributes, figures and table rows; unclosed or crossed elements are an error."""

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
        self.text += " ".join(data.split()) + " " if data.strip() else ""
        if "td" in self.open or "th" in self.open:
            self.rows[-1][-1] = f"{self.rows[-1][-1]} {' '.join(data.split())}".strip()

    def row(self, name: str) -> list[str]:
        return next(row[1:] for row in self.rows if row[0] == name)

    def values(self, name: str) -> list[str | None]:
        return [value for key, value in self.attributes if key == name]

    @property
    def charts(self) -> list[str | None]:
        return self.values("aria-label")


def make_evaluation(folder: Path, mAP: float = 0.6, **changes) -> Path:
    folder.mkdir(parents=True)
    (folder / "metrics.json").write_text(json.dumps({**figures(mAP), **changes}))
    return folder


def make_run(folder: Path, lines: list[dict]) -> Path:
    folder.mkdir(parents=True)
    experiment = presets.resolve("image", None, {"model.name": "clipfh-small", "optimizer.lr": 2e-3})
    (folder / "experiment.json").write_text(schema.to_json(experiment))
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return folder


def make_sweep(folder: Path, endings: str = "sdfd", **changes) -> Path:
    write_sweep(folder, endings, **changes)
    return folder


def test_a_sweep_says_who_won_with_figures_intervals_and_the_command(tmp_path):
    folder = finish(make_sweep(tmp_path / "s"), "0002", figures(0.612), figures(0.231))
    out = page_module.write([folder])
    assert Path(out) == folder / "report.html" and list(folder.glob("*.new")) == []
    page = Page(out)
    assert "The winner, trial 0002, finds the same item with mAP 0.612 [0.592, 0.632] against 0.231" in page.text
    assert "may be chance" not in page.text
    assert page.row("mAP") == ["0.231 [0.211, 0.251]", "0.612 [0.592, 0.632]"]
    assert page.row("Rank-1") == ["0.251 [0.231, 0.271]", "0.632 [0.612, 0.652]"]
    assert page.row("Dresses")[0] == "14,218" and page.row("Pants") == ["12", "0.231", "0.251", "0.612", "0.632"]
    assert page.row("0000")[:2] == ["0.230", "zero-shot"]
    assert page.row("Trials") == ["2 done, 1 stopped, 1 failed"]
    assert page.row("GPU hours of all workers") == ["0.16"]  # 2 workers with half a GPU for 560 s
    assert page.row("Time since the last start") == ["1 h 02 min"]
    assert page.row("train") == ["25,882", "3,997"] and "12 prompts of train items are longer" in page.text
    assert ["0002", "0.690", "0.700, 0.680"] in page.rows and "on train and validation items together" in page.text
    assert page.row("optimizer. lr")[0] == "0.0001 to 0.01 (log)"
    assert "clipfh train image CATALOGUE --out DIR" in page.text and "--optimizer.lr 0.002" in page.text
    assert page.charts == [
        "Figures with intervals",
        "Cumulative match curve",
        "mAP with intervals",  # text and image
        "mAP with intervals",  # by category
        "Validation mAP by trial",
        "Learning curves",
        "Settings of all trials and what they reached",
        *(f"Validation mAP by {name}" for name in FILE["search"]),
    ]
    assert "No pictures:" in page.text


def test_what_it_took_counts_the_final_runs_and_the_refit(tmp_path):
    folder = finish(make_sweep(tmp_path / "s"), "0002", figures(0.612), figures(0.231))
    for name in ("0002-again-1", "0002-again-2", "refit"):
        lines = [
            {**line, "began": 100.0 + 1000 * (i > 2), "time": 200.0 + 1000 * (i > 2)}
            for i, line in enumerate(reports(0.7))
        ]
        make_run(folder / "final" / name, lines)  # each was killed once: 100 s before, 100 s after
    page = Page(page_module.write([folder]))
    assert page.row("Final runs") == ["3, the refit included"] and page.row("Images seen by final runs") == ["180,000"]
    assert page.row("Time of final runs, added up") == ["10 min 00 s"]
    assert page.row("GPU hours of all workers") == ["0.32"]  # 2 workers with half a GPU for 560 + 600 s


@pytest.mark.parametrize(
    ("best", "after", "before", "gain", "said"),
    [
        ("0000", 0.231, 0.231, [0, 0], "Tuning made nothing better: zero-shot wins, with mAP 0.231"),
        (
            "0002",
            0.25,
            0.23,
            [-0.01, 0.05],
            "by +0.020 [-0.010, +0.050] over the same queries: it may be chance.",
        ),
        ("0002", 0.25, 0.23, [0.01, 0.03], "mAP changes by +0.020 [+0.010, +0.030] over the same queries. "),
        ("0002", 0.25, 0.23, None, "Whether the gain is chance can't be told"),
        ("0002", 0.22, 0.23, [-0.01, 0.01], "It was better on the validation items only."),
    ],
)
def test_a_sweep_claims_no_more_than_it_found(tmp_path, best, after, before, gain, said):
    """By the interval of the gain: those of both models overlap wherever queries differ in difficulty."""
    folder = finish(make_sweep(tmp_path / "s"), best, figures(after), figures(before))
    summary = json.loads((folder / "summary.json").read_text())
    told = {"mAP": after - before, "interval": gain} if gain else {}
    (folder / "summary.json").write_text(json.dumps({**summary, "gain": told}))
    page = Page(page_module.write([folder]))
    assert said in page.text
    assert ("clipfh train" in page.text) == (best != "0000")
    assert ("and that model is what the test" in page.text) == (best != "0000"), "a refit of this sweep's winner"


def test_a_sweep_with_nothing_but_a_failed_trial(tmp_path):
    page = Page(page_module.write([make_sweep(tmp_path / "s", "f")]))
    assert "1 of 1 trials ended. So far nothing beats the validation mAP of 0.230 zero-shot" in page.text
    assert page.row("0001")[:2] == ["–", "failed"] and page.row("0001")[-1] == "RuntimeError: out of memory"
    assert page.charts == []


def test_a_sweep_that_has_only_begun(tmp_path):
    folder = make_sweep(tmp_path / "s", "d", trials=64)
    (folder / "leaderboard.csv").unlink()
    page = Page(page_module.write([folder]))
    assert "0 of 64 trials ended. The leaderboard has no figure yet." in page.text


def test_a_running_sweep_of_200_trials(tmp_path):
    search = {f"loss.{name}": {"loguniform": [0.1, 2.0], "or": 0.0} for name in ("ce", "center", "infonce")}
    search |= {name: {"uniform": [0.1, 0.9]} for name in ("augment.crop_min", "optimizer.ema", "optimizer.warmup")}
    endings = "dssfxsssrs" * 20
    file = page_module.write([make_sweep(tmp_path / "s", endings, trials=203, search={**FILE["search"], **search})])
    page = Page(file)
    assert "180 of 203 trials ended" in page.text
    assert len([row for row in page.rows if row[0].isdigit()]) == 12 + 201  # at a glance, and all
    assert "Importance of the settings" in page.charts and len(page.charts) == 4 + 10
    assert page.text.count("trial 0004 failed: RuntimeError") == 1 and page.text.count("trial 0005 diverged:") == 1
    # Where the triplet term is off, its margin is not there to be shown
    dots, fewer = (drawing.count('class="tip"') for drawing in drawings(page, "batch.views", "loss.triplet_margin"))
    assert dots == 160 + 1 and 40 < fewer < 120
    assert len(page.source.encode()) < 2_000_000


def drawings(page: Page, *settings: str) -> list[str]:
    starts = [page.source.index(f'aria-label="Validation mAP by {name}"') for name in settings]
    return [page.source[start : page.source.index("</svg>", start)] for start in starts]


def test_the_setting_that_matters_is_named_first(tmp_path):
    folder = make_sweep(tmp_path / "s", "d" * 60)
    assert next(iter(sweep_charts.compute_importances(page_module.read(folder)))) == "optimizer.lr"
    assert sweep_charts.compute_importances(page_module.read(make_sweep(tmp_path / "few", "d" * 5))) == {}


def test_a_sweep_of_one_setting(tmp_path):
    page = Page(page_module.write([make_sweep(tmp_path / "s", "ddd", search={"batch.views": {"choice": [2, 4, 8]}})]))
    assert page.charts[-1] == "Validation mAP by batch.views" and "Importance of the settings" not in page.charts


def test_a_run_shows_its_curve_losses_and_settings(tmp_path):
    page = Page(page_module.write([make_run(tmp_path / "r", reports(0.7))]))
    assert "Best validation mAP 0.700, after 60,000 images; 60,000 seen of a budget of 60,000 images." in page.text
    assert "21% of the way from floor to collapse is left" in page.text  # (4 - 3 x .7 - 1.1) / (4.844 - 1.1)
    assert page.row("optimizer.lr")[0] == "0.002" and page.values("class").count("marked") == 1
    assert page.row("Share of time waiting for images") == ["0.012"]
    assert page.charts == [
        "Validation mAP by images seen",
        "Loss supcon by images seen",
        "Loss center by images seen",
    ]


def test_a_run_that_diverged_keeps_its_best_and_says_why(tmp_path):
    end = {"step": 300, "images": 38400, "val_mAP": 0.0, "best_val_mAP": 0.0, "diverged": "nan & inf at step 300"}
    page = Page(page_module.write([make_run(tmp_path / "r", [*reports(0.7)[:3], end])]))
    assert "Diverged after 38,400 images: nan & inf at step 300." in page.text
    assert f"Best validation mAP {reports(0.7)[2]['val_mAP']:.3f}, after 30,000 images; 30,000 seen" in page.text
    assert "No validation figure yet. Diverged" in Page(page_module.write([make_run(tmp_path / "at-once", [end])])).text


def test_an_evaluation_with_re_ranking(tmp_path):
    folder = make_evaluation(tmp_path / "e", 0.6, rerank={"k1": 20})
    page = Page(page_module.write([folder], tmp_path / "new" / "page.html"))
    assert "mAP 0.600 [0.580, 0.620] , Rank-1 0.620" in page.text
    assert "14,218 queries, 12,612 gallery images" in page.text and "over 10 splits" in page.text
    assert ["mAP", "0.600 ± 0.004"] in page.rows and page.row("Text to image")[1] == "0.600 [0.580, 0.620]"
    assert "Re-ranked by k-reciprocal neighbours" in page.text


def test_figures_without_copies_are_shown_where_they_differ(tmp_path):
    without = {key: figures()[key] for key in ("mAP", "rank1", "num_query")}
    differs = make_evaluation(tmp_path / "differs", 0.6, without_copies=without | {"mAP": 0.55})
    assert Page(page_module.write([differs])).row("Without copies")[1].startswith("0.550")
    same = make_evaluation(tmp_path / "same", 0.6)
    metrics = json.loads((same / "metrics.json").read_text())
    (same / "metrics.json").write_text(json.dumps(metrics | {"without_copies": metrics}))
    assert "Without copies" not in [row[0] for row in Page(page_module.write([same])).rows]


def test_an_evaluation_of_the_bare_figures(tmp_path):
    (tmp_path / "metrics.json").write_text(
        '{"mAP": 0.5, "rank1": NaN, "num_query": 3, "num_gallery": 4, "by_gender": null}'
    )
    page = Page(page_module.write([tmp_path]))
    assert page.row("mAP") == ["0.500"] and "Rank-1 –." in page.text and "nan" not in page.text.lower()


def test_many_categories_share_one_scale_and_one_says_nothing(tmp_path):
    group = figures()["by_category"]["Dresses"]
    many = make_evaluation(tmp_path / "many", by_category={f"{'A long name ' * 9}{i}": group for i in range(30)})
    assert Page(page_module.write([many])).charts.count("mAP with intervals") == 3 + 1
    one = make_evaluation(tmp_path / "one", by_category={"Dresses": group})
    assert Page(page_module.write([one])).charts.count("mAP with intervals") == 1


@pytest.mark.parametrize("name", ["$\\alpha{$", "Under $20, under $_30", "5 $ and 7 $", "100%", "a\\b {x} ^2"])
def test_a_name_is_drawn_as_it_is(name, tmp_path):
    page = Page(
        page_module.write([make_evaluation(tmp_path / "e", by_category=figures(categories=(name,))["by_category"])])
    )
    assert f">{name}</text>" in page.source and page.row(name)


@given(name=st.text(st.characters(codec="utf-8"), max_size=30))
@settings(max_examples=25, deadline=None)
def test_no_name_keeps_a_report_from_being_made(name, tmp_path_factory):
    groups = figures(categories=(name, "tab\x0bbed", "\x00"))["by_category"]
    folder = make_evaluation(tmp_path_factory.mktemp("report") / "e", by_category=groups)
    assert "mAP with intervals" in page_module.write([folder]).read_text()


def make_pictured(folder: Path, catalogue, right: list[bool]) -> Path:
    """An evaluation whose queries find their item first, or any other."""
    query, gallery = (catalogue.rows(split).to_pylist() for split in ("query", "gallery"))
    rows = []
    for asked, good in zip(query, right, strict=True):
        match = [row["item_id"] == asked["item_id"] for row in gallery]
        order = sorted(range(len(gallery)), key=lambda i: match[i] != good)
        rows += [
            {
                "query": asked["path"],
                "rank": rank,
                "gallery": gallery[i]["path"],
                "similarity": 1 / rank,
                "match": match[i],
            }
            for rank, i in enumerate(order, 1)
        ]
    make_evaluation(folder)
    pq.write_table(pa.Table.from_pylist(rows), folder / "predictions.parquet")
    of = {"path": str(catalogue.path), "hash": catalogue.manifest["hash"]}
    told = {"catalogue": of, "split": "test", "model": "clipfh-small", "checkpoint": None}
    (folder / "evaluation.json").write_text(json.dumps(told))
    return folder


def test_pictures_show_what_was_gained_and_what_stays_hard(small_catalogue, tmp_path):
    number = small_catalogue.num_images("query")
    before = make_pictured(tmp_path / "before", small_catalogue, [i == number - 1 for i in range(number)])
    after = make_pictured(tmp_path / "after", small_catalogue, [i == 0 for i in range(number)])
    paths = small_catalogue.rows("query")["path"].to_pylist()
    groups, _ = examples.pick_examples(page_module.read(before).models + page_module.read(after).models)
    shown = {group.title: group.queries for group in groups}
    assert [query.path for query in shown["Gained most"]] == [paths[0]]
    assert [query.path for query in shown["Lost most"]] == [paths[-1]]
    gained = shown["Gained most"][0].rankings
    assert gained[1].precision == 1 > gained[0].precision and gained[1].retrieved[0].is_right
    assert gained[1].first == 1 < gained[0].first
    page = Page(page_module.write([before, after], tmp_path / "page.html"))
    listed = small_catalogue.num_images("gallery")
    assert f"AP@{listed} 1.000" in page.text and f"The largest gains in AP@{listed} from" in page.text
    pictures = page.values("src")
    assert len(pictures) > 40 and all(picture.startswith("data:image/webp;base64,") for picture in pictures)
    assert {"right", "wrong"} <= set(page.values("class"))
    alone = Page(page_module.write([after]))
    assert "Hardest" in alone.text and "Typical" in alone.text and "Gained most" not in alone.text


def test_pictures_of_another_catalogue_are_not_shown(small_catalogue, tmp_path):
    folder = make_pictured(tmp_path / "e", small_catalogue, [True] * small_catalogue.num_images("query"))
    told = json.loads((folder / "evaluation.json").read_text())
    (folder / "evaluation.json").write_text(json.dumps({**told, "catalogue": {**told["catalogue"], "hash": "other"}}))
    page = Page(page_module.write([folder]))
    assert "has changed since the figures were made" in page.text and "img" not in page.tags


def test_several_are_compared_first(tmp_path):
    sweep = finish(make_sweep(tmp_path / "s"), "0002", figures(0.612), figures(0.231), val_mAP=0.777)
    run, evaluation = make_run(tmp_path / "r", reports(0.7)), make_evaluation(tmp_path / "e")
    page = Page(page_module.write([sweep, run, evaluation], tmp_path / "page.html"))
    assert page.rows[0] == ["", "s", "r", "e"]
    assert page.row("Validation mAP") == ["0.777", "0.700", "–"], "the winner's, not its trial's on the leaderboard"
    assert page.row("mAP") == ["0.612 [0.592, 0.632]", "–", "0.600 [0.580, 0.620]"]
    assert "The highest mAP is that of s: 0.612" in page.text
    links = [link for link in page.values("href") if link.startswith("#part")]
    assert {"#part-1", "#part-2", "#part-3"} <= set(links) and {link[1:] for link in links} <= set(page.values("id"))
    assert "compare them with care" not in page.text


def test_runs_are_compared_by_their_curves(tmp_path):
    folders = [make_run(tmp_path / name, reports(top)) for name, top in (("weak", 0.3), ("strong", 0.7))]
    page = Page(page_module.write([make_evaluation(tmp_path / "e"), *folders], tmp_path / "page.html"))
    drawing = page.source[page.source.index('aria-label="Validation mAP by images seen"') :]
    assert "<title>weak</title>" in drawing and "<title>strong</title>" in drawing


def test_a_comparison_over_different_images_is_said_to_be_one(tmp_path):
    first, second = make_evaluation(tmp_path / "a" / "eval"), make_evaluation(tmp_path / "b" / "eval", num_query=10)
    page = Page(page_module.write([first, second]))
    assert "compare them with care" in page.text
    assert page.rows[0] == ["", str(first), str(second)]  # their own names are alike


def test_text_from_files_stays_text_and_nothing_is_fetched(tmp_path):
    zero_shot = figures(categories=(HOSTILE,))
    sweep = finish(make_sweep(tmp_path / "s", name=HOSTILE), "0002", zero_shot, zero_shot, notes=[HOSTILE])
    evaluation = make_evaluation(tmp_path / "<b onclick=x>&", by_category=zero_shot["by_category"])
    page = Page(page_module.write([sweep, evaluation], tmp_path / "page.html"))
    assert page.text.count(HOSTILE) >= 6  # name, note, category in tables and figures
    assert "script" not in page.tags and "b" not in page.tags
    assert not {"src", "srcset", "onclick", "action", "data", "xlink:href"} & {name for name, _ in page.attributes}
    assert all(link.startswith("#") for link in page.values("href"))
    assert "://" not in page.source.replace(HOSTILE, "") and "@import" not in page.source
    ids = [name for name in page.values("id") if name]
    assert {link[1:] for link in page.values("href")} <= set(ids)
    assert "url(" not in page.source


def test_figures_take_their_colours_from_the_page(tmp_path):
    source = Page(page_module.write([make_sweep(tmp_path / "s", "dds")])).source
    drawn = source[source.index("<svg") : source.rindex("</svg>")]
    assert "var(--accent)" in drawn and "var(--soft)" in drawn and "#0000" not in drawn
    assert "<title>trial 0001, done: 0." in drawn and "\noptimizer.lr " in drawn
    assert "<text" in drawn and "font-family" not in drawn


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
    experiment = presets.resolve(stage, None, changed)
    line = page_module.train_command(schema.flatten(experiment), ["optimizer.lr"])
    words = shlex.split(line.replace("\\\n", ""))
    assert words[:6] == ["clipfh", "train", stage, "CATALOGUE", "--out", "DIR"] and "--optimizer.lr" in words
    names = [word.removeprefix("--") for word in words[6::2]]
    given_back = {n: schema.parse(n, value) for n, value in zip(names, words[7::2], strict=True)}
    assert presets.resolve(stage, None, given_back) == experiment


def test_a_foreign_folder_is_refused_in_one_line(tmp_path):
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    (checkpoint / "metrics.json").write_text('{"val_mAP": 0.5, "step": 3}')
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "metrics.json").write_text("{")
    for folder in (tmp_path, tmp_path / "missing", checkpoint, broken):
        with pytest.raises(UserError, match=str(folder)) as caught:
            page_module.write([folder])
        assert "\n" not in str(caught.value)
        assert not (folder / "report.html").exists()


def test_a_file_that_cannot_be_written_is_refused(tmp_path):
    evaluation = make_evaluation(tmp_path / "e")
    (tmp_path / "file").touch()
    for out in (tmp_path, tmp_path / "file" / "page.html"):
        with pytest.raises(UserError, match="--out"):
            page_module.write([evaluation], out)
    assert not tmp_path.with_name(f"{tmp_path.name}.new").exists()


def test_two_evaluations_are_compared_query_by_query(tmp_path):
    rng = np.random.default_rng(0)
    before, items = rng.beta(0.6, 0.6, 1200), [f"item{i // 3}" for i in range(1200)]
    after = np.clip(before + rng.normal(0.02, 0.03, 1200), 0, 1)
    paths = [str(i) for i in range(1200)]
    for name, precision, asked in (("a", before, paths), ("b", after, paths), ("c", after, paths[::-1])):
        table = pa.table({"query": asked, "item_id": items, "AP": precision})
        pq.write_table(table, make_evaluation(tmp_path / name) / "queries.parquet")
    page = Page(page_module.write([tmp_path / "a", tmp_path / "b"], tmp_path / "page.html"))
    found = re.search(r"From a to b: mAP changes by \+(\S+) \[\+(\S+), \+(\S+)\] over the same queries\.", page.text)
    assert found, "the marginal intervals overlap by far, and yet it is no chance"
    difference = (after - before).reshape(400, 3).mean(1)
    means = [difference[rng.integers(400, size=400)].mean() for _ in range(2000)]
    assert [float(each) for each in found.groups()] == pytest.approx(
        [difference.mean(), *np.quantile(means, (0.025, 0.975))], abs=1e-3
    )
    other = Page(page_module.write([tmp_path / "a", tmp_path / "c"], tmp_path / "page.html"))
    assert "From a to c: Whether the gain is chance can't be told" in other.text
