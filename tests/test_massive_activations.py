"""MassiveActivations: planted ones are found, attention is that of Hugging Face, nulls, tables and refusals."""

import numpy as np
import pytest
import torch
from reference import attention

import lens_probes as lp
from lens_probes.examples import tiny
from lens_probes.model import ModelView
from lens_probes.probes.massive_activations import peaks, received_of
from lens_probes.text.prompts import tokenize

TEXTS = lp.demo.sentences()[:8]


@pytest.fixture
def massive():
    """A model that writes a large number into one coordinate of the first token."""
    model = tiny.bridge("gpt2")

    def write(state, hook):
        changed = state.clone()
        changed[:, 0, 5] += 5000
        return changed

    model.blocks[1].hook_in.add_hook(write, is_permanent=True)
    return model


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "gemma2"])
def test_peaks_and_received_attention_are_those_of_hugging_faces_modules(architecture):
    model = tiny.bridge(architecture)
    result, ids = lp.MassiveActivations().run(model, TEXTS[0]), tokenize(TEXTS[0], ModelView(model)).id
    hidden = tiny.huggingface(architecture)(ids[None], output_hidden_states=True).hidden_states
    for layer, own in enumerate(attention(architecture, ids)):
        sizes = hidden[layer][0].detach().abs()
        torch.testing.assert_close(result.largest[layer], sizes.amax(-1), rtol=1e-4, atol=1e-5)
        assert torch.equal(result.dimension[layer], sizes.argmax(-1))
        torch.testing.assert_close(result.ratio[layer], sizes.amax(-1) / sizes.median(-1).values, rtol=1e-3, atol=1e-3)
        weight, n = own.pattern.mean(0).detach(), len(ids)
        for key in range(n - 1):
            assert float(result.received[layer, key]) == pytest.approx(float(weight[key + 1 :, key].mean()), abs=1e-5)
            uniform = np.mean([1 / (query + 1) for query in range(key + 1, n)])
            assert float(result.uniform[layer, key]) == pytest.approx(uniform, abs=1e-6)
        assert result.received[layer, -1].isnan()  # nobody else may attend to the last token


def test_in_an_encoder_all_other_tokens_attend():
    pattern = torch.tensor([[0.5, 0.5], [0.25, 0.75]])
    assert received_of(pattern, torch.ones(2, 2, dtype=torch.bool)).tolist() == [0.25, 0.5]
    result = lp.MassiveActivations().run(tiny.bridge("bert"), TEXTS[0])
    assert result.received.isfinite().all()
    torch.testing.assert_close(result.uniform, torch.full_like(result.uniform, 1 / len(result.token)))


def test_a_planted_one_is_found_with_its_dimension_and_place(massive):
    result = lp.MassiveActivations(threshold=500.0).run(massive, TEXTS)
    table = result.table().set_index("layer")
    assert table.loc["0", "massive"] == 0 and table.loc["1", "massive"] == 8
    assert table.loc["1", ["first", "dimension", "of_dimension"]].tolist() == [1.0, "D5", 1.0]
    excess = (result.received - result.uniform).double()
    differences = []
    for number, own in result.token.by_prompt():
        rows = excess[1][result.token.prompt == number]
        differences.append(float(rows[0] - rows[1 : len(own) - 1].mean()))
    assert table.loc["1", "effect"] == pytest.approx(np.mean(differences))
    assert table.loc["1", "prompts"] == 8 and table.loc["0", "prompts"] == 0
    assert "dimension D5; 100% stand first" in result.findings()[0]


def test_without_massive_ones_it_says_so_and_how_large_random_directions_are(gpt2):
    result = lp.MassiveActivations().run(gpt2, TEXTS)
    assert not result.massive().any() and result.table()["effect"].isna().all()
    assert result.findings()[0].startswith("No state is massive: the largest coordinate is at most ")


def test_the_null_is_the_peak_of_a_random_direction_whatever_the_batch(gpt2):
    result = lp.MassiveActivations(seed=1).run(gpt2, TEXTS)
    alone = lp.MassiveActivations(seed=1).run(gpt2, TEXTS[4])
    rows = result.token.prompt == 4
    torch.testing.assert_close(result.random_ratio[:, rows], alone.random_ratio)
    drawn = torch.randn(4000, 32, generator=torch.Generator().manual_seed(0))
    assert float(result.random_ratio.median()) == pytest.approx(float(peaks(drawn)[2].median()), rel=0.1)


def test_half_precision_and_a_local_window():
    for model in (tiny.bridge("llama", dtype=torch.bfloat16), tiny.bridge("gemma2")):
        result = lp.MassiveActivations().run(model, " ".join(TEXTS[:2]))
        assert (result.received[:, :-1] >= 0).all() and (result.ratio >= 1).all()


def test_the_figure_has_massive_tokens_beside_the_others(massive):
    figure = lp.MassiveActivations(threshold=500.0).run(massive, TEXTS).figure()
    names = [trace.name for trace in figure.data]
    assert names == [
        "largest of all tokens",
        "median token",
        "largest of random directions",
        "massive tokens",
        "all other tokens",
    ]
    assert figure.layout.yaxis.type == "log"


@pytest.mark.usefixtures("as_users_run_it")
def test_what_cannot_be_asked_is_said(gpt2):
    with pytest.raises(ValueError, match=r"threshold=...\) must be a number above 0; got 0"):
        lp.MassiveActivations(threshold=0)
    with pytest.raises(ValueError, match="layer 9 is out of range"):
        lp.MassiveActivations(layers=[9]).run(gpt2, TEXTS)
