"""Gradient ascent with Adam, and seeds that depend on what is asked and not on its place in a batch."""

import zlib
from collections.abc import Callable, Iterator

import torch
from jaxtyping import Float
from torch import Tensor


def seeded(about: bytes | str, seed: int) -> torch.Generator:
    """A generator whose numbers depend on what they are about and on a seed.

    >>> float(torch.rand(1, generator=seeded("a", 0))) == float(torch.rand(1, generator=seeded("a", 0)))
    True
    """
    key = about.encode() if isinstance(about, str) else about
    return torch.Generator().manual_seed(zlib.crc32(key, seed) % 2**32)


def ascend(
    start: Float[Tensor, "..."],
    slope: Callable[[Float[Tensor, "..."], int], Float[Tensor, "..."]],
    steps: int,
    *,
    rate: float,
    last_rate: float | None = None,
    project: Callable[[Float[Tensor, "..."], int], Float[Tensor, "..."]] | None = None,
) -> Iterator[Float[Tensor, "..."]]:
    """The point before each of some steps of Adam along `slope(point, step)`, and the end: steps + 1 points.

    The rate falls in a line to `last_rate` (None: it stays). `project(point, step)` brings every new point back to
    where it may be. A slope of 0 keeps what it belongs to where it is. To descend, give the negative gradient.

    >>> *_, end = ascend(torch.zeros(1), lambda x, step: 2 * (3 - x), steps=200, rate=0.1)
    >>> round(end.item(), 2)
    3.0
    """
    point = start.detach().clone().requires_grad_()
    optimiser = torch.optim.Adam([point], lr=rate, maximize=True)
    final = 1.0 if last_rate is None else last_rate / rate
    schedule = torch.optim.lr_scheduler.LinearLR(optimiser, 1.0, final, total_iters=max(1, steps))
    for step in range(steps):
        yield point
        point.grad = slope(point, step)
        optimiser.step()
        schedule.step()
        if project is not None:
            with torch.no_grad():
                point.copy_(project(point, step))
    yield point
