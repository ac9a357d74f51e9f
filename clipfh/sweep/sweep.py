"""A sweep: zero-shot as trial 0, the search, the leading settings again, the winner on the test split, its export."""

from __future__ import annotations

import dataclasses
import functools
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any

from torch import nn

from clipfh import UserError
from clipfh.cluster.resources import Resources, autoscaler_request, max_concurrent_runs, resolve_placement
from clipfh.config import schema, sweep_file
from clipfh.config.experiment import Experiment
from clipfh.config.sweep_file import SweepFile
from clipfh.data.catalogue import Catalogue
from clipfh.model import export
from clipfh.report import artifacts, page
from clipfh.retrieval import evaluate, metrics
from clipfh.storage import layout, store
from clipfh.storage.store import Folder
from clipfh.sweep import finalists, race, retention, shared_inputs, soup
from clipfh.sweep.leaderboard import Leaderboard, Row
from clipfh.sweep.race import Contender, Load
from clipfh.sweep.searcher import StudySearcher, earlier_trials, open_study
from clipfh.sweep.shared_inputs import SharingFeed
from clipfh.sweep.soup import Blend, Ledger, Step
from clipfh.sweep.tuner import Watch, run_trials
from clipfh.train import provenance, stream
from clipfh.train.inputs import load_start, notes_on_windows, prepare_inputs, read_window, write_window
from clipfh.train.run_inputs import Inputs, ModelKey, model_key


@dataclass(frozen=True)
class _Context:
    """What all parts of a sweep use."""

    sweep: SweepFile
    catalogue: Catalogue
    out: Folder
    contenders: Sequence[Contender]
    """each model before any tuning, best first"""
    load: Load
    """loads the model that an experiment starts from"""
    feed: SharingFeed
    resources: Resources
    log: Callable[[str], None]

    def contenders_of(self, experiment: Experiment) -> list[Contender]:
        """The contenders whose model an experiment starts from, with images as in the search or after it."""
        starts = [(each, self.sweep.start(each.model)) for each in self.survivors]
        key = model_key(experiment.model)
        return [
            each
            for each, start in starts
            if key in (model_key(start.model), model_key(_at_final_size(self, start).model))
        ]

    @property
    def survivors(self) -> list[Contender]:
        """The contenders that go into the search."""
        return [each for each in self.contenders if each.kept]


@dataclass(frozen=True)
class _Winner:
    """The best model so far, as each part after the search leaves it."""

    trial: str
    """its trial; for a soup the trial of its first run"""
    contender: Contender
    """whose model it is"""
    val_mAP: float
    """of the trial, or the mean of runs with its settings; a soup or a mix has its own"""
    blend: Blend | None
    """what its weights are made of; None for zero-shot"""
    again: dict[str, list[float]]
    """trial to validation mAPs of its settings with other seeds"""
    steps: list[Step] = field(default_factory=list)
    """the models that it was chosen from, where a soup or a mix was made"""
    step: str = ""
    """name of the step that it is"""
    left_out: dict[str, str] = field(default_factory=dict)
    """runs that may not go into a soup, and why"""
    off: str = ""
    """why there is no soup where one was asked for"""
    refit: bool = False
    """whether its runs are those on train and validation items together"""
    diverged: str = ""
    """why the refit's model is not taken"""
    earlier: dict[str, Any] = field(default_factory=dict)
    """`origin` of the winner of an earlier sweep, as that sweep has it; empty for a winner of this one"""

    @property
    def origin(self) -> dict[str, Any]:
        """What summary and model card say of how it was made."""
        return self.earlier or {"refit": self.refit, "blend": self.blend.account if self.blend else None}

    def runs(self, out: Folder) -> set[Folder]:
        """Folders whose weights it is made of."""
        return {soup.find_run(out, run) for run in self.blend.runs} if self.blend else set()


