"""Which items look alike so far, for batches that bring them together."""

from __future__ import annotations

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

NUM_NEAREST = 16
"""Number of items that are known as near to each item."""
NUM_SIMILARITIES = 2**26
"""Number of similarities that are in memory at a time."""


class ItemNeighbours(nn.Module):
    """The nearest items of each item, by the embeddings that training makes anyway.

    An item's embedding is the mean of its views' at its last draw, so it costs no pass over the images. Every worker
    sees the global batch, and the table of rank 0 counts, so all workers draw the same batches. State dicts hold both.

    Args:
        num_items: I train items.
        dim: D of the features.
    """

    embedding: Tensor
    nearest: Tensor

    def __init__(self, num_items: int, dim: int) -> None:
        super().__init__()
        self.register_buffer("embedding", torch.zeros(num_items, dim))
        self.register_buffer("nearest", torch.full((num_items, min(NUM_NEAREST, num_items - 1)), -1))

    @torch.no_grad()
    def add(self, embedding_BD: Tensor, item_B: Tensor, views: int) -> None:
        """Note the items of a P x K batch, whose K views stand side by side."""
        mean_PD = embedding_BD.unflatten(0, (-1, views)).mean(1)
        self.embedding[item_B[::views]] = nn.functional.normalize(mean_PD).to(self.embedding.dtype)

    @torch.no_grad()
    def refresh(self) -> None:
        """Make the table of nearest items anew. Items that were not drawn yet are near to none: -1."""
        drawn = self.embedding.any(1)
        for rows in torch.arange(len(drawn), device=drawn.device).split(max(1, NUM_SIMILARITIES // len(drawn))):
            similarity = self.embedding[rows] @ self.embedding.T
            similarity[:, ~drawn] = -torch.inf
            similarity[torch.arange(len(rows)), rows] = -torch.inf
            value, item = similarity.topk(self.nearest.shape[1])
            self.nearest[rows] = item.where((value > -torch.inf) & drawn[rows, None], -1)
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.broadcast(self.nearest, 0)

    def table(self) -> np.ndarray:
        """(I, k) numbers of the items near to each item, the nearest first; -1 where there are fewer."""
        return self.nearest.to("cpu", torch.int32).numpy()
