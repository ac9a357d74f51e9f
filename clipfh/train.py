"""The worker's training loop, and `fit`, the one driver of a run."""

from __future__ import annotations

import functools
import json
import math
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.fs
import ray
import ray.train
import torch
import torch.distributed as dist
import torch.nn.functional as F
from ray.train.torch import TorchTrainer
from torch import Tensor, nn

from clipfh import UserError, batches, checkpoint, cluster, config, metrics, model, optimizer, prompts, stream
from clipfh.catalogue import Catalogue
from clipfh.gather import gather
from clipfh.objective import Labels, Objective

METRICS, STREAM = "metrics.jsonl", "stream.jsonl"


# --- What a run needs, put into the object store once for all trials -------------------------------------------------


@dataclass(frozen=True)
class Captions:
    """Prompts of the train items; identical ones are one caption."""

    tokens: np.ndarray
    """(C, context) int32"""
    of_item: np.ndarray
    """(I,) int32 caption of each item, -1 for an item without a prompt"""


@dataclass(frozen=True)
class Inputs:
    """All that a run reads, as references into the object store."""

    images: stream.Images
    captions: Any
    """ObjectRef[Captions]"""
    weights: Any
    """ObjectRef[dict[str, np.ndarray]]"""
    validation: list[Any]
    """ObjectRefs of decoded images (n, size, size, 3) uint8: val_query, then val_gallery"""
    items: Any
    """ObjectRef[tuple[np.ndarray, int]]: item code of each validation image, and how many of them are queries"""
    size: int
    """side of the model's input, pixels"""
    num_images: int
    num_single: int
    """train items with a single view"""


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
    file.write_text(config.to_json(experiment))
    started.write_text(json.dumps({"catalogue": str(catalogue.path), **known}, indent=2) + "\n")
    return clip, experiment


def single_views(count: int) -> str:
    """What to tell people of items that can't be positives."""
    return f"note: {count:,} train items have one view and are left out of terms that need a positive"


def start_of(experiment: config.Experiment, warm_start: str | None = None) -> nn.Module:
    """The model as training finds it: pretrained or random, then the weights to warm-start from."""
    if warm_start:
        return model.with_weights(experiment.model, checkpoint.load(warm_start).state, warm_start)
    return model.initial(experiment.model, experiment.seed)


def inputs_of(catalogue: Catalogue, experiment: config.Experiment, clip: nn.Module) -> Inputs:
    """Put into the object store what runs of this model and these prompts share.

    Raises:
        UserError: prompts or a P x K that do not fit the catalogue.
    """
    images = stream.share(catalogue)
    index: stream.Index = ray.get(images.index)
    stream.plan_of(index, experiment.batch, experiment.seed)
    preprocess = model.preprocess_of(clip)
    rows = [catalogue.rows(split)["item_id"].to_pylist() for split in ("val_query", "val_gallery")]
    codes = np.unique(rows[0] + rows[1], return_inverse=True)[1]
    return Inputs(
        images=images,
        captions=ray.put(captions_of(catalogue, index.names, experiment)),
        weights=ray.put({name: tensor.numpy() for name, tensor in clip.state_dict().items()}),
        validation=stream.decoded(catalogue, ("val_query", "val_gallery"), preprocess),
        items=ray.put((codes, len(rows[0]))),
        size=preprocess.size,
        num_images=len(index.item),
        num_single=int((index.views == 1).sum()),
    )


def captions_of(catalogue: Catalogue, names: list[str], experiment: config.Experiment) -> Captions:
    """The train items' prompts, tokenized."""
    prompt_of = prompts_of(catalogue, experiment, "train")
    if not set(names) & set(prompt_of):
        raise UserError(f"--text.file {experiment.text.file} names none of the train items, e.g. {names[0]}")
    distinct = {text: i for i, text in enumerate(sorted({prompt_of[n] for n in names if n in prompt_of}))}
    of_item = np.array([distinct[prompt_of[n]] if n in prompt_of else -1 for n in names], np.int32)
    tokens = model.tokenizer(experiment.model)(list(distinct)).numpy().astype(np.int32)
    return Captions(tokens, of_item)


def prompts_of(catalogue: Catalogue, experiment: config.Experiment, *splits: str) -> dict[str, str]:
    """Item to prompt: from the experiment's file, or made from the texts of the items of some splits."""
    if experiment.text.file:
        return prompts.load_prompts(experiment.text.file)
    counter = model.token_counter(experiment.model)
    return prompts.build(experiment.text.strategy, item_texts(catalogue, *splits), counter)


