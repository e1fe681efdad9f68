"""The pictures of the README: `python benchmarks/pictures.py` writes them to docs/ (needs `lens-probes[export]`)."""

from pathlib import Path

import lens_probes as lp

DOCS = Path(__file__).parent.parent / "docs"


def main() -> None:
    model = lp.load_model("smollm2-135m")
    texts = lp.demo.sentences()[:40]
    mean = lp.ResidualMean().run(model, texts)
    result = lp.RankShift(center=mean).run(model, texts)
    result.figure().write_image(DOCS / "rank_shift.png")
    result.figure_paths(prompt=1, token=2).write_image(DOCS / "paths.png")
    lens = lp.LogitLens().run(model, texts)
    lens.figure(prompt=4).write_image(DOCS / "logit_lens.png")
    pairs = lp.demo.pronoun_pairs()
    attention = lp.AttentionPair(pairs.query, pairs.keys).run(model, pairs.texts)
    attention.figure_test(attention.contrast()).write_image(DOCS / "attention.png")
    saved = lp.demo.saved()
    topics = lp.TopicAblationResult.load(saved / "topic_ablation_neuron.safetensors")
    topics.figure().write_image(DOCS / "topics.png")
    found = lp.InputReconstructionResult.load(saved / "reconstruction_gradient_trained_15.safetensors")
    found.figure_prompt(1).write_image(DOCS / "reconstruction.png")


if __name__ == "__main__":
    main()
