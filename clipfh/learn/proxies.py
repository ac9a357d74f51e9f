"""Losses that compare images with one vector for each item: tensors in, scalar out, as in `learn.losses`."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from clipfh.learn.losses import Bounds, log1p_sum_exp, precise


def cross_entropy(cosine_BI: Tensor, item_B: Tensor, scale: float, margin: float, smoothing: float) -> Tensor:
    """Cross entropy of a cosine classifier with an additive cosine margin and label smoothing.

    The logits are scale * cosine, and scale * (cosine - margin) for the image's own item (Wang et al., CosFace, 2018).
    The margin is on the cosine, not on the angle as in ArcFace. So its gradient is that of the plain softmax, while the
    gradient of a margin on the angle grows without bound as the cosine nears 1. Unicom's margin of 0.25 is an angle in
    radians, but with the gradient of a margin on the cosine; from 60 to 100 degrees, where training starts, Unicom's
    margin takes 0.23 to 0.25 from the cosine.

    Args:
        cosine_BI: cosines of the images' features and the weights of all items.
        item_B: column of each image's item.
        scale: factor on the cosines.
        margin: number subtracted from the cosine of an image's own item.
        smoothing: share of the target that is spread evenly over all items.
    """
    cosine_BI = precise(cosine_BI)
    own_B1 = item_B[:, None]
    logits_BI = scale * cosine_BI.scatter_add(1, own_B1, cosine_BI.new_full(own_B1.shape, -margin))
    return F.cross_entropy(logits_BI, item_B, label_smoothing=smoothing)


def arcface(cosine_BI: Tensor, item_B: Tensor, scale: float, margin: float) -> Tensor:
    """Cross entropy of a cosine classifier with an additive margin on the angle (Deng et al., ArcFace, 2019).

    The logit of an image's own item is scale * cos(angle + margin). Beyond an angle of pi - margin, where this cosine
    would rise again, the logit is scale * (cosine - margin * sin(margin)), as in the authors' code. With sub-centers
    (Deng et al., Sub-center ArcFace, 2020) the cosine of an item is that of the item's nearest sub-center.

    Args:
        cosine_BI: cosines of the images' features and the weights of all items.
        item_B: column of each image's item.
        scale: factor on the cosines.
        margin: angle to add, radians, 0 to pi / 2.
    """
    cosine_BI, own_B1 = precise(cosine_BI), item_B[:, None]
    own_cosine_B1 = cosine_BI.gather(1, own_B1)
    # Clamped, because the gradient of the root is infinite at 0
    sine_B1 = (1 - own_cosine_B1.square()).clamp(min=torch.finfo(cosine_BI.dtype).eps).sqrt()
    margin_cosine_B1 = torch.where(
        own_cosine_B1 >= -math.cos(margin),
        own_cosine_B1 * math.cos(margin) - sine_B1 * math.sin(margin),
        own_cosine_B1 - margin * math.sin(margin),
    )
    return F.cross_entropy(scale * cosine_BI.scatter(1, own_B1, margin_cosine_B1), item_B)


def proxy_anchor(cosine_BI: Tensor, item_B: Tensor, scale: float, margin: float) -> Tensor:
    """Proxy-anchor loss (Kim et al., Proxy Anchor Loss for Deep Metric Learning, 2020, equation 4).

    Each item's proxy is an anchor. One soft maximum pulls the item's farthest images nearer, another pushes the nearest
    images of other items away. The pull is a mean over the items of the batch, the push a mean over all items.

    Args:
        cosine_BI: cosines of the images' features and the proxies of all items.
        item_B: column of each image's item.
        scale: scale of the soft maxima (alpha in the paper).
        margin: cosine that positives should exceed; negatives should stay below -margin (delta).
    """
    cosine_BI = precise(cosine_BI)
    own_BI = item_B[:, None] == torch.arange(cosine_BI.shape[1], device=item_B.device)
    pull_I = log1p_sum_exp(-scale * (cosine_BI - margin), own_BI, 0)
    push_I = log1p_sum_exp(scale * (cosine_BI + margin), ~own_BI, 0)
    return pull_I.sum() / own_BI.any(0).sum() + push_I.mean()


@torch.no_grad()
def bounds(loss: Callable[[Tensor, Tensor], Tensor], item_B: Tensor, num_items: int) -> Bounds:
    """Return a loss's values at its two ends, on this batch's labels. `loss` takes cosines (B, I) and items (B,).

    The floor is the loss with cosine 1 for an image's own item and 0 for all other items. The collapse value is the
    lowest loss with one cosine for all images and items: the value of a loss with a margin depends on that cosine.
    """
    perfect_BI = F.one_hot(item_B, num_items).float()
    equal = [loss(torch.full_like(perfect_BI, cosine), item_B).item() for cosine in torch.linspace(-1, 1, 41).tolist()]
    return Bounds(floor=loss(perfect_BI, item_B).item(), collapse=min(equal))


def center(feature_BD: Tensor, item_B: Tensor, centers_ID: Tensor) -> Tensor:
    """Mean over the batch of half the squared distance of a feature to its item's center (Wen et al., 2016).

    Floor and collapse value are both 0, since the centers follow the features: this loss alone does not show a
    collapse. The centers are a buffer that `move_centers` updates, not parameters.

    Args:
        feature_BD: features before normalisation, of any norm.
        item_B: row in `centers_ID` of each feature's item.
        centers_ID: centers of all items of the catalogue.
    """
    difference_BD = precise(feature_BD) - precise(centers_ID[item_B])
    return difference_BD.square().sum(1).mean() / 2


@torch.no_grad()
def move_centers(centers_ID: Tensor, feature_BD: Tensor, item_B: Tensor, item_P: Tensor, lr: float) -> None:
    """Move the batch's centers towards their features, in place (Wen et al., 2016, equation 4, with lr 0.5).

    A center moves `lr` n / (1 + n) of the way to the mean of its n features. Unlike the gradient, this move depends
    neither on the weight of the loss nor on the batch size, so centers need no optimizer of their own. Every worker
    makes the same move from the same global batch, bit for bit: sums are matrix products, not scattered additions,
    whose order varies on a GPU.

    Args:
        centers_ID: centers of all items of the catalogue.
        feature_BD: features, of any norm.
        item_B: row in `centers_ID` of each feature's item.
        item_P: row in `centers_ID` of each item of the batch, once. To compute these on a GPU would make the host wait.
        lr: learning rate of the centers.
    """
    member_PB = (item_P[:, None] == item_B).to(centers_ID.dtype)
    num_views_P1 = member_PB.sum(1, keepdim=True)
    with torch.autocast(centers_ID.device.type, enabled=False):
        sum_PD = member_PB @ feature_BD.to(centers_ID.dtype)
    centers_ID[item_P] -= lr * (num_views_P1 * centers_ID[item_P] - sum_PD) / (1 + num_views_P1)
