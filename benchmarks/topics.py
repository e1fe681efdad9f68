"""What HeadTopicSimilarity costs: `python benchmarks/topics.py` prints a table of ratios, all from this one run.

All 270 heads of SmolLM2 over the 600 prompts of ten topics, against the bare forward pass over the same batches with
the same activations kept; and 1,000 permutations of the topics, with as many resamples, against that pass. Rounds
alternate.
"""

import statistics

import torch
from rank_shift import processor, timed

import lens_probes as lp
from lens_probes.run import _batches, pad

ROUNDS = 3


def main() -> None:
    model = lp.load_model("smollm2-135m")
    view, topics, groups = lp.ModelView(model), lp.demo.topics(), lp.demo.templates()
    probe = lp.HeadTopicSimilarity()
    result = probe.run(model, topics, progress=False)  # warms up, too
    tokens = lp.prompts.tokenize(topics, view)
    hooks = probe.hooks(view)

    def forward() -> None:
        for batch in _batches(tokens, None):
            view.activations(*pad(batch, view), hooks)

    rounds = []
    for _ in range(ROUNDS):
        bare = timed(forward)
        measured = timed(lambda: probe.run(model, topics, progress=False))
        sums_only = timed(lambda: lp.HeadTopicSimilarity(keep_vectors=False).run(model, topics, progress=False))
        rounds.append((measured / bare, sums_only / bare, timed(lambda: result.test(groups=groups)) / bare))
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {processor()}\n")
    print("| measured, 600 prompts x 270 heads | against | ratio | range |")
    print("|---|---|---|---|")
    names = ("run", "run, keep_vectors=False", "test: 1,000 permutations and 1,000 resamples")
    for name, ratios in zip(names, zip(*rounds, strict=True), strict=True):
        span = f"{min(ratios):.2f} to {max(ratios):.2f}"
        print(f"| {name} | forward pass | {statistics.median(ratios):.2f} | {span} |")


if __name__ == "__main__":
    main()
