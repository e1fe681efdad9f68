"""Gradient ascent with Adam, and random generators seeded by content, so that batches do not change results."""

import zlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor


def seeded(about: bytes | str, seed: int) -> torch.Generator:
    """A random generator seeded by a content (such as token ids) and a seed.

    >>> float(torch.rand(1, generator=seeded("a", 0))) == float(torch.rand(1, generator=seeded("a", 0)))
    True
    """
    key = about.encode() if isinstance(about, str) else about
    return torch.Generator().manual_seed(zlib.crc32(key, seed) % 2**32)


class Reached(NamedTuple):
    """A point of an ascent, its height, and the slope there (the gradient of the summed heights)."""

    point: Float[Tensor, "..."]
    height: Float[Tensor, "..."]
    slope: Float[Tensor, "..."]


def ascend(
    start: Float[Tensor, "..."],
    height: Callable[[Float[Tensor, "..."], int], Float[Tensor, "..."]],
    steps: int,
    *,
    rate: float,
    final: float = 1.0,
    project: Callable[[Float[Tensor, "..."], int], Float[Tensor, "..."]] | None = None,
) -> Iterator[Reached]:
    """Maximise `height(point, step)` with Adam: yields the start and the point after each step, steps + 1 in all.

    The height is one number, or one per restart if restarts are independent. The learning rate falls linearly to
    `final` times `rate`. `project(point, step)` maps every new point to an allowed one. An entry on which the height
    does not depend keeps its value. To descend, pass minus the loss.

    >>> *_, end = ascend(torch.zeros(1), lambda x, step: -((3 - x) ** 2), steps=200, rate=0.1)
    >>> round(end.point.item(), 2), round(end.height.item(), 2)
    (3.0, -0.0)
    """
    point = start.detach().clone().requires_grad_()
    optimiser = torch.optim.Adam([point], lr=rate, maximize=True)
    schedule = torch.optim.lr_scheduler.LinearLR(optimiser, 1.0, final, total_iters=max(1, steps))
    for step in range(steps + 1):
        here = height(point, step)
        (slope,) = torch.autograd.grad(here.sum(), point)
        yield Reached(point.detach().clone(), here.detach(), slope)
        if step < steps:
            point.grad = slope
            optimiser.step()
            schedule.step()
            if project is not None:
                with torch.no_grad():
                    point.copy_(project(point, step))
