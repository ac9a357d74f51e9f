"""What each worker of a run does: the loop over its batches, its reports and checkpoints. Nothing of Ray."""

from __future__ import annotations

import contextlib
import functools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch

from clipfh.config import cores
from clipfh.config.experiment import Experiment
from clipfh.data import decoding, sampler
from clipfh.data.decoding import BatchSpec, Feed, StreamPart, fetch
from clipfh.data.transfer import prefetch
from clipfh.learn.learner import Learner, Validation
from clipfh.learn.tally import Diverged, StepTally
from clipfh.model import checkpoint as checkpoint_module
from clipfh.model.clip import build_model, load_initial_model
from clipfh.model.devices import choose_device, explain_out_of_memory, precision_notes
from clipfh.storage import layout
from clipfh.storage.run_folder import History
from clipfh.train.run_inputs import Inputs

Save = Callable[[Path], None]
"""Writes a checkpoint into an empty folder."""


class Session(Protocol):
    """What a worker's loop runs under: where its checkpoints lie, and who takes its reports."""

    node: str
    """address of this worker's machine"""

    def checkpoint(self) -> contextlib.AbstractContextManager[str | None]:
        """The folder of the checkpoint to go on from, for as long as the block lasts; None to begin."""

    def report(self, metrics: dict[str, Any], save: Save | None) -> None:
        """Take a report and, from the first worker, its checkpoint. All workers call it, at the same steps."""

    def is_ending(self) -> bool:
        """Whether this machine is about to be taken away. All workers ask at the same steps, and hear the same."""

    def prepare_next(self) -> None:
        """Called half-way to the first report of a run that another one follows."""


@explain_out_of_memory(
    "give --batch.chunk 64, say, or --model.checkpointing true, which compute some of it again; or a smaller P x K "
    "(--batch.items, --batch.views)"
)
def train(job: dict[str, Any], session: Session, feed: Feed) -> None:
    """Train on this worker's part of each batch, from the session's checkpoint to the end of the budget."""
    experiment, inputs = job["experiment"], job["inputs"]
    learner = learner_of(experiment, inputs, choose_device(job["gpus"]))
    validation = validation_of(inputs)
    found = _begin(learner, validation, inputs, session)
    history = History(job["out"], learner.step)
    spec, place = BatchSpec.of(experiment, inputs.size), (learner.rank, learner.world_size)
    last = learner.schedule.num_steps
    decoded = feed.batches(StreamPart(inputs.images, spec, learner.step, last, *place, job["decoding"]))
    batch_stream = prefetch(decoded, learner.device)
    tally, patience, notice, began = StepTally(), experiment.budget.patience, _Notice(session), 0.0
    # Not sooner: other trials may still be starting here
    next_wanted = learner.step + learner.schedule.half_report_steps
    with _Threads(job["threads"], job["shares_cores"]) as threads:
        while learner.step < last and not (patience and found["reports_since_best"] >= patience):
            threads.adjust()
            waiting = time.monotonic()
            step, rows, images = next(batch_stream)
            waited = time.monotonic() - waiting
            began = began or time.time()
            if job["followed"] and learner.step == next_wanted:
                session.prepare_next()
            try:
                tally.add(len(rows), waited, learner.train_step(rows, images))
                found["stream"] = sampler.digest(found["stream"], step, rows)
                history.stream.append(json.dumps({"step": step, "images": rows.tolist()}))
                if learner.schedule.is_report(learner.step) or notice.is_new(learner.step):
                    found = _report(learner, validation, history, tally, {**found, "began": began}, session)
                    tally = StepTally()
            except Diverged as diverged:
                _report_divergence(diverged, learner.rank, inputs, history, experiment.batch.images)
                return


def _begin(learner: Learner, validation: Validation | None, inputs: Inputs, session: Session) -> dict[str, Any]:
    """What the last report left, restored; or the score that training starts from."""
    found: dict[str, Any] = {"stream": "", "reports_since_best": 0}
    with session.checkpoint() as folder:
        if folder:
            raw, average, state, found = checkpoint_module.load_training(folder)
            learner.restore(raw, average, state)
        elif validation is not None:
            known = inputs.start_val_mAP
            found |= {"start_val_mAP": learner.validate(validation) if known is None else known, "best_val_mAP": 0.0}
    return found


