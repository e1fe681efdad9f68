"""ResidualMean against its definition."""

import pytest
import torch

import lens_probes as lp
from lens_probes.examples import tiny

TEXTS = ["Time flies like an arrow.", "Fruit flies like a banana, and nobody told the cat."]


def states(model, texts, layer):
    """The states of all tokens but special ones, one prompt at a time."""
    found = []
    for _, prompt in lp.ResidualUpdate(layers=[0]).run(model, texts).token.by_prompt():
        _, cache = model.run_with_cache(prompt.id[None])
        found.append(cache[f"blocks.{layer}.hook_resid_mid"][0].detach()[~prompt.special])
    return torch.cat(found).double()


def test_the_mean_and_its_share_are_those_of_all_ordinary_tokens():
    model = tiny.bridge("gpt2")
    result = lp.ResidualMean().run(model, TEXTS, batch_size=1)
    for layer in range(3):
        expected = states(model, TEXTS, layer)
        share = expected.mean(0).square().sum() / expected.square().sum(-1).mean()
        torch.testing.assert_close(result.mean[layer].double(), expected.mean(0), atol=1e-4, rtol=1e-4)
        assert float(result.share[layer]) == pytest.approx(float(share), abs=1e-4)
        assert int(result.count) == len(expected)


def test_a_longer_corpus_does_not_make_the_result_larger():
    model = tiny.bridge("gpt2")
    short, long = (lp.ResidualMean().run(model, TEXTS * n, progress=False) for n in (1, 40))
    assert long.total.shape == short.total.shape
    torch.testing.assert_close(long.mean, short.mean, atol=1e-5, rtol=1e-5)
    assert long.provenance.n_prompts == 80


def test_the_first_token_does_not_count_where_it_is_special():
    model = tiny.bridge("gpt2")
    with_bos = lp.ResidualMean().run(model, TEXTS[0], prepend_bos=True)
    assert int(with_bos.count) == with_bos.provenance.n_tokens - 1


def test_the_figure_draws_the_share():
    result = lp.ResidualMean().run(tiny.bridge("gpt2"), TEXTS)
    assert list(result.figure().data[0].y) == pytest.approx(result.share.tolist())
