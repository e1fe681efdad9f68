"""Cosine and its relatives, and means over all pairs of a group, from sums alone."""

import torch
from jaxtyping import Float, Int
from torch import Tensor


def mean_pairwise_cosine(unit_sum: Float[Tensor, "*unit d_model"], n: Int[Tensor, "*unit"]) -> Float[Tensor, "*unit"]:
    """The mean cosine over all pairs of n vectors, from the sum of their unit vectors; NaN for fewer than two.

        mean over i != j of u_i . u_j  =  (|sum_i u_i|^2 - n) / (n (n - 1)),   -1/(n-1) to 1, about 0 for random ones

    >>> mean_pairwise_cosine(torch.tensor([2.0, 0.0]), torch.tensor(2))
    tensor(1., dtype=torch.float64)
    """
    square = unit_sum.double().square().sum(-1)
    return torch.where(n > 1, (square - n) / (n * (n - 1)).clamp(min=1), torch.nan)