class _Threads:
    """torch's threads: as many as were given or, where runs share this machine's cores, this one's share as it is now.

    Args:
        given: threads; where cores are shared the share counts alone.
        shared: whether they are.
    """

    EVERY_S = 1.0

    def __init__(self, given: int, shared: bool) -> None:
        torch.set_num_threads(given)
        self.share = cores.Share() if shared else None
        self.looked = -self.EVERY_S

    def __enter__(self) -> _Threads:
        if self.share:
            self.share.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        if self.share:
            self.share.__exit__(*error)

    def adjust(self) -> None:
        """Take the share as it is now; looks once a second."""
        if self.share and time.monotonic() >= self.looked + self.EVERY_S:
            self.looked = time.monotonic()
            if (threads := self.share.threads()) != torch.get_num_threads():
                torch.set_num_threads(threads)


class _Notice:
    """Word that a node is about to be taken away, as spot machines are: a checkpoint then, whatever the schedule.

    Ray Train goes on elsewhere from there.
    """

    EVERY = 16  # steps: asking takes a few milliseconds

    def __init__(self, session: Session) -> None:
        self.session, self.given = session, False

    def is_new(self, step: int) -> bool:
        """Whether it has come since it was last asked for."""
        if self.given or step % self.EVERY:
            return False
        self.given = self.session.is_ending()
        return self.given


def learner_of(experiment: Experiment, inputs: Inputs, on: torch.device) -> Learner:
    """A rank's learner, from what lies in the object store."""
    weights = fetch(inputs.weights)
    if weights is None:
        clip = load_initial_model(experiment.model, experiment.seed)
    else:
        clip = build_model(experiment.model)
        clip.load_state_dict({n: torch.from_numpy(w.copy()) for n, w in weights.items()})
    index, captions = fetch(inputs.images.index), fetch(inputs.captions)
    return Learner(experiment, clip, index, captions, on)


def validation_of(inputs: Inputs) -> Validation | None:
    """The validation images, from the object store; None where the run trains on them."""
    if inputs.validation is None:
        return None
    return Validation(fetch(inputs.validation), *fetch(inputs.items))


def _report(
    learner: Learner,
    validation: Validation | None,
    history: History,
    tally: StepTally,
    before: dict[str, Any],
    session: Session,
) -> dict[str, Any]:
    """Evaluate, write the history, report with a checkpoint; all ranks take part."""
    now = learner.report(tally, validation, before.get("start_val_mAP", 0.0))
    now |= {name: before[name] for name in ("stream", "reports_since_best")}
    if "step" not in before:
        now["warnings"] = [*precision_notes(learner.experiment.model.precision, learner.device), *now["warnings"]]
    if validation is not None:
        better = now["val_mAP"] > before["best_val_mAP"] or "val_mAP" not in before
        now["best_val_mAP"] = max(now["val_mAP"], before["best_val_mAP"])
        now["reports_since_best"] = 0 if better else before["reports_since_best"] + 1
    if learner.rank:
        session.report(now, None)
        return now
    now |= {"node": session.node, "began": before["began"], "time": time.time()}
    history.metrics.append(json.dumps(now))
    history.write()
    _write_events(history.out, now)
    session.report(now, functools.partial(_save, learner, now))
    return now


def _save(learner: Learner, metrics: dict[str, Any], folder: Path) -> None:
    average = learner.average.weights if learner.experiment.optimizer.ema else {}
    checkpoint_module.save(folder, learner.experiment, learner.clip.state_dict(), average, learner.state(), metrics)


def _report_divergence(diverged: Diverged, rank: int, inputs: Inputs, history: History, batch: int) -> None:
    """A last line that says why the run ends; its score is the worst there is, for the search to learn from."""
    place = {"step": diverged.step + 1, "images": (diverged.step + 1) * batch}
    if rank == 0:
        values = ", ".join(f"{name} {value:g}" for name, value in diverged.terms.items())
        paths = decoding.read_paths(inputs.images, diverged.rows)
        reason = (
            f"loss or gradient are not finite at step {diverged.step} ({values}; images {', '.join(paths[:4])} and "
            f"{max(0, len(paths) - 4)} more): try a lower optimizer.lr"
        )
        line = {"val_mAP": 0.0, "best_val_mAP": 0.0, "diverged": reason, "diverged_images": paths}
        history.metrics.append(json.dumps({**place, **line}))
        history.write()


def _write_events(out: str, values: dict[str, Any]) -> None:
    """TensorBoard's events, where the run's folder is on a file system."""
    from tensorboardX import SummaryWriter

    if Path(out).is_dir():
        with SummaryWriter(f"{out}/{layout.TENSORBOARD}", purge_step=values["step"]) as writer:
            for name, value in values.items():
                if isinstance(value, float):
                    writer.add_scalar(name, value, values["step"])
