"""Translators side by side on SmolLM2: `python benchmarks/translators.py` fits, compares and saves them.

Three layers. On the first 40 of the built-in sentences it fits a tuned lens, its null (shuffled pairs), and
TransformerLens's Jacobian lens; on the other 26 it compares them with the plain logit lens, and saves the comparison
for notebooks/logit_lens.ipynb. The tuned lenses take minutes.

The Jacobian lens takes one to two minutes of a core per prompt of 60 tokens (sentences joined by fours).
TransformerLens calls a hundred prompts of 128 tokens usable, so `--prompts 10` is a lens of too little text, and its
name says so. It is kept prompt by prompt in `jacobian_lens.pt` beside this file: a run goes on where the last one
stopped, and `--prompts 0` takes what is there. Not part of `make bench`.
"""

import argparse
from pathlib import Path
from typing import Any

from transformer_lens.tools.analysis import JacobianLens

import lens_probes as lp

JACOBIAN = Path(__file__).parent / "jacobian_lens.pt"
LAYERS = (4, 14, 24)
TOGETHER = 4  # sentences per prompt
CORPUS = "lens_probes.demo.sentences()[:40], by fours"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=10, help="of the Jacobian lens (default and most: 10)")
    model, sentences = lp.load_model("smollm2-135m"), lp.demo.sentences()
    fitted_on, judged_on = sentences[:40], sentences[40:]
    lens = jacobian(model, fitted_on, parser.parse_args().prompts)
    tuned, shuffled = (
        lp.TunedLens(steps=30, layers=LAYERS, tokens_per_step=192, shuffled=shuffled).run(model, fitted_on)
        for shuffled in (False, True)
    )
    translators = {
        "tuned lens": tuned,
        "tuned lens, shuffled pairs": shuffled,
        f"Jacobian lens of {lens.n_prompts} prompts": lp.jacobian_lens(lens),
    }
    result = lp.LensComparison(translators, layers=LAYERS).run(model, judged_on)
    result.save(lp.demo.saved() / "lens_comparison.safetensors")
    columns = ["translator", "layer", "kl", "kl_low", "kl_high", "agrees", "decided", "effect", "low", "high", "q"]
    print(result.table()[columns].round(3).to_string())
    print(*result.findings(), sep="\n")


def jacobian(model: Any, texts: list[str], n: int) -> Any:
    """The lens of at least n prompts, those of the file first; saved after each."""
    prompts = [" ".join(texts[i : i + TOGETHER]) for i in range(0, len(texts), TOGETHER)]
    lenses = [JacobianLens.load(str(JACOBIAN))] if JACOBIAN.exists() else []
    done = sum(lens.n_prompts for lens in lenses)
    for prompt in prompts[done:n]:
        lenses.append(JacobianLens.fit(model, [prompt], corpus=CORPUS, source_layers=LAYERS))
        lenses[-1].metadata["model_name"] = None  # a path here, which other machines do not have
        lenses = [JacobianLens.merge(lenses)]
        lenses[0].save(str(JACOBIAN))
    return lenses[0]


if __name__ == "__main__":
    main()
