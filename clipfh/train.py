"""The worker's training loop, and `fit`, the one driver of a run."""

from __future__ import annotations

import json
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.fs
import ray
import ray.train
import torch
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.execution.callback import ControllerCallback
from ray.train.v2._internal.execution.checkpoint.checkpoint_manager import CheckpointManager
from ray.train.v2._internal.execution.controller import TrainController
from torch import nn

from clipfh import UserError, batches, checkpoint, cluster, config, files, model, prompts, stream
from clipfh.catalogue import Catalogue
from clipfh.learner import Captions, Diverged, Learner, Tally, Validation

METRICS, STREAM = "metrics.jsonl", "stream.jsonl"


# --- What a run needs, put into the object store once for all trials -------------------------------------------------


@dataclass(frozen=True)
class Inputs:
    """All that a run reads, as references into the object store."""

    images: stream.Images
    captions: Any
    """ObjectRef[Captions]"""
    weights: Any
    """ObjectRef[dict[str, np.ndarray]]"""
    validation: Any
    """ObjectRef of decoded images (N, size, size, 3) uint8: val_query, then val_gallery; None where those are trained
    on"""
    items: Any
    """ObjectRef[tuple[np.ndarray, int]]: item code of each validation image, and how many of them are queries"""
    size: int
    """side of the model's input, pixels"""
    num_images: int
    num_single: int
    """train items with a single view"""
    num_cut: int
    """prompts of train items that are longer than the model reads"""
    start_val_mAP: float | None = None
    """validation mAP of the weights, where it is known; else each run measures it"""


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
    file, started = out / checkpoint.EXPERIMENT, out / "run.json"
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
    rows = [catalogue.rows(split)["item_id"].to_pylist() for split in VALIDATION]
    codes = np.unique(rows[0] + rows[1], return_inverse=True)[1]
    captions, num_cut = captions_of(catalogue, index.names, experiment, *splits)
    return Inputs(
        images=images,
        captions=ray.put(captions),
        weights=ray.put({name: tensor.numpy() for name, tensor in clip.state_dict().items()}),
        validation=None if with_validation else stream.decoded(catalogue, VALIDATION, preprocess),
        items=ray.put((codes, len(rows[0]))),
        size=preprocess.size,
        num_images=len(index.item),
        num_single=int((index.views == 1).sum()),
        num_cut=num_cut if experiment.loss.takes_text else 0,
    )


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


class History:
    """A run's `metrics.jsonl` and `stream.jsonl`, which a restart cuts back to the checkpoint it goes on from."""

    def __init__(self, out: str, step: int) -> None:
        self.store, self.out = pyarrow.fs.FileSystem.from_uri(out)
        self.metrics = [line for line in self._read(METRICS) if json.loads(line)["step"] <= step]
        self.stream = [line for line in self._read(STREAM) if json.loads(line)["step"] < step]

    def _read(self, name: str) -> list[str]:
        path = f"{self.out}/{name}"
        if self.store.get_file_info(path).type == pyarrow.fs.FileType.NotFound:
            return []
        with self.store.open_input_stream(path) as file:
            return file.read().decode().splitlines()

    def write(self) -> None:
        """Both files, each whole or not at all."""
        checkpoint.wait_for(f"{self.out}/{checkpoint.EXPERIMENT}")
        for name, lines in ((METRICS, self.metrics), (STREAM, self.stream)):
            path = f"{self.out}/{name}"
            with self.store.open_output_stream(f"{path}.new") as file:
                file.write("".join(f"{line}\n" for line in lines).encode())
            self.store.move(f"{path}.new", path)


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
    batch_stream = stream.batches(inputs.images, recipe, learner.step, learner.budget.total, *place)
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
    item, num_query = ray.get(inputs.items)
    return Validation(ray.get(inputs.validation), item, num_query)


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


# --- The driver ------------------------------------------------------------------------------------------------------


class _WholeLists(ControllerCallback):
    """Make the controller write its list of checkpoints whole or not at all.

    Ray Train writes it in place. Whoever reads it meanwhile finds half of it, and so would a resumed run after a kill.
    """

    def after_controller_start(self, train_run_context: Any) -> None:
        CheckpointManager._write_state_to_storage = _write_list  # type: ignore[method-assign]


