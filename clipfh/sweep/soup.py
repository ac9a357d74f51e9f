"""Averages of runs with one start (soup), mixed with that start (mix): often better than the best run, at no cost.

The greedy soup (Wortsman et al., Model soups, 2203.05482) goes through the leading runs, the best first, and takes each
whose weights do not make the validation mAP of the average fall. The mix (Wortsman et al., WiSE-FT, 2109.01903) is the
best point on the line from the model before tuning to the soup. Nothing is trained, and validation alone decides.
`soup.json` has each measurement as soon as it is made: what is measured is not measured again, unless a run of it was
trained further since.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from clipfh.config import schema
from clipfh.config.experiment import Experiment
from clipfh.config.sweep_file import Finalists
from clipfh.model import checkpoint
from clipfh.model.architecture import weights_name
from clipfh.storage import layout, run_folder
from clipfh.storage.store import Folder
from clipfh.sweep import finalists, interpolation
from clipfh.sweep.leaderboard import Row
from clipfh.train.run_inputs import model_key

SHARES = tuple(tenth / 10 for tenth in range(1, 10))
"""Shares of the tuned model in the mixes that are measured. 0 and 1 are the two models themselves."""

RANDOM = "the models begin with random weights: averages of such runs, and mixes with their start, compute nothing"

Headline = Mapping[str, Any]
"""A model's metrics on a split: `mAP`, `rank1`, `intervals` of both, and `text_to_image`, a mAP or None."""


@dataclass(frozen=True)
class Blend:
    """Weights made of runs: `share` of the average of their weights, and the rest of the model before tuning."""

    runs: tuple[str, ...]
    """their folders, relative to the sweep's if they lie in it"""
    share: float = 1.0

    def __str__(self) -> str:
        of_runs = f"the average of {len(self.runs)} runs" if len(self.runs) > 1 else self.runs[0]
        return of_runs if self.share == 1 else f"{self.share:.0%} {of_runs}, {1 - self.share:.0%} zero-shot"

    @property
    def account(self) -> dict[str, Any]:
        """The blend as files have it: `runs`, `share` and, for a person, `label`."""
        return {"runs": list(self.runs), "share": self.share, "label": str(self)}


Measure = Callable[[Blend], Headline]
"""Returns the headline of a blend on the validation items."""


def read_account(blend: Blend, out: Folder) -> dict[str, Any]:
    """A blend's account with the best checkpoint of each run: one of a run that is trained further may be another."""
    return {**blend.account, "checkpoints": [run_folder.find_best_checkpoint(find_run(out, run)) for run in blend.runs]}


class Ledger:
    """Measures blends, each once: one that `soup.json` has, of the same checkpoints, is not measured again.

    Args:
        out: the sweep's folder.
        measure: measures a blend.
    """

    def __init__(self, out: Folder, measure: Measure) -> None:
        self.folder, self.measure = out, measure
        self.rows: list[dict[str, Any]] = out.read_json(layout.SOUP).get("measured", [])

    def __call__(self, blend: Blend) -> Headline:
        account = read_account(blend, self.folder)
        for row in self.rows:
            if row.items() >= account.items():
                return dict(row["figures"])
        others = [row for row in self.rows if not row.items() >= blend.account.items()]
        self.rows = [*others, {**account, "figures": dict(self.measure(blend))}]
        self.folder.write(layout.SOUP, json.dumps({"measured": self.rows}, indent=2) + "\n")
        return dict(self.rows[-1]["figures"])


@dataclass(frozen=True)
class Step:
    """A model that the sweep made, and its validation mAP."""

    name: str
    """zero-shot, best trial, soup or mix"""
    blend: Blend | None
    """None for zero-shot"""
    val_mAP: float


def greedy_soup(runs: Sequence[str], measure: Measure) -> Blend:
    """The greedy soup of runs, the best first: each is taken whose weights do not make the mAP fall."""
    soup = Blend((runs[0],))
    best = measure(soup)["mAP"]
    for run in runs[1:]:
        larger = Blend((*soup.runs, run))
        if (mAP := measure(larger)["mAP"]) >= best:
            soup, best = larger, mAP
    return soup


def best_mix(soup: Blend, measure: Measure) -> Blend:
    """The best mix of a soup with the model before tuning."""
    mixes = [dataclasses.replace(soup, share=share) for share in SHARES]
    return max(mixes, key=lambda mix: measure(mix)["mAP"])


