"""How a value per prompt depends on the prompt's topic: the share of variance between topics, and contrasts.

Weights say how often each prompt counts in each topic: 1 in its own topic, or as a permutation or resample assigns it.
See `lens_probes.maths.topics` for what is permuted and resampled.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lens_probes.maths.topics import own_less_others


def standardised(values: Float[Tensor, "prompt unit"], group: Int[Tensor, " prompt"]) -> Float[Tensor, "prompt unit"]:
    """Each unit's values minus the mean of their group, divided by their standard deviation; 0 for a constant unit.

    >>> standardised(torch.tensor([[1.0], [3.0], [11.0], [13.0]]), torch.tensor([0, 0, 1, 1])).T
    tensor([[-1.,  1., -1.,  1.]])
    """
    groups = torch.nn.functional.one_hot(group).T.double()
    wide = values.double()
    apart = wide - ((groups @ wide) / groups.sum(1, keepdim=True))[group]
    spread = apart.square().mean(0).sqrt()
    constant = spread <= 1e-6 * wide.abs().amax(0)  # False for a unit with a NaN, which stays NaN
    return torch.where(constant, 0.0, apart / spread).float()


def selectivity(
    values: Float[Tensor, "prompt unit"], weights: Float[Tensor, "*draw topic prompt"]
) -> Float[Tensor, "*draw unit"]:
    """The share of the variance between prompts that lies between topics, adjusted for chance; 0 for a constant unit.

    The adjusted share is Kelley's (1935) epsilon squared. A resample counts some prompts several times, which raises
    the share expected by chance: with weights w, N in all and n of a topic, it is (sum over topics of sum w^2 / n -
    sum w^2 / N) / (N - sum w^2 / N).

    >>> selectivity(torch.tensor([[1.0], [1.0], [3.0], [3.0]]), torch.eye(2).repeat_interleave(2, dim=1))
    tensor([1.])
    """
    number, times = weights.sum(-1, keepdim=True), weights.sum(-2)
    grand, variance = moments(values, times)
    apart = (weights @ values) / number.clamp(min=1) - grand[..., None, :]
    total = times.sum(-1, keepdim=True)
    between = (number * apart.square()).sum(-2) / total
    squares = weights.square().sum(-1)
    alone = times.square().sum(-1, keepdim=True) / total
    chance = ((squares / number[..., 0].clamp(min=1)).sum(-1, keepdim=True) - alone) / (total - alone)
    return torch.where(variance <= 1e-9, 0.0, (between / variance - chance) / (1 - chance))


def contrast(
    values: Float[Tensor, "prompt unit"], weights: Float[Tensor, "*draw topic prompt"], topic: int
) -> Float[Tensor, "*draw unit"]:
    """The mean of one topic minus the mean of the other topics' means, in standard deviations over prompts.

    >>> contrast(torch.tensor([[1.0], [1.0], [3.0], [3.0]]), torch.eye(2).repeat_interleave(2, dim=1), 1)
    tensor([2.])
    """
    _, variance = moments(values, weights.sum(-2))
    difference = own_less_others(weights)[..., topic, :] @ values
    return torch.where(variance <= 1e-9, 0.0, difference / variance.sqrt())


def moments(
    values: Float[Tensor, "prompt unit"], times: Float[Tensor, "*draw prompt"]
) -> tuple[Float[Tensor, "*draw unit"], Float[Tensor, "*draw unit"]]:
    """The mean and variance over prompts; `times` is how often each prompt counts."""
    total = times.sum(-1, keepdim=True)
    mean = times @ values / total
    return mean, (times @ values.square() / total - mean.square()).clamp(min=0)
