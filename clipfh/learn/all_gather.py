"""The global batch from each worker's slice, with gradient."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def all_gather_with_gradient(rows: Tensor) -> Tensor:
    """Concatenate the workers' rows by rank: (B, ...) on each of W workers to (W * B, ...) on all of them.

    All workers give the same shape and type; integers pass too, without gradient. Without a process group, or with
    one worker, the rows come back as they are.

    The gradient that goes back is W times that of the worker's own rows. Every worker computes the same loss on the
    global batch, so through its own rows it finds its full share of the gradient, with nothing to add from the others;
    then DistributedDataParallel takes the mean over workers of shares that should be summed. W makes up for that: W
    workers get the gradient that one worker gets with the whole batch. What lies after the gather (heads, logit scale)
    has the same, right gradient on every worker, which a mean leaves as it is; so scaling the loss itself would not do.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return rows
    return _Gather.apply(rows)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        gathered = rows.new_empty(dist.get_world_size() * len(rows), *rows.shape[1:])
        dist.all_gather_into_tensor(gathered, rows.contiguous())
        return gathered

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (gradient,) = gradients
        own_rows = gradient.chunk(dist.get_world_size())[dist.get_rank()]
        return dist.get_world_size() * own_rows
