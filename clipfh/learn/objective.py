"""The loss of an experiment on the global batch: the weighted sum of the active terms."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipfh.config.experiment import LossSettings
from clipfh.learn.losses import Bounds
from clipfh.learn.memory import CrossBatchMemory
from clipfh.learn.terms import CenterTerm, Context, Labels, ProxyTerm, make_terms


class Objective(nn.Module):
    """Weighted sum of loss terms, with the terms' heads, which no exported model has.

    A term of weight 0 has no head and is not computed. All workers see the global batch and get the same value.

    Args:
        loss: weights and options of the terms.
        dim: D of the features.
        num_items: I train items.
        views: K of the batches.
        memory: number of images of earlier steps that pair terms also compare a batch with.
        model_has_bias: whether the model has a logit bias. If so, the sigmoid term takes the model's scale and bias.
            Else the term has its own, which start as SigLIP's: with CLIP's scale of 100, a bias of -10 would take every
            pair for a positive.
    """

    def __init__(
        self,
        loss: LossSettings,
        dim: int,
        num_items: int,
        views: int,
        memory: int = 0,
        model_has_bias: bool = False,
    ) -> None:
        super().__init__()
        self.terms = make_terms(loss, dim, num_items, views, model_has_bias)
        self.heads = nn.ModuleDict(self.terms)
        self.weights = {term: getattr(loss, term) for term in self.terms}
        self.memory = CrossBatchMemory(memory, dim) if memory else None

    def forward(
        self, feature_BD: Tensor, text_CD: Tensor | None, log_scale: Tensor, labels: Labels, bias: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the total, a scalar, and the value of each active term before its weight.

        Args:
            feature_BD: image features, before normalisation.
            text_CD: features of the batch's distinct captions; None where no active term takes captions.
            log_scale: log of the model's logit scale.
            labels: labels of the batch.
            bias: the model's logit bias; None for a model without one.
        """
        context = self._context(labels, log_scale, bias)
        # A zero with a gradient for every input, because DistributedDataParallel waits for each weight's gradient
        sums = [part.sum() for part in (feature_BD, text_CD, log_scale, bias) if part is not None]
        zero = torch.stack(sums).sum() * 0
        values = {
            name: term(feature_BD, text_CD, context) if len(term.places(labels)) else zero
            for name, term in self.terms.items()
        }
        return torch.stack([self.weights[name] * value for name, value in values.items()]).sum(), values

    def follow(self, feature_BD: Tensor, labels: Labels, center_lr: float) -> None:
        """After a step, move the centers towards the features, and add images with a second view to the memory."""
        feature_BD = feature_BD.detach()
        if isinstance(term := self.terms.get("center"), CenterTerm):
            term.move(feature_BD, labels, center_lr)
        if self.memory is not None:
            self.memory.add(F.normalize(feature_BD)[labels.paired], labels.item[labels.paired])

    def start_at(self, mean_ID: Tensor) -> None:
        """Start arcface's classifier at the items' mean embeddings, (I, D)."""
        if isinstance(term := self.terms.get("arcface"), ProxyTerm):
            term.start_at(mean_ID)

    def bounds(self, labels: Labels, log_scale: Tensor, bias: Tensor | None = None) -> dict[str, Bounds]:
        """Return the bounds of each active term that has bounds, on these labels and with the current memory."""
        context = self._context(labels, log_scale, bias)
        terms = {name: term for name, term in self.terms.items() if len(term.places(labels))}
        return {name: ends for name, term in terms.items() if (ends := term.bounds(context))}

    def _context(self, labels: Labels, log_scale: Tensor, bias: Tensor | None) -> Context:
        return Context(labels, log_scale, bias, self.memory.rows if self.memory is not None else None)
