"""What the reconstruction notebook loads: `python benchmarks/reconstruction_survey.py` saves it in `lp.demo.saved()`.

SmolLM2 and an untrained twin, on the 20 shortest of the built-in sentences: what a sequential search finds from
layers 0, 5, 15 and 29, what descent finds of the first twelve, and how far seven layers reach. About two hours on one
core; not part of `make bench`.
"""

import lens_probes as lp

SAVED = lp.demo.saved()
LAYERS = (0, 5, 15, 29)


def main() -> None:
    trained = lp.load_model("smollm2-135m")
    texts = sorted(lp.demo.sentences(), key=len)[:20]
    for name, model in {"trained": trained, "untrained": lp.untrained(trained)}.items():
        reach = lp.PositionReach(projections=4, layers=[0, 5, 10, 15, 20, 25, 29])
        reach.run(model, texts).save(SAVED / f"reach_{name}.safetensors")
        for layer in LAYERS:
            sequential = lp.InputReconstruction(layer, method="sequential")
            gradient = lp.InputReconstruction(layer, steps=100, restarts=2)
            for experiment, some in ((sequential, texts), (gradient, texts[:12])):
                result = experiment.run(model, some)
                result.save(SAVED / f"reconstruction_{experiment.method}_{name}_{layer}.safetensors")
                print(
                    name, experiment, f"{result.accuracy.mean():.3f} found, {result.exact.mean():.2f} exact", flush=True
                )


if __name__ == "__main__":
    main()
