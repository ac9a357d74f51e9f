"""What one worker computes without Ray: training steps, validation and reports, with towers, losses and optimizer."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from clipfh import UserError
from clipfh.config.experiment import Experiment
from clipfh.config.schedule import make_schedule
from clipfh.data.sampler import ItemIndex, worker_slice
from clipfh.learn import augment, diagnostics, optimizer
from clipfh.learn.all_gather import all_gather_with_gradient
from clipfh.learn.neighbours import ItemNeighbours
from clipfh.learn.objective import Objective
from clipfh.learn.optimizer import ExponentialMovingAverage
from clipfh.learn.tally import StepTally, UncheckedStep
from clipfh.learn.terms import Labels
from clipfh.learn.whitening import WithinItemCovariance
from clipfh.model import lora
from clipfh.model.clip import get_architecture
from clipfh.model.devices import resolve_precision
from clipfh.model.layers import freeze
from clipfh.model.towers import (
    Towers,
    clamp_logit_scale,
    embed_images,
    mapped_projection,
    recompute_blocks,
    text_features,
)
from clipfh.model.transfer import PendingValue, images_to_device, integers_to_device
from clipfh.retrieval import metrics

VALIDATION_PART = 512
"""Number of validation images that a worker embeds at a time."""


@dataclass(frozen=True)
class ItemCaptions:
    """Prompts of the train items. Identical prompts are one caption."""

    tokens: np.ndarray
    """(C, context) int32 tokens of each caption"""
    of_item: np.ndarray
    """(I,) int32 caption of each item, -1 for an item without a prompt"""


@dataclass(frozen=True)
class Validation:
    """Decoded validation images: the queries, then the gallery."""

    images: Any
    """(N, size, size, 3) uint8: an array, or EvaluationImages, whose slices are arrays"""
    item: np.ndarray
    """(N,) item codes"""
    photo: np.ndarray
    """(N,) codes of the photos' paths. A query's ranking leaves out the images with the query's code."""
    num_query: int


