"""A run from its catalogue to its last report: in this process, or over a cluster."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from clipfh import UserError
from clipfh.config import presets, schema
from clipfh.config.experiment import Experiment, Placement, require
from clipfh.config.schedule import make_schedule
from clipfh.data.catalogue import Catalogue, open_catalogue
from clipfh.data.decoding import Feed
from clipfh.model.architecture import weights_name
from clipfh.model.checkpoint import notes_on_model
from clipfh.model.prompts import notes_on_prompts
from clipfh.storage import layout, run_folder
from clipfh.storage.output import all_or_nothing
from clipfh.storage.store import Folder
from clipfh.train import in_process
from clipfh.train import track as tracking
from clipfh.train.inputs import (
    is_warm_started,
    note_on_size,
    notes_on_singles,
    notes_on_windows,
    open_run,
    prepare_inputs,
    read_window,
    write_window,
)
from clipfh.train.run_inputs import Inputs

Log = Callable[[str], None]
Report = dict[str, Any]


@dataclass(frozen=True)
class TrainingRun:
    """A run that has come to its end."""

    out: Folder
    reports: list[Report]
    """the lines of `metrics.jsonl`"""

    @property
    def best_val_mAP(self) -> float:
        """Validation mAP of the checkpoint that stands for the run."""
        return float(self.reports[-1]["best_val_mAP"])


def train(
    stage: str,
    catalogue: Catalogue | str | Path,
    out: str | Path | Folder,
    *,
    preset: str | None = None,
    warm_start: str | Path | None = None,
    resume: bool = False,
    track: str | None = None,
    workers: int | tuple[int, int] = 1,
    gpus_per_worker: float | Literal["auto"] = "auto",
    cpus_per_worker: float | Literal["auto"] = "auto",
    keep_gib: float | Literal["auto"] = "auto",
    settings: Mapping[str, Any] | None = None,
    address: str | None = None,
    dashboard: bool = False,
    log: Log = print,
) -> TrainingRun:
    """Fine-tune the image tower, or both towers, as `clipfh train` does. Blocks to the end of the run.

    Args:
        stage: "image" or "joint".
        catalogue: its path, or the opened catalogue.
        out: folder of the run.
        preset: name of the settings to start from.
        warm_start: a run, checkpoint, export or weights file to start from.
        resume: go on with the run in `out`; without preset and settings as it was.
        track: "mlflow" or "wandb", to send the reports there too.
        workers: number of training processes, or the fewest and the most: as many as the cluster has room for, as nodes
            come and go. It changes neither batches nor gradients.
        gpus_per_worker: from 0 to 1; "auto" is 1 where there is a GPU, else 0.
        cpus_per_worker: "auto" is 1 beside a GPU, else what the machine has to spare.
        keep_gib: GiB of decoded images to keep in memory; "auto" is an eighth of memory where the run trains in this
            process and reads each image twice or more, else none.
        settings: dotted settings, such as {"optimizer.lr": 1e-5}.
        address: Ray cluster to train on.
        dashboard: serve Ray's dashboard, where a cluster is started.
        log: takes each line for a person, among them one for each report.

    Raises:
        UserError: a setting, the catalogue, the folder or the weights do not fit, or the loss diverged.
    """
    fewest, most = workers if isinstance(workers, tuple) else (0, workers)
    if isinstance(workers, tuple):
        require(1 <= fewest <= most, "workers", "1 or more, or the fewest and the most, as 1-8", f"{fewest}-{most}")
    placement = Placement(most, gpus_per_worker, cpus_per_worker, keep_gib=keep_gib)
    as_it_was = resume and not settings and not preset
    experiment = None if as_it_was else presets.resolve(stage, preset, schema.with_absolute_paths(settings or {}))
    catalogue, out, start = open_catalogue(catalogue), Folder(out), str(warm_start) if warm_start else None
    tracking.require(track)
    alone = in_process.trains_here(placement, address)
    with all_or_nothing(out, f"{layout.CHECKPOINTS}/checkpoint_*"):
        clip, experiment = open_run(out, experiment, catalogue, start, resume)
        if experiment.stage != stage:
            raise UserError(
                f"--resume: {out} is of the {experiment.stage} stage: write clipfh train {experiment.stage}"
            )
        for note in notes_on_model(clip, experiment.model, start or weights_name(experiment.model), catalogue):
            log(note)
        with contextlib.nullcontext() if alone else _connection(address, placement, dashboard):
            where, feed, compute = _in_this_process(placement) if alone else _over_the_cluster(placement, fewest)
            log(f"{stage} stage of {experiment.model.name} on {catalogue.num_images('train'):,} images: {where}")
            if stage == "joint" and not experiment.loss.takes_text:
                log("note: no term learns from prompts, so the text tower stays as it is: see --loss.infonce")
            window, warm = read_window(out, layout.RUN), is_warm_started(out)
            inputs = prepare_inputs(catalogue, experiment, clip, feed, placement.keep_gib, warm=warm, window=window)
            write_window(out, layout.RUN, inputs.images.window)
            notes = *notes_on_windows(inputs, catalogue), *notes_on_singles(inputs, experiment.loss)
            for note in (note_on_size(clip, experiment), *notes):
                log(note)
            for note in notes_on_prompts(catalogue, experiment) if experiment.loss.takes_text else ():
                log(f"note: {note}")
            with tracking.following(track, out):
                compute(experiment, inputs, out, log)
    reports = run_folder.read_metrics(out)
    if "diverged" in reports[-1]:
        raise UserError(reports[-1]["diverged"])
    return TrainingRun(out, reports)


def _connection(address: str | None, placement: Placement, dashboard: bool) -> AbstractContextManager[None]:
    from clipfh.cluster.connect import connected  # loads Ray, which a run in this process does without

    return connected(address, placement, dashboard)


Compute = Callable[[Experiment, Inputs, Folder, Log], None]
"""Trains an experiment, of inputs, in a folder, and logs each report."""


def _in_this_process(placement: Placement) -> tuple[str, Feed, Compute]:
    """Where and how a run trains in this process: in its main thread, where Ctrl-C reaches it."""
    threads, _ = in_process.choose_threads(placement)

    def compute(experiment: Experiment, inputs: Inputs, out: Folder, log: Log) -> None:
        images = _count_images(experiment, inputs)
        in_process.run_training(placement, experiment, inputs, out, lambda report: _log_report(report, images, log))

    return f"in this process on CPU, {threads} thread{'s' * (threads > 1)}", in_process.InProcessFeed(), compute


def _over_the_cluster(placement: Placement, min_workers: int) -> tuple[str, Feed, Compute]:
    """Where and how a run trains on the cluster that this process is connected to."""
    from clipfh.cluster.resources import resolve_placement
    from clipfh.train import driver, stream

    resources = resolve_placement(placement, min_workers=min_workers)

    def compute(experiment: Experiment, inputs: Inputs, out: Folder, log: Log) -> None:
        images = _count_images(experiment, inputs)
        _follow(
            lambda: driver.run_training(experiment, inputs, out, resources, retries=3),
            out,
            lambda report: _log_report(report, images, log),
        )

    return str(resources), stream, compute


def _follow(work: Callable[[], None], out: Folder, on_report: Callable[[Report], None]) -> None:
    """Do the work in a thread, and meanwhile pass on each new report in a run's folder.

    The main thread only waits here, so that Ctrl-C reaches it; Ray Train would take the signal for itself.
    """
    errors: list[Exception] = []

    def run() -> None:
        try:
            work()
        except Exception as error:  # raised below
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    count, is_over = len(run_folder.read_metrics(out)), False
    thread.start()
    while not is_over:
        thread.join(out.seconds_between_looks / 2)
        is_over = not thread.is_alive()
        reports = run_folder.read_metrics(out)
        for report in reports[count:]:
            on_report(report)
        count = max(count, len(reports))
    if errors:
        raise errors[0]


def _count_images(experiment: Experiment, inputs: Inputs) -> int:
    """Images that a run sees in all."""
    schedule = make_schedule(experiment, inputs.num_images, inputs.num_single)
    return schedule.num_steps * schedule.batch_images


def _log_report(report: Report, images: int, log: Log) -> None:
    """Log a report of a run that sees `images` images in all, and its warnings."""
    if "diverged" in report:
        log(str(report["diverged"]))
    else:
        log(
            f"{report['images']:,} of {images:,} images: loss {report['loss']:.3f}, val mAP {report['val_mAP']:.4f} "
            f"(best {report['best_val_mAP']:.4f}), {report['images_per_second']:.0f} images/s, "
            f"{report['data_wait']:.0%} of the time waiting for data"
        )
    if "val_mAP_whitened" in report:
        scores = f"{report['val_mAP_whitened']:.4f} whitened, {report['val_mAP_not_whitened']:.4f} not"
        log(f"val mAP {scores}: the better is exported")
    for warning in report.get("warnings", []):
        log(f"warning: {warning}")