def steps(final: Finalists, zero_shot: Step, trial: Step | None, runs: Sequence[str], measure: Measure) -> list[Step]:
    """The models to choose from: zero-shot, the best trial, the soup and the mix, as far as they are asked for.

    Args:
        final: says which of them are asked for.
        zero_shot: the model before tuning.
        trial: the best model of the search and the final runs; None where that is the model before tuning.
        runs: runs that may go into the soup, the best first.
        measure: measures a blend.
    """
    options, start = [zero_shot], trial.blend if trial else Blend((runs[0],))
    assert start is not None
    if trial:
        options.append(dataclasses.replace(trial, val_mAP=measure(start)["mAP"]))
    if final.soup == "greedy":
        soup = greedy_soup(runs, measure)
        if len(soup.runs) > 1:
            start = soup
            options.append(Step("soup", soup, measure(soup)["mAP"]))
    if final.mix:
        mix = best_mix(start, measure)
        options.append(Step("mix", mix, measure(mix)["mAP"]))
    return options


def choose(options: Sequence[Step]) -> Step:
    """The model with the best validation mAP; of equals the first, which is the simplest."""
    return max(options, key=lambda step: step.val_mAP)


def why_off(start: Experiment) -> str:
    """Why runs of an experiment have neither soup nor mix; empty where they may have."""
    return "" if weights_name(start.model) else RANDOM


def pick_headline(results: Mapping[str, Any]) -> Headline:
    """The headline of a `metrics.json`."""
    intervals = {key: results["intervals"][key] for key in ("mAP", "rank1")}
    text = results.get("text_to_image") or {}
    return {
        "mAP": results["mAP"],
        "rank1": results["rank1"],
        "intervals": intervals,
        "text_to_image": text.get("mAP"),
    }


def candidates(
    rows: Sequence[Row], out: Folder, again: Mapping[str, Sequence[float]], like: Experiment
) -> tuple[list[str], dict[str, str]]:
    """The runs that may go into a soup, the best first, and why others of the leaders may not.

    Args:
        rows: the leaderboard's rows.
        out: the sweep's folder.
        again: trial to validation mAPs of its settings with other seeds.
        like: an experiment; all runs must begin with its model.
    """
    trials = [out / layout.TRIALS / trial for trial in finalists.leaders(rows, out, finalists.SOUP_TRIALS)]
    seeded = [
        finalists.run_path(out / layout.FINAL, trial, number)
        for trial, scores in again.items()
        for number in range(1, len(scores) + 1)
    ]
    ranking = sorted((*trials, *seeded), key=finalists.score, reverse=True)
    reasons = {name_run(run): _why_not(run, like) for run in ranking}
    return [run for run, reason in reasons.items() if not reason], {run: why for run, why in reasons.items() if why}


def name_run(run: Folder) -> str:
    """The name of a trial or of a final run in the sweep's folder."""
    return f"{run.parent.name}/{run.name}"


def find_run(out: Folder, run: str) -> Folder:
    """The folder of a run of a blend."""
    return Folder(run) if run.startswith("/") or "://" in run else out / run


def _why_not(run: Folder, like: Experiment) -> str:
    """Why a run can't go into a soup of runs like another; empty where it can."""
    experiment = schema.load_experiment(run / layout.EXPERIMENT)
    if experiment.stage != like.stage or model_key(experiment.model) != model_key(like.model):
        return "begins with another model, or another size of images"
    if not run_folder.read_metrics(run):
        return "failed before its first report"
    if finalists.read_divergence(run):
        return "diverged"
    return "" if _has_weights(run) else "its weights were not kept"


def _has_weights(run: Folder) -> bool:
    freed = run_folder.read_freed(run)
    return bool(freed["kept"]) if freed else run_folder.latest_step(run) > 0


def build(blend: Blend, out: Folder, load: Callable[[Experiment], nn.Module]) -> tuple[nn.Module, Experiment]:
    """The model of a blend, and the experiment of the first of its runs.

    Args:
        blend: what to make.
        out: the sweep's folder.
        load: loads the model that an experiment starts from.
    """
    parts = [checkpoint.load(find_run(out, run)) for run in blend.runs]
    experiment = parts[0].experiment
    assert experiment is not None
    state = interpolation.average([part.state for part in parts])
    if blend.share < 1:
        start = {name: tensor.cpu() for name, tensor in load(experiment).state_dict().items()}
        state = interpolation.interpolate(start, state, blend.share)
    return checkpoint.build(dataclasses.replace(parts[0], state=state), experiment.model), experiment
