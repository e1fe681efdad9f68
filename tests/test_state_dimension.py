"""StateDimension: known clouds, an independent reference, its null, its intervals, and its refusals."""

import numpy as np
import pytest
import torch
from sklearn.neighbors import NearestNeighbors

import lens_probes as lp
from lens_probes.examples import tiny
from lens_probes.experiments.state_dimension import dimensions, two_nn

TEXTS = lp.demo.sentences()[:12]


def cloud(n, d, seed=0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_a_plane_in_a_large_space_has_two_dimensions_and_one_bent_into_three_too():
    flat = dimensions((cloud(1500, 2) @ cloud(2, 40)).float())
    assert flat.two_nn == pytest.approx(2, abs=0.15) and flat.gaussian == pytest.approx(2, abs=0.15)
    assert flat.effective_rank == pytest.approx(2, abs=0.1)
    angle, height = 3 * torch.rand(1500, generator=torch.Generator().manual_seed(0)), cloud(1500, 1)[:, 0]
    rolled = torch.stack([angle.cos() * 3, angle.sin() * 3, height], dim=1).float()
    bent = dimensions(rolled)
    assert bent.two_nn == pytest.approx(2, abs=0.15) and bent.gaussian == pytest.approx(3, abs=0.25)


def test_effective_rank_and_participation_are_those_of_the_eigenvalues_of_the_covariance():
    states = cloud(200, 6) * torch.tensor([1.0, 2, 3, 4, 5, 6])
    values = np.linalg.eigvalsh(np.cov(states.numpy().T))
    share = values / values.sum()
    found = dimensions(states.float())
    assert found.effective_rank == pytest.approx(np.exp(-(share * np.log(share)).sum()), rel=1e-4)
    assert found.participation == pytest.approx(values.sum() ** 2 / (values**2).sum(), rel=1e-4)


def test_two_nn_is_that_of_the_neighbours_that_scikit_learn_finds():
    states = cloud(300, 5)
    distance, _ = NearestNeighbors(n_neighbors=3).fit(states.numpy()).kneighbors(states.numpy())
    expected = 299 / np.log(distance[:, 2] / distance[:, 1]).sum()
    assert two_nn(states) == pytest.approx(expected, rel=1e-9)


def test_equal_states_count_once_and_fewer_than_three_have_no_dimension():
    states = cloud(50, 4).float()
    assert dimensions(torch.cat([states, states[:20]])) == dimensions(states)
    assert all(np.isnan(each) for each in dimensions(states[:2].repeat(5, 1)))


@pytest.mark.parametrize("architecture", ["gpt2", "gemma2", "bert"])
def test_it_reads_the_states_of_hugging_faces_blocks(architecture):
    result = lp.StateDimension(layers=[1], draws=1).run(tiny.bridge(architecture), TEXTS, progress=False)
    reference, states = tiny.huggingface(architecture), []
    for _, own in lp.ResidualUpdate(layers=[0]).run(tiny.bridge(architecture), TEXTS).token.by_prompt():
        hidden = reference(own.id[None], output_hidden_states=True).hidden_states[2][0].detach()
        states.append(hidden[~own.special])
    expected = dimensions(torch.cat(states))
    for name in ("effective_rank", "participation", "two_nn", "gaussian"):
        assert float(getattr(result, name)[0]) == pytest.approx(getattr(expected, name), rel=2e-2)
    assert result.n_states == len(torch.cat(states)) and result.n_prompts == 12


def test_the_order_of_prompts_and_a_prompt_given_twice_change_nothing(gpt2):
    asked = lp.StateDimension(draws=5)
    one, turned, twice = (asked.run(gpt2, texts, progress=False) for texts in (TEXTS, TEXTS[::-1], [*TEXTS, TEXTS[3]]))
    for other in (turned, twice):
        torch.testing.assert_close(one.two_nn, other.two_nn, rtol=1e-3, atol=0)
        torch.testing.assert_close(one.half, other.half, rtol=1e-2, atol=0)
    assert twice.n_prompts == 12


def test_of_longer_text_a_sample_is_read_that_does_not_depend_on_the_order(gpt2):
    few = lp.StateDimension(states=60, draws=2)
    one, other = few.run(gpt2, TEXTS, progress=False), few.run(gpt2, TEXTS[::-1], progress=False)
    assert one.n_states == 60
    torch.testing.assert_close(one.two_nn, other.two_nn, rtol=1e-3, atol=0)


def test_the_table_has_intervals_from_halves_and_none_with_fewer_than_five_prompts(gpt2):
    result = lp.StateDimension().run(gpt2, TEXTS, progress=False)
    table = result.table()
    bend = (result.half[2] - result.half[3]).numpy()
    reach = (table["high"] - table["low"]).to_numpy() / 2
    np.testing.assert_allclose(reach, 2.200985 * bend.std(axis=1, ddof=1), rtol=1e-5)  # t of 11 degrees of freedom
    assert table["effect"].tolist() == pytest.approx((result.two_nn - result.gaussian).tolist())
    few = lp.StateDimension().run(gpt2, TEXTS[:4], progress=False).table()
    assert few[["low", "high", "p"]].isna().all(axis=None)


@pytest.mark.trials
def test_the_interval_of_a_half_sample_is_as_wide_as_that_of_the_whole():
    """Clouds of 20 prompts whose states share a shift: the error of the effective rank, known by drawing anew."""
    random, values, errors = torch.Generator().manual_seed(0), [], []
    for _ in range(60):
        states = torch.randn(20, 30, 8, generator=random) + torch.randn(20, 1, 8, generator=random)
        values.append(dimensions(states.flatten(0, 1)).effective_rank)
        halves = [dimensions(states[torch.randperm(20, generator=random)[:10]].flatten(0, 1)) for _ in range(20)]
        errors.append(np.std([half.effective_rank for half in halves], ddof=1))
    assert 0.7 < np.mean(errors) / np.std(values, ddof=1) < 1.6


def test_figures_and_findings_say_what_was_measured(gpt2):
    result = lp.StateDimension(draws=5).run(gpt2, TEXTS, progress=False)
    assert [axis.title.text for axis in result.figure().select_yaxes()] == [
        "directions with variance (1 or more)",
        "local dimension (0 or more)",
    ]
    assert result.findings()[0].startswith("The states have the most dimensions at ")


@pytest.mark.usefixtures("as_users_run_it")
def test_what_cannot_be_asked_is_said(gpt2):
    with pytest.raises(ValueError, match="three tokens or more that are not special; got 2"):
        lp.StateDimension().run(gpt2, [[0, 7, 8]])
    with pytest.raises(ValueError, match=r"states=...\) must be a whole number, 3 or more; got 2"):
        lp.StateDimension(states=2)
    with pytest.raises(ValueError, match="does not exist"):
        lp.StateDimension(at="resid_mid").run(tiny.bridge("neox"), TEXTS)
