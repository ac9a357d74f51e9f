"""Training losses that contrast images and captions, and functions that all losses share: tensors in, scalar out.

`learn.pairs` has the losses that compare images in pairs, and `learn.proxies` the losses that compare images with one
vector for each item.

Every loss sees the global batch, the rows of all workers in rank order (see `learn.all_gather`), so its value does not
depend on the number of workers. Embeddings have unit norm unless the docstring says otherwise. Arithmetic is in float32
or float64, whatever the inputs' type, and also under autocast.

Letters in names: A anchors, B images, C distinct captions, M images of the memory, N images or captions to compare
with, P items of the batch, I items of the catalogue, D dimensions.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

CLIP_RADIUS = 2.3
"""Length at which embeddings enter the hyperbolic space (Ermolov et al., 2022): longer ones are clipped to it"""


class Memory(NamedTuple):
    """Embeddings and items of images of earlier steps."""

    embedding_MD: Tensor
    item_M: Tensor


class Bounds(NamedTuple):
    """Values of a loss at its two ends, on the labels of one batch."""

    floor: float
    """value with perfect embeddings"""
    collapse: float
    """value with equal embeddings"""


def multi_positive(logits_AN: Tensor, positive_AN: Tensor, candidate_AN: Tensor | None = None) -> Tensor:
    """Return the mean over anchors of the mean over their positives of -log softmax over their candidates.

    This is L_out of Khosla et al., Supervised Contrastive Learning (2020), equation 2, for any masks.

    Args:
        logits_AN: scaled similarities of A anchors and N others.
        positive_AN: bool, each anchor's positives. A positive that is not a candidate does not count.
        candidate_AN: bool, each anchor's candidates, over which the softmax runs. The default is all N.

    Returns:
        Scalar. Anchors without a positive are left out. Where no anchor remains, 0 with zero gradients.
    """
    logits_AN = precise(logits_AN)
    if candidate_AN is not None:
        positive_AN = positive_AN & candidate_AN
        # A row without candidates becomes NaN here. The NaN reaches neither the value nor the gradient, because such a
        # row has no positives, and filled entries pass no gradient on.
        logits_AN = logits_AN.masked_fill(~candidate_AN, -torch.inf)
    num_positive_A = positive_AN.sum(1)
    log_softmax_AN = logits_AN.log_softmax(1)
    loss_A = -torch.where(positive_AN, log_softmax_AN, 0).sum(1) / num_positive_A.clamp(min=1)
    return mean_where(loss_A, num_positive_A > 0)


def supcon(
    image_BD: Tensor, item_B: Tensor, temperature: float, memory: Memory | None = None, curvature: float = 0.0
) -> Tensor:
    """Supervised contrastive loss of images (Khosla et al., 2020). An image's positives are its item's other images.

    Args:
        image_BD: embeddings.
        item_B: items of the images.
        temperature: divides what is compared.
        memory: further positives and negatives, which are no anchors.
        curvature: compare minus the `hyperbolic_distance`; 0: cosines.
    """
    candidate_ND, positive_BN, negative_BN = candidates(image_BD, item_B, memory)
    logits_BN = _closeness(similarity(image_BD, candidate_ND), curvature) / temperature
    return multi_positive(logits_BN, positive_BN, positive_BN | negative_BN)


def supcon_with_captions(
    image_BD: Tensor,
    item_B: Tensor,
    caption_CD: Tensor,
    caption_B: Tensor,
    temperature: float,
    curvature: float = 0.0,
) -> Tensor:
    """Supervised contrastive loss among images and captions together.

    The positives of an image are its item's other images and its item's captions. The positives of a caption are the
    images of every item that carries the caption. All other pairs are negatives, except two captions of one item, which
    are neither.

    Args:
        image_BD: embeddings.
        item_B: items of the images.
        caption_CD: embeddings of distinct captions: a caption of several images is one row.
        caption_B: each image's caption, as a row of `caption_CD`.
        temperature: divides what is compared.
        curvature: compare minus the `hyperbolic_distance`; 0: cosines.
    """
    carried_BC = _carried(item_B, caption_B, len(caption_CD))
    sibling_CC = (carried_BC.T.float() @ carried_BC.float() > 0) | _diagonal(caption_CD)
    node_ND = torch.cat([image_BD, caption_CD])
    related_NN = torch.cat(
        [torch.cat([_same(item_B, item_B), carried_BC], 1), torch.cat([carried_BC.T, sibling_CC], 1)],
    )
    ignored_NN = torch.block_diag(_diagonal(image_BD), sibling_CC)
    logits_NN = _closeness(similarity(node_ND, node_ND), curvature) / temperature
    return multi_positive(logits_NN, related_NN & ~ignored_NN, ~ignored_NN)


def infonce(
    image_BD: Tensor, item_B: Tensor, caption_CD: Tensor, caption_B: Tensor, logit_scale: Tensor | float
) -> Tensor:
    """Mean of image-to-caption and caption-to-image contrastive loss (Radford et al., CLIP, 2021). An image's positives
    are its item's captions; a caption's positives are the images of every item that carries the caption.

    Args:
        image_BD: embeddings.
        item_B: items of the images.
        caption_CD: embeddings of distinct captions: a caption of several images is one row.
        caption_B: each image's caption, as a row of `caption_CD`.
        logit_scale: factor on the similarities, 1 / temperature (not its logarithm).
    """
    logits_BC = logit_scale * similarity(image_BD, caption_CD)
    positive_BC = _carried(item_B, caption_B, len(caption_CD))
    return (multi_positive(logits_BC, positive_BC) + multi_positive(logits_BC.T, positive_BC.T)) / 2


def sigmoid(
    image_BD: Tensor,
    item_B: Tensor,
    caption_CD: Tensor,
    caption_B: Tensor,
    logit_scale: Tensor | float,
    logit_bias: Tensor | float,
) -> Tensor:
    """Binary cross entropy of pairs of an image and a caption (Zhai et al., SigLIP, 2023, algorithm 1), with positives
    as in `infonce`: the sum over all pairs, divided by the number of images.

    Args:
        image_BD: embeddings.
        item_B: items of the images.
        caption_CD: embeddings of distinct captions: a caption of several images is one row.
        caption_B: each image's caption, as a row of `caption_CD`.
        logit_scale: factor on the similarities, 1 / temperature (not its logarithm).
        logit_bias: summand of the logits, below 0, because most pairs are negatives.
    """
    logits_BC = logit_scale * similarity(image_BD, caption_CD) + logit_bias
    positive_BC = _carried(item_B, caption_B, len(caption_CD))
    return -F.logsigmoid(torch.where(positive_BC, logits_BC, -logits_BC)).sum() / len(image_BD)


def bounds(loss: Callable[..., Tensor], item_B: Tensor, caption_B: Tensor | None = None) -> Bounds:
    """Return the loss's values on this batch's labels, with perfect and with equal embeddings.

    Perfect: items are at right angles to each other, all views of an item are alike, and a caption has the direction
    of its item, or the mean direction of the items that share the caption. Equal: all images and captions are alike.

    Args:
        loss: function of the images' embeddings (B, D) and, where `caption_B` is given, the captions' (C, D).
        item_B: items of the images.
        caption_B: caption of each image, 0 to C - 1.
    """
    item_P, item_B = item_B.unique(return_inverse=True)
    perfect = [F.one_hot(item_B, len(item_P)).float()]
    if caption_B is not None:
        carries_CD = F.one_hot(caption_B).float().T @ perfect[0] > 0
        perfect.append(F.normalize(carries_CD.float()))
    equal = [torch.full_like(embedding, len(item_P) ** -0.5) for embedding in perfect]
    with torch.no_grad():
        return Bounds(floor=loss(*perfect).item(), collapse=loss(*equal).item())


@torch.no_grad()
def sigmoid_bounds(item_B: Tensor, caption_B: Tensor, logit_scale: Tensor, logit_bias: Tensor) -> Bounds:
    """Return floor and collapse value of `sigmoid`, which, unlike a softmax, depends on where equal embeddings lie.

    Where all images are alike and all captions are alike, every pair has the same logit. The collapse value is the loss
    at the best logit for the share of positives, among the logits that a cosine can give.

    Args:
        item_B: items of the images.
        caption_B: caption of each image, 0 to C - 1.
        logit_scale, logit_bias: as for `sigmoid`.
    """
    floor = bounds(
        lambda image_BD, caption_CD: sigmoid(image_BD, item_B, caption_CD, caption_B, logit_scale, logit_bias),
        item_B,
        caption_B,
    ).floor
    num_captions = int(caption_B.max()) + 1
    share = _carried(item_B, caption_B, num_captions).float().mean()
    logit = share.logit().clamp(logit_bias - logit_scale, logit_bias + logit_scale)
    surprise = share * F.softplus(-logit) + (1 - share) * F.softplus(logit)
    return Bounds(floor, num_captions * surprise.item())


def candidates(embedding_BD: Tensor, item_B: Tensor, memory: Memory | None) -> tuple[Tensor, Tensor, Tensor]:
    """Return what B anchors are compared with: the N images of the batch and, after them, of the memory.

    Returns:
        (N, D) embeddings, (B, N) bool positives, (B, N) bool negatives. An anchor is no positive or negative of itself.
    """
    candidate_ND, item_N = embedding_BD, item_B
    if memory is not None:
        candidate_ND, item_N = torch.cat([embedding_BD, memory.embedding_MD]), torch.cat([item_B, memory.item_M])
    same_BN = _same(item_B, item_N)
    itself_BN = torch.eye(*same_BN.shape, dtype=torch.bool, device=item_B.device)
    return candidate_ND, same_BN & ~itself_BN, ~same_BN


def log1p_sum_exp(logits: Tensor, mask: Tensor, dim: int) -> Tensor:
    """Return log(1 + sum of exp(logits)) over the logits in `mask` along `dim`; without any, 0 with zero gradients."""
    zero = logits.select(dim, 0).unsqueeze(dim) * 0
    return torch.cat([logits.masked_fill(~mask, -torch.inf), zero], dim).logsumexp(dim)


def precise(tensor: Tensor) -> Tensor:
    """Return the tensor in float32; a float64 tensor stays in float64."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def similarity(a_ND: Tensor, b_MD: Tensor) -> Tensor:
    """Return the (N, M) cosines of N and M embeddings."""
    with torch.autocast(a_ND.device.type, enabled=False):
        return precise(a_ND) @ precise(b_MD).T


