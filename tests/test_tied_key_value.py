"""TiedKeyValue: ties that change nothing, values made early, the shared vector by hand, and its refusals."""

import pytest
import torch

import lens_probes as lp
from lens_probes.examples import tiny
from lens_probes.experiments.tied_key_value import WAYS, Fit, shared
from lens_probes.model import ModelView
from lens_probes.text.prompts import first_part, tokenize

TEXTS = lp.demo.sentences()[:8]


def test_values_are_made_before_the_model_makes_them(decoder):
    model = decoder.build()
    view = ModelView(model)
    ids = torch.arange(5, 17).view(1, 12)
    names = [view.hook("resid_pre", 1), view.hook_value(1)]
    found = view.activations(ids, torch.ones(1, 12, dtype=torch.bool), names)
    torch.testing.assert_close(view.values(1, found[names[0]]), found[names[1]], rtol=0, atol=1e-5)


def test_a_model_whose_values_are_its_keys_loses_nothing(decoder):
    model = getattr(tiny, decoder.maker)(decoder.architecture, processed=decoder.processed)
    view = ModelView(model)
    for block in model.blocks:
        equal_values_to_keys(block.attn, view)
    texts = lp.TiedKeyValue(layers=[0, 1]).run(model, TEXTS, progress=False)
    assert texts.increase.abs().max() < 1e-4
    assert (texts.kept > 0.9999).all()


def equal_values_to_keys(attention, view):
    """Give values the weights and bias of keys, wherever this class keeps them."""
    with torch.no_grad():
        if view.class_name == "HookedTransformer":
            names = ("_W_V", "_W_K", "_b_V", "_b_K") if hasattr(attention, "_W_V") else ("W_V", "W_K", "b_V", "b_K")
            for to, of in (names[:2], names[2:]):
                getattr(attention, to).copy_(getattr(attention, of))
            return
        for to, of in zip(attention.v.parameters(), attention.k.parameters(), strict=True):
            to.copy_(of)


def test_ties_in_one_place_change_what_they_say():
    model = tiny.bridge("llama")
    view = ModelView(model)
    result = lp.TiedKeyValue(layers=[1]).run(model, TEXTS, progress=False)
    assert result.way == WAYS and (result.increase.abs() > 1e-5).all()
    # Put together again from the model's own pieces: the root mean squares of the one part, the loss of the other.
    tokens = tokenize(TEXTS, view)
    first = first_part(tokens, 0.5)
    key_name, value_name = "blocks.1.attn.hook_k", "blocks.1.attn.hook_v"
    fitted = {key_name: [], value_name: []}
    for _, own in tokens[first].by_prompt():
        found = view.activations(own.id[None], torch.ones(1, len(own), dtype=torch.bool), list(fitted))
        for name, activation in found.items():
            fitted[name].append(activation[0])
    key_rms, value_rms = (torch.cat(each).square().mean((0, 2)).sqrt()[:, None] for each in fitted.values())
    scale = key_rms / value_rms
    rest = tokens[~first]
    own = rest.id[rest.prompt == rest.prompt[0]]
    with torch.no_grad():
        _, cache = model.run_with_cache(own[None])
    keys, values = cache[key_name], cache[value_name]
    for way, name, tied in (
        ("keys are values", key_name, values * scale),
        ("keys are values, unscaled", key_name, values),
        ("values are keys", value_name, keys / scale),
        ("values are keys, unscaled", value_name, keys),
    ):
        with torch.no_grad():
            hooks = [(name, lambda x, hook, tied=tied: tied)]
            logits = model.run_with_hooks(own[None], return_type="logits", fwd_hooks=hooks)
        log_prob = logits[0].log_softmax(-1)[:-1].gather(1, own[1:, None])[:, 0]
        assert float(result.tied[WAYS.index(way), 0, 0]) == pytest.approx(-float(log_prob.mean()), abs=1e-4), way


def test_a_shared_vector_of_full_width_gives_keys_and_values_back():
    random = torch.Generator().manual_seed(0)
    keys, values = torch.randn(2, 5, 1, 2, generator=random)
    whole = Fit(torch.tensor([2.0]), torch.tensor([0.5]), torch.zeros(1, 4), torch.eye(4)[None], torch.ones(1))
    for back, own in zip(shared(whole, keys, values), (keys, values), strict=True):
        torch.testing.assert_close(back, own)
    first_two = whole._replace(directions=torch.eye(4)[None, :2])  # the directions of keys only
    back = shared(first_two, keys, values)
    torch.testing.assert_close(back[0], keys)
    assert (back[1] == 0).all()


def test_parts_are_told_by_what_prompts_are():
    view = ModelView(tiny.bridge("gpt2"))
    tokens, turned = (tokenize(texts, view) for texts in (TEXTS, TEXTS[::-1]))
    chosen, again = (first_part(each, 0.5) for each in (tokens, turned))
    assert sorted(tokens.id[chosen].tolist()) == sorted(turned.id[again].tolist())
    assert len(tokens.prompt[chosen].unique()) == 4
    thrice = tokenize([text for text in TEXTS[:3] for _ in range(3)], view)
    first = first_part(thrice, 0.5)
    assert not set(map(tuple, texts_of(thrice[first]))) & set(map(tuple, texts_of(thrice[~first])))


def texts_of(tokens):
    return [own.id.tolist() for _, own in tokens.by_prompt()]


def test_an_interrupt_leaves_the_places_done(monkeypatch):
    from lens_probes.experiments import tied_key_value

    original, calls = tied_key_value.prompt_loss, []

    def interrupted(*arguments):
        calls.append(arguments)
        if len(calls) == 1 + len(WAYS) + 2:
            raise KeyboardInterrupt
        return original(*arguments)

    monkeypatch.setattr(tied_key_value, "prompt_loss", interrupted)
    result = lp.TiedKeyValue().run(tiny.bridge("gpt2"), TEXTS, progress=False)
    assert result.place == ("L0",) and result.tied.shape[1] == 1


def test_tables_and_figures():
    result = lp.TiedKeyValue(at="kv_head", layers=[0]).run(
        tiny.bridge("qwen3"), lp.demo.sentences()[:16], progress=False
    )
    table = result.table()
    assert len(table) == 10 and (table["low"] <= table["increase"]).all() and (table["increase"] <= table["high"]).all()
    assert table["increase"].tolist() == pytest.approx(result.increase.flatten().tolist(), abs=1e-5)
    assert [list(row) for row in result.figure().data[0].z] == result.increase.T.tolist()
    assert result.place == ("L0KV0", "L0KV1")
    assert result.figure().layout.title.text.startswith("<b>Increase of the loss with keys and values tied (untied: ")
    assert result.to_frame()["increase"].tolist() == result.increase.flatten().tolist()


@pytest.mark.usefixtures("as_users_run_it")
def test_what_cannot_be_asked_is_said():
    with pytest.raises(ValueError, match=r"TiedKeyValue\(at=...\) must be 'kv_head', 'layer' or 'all'; got 'head'"):
        lp.TiedKeyValue(at="head")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"TiedKeyValue\(fraction=...\) must be a number between 0 and 1; got 1"):
        lp.TiedKeyValue(fraction=1)
    with pytest.raises(ValueError, match=r"must include two different ones, .*; got"):
        lp.TiedKeyValue().run(tiny.bridge("gpt2"), "One text.")
    with pytest.raises(ValueError, match="predicts masked ones"):
        lp.TiedKeyValue().run(tiny.bridge("bert"), TEXTS)
