"""The global batch from each worker's slice, with gradient."""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from clipfh.data.sampler import worker_slice


def all_gather_with_gradient(rows: Tensor, total: int | None = None) -> Tensor:
    """Concatenate the workers' rows by rank: (B, ...) on each of W workers to (N, ...) on all of them.

    Integers pass too, without gradient. Without a process group, or with one worker, the rows come back as they are.

    The gradient that goes back is W times that of the worker's own rows. Every worker computes the same loss on the
    global batch, so through its own rows it finds its full share of the gradient, with nothing to add from the others;
    then DistributedDataParallel takes the mean over workers of shares that should be summed. W makes up for that: W
    workers get the gradient that one worker gets with the whole batch. What lies after the gather (heads, logit scale)
    has the same, right gradient on every worker, which a mean leaves as it is; so scaling the loss itself would not do.

    Args:
        rows: of one shape and type on all workers, but for their number where `total` is given.
        total: N, where each worker gives its `worker_slice` of N rows; W * B where it is left out.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return rows
    return _Gather.apply(rows, dist.get_world_size() * len(rows) if total is None else total)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, total: int) -> Tensor:
        world_size = dist.get_world_size()
        parts = [worker_slice(total, rank, world_size) for rank in range(world_size)]
        ctx.own = parts[dist.get_rank()]
        share = max(part.stop - part.start for part in parts)
        gathered = rows.new_empty(world_size * share, *rows.shape[1:])
        # As many rows from each, which is what a collective takes: a row of zeros from who has one less
        padded = F.pad(rows, (0, 0) * (rows.dim() - 1) + (0, share - len(rows)))
        dist.all_gather_into_tensor(gathered, padded.contiguous())
        if len(gathered) == total:
            return gathered
        own = zip(gathered.split(share), parts, strict=True)
        return torch.cat([rows[: part.stop - part.start] for rows, part in own])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (gradient,) = gradients
        return dist.get_world_size() * gradient[ctx.own], None
