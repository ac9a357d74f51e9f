"""Gather the workers' slices into the global batch, with gradient."""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from clipfh.data.sampler import worker_slice


def all_gather_with_gradient(rows: Tensor, total: int) -> Tensor:
    """Concatenate the workers' rows by rank: (B, ...) on each of W workers to (N, ...) on all of them.

    Integers are gathered too, without gradient. Without a process group, or with one worker, `rows` is returned as is.

    The backward pass multiplies the gradient of a worker's own rows by W. Every worker computes the same loss on the
    global batch, so the gradient through its own rows is its full share, with nothing to add from other workers. Then
    DistributedDataParallel takes the mean of the workers' shares, which should be summed; the factor W makes up for
    that. So W workers get the gradient that one worker gets with the whole batch. Parameters after the gather (heads,
    logit scale) have the full gradient on every worker, and its mean is right: scaling the loss itself would be wrong.

    Args:
        rows: the worker's rows, its `worker_slice` of N. Workers agree in type, and in all sizes but their number.
        total: N.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return rows
    return _Gather.apply(rows, total)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, total: int) -> Tensor:
        world_size = dist.get_world_size()
        parts = [worker_slice(total, rank, world_size) for rank in range(world_size)]
        ctx.own = parts[dist.get_rank()]
        share = max(part.stop - part.start for part in parts)
        output = rows.new_empty(world_size * share, *rows.shape[1:])
        # A collective takes equally many rows from each worker: a worker with one row less adds a row of zeros
        own_share = F.pad(rows, (0, 0) * (rows.dim() - 1) + (0, share - len(rows)))
        dist.all_gather_into_tensor(output, own_share.contiguous())
        if len(output) == total:
            return output
        shares = zip(output.split(share), parts, strict=True)
        return torch.cat([rows[: part.stop - part.start] for rows, part in shares])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (gradient,) = gradients
        return dist.get_world_size() * gradient[ctx.own], None
