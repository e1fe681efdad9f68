"""InputReconstruction on SmolLM2: `python benchmarks/reconstruction_survey.py` saves what the notebook loads.

`sequential` on the 20 shortest of the built-in sentences, `gradient` on the first six of these, each at layers 0, 5, 15
and 29, on SmolLM2 and on an untrained twin: most of an hour on two cores. Not part of `make bench`.
"""

from pathlib import Path

import lens_probes as lp

SAVED = Path(__file__).parent / "saved"
LAYERS = (0, 5, 15, 29)


def main() -> None:
    trained = lp.load_model("smollm2-135m")
    texts = sorted(lp.demo.sentences(), key=len)[:20]
    models = {"trained": trained, "untrained": lp.untrained(trained)}
    for layer in LAYERS:
        for name, model in models.items():
            sequential = lp.InputReconstruction(layer, method="sequential")
            gradient = lp.InputReconstruction(layer, steps=100, restarts=2)
            for experiment, some in ((sequential, texts), (gradient, texts[:6])):
                result = experiment.run(model, some)
                result.save(SAVED / f"reconstruction_{experiment.method}_{name}_{layer}.safetensors")
                print(
                    name, experiment, f"{result.accuracy.mean():.3f} found, {result.exact.mean():.2f} exact", flush=True
                )


if __name__ == "__main__":
    main()
