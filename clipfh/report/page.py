"""What a person looks at: evaluations, runs and sweeps as one HTML page that needs no network and no script."""

from __future__ import annotations

import dataclasses
import re
import shlex
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from clipfh import UserError, __version__
from clipfh.config import schema
from clipfh.report import examples, model_charts, sweep_charts
from clipfh.report.artifacts import (
    EvaluationRecord,
    Metrics,
    ModelRecord,
    Record,
    RunRecord,
    SweepRecord,
    default_settings,
    gain,
    is_number,
    is_refit,
    is_zero_shot,
    read,
    short,
)
from clipfh.report.model_charts import Subset
from clipfh.storage import layout
from clipfh.storage.store import Folder

NONE = "–"
RANKS = {f"rank{k}": f"Rank-{k}" for k in (1, 5, 10, 20, 30, 40, 50)}
LABELS = {"mAP": "mAP", **RANKS, "mAP_at_R": "mAP@R", "mINP": "mINP"}
CHARTED = {key: LABELS[key] for key in ("mAP", "rank1", "rank5", "rank10", "mAP_at_R", "mINP")}


def write(paths: Sequence[str | Path | Folder], out: str | Path | Folder | None = None) -> Folder:
    """Write the page and return where it is.

    Args:
        paths: folders of evaluations, runs and sweeps; several are compared.
        out: the file; by default `report.html` in the first folder.

    Raises:
        UserError: a folder that is none of these or can't be read, or a file that can't be written.
    """
    records = [read(path) for path in paths]
    own = [Folder(path).name for path in paths]
    names = own if len(set(own)) == len(own) else [str(path) for path in paths]
    out = Folder(out) if out else Folder(paths[0]) / layout.REPORT
    if out.is_folder():
        raise UserError(f"{out} is a folder: name a file with --out")
    try:
        out.parent.make()
        out.write("", page(names, records))
    except OSError as error:
        raise UserError(f"{out} can't be written ({error.strerror}): name another file with --out") from error
    return out


