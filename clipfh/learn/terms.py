"""The terms of a loss. A term chooses its images of a batch, has its head, and gives its floor and collapse value."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipfh.config.experiment import LOSS_TERMS, LossSettings
from clipfh.learn import losses, pairs, proxies
from clipfh.learn.losses import Bounds, Memory


@dataclass(frozen=True)
class Labels:
    """Labels of the B images of a global batch.

    Terms choose images by their places in the batch, which the host computes. With a mask, the host would wait for the
    GPU to learn how many images the mask chooses.
    """

    item: Tensor
    """(B,) int64 item code of each image"""
    items: Tensor
    """(P,) int64 codes of the batch's items, each once"""
    paired: Tensor
    """int64 places of the images whose item has two views or more. Copies of a single view are neither positives nor
    negatives."""
    captioned: Tensor
    """int64 places of the images whose item has a prompt"""
    caption: Tensor
    """(number captioned,) int64 place in `captions` of each captioned image's prompt"""
    captions: Tensor
    """(C,) int64 rows of the batch's distinct captions among all captions"""
    features: Tensor | None = None
    """int64 indices of the features that arcface's classifier sees in this step; None for all"""


@dataclass(frozen=True)
class Context:
    """Inputs of a term besides the features."""

    labels: Labels
    log_scale: Tensor
    """log of the model's logit scale"""
    bias: Tensor | None
    """the model's logit bias; None for a model without one"""
    memory: Memory | None
    """images of earlier steps; None where the run keeps none"""


class Term(nn.Module):
    """A term before its weight. Its parameters are heads, which no exported model has."""

    def places(self, labels: Labels) -> Tensor:
        """Return the places of the images that the term takes."""
        raise NotImplementedError

    def forward(self, feature_BD: Tensor, text_CD: Tensor | None, context: Context) -> Tensor:
        """Return the term's value, a scalar, from features before normalisation."""
        raise NotImplementedError

    def bounds(self, context: Context) -> Bounds | None:
        """Return floor and collapse value; None for a term that has neither."""
        raise NotImplementedError


class PairTerm(Term):
    """A loss among the images whose item has a second view and, if the loss takes the memory, the memory's images.

    Args:
        loss: function of embeddings, items and, with `takes_memory`, the memory by the name `memory`.
        takes_memory: whether the loss takes the memory.
    """

    def __init__(self, loss: Callable[..., Tensor], takes_memory: bool = True) -> None:
        super().__init__()
        self.loss, self.takes_memory = loss, takes_memory

    def places(self, labels: Labels) -> Tensor:
        return labels.paired

    def forward(self, feature_BD: Tensor, text_CD: Tensor | None, context: Context) -> Tensor:
        places = context.labels.paired
        loss, memory = self.loss, context.memory
        if memory is not None and self.takes_memory:
            loss = partial(loss, memory=memory)
        return loss(F.normalize(feature_BD)[places], context.labels.item[places])

    def bounds(self, context: Context) -> Bounds:
        item_B, memory = context.labels.item[context.labels.paired], context.memory
        if memory is None or not self.takes_memory:
            return losses.bounds(partial(self.loss, item_B=item_B), item_B)
        item_M = memory.item_M

        def loss(embedding_ND: Tensor) -> Tensor:
            embedding_BD, embedding_MD = embedding_ND.tensor_split([len(item_B)])
            return self.loss(embedding_BD, item_B, memory=Memory(embedding_MD, item_M))

        return losses.bounds(loss, torch.cat([item_B, item_M]))


class ProxyTerm(Term):
    """A loss of the cosines of all images and a classifier's weights.

    Args:
        loss: function of cosines and items.
        dim: D of the features.
        num_items: I train items.
        neck: whether features pass batch norm before the classifier.
        centers: number of weight vectors of an item, of which the nearest counts.
        drops: whether the classifier sees only the step's `Labels.features` (Unicom: An et al., 2023).
    """

    def __init__(
        self,
        loss: Callable[[Tensor, Tensor], Tensor],
        dim: int,
        num_items: int,
        neck: bool = False,
        centers: int = 1,
        drops: bool = False,
    ) -> None:
        super().__init__()
        self.drops = drops
        self.loss, self.num_items, self.centers = loss, num_items, centers
        self.neck = nn.BatchNorm1d(dim) if neck else nn.Identity()
        if isinstance(self.neck, nn.BatchNorm1d):
            self.neck.bias.requires_grad_(False)  # a shift would move every item alike
        self.classifier = nn.Parameter(torch.randn(num_items * centers, dim) * 0.01)

    def places(self, labels: Labels) -> Tensor:
        return labels.item

    def forward(self, feature_BD: Tensor, text_CD: Tensor | None, context: Context) -> Tensor:
        feature_BD = self.neck(feature_BD)
        columns = context.labels.features if self.drops and context.labels.features is not None else slice(None)
        cosine_BC = F.normalize(feature_BD[:, columns]) @ F.normalize(self.classifier[:, columns]).T
        return self.loss(cosine_BC.unflatten(1, (self.num_items, self.centers)).amax(2), context.labels.item)

    def bounds(self, context: Context) -> Bounds:
        return proxies.bounds(self.loss, context.labels.item, self.num_items)

    @torch.no_grad()
    def start_at(self, mean_ID: Tensor) -> None:
        """Add the items' directions, (I, D), to the random start, which keeps the centers of an item apart."""
        self.classifier.add_(mean_ID.to(self.classifier).repeat_interleave(self.centers, 0))


