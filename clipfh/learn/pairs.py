"""Losses that compare images in pairs: tensors in, scalar out, as in `learn.losses`."""

import torch
import torch.nn.functional as F
from torch import Tensor

from clipfh.learn.losses import Memory, candidates, log1p_sum_exp, mean_where, precise, similarity


def triplet(embedding_BD: Tensor, item_B: Tensor, margin: float | None, memory: Memory | None = None) -> Tensor:
    """Batch-hard triplet loss (Hermans et al., In Defense of the Triplet Loss, 2017) on Euclidean distance.

    Each anchor is compared with its farthest positive and its nearest negative. The mean is over anchors that have
    both, also those with loss 0; without any, 0 with zero gradients. With a margin: floor 0, collapse value the margin.

    Args:
        embedding_BD: embeddings; distances are between 0 and 2.
        item_B: items of the embeddings.
        margin: margin of the hinge, in units of distance; None for a soft margin, log(1 + exp(positive - negative)).
        memory: further positives and negatives, which are no anchors.
    """
    embedding_BD = precise(embedding_BD)
    candidate_ND, positive_BN, negative_BN = candidates(embedding_BD, item_B, memory)
    with torch.no_grad():
        similarity_BN = similarity(embedding_BD, candidate_ND)
        farthest_B = similarity_BN.masked_fill(~positive_BN, torch.inf).argmin(1)
        nearest_B = similarity_BN.masked_fill(~negative_BN, -torch.inf).argmax(1)
    # Distances come from differences, not from similarities: differences are exact for close pairs, and between
    # duplicates their gradient is 0, where the gradient of sqrt(2 - 2 similarity) is infinite.
    positive_distance_B = torch.linalg.vector_norm(embedding_BD - candidate_ND[farthest_B], dim=1)
    negative_distance_B = torch.linalg.vector_norm(embedding_BD - candidate_ND[nearest_B], dim=1)
    violation_B = positive_distance_B - negative_distance_B
    loss_B = F.softplus(violation_B) if margin is None else F.relu(violation_B + margin)
    return mean_where(loss_B, positive_BN.any(1) & negative_BN.any(1))


def multi_similarity(
    embedding_BD: Tensor,
    item_B: Tensor,
    positive_scale: float,
    negative_scale: float,
    base: float,
    margin: float,
    memory: Memory | None = None,
) -> Tensor:
    """Multi-similarity loss with its mining (Wang et al., Multi-Similarity Loss with General Pair Weighting, 2019).

    An anchor's positive counts if it is less similar than the most similar negative plus the margin. A negative counts
    if it is more similar than the least similar positive minus the margin. Each side is a soft maximum, log(1 + sum of
    exp(scale * d)) / scale, where d is how far a similarity is on the wrong side of the base. The mean is over anchors
    that have positives and negatives, even if none of them counts. Floor 0.

    Args:
        embedding_BD: embeddings.
        item_B: items of the embeddings.
        positive_scale, negative_scale: scales of the two soft maxima (alpha and beta in the paper).
        base: similarity that positives should exceed, and negatives stay below (lambda).
        margin: margin of the mining (epsilon).
        memory: further positives and negatives, which are no anchors.
    """
    candidate_ND, positive_BN, negative_BN = candidates(embedding_BD, item_B, memory)
    similarity_BN = similarity(embedding_BD, candidate_ND)
    with torch.no_grad():
        hardest_positive_B1 = similarity_BN.masked_fill(~positive_BN, torch.inf).amin(1, keepdim=True)
        hardest_negative_B1 = similarity_BN.masked_fill(~negative_BN, -torch.inf).amax(1, keepdim=True)
        mined_positive_BN = positive_BN & (similarity_BN - margin < hardest_negative_B1)
        mined_negative_BN = negative_BN & (similarity_BN + margin > hardest_positive_B1)
    above_BN = similarity_BN - base
    pull_B = log1p_sum_exp(-positive_scale * above_BN, mined_positive_BN, 1) / positive_scale
    push_B = log1p_sum_exp(negative_scale * above_BN, mined_negative_BN, 1) / negative_scale
    return mean_where(pull_B + push_B, positive_BN.any(1) & negative_BN.any(1))


def smooth_ap(embedding_BD: Tensor, item_B: Tensor, views: int, temperature: float) -> Tensor:
    """1 - mean average precision of images as queries to the others, by smooth ranks (Brown et al., Smooth-AP, 2020).

    A smooth rank counts the images above an image, each by a sigmoid of how far above it is. A query is not part of its
    own ranking, as in retrieval (the paper's code counts the query as one of its positives). The mean is over images
    that have a positive. Floor 0, at a low temperature; collapse value 1 - K / B.

    Args:
        embedding_BD: embeddings.
        item_B: items of the embeddings.
        views: K, the largest number of images of an item in the batch.
        temperature: temperature of the sigmoid, in units of cosine.
    """
    _, positive_BB, _ = candidates(embedding_BD, item_B, None)
    similarity_BB = similarity(embedding_BD, embedding_BD)
    # Only a query's positives are ranked, at most V = K - 1 images, so tensors are (B, V, B), not (B, B, B)
    is_positive_BV, ranked_BV = positive_BB.to(similarity_BB.dtype).topk(min(views - 1, len(item_B)), dim=1)
    lead_BVB = similarity_BB[:, None] - similarity_BB.gather(1, ranked_BV)[..., None]
    places_B = torch.arange(len(item_B), device=item_B.device)
    ignored_BVB = (places_B[:, None, None] == places_B) | (ranked_BV[..., None] == places_B)
    above_BVB = torch.sigmoid(lead_BVB / temperature).masked_fill(ignored_BVB, 0)
    rank_BV = 1 + above_BVB.sum(2)
    rank_in_positives_BV = 1 + above_BVB.masked_fill(~positive_BB[:, None], 0).sum(2)
    num_positive_B = is_positive_BV.sum(1)
    precision_B = (is_positive_BV * rank_in_positives_BV / rank_BV).sum(1) / num_positive_B.clamp(min=1)
    return mean_where(1 - precision_B, num_positive_B > 0)
