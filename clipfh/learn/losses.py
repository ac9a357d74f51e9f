"""The training losses: tensors in, scalar out.

Every function sees the global batch, the rows of all workers in rank order (see `learn.all_gather`), so its value does
not depend on the number of workers. Embeddings are of unit norm unless said. Arithmetic is in float32 or better,
whatever the inputs' type and also under autocast.

Letters in names: B images, C distinct captions, P items of the batch, I items of the catalogue, D dimensions.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Bounds(NamedTuple):
    """What a loss gives at its two ends, on the labels of one batch."""

    floor: float
    """with perfect embeddings"""
    collapse: float
    """with equal embeddings"""


def multi_positive(logits_AN: Tensor, positive_AN: Tensor, candidate_AN: Tensor | None = None) -> Tensor:
    """Mean over anchors of the mean over their positives of -log softmax over their candidates.

    This is L_out of Khosla et al., Supervised Contrastive Learning (2020), equation 2, for any masks.

    Args:
        logits_AN: similarities, already scaled, of A anchors and N others.
        positive_AN: bool; positives that are no candidates do not count.
        candidate_AN: bool, what the softmax runs over; all N by default.

    Returns:
        Scalar. Anchors without a positive are left out; 0, with zero gradients, where that leaves none.
    """
    logits_AN = _precise(logits_AN)
    if candidate_AN is not None:
        positive_AN = positive_AN & candidate_AN
        # A row without candidates becomes NaN here, but that reaches neither the value nor the gradient: it has no
        # positives, and what is filled passes no gradient on.
        logits_AN = logits_AN.masked_fill(~candidate_AN, -torch.inf)
    num_positive_A = positive_AN.sum(1)
    log_softmax_AN = logits_AN.log_softmax(1)
    loss_A = -torch.where(positive_AN, log_softmax_AN, 0).sum(1) / num_positive_A.clamp(min=1)
    return _mean(loss_A, num_positive_A > 0)


def supcon(
    image_BD: Tensor,
    item_B: Tensor,
    temperature: float,
    caption_CD: Tensor | None = None,
    caption_B: Tensor | None = None,
) -> Tensor:
    """Supervised contrastive loss within the images or, with captions, within images and captions together.

    The positives of an image are its item's other images and the captions that its item carries; those of a caption are
    the images of every item that carries it. All else is a negative, except an item's captions among themselves, which
    are neither.

    Args:
        image_BD: embeddings.
        item_B: items of the images.
        temperature: divides the similarities.
        caption_CD: embeddings of distinct captions: a caption that several images carry is given once.
        caption_B: row in `caption_CD` of each image's caption.
    """
    node_ND, related_NN, ignored_NN = image_BD, _same(item_B), _diagonal(image_BD)
    if caption_CD is not None:
        assert caption_B is not None, "captions without their images"
        carried_BC = _carried(item_B, caption_B, len(caption_CD))
        sibling_CC = (carried_BC.T.float() @ carried_BC.float() > 0) | _diagonal(caption_CD)
        node_ND = torch.cat([image_BD, caption_CD])
        related_NN = torch.cat(
            [torch.cat([related_NN, carried_BC], 1), torch.cat([carried_BC.T, sibling_CC], 1)],
        )
        ignored_NN = torch.block_diag(ignored_NN, sibling_CC)
    logits_NN = _similarity(node_ND, node_ND) / temperature
    return multi_positive(logits_NN, related_NN & ~ignored_NN, ~ignored_NN)


def infonce(
    image_BD: Tensor, item_B: Tensor, caption_CD: Tensor, caption_B: Tensor, logit_scale: Tensor | float
) -> Tensor:
    """Image-to-caption and caption-to-image contrastive loss, averaged (Radford et al., CLIP, 2021), with positives by
    item: those of a caption are the images of every item that carries it, those of an image its item's captions.

    Args:
        image_BD: embeddings.
        item_B: items of the images.
        caption_CD: embeddings of distinct captions: a caption that several images carry is given once.
        caption_B: row in `caption_CD` of each image's caption.
        logit_scale: multiplies the similarities; 1 / temperature, not its logarithm.
    """
    logits_BC = logit_scale * _similarity(image_BD, caption_CD)
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
    """Each pair of an image and a caption is told to belong together or not (Zhai et al., SigLIP, 2023, algorithm 1),
    with positives by item as in `infonce`. The sum over all pairs, divided by the number of images.

    Args:
        image_BD: embeddings.
        item_B: items of the images.
        caption_CD: embeddings of distinct captions: a caption that several images carry is given once.
        caption_B: row in `caption_CD` of each image's caption.
        logit_scale: multiplies the similarities; 1 / temperature, not its logarithm.
        logit_bias: is added to the logits. Below 0, because most pairs don't belong together.
    """
    logits_BC = logit_scale * _similarity(image_BD, caption_CD) + logit_bias
    positive_BC = _carried(item_B, caption_B, len(caption_CD))
    return -F.logsigmoid(torch.where(positive_BC, logits_BC, -logits_BC)).sum() / len(image_BD)


def triplet(embedding_BD: Tensor, item_B: Tensor, margin: float | None) -> Tensor:
    """Batch-hard triplet loss (Hermans et al., In Defense of the Triplet Loss, 2017) on Euclidean distance.

    Each anchor meets its farthest positive and its nearest negative. The mean is over anchors that have both, those
    with loss 0 included; 0, with zero gradients, where there are none.

    Args:
        embedding_BD: embeddings; distances are between 0 and 2.
        item_B: items of the embeddings.
        margin: of the hinge, in units of distance; None for the soft margin, log(1 + exp(positive - negative)).
    """
    embedding_BD = _precise(embedding_BD)
    same_BB = _same(item_B)
    num_same_B = same_BB.sum(1)
    with torch.no_grad():
        similarity_BB = _similarity(embedding_BD, embedding_BD)
        # The anchor itself stays in: being nearest to itself, it is the farthest positive only among duplicates.
        farthest_B = similarity_BB.masked_fill(~same_BB, torch.inf).argmin(1)
        nearest_B = similarity_BB.masked_fill(same_BB, -torch.inf).argmax(1)
    # Distances come from differences, not from similarities: exact for close pairs, and between duplicates the
    # gradient is 0 where that of sqrt(2 - 2 similarity) is infinite.
    positive_distance_B = torch.linalg.vector_norm(embedding_BD - embedding_BD[farthest_B], dim=1)
    negative_distance_B = torch.linalg.vector_norm(embedding_BD - embedding_BD[nearest_B], dim=1)
    violation_B = positive_distance_B - negative_distance_B
    loss_B = F.softplus(violation_B) if margin is None else F.relu(violation_B + margin)
    return _mean(loss_B, (num_same_B > 1) & (num_same_B < len(item_B)))


def center(feature_BD: Tensor, item_B: Tensor, centers_ID: Tensor) -> Tensor:
    """Mean over the batch of half the squared distance of a feature to its item's center (Wen et al., 2016).

    Takes features before normalisation. Floor and collapse are both 0, since the centers follow the features: alone,
    this loss cannot tell a collapse. The centers are a buffer that `move_centers` updates, not parameters.

    Args:
        feature_BD: features, of any norm.
        item_B: row in `centers_ID` of each feature's item.
        centers_ID: centers of all items of the catalogue.
    """
    difference_BD = _precise(feature_BD) - _precise(centers_ID[item_B])
    return difference_BD.square().sum(1).mean() / 2


@torch.no_grad()
def move_centers(centers_ID: Tensor, feature_BD: Tensor, item_B: Tensor, item_P: Tensor, lr: float) -> None:
    """Move the batch's centers towards their features, in place (Wen et al., 2016, equation 4, with lr 0.5).

    The step of a center is `lr` n / (1 + n) of the way to the mean of its n features. It depends neither on the
    weight of the loss nor on the batch size, as the gradient does, so centers need no optimiser of their own. Every
    worker makes the same step from the same global batch, to the bit: sums are products, not scattered additions,
    whose order a GPU leaves open.

    Args:
        centers_ID: centers of all items of the catalogue.
        feature_BD: features, of any norm.
        item_B: row in `centers_ID` of each feature's item.
        item_P: row in `centers_ID` of each item of the batch, once. Working them out on a GPU would make the host wait.
        lr: learning rate of the centers.
    """
    member_PB = (item_P[:, None] == item_B).to(centers_ID.dtype)
    num_views_P1 = member_PB.sum(1, keepdim=True)
    with torch.autocast(centers_ID.device.type, enabled=False):
        sum_PD = member_PB @ feature_BD.to(centers_ID.dtype)
    centers_ID[item_P] -= lr * (num_views_P1 * centers_ID[item_P] - sum_PD) / (1 + num_views_P1)


def cross_entropy(cosine_BI: Tensor, item_B: Tensor, scale: float, margin: float, smoothing: float) -> Tensor:
    """Cross entropy of a cosine classifier with an additive cosine margin and label smoothing.

    The logits are scale * cosine, and scale * (cosine - margin) for the item itself (Wang et al., CosFace, 2018). The
    margin is on the cosine rather than on the angle (ArcFace): its gradient is that of the plain softmax everywhere,
    where the angle's is unbounded as the cosine nears 1. Unicom's margin of 0.25 is an angle in radians, with its
    gradient replaced by this same one; from 60 to 100 degrees, where training starts, it takes 0.23 to 0.25 from the
    cosine.

    Args:
        cosine_BI: cosines of the images' features and the weights of all items.
        item_B: column of each image's item.
        scale: of the logits.
        margin: taken from the item's own cosine.
        smoothing: share of the target that is spread evenly over all items.
    """
    cosine_BI = _precise(cosine_BI)
    own_B1 = item_B[:, None]
    logits_BI = scale * cosine_BI.scatter_add(1, own_B1, cosine_BI.new_full(own_B1.shape, -margin))
    return F.cross_entropy(logits_BI, item_B, label_smoothing=smoothing)


def bounds(
    loss: Callable[..., Tensor], item_B: Tensor, caption_B: Tensor | None = None, num_items: int | None = None
) -> Bounds:
    """The loss itself on this batch's labels, with perfect and with equal embeddings.

    Perfect: items at right angles to each other, all views of an item alike, each caption at its item's direction, or
    at the mean direction of the items that share it. Equal: every image and caption the same.

    Args:
        loss: called with the images' embeddings (B, D) and, given `caption_B`, the captions' (C, D).
        item_B: items of the images.
        caption_B: caption of each image, 0 to C - 1.
        num_items: D, with item i at axis i, so that the embeddings are also the cosines that `cross_entropy` takes;
            by default D is the number of items in the batch.
    """
    if num_items is None:
        item_P, item_B = item_B.unique(return_inverse=True)
        num_items = len(item_P)
    perfect = [F.one_hot(item_B, num_items).float()]
    if caption_B is not None:
        carries_CD = F.one_hot(caption_B).float().T @ perfect[0] > 0
        perfect.append(F.normalize(carries_CD.float()))
    equal = [torch.full_like(embedding, num_items**-0.5) for embedding in perfect]
    with torch.no_grad():
        return Bounds(floor=loss(*perfect).item(), collapse=loss(*equal).item())


@torch.no_grad()
def sigmoid_bounds(item_B: Tensor, caption_B: Tensor, logit_scale: Tensor, logit_bias: Tensor) -> Bounds:
    """Floor and collapse of `sigmoid`, which, unlike a softmax, depends on where equal embeddings lie.

    Where all images are alike and all captions too, every pair has the same logit. The collapse value is that of the
    logit which suits the share of positives best, of those that a cosine can give.

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


def _precise(tensor: Tensor) -> Tensor:
    """The tensor in float32, or in float64 if it is."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _similarity(a_ND: Tensor, b_MD: Tensor) -> Tensor:
    with torch.autocast(a_ND.device.type, enabled=False):
        return _precise(a_ND) @ _precise(b_MD).T


def _mean(loss_A: Tensor, valid_A: Tensor) -> Tensor:
    return torch.where(valid_A, loss_A, 0).sum() / valid_A.sum().clamp(min=1)


def _same(item_B: Tensor) -> Tensor:
    return item_B[:, None] == item_B


def _diagonal(rows_ND: Tensor) -> Tensor:
    return torch.eye(len(rows_ND), dtype=torch.bool, device=rows_ND.device)


def _carried(item_B: Tensor, caption_B: Tensor, num_captions: int) -> Tensor:
    """Bool (B, C): whether any image of this image's item has that caption."""
    # Not by `one_hot`, which reads the codes to check them
    has_BC = (caption_B[:, None] == torch.arange(num_captions, device=caption_B.device)).float()
    return _same(item_B).float() @ has_BC > 0
