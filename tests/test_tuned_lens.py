"""TunedLens: it comes nearer on text that it has not seen, undoes a planted rotation, and goes on where it stopped."""

from importlib.metadata import version
from unittest import mock

import pytest
import torch

import lens_probes as lp
from lens_probes.examples import tiny
from lens_probes.experiments import tuned_lens

TEXTS = lp.demo.sentences()
FITTED, HELD_OUT = TEXTS[:40], TEXTS[40:]


def held_out_kl(model, translator=None, prompts=HELD_OUT):
    result = lp.LogitLens(translator=translator, top_k=0).run(model, prompts)
    return result.kl[:, ~result.token.special].mean(1)


@pytest.mark.parametrize(
    "architecture",
    [
        "gpt2",
        pytest.param("llama", marks=pytest.mark.matrix),
        pytest.param("gemma2", marks=pytest.mark.matrix),
        pytest.param("bert", marks=pytest.mark.matrix),
    ],
)
def test_it_comes_nearer_on_held_out_text_at_every_layer_but_the_last_which_it_leaves_alone(architecture):
    model = tiny.bridge(architecture)
    tuned = lp.TunedLens(steps=60, learning_rate=3e-3).run(model, FITTED, progress=False)
    plain, translated = held_out_kl(model), held_out_kl(model, tuned)
    assert tuned.layer == ("0_pre", "0_post", "1_post") and tuned.last == "2_post"
    assert (translated[:-1] < plain[:-1]).all()
    assert translated[-1] == plain[-1]


def test_on_a_hookedtransformer_too():
    if version("transformer-lens").startswith("4."):
        pytest.skip("TransformerLens 4 has no HookedTransformer")
    model = tiny.hooked("llama", processed=True)
    tuned = lp.TunedLens(steps=30, learning_rate=3e-3).run(model, FITTED, progress=False)
    assert (held_out_kl(model, tuned)[:-1] < held_out_kl(model)[:-1]).all()


@pytest.mark.matrix
def test_it_undoes_a_planted_rotation():
    model = tiny.bridge("llama")
    random = torch.Generator().manual_seed(0)
    rotation = torch.linalg.qr(torch.randn(32, 32, generator=random)).Q
    with torch.no_grad():  # the last block turns the state and does nothing else
        model.blocks[2].attn.o.original_component.weight.zero_()
        model.blocks[2].mlp.out.original_component.weight.zero_()
    model.blocks[2].hook_out.register_forward_hook(lambda module, inputs, output: output @ rotation)
    ids = torch.randint(5, 400, (80, 48), generator=random)
    tuned = lp.TunedLens(steps=300, layers=[1], learning_rate=2e-2, tokens_per_step=384).run(
        model, ids[:64], progress=False
    )
    plain, translated = held_out_kl(model, None, ids[64:]), held_out_kl(model, tuned_or_plain(tuned), ids[64:])
    assert plain[2] > 0.1
    assert translated[2] < 1e-3


def tuned_or_plain(tuned):
    """A translator for every layer: the fitted ones, the others as they are."""
    return lambda state, label: tuned(state, label) if label in (*tuned.layer, tuned.last) else state


def test_a_fit_that_goes_on_equals_one_that_never_stopped(tmp_path):
    model = tiny.bridge("gpt2")
    whole = lp.TunedLens(steps=9, layers=[0]).run(model, FITTED, progress=False)
    half = lp.TunedLens(steps=4, layers=[0]).run(model, FITTED, progress=False)
    half.save(tmp_path / "half.safetensors")
    loaded = lp.TunedLensResult.load(tmp_path / "half.safetensors")
    rest = lp.TunedLens(steps=9, layers=[0]).run(model, FITTED, progress=False, resume=loaded)
    torch.testing.assert_close(rest.maps, whole.maps, rtol=0, atol=1e-6)
    torch.testing.assert_close(rest.loss, whole.loss, rtol=0, atol=1e-5)
    assert torch.equal(rest.loss[:, :4], half.loss)


def test_an_interrupt_gives_what_is_done_so_far(capsys):
    model, calls = tiny.bridge("gpt2"), iter([False, False, True])
    gradients = tuned_lens._gradients

    def interrupted(*arguments):
        if next(calls):
            raise KeyboardInterrupt
        return gradients(*arguments)

    with mock.patch.object(tuned_lens, "_gradients", interrupted):
        partial = lp.TunedLens(steps=5).run(model, FITTED, progress=False)
    told = capsys.readouterr()
    assert "interrupted after 2 of 5 steps\nto continue, run(..., resume=result)" in told.out + told.err
    assert partial.loss.shape == (3, 2)
    assert lp.TunedLens(steps=3).run(model, FITTED, progress=False, resume=partial).loss.shape == (3, 3)


def test_prompts_take_the_options_of_every_run():
    model = tiny.bridge("gpt2")
    plain, other = (lp.TunedLens(steps=1).run(model, FITTED, progress=False, prepend_bos=bos) for bos in (False, True))
    assert other.provenance.n_tokens == plain.provenance.n_tokens + len(FITTED)


