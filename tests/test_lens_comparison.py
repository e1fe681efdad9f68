"""LensComparison: it is LogitLens through each translator, beside the plain one; the Jacobian lens is one of them."""

import pytest
import torch

import lens_probes as lp
from lens_probes.examples import tiny
from lens_probes.maths import inference

TEXTS = lp.demo.sentences()
FITTED, JUDGED = TEXTS[:40], TEXTS[40:52]


def doubled(state, label):
    return state * 2 if label != "2_post" else state


def turned(state, label):
    return state.flip(-1)


@pytest.mark.parametrize("architecture", ["gpt2", "gemma2", "bert"])
def test_each_lens_is_the_logit_lens_through_its_translator(architecture):
    model = tiny.bridge(architecture)
    result = lp.LensComparison({"turned": turned, "doubled": doubled}).run(model, JUDGED[:4])
    assert result.translator == ("logit lens", "turned", "doubled")
    for number, translator in enumerate((None, turned, doubled)):
        alone = lp.LogitLens(translator=translator).run(model, JUDGED[:4])
        torch.testing.assert_close(result.kl[number], alone.kl)
        assert torch.equal(result.agrees[number], (alone.top_ids[..., 0] == alone.final_id).float())
        assert torch.equal(result.decided[number], alone.decided_at())
        assert result.layer == alone.layer


def test_the_table_counts_types_equally_and_sets_each_lens_beside_the_plain_one(gpt2):
    result = lp.LensComparison({"doubled": doubled}).run(gpt2, JUDGED)
    table, own = result.table(), ~result.token.special
    change = (result.kl[1] - result.kl[0])[:, own].double().numpy()
    expected = inference.means(change, result.token[own])
    rows = table[table["translator"] == "doubled"]
    assert rows["effect"].tolist() == pytest.approx(expected["mean"].tolist())
    assert rows["low"].tolist() == pytest.approx(expected["low"].tolist(), nan_ok=True)
    assert rows["agrees"].iloc[-1] == pytest.approx(1) and rows["kl"].iloc[-1] == pytest.approx(0, abs=1e-5)
    by_layer = [
        float(((result.decided[1, own] >= 0) & (result.decided[1, own] <= at)).double().mean()) for at in range(4)
    ]
    assert rows["decided"].tolist() == pytest.approx(by_layer)
    assert (table[table["translator"] == "logit lens"]["effect"] == 0).all()


def test_a_lens_fitted_to_shuffled_pairs_is_no_better_than_one_fitted_to_its_own():
    model = tiny.bridge("gpt2")
    tuned, shuffled = (
        lp.TunedLens(steps=40, learning_rate=3e-3, shuffled=each).run(model, FITTED, progress=False)
        for each in (False, True)
    )
    result = lp.LensComparison({"tuned lens": tuned, "shuffled pairs": shuffled}).run(model, JUDGED)
    of = dict(zip(result.translator, result.kl[:, 1:-1][..., ~result.token.special].mean((1, 2)).tolist(), strict=True))
    assert of["tuned lens"] < of["shuffled pairs"] and of["tuned lens"] < of["logit lens"]
    assert result.findings()[0].startswith("Through tuned lens the mean KL to the model's own prediction is ")


def test_a_shuffled_fit_goes_on_as_one_that_was_not_interrupted(gpt2):
    half = lp.TunedLens(steps=3, shuffled=True).run(gpt2, FITTED[:6], progress=False)
    whole = lp.TunedLens(steps=6, shuffled=True).run(gpt2, FITTED[:6], progress=False)
    on = lp.TunedLens(steps=6, shuffled=True).run(gpt2, FITTED[:6], resume=half, progress=False)
    assert torch.equal(on.maps, whole.maps)
    with pytest.raises(ValueError, match="got one with other shuffled"):
        lp.TunedLens(steps=6).run(gpt2, FITTED[:6], resume=half, progress=False)


def test_the_figure_has_a_line_per_lens(gpt2):
    figure = lp.LensComparison({"turned": turned, "doubled": doubled}).run(gpt2, JUDGED).figure()
    lines = [trace.name for trace in figure.data if trace.showlegend]
    assert lines == ["logit lens", "turned", "doubled"]
    assert figure.layout.yaxis.type == "log" and figure.layout.yaxis2.type != "log"


class OneMatrix:
    """What lens_probes asks of TransformerLens's JacobianLens."""

    source_layers = (0, 1)

    def transport(self, state, layer):
        return (layer + 2) * state

    def validate_model(self, model):
        return self


def test_a_jacobian_lens_transports_the_states_that_it_knows_and_leaves_the_last_alone(gpt2):
    translator = lp.jacobian_lens(OneMatrix())
    result = lp.LogitLens(layers=[1, 2], translator=translator, top_k=0).run(gpt2, JUDGED[0])
    tripled = lp.LogitLens(
        layers=[1, 2], translator=lambda state, label: state * 3 if label == "1_post" else state, top_k=0
    ).run(gpt2, JUDGED[0])
    torch.testing.assert_close(result.kl, tripled.kl)
    with pytest.raises(ValueError, match="fitted for, 0_post, 1_post; got 0_pre"):
        lp.LogitLens(translator=translator).run(gpt2, JUDGED[0])


def test_a_fitted_jacobian_lens_reads_as_transformerlens_reads_it(tmp_path):
    from transformer_lens.tools.analysis import JacobianLens

    model = tiny.bridge("llama")
    fitted = JacobianLens.fit(model, FITTED[:3], corpus="a test", skip_first_positions=2, show_progress=False)
    path = tmp_path / "lens.pt"
    fitted.save(str(path), dtype=torch.float32)
    ids = torch.tensor([[0, 17, 45, 8, 99]])
    result = lp.LogitLens(translator=lp.jacobian_lens(path), layers=[1, 2], top_k=3).run(model, ids)
    theirs = fitted.readout(model, ids, layers=[1], top_k=3)
    assert torch.equal(result.top_ids[0], theirs.lens_topk_indices[1])
    with pytest.raises(ValueError, match="fitted for model"):
        lp.LogitLens(translator=lp.jacobian_lens(path), layers=[1, 2]).run(tiny.bridge("neox"), ids)


@pytest.mark.usefixtures("as_users_run_it")
def test_what_cannot_be_asked_is_said():
    with pytest.raises(ValueError, match="one translator or more, none of them 'logit lens'; got none"):
        lp.LensComparison({})
    with pytest.raises(ValueError, match="none of them 'logit lens'; got logit lens"):
        lp.LensComparison({"logit lens": doubled})
    with pytest.raises(TypeError, match="must be translators by name"):
        lp.LensComparison(doubled)
    with pytest.raises(TypeError, match="a JacobianLens of TransformerLens or the path of one; got 3"):
        lp.jacobian_lens(3)