def run(
    sweep: SweepFile,
    catalogue: Catalogue,
    out: str | Path | Folder,
    *,
    resume: bool = False,
    retry_failed: bool = False,
    log: Callable[[str], None] = print,
    each_report: bool = True,
) -> dict[str, Any]:
    """Run a sweep to its end on the connected cluster; returns what `summary.json` holds.

    Args:
        sweep: the sweep file, as parsed.
        catalogue: to train, select and test on.
        out: the sweep's folder.
        resume: go on with the sweep that the folder holds.
        retry_failed: train its failed trials again too.
        log: takes a line for a person.
        each_report: tell of each report of each trial.

    Raises:
        UserError: a folder that holds another sweep, one of an older version, or nothing to resume; an empty split; no
            trial that came to a report.
    """
    out, start = Folder(store.absolute(out)), time.monotonic()
    catalogue.require("train", "val_query", "val_gallery", "query", "gallery")
    sweep = _within_space(sweep, log)
    _begin(sweep, out, resume, log)
    _require_same(catalogue, sweep, out, log)
    (out / layout.SWEEP).write("", sweep_file.to_yaml(sweep))  # with more trials, where nothing speaks against it
    earlier_trials(sweep)  # says what does not fit
    resources = resolve_placement(sweep.placement, alone=False, log=log)
    at_once = max_concurrent_runs(sweep.placement, resources)
    log(f"{sweep.trials} trials, {at_once} at once, each {resources}")
    load = functools.lru_cache(maxsize=1)(load_start)
    contenders = race.run(sweep, catalogue, out, resources, load, log)
    zero_shot = [each.row(sweep) for each in contenders]
    sweep = _within_space(race.narrow(sweep, contenders, log), log)
    study = open_study(sweep, out, retry_failed, log)
    feed = SharingFeed(stream, read_window(out, layout.SWEEP_INPUTS), at_once)
    context = _Context(sweep, catalogue, out, contenders, load, feed, resources, log)
    inputs = shared_inputs.prepare(sweep, catalogue, context.survivors, load, feed)
    write_window(out, layout.SWEEP_INPUTS, feed.window)
    notes = [*notes_on_windows(next(iter(inputs.values())), catalogue), *shared_inputs.notes(sweep, catalogue, inputs)]
    for note in notes:
        log(note)
    board, keeper = Leaderboard(out, sweep, study, zero_shot), retention.Keeper(sweep, out)
    searcher = StudySearcher(sweep, study, functools.partial(max_concurrent_runs, sweep.placement, resources))
    with autoscaler_request(sweep.placement, resources) as ask:
        run_trials(Watch(searcher, board, log, each_report, keeper.trials, ask), inputs, resources)
    rows = board.write()
    board.require_score()
    keeper.trials(rows)
    winner = _refitted(context, _with_earlier(context, _blended(context, _lead(context, inputs, rows), rows)))
    about = {"resources": dataclasses.asdict(resources), "notes": notes}
    summary = _finish(context, winner, rows, {**about, "seconds": round(time.monotonic() - start, 1)})
    keeper.visits.clear()
    keeper.trials(rows)  # again: a trial that was just ended may have written a checkpoint meanwhile
    keeper.finals(winner.runs(out))
    log(str(keeper))
    return summary


def _within_space(sweep: SweepFile, log: Callable[[str], None]) -> SweepFile:
    """The sweep with no more trials than its space has points: nothing is trained twice."""
    within = sweep.within_space()
    if within.trials < sweep.trials:
        log(f"note: the space has {within.trials} points, so there are {within.trials} trials and not {sweep.trials}")
    return within


def _begin(sweep: SweepFile, out: Folder, resume: bool, log: Callable[[str], None]) -> None:
    """Make the sweep's folder, or see that it is the one to go on with. A resumed sweep may have more trials.

    Raises:
        UserError: the folder holds something else, or nothing to resume.
    """
    file = out / layout.SWEEP
    if resume and not file.exists():
        raise UserError(f"--resume: {out} holds no sweep; leave --resume out to start one")
    if not resume and not out.is_empty():
        raise UserError(f"--out {out} is not empty: --resume goes on with its sweep, or name another folder")
    more = sweep.trials - sweep_file.load(file).trials if resume else 0
    before = dataclasses.replace(sweep, trials=sweep.trials - max(0, more))
    if resume and (change := _change(file.read_text(), sweep_file.to_yaml(before))):
        raise UserError(
            f"--resume: the sweep file differs from {file} ({change}): resume with the same, or another --out"
        )
    if more:
        log(f"{more} more trials than the sweep had")
    if not resume:
        out.make()
        file.write("", sweep_file.to_yaml(sweep))


