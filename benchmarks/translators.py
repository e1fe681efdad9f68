"""What notebooks/logit_lens.ipynb shows of translators side by side: `python benchmarks/translators.py` saves it.

Six layers of SmolLM2. On the first 40 of the built-in sentences it fits a tuned lens, its null (shuffled pairs), and
TransformerLens's Jacobian lens; on the other 26 it compares them with the plain logit lens. The tuned lenses take
minutes. The Jacobian lens takes half an hour or more on two cores: sentences are joined by fours to ten prompts of some
60 tokens, where TransformerLens calls a hundred of 128 usable. It is therefore a lens of too little text, kept as
`saved/jacobian_lens_10_prompts.pt`; delete the file to fit it again. Not part of `make bench`.
"""

from pathlib import Path

from transformer_lens.tools.analysis import JacobianLens

import lens_probes as lp

SAVED = Path(__file__).parent / "saved"
JACOBIAN = SAVED / "jacobian_lens_10_prompts.pt"
LAYERS = (4, 9, 14, 19, 24, 28)
TOGETHER = 4  # sentences
CORPUS = "lens_probes.demo.sentences()[:40], by fours"


def main() -> None:
    model, sentences = lp.load_model("smollm2-135m"), lp.demo.sentences()
    fitted_on, judged_on = sentences[:40], sentences[40:]
    if not JACOBIAN.exists():
        prompts = [" ".join(fitted_on[i : i + TOGETHER]) for i in range(0, len(fitted_on), TOGETHER)]
        lens = JacobianLens.fit(model, prompts, corpus=CORPUS, source_layers=LAYERS)
        lens.save(str(JACOBIAN))
    tuned, shuffled = (
        lp.TunedLens(steps=60, layers=LAYERS, tokens_per_step=192, shuffled=shuffled).run(model, fitted_on)
        for shuffled in (False, True)
    )
    translators = {
        "tuned lens": tuned,
        "tuned lens, shuffled pairs": shuffled,
        "Jacobian lens, 10 prompts": lp.jacobian_lens(JACOBIAN),
    }
    result = lp.LensComparison(translators, layers=LAYERS).run(model, judged_on)
    result.save(SAVED / "lens_comparison.safetensors")
    columns = ["translator", "layer", "kl", "kl_low", "kl_high", "agrees", "decided", "effect", "low", "high", "q"]
    print(result.table()[columns].round(3).to_string())
    print(*result.findings(), sep="\n")


if __name__ == "__main__":
    main()