def item_texts(catalogue: Catalogue, *splits: str) -> list[prompts.ItemText]:
    """The text of each item of some splits."""
    found: dict[str, dict[str, Any]] = {}
    for split in splits:
        for row in (
            catalogue.rows(split).select(["item_id", "text", "color", "category", "gender", "variant"]).to_pylist()
        ):
            item = found.setdefault(row["item_id"], {**row, "variants": set(), "views": 0})
            item["variants"].add(row["variant"])
            item["views"] += 1
    return [
        prompts.ItemText(
            i["item_id"], i["text"], i["color"], i["category"], i["gender"], len(i["variants"]), i["views"]
        )
        for i in found.values()
    ]


@dataclass(frozen=True)
class Budget:
    """An experiment's budget, for batches of so many images."""

    total: int
    """steps"""
    every: float
    """images between two reports"""
    batch: int

    def is_report(self, done: int) -> bool:
        """Whether a report is due after so many steps: the first to reach a multiple of `every`, and the last.

        So a report comes at no fewer images than was asked for, by less than a batch, whatever P x K: a sweep's rungs
        are the same for all its trials.
        """
        return done == self.total or done * self.batch // self.every > (done - 1) * self.batch // self.every


def budget_of(experiment: config.Experiment, num_images: int) -> Budget:
    """The run's steps and reports."""
    budget, batch = experiment.budget, experiment.batch.images
    images = budget.images or math.ceil(budget.epochs * num_images)
    return Budget(batches.num_steps(images, batch), budget.report_every or images / 10, batch)


# --- The worker ------------------------------------------------------------------------------------------------------


class Diverged(Exception):
    """The loss is no longer finite. The message names the step, the terms and the images."""


@dataclass
class Tally:
    """What happened since the last report."""

    start: float = field(default_factory=time.monotonic)
    images: int = 0
    waited: float = 0.0
    """seconds spent waiting for images"""
    losses: dict[str, float | Tensor] = field(default_factory=dict)
    """sums over the steps"""
    steps: int = 0

    def add(self, images: int, waited: float, values: dict[str, Tensor]) -> None:
        """Take in a step. Tensors are summed where they are: no step waits for the device."""
        self.images += images
        self.waited += waited
        self.steps += 1
        for name, value in values.items():
            self.losses[name] = self.losses.get(name, 0.0) + value

    def means(self) -> dict[str, float]:
        """Mean losses, images per second, share of the time spent waiting for data."""
        seconds = time.monotonic() - self.start
        rates = {"images_per_second": self.images / seconds, "data_wait": self.waited / seconds}
        return {name: float(total) / self.steps for name, total in self.losses.items()} | rates


