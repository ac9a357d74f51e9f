"""What each worker of a run does: the loop over its batches, its reports and checkpoints. Nothing of Ray."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from clipfh.config import cores
from clipfh.config.experiment import Experiment
from clipfh.data import decoding, sampler
from clipfh.data.decoding import BatchSpec, Feed, StreamPart, fetch
from clipfh.learn.learner import Learner, Validation
from clipfh.learn.tally import Diverged, StepTally
from clipfh.model import checkpoint as checkpoint_module
from clipfh.model.clip import build, build_initial, get_architecture
from clipfh.model.devices import choose_device, explain_out_of_memory, precision_notes
from clipfh.model.transfer import prefetch
from clipfh.storage import layout
from clipfh.storage.run_folder import History
from clipfh.storage.store import Folder
from clipfh.train.run_inputs import Inputs, Job

Save = Callable[[Path], None]
"""Writes a checkpoint into an empty folder."""
Decode = Callable[[int, int], Iterator[tuple[int, np.ndarray, np.ndarray]]]
"""The worker's part of the batches from one step to before another, decoded."""


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
def train_loop(job: Job, session: Session, feed: Feed) -> None:
    """Train on this worker's part of each batch, from the session's checkpoint to the end of the budget."""
    experiment, inputs = job.experiment, job.inputs
    learner = make_learner(experiment, inputs, choose_device(job.gpus))
    validation = fetch_validation(inputs)
    spec, place = BatchSpec.of(experiment, inputs.size), (learner.rank, learner.world_size)

    def decode(first: int, last: int) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        near, tasks = learner.neighbours, (job.decoding_tasks, not job.reserves_decoding)
        nearest = None if near is None else feed.put(near.table())
        return feed.batches(StreamPart(inputs.images, spec, first, last, *place, tasks[0], nearest, tasks[1]))

    progress = _begin(learner, validation, inputs, session, decode)
    reports = _Reports(learner, validation, History(job.out, learner.step), session)
    last = learner.schedule.num_steps
    batch_stream = _stream_batches(learner, decode)
    tally, patience, notice, first_step_time = StepTally(), experiment.budget.patience, _Notice(session), 0.0
    # Not sooner: other trials may still be starting here
    prestart_step = learner.step + learner.schedule.half_report_steps
    with _Threads(job.threads, job.shares_cores) as threads:
        while learner.step < last and not (patience and progress.reports_since_best >= patience):
            threads.adjust()
            waiting_since = time.monotonic()
            step, rows, images = next(batch_stream)
            waited = time.monotonic() - waiting_since
            first_step_time = first_step_time or time.time()
            if job.prestart_next and learner.step == prestart_step:
                session.prepare_next()
            try:
                tally.add(len(rows), waited, learner.train_step(rows, images))
                progress = reports.add_step(step, rows, progress)
                if learner.schedule.is_report(learner.step) or notice.is_new(learner.step):
                    progress = reports.make(tally, progress, first_step_time)
                    tally = StepTally()
            except Diverged as diverged:
                reports.make_last(diverged, inputs)
                return


def _stream_batches(learner: Learner, decode: Decode) -> Iterator[tuple[int, np.ndarray, torch.Tensor]]:
    """The batches from the learner's step on. With neighbours, those after a report begin to be decoded after it."""
    schedule = learner.schedule
    while learner.step < schedule.num_steps:
        end = schedule.num_steps if learner.neighbours is None else schedule.next_report(learner.step)
        yield from prefetch(decode(learner.step, end), learner.device)


@dataclass(frozen=True)
class Progress:
    """What a run carries from one report to the next, and over a restart. The fields are keys of its reports."""

    stream: str = ""
    """digest of all its batches"""
    start_val_mAP: float = 0.0
    """validation mAP of the weights that training started from"""
    best_val_mAP: float = 0.0
    """highest validation mAP of its reports"""
    reports_since_best: int = 0
    step: int = 0
    """step of the last report; 0 before the first"""

    @classmethod
    def from_report(cls, metrics: Mapping[str, Any]) -> Progress:
        """Return how a run stood at a report, which its checkpoint holds too."""
        return cls(**{field.name: metrics[field.name] for field in dataclasses.fields(cls) if field.name in metrics})

    def with_score(self, val_mAP: float | None, is_due: bool) -> dict[str, Any]:
        """The keys that a report with this validation mAP takes from here; None is without validation.

        A report that is not due, before a node is taken away, does not count for `budget.patience`.
        """
        if val_mAP is None:
            return {"stream": self.stream, "reports_since_best": self.reports_since_best}
        is_better = not self.step or val_mAP > self.best_val_mAP
        return {
            "stream": self.stream,
            "reports_since_best": 0 if is_better else self.reports_since_best + is_due,
            "best_val_mAP": max(val_mAP, self.best_val_mAP),
        }


def _begin(
    learner: Learner, validation: Validation | None, inputs: Inputs, session: Session, decode: Decode
) -> Progress:
    """Restore what the checkpoint holds; without one, begin, and measure the model that training starts from."""
    with session.checkpoint() as folder:
        if folder:
            raw, average, state, metrics = checkpoint_module.load_training(folder)
            learner.restore(raw, average, state)
            return Progress.from_report(metrics)
    if learner.steps_before:
        learner.begin(decode(0, learner.steps_before))
    if validation is None:
        return Progress()
    start = inputs.start_val_mAP
    return Progress(start_val_mAP=learner.validate(validation) if start is None else start)


