"""What a run begins with, and the loop of its workers."""

from __future__ import annotations

import json
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray
import ray.train
import torch
from torch import nn

from clipfh import UserError, batches, checkpoint, cluster, config, files, model, prompts, runs, stream
from clipfh.catalogue import Catalogue
from clipfh.fit import Inputs
from clipfh.learner import Captions, Diverged, Learner, Tally, Validation
from clipfh.runs import History

# --- What a run needs, put into the object store once for all trials -------------------------------------------------


def begin(
    out: Path,
    experiment: config.Experiment | None,
    catalogue: Catalogue,
    warm_start: str | None = None,
    resume: bool = False,
) -> tuple[nn.Module, config.Experiment]:
    """Make the run's folder, or open it to go on; returns the model that it starts from, and its experiment.

    Args:
        out: the run's folder.
        experiment: what to compute; None takes what the folder has.
        catalogue: to train on.
        warm_start: weights to start from.
        resume: go on with what the folder holds.

    Raises:
        UserError: a folder in use, nothing to resume, or another run than the one to resume; unfit weights.
    """
    file, started = out / runs.EXPERIMENT, out / "run.json"
    if resume and not started.exists():
        raise UserError(f"--resume: {out} holds no run; leave --resume out to start one")
    if not resume and out.exists() and any(out.iterdir()):
        raise UserError(f"--out {out} is not empty: --resume goes on with its run, or name another folder")
    catalogue.require("train", "val_query", "val_gallery")
    known = (
        json.loads(started.read_text()) if resume else {"hash": catalogue.manifest["hash"], "warm_start": warm_start}
    )
    if known["hash"] != catalogue.manifest["hash"]:
        raise UserError(f"--resume: {out} was trained on another catalogue than {catalogue.path}: give that one")
    if resume and experiment is not None and experiment != config.load(file):
        raise UserError(f"--resume: the settings differ from those in {file}: leave them out, or name another --out")
    experiment = experiment or config.load(file)
    clip = start_of(experiment, known["warm_start"])
    out.mkdir(parents=True, exist_ok=True)
    files.write(file, config.to_json(experiment))
    files.write(started, json.dumps({"catalogue": str(catalogue.path), **known}, indent=2) + "\n")
    return clip, experiment


def notes_on(inputs: Inputs) -> list[str]:
    """What to tell people of items and prompts that count for less."""
    counts = {
        "train items have one view and are left out of terms that need a positive": inputs.num_single,
        "prompts of train items are longer than the model reads: their ends are cut off": inputs.num_cut,
    }
    return [f"note: {count:,} {what}" for what, count in counts.items() if count]


def start_of(experiment: config.Experiment, warm_start: str | None = None) -> nn.Module:
    """The model as training finds it: pretrained or random, then the weights to warm-start from."""
    if not warm_start:
        return model.initial(experiment.model, experiment.seed)
    weights = checkpoint.load(warm_start)
    named = weights.experiment.model.name if weights.experiment else weights.model_name
    if named and model.plain_name(named) != model.plain_name(experiment.model.name):
        raise UserError(f"--warm-start {warm_start} holds {named}, not {experiment.model.name}: give --model {named}")
    return model.with_weights(experiment.model, weights.state, warm_start)


VALIDATION = ("val_query", "val_gallery")