def hyperbolic_distance(cosine: Tensor, curvature: float) -> Tensor:
    """Return distances in a Poincare ball (Ermolov et al., Hyperbolic Vision Transformers, 2022) from cosines.

    The paper clips embeddings at `CLIP_RADIUS` r and maps them to a ball of curvature -c by the exponential map. CLIP's
    are all longer, so they end on one sphere around the centre, 2 r from it, and the law of cosines gives d:

        cosh(sqrt(c) d) = 1 + sinh(2 sqrt(c) r)^2 (1 - cosine)

    The distance falls as the cosine rises. Its slope has no bound where both embeddings are alike, so cosines above
    1 - 1e-5 count as that, and pass no gradient on.
    """
    root = math.sqrt(curvature)
    rise = math.sinh(2 * root * CLIP_RADIUS) ** 2 * (1 - cosine).clamp(min=1e-5)
    return 2 / root * torch.asinh((rise / 2).sqrt())


def _closeness(cosine: Tensor, curvature: float) -> Tensor:
    return -hyperbolic_distance(cosine, curvature) if curvature else cosine


def mean_where(loss_A: Tensor, valid_A: Tensor) -> Tensor:
    """Return the mean of the valid losses; 0 without any."""
    return torch.where(valid_A, loss_A, 0).sum() / valid_A.sum().clamp(min=1)


def _same(item_A: Tensor, item_B: Tensor) -> Tensor:
    return item_A[:, None] == item_B


def _diagonal(rows_ND: Tensor) -> Tensor:
    return torch.eye(len(rows_ND), dtype=torch.bool, device=rows_ND.device)


def _carried(item_B: Tensor, caption_B: Tensor, num_captions: int) -> Tensor:
    """Return (B, C) bool: whether any image of an image's item has a caption."""
    # Not by `one_hot`, which reads the codes to check them
    has_BC = (caption_B[:, None] == torch.arange(num_captions, device=caption_B.device)).float()
    return _same(item_B, item_B).float() @ has_BC > 0
