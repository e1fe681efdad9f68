"""What single probes cost: `python benchmarks/seeds.py` prints ratios of this one run, in about two minutes.

Each probe or experiment against as many bare passes over the same tokens as its help says it takes: forward passes to
the logits that keep nothing, and for images forward and backward passes that end at the same layer. Rounds alternate.
All but CrossAttention are on SmolLM2; that reads a BART of random weights, as large as BART-base.
"""

from typing import Any

import torch
from rank_shift import compare, processor
from reconstruction import row
from transformer_lens.tools.analysis import JacobianLens
from translators import JACOBIAN, LAYERS

import lens_probes as lp
from lens_probes.examples import tiny
from lens_probes.model import DecoderView, ModelView, StemView
from lens_probes.reading import batches, pad, prompt_loss
from lens_probes.text.prompts import Tokens, tokenize

ROUNDS, STEPS = 3, 10


def main() -> None:
    model = lp.load_model("smollm2-135m")
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {processor()}\n")
    print("| measured | against | ratio | range |\n|---|---|---|---|")
    values(model)
    windows(model)
    depths(model)
    sources()
    images(model)


def values(model: Any) -> None:
    view, texts = ModelView(model), lp.demo.sentences()[:12]
    tokens, probe = tokenize(texts, view), lp.HeadValueRank(layers=[0, 15, -1])
    pair = compare(lambda: probe.run(model, texts, progress=False), lambda: forward(view, tokens), ROUNDS)
    row(f"`HeadValueRank`, layers 0, 15 and 29, {len(tokens)} tokens", "forward pass", *pair)


def windows(model: Any) -> None:
    view = ModelView(model)
    prompt = [tokenize([" ".join(lp.demo.sentences())], view).id[:200]]
    tokens, experiment = tokenize(prompt, view), lp.AttentionWindow(radii=[16])

    def bare() -> None:
        for _ in range(1 + 4):
            prompt_loss(view, tokens)

    pair = compare(lambda: experiment.run(model, prompt, progress=False), bare, ROUNDS)
    row("`AttentionWindow`, all layers, one radius: 5 passes over 200 tokens", "as many bare passes", *pair)


def depths(model: Any) -> None:
    view, texts = ModelView(model), lp.demo.sentences()[:12]
    tokens, few = tokenize(texts, view), tokenize(texts[:6], view)
    experiment, probe = lp.LayerSkip(layers=[0, 15, -1]), lp.MassiveActivations()

    def bare() -> None:
        for _ in range(1 + 4 * 3):
            forward(view, few)

    def with_patterns() -> None:
        for batch in batches(tokens):
            view.activations(*pad(batch, view), probe.hook_names(view))

    pair = compare(lambda: experiment.run(model, texts[:6], progress=False), bare, ROUNDS)
    row(f"`LayerSkip`, 3 layers: 13 passes over {len(few)} tokens", "as many bare passes", *pair)
    lens = lp.LensComparison({"Jacobian": lp.jacobian_lens(JacobianLens.load(str(JACOBIAN)))}, layers=LAYERS)
    pair = compare(lambda: lens.run(model, texts, progress=False), lambda: forward(view, tokens), ROUNDS)
    row(f"`LensComparison`, plain and one translator, 3 layers, {len(tokens)} tokens", "forward pass", *pair)
    pair = compare(lambda: probe.run(model, texts, progress=False), with_patterns, ROUNDS)
    row(f"`MassiveActivations`, {len(tokens)} tokens", "forward pass with the same activations", *pair)
    dimension = lp.StateDimension(layers=[10])
    pair = compare(lambda: dimension.run(model, texts, progress=False), lambda: forward(view, tokens), ROUNDS)
    row(f"`StateDimension`, layer 10, {len(tokens)} tokens", "forward pass", *pair)


def sources() -> None:
    model, texts = bart(), lp.demo.sentences()
    pairs = [lp.Prompt(text, target=target) for text, target in zip(texts[:12], texts[12:24], strict=True)]
    view, targets = DecoderView(model).given(pairs)
    tokens = tokenize(targets, view)
    pair = compare(lambda: lp.CrossAttention().run(model, pairs, progress=False), lambda: forward(view, tokens), ROUNDS)
    assert view.sources is not None
    n = f"{len(view.sources)} source and {len(tokens)} target tokens"
    row(f"`CrossAttention` of a random BART-base, {n}", "forward pass", *pair)


def images(model: Any) -> None:
    stem, given = lp.stems.orthogonal(model), torch.rand(2, 3, 80, 80, generator=torch.Generator().manual_seed(0))
    view = StemView(model, stem)
    hook = view.hook("resid_post", 5)

    def bare(n_images: int, times: int) -> None:
        pixels = given[:1].repeat(n_images, 1, 1, 1).requires_grad_()
        for _ in range(times):
            torch.autograd.grad(view.activation(pixels, hook).sum(), pixels)

    search = lp.ImageReconstruction(5, stem=stem, steps=STEPS)
    pair = compare(lambda: search.run(model, given, progress=False), lambda: bare(1, 2 * (STEPS + 1)), ROUNDS)
    passes = f"{STEPS + 1} passes forward and back"
    row(f"`ImageReconstruction`, layer 5, 25 patches: {passes} per image", "as many bare passes", *pair)
    ascent = lp.FeatureVisualization(5, [3], at="resid_post", stem=stem, steps=STEPS)
    pair = compare(lambda: ascent.run(model, given, progress=False), lambda: bare(3, STEPS + 1), ROUNDS)
    row(
        f"`FeatureVisualization(stem=...)`, layer 5, 25 patches, 3 restarts: {passes} per unit",
        "as many bare passes",
        *pair,
    )


def forward(view: ModelView, tokens: Tokens) -> None:
    """The model's logits of the same batches."""
    for batch in batches(tokens, None, view.sources):
        own = view.of_batch(batch)
        own.logits(*pad(batch, own))


def bart() -> Any:
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import BartConfig, BartForConditionalGeneration

    sizes = {f"{part}_{what}": n for part in ("encoder", "decoder") for what, n in SIZES.items()}
    settings: dict[str, Any] = sizes | {"d_model": 768, "forced_eos_token_id": None, "decoder_start_token_id": 2}
    config = BartConfig(**settings, architectures=["BartForConditionalGeneration"])
    model = BartForConditionalGeneration(config).eval()
    model.set_attn_implementation("eager")
    return TransformerBridge.boot_transformers(
        "random-bart", hf_model=model, tokenizer=tiny.tokenizer("bart"), device="cpu"
    )


SIZES = {"layers": 6, "attention_heads": 12, "ffn_dim": 3072}

if __name__ == "__main__":
    main()