class CenterTerm(Term):
    """The distance of all images to their items' centers. `move` moves the centers."""

    centers: Tensor

    def __init__(self, dim: int, num_items: int) -> None:
        super().__init__()
        self.register_buffer("centers", torch.zeros(num_items, dim))

    def places(self, labels: Labels) -> Tensor:
        return labels.item

    def forward(self, feature_BD: Tensor, text_CD: Tensor | None, context: Context) -> Tensor:
        return proxies.center(feature_BD, context.labels.item, self.centers)

    def bounds(self, context: Context) -> None:
        return None

    def move(self, feature_BD: Tensor, labels: Labels, lr: float) -> None:
        """Move the centers of the batch's items towards the items' features."""
        proxies.move_centers(self.centers, feature_BD, labels.item, labels.items, lr)


class CaptionTerm(Term):
    """A loss between the images that have a prompt and the batch's distinct captions.

    Args:
        loss: function of the images' embeddings and items, the captions' embeddings, each image's caption and, with
            `takes_scale`, the model's logit scale by the name `logit_scale`.
        takes_scale: whether the loss takes the model's logit scale.
    """

    def __init__(self, loss: Callable[..., Tensor], takes_scale: bool = False) -> None:
        super().__init__()
        self.loss, self.takes_scale = loss, takes_scale

    def places(self, labels: Labels) -> Tensor:
        return labels.captioned

    def forward(self, feature_BD: Tensor, text_CD: Tensor | None, context: Context) -> Tensor:
        assert text_CD is not None, "this term needs the features of the batch's captions"
        return self._value(F.normalize(feature_BD)[context.labels.captioned], F.normalize(text_CD), context)

    def bounds(self, context: Context) -> Bounds:
        labels = context.labels
        return losses.bounds(partial(self._value, context=context), labels.item[labels.captioned], labels.caption)

    def _value(self, image_BD: Tensor, caption_CD: Tensor, context: Context) -> Tensor:
        item_B, caption_B = context.labels.item[context.labels.captioned], context.labels.caption
        scale = {"logit_scale": context.log_scale.exp()} if self.takes_scale else {}
        return self.loss(image_BD, item_B, caption_CD, caption_B, **scale)


class SigmoidTerm(Term):
    """SigLIP's loss, with the model's logit scale and bias, or with the term's own where the model has no bias."""

    def __init__(self, learn_scale: bool, model_has_bias: bool) -> None:
        super().__init__()
        if not model_has_bias:
            self.log_scale = nn.Parameter(torch.tensor(math.log(10)), requires_grad=learn_scale)
            self.bias = nn.Parameter(torch.tensor(-10.0), requires_grad=learn_scale)

    def places(self, labels: Labels) -> Tensor:
        return labels.captioned

    def forward(self, feature_BD: Tensor, text_CD: Tensor | None, context: Context) -> Tensor:
        assert text_CD is not None, "this term needs the features of the batch's captions"
        labels, image_BD = context.labels, F.normalize(feature_BD)[context.labels.captioned]
        item_B, scale_and_bias = labels.item[labels.captioned], self._scale_and_bias(context)
        return losses.sigmoid(image_BD, item_B, F.normalize(text_CD), labels.caption, *scale_and_bias)

    def bounds(self, context: Context) -> Bounds:
        labels = context.labels
        return losses.sigmoid_bounds(labels.item[labels.captioned], labels.caption, *self._scale_and_bias(context))

    def _scale_and_bias(self, context: Context) -> tuple[Tensor, Tensor]:
        if context.bias is None:
            return self.log_scale.exp(), self.bias
        return context.log_scale.exp(), context.bias


def make_terms(loss: LossSettings, dim: int, num_items: int, views: int, model_has_bias: bool) -> dict[str, Term]:
    """Return the terms whose weight is above 0, by name. The arguments are as for `objective.Objective`."""
    make: dict[str, Callable[[], Term]] = {
        "ce": lambda: ProxyTerm(
            partial(proxies.cross_entropy, **_options(loss, "ce", "scale", "margin", "smoothing")),
            *(dim, num_items),
            neck=True,
        ),
        "arcface": lambda: ProxyTerm(
            partial(proxies.arcface, **_options(loss, "arcface", "scale", "margin")),
            *(dim, num_items),
            centers=loss.arcface_centers,
            drops=True,
        ),
        "proxy_anchor": lambda: ProxyTerm(
            partial(proxies.proxy_anchor, **_options(loss, "proxy_anchor", "scale", "margin")), dim, num_items
        ),
        "triplet": lambda: PairTerm(
            partial(pairs.triplet, margin=None if loss.triplet_margin < 0 else loss.triplet_margin)
        ),
        "multi_similarity": lambda: PairTerm(
            partial(
                pairs.multi_similarity,
                **_options(loss, "multi_similarity", "positive_scale", "negative_scale", "base", "margin"),
            )
        ),
        "smooth_ap": lambda: PairTerm(
            partial(pairs.smooth_ap, views=views, **_options(loss, "smooth_ap", "temperature")), takes_memory=False
        ),
        "center": lambda: CenterTerm(dim, num_items),
        "supcon": lambda: (
            CaptionTerm(partial(losses.supcon_with_captions, **_options(loss, "supcon", "temperature", "curvature")))
            if loss.supcon_captions
            else PairTerm(partial(losses.supcon, **_options(loss, "supcon", "temperature", "curvature")))
        ),
        "infonce": lambda: CaptionTerm(losses.infonce, takes_scale=True),
        "sigmoid": lambda: SigmoidTerm(loss.learn_scale, model_has_bias),
    }
    return {term: make[term]() for term in LOSS_TERMS if getattr(loss, term)}


def _options(loss: LossSettings, term: str, *names: str) -> dict[str, Any]:
    return {name: getattr(loss, f"{term}_{name}") for name in names}