def _change(before: str, now: str) -> str:
    """The first line of each text that the other has not; empty for equal texts."""
    texts = before.splitlines(), now.splitlines()
    first = [next((line.strip() for line in a if line not in b), "nothing") for a, b in (texts, texts[::-1])]
    return "" if before == now else f"{first[0]} there, {first[1]} here"


def _require_same(catalogue: Catalogue, sweep: SweepFile, out: Folder, log: Callable[[str], None]) -> None:
    """Write hashes of what a sweep is made of into its folder; if they are there, see that they are still the same.

    Raises:
        UserError: another catalogue, or a file that has changed.
    """
    file, resumed = out / layout.SWEEP_INPUTS, out.exists(layout.TRIALS)
    contents = _contents(sweep)
    now = {"catalogue": str(catalogue.path), "hash": catalogue.manifest["hash"], "contents": contents}
    now |= {"window": 0 if resumed else None}
    before = file.read_json() or now
    if resumed and not file.exists():
        log(f"note: {out} was begun by an older version: whether catalogue and prompts are still the same is not known")
    if before["hash"] != now["hash"]:
        raise UserError(
            f"--resume: {out} was begun on another catalogue than {catalogue.path}, "
            f"{before['catalogue']} as it was then: give that one, or name another --out"
        )
    provenance.require_same(before["contents"], contents, out)
    file.write("", json.dumps(before, indent=2) + "\n")


def _contents(sweep: SweepFile) -> dict[str, str]:
    """A hash of each file that a sweep is made of, by the option that names it; several models' options name them."""
    each = {label: provenance.contents(sweep.start(label), None) for label in sweep.contenders}
    if len(each) == 1:
        return each.popitem()[1]
    return {f"{option} ({label})": hash for label, contents in each.items() for option, hash in contents.items()}


def _lead(context: _Context, inputs: Mapping[ModelKey, Inputs], rows: list[Row]) -> _Winner:
    """The best trial by validation mAP alone, after the leading settings were trained again where asked."""
    final, out, folder = context.sweep.final, context.out, context.out / layout.FINAL
    trial, score = str(rows[0]["trial"]), float(rows[0]["val_mAP"])
    run, again = out / layout.TRIALS / trial, dict[str, list[float]]()
    if leading := finalists.leaders(rows, out, final.top):
        context.log(f"now trials {', '.join(leading)} again, each with {final.seeds} other seeds")
        if final.image_size:
            leading = {number: _at_final_size(context, each) for number, each in leading.items()}
            inputs = shared_inputs.prepare_larger(leading.values(), context.catalogue, context.load, context.feed)
        again = finalists.retrain(leading, context.sweep, inputs, folder, context.resources, context.log)
    if any(map(any, again.values())):
        trial = finalists.best_trial(again)
        score, run = mean(again[trial]), finalists.best_run(folder, trial, again[trial])
    elif again:
        context.log(f"none of these runs came to its end: trial {trial}, the best of the search, takes their place")
        again = {}
    zero_shot = context.contenders[0]
    if trial in {each.trial for each in context.contenders} or (again and score <= zero_shot.val_mAP):
        return _Winner(zero_shot.trial, zero_shot, zero_shot.val_mAP, None, again)
    experiment = schema.load_experiment(out / layout.TRIALS / trial / layout.EXPERIMENT)
    return _Winner(trial, context.contenders_of(experiment)[0], score, Blend((soup.name_run(run),)), again)


