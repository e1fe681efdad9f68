"""Ascents against torch's own Adam, their rates and projections, and seeds that depend on what they are about."""

import pytest
import torch

from lens_probes.maths.ascent import ascend, seeded


def hill(point, step=0):
    """Two restarts, highest at 3 and at -1."""
    return -((point - torch.tensor([[3.0], [-1.0]])) ** 2).sum(-1)


def adam(start, steps, rate, final=1.0):
    """The points of torch's Adam on minus the hill, with the rate of every step worked out here."""
    point = start.clone().requires_grad_()
    optimiser, points = torch.optim.Adam([point]), [start.clone()]
    for step in range(steps):
        optimiser.param_groups[0]["lr"] = rate * (1 + (final - 1) * step / steps)
        optimiser.zero_grad()
        (-hill(point)).sum().backward()
        optimiser.step()
        points.append(point.detach().clone())
    return torch.stack(points)


@pytest.mark.parametrize("final", [1.0, 0.1])
def test_an_ascent_takes_the_steps_of_adam_at_a_rate_that_falls_in_a_line(final):
    start = torch.tensor([[0.0, 5.0], [2.0, -3.0]])
    points = torch.stack([reached.point for reached in ascend(start, hill, 30, rate=0.2, final=final)])
    assert points.shape == (31, 2, 2)
    torch.testing.assert_close(points, adam(start, 30, 0.2, final), rtol=1e-5, atol=1e-6)
    assert torch.equal(points[0], start) and not start.requires_grad


def test_the_first_step_goes_up_by_the_rate_and_the_last_by_a_share_of_it():
    first, second, *_, before, end = ascend(
        torch.zeros(2), lambda point, step: point @ torch.tensor([5.0, -0.1]), 10, rate=0.5, final=0.1
    )
    torch.testing.assert_close(second.point - first.point, torch.tensor([0.5, -0.5]))  # Adam's first step: the sign
    share = 1 - 0.9 * 9 / 10
    torch.testing.assert_close(end.point - before.point, torch.tensor([0.5 * share, -0.5 * share]))


def test_every_point_comes_with_its_height_and_slope():
    for reached in ascend(torch.tensor([[0.0], [0.0]]), hill, 5, rate=0.1):
        assert torch.equal(reached.height, hill(reached.point)) and not reached.height.requires_grad
        torch.testing.assert_close(reached.slope, -2 * (reached.point - torch.tensor([[3.0], [-1.0]])))


def test_a_projection_is_made_after_every_step_and_knows_its_number():
    seen = []

    def project(point, step):
        seen.append(step)
        return point.clamp(max=1.0)

    points = [reached.point for reached in ascend(torch.zeros(2, 1), hill, 20, rate=0.3, project=project)]
    assert seen == list(range(20)) and max(float(point.max()) for point in points) == 1.0
    assert points[-1][0] == 1.0  # its top, 3, is beyond the bound


def test_the_height_is_asked_once_per_point_with_its_number():
    steps = []

    def height(point, step):
        steps.append(step)
        return hill(point)

    assert len(list(ascend(torch.zeros(2, 1), height, 7, rate=0.1))) == 8 and steps == list(range(8))


def test_what_the_height_does_not_depend_on_stays():
    *_, end = ascend(torch.tensor([1.0, 2.0]), lambda point, step: point[0], 10, rate=0.1)
    assert end.point[1] == 2.0 and end.point[0] > 1.5


def test_points_that_are_kept_do_not_change_and_no_steps_give_the_start():
    reached = list(ascend(torch.zeros(2, 1), hill, 3, rate=0.1))
    assert len({float(each.point[0]) for each in reached}) == 4
    (only,) = ascend(torch.ones(2, 1), hill, 0, rate=0.1)
    assert torch.equal(only.point, torch.ones(2, 1))


def test_an_ascent_that_is_left_early_costs_no_more_steps():
    steps = []

    def height(point, step):
        steps.append(step)
        return hill(point)

    for number, _ in enumerate(ascend(torch.zeros(2, 1), height, 100, rate=0.1)):
        if number == 2:
            break
    assert steps == [0, 1, 2]


def test_seeds_differ_by_what_they_are_about_and_by_their_number():
    def first(about, seed):
        return torch.rand(4, generator=seeded(about, seed))

    assert torch.equal(first("a", 0), first(b"a", 0))
    drawn = [first(about, seed) for about in ("a", "b") for seed in (0, 1)]
    assert all(not torch.equal(drawn[i], drawn[j]) for i in range(4) for j in range(i))
