"""The loss of an experiment on the global batch: its active terms, their weights, and the heads that they need."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipfh.config.experiment import LOSS_TERMS, LossSettings
from clipfh.learn import losses


@dataclass(frozen=True)
class Labels:
    """Labels of the B images of a global batch.

    Losses choose images by their places, which the host works out. A mask would make the host wait for the GPU, to find
    out how many images it chooses.
    """

    item: Tensor
    """(B,) int64 item code of each image"""
    items: Tensor
    """(P,) int64 item code of each item"""
    paired: Tensor
    """int64 places of the images whose item has two views or more. Copies of a single view are neither positives nor
    negatives."""
    captioned: Tensor
    """int64 places of the images whose item has a prompt"""
    caption: Tensor
    """(number captioned,) int64 place in `captions` of each captioned image's prompt"""
    captions: Tensor
    """(C,) int64 the batch's distinct captions, as rows of all captions"""


class Objective(nn.Module):
    """Weighted sum of loss terms, with the heads that belong to them and to no exported model.

    A term of weight 0 has no head and is not computed. The same on all workers, since each sees the global batch.

    Args:
        loss: weights and options.
        dim: D of the features.
        num_items: I train items.
        model_has_bias: whether the model has a logit bias. The sigmoid term then takes the model's scale and bias.
            Otherwise it has its own, from where SigLIP starts: with a scale such as CLIP's 100, a bias of -10 would
            take every pair for a positive.
    """

    centers: Tensor

    def __init__(self, loss: LossSettings, dim: int, num_items: int, model_has_bias: bool = False) -> None:
        super().__init__()
        self.loss, self.num_items = loss, num_items
        self.weights = {term: getattr(loss, term) for term in LOSS_TERMS if getattr(loss, term)}
        if loss.ce:
            self.neck = nn.BatchNorm1d(dim)
            self.neck.bias.requires_grad_(False)  # a shift would move every item alike
            self.classifier = nn.Parameter(torch.randn(num_items, dim) * 0.01)
        if loss.sigmoid and not model_has_bias:
            self.sigmoid_log_scale = nn.Parameter(torch.tensor(math.log(10)), requires_grad=loss.learn_scale)
            self.sigmoid_bias = nn.Parameter(torch.tensor(-10.0), requires_grad=loss.learn_scale)
        if loss.center:
            self.register_buffer("centers", torch.zeros(num_items, dim))

    def forward(
        self, feature_BD: Tensor, text_CD: Tensor | None, log_scale: Tensor, labels: Labels, bias: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The total, and each active term before its weight.

        Args:
            feature_BD: image features, before normalisation.
            text_CD: features of the batch's distinct captions; needed by terms that take text only.
            log_scale: log of the model's logit scale.
            labels: of the batch.
            bias: the model's logit bias; None for a model without one.
        """
        embedding_BD, item_B, paired = F.normalize(feature_BD), labels.item, labels.paired
        of_term: dict[str, Callable[[], Tensor]] = {
            "ce": lambda: self._ce(self._cosine(feature_BD), item_B),
            "triplet": lambda: self._triplet(embedding_BD[paired], item_B[paired]),
            "center": lambda: losses.center(feature_BD, item_B, self.centers),
            "supcon": lambda: self._supcon_of_batch(embedding_BD, text_CD, labels),
            "infonce": lambda: self._infonce(embedding_BD[labels.captioned], _unit(text_CD), labels, log_scale),
            "sigmoid": lambda: self._sigmoid(embedding_BD[labels.captioned], _unit(text_CD), labels, log_scale, bias),
        }
        # Of all that it could depend on: DistributedDataParallel waits for each weight's gradient
        sums = [part.sum() for part in (feature_BD, text_CD, log_scale, bias) if part is not None]
        nothing = torch.stack(sums).sum() * 0
        terms = {term: of_term[term]() if self._concerns(term, labels) else nothing for term in self.weights}
        return torch.stack([self.weights[term] * value for term, value in terms.items()]).sum(), terms

    def move_centers(self, feature_BD: Tensor, labels: Labels, lr: float) -> None:
        """Move the centers towards their features. Does nothing where the center term is off."""
        if self.loss.center:
            losses.move_centers(self.centers, feature_BD.detach(), labels.item, labels.items, lr)

    def bounds(self, labels: Labels, log_scale: Tensor, bias: Tensor | None = None) -> dict[str, losses.Bounds]:
        """Floor and collapse value of each active term on these labels; the center term has neither."""
        paired_item = labels.item[labels.paired]
        of_term: dict[str, Callable[[], losses.Bounds]] = {
            "ce": lambda: losses.bounds(partial(self._ce, item_B=labels.item), labels.item, num_items=self.num_items),
            "triplet": lambda: losses.bounds(partial(self._triplet, item_B=paired_item), paired_item),
            "supcon": lambda: self._supcon_bounds(labels),
            "infonce": lambda: losses.bounds(
                partial(self._infonce, labels=labels, log_scale=log_scale),
                labels.item[labels.captioned],
                labels.caption,
            ),
            "sigmoid": lambda: losses.sigmoid_bounds(
                labels.item[labels.captioned], labels.caption, *self._scale_and_bias(log_scale, bias)
            ),
        }
        return {term: of_term[term]() for term in self.weights if term in of_term and self._concerns(term, labels)}

    def _concerns(self, term: str, labels: Labels) -> bool:
        """Whether the batch has an image that the term takes."""
        supcon = labels.captioned if self.loss.supcon_captions else labels.paired
        taken = {"triplet": labels.paired, "supcon": supcon}
        taken |= {"infonce": labels.captioned, "sigmoid": labels.captioned}
        return term not in taken or len(taken[term]) > 0

    def _cosine(self, feature_BD: Tensor) -> Tensor:
        """(B, I) cosines of the features, after the batch-norm neck, with the weights of all train items."""
        return F.normalize(self.neck(feature_BD)) @ F.normalize(self.classifier).T

    def _ce(self, cosine_BI: Tensor, item_B: Tensor) -> Tensor:
        options = self.loss
        return losses.cross_entropy(cosine_BI, item_B, options.ce_scale, options.ce_margin, options.ce_smoothing)

    def _triplet(self, embedding_BD: Tensor, item_B: Tensor) -> Tensor:
        return losses.triplet(embedding_BD, item_B, None if self.loss.triplet_margin < 0 else self.loss.triplet_margin)

    def _supcon_of_batch(self, embedding_BD: Tensor, text_CD: Tensor | None, labels: Labels) -> Tensor:
        """Within the images that have a second view or, with captions, within captioned images and captions."""
        if self.loss.supcon_captions:
            captioned = labels.captioned
            return self._supcon(embedding_BD[captioned], _unit(text_CD), labels.item[captioned], labels.caption)
        return self._supcon(embedding_BD[labels.paired], None, labels.item[labels.paired], None)

    def _supcon(
        self, embedding_BD: Tensor, caption_CD: Tensor | None, item_B: Tensor, caption_B: Tensor | None
    ) -> Tensor:
        return losses.supcon(embedding_BD, item_B, self.loss.supcon_temperature, caption_CD, caption_B)

    def _supcon_bounds(self, labels: Labels) -> losses.Bounds:
        if self.loss.supcon_captions:
            item_B = labels.item[labels.captioned]
            return losses.bounds(partial(self._supcon, item_B=item_B, caption_B=labels.caption), item_B, labels.caption)
        item_B = labels.item[labels.paired]
        return losses.bounds(partial(self._supcon, caption_CD=None, item_B=item_B, caption_B=None), item_B)

    def _infonce(self, embedding_BD: Tensor, text_CD: Tensor, labels: Labels, log_scale: Tensor) -> Tensor:
        item_B = labels.item[labels.captioned]
        return losses.infonce(embedding_BD, item_B, text_CD, labels.caption, log_scale.exp())

    def _sigmoid(
        self, embedding_BD: Tensor, text_CD: Tensor, labels: Labels, log_scale: Tensor, bias: Tensor | None
    ) -> Tensor:
        item_B = labels.item[labels.captioned]
        scale_and_bias = self._scale_and_bias(log_scale, bias)
        return losses.sigmoid(embedding_BD, item_B, text_CD, labels.caption, *scale_and_bias)

    def _scale_and_bias(self, log_scale: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        """Scale and bias of the sigmoid term: the model's, or its own where the model has no bias."""
        if bias is None:
            return self.sigmoid_log_scale.exp(), self.sigmoid_bias
        return log_scale.exp(), bias


def _unit(text_CD: Tensor | None) -> Tensor:
    assert text_CD is not None, "infonce and sigmoid need the features of the batch's captions"
    return F.normalize(text_CD)