class Worker:
    """One rank of a run: towers, heads, optimizer, average of the weights, place in the stream."""

    def __init__(self, experiment: config.Experiment, inputs: Inputs, threads: int) -> None:
        torch.set_num_threads(threads)
        torch.manual_seed(experiment.seed)
        self.experiment, self.inputs, self.device = experiment, inputs, model.device()
        self.rank, self.world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        self.index: stream.Index = ray.get(inputs.images.index)
        self.captions: Captions = ray.get(inputs.captions)
        self.budget = budget_of(experiment, len(self.index.item))
        self.precision = model.precision(experiment.model.precision, self.device)
        self.trains_text = experiment.stage == "joint" and experiment.loss.infonce > 0
        self.clip = self._build_clip()
        self.towers = model.Towers(self.clip).to(self.device).train()
        self.forward = self._distributed()
        self.objective = Objective(experiment.loss, self.clip.visual.output_dim, len(self.index.names)).to(self.device)
        self.optimizer = optimizer.adamw(self.clip, self.objective, experiment.optimizer, self.device)
        self.schedule = optimizer.schedule(self.optimizer, self.budget.total, experiment.optimizer.warmup)
        self.average = optimizer.Average(self.clip, experiment.optimizer.ema)
        self.step = 0

    def _build_clip(self) -> Any:
        settings = self.experiment.loss
        clip: Any = model.build(self.experiment.model)
        clip.load_state_dict({n: torch.from_numpy(w.copy()) for n, w in ray.get(self.inputs.weights).items()})
        if settings.infonce_temperature:
            clip.logit_scale.data.fill_(-math.log(settings.infonce_temperature))
        stage = "joint" if self.trains_text else "image"
        model.freeze(clip, stage, self.experiment.model, settings.learn_scale)
        return clip

    def _distributed(self) -> Callable[..., tuple[Tensor, Tensor | None, Tensor]]:
        if self.world_size == 1:
            return self.towers
        devices = [self.device] if self.device.type == "cuda" else None
        # Batch norm is in eval mode, so buffers never differ
        return nn.parallel.DistributedDataParallel(
            self.towers, device_ids=devices, broadcast_buffers=False, gradient_as_bucket_view=True
        )

    @functools.cached_property
    def caption_features(self) -> Tensor:
        """(C, D) features of all captions by the frozen text tower, which is run this once."""
        with torch.no_grad():
            parts = torch.from_numpy(self.captions.tokens).long().split(256)
            return torch.cat([self.clip.encode_text(part.to(self.device)).float() for part in parts])

    def train_step(self, rows: np.ndarray, images: np.ndarray) -> tuple[np.ndarray, dict[str, Tensor]]:
        """One optimizer step on the global batch.

        Args:
            rows: (B,) image rows of this rank's part.
            images: (B, size, size, 3) uint8.

        Returns:
            The rows of the global batch, and its losses.

        Raises:
            Diverged: a loss that is not finite.
        """
        rows = gather(torch.from_numpy(rows).to(self.device)).cpu().numpy()
        self.labels = labels = self._labels(rows)
        features, text, log_scale = self._features(images, labels)
        total, terms = self.objective(features, text, log_scale, labels)
        if not self._update(total):
            raise Diverged(self._divergence(rows, terms))
        self.objective.move_centers(features, labels, self.experiment.optimizer.center_lr)
        self.cosine = _pair_cosine(features, text, labels)
        named = {f"loss_{term}": value.detach() for term, value in terms.items()}
        return rows, {"loss": total.detach(), **named, "grad_norm": self.grad_norm}

    def _features(self, images: np.ndarray, labels: Labels) -> tuple[Tensor, Tensor | None, Tensor]:
        """Features of the global batch's images and distinct captions, and the log of the logit scale."""
        tokens = self._own_tokens(labels) if self.trains_text else None
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == torch.bfloat16):
            image, text, log_scale = self.forward(model.to_device(images, self.device), tokens)
        if text is not None:
            text = gather(text.float())[: len(labels.captions)]
        elif self.experiment.loss.infonce:
            text = self.caption_features[labels.captions]
        return gather(image.float()), text, log_scale

    def _update(self, total: Tensor) -> bool:
        """The optimizer's step; False, and no step, where loss or gradient are not finite."""
        self.optimizer.zero_grad(set_to_none=True)
        total.backward()
        trained = [p for group in self.optimizer.param_groups for p in group["params"]]
        self.grad_norm = nn.utils.clip_grad_norm_(trained, self.experiment.optimizer.clip or math.inf).detach()
        if not torch.isfinite(total + self.grad_norm):
            return False
        self.optimizer.step()
        self.schedule.step()
        self.average.update(self.step)
        self.step += 1
        return True

    def _labels(self, rows: np.ndarray) -> Labels:
        item = self.index.item[rows]
        caption = self.captions.of_item[item]
        captions, place = np.unique(caption[caption >= 0], return_inverse=True)
        put = functools.partial(torch.as_tensor, device=self.device)
        return Labels(
            item=put(item).long(),
            paired=put(self.index.views[item] > 1),
            captioned=put(caption >= 0),
            caption=put(place),
            captions=put(captions).long(),
        )

    def _own_tokens(self, labels: Labels) -> Tensor:
        """This rank's share of the batch's captions: as many on each rank, the last repeated to fill up."""
        if not len(labels.captions):
            return torch.from_numpy(self.captions.tokens[:1]).long().to(self.device)
        share = math.ceil(len(labels.captions) / self.world_size)
        places = torch.arange(self.rank * share, (self.rank + 1) * share).clamp(max=len(labels.captions) - 1)
        own = self.captions.tokens[labels.captions.cpu()[places].numpy()]
        return torch.from_numpy(own).long().to(self.device)

    def _divergence(self, rows: np.ndarray, terms: dict[str, Tensor]) -> str:
        values = ", ".join(f"{name} {value.item():g}" for name, value in terms.items())
        items = sorted({self.index.names[i] for i in self.index.item[rows]})
        return (
            f"the loss is not finite at step {self.step} ({values}; items {', '.join(items[:8])} ...): try a lower lr"
        )

    def validate(self) -> dict[str, float]:
        """mAP of the validation items by the averaged weights; each rank embeds its part."""
        images = np.concatenate(ray.get(self.inputs.validation))
        item, num_query = ray.get(self.inputs.items)
        share = math.ceil(len(images) / self.world_size)
        own = np.arange(self.rank * share, (self.rank + 1) * share).clip(max=len(images) - 1)
        with self.average.applied():
            embedding = gather(model.embed(self.towers, images[own], self.precision)).cpu()[: len(images)]
        codes = torch.as_tensor(item)
        rows = metrics.Embeddings(embedding, item=codes, variant=codes, image=torch.arange(len(codes)))
        query, gallery = torch.arange(num_query), torch.arange(num_query, len(codes))
        return {"val_mAP": metrics.mean_average_precision(rows.select(query), rows.select(gallery))}

    def report(self, tally: Tally) -> dict[str, Any]:
        """All that a report carries, with floor and collapse value of each term."""
        bounds = self.objective.bounds(self.labels, self.clip.logit_scale.detach().clamp(max=model.MAX_LOG_SCALE))
        ends = {f"{end}_{term}": value for term, b in bounds.items() for end, value in b._asdict().items()}
        images = self.step * self.experiment.batch.images
        place = {"step": self.step, "images": images, "epoch": images / len(self.index.item)}
        cosine = {} if self.cosine is None else {"image_text_cosine": self.cosine.item()}
        return place | self.validate() | tally.means() | ends | cosine | {"lr": self._rate()}

    def _rate(self) -> float:
        """optimizer.lr as the schedule has it now."""
        return self.experiment.optimizer.lr * self.schedule.lr_lambdas[0](self.step)

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds beside the weights."""
        return {
            "step": self.step,
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "objective": self.objective.state_dict(),
        }

    def restore(self, folder: str) -> dict[str, Any]:
        """Go on from a checkpoint; returns its metrics."""
        raw, average, state, found = checkpoint.load_training(folder)
        self.clip.load_state_dict(raw)
        for name, weights in average.items():
            self.average.weights[name].copy_(weights)
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.objective.load_state_dict(state["objective"])
        self.step = state["step"]
        return found


def _pair_cosine(feature_BD: Tensor, text_CD: Tensor | None, labels: Labels) -> Tensor | None:
    """Mean cosine of an image and its caption."""
    if text_CD is None or not labels.captioned.any():
        return None
    return F.cosine_similarity(feature_BD.detach()[labels.captioned], text_CD.detach()[labels.caption]).mean()


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
        for name, lines in ((METRICS, self.metrics), (STREAM, self.stream)):
            path = f"{self.out}/{name}"
            with self.store.open_output_stream(f"{path}.new") as file:
                file.write("".join(f"{line}\n" for line in lines).encode())
            self.store.move(f"{path}.new", path)


def loop(job: dict[str, Any]) -> None:
    """What Ray Train runs on each worker."""
    worker = Worker(job["experiment"], job["inputs"], job["threads"])
    found: dict[str, Any] = {"best_val_mAP": 0.0, "stream": "", "reports_since_best": 0}
    if start := ray.train.get_checkpoint():
        with start.as_directory() as folder:
            found = worker.restore(folder)
    history = History(job["out"], worker.step)
    batch_stream = iter(stream.batches(ray.train.get_dataset_shard("train")))
    tally, patience = Tally(), job["experiment"].budget.patience
    while worker.step < worker.budget.total and not (patience and found["reports_since_best"] >= patience):
        waiting = time.monotonic()
        step, rows, images = next(batch_stream)
        waited = time.monotonic() - waiting
        assert step == worker.step, f"the stream is at step {step}, the run at {worker.step}"
        try:
            rows, values = worker.train_step(rows, images)
        except Diverged as error:
            _report_divergence(worker, history, found, str(error))
            return
        tally.add(len(rows), waited, values)
        found["stream"] = stream.digest(found["stream"], step, rows)
        history.stream.append(json.dumps({"step": step, "images": rows.tolist()}))
        if worker.budget.is_report(worker.step):
            found = _report(worker, history, tally, found)
            tally = Tally()


def _report(worker: Worker, history: History, tally: Tally, before: dict[str, Any]) -> dict[str, Any]:
    """Evaluate, write a checkpoint and the history, tell Ray Train; all ranks take part."""
    now = worker.report(tally)
    better = now["val_mAP"] > before["best_val_mAP"] or "val_mAP" not in before
    now["best_val_mAP"] = max(now["val_mAP"], before["best_val_mAP"])
    now["reports_since_best"] = 0 if better else before["reports_since_best"] + 1
    now["stream"] = before["stream"]
    if worker.rank:
        ray.train.report(now)
        return now
    history.metrics.append(json.dumps(now))
    history.write()
    _write_events(history.out, now)
    with tempfile.TemporaryDirectory() as folder:
        average = worker.average.weights if worker.experiment.optimizer.ema else {}
        checkpoint.save(folder, worker.experiment, worker.clip.state_dict(), average, worker.state(), now)
        ray.train.report(now, checkpoint=ray.train.Checkpoint.from_directory(folder))
    return now


def _report_divergence(worker: Worker, history: History, before: dict[str, Any], reason: str) -> None:
    """A last line that says why the run ends; its score is the worst there is, for the search to learn from."""
    place = {"step": worker.step + 1, "images": (worker.step + 1) * worker.experiment.batch.images}
    if worker.rank == 0:
        history.metrics.append(json.dumps({**place, "val_mAP": 0.0, "best_val_mAP": 0.0, "diverged": reason}))
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


class _Trainer(TorchTrainer):  # of Train V2, the default; its types are those of V1
    """TorchTrainer without its placement-group cleaner, whose part `cluster.Register` and `cluster.end` play."""

    def _create_default_callbacks(self) -> list:
        from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback

        usual = super()._create_default_callbacks()  # type: ignore[misc]
        return [callback for callback in usual if not isinstance(callback, PlacementGroupCleanerCallback)]


def fit(
    experiment: config.Experiment,
    inputs: Inputs,
    out: str | Path,
    resources: cluster.Resources,
    *,
    name: str = "run",
    retries: int = 0,
) -> None:
    """Train, or go on training what `out` holds. Blocks to the end; `metrics.jsonl` grows meanwhile.

    Args:
        experiment: what to compute.
        inputs: of this experiment's model, prompts and catalogue.
        out: the run's folder.
        resources: where to compute it.
        name: of the run on this cluster, for `cluster.end`.
        retries: how often lost workers are replaced. 0 under Tune, which retries whole trials.

    Raises:
        ray.train.TrainingFailedError: workers failed more often than that.
    """
    if experiment.batch.items % resources.workers:
        raise UserError(
            f"--workers {resources.workers} does not divide --batch.items {experiment.batch.items}: "
            "each worker takes as many items"
        )
    out = str(out) if "://" in str(out) else str(Path(out).absolute())
    total, batch = budget_of(experiment, inputs.num_images).total, experiment.batch.images
    recipe = stream.Recipe(experiment.batch, experiment.augment, experiment.seed, inputs.size)
    _Trainer(
        loop,
        train_loop_config={"experiment": experiment, "inputs": inputs, "out": out, "threads": resources.threads},
        scaling_config=ray.train.ScalingConfig(
            num_workers=resources.workers,
            use_gpu=resources.gpus > 0,
            resources_per_worker={"CPU": resources.cpus, **({"GPU": resources.gpus} if resources.gpus else {})},
        ),
        datasets={"train": lambda: stream.steps(checkpoint.latest_step(out), total, batch)},
        dataset_config=stream.Stream(inputs.images, recipe),
        run_config=ray.train.RunConfig(
            name="checkpoints",
            storage_path=out,
            callbacks=[cluster.Register(name)],  # type: ignore[list-item]
            failure_config=ray.train.FailureConfig(
                max_failures=retries, max_preemption_failures=retries, controller_failure_limit=3
            ),  # type: ignore[call-arg]
            checkpoint_config=ray.train.CheckpointConfig(
                num_to_keep=1, checkpoint_score_attribute="val_mAP", checkpoint_score_order="max"
            ),
        ),
    ).fit()


def read_metrics(out: str | Path) -> list[dict[str, Any]]:
    """The reports of a run so far."""
    file = Path(out) / METRICS
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