def _write_list(manager: Any) -> None:
    """CheckpointManager's method of that name, by way of a second file."""
    store = manager._storage_context.storage_filesystem
    path = manager._storage_context.checkpoint_manager_snapshot_path
    with store.open_output_stream(f"{path}.new") as file:
        file.write(manager._save_state().encode())
    store.move(f"{path}.new", path)


class _Trainer(TorchTrainer):  # of Train V2, the default; its types are those of V1
    """TorchTrainer without three processes a run.

    In a trial's process, which is an actor and has all loaded, it keeps its controller there. The part of its
    placement-group cleaner is played by `cluster.Register` and `cluster.end`. Its manager of datasets would have none:
    the workers run their own pipelines.
    """

    def _initialize_and_run_controller(self, **parts: Any) -> Any:
        if ray.get_runtime_context().get_actor_id() is None:
            return super()._initialize_and_run_controller(**parts)  # type: ignore[misc]
        run = next(each.run for each in parts["callbacks"] if isinstance(each, cluster.Register))
        return cluster.control(run, TrainController(**parts))

    def _create_default_callbacks(self) -> list:
        from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
        from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback

        usual = super()._create_default_callbacks()  # type: ignore[misc]
        spared = DatasetsCallback, PlacementGroupCleanerCallback
        return [callback for callback in usual if not isinstance(callback, spared)]


def fit(
    experiment: config.Experiment,
    inputs: Inputs,
    out: str | Path,
    resources: cluster.Resources,
    *,
    name: str = "run",
    retries: int = 0,
    followed: bool = False,
) -> None:
    """Train, or go on training what `out` holds. Blocks to the end; `metrics.jsonl` grows meanwhile.

    Args:
        experiment: what to compute.
        inputs: of this experiment's model, prompts and catalogue.
        out: the run's folder, which holds its `experiment.json`.
        resources: where to compute it.
        name: of the run on this cluster, for `cluster.end`.
        retries: how often lost workers are replaced. 0 under Tune, which retries whole trials.
        followed: by a run with the same resources, whose processes are started while this one trains.

    Raises:
        ray.train.TrainingFailedError: workers failed more often than that.
    """
    if experiment.batch.items % resources.workers:
        raise UserError(
            f"--workers {resources.workers} does not divide --batch.items {experiment.batch.items}: "
            "each worker takes as many items"
        )
    out = str(out) if "://" in str(out) else str(Path(out).absolute())
    trainer = _Trainer(
        loop,
        train_loop_config={
            "experiment": experiment,
            "inputs": inputs,
            "out": out,
            "threads": resources.threads,
            "followed": followed,
        },
        scaling_config=ray.train.ScalingConfig(
            num_workers=resources.workers,
            use_gpu=resources.gpus > 0,
            resources_per_worker={"CPU": resources.cpus, **({"GPU": resources.gpus} if resources.gpus else {})},
        ),
        run_config=ray.train.RunConfig(
            name="checkpoints",
            storage_path=out,
            worker_runtime_env=cluster.first_calling(f"{__name__}.load"),
            callbacks=[cluster.Register(name), _WholeLists()],  # type: ignore[list-item]
            failure_config=ray.train.FailureConfig(
                max_failures=retries, max_preemption_failures=-1, controller_failure_limit=3
            ),  # type: ignore[call-arg]
            checkpoint_config=ray.train.CheckpointConfig(
                num_to_keep=1,
                checkpoint_score_attribute="step" if inputs.validation is None else "val_mAP",
                checkpoint_score_order="max",
            ),
        ),
    )
    try:
        trainer.fit()
    finally:
        cluster.end(name)  # the handle kept for it holds the controller back from ending by itself


def is_over(experiment: config.Experiment, inputs: Inputs, last: dict[str, Any]) -> bool:
    """Whether a run's last report is the last that it will make."""
    patience = experiment.budget.patience
    stopped = patience and last.get("reports_since_best", 0) >= patience
    total = batches.budget_of(experiment, inputs.num_images).total
    return bool("diverged" in last or stopped or last["step"] >= total)


def read_metrics(out: str | Path) -> list[dict[str, Any]]:
    """The reports of a run so far."""
    file = Path(out) / METRICS
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