class Learner:
    """The model, losses and optimizer of one rank of a run.

    Args:
        experiment: the settings.
        clip: the model that training starts from, which is trained in place, in the type of its weights.
        index: items of the train images.
        captions: captions of the train items.
        on: the device.
    """

    def __init__(
        self, experiment: Experiment, clip: Any, index: ItemIndex, captions: ItemCaptions, on: torch.device
    ) -> None:
        torch.manual_seed(experiment.seed)
        self.experiment, self.clip, self.index, self.captions, self.device = experiment, clip, index, captions, on
        self.rank, self.world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        self.schedule = make_schedule(experiment, len(index.item), index.num_single)
        self.precision = resolve_precision(experiment.model.precision, on)
        self.trains_text = _trains_text(experiment)
        _prepare(clip, experiment)
        self.towers = Towers(clip, experiment.batch.chunk).to(on).train()
        self.forward = self._wrapped()
        dtype = self.towers.mean.dtype
        self.dim, has_bias = get_architecture(clip).embed_dim, clip.logit_bias is not None
        batch = experiment.batch
        objective = Objective(experiment.loss, self.dim, len(index.names), batch.views, batch.memory, has_bias)
        self.objective = objective.to(on, dtype)
        self.neighbours = ItemNeighbours(len(index.names), self.dim).to(on) if batch.num_neighbours else None
        self.covariance = WithinItemCovariance(self.dim).to(on) if experiment.optimizer.whitening else None
        self.whitening: Tensor | None = None
        self.whitening_from = self.schedule.num_steps * (1 - experiment.optimizer.whitening)
        self.optimizer = optimizer.make_adamw(clip, self.objective, experiment.optimizer, on)
        self.lr_schedule = optimizer.cosine_schedule(
            self.optimizer, self.schedule.num_steps, experiment.optimizer.warmup, experiment.optimizer.head_first
        )
        self.average = ExponentialMovingAverage(clip, experiment.optimizer.ema)
        self.parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        self.fill = (self.towers.mean.flatten() * 255).round().to(torch.uint8)
        self.step = 0
        self.unchecked: UncheckedStep | None = None

    def _wrapped(self) -> Callable[..., tuple[Tensor, Tensor | None, Tensor]]:
        towers: Any = torch.compile(self.towers) if self.experiment.model.compile else self.towers
        if self.world_size == 1:
            return towers
        devices = [self.device] if self.device.type == "cuda" else None
        # Batch norm computes as in evaluation, so buffers never differ
        return nn.parallel.DistributedDataParallel(
            towers, device_ids=devices, broadcast_buffers=False, gradient_as_bucket_view=True
        )

    @functools.cached_property
    def caption_features(self) -> Tensor:
        """(C, D) features of all captions by the frozen text tower, computed once."""
        tokens = torch.from_numpy(self.captions.tokens).long()
        return _to_float32(text_features(self.towers, tokens, self.precision))

    @property
    def steps_before(self) -> int:
        """Number of batches, from the first one on, that `begin` takes: a pass over all items, or 0."""
        loss = self.experiment.loss
        starts_at_means = loss.arcface > 0 and loss.arcface_start == "mean"
        batch = self.experiment.batch
        return math.ceil(len(self.index.names) / (batch.items - batch.num_neighbours)) if starts_at_means else 0

    def begin(self, batches: Iterator[tuple[int, np.ndarray, np.ndarray]]) -> None:
        """Start arcface's classifier at each item's mean embedding over its first K views, under the current weights.

        Every worker embeds its part of a batch, given as the step, image rows (N,) and this rank's training images."""
        sum_ID = torch.zeros(len(self.index.names), self.dim)
        for _, rows, images in batches:
            embedding = all_gather_with_gradient(embed_images(self.towers, images, self.precision), len(rows))
            # On the CPU, where the order of the sums is the same on every worker
            sum_ID.index_add_(0, torch.from_numpy(self.index.item[rows]).long(), embedding.cpu())
        self.objective.start_at(F.normalize(sum_ID))

    def train_step(self, rows: np.ndarray, images: np.ndarray | Tensor) -> dict[str, Tensor]:
        """Take one optimizer step on the global batch.

        The host waits only for the end of the previous step, so the device always has work. A loss or gradient that is
        not finite is therefore noticed one step late, but changes no weight.

        Args:
            rows: (N,) image rows of the global batch.
            images: (B, size, size, 3) uint8, this rank's part (`worker_slice`), or what `images_to_device` makes of it.

        Returns:
            `loss`, `loss_TERM` of each active term and `grad_norm` of the global batch, scalars on the device.

        Raises:
            Diverged: a loss or gradient of the previous step was not finite.
            UserError: the towers can't be compiled.
        """
        labels, tokens = self._labels(rows)
        pixels = images if isinstance(images, Tensor) else images_to_device(images, self.device)
        features, text, log_scale = self._features(pixels, tokens, labels)
        total, terms = self.objective(features, text, log_scale, labels, self.clip.logit_bias)
        grad_norm, not_finite = self._update(total)
        self.objective.follow(features, labels, self.experiment.optimizer.center_lr)
        if self.neighbours is not None:
            self.neighbours.add(features.detach(), labels.item, self.experiment.batch.views)
        if self.covariance is not None and self.step >= self.whitening_from:
            self.covariance.add(features.detach(), self.experiment.batch.views)
        self.last_batch = features.detach(), None if text is None else text.detach(), labels
        values = {term: value.detach() for term, value in terms.items()}
        before, self.unchecked = self.unchecked, UncheckedStep(self.step, values, rows, PendingValue(not_finite))
        self.step += 1
        if before:
            before.check()
        return {
            "loss": total.detach(),
            **{f"loss_{term}": value for term, value in values.items()},
            "grad_norm": grad_norm,
        }

    def _features(self, pixels: Tensor, tokens: Tensor | None, labels: Labels) -> tuple[Tensor, Tensor | None, Tensor]:
        """Features of the global batch's images and distinct captions, and the log of the logit scale."""
        pixels = self._augmented(pixels)
        with (
            torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == torch.bfloat16),
            _explain_compile_errors(),
        ):
            image, text, log_scale = self.forward(pixels, tokens)
        if text is not None:
            text = all_gather_with_gradient(_to_float32(text), self.world_size * len(text))[: len(labels.captions)]
        elif self.experiment.loss.takes_text:
            text = self.caption_features[labels.captions]
        return all_gather_with_gradient(_to_float32(image), len(labels.item)), text, log_scale

    def _augmented(self, pixels: Tensor) -> Tensor:
        """Augment this rank's images as the settings say. Draws are for the whole batch, from (seed, step)."""
        settings, batch = self.experiment.augment, self.experiment.batch.images
        part = worker_slice(batch, self.rank, self.world_size)
        rng = augment.step_generator(self.experiment.seed, self.step)
        if settings.randaugment:
            pixels = augment.randaugment(pixels, settings.randaugment, rng, batch, part, self.fill)
        return augment.erase(pixels, settings.erase, rng, batch, part, self.fill) if settings.erase else pixels

    def _update(self, total: Tensor) -> tuple[Tensor, Tensor]:
        """Take the optimizer's step, which changes nothing where the loss or the gradient is not finite.

        Returns:
            The gradient's norm before clipping, and 1.0 where the norm or the loss is not finite, else 0.0.
        """
        self.optimizer.zero_grad(set_to_none=True)
        with _explain_compile_errors():
            total.backward()
        grad_norm = nn.utils.clip_grad_norm_(self.parameters, self.experiment.optimizer.clip or math.inf).detach()
        not_finite = (~torch.isfinite(total.detach() + grad_norm)).float()
        # torch's own GradScaler makes a fused optimizer change nothing in the same way
        self.optimizer.found_inf = not_finite  # type: ignore[attr-defined]
        self.optimizer.step()
        self.lr_schedule.step()
        clamp_logit_scale(self.clip)
        self.average.update(self.step)
        return grad_norm, not_finite

    def _labels(self, rows: np.ndarray) -> tuple[Labels, Tensor | None]:
        """Labels of the global batch and, where the text tower is trained, this rank's tokens."""
        item = self.index.item[rows]
        caption = self.captions.of_item[item]
        captioned_places = np.flatnonzero(caption >= 0)
        captions, place = np.unique(caption[captioned_places], return_inverse=True)
        arrays = {
            "item": item,
            "items": np.unique(item),
            "paired": np.flatnonzero(self.index.views[item] > 1),
            "captioned": captioned_places,
            "caption": place,
            "captions": captions,
        }
        if self.experiment.loss.arcface and self.experiment.loss.arcface_dropout:
            arrays["features"] = self._seen_features()
        if self.trains_text:
            arrays["tokens"] = self._own_tokens(captions)
        tensors = integers_to_device(arrays, self.device)
        tokens = tensors.pop("tokens", None)
        return Labels(**tensors), tokens

    def _seen_features(self) -> np.ndarray:
        """Return indices of the features that arcface's classifier sees in this step, drawn from (seed, step)."""
        dim, rng = self.dim, np.random.Generator(np.random.SFC64((self.experiment.seed, self.step, 0, 2)))
        return np.sort(rng.permutation(dim)[: max(1, round(dim * (1 - self.experiment.loss.arcface_dropout)))])

    def _own_tokens(self, captions: np.ndarray) -> np.ndarray:
        """Return tokens of this rank's share of the batch's captions. Repeats of the last one make shares equal."""
        if not len(captions):
            return self.captions.tokens[:1]
        share = math.ceil(len(captions) / self.world_size)
        places = np.arange(self.rank * share, (self.rank + 1) * share).clip(max=len(captions) - 1)
        return self.captions.tokens[captions[places]]

    def validate(self, validation: Validation) -> float:
        """Return the mAP of the validation items under the EMA weights. Each rank embeds its part of the images."""
        return _rank(self._embed(validation), validation)

    def _embed(self, validation: Validation) -> Tensor:
        images = validation.images
        share = math.ceil(len(images) / self.world_size)
        start = min(self.rank * share, len(images) - 1)  # with few images, the last ranks embed the last one again
        stop = min(start + share, len(images))
        with self.average.applied():
            parts = (images[at : min(at + VALIDATION_PART, stop)] for at in range(start, stop, VALIDATION_PART))
            embedding = torch.cat([embed_images(self.towers, part, self.precision) for part in parts])
        own_share = F.pad(embedding, (0, 0, 0, share - len(embedding)))
        return all_gather_with_gradient(own_share, self.world_size * share)[: len(images)]

    def scores(self, validation: Validation | None) -> dict[str, float]:
        """Return the validation mAPs. At the end of the budget, whiten where that scores more, or nothing is scored."""
        ends = self.step >= self.schedule.num_steps
        whitening = self.covariance.whitening().to(self.device) if self.covariance is not None and ends else None
        if validation is None:
            self.whitening = whitening
            return {}
        if whitening is None:
            return {"val_mAP": self.validate(validation)}
        embedding = self._embed(validation)
        plain_mAP = _rank(embedding, validation)
        white_mAP = _rank(F.normalize(embedding @ whitening.to(embedding.dtype)), validation)
        self.whitening = whitening if white_mAP > plain_mAP else None
        return {"val_mAP": max(white_mAP, plain_mAP), "val_mAP_whitened": white_mAP, "val_mAP_not_whitened": plain_mAP}

    def report(self, tally: StepTally, validation: Validation | None, start_val_mAP: float) -> dict[str, Any]:
        """Return everything that a report holds: step, scores, means since the last report, bounds, warnings.

        Args:
            tally: sums since the last report.
            validation: images to score on; None where training uses these images, so that a score would mean nothing.
            start_val_mAP: score of the model that training started from.

        Raises:
            Diverged: a loss or gradient of the last step was not finite.
        """
        assert self.unchecked, "a report before the first step"
        self.unchecked.check()
        if self.neighbours is not None and self.schedule.is_report(self.step):  # other reports change no batches
            self.neighbours.refresh()
        means = tally.means()  # before scoring, because the tally measures the time of training
        images = self.step * self.experiment.batch.images
        report: dict[str, Any] = {"step": self.step, "images": images, "epoch": images / self.schedule.epoch_images}
        report |= means
        if validation is not None:
            report |= {"start_val_mAP": start_val_mAP}
        report |= self.scores(validation)
        report |= self._bounds_and_cosines()
        settings, steps = self.experiment.optimizer, self.schedule.num_steps
        lr = settings.lr * optimizer.lr_factor(self.step, steps, settings.warmup, settings.head_first)
        report |= {"lr": lr, **self._size()}
        warm = self.step > steps * (settings.head_first + 2 * settings.warmup * (1 - settings.head_first))
        return {**report, "warnings": diagnostics.find_warnings(report, list(self.objective.weights)) if warm else []}

    def _bounds_and_cosines(self) -> dict[str, float]:
        """Return floor and collapse value of each active term, and mean cosines, on the last batch."""
        feature_BD, text_CD, labels = self.last_batch
        bounds = self.objective.bounds(labels, self.clip.logit_scale, self.clip.logit_bias)
        ends = {f"{end}_{term}": value for term, b in bounds.items() for end, value in b._asdict().items()}
        return {**ends, **_cosines(feature_BD, text_CD, labels)}

    def _size(self) -> dict[str, float]:
        """Return the model's numbers of parameters, without heads, and on a GPU the peak memory so far, GiB."""
        counts: dict[str, float] = {"trained_parameters": sum(p.numel() for p in self.average.source.values())}
        counts |= {"parameters": sum(p.numel() for p in self.clip.parameters()) - lora.count_factors(self.clip)}
        if self.device.type != "cuda":
            return counts
        return {**counts, "peak_memory_gib": torch.cuda.max_memory_allocated(self.device) / 2**30}

    def weights(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return raw and EMA weights of a plain model by open_clip's names, with LoRA's updates added.

        The EMA covers trained weights only, and is empty where the run has none. LoRA's EMA update is the product of
        averaged factors, not the average of products. After the last report, the exported projection whitens."""
        raw, average = lora.merged_state(self.clip), {}
        if self.experiment.optimizer.ema and not self.experiment.model.lora_rank:
            average = self.average.weights
        elif self.experiment.optimizer.ema:
            with self.average.applied():
                state = lora.merged_state(self.clip, self.average.weights)
                average = {name: tensor.clone() for name, tensor in state.items()}
        if self.whitening is None:
            return raw, average
        projection = mapped_projection({**raw, **average}, self.whitening)
        return (raw, {**average, **projection}) if self.experiment.optimizer.ema else ({**raw, **projection}, average)

    def lora_state(self) -> dict[str, dict[str, Tensor]]:
        """Return the weights without LoRA's updates, with LoRA's factors, and the factors' EMA. Empty without LoRA."""
        if not self.experiment.model.lora_rank:
            return {}
        return {"weights": lora.factors(self.clip), "average": self.average.weights}

    def state(self) -> dict[str, Any]:
        """Return a checkpoint's state besides the weights."""
        return {
            "lora": self.lora_state(),
            "step": self.step,
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.lr_schedule.state_dict(),
            "objective": self.objective.state_dict(),
            "neighbours": self.neighbours.state_dict() if self.neighbours is not None else {},
            "covariance": self.covariance.state_dict() if self.covariance is not None else {},
        }

    def restore(self, raw: dict[str, Tensor], average: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Restore a checkpoint: raw and EMA weights as `weights` returns them, and the result of `state`.

        Raises:
            UserError: a version with another optimizer wrote the checkpoint.
        """
        optimizer.load_state(self.optimizer, state["optimizer"])
        if lora_state := state.get("lora"):
            plain = {name: raw[name] for name in self.clip.state_dict() if name in raw}
            raw, average = {**plain, **lora_state["weights"]}, lora_state["average"]
        self.clip.load_state_dict(raw)
        for name, weights in average.items():
            self.average.weights[name].copy_(weights)
        self.lr_schedule.load_state_dict(state["schedule"])
        self.objective.load_state_dict(state["objective"])
        if self.neighbours is not None:
            self.neighbours.load_state_dict(state["neighbours"])
        if self.covariance is not None:
            self.covariance.load_state_dict(state["covariance"])
        self.step = state["step"]


def _rank(embedding: Tensor, validation: Validation) -> float:
    """Return the mAP of the validation items."""
    codes, photo = torch.as_tensor(validation.item), torch.as_tensor(validation.photo)
    rows = metrics.Embeddings(embedding, item=codes, variant=codes, image=photo)
    query, gallery = torch.arange(validation.num_query), torch.arange(validation.num_query, len(codes))
    return metrics.mean_average_precision(rows.select(query), rows.select(gallery))


def count_trained(clip: Any, experiment: Experiment) -> int:
    """Freeze the model for an experiment, and return its number of trained parameters, heads not counted.

    Raises:
        UserError: the model has too few blocks to freeze, no weight for LoRA, or no last linear layer to whiten.
    """
    _freeze(clip, experiment)
    if experiment.model.lora_rank:
        return lora.count_trained(clip, experiment.model)
    return sum(p.numel() for p in clip.parameters() if p.requires_grad)


def _prepare(clip: Any, experiment: Experiment) -> None:
    """Set temperature, freezing, LoRA and gradient checkpointing as the settings say."""
    if experiment.loss.infonce_temperature:
        clip.logit_scale.data.fill_(-math.log(experiment.loss.infonce_temperature))
    clamp_logit_scale(clip)
    _freeze(clip, experiment)
    if experiment.model.lora_rank:
        lora.adapt(clip, experiment.model)
    if experiment.model.checkpointing:
        recompute_blocks(clip, experiment.model.name)


def _freeze(clip: Any, experiment: Experiment) -> None:
    """Switch off the gradients of the parameters that are not trained.

    Raises:
        UserError: embeddings are to be whitened, but the image tower has no last linear layer.
    """
    if experiment.optimizer.whitening and not mapped_projection(clip.state_dict(), None):
        raise UserError(
            f"--optimizer.whitening: the image tower of {experiment.model.name} has no last linear layer that could "
            "whiten embeddings: take --optimizer.whitening 0"
        )
    loss, bias = experiment.loss, clip.logit_bias
    takes_scale = loss.infonce > 0 or (loss.sigmoid > 0 and bias is not None)
    stage = "joint" if _trains_text(experiment) else "image"
    freeze(clip, stage, experiment.model, loss.learn_scale and takes_scale)
    if bias is not None and not loss.sigmoid:
        bias.requires_grad_(False)  # workers would wait for its gradient, which no other term gives


def _trains_text(experiment: Experiment) -> bool:
    return experiment.stage == "joint" and experiment.loss.takes_text


@contextmanager
def _explain_compile_errors() -> Iterator[None]:
    """Turn the compiler's errors into a UserError that says what to do."""
    from torch._dynamo.exc import TorchDynamoException

    try:
        yield
    except TorchDynamoException as error:
        reason = " ".join(str(error).split())[:160]
        raise UserError(
            f"--model.compile: torch.compile can't compile the towers here ({reason}): leave it out, or install what "
            "is missing (a C++ compiler on CPUs, Triton on GPUs)"
        ) from error


def _to_float32(features: Tensor) -> Tensor:
    return features.to(torch.promote_types(features.dtype, torch.float32))


def _cosines(feature_BD: Tensor, text_CD: Tensor | None, labels: Labels) -> dict[str, float]:
    """Return the mean cosine of images of different items, and of an image and its caption."""
    embedding_BD = F.normalize(feature_BD)
    others_BB = labels.item[:, None] != labels.item
    cosines = {"image_cosine": (embedding_BD @ embedding_BD.T)[others_BB].mean().item()}
    if text_CD is not None and len(labels.captioned):
        pairs = feature_BD[labels.captioned], text_CD[labels.caption]
        cosines["image_text_cosine"] = F.cosine_similarity(*pairs).mean().item()
    return cosines