def page(names: Sequence[str], records: Sequence[Record]) -> str:
    """The whole file.

    Args:
        names: names of the comparison's columns.
        records: one or several records to report.
    """
    words = Environment(
        loader=PackageLoader("clipfh.report", ""),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    words.filters |= {f.__name__: f for f in (score, count, duration, gap, short, with_interval, breakable)}
    words.globals |= {"model_charts": model_charts, "sweep_charts": sweep_charts, "CHARTED": CHARTED, "NONE": NONE}
    of_models = (subsets, variants, groups, metric_labels, reranked, count_images, compared, splits, find_examples)
    of_sweeps = (race_results, plot_race, search_rows, command, catalogue_manifest, cost)
    words.globals |= {f.__name__: f for f in (verdict, *of_models, losses, describe_settings, *of_sweeps)}
    origin = f"clipfh {__version__}, {datetime.now():%Y-%m-%d %H:%M}"
    pairs = list(zip(names, records, strict=True))
    models = [dataclasses.replace(each.models[-1], name=name) for name, each in pairs if each.models]
    runs = [(name, each) for name, each in pairs if isinstance(each, RunRecord)]
    return words.get_template("report.html").render(
        names=names, records=records, models=models, runs=runs, origin=origin
    )


# --- Numbers ---------------------------------------------------------------------------------------------------------


def score(value: object) -> str:
    """A metric from 0 to 1: three digits everywhere."""
    return f"{value:.3f}" if is_number(value) else NONE


def count(value: object) -> str:
    """A whole number: 12,612."""
    return f"{value:,.0f}" if is_number(value) else NONE


def duration(seconds: Any) -> str:  # noqa: ANN401
    """A duration: 42 s, 3 min 20 s, 2 h 05 min."""
    if not is_number(seconds):
        return NONE
    minutes, rest = divmod(round(seconds), 60)
    hours, part = divmod(minutes, 60)
    return f"{hours:,} h {part:02} min" if hours else f"{minutes} min {rest:02} s" if minutes else f"{rest} s"


def with_interval(metrics: Metrics, key: str) -> Markup:
    """A metric and its 95% interval."""
    ends = (metrics.get("intervals") or {}).get(key)
    interval = f" <small>[{score(ends[0])}, {score(ends[1])}]</small>" if ends else ""
    return escape(score(metrics.get(key))) + Markup(interval)


def breakable(name: str) -> Markup:
    """A setting's name, which may go on in the next line after a dot or an underscore."""
    return Markup("<wbr>").join(re.findall(r"[^._]+[._]?", name))


def gap(line: Mapping[str, Any], term: str) -> str:
    """How far a loss term still is from its floor, as a share of the way from collapse."""
    loss, floor, collapse = (line.get(f"{end}_{term}") for end in ("loss", "floor", "collapse"))
    if not (is_number(loss) and is_number(floor) and is_number(collapse)) or collapse == floor:
        return NONE
    return f"{(loss - floor) / (collapse - floor):.0%}"  # type: ignore[operator]


# --- Words -----------------------------------------------------------------------------------------------------------


def verdict(record: Record) -> Markup:
    """The outcome of an evaluation, a run or a sweep, in plain words."""
    if isinstance(record, EvaluationRecord):
        metrics = record.metrics
        return Markup("mAP {}, Rank-1 {}.").format(with_interval(metrics, "mAP"), with_interval(metrics, "rank1"))
    return _run_verdict(record) if isinstance(record, RunRecord) else _sweep_verdict(record)


def _run_verdict(run: RunRecord) -> Markup:
    end = ""
    if line := run.divergence:
        end = f" Diverged after {count(line.get('images'))} images: {line['diverged']}."
    if not run.best:
        return escape(f"No validation figure yet.{end}")
    images, epochs = (run.settings[f"budget.{unit}"] for unit in ("images", "epochs"))
    budget = f"{count(images)} images" if images else f"{short(epochs)} epochs"
    best = f"Best validation mAP {score(run.val_mAP)}, after {count(run.best.get('images'))} images"
    return escape(f"{best}; {count(run.reports[-1].get('images'))} seen of a budget of {budget}.{end}")


def _sweep_verdict(sweep: SweepRecord) -> Markup:
    if not sweep.summary:
        return escape(_unfinished_verdict(sweep))
    before, after = (model.metrics for model in sweep.models)
    old, new = with_interval(before, "mAP"), with_interval(after, "mAP")
    model = escape(f" of {sweep.summary['model']}" if sweep.race else "")
    if is_zero_shot(sweep.best):
        words = Markup("Tuning made nothing better: zero-shot{} wins, with mAP {} on the test split.")
        return words.format(model, old)
    sentence = Markup("The winner, {}{}, finds the same item with mAP {} against {} zero-shot on the test split.{}")
    return sentence.format(sweep.blend or f"trial {sweep.best}", model, new, old, _caution(sweep))


def _unfinished_verdict(sweep: SweepRecord) -> str:
    state = f"Not finished: running or broken off, with {sweep.num_ended} of {sweep.planned} trials ended."
    if not sweep.best:
        return f"{state} The leaderboard has no figure yet."
    zero_shot = f"{score(sweep.zero_shot)} zero-shot"
    leads = f"trial {sweep.best} leads with validation mAP {score(sweep.val_mAP)} against {zero_shot}"
    leader = f"nothing beats the validation mAP of {zero_shot}" if is_zero_shot(sweep.best) else leads
    return f"{state} So far {leader}. The test split is left for the end."


def _caution(sweep: SweepRecord) -> str:
    """Words of caution on the gain, or on there being none."""
    before, after = (model.metrics for model in sweep.models)
    if not is_number(before.get("mAP")) or not is_number(after.get("mAP")):
        return ""
    if after["mAP"] <= before["mAP"]:
        return " It was better on the validation items only."
    return " " + _gain_sentence(sweep.summary.get("gain") or gain(*sweep.models))


def _gain_sentence(change: Metrics) -> str:
    """Whether a gain may be chance, in words."""
    if not change.get("interval"):
        return "Whether the gain is chance can't be told: it is not known what each query scored."
    low, high = change["interval"]
    chance = ": it may be chance" if low <= 0 <= high else ""
    return f"mAP changes by {change['mAP']:+.3f} [{low:+.3f}, {high:+.3f}] over the same queries{chance}."


def compared(models: Sequence[ModelRecord]) -> str:
    """What the last of several models gains over the first."""
    return f"From {models[0].name} to {models[-1].name}: {_gain_sentence(gain(models[0], models[-1]))}"


# --- Parts of the metrics --------------------------------------------------------------------------------------------


def subsets(models: Sequence[ModelRecord], names: Mapping[str, str], where: str = "") -> list[Subset]:
    """Subsets for which any model has a mAP.

    Args:
        models: to compare.
        names: key of each subset in a model's metrics, and its label.
        where: key of the part of the metrics that holds the subsets; empty for the metrics themselves.
    """
    within = [(model.metrics.get(where) or {}) if where else model.metrics for model in models]
    rows = [Subset(label, [each.get(key) or {} for each in within]) for key, label in names.items()]
    return [row for row in rows if any(is_number(each.get("mAP")) for each in row.metrics)]


def variants(models: Sequence[ModelRecord]) -> list[Subset]:
    """The same and other variants, where there are both, and all without copies where that makes a difference."""
    rows = subsets(models, {"same": "Same variant", "cross": "Other variants"}, "variant")
    without = subsets(models, {"without_copies": "Without copies"})
    differs = any(
        part and any(part.get(key) != model.metrics.get(key) for key in CHARTED)
        for model, part in zip(models, without[0].metrics if without else [], strict=False)
    )
    return (rows if len(rows) > 1 else []) + (without if differs else [])


def groups(models: Sequence[ModelRecord], where: str) -> list[Subset]:
    """The groups of `by_category` or `by_gender`, the largest first; none where there is only one."""
    names = {name: name or NONE for model in models for name in model.metrics.get(where) or {}}
    rows = sorted(subsets(models, names, where), key=lambda row: (-row.num_query, row.label))
    return rows if len(rows) > 1 else []


def metric_labels(models: Sequence[ModelRecord]) -> dict[str, str]:
    """Label of each measure that any model has."""
    return {key: label for key, label in LABELS.items() if any(is_number(m.metrics.get(key)) for m in models)}


def reranked(models: Sequence[ModelRecord]) -> str:
    """Which models' metrics are re-ranked."""
    return ", ".join(model.name or "the model" for model in models if model.metrics.get("rerank"))


def count_images(models: Sequence[ModelRecord]) -> str:
    """Numbers of images that the metrics are over, in words."""
    sizes = {tuple(count(m.metrics.get(f"num_{key}")) for key in ("query", "gallery")) for m in models}
    if len(sizes) > 1:
        return "They do not rank the same images: compare them with care."
    return " queries, ".join(sizes.pop()) + " gallery images."


def splits(models: Sequence[ModelRecord]) -> list[tuple[str, list[Metrics]]]:
    """Mean and deviation over random splits, a line a measure."""
    rows = [
        (label, [(m.metrics.get("random_splits") or {}).get(key) or {} for m in models])
        for key, label in CHARTED.items()
    ]
    return [(label, each) for label, each in rows if any(is_number(one.get("mean")) for one in each)]


def find_examples(models: Sequence[ModelRecord]) -> dict[str, Any]:
    """Telling queries with what was found for them, or why there are none."""
    try:
        groups, pictures = examples.pick_examples(models)
    except UserError as error:
        return {"groups": [], "pictures": {}, "missing": str(error)}
    return {"groups": groups, "pictures": pictures, "missing": ""}


# --- Parts of runs and sweeps ----------------------------------------------------------------------------------------


def describe_settings() -> dict[str, str]:
    """Each setting's name to its description."""
    return {name: doc for name, _, _, doc in schema.fields()}


def race_results(sweep: SweepRecord) -> list[Subset]:
    """Each measured model of a race and its metrics on the validation items, the best first."""
    models = sorted((each for each in sweep.race if each["val_mAP"] >= 0), key=lambda each: -each["val_mAP"])
    trials = sweep.folder / layout.TRIALS
    return [Subset(each["model"], [(trials / each["trial"]).read_json(layout.METRICS)]) for each in models]


def plot_race(sweep: SweepRecord) -> list[Markup]:
    """Charts of `race_results`: a line a model."""
    return model_charts.plot_intervals([ModelRecord("", {}, sweep.folder, {})], race_results(sweep), "mAP")


def search_rows(sweep: SweepRecord) -> list[tuple[str, str, str]]:
    """Each searched setting, where it was searched, and what the best trial has."""
    best = sweep.winner.settings if sweep.winner else {}
    rows = []
    for name, range_ in sweep.search.items():
        between = " to " if range_.kind != "choice" else ", "
        log = " (log)" if range_.kind == "loguniform" else ""
        off = "" if range_.off is None else f", or {short(range_.off)}"
        where = between.join(map(short, range_.values)) + log + off
        rows.append((name, where, short(best[name]) if name in best else NONE))
    return rows


def command(sweep: SweepRecord) -> str:
    """The command line that trains the winner's settings: searched settings, and others that are not by default.

    Empty where there is no winner yet, or where it is the zero-shot model.
    """
    experiment = sweep.summary.get("experiment")
    if not experiment or is_zero_shot(sweep.best):
        return ""
    return train_command(experiment, sweep.summary.get("searched") or ())


def train_command(experiment: Mapping[str, Any], always: Sequence[str]) -> str:
    """The command line that trains these settings.

    Args:
        experiment: dotted settings.
        always: names of settings to show in any case.
    """
    stage, by_default = experiment["stage"], default_settings(experiment)
    names = {"model.name", *always, *(n for n, value in experiment.items() if value != by_default.get(n))}
    values = {n: str(v).lower() if isinstance(v, bool) else str(v) for n, v in experiment.items() if n in names}
    options = (f"--{name} {shlex.quote(value)}" for name, value in values.items())
    return " \\\n  ".join([f"clipfh train {stage} CATALOGUE --out DIR", *options])


def catalogue_manifest(sweep: SweepRecord) -> dict[str, Any]:
    """The catalogue's manifest where it is still there, or else what the summary tells of the catalogue."""
    account = dict(sweep.summary.get("catalogue") or {})
    manifest = Folder(account["path"]).read_json(layout.CATALOGUE) if account else {}
    if account and manifest.get("hash") == account["hash"]:
        account |= manifest
    return {"counts": {}, "shards": {}, "notes": [], "left_out": {"count": 0}} | account


def cost(sweep: SweepRecord) -> dict[str, str]:
    """Images, hours and machines that the sweep took, in words."""
    statuses = sweep.statuses
    ends = [f"{statuses[s]} {s}" for s in ("done", "stopped", "diverged", "failed", "running") if statuses[s]]
    seconds = sum(trial.seconds for trial in sweep.trials)
    images, final = sum(trial.images for trial in sweep.trials), [run.spent for run in sweep.final if run.lines]
    rows = {
        "Trials": ", ".join(ends) or NONE,
        "Images seen by all trials": count(images),
        "Time of all trials, added up": duration(seconds),
    }
    if final:
        again = sum(each for each, _ in final), sum(each for _, each in final)
        has_refit = any(is_refit(run.name) for run in sweep.final)
        rows["Final runs"] = f"{len(final)}, the refit included" if has_refit else str(len(final))
        rows["Images seen by final runs"], rows["Time of final runs, added up"] = count(again[0]), duration(again[1])
        seconds += again[1]
    if each := sweep.summary.get("resources"):
        for kind in ("gpu", "cpu"):
            if number := each["workers"] * each[f"{kind}s"]:
                rows[f"{kind.upper()} hours of all workers"] = f"{number * seconds / 3600:,.2f}"
    if sweep.summary:
        rows["Time since the last start"] = duration(sweep.summary.get("seconds"))
    return rows


def losses(run: RunRecord) -> list[tuple[str, Markup]]:
    """A chart for each loss term."""
    return [(term, model_charts.plot_loss(run, term)) for term in run.terms]