def _blended(context: _Context, lead: _Winner, rows: list[Row]) -> _Winner:
    """The best, on the validation items, of zero-shot, the leading trial, the soup of runs and the mix."""
    out, final = context.out, context.sweep.final
    if final.soup == "none" and not final.mix:
        return lead
    runs, left_out = soup.candidates(rows, out, lead.again, _experiment_to_blend(context, lead))
    if not runs:
        return lead
    if off := soup.why_off(context.sweep.start(lead.contender.model)):
        context.log(f"note: no soup and no mix: {off}")
        return dataclasses.replace(lead, off=off)
    context.log(f"now soup and mix of {len(runs)} runs, by evaluation alone")
    for run, reason in left_out.items():
        context.log(f"note: {run} stays out of the soup: {reason}")
    ledger = Ledger(out, lambda blend: _validated(context, blend))
    trial = Step("best trial", lead.blend, lead.val_mAP) if lead.blend else None
    steps = soup.steps(final, Step("zero-shot", None, lead.contender.val_mAP), trial, runs, ledger)
    best = soup.choose(steps)
    lead = dataclasses.replace(lead, steps=steps, step=best.name, left_out=left_out)
    if best.blend is None:
        return dataclasses.replace(lead, trial=lead.contender.trial, val_mAP=best.val_mAP, blend=None)
    if best.blend == lead.blend:
        return lead
    number = soup.find_run(out, best.blend.runs[0]).name.partition("-")[0]
    return dataclasses.replace(lead, trial=number, val_mAP=best.val_mAP, blend=best.blend)


def _experiment_to_blend(context: _Context, lead: _Winner) -> Experiment:
    """An experiment; a run must begin with its model to go into the soup."""
    if lead.blend:
        return schema.load_experiment(context.out / lead.blend.runs[0] / layout.EXPERIMENT)
    start = context.sweep.start(lead.contender.model)
    return _at_final_size(context, start) if lead.again else start


def _validated(context: _Context, blend: Blend) -> soup.Headline:
    """Headline of a blend on the validation items."""
    clip, experiment = soup.build(blend, context.out, context.load)
    headline = soup.pick_headline(evaluate.compute_metrics(race.embed(context.catalogue, experiment, clip, "val"), 0))
    context.log(f"{blend}: val mAP {headline['mAP']:.3f}")
    return headline


def _refitted(context: _Context, winner: _Winner) -> _Winner:
    """The winner trained on all items, where asked: each run of a soup, averaged and mixed in the same shares.

    Nothing is left to measure whether the shares and the settings are still the best.
    """
    if not context.sweep.final.refit or winner.blend is None or winner.earlier:
        return winner
    what = f"trial {winner.trial}'s settings" if len(winner.blend.runs) == 1 else f"the {len(winner.blend.runs)} runs"
    context.log(f"now {what} on train and validation items together")
    experiments = [finalists.as_selected(context.out / run) for run in winner.blend.runs]
    runs, reason = _refit(context, [_at_final_size(context, each) for each in experiments])
    if reason:
        context.log(f"that came to nothing ({reason}): the winner is {winner.blend}, of train items alone")
        return dataclasses.replace(winner, diverged=reason)
    names = tuple(map(soup.name_run, runs))
    return dataclasses.replace(winner, blend=dataclasses.replace(winner.blend, runs=names), refit=True)


def _with_earlier(context: _Context, winner: _Winner) -> _Winner:
    """The winner, or the best of the sweep that `earlier` names, where that is better on the same validation items."""
    folder = Folder(context.sweep.earlier)
    if not context.sweep.earlier or not folder.exists(layout.SUMMARY):
        return winner
    summary, name = folder.read_json(layout.SUMMARY), f"the best of {folder}"
    if not folder.exists(f"{layout.BEST}/{layout.EXPORTED_WEIGHTS}"):
        context.log(f"note: {name} can't win: its export is not there")
    elif folder.read_json(layout.SWEEP_INPUTS)["hash"] != context.catalogue.manifest["hash"]:
        context.log(f"note: {name} can't win: it was selected on another catalogue")
    elif not (contenders := context.contenders_of(schema.load_experiment(folder / layout.BEST / layout.EXPERIMENT))):
        context.log(f"note: {name} can't win: its model, or the size of its images, is not searched here")
    elif summary["val_mAP"] > winner.val_mAP:
        context.log(f"{name} is better than all of this sweep: val mAP {summary['val_mAP']:.3f}")
        trial, blend = f"{folder.name}-{summary['best_trial']}", Blend(((folder / layout.BEST).address,))
        won = {"val_mAP": summary["val_mAP"], "blend": blend, "step": "", "earlier": _origin_of_best(folder, summary)}
        return dataclasses.replace(winner, trial=trial, contender=contenders[0], **won)
    return winner


