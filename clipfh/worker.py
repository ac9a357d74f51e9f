"""What Ray Train runs on each worker of a run: the loop over its batches, its reports and checkpoints."""

from __future__ import annotations

import json
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import ray.train
import torch

from clipfh import batches, checkpoint, cluster, config, decoding, model, stream, transfer
from clipfh.inputs import Inputs
from clipfh.learner import Learner, Validation
from clipfh.runs import History
from clipfh.tally import Diverged, Tally


def load() -> None:
    """Import the libraries that take longest. A worker's process does it before it knows of which run it is."""
    import tensorboardX  # noqa: F401

    model.library()


def loop(job: dict[str, Any]) -> None:
    """What Ray Train runs on each worker."""
    torch.set_num_threads(job["threads"])
    experiment, inputs = job["experiment"], job["inputs"]
    learner = learner_of(experiment, inputs)
    validation = validation_of(inputs)
    found: dict[str, Any] = {"stream": "", "reports_since_best": 0}
    if start := ray.train.get_checkpoint():
        with start.as_directory() as folder:
            raw, average, state, found = checkpoint.load_training(folder)
            learner.restore(raw, average, state)
    elif validation is not None:
        known = inputs.start_val_mAP
        found |= {"start_val_mAP": learner.validate(validation) if known is None else known, "best_val_mAP": 0.0}
    history = History(job["out"], learner.step)
    recipe = decoding.Recipe.of(experiment, inputs.size)
    place = learner.rank, learner.world_size
    decoded = stream.batches(inputs.images, recipe, learner.step, learner.budget.total, *place, tasks=job["decoding"])
    batch_stream = transfer.ahead(decoded, learner.device)
    tally, patience, notice, began = Tally(), experiment.budget.patience, _Notice(), 0.0
    next_wanted = learner.step + learner.budget.half_a_report  # not sooner: other trials may still be starting here
    while learner.step < learner.budget.total and not (patience and found["reports_since_best"] >= patience):
        waiting = time.monotonic()
        step, rows, images = next(batch_stream)
        waited = time.monotonic() - waiting
        if not began:
            began = time.time()
        if job["followed"] and learner.step == next_wanted:
            cluster.start_another()
        try:
            tally.add(len(rows), waited, learner.train_step(rows, images))
            found["stream"] = batches.digest(found["stream"], step, rows)
            history.stream.append(json.dumps({"step": step, "images": rows.tolist()}))
            if learner.budget.is_report(learner.step) or notice.is_new(learner.step):
                found = _report(learner, validation, history, tally, {**found, "began": began})
                tally = Tally()
        except Diverged as diverged:
            _report_divergence(diverged, inputs, history, experiment.batch.images)
            return


@dataclass
class _Notice:
    """Word that a node is about to be taken away, as spot machines are: a checkpoint then, whatever the schedule.

    Ray Train goes on elsewhere from there. All ranks ask at the same steps, and hear the same.
    """

    EVERY = 16  # steps: asking takes a few milliseconds
    given: bool = False

    def is_new(self, step: int) -> bool:
        """Whether it has come since it was last asked for."""
        if self.given or step % self.EVERY:
            return False
        self.given = ray.train.get_preemption_info() is not None
        return self.given


def learner_of(experiment: config.Experiment, inputs: Inputs) -> Learner:
    """A rank's learner, from what lies in the object store."""
    clip = model.build(experiment.model)
    clip.load_state_dict({n: torch.from_numpy(w.copy()) for n, w in ray.get(inputs.weights).items()})
    index, captions = ray.get([inputs.images.index, inputs.captions])
    return Learner(experiment, clip, index, captions, model.device())


def validation_of(inputs: Inputs) -> Validation | None:
    """The validation images, from the object store; None where the run trains on them."""
    if inputs.validation is None:
        return None
    return Validation(ray.get(inputs.validation), *ray.get(inputs.items))


def _report(
    learner: Learner, validation: Validation | None, history: History, tally: Tally, before: dict[str, Any]
) -> dict[str, Any]:
    """Evaluate, write a checkpoint and the history, tell Ray Train; all ranks take part."""
    now = learner.report(tally, validation, before.get("start_val_mAP", 0.0))
    now |= {name: before[name] for name in ("stream", "reports_since_best")}
    if validation is not None:
        better = now["val_mAP"] > before["best_val_mAP"] or "val_mAP" not in before
        now["best_val_mAP"] = max(now["val_mAP"], before["best_val_mAP"])
        now["reports_since_best"] = 0 if better else before["reports_since_best"] + 1
    if learner.rank:
        ray.train.report(now)
        return now
    now |= {"node": ray.util.get_node_ip_address(), "began": before["began"], "time": time.time()}
    history.metrics.append(json.dumps(now))
    history.write()
    _write_events(history.out, now)
    with tempfile.TemporaryDirectory() as folder:
        average = learner.average.weights if learner.experiment.optimizer.ema else {}
        checkpoint.save(folder, learner.experiment, learner.clip.state_dict(), average, learner.state(), now)
        ray.train.report(now, checkpoint=ray.train.Checkpoint.from_directory(folder))
    return now


def _report_divergence(diverged: Diverged, inputs: Inputs, history: History, batch: int) -> None:
    """A last line that says why the run ends; its score is the worst there is, for the search to learn from."""
    place = {"step": diverged.step + 1, "images": (diverged.step + 1) * batch}
    if ray.train.get_context().get_world_rank() == 0:
        values = ", ".join(f"{name} {value:g}" for name, value in diverged.terms.items())
        paths = decoding.paths(inputs.images, diverged.rows)
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
        with SummaryWriter(f"{out}/tensorboard", purge_step=values["step"]) as writer:
            for name, value in values.items():
                if isinstance(value, float):
                    writer.add_scalar(name, value, values["step"])
