"""The memory of earlier steps' images, with which losses compare a batch."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from clipfh.learn.losses import Memory


class CrossBatchMemory(nn.Module):
    """A ring of the last `size` images' embeddings (Wang et al., Cross-Batch Memory, 2020), without gradient.

    Every worker adds the same global batches, so the rings of all workers are alike. State dicts hold the whole ring.
    """

    embedding: Tensor
    item: Tensor

    def __init__(self, size: int, dim: int) -> None:
        super().__init__()
        self.size, self.num_added = size, 0
        self.register_buffer("embedding", torch.zeros(size, dim))
        self.register_buffer("item", torch.zeros(size, dtype=torch.long))

    @property
    def rows(self) -> Memory:
        """The images in the ring."""
        num_rows = min(self.num_added, self.size)  # on the host, which therefore waits for no GPU
        return Memory(self.embedding[:num_rows], self.item[:num_rows])

    @torch.no_grad()
    def add(self, embedding_BD: Tensor, item_B: Tensor) -> None:
        """Put a batch of images in the place of the oldest images."""
        self.num_added += len(item_B)
        embedding_BD, item_B = embedding_BD[-self.size :], item_B[-self.size :]
        start = (self.num_added - len(item_B)) % self.size
        to_end = min(len(item_B), self.size - start)
        for ring, rows in ((self.embedding, embedding_BD), (self.item, item_B)):
            ring[start : start + to_end] = rows[:to_end]
            ring[: len(rows) - to_end] = rows[to_end:]

    def get_extra_state(self) -> Tensor:
        return torch.tensor(self.num_added)

    def set_extra_state(self, state: Tensor) -> None:
        self.num_added = int(state)