def _origin_of_best(sweep: Folder, summary: Mapping[str, Any]) -> dict[str, Any]:
    """The `origin` of another sweep's winner, its runs named from the root on."""
    final = summary.get("final", {})
    blend = final.get("blend")
    runs = {"runs": [soup.find_run(sweep, run).address for run in blend["runs"]]} if blend else {}
    return {"refit": final.get("refit", False), "blend": {**blend, **runs} if blend else None}


def _at_final_size(context: _Context, experiment: Experiment) -> Experiment:
    """The experiment with the images of the runs after the search."""
    size = context.sweep.final.image_size or experiment.model.image_size
    return schema.replace(experiment, {"model.image_size": size})


def _refit(context: _Context, experiments: Sequence[Experiment]) -> tuple[list[Folder], str]:
    """Train on train and validation items together; returns what `finalists.refit` does. They begin with one model."""
    clip = context.load(experiments[0])
    # An experiment that learns from prompts, if there is one, so that the others' inputs have them
    widest = max(experiments, key=lambda each: each.loss.takes_text)
    inputs = prepare_inputs(context.catalogue, widest, clip, context.feed, with_validation=True)
    by_model = {model_key(widest.model): inputs}
    folder = context.out / layout.FINAL
    return finalists.refit(experiments, context.sweep, by_model, folder, context.resources, context.log)


def _finish(context: _Context, winner: _Winner, rows: list[Row], about: dict[str, Any]) -> dict[str, Any]:
    """Test the winner and the zero-shot model; write the export, the summary and the report."""
    what = winner.blend if winner.step in ("soup", "mix") else f"trial {winner.trial}"
    context.log(f"winner: {what}, val mAP {winner.val_mAP:.3f}; now the test split")
    start, out = context.sweep.start(winner.contender.model), context.out
    before, old = _tested(context, "zero-shot", start, context.load(start))
    best, experiment = soup.build(winner.blend, out, context.load) if winner.blend else (context.load(start), start)
    after, new = _tested(context, "winner", experiment, best)
    if out.exists(layout.BEST):
        out.remove(layout.BEST)
    evidence = {"zero_shot": before, "test": after, "catalogue": artifacts.catalogue_account(context.catalogue)}
    photos = export.sample_photos(context.catalogue)
    export.write_export(best, experiment, out / layout.BEST, {**evidence, **winner.origin}, photos)
    summary = {
        "name": context.sweep.name,
        "best_trial": winner.trial,
        "val_mAP": winner.val_mAP,
        "model": winner.contender.model,
        "zero_shot_val_mAP": winner.contender.val_mAP,
        "final": {"again": winner.again, "refit_diverged": winner.diverged, **winner.origin},
        "soup": _account_of_steps(context, winner, before, after),
        **evidence,
        "gain": metrics.gain(old, new),
        "race": [dataclasses.asdict(each) for each in context.contenders],
        "trials": len(rows) - len(context.contenders),
        "failed": sum(row["status"] == "failed" for row in rows),
        "took": _took(rows, out),
        "experiment": schema.flatten(experiment),
        "searched": list(context.sweep.search),
        **about,
    }
    out.write(layout.SUMMARY, json.dumps(summary, indent=2) + "\n")
    page.write([out], None)
    return summary


def _took(rows: list[Row], out: Folder) -> dict[str, dict[str, float]]:
    """Total images and seconds of the trials, and of the runs after them."""
    again = [run.spent for run in artifacts.final_runs(out)]
    counts = {
        "trials": [(row["images"], row["seconds"]) for row in rows],
        "final": again,
    }
    return {
        name: {"images": sum(images for images, _ in each), "seconds": round(sum(seconds for _, seconds in each), 1)}
        for name, each in counts.items()
    }