def test_a_step_follows_the_gradient_of_the_mean_divergence():
    model = tiny.bridge("gpt2")
    view = lp.ModelView(model)
    tuned = lp.TunedLens(steps=1, layers=[0], tokens_per_step=1).run(model, ["A cat sat."], progress=False)
    ids = torch.tensor(model.tokenizer("A cat sat.")["input_ids"])
    ids = torch.cat([torch.tensor([model.tokenizer.bos_token_id]), ids]) if int(ids[0]) != 0 else ids
    _, cache = model.run_with_cache(ids[None])
    state, final = cache["blocks.0.hook_resid_post"][0, 1:], cache["blocks.2.hook_resid_post"][0, 1:]
    A = torch.eye(32, requires_grad=True)
    p = view.unembed(final).softmax(-1).detach()
    loss = (p * (p.log() - view.unembed(state @ A).log_softmax(-1))).sum(-1).mean()
    (gradient,) = torch.autograd.grad(loss, A)
    assert float(tuned.loss[1, 0]) == pytest.approx(float(loss.detach()), rel=1e-4)
    torch.testing.assert_close(tuned.gradient_mean[1, :-1], 0.1 * gradient, rtol=1e-3, atol=1e-6)


def test_contexts_of_the_caller_change_nothing():
    model, probe = tiny.bridge("gpt2"), lp.TunedLens(steps=2)
    plain = probe.run(model, FITTED[:4], progress=False)
    with torch.inference_mode():
        inside = probe.run(model, FITTED[:4], progress=False)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = probe.run(model, FITTED[:4], progress=False)
    assert torch.equal(plain.maps, inside.maps) and torch.equal(plain.maps, cast.maps)
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.usefixtures("as_users_run_it")
def test_what_does_not_belong_together_is_refused():
    model, other = tiny.bridge("gpt2"), tiny.bridge("gpt2", seed=1)
    tuned = lp.TunedLens(steps=1, layers=[1]).run(model, FITTED[:2], progress=False)
    with pytest.raises(ValueError, match=r"translator must come from .*; got one of tiny-gpt2"):
        lp.LogitLens(translator=tuned, layers=[1]).run(other, "A cat.")
    with pytest.raises(ValueError, match="must be of the layers that this lens was fitted for, 1_post; got 0_pre"):
        lp.LogitLens(translator=tuned).run(model, "A cat.")
    with pytest.raises(ValueError, match="must be of the layers that this lens was fitted for, 1_post; got 0_post"):
        tuned(torch.zeros(1, 32), "0_post")
    with pytest.raises(ValueError, match="one before the last, which needs no map; got 2_post only"):
        lp.TunedLens(layers=[-1]).run(model, FITTED)
    with pytest.raises(ValueError, match="resume must come from the same fit; got one with other layers: use the same"):
        lp.TunedLens(steps=1, layers=[0]).run(model, FITTED[:2], resume=tuned)
    for name, wrong in (("steps", 0), ("steps", 2.5), ("learning_rate", float("inf")), ("tokens_per_step", 0)):
        with pytest.raises(ValueError, match=rf"^TunedLens\({name}=\.\.\.\) must be a .*; got {wrong}$"):
            lp.TunedLens(**{name: wrong})
    more = lp.TunedLens(steps=2, layers=[1], seed=1, learning_rate=0.1)
    with pytest.raises(ValueError, match="got one with other learning_rate, seed, text: use the"):
        more.run(model, FITTED[:3], resume=tuned)
    done = lp.TunedLens(steps=2, layers=[1]).run(model, FITTED[:2], progress=False)
    with pytest.raises(ValueError, match=r"at most the 1 steps of TunedLens\(steps=\.\.\.\); got 2: use more"):
        lp.TunedLens(steps=1, layers=[1]).run(model, FITTED[:2], resume=done)
    with pytest.raises(TypeError, match=r"resume must be the result of an earlier run, or of .*; got 'a.safetensors'"):
        lp.TunedLens(steps=1).run(model, FITTED, resume="a.safetensors")
    with pytest.raises(ValueError, match="tokens that are not special; got special tokens only: pass text"):
        lp.TunedLens().run(model, [[model.tokenizer.bos_token_id]])


def test_the_figure_sets_the_end_beside_the_start():
    tuned = lp.TunedLens(steps=3).run(tiny.bridge("gpt2"), FITTED, progress=False)
    start, end = (trace for trace in tuned.figure().data if trace.name)
    assert list(start.y) == pytest.approx(tuned.loss[:, 0].tolist())
    assert list(end.y) == pytest.approx(tuned.loss.mean(1).tolist())
    assert tuned.figure().layout.yaxis.title.text == "mean KL(final || layer) (nats, 0 or more)"
    assert len(tuned.to_frame()) == 3 * 3 and "loss" in tuned.to_frame()


def test_a_fit_of_no_steps_has_nothing_to_draw():
    model = tiny.bridge("gpt2")
    with mock.patch.object(tuned_lens, "_gradients", side_effect=KeyboardInterrupt):
        nothing = lp.TunedLens(steps=2).run(model, FITTED, progress=False)
    with pytest.raises(ValueError, match="interrupted before its first step, and there is nothing to draw"):
        nothing.figure()
