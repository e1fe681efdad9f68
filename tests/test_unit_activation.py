"""UnitActivation: against Hugging Face's own activations and the model's cache, shares by hand, what is refused."""

from importlib.metadata import version

import pytest
import torch

import lens_probes as lp
from lens_probes.examples import tiny
from lens_probes.model import ModelView

TEXTS = ["The cat saw the cat and the dog.", "Time flies like an arrow."]
MAKERS = ["bridge", "hooked"] if version("transformer-lens").startswith("3.") else ["bridge"]


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "neox"])
def test_neurons_are_what_hugging_faces_last_matrix_reads(architecture):
    model, source, taken = tiny.bridge(architecture), tiny.huggingface(architecture), []
    found = lp.UnitActivation(layers=[1]).run(model, TEXTS[0])
    last = {
        "gpt2": lambda: source.transformer.h[1].mlp.c_proj,
        "llama": lambda: source.model.layers[1].mlp.down_proj,
        "neox": lambda: source.gpt_neox.layers[1].mlp.dense_4h_to_h,
    }[architecture]()
    with last.register_forward_pre_hook(lambda module, given: taken.append(given[0])):
        source(found.token.id[None])
    assert found.unit[:2] == ("N0", "N1")
    torch.testing.assert_close(found.activation[0].T, taken[0].detach().reshape(len(found.token), -1))


@pytest.mark.parametrize("maker", MAKERS)
@pytest.mark.parametrize("at", ["neuron", "head", "resid_mid"])
def test_units_of_every_kind_are_those_of_the_models_cache_in_padded_batches_too(maker, at):
    model = getattr(tiny, maker)("gpt2")
    result = lp.UnitActivation(at=at, layers=[0, 2], units=[3, 1]).run(model, TEXTS, batch_size=2)
    view = ModelView(model)
    for prompt, text in enumerate(TEXTS):
        _, cache = model.run_with_cache(model.to_tokens(text))
        for row, layer in enumerate((0, 2)):
            values = cache[view.hook_units(at, layer)][0]
            expected = values.norm(dim=-1) if at == "head" else values
            own = result.activation[row][:, result.token.rows(prompt)]
            torch.testing.assert_close(own.T, expected[:, [3, 1]], rtol=1e-4, atol=1e-5)


def test_directions_are_products_with_the_state(gpt2):
    along = torch.randn(2, 32, generator=torch.Generator().manual_seed(0))
    result = lp.UnitActivation(at="resid_post", directions=along, layers=[1]).run(gpt2, TEXTS[0])
    _, cache = gpt2.run_with_cache(result.token.id[None])
    assert result.unit == ("D0", "D1")
    torch.testing.assert_close(result.activation[0].T, cache["blocks.1.hook_resid_post"][0] @ along.T)


def test_shares_by_hand(gpt2):
    result = lp.UnitActivation(layers=[1], units=[0, 1]).run(gpt2, "one two three")
    special = result.token.special
    assert special.tolist()[0] and not special[1:].any()
    n = len(special) - 1
    result.activation[0, 0] = torch.arange(n + 1).double()  # the special token, 0, is below all others
    result.activation[0, 1] = 7.0  # all are equal
    expected = [0.0, *((2 * i + 1) / (2 * n) for i in range(n))]
    assert result.share_below[0, 0].tolist() == pytest.approx(expected)
    assert result.share_below[0, 1].tolist() == [0.5] * (n + 1)
    assert result.share_below[..., ~special].mean(-1).tolist() == [[pytest.approx(0.5)] * 2]  # the null
    assert result.foremost() == [(0, 0), (0, 1)]


def test_what_is_not_known_has_no_share(gpt2):
    result = lp.UnitActivation(layers=[1], units=[0, 1]).run(gpt2, "one two three")
    result.activation[0, 0] = torch.nan
    result.activation[0, 1, 2] = torch.nan
    assert result.share_below[0, 0].isnan().all()
    assert result.share_below[0, 1].isnan().nonzero().tolist() == [[2]]