def _account_of_steps(
    context: _Context, winner: _Winner, before: soup.Headline, after: soup.Headline
) -> dict[str, Any]:
    """The metrics of each step after the search, on validation and test. The choice is made before, without them."""
    headlines = {"zero-shot": soup.pick_headline(before)}
    if not winner.refit and winner.step:
        headlines[winner.step] = soup.pick_headline(after)
    steps = [
        {
            "name": step.name,
            "blend": step.blend.account if step.blend else None,
            "val_mAP": step.val_mAP,
            "test": headlines[step.name] if step.name in headlines else _test_step(context, step),
            "won": step.name == winner.step,
        }
        for step in winner.steps
    ]
    return {"off": winner.off, "left_out": winner.left_out, "steps": steps}


def _test_step(context: _Context, step: Step) -> soup.Headline:
    """Headline on the test split of a model that did not win; measured once."""
    assert step.blend is not None
    name = step.name.replace(" ", "-")
    folder, account = context.out / layout.TEST / name, soup.read_account(step.blend, context.out)
    if folder.read_json(layout.EVALUATION) != account:
        clip, experiment = soup.build(step.blend, context.out, context.load)
        _tested(context, name, experiment, clip)
        folder.write(layout.EVALUATION, json.dumps(account, indent=2) + "\n")
    return soup.pick_headline(folder.read_json(layout.METRICS))


def _tested(
    context: _Context, name: str, experiment: Experiment, clip: nn.Module
) -> tuple[dict[str, Any], metrics.Scores]:
    """Metrics of a model on the test split, and what each query scored; also written."""
    embeddings = race.embed(context.catalogue, experiment, clip, "test")
    results, scores = evaluate.judge(embeddings, 10)
    evaluate.write(context.out / layout.TEST / name, results, embeddings, scores)
    return results, scores


def outcome(summary: dict[str, Any], out: str | Path | Folder) -> str:
    """The outcome of a sweep, for a person."""
    lines = [f"{'':12}{'mAP':>22}{'Rank-1':>22}   (test split, 95% interval)"]
    for label, key in (("zero-shot", "zero_shot"), ("winner", "test")):
        cells = [f"{summary[key][k]:.3f} [{_interval(summary[key], k)}]" for k in ("mAP", "rank1")]
        lines.append(f"{label:12}{cells[0]:>22}{cells[1]:>22}")
    lines += _step_lines(summary["soup"]["steps"])
    if summary["best_trial"] in {each["trial"] for each in summary["race"]}:
        lines.append("Tuning made nothing better: the zero-shot model is the winner.")
    if len(summary["race"]) > 1:
        num_searched = sum(each["kept"] for each in summary["race"])
        lines.append(
            f"model       {summary['model']}, of {len(summary['race'])} measured zero-shot and {num_searched} searched"
        )
    lines.append(
        f"trials      {summary['trials']} ({summary['failed']} failed), winner {summary['best_trial']}: "
        f"{out}/{layout.LEADERBOARD}"
    )
    lines.append(f"export      {out}/{layout.BEST}")
    lines.append(f"report      {out}/{layout.REPORT}")
    return "\n".join(lines)


def _step_lines(steps: Sequence[Mapping[str, Any]]) -> list[str]:
    """A line for each step; none where there was neither soup nor mix."""
    lines = [f"{'':12}{'val mAP':>10}{'test mAP':>10}{'text to image':>15}"] if steps else []
    for step in steps:
        text = step["test"]["text_to_image"]
        cells = f"{step['val_mAP']:10.3f}{step['test']['mAP']:10.3f}{'none' if text is None else f'{text:.3f}':>15}"
        made_of = [step["blend"]["label"]] if step["blend"] else []
        lines.append(f"{step['name']:12}{cells}   {', '.join([*made_of, *['won'] * step['won']])}".rstrip())
    return lines


def _interval(results: dict[str, Any], key: str) -> str:
    low, high = results["intervals"][key]
    return f"{low:.3f}, {high:.3f}"