class _Threads:
    """torch's threads: as many as were given or, where runs share this machine's cores, this one's share as it is now.

    Args:
        threads: as many as were given; where cores are shared the share alone counts.
        shared: whether cores are shared.
    """

    EVERY_S = 1.0

    def __init__(self, threads: int, shared: bool) -> None:
        torch.set_num_threads(threads)
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
    """Notice that a node is about to be taken away, as spot machines are: then a checkpoint, whatever the schedule.

    Ray Train goes on elsewhere from there.
    """

    EVERY = 16  # steps: asking takes a few milliseconds

    def __init__(self, session: Session) -> None:
        self.session, self.has_come = session, False

    def is_new(self, step: int) -> bool:
        """Whether the notice has come since the last call."""
        if self.has_come or step % self.EVERY:
            return False
        self.has_come = self.session.is_ending()
        return self.has_come


def make_learner(experiment: Experiment, inputs: Inputs, on: torch.device) -> Learner:
    """Make a rank's learner from the run's inputs."""
    weights = fetch(inputs.weights)
    if weights is None:
        clip = build_initial(inputs.architecture, experiment.seed)
    else:
        clip = build(inputs.architecture)
        clip.load_state_dict({n: torch.from_numpy(w.copy()) for n, w in weights.items()})
    index, captions = fetch(inputs.images.index), fetch(inputs.captions)
    return Learner(experiment, clip, index, captions, on)


def fetch_validation(inputs: Inputs) -> Validation | None:
    """The validation images, with their codes from the object store; None where the run trains on them."""
    if inputs.validation is None:
        return None
    return Validation(inputs.validation, *fetch(inputs.items))


class _Reports:
    """Writes a run's history and events, and hands metrics and checkpoints to the session.

    All ranks make the reports, as each evaluates its part; the first one alone writes them.
    """

    def __init__(self, learner: Learner, validation: Validation | None, history: History, session: Session) -> None:
        self.learner, self.validation, self.history, self.session = learner, validation, history, session

    def add_step(self, step: int, rows: np.ndarray, progress: Progress) -> Progress:
        """Note the images of a step; returns how the run stands after it."""
        self.history.stream.append(json.dumps({"step": step, "images": rows.tolist()}))
        return dataclasses.replace(progress, stream=sampler.digest(progress.stream, step, rows))

    def make(self, tally: StepTally, progress: Progress, began: float) -> Progress:
        """Evaluate, write the history, report with a checkpoint; returns how the run stands after it.

        Args:
            tally: the steps since the last report.
            progress: how the run stood before it.
            began: time of the first step since the run was started, or started again.
        """
        metrics = self.learner.report(tally, self.validation, progress.start_val_mAP)
        if not progress.step:
            notes = precision_notes(self.learner.experiment.model.precision, self.learner.device)
            metrics["warnings"] = [*notes, *metrics["warnings"]]
        metrics |= progress.with_score(metrics.get("val_mAP"), self.learner.schedule.is_report(self.learner.step))
        if self.learner.rank:
            self.session.report(metrics, None)
        else:
            place = {"node": self.session.node, "workers": self.learner.world_size}
            metrics |= {**place, "began": began, "time": time.time()}
            self._write(metrics)
            _write_events(self.history.folder, metrics)
            self.session.report(metrics, functools.partial(self._save, metrics))
        return Progress.from_report(metrics)

    def _write(self, metrics: dict[str, Any]) -> None:
        self.history.metrics.append(json.dumps(metrics))
        self.history.write()

    def _save(self, metrics: dict[str, Any], folder: Path) -> None:
        learner = self.learner
        weights, architecture = learner.weights(), get_architecture(learner.clip)
        checkpoint_module.save(folder, learner.experiment, architecture, *weights, learner.state(), metrics)

    def make_last(self, diverged: Diverged, inputs: Inputs) -> None:
        """Write a last line that says why the run ends; its score is the worst there is, for the search to learn from.

        It has no checkpoint.
        """
        if self.learner.rank:
            return
        values = ", ".join(f"{name} {value:g}" for name, value in diverged.terms.items())
        paths = decoding.read_paths(inputs.images, diverged.rows)
        reason = (
            f"loss or gradient are not finite at step {diverged.step} ({values}; images {', '.join(paths[:4])} and "
            f"{max(0, len(paths) - 4)} more): try a lower optimizer.lr"
        )
        steps = diverged.step + 1
        place = {"step": steps, "images": steps * self.learner.experiment.batch.images}
        self._write({**place, "val_mAP": 0.0, "best_val_mAP": 0.0, "diverged": reason, "diverged_images": paths})


def _write_events(run: Folder, values: dict[str, Any]) -> None:
    """Write TensorBoard's events, one more file."""
    from tensorboardX import SummaryWriter

    with (run / layout.TENSORBOARD).adding() as folder, SummaryWriter(str(folder), purge_step=values["step"]) as writer:
        for name, value in values.items():
            if isinstance(value, float):
                writer.add_scalar(name, value, values["step"])
