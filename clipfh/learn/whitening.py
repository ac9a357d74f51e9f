"""Whitening of embeddings by the differences between views of one item."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SHRINKAGE = 2.0
"""Multiple of the mean variance that is added to each variance. A larger multiple whitens less."""


class WithinItemCovariance(nn.Module):
    """Covariance of the embeddings of views of one item, over the batches of the last steps. State dicts hold it.

    Training embeds these images anyway, and every worker sees the global batch, so the covariance costs no pass over
    the images and is the same on all workers. A linear map by its inverse root gives less weight to directions in which
    views of one item differ (within-class covariance normalisation: Hatch, Kajarekar and Stolcke, Interspeech 2006).

    Args:
        dim: D of the features.
    """

    scatter: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.register_buffer("scatter", torch.zeros(dim, dim, dtype=torch.float64))

    @torch.no_grad()
    def add(self, feature_BD: Tensor, views: int) -> None:
        """Add the views of a P x K batch, in which the K views of an item stand side by side."""
        view_PKD = F.normalize(feature_BD).double().unflatten(0, (-1, views))
        deviation_BD = (view_PKD - view_PKD.mean(1, keepdim=True)).flatten(0, 1)
        self.scatter += deviation_BD.T @ deviation_BD

    def whitening(self) -> Tensor:
        """Return the (D, D) inverse root of the covariance, which is shrunk towards a multiple of the identity."""
        variance, axes = torch.linalg.eigh(self.scatter.cpu())
        relative = variance.clamp_min(0) / variance.mean().clamp_min(torch.finfo(torch.float64).tiny)
        return (axes * (relative + SHRINKAGE) ** -0.5) @ axes.T
