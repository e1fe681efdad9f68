"""Cosine and its relatives, and means over all pairs within and between groups.

Means of products over pairs come from sums of vectors, in one pass and linear in the number of vectors:

    sum over i in A, j in B, i != j of w_i w_j x_i . x_j  =  S_A . S_B - (sum over i in A of w_i^2 |x_i|^2, where A = B)
"""

from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import normalize

Similarity = Literal["cosine", "scaled", "distance"]
SIMILARITIES: tuple[Similarity, ...] = ("cosine", "scaled", "distance")


def mean_pairwise_cosine(unit_sum: Float[Tensor, "*unit d_model"], n: Int[Tensor, "*unit"]) -> Float[Tensor, "*unit"]:
    """The mean cosine over all pairs of n vectors, computed from the sum of their unit vectors; NaN if n < 2.

        mean over i != j of u_i . u_j  =  (|sum_i u_i|^2 - n) / (n (n - 1)),   -1/(n-1) to 1, about 0 for random ones

    >>> mean_pairwise_cosine(torch.tensor([2.0, 0.0]), torch.tensor(2))
    tensor(1., dtype=torch.float64)
    """
    square = unit_sum.double().square().sum(-1)
    return torch.where(n > 1, (square - n) / (n * (n - 1)).clamp(min=1), torch.nan)


def pairwise(vectors: Float[Tensor, "*unit item d"], metric: Similarity) -> Float[Tensor, "*unit item other"]:
    """The similarity of every pair of a unit's vectors.

        cosine    x . y / (|x| |y|)                       -1 to 1; NaN for a zero vector
        scaled    x . y / max over the set of |z|^2       -1 to 1; a set of zeros gives NaN
        distance  1 - |x - y| / (|x| + |y|)                0 (opposite) to 1 (equal); 1 for two zero vectors

    >>> pairwise(torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 0.0]]), "distance")
    tensor([[1., 0., 0.],
            [0., 1., 0.],
            [0., 0., 1.]])
    """
    if metric == "distance":
        length = vectors.norm(dim=-1)
        lengths = length[..., :, None] + length[..., None, :]
        exact = torch.cdist(vectors, vectors, compute_mode="donot_use_mm_for_euclid_dist")
        return torch.where(lengths == 0, 1.0, 1 - exact / lengths)
    features, valid = features_of(vectors, metric)
    return (features @ features.mT).masked_fill(~(valid[..., :, None] & valid[..., None, :]), torch.nan)


class Features(NamedTuple):
    """Vectors whose dot products are the similarities, and which of them count."""

    vectors: Float[Tensor, "*unit item d"]
    valid: Bool[Tensor, "*unit item"]


def features_of(vectors: Float[Tensor, "*unit item d"], metric: Literal["cosine", "scaled"]) -> Features:
    """Unit vectors, zero vectors marked invalid ("cosine"); or vectors divided by the largest length ("scaled")."""
    length = vectors.norm(dim=-1)
    if metric == "cosine":
        return Features(normalize(vectors, dim=-1, eps=1e-30), length > 0)
    largest = length.amax(-1, keepdim=True)
    return Features(vectors / largest.clamp(min=1e-30)[..., None], (largest > 0).expand_as(length))


def group_means(
    features: Features, weights: Float[Tensor, "*draw topic item"]
) -> Float[Tensor, "*draw unit topic other_topic"]:
    """The weighted mean similarity over the pairs of two groups, without pairs of an item with itself; NaN if none.

    `features` are `[unit item d]`. A weight is how often an item counts in a group: 1 in its own group, or the number
    of times that a resample drew it.
    """
    vectors, valid = features.vectors, features.valid.to(weights.dtype)
    sums = torch.einsum("...ti,uid->...utd", weights, vectors)
    own = torch.einsum("...ti,ui->...ut", weights.square(), vectors.square().sum(-1))
    number = torch.einsum("...ti,ui->...ut", weights, valid)
    selves = torch.einsum("...ti,ui->...ut", weights.square(), valid)
    return over_pairs(sums @ sums.mT - torch.diag_embed(own), number, selves)


def group_means_of_pairs(
    pairs: Float[Tensor, "unit item other"], weights: Float[Tensor, "*draw topic item"]
) -> Float[Tensor, "*draw unit topic other_topic"]:
    """`group_means` from the similarities of all pairs, for similarities that are not dot products."""
    sums = torch.einsum("...ti,uij,...sj->...uts", weights, pairs, weights)
    own = torch.einsum("...ti,ui->...ut", weights.square(), pairs.diagonal(dim1=-2, dim2=-1))
    number = weights.sum(-1)[..., None, :].expand(own.shape)
    selves = weights.square().sum(-1)[..., None, :].expand(own.shape)
    return over_pairs(sums - torch.diag_embed(own), number, selves)


def over_pairs(
    sums: Float[Tensor, "*unit topic other_topic"],
    number: Float[Tensor, "*unit topic"],
    selves: Float[Tensor, "*unit topic"],
) -> Float[Tensor, "*unit topic other_topic"]:
    """Sums over pairs divided by the number of pairs: n_A n_B, minus the items themselves if A = B; NaN if none."""
    n_pairs = number[..., :, None] * number[..., None, :] - torch.diag_embed(selves)
    return torch.where(n_pairs > 0, sums / n_pairs, torch.nan)


def separation(means: Float[Tensor, "*unit topic other_topic"]) -> Float[Tensor, "*unit"]:
    """Mean similarity within topics minus that between topics; topics, and pairs of topics, have equal weights.

    >>> separation(torch.tensor([[1.0, 0.25], [0.25, 0.5]]))
    tensor(0.5000)
    """
    diagonal = torch.eye(means.shape[-1], dtype=torch.bool, device=means.device)
    within = means.masked_fill(~diagonal, 0).sum((-2, -1)) / diagonal.sum()
    between = means.masked_fill(diagonal, 0).sum((-2, -1)) / (~diagonal).sum()
    return within - between