def inputs_of(
    catalogue: Catalogue,
    experiment: config.Experiment,
    clip: nn.Module,
    keep_gib: float = 0.0,
    with_validation: bool = False,
) -> Inputs:
    """Put into the object store what runs of this model and these prompts share.

    Args:
        catalogue: to train on.
        experiment: of which the model, the prompts and the largest P x K count.
        clip: weights to start from.
        keep_gib: GiB of decoded images to keep for all runs.
        with_validation: train on the validation items too; their score then means nothing, and there is none.

    Raises:
        UserError: prompts or a P x K that do not fit the catalogue.
    """
    splits = ("train", *VALIDATION) if with_validation else ("train",)
    images = stream.share(catalogue, *splits)
    index: batches.Index = ray.get(images.index)
    stream.plan_of(index, experiment.batch, experiment.seed)
    preprocess = model.preprocess_of(clip)
    if keep_gib:
        images = stream.keep_decoded(images, keep_gib, preprocess.size, experiment.augment.crop_min)
    captions, num_cut = captions_of(catalogue, index.names, experiment, *splits)
    return Inputs(
        images=images,
        captions=ray.put(captions),
        weights=ray.put({name: tensor.numpy() for name, tensor in clip.state_dict().items()}),
        validation=None if with_validation else stream.decoded(catalogue, VALIDATION, preprocess),
        items=ray.put(validation_codes(catalogue)),
        size=preprocess.size,
        num_images=len(index.item),
        num_single=int((index.views == 1).sum()),
        num_cut=num_cut if experiment.loss.takes_text else 0,
    )


def validation_codes(catalogue: Catalogue) -> tuple[np.ndarray, np.ndarray, int]:
    """Item code and path code of each validation image, (N,) each, and how many of them are queries."""
    tables = [catalogue.rows(split) for split in VALIDATION]
    columns = ([value for table in tables for value in table[name].to_pylist()] for name in ("item_id", "path"))
    item, photo = (np.unique(column, return_inverse=True)[1] for column in columns)
    return item, photo, tables[0].num_rows


def captions_of(
    catalogue: Catalogue, names: list[str], experiment: config.Experiment, *splits: str
) -> tuple[Captions, int]:
    """The prompts of some splits' items, tokenized, and how many of them are longer than the model reads."""
    prompt_of = prompts_of(catalogue, experiment, *splits)
    if not set(names) & set(prompt_of):
        raise UserError(f"--text.file {experiment.text.file} names none of the train items, e.g. {names[0]}")
    distinct = {text: i for i, text in enumerate(sorted({prompt_of[n] for n in names if n in prompt_of}))}
    of_item = np.array([distinct[prompt_of[n]] if n in prompt_of else -1 for n in names], np.int32)
    tokens = model.tokenizer(experiment.model)(list(distinct)).numpy().astype(np.int32)
    full, count = tokens[:, -1] != 0, model.token_counter(experiment.model)
    num_cut = sum(count(text) > tokens.shape[1] for text, i in distinct.items() if full[i])
    return Captions(tokens, of_item), num_cut


def prompts_of(catalogue: Catalogue, experiment: config.Experiment, *splits: str) -> dict[str, str]:
    """Item to prompt: from the experiment's file, or made from the texts of the items of some splits."""
    if experiment.text.file:
        return prompts.load_prompts(experiment.text.file)
    counter = model.token_counter(experiment.model)
    rows = (row for split in splits for row in catalogue.rows(split).to_pylist())
    limit = model.tokenizer(experiment.model).context_length
    return prompts.build(experiment.text.strategy, prompts.item_texts(rows), counter, limit)


# --- The worker ------------------------------------------------------------------------------------------------------


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
    recipe = stream.Recipe(experiment.batch, experiment.augment, experiment.seed, inputs.size)
    place = learner.rank, learner.world_size
    batch_stream = stream.batches(
        inputs.images, recipe, learner.step, learner.budget.total, *place, tasks=job["decoding"]
    )
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
            rows, values = learner.train_step(rows, images)
        except Diverged as diverged:
            _report_divergence(diverged, inputs, history, experiment.batch.images)
            return
        tally.add(len(rows), waited, values)
        found["stream"] = stream.digest(found["stream"], step, rows)
        history.stream.append(json.dumps({"step": step, "images": rows.tolist()}))
        if learner.budget.is_report(learner.step) or notice.is_new(learner.step):
            found = _report(learner, validation, history, tally, {**found, "began": began})
            tally = Tally()


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
        paths = stream.paths(inputs.images, diverged.rows)
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