def test_the_units_that_are_far_above_their_usual_activation_at_a_word(gpt2):
    result = lp.UnitActivation(layers=[0, 1]).run(gpt2, TEXTS)
    table = result.most_active(" arrow" if " arrow" in result.token.text else 4, layer=1, prompt=1)
    row = result.token.row(1, " arrow" if " arrow" in result.token.text else 4)
    others = [i for i in range(len(result.token)) if i != row and not result.token.special[i]]
    values = result.activation[1].double().numpy()
    far = (values[:, row] - values[:, others].mean(1)) / values[:, others].std(1, ddof=1)
    assert table["unit"].tolist()[:5] == [result.unit[i] for i in (-far).argsort(kind="stable")[:5]]
    assert table["deviations"][0] == pytest.approx(far.max(), rel=1e-4) and set(table["tokens"]) == {len(others)}
    best = result.index_of("unit", table["unit"][0])
    assert table["share_below"][0] == float(result.share_below[1, best, row])
    assert result.most_active(4)["deviations"].is_monotonic_decreasing  # of layer 0


def test_a_text_of_special_tokens_has_no_share(gpt2):
    result = lp.UnitActivation(layers=[1], units=[0]).run(gpt2, "one")
    alone = lp.UnitActivation(layers=[1], units=[0]).run(gpt2, [result.token.id[:1].tolist()], prepend_bos=False)
    assert alone.token.special.all() and alone.share_below.isnan().all() and len(alone.figure().data) == 1


def test_in_bfloat16_activations_are_those_that_the_model_has():
    model = tiny.bridge("llama", dtype=torch.bfloat16)
    result = lp.UnitActivation(layers=[1]).run(model, TEXTS[0])
    _, cache = model.run_with_cache(result.token.id[None])
    assert result.activation.dtype == torch.float32
    torch.testing.assert_close(result.activation[0].T, cache["blocks.1.mlp.hook_post"][0].float(), rtol=0, atol=0)


@pytest.mark.usefixtures("as_users_run_it")
def test_what_cannot_be_asked_is_said(gpt2, monkeypatch):
    with pytest.raises(ValueError, match=r"UnitActivation\(directions=\.\.\.\) must have units=None and a read point"):
        lp.UnitActivation(directions=torch.eye(32))
    with pytest.raises(ValueError, match=r"unit 500 is out of range: .* has units 0 to 127"):
        lp.UnitActivation(units=[500]).run(gpt2, "one two")
    with pytest.raises(ValueError, match=r"UnitActivation\(at=\.\.\.\) must be 'neuron' or 'head' or"):
        lp.UnitActivation(at="mlp")
    result = lp.UnitActivation(layers=[1]).run(gpt2, "one two")
    for nothing in ([], "N5", 5):
        with pytest.raises(ValueError, match=r"units must be numbers or labels of units, such as .* got"):
            result.figure(units=nothing)
    monkeypatch.setattr("lens_probes.probes.unit_activation.LIMIT", 100.0)
    with pytest.raises(ValueError, match=r"activations must take at most 0 GB; got .*: use fewer layers, units or"):
        lp.UnitActivation().run(gpt2, "one two")


def test_the_figure_draws_the_units_that_stand_out_or_those_asked(gpt2):
    result = lp.UnitActivation(layers=[0, 1]).run(gpt2, TEXTS)
    drawn = result.figure(1, prompt=1).data[0]
    chosen = [result.index_of("unit", name) for name in drawn.y]
    assert len(chosen) == 20 and drawn.x[-1].endswith(f" {len(result.token.rows(1)) - 1}")
    rows = [row for row in result.token.rows(1) if not result.token.special[row]]
    own = result.activation[1][:, rows].numpy()
    out = (own.max(1) - own.mean(1)) / own.std(1, ddof=1)
    assert chosen == (-out).argsort(kind="stable")[:20].tolist()
    assert list(result.figure("0", units=["N5", 7]).data[0].y) == ["N5", "N7"]


def test_colours_end_where_those_of_ordinary_tokens_do(gpt2):
    result = lp.UnitActivation(at="resid_post", layers=[1]).run(gpt2, TEXTS[0])
    result.activation[..., result.token.special] = 1e5
    drawn, own = result.figure(units=range(32)).data[0], result.activation[0][:, ~result.token.special]
    assert (drawn.zmin, drawn.zmax) == (pytest.approx(-float(own.abs().max())), pytest.approx(float(own.abs().max())))
    lengths = lp.UnitActivation(at="head", layers=[1]).run(gpt2, TEXTS[0])
    drawn, own = lengths.figure().data[0], lengths.activation[0][:, ~lengths.token.special]
    assert (drawn.zmin, drawn.zmax) == (pytest.approx(float(own.min())), pytest.approx(float(own.max())))
