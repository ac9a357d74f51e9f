"""Items that look alike so far, for batches that bring such items together."""

from __future__ import annotations

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

NUM_NEAREST = 16
"""Number of near items that the table has for each item."""
NUM_SIMILARITIES = 2**26
"""Number of similarities that are in memory at a time."""


class ItemNeighbours(nn.Module):
    """Table of the nearest items of each item, by the embeddings that training makes anyway.

    An item's embedding is the mean over the views of its last draw, so the table costs no pass over the images. Every
    worker takes the table of rank 0, so all workers draw the same batches. State dicts hold embeddings and table.

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
        """Store the item embeddings of a P x K batch, in which the K views of an item stand side by side."""
        mean_PD = embedding_BD.unflatten(0, (-1, views)).mean(1)
        self.embedding[item_B[::views]] = nn.functional.normalize(mean_PD).to(self.embedding.dtype)

    @torch.no_grad()
    def refresh(self) -> None:
        """Compute the table of nearest items anew. Items before their first draw are near to no item: -1."""
        valid = self.embedding.any(1)
        for rows in torch.arange(len(valid), device=valid.device).split(max(1, NUM_SIMILARITIES // len(valid))):
            similarity = self.embedding[rows] @ self.embedding.T
            similarity[:, ~valid] = -torch.inf
            similarity[torch.arange(len(rows)), rows] = -torch.inf
            value, item = similarity.topk(self.nearest.shape[1])
            self.nearest[rows] = item.where((value > -torch.inf) & valid[rows, None], -1)
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.broadcast(self.nearest, 0)

    def table(self) -> np.ndarray:
        """Return (I, k) int32: the items near to each item, nearest first; -1 where there are fewer than k."""
        return self.nearest.to("cpu", torch.int32).numpy()
