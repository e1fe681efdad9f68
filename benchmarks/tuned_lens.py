"""What the third question of notebooks/logit_lens.ipynb loads: `python benchmarks/tuned_lens.py` saves it.

Three layers of SmolLM2: a tuned lens is fitted on the first 40 of the built-in sentences, and the logit lens of the
other 26 is saved, plain and through the fitted maps. About a minute on one quiet core; not part of `make bench`.
"""

import lens_probes as lp

SAVED = lp.demo.saved()
LAYERS = (4, 12, 20)


def main() -> None:
    model, sentences = lp.load_model("smollm2-135m"), lp.demo.sentences()
    tuned = lp.TunedLens(steps=30, layers=LAYERS, tokens_per_step=192).run(model, sentences[:40])
    for name, translator in {"plain": None, "fitted": tuned}.items():
        result = lp.LogitLens(layers=LAYERS, top_k=0, translator=translator).run(model, sentences[40:])
        result.save(SAVED / f"tuned_lens_{name}.safetensors")
        own = ~result.token.special
        print(name, "mean KL by layer:", [round(each, 2) for each in result.kl[:, own].mean(1).tolist()])


if __name__ == "__main__":
    main()
