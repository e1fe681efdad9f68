"""What HeadTopicSimilarity costs: `python benchmarks/topics.py` prints a table of ratios, all from this one run.

All 270 heads of SmolLM2 over the 600 prompts of ten topics, against the bare forward pass over the same batches with
the same activations kept; and 1,000 permutations of the topics, with as many resamples, against that pass. Rounds
alternate. Then the peak memory of a run with sums only on 600 and on 6,000 prompts, each in a process of its own.
"""

import statistics
import subprocess
import sys
from pathlib import Path

import torch
from rank_shift import memory, processor, timed

import lens_probes as lp
from lens_probes.reading import batches, pad
from lens_probes.text.prompts import tokenize

ROUNDS = 3


def peak(times: int) -> None:
    """Run once over so many copies of the prompts and print the peak memory beyond that of a few prompts, in MB."""
    model, topics = lp.load_model("smollm2-135m"), lp.demo.topics()
    probes = [lp.HeadTopicSimilarity(keep_vectors=False), lp.TopicActivity(keep_rows=False)]
    lp.run(probes, model, {topic: texts[:6] for topic, texts in topics.items()}, progress=False)
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far: loading the model takes more
    before = memory("VmRSS")
    lp.run(probes, model, {topic: texts * times for topic, texts in topics.items()}, progress=False)
    print(f"{(memory('VmHWM') - before) / 1000:.0f}")


def main() -> None:
    model = lp.load_model("smollm2-135m")
    view, topics, groups = lp.ModelView(model), lp.demo.topics(), lp.demo.templates()
    probe = lp.HeadTopicSimilarity()
    result = probe.run(model, topics, progress=False)  # warms up, too
    tokens = tokenize(topics, view)
    hooks = probe.hooks(view)

    def forward() -> None:
        for batch in batches(tokens, None):
            view.activations(*pad(batch, view), hooks)

    rounds = []
    for _ in range(ROUNDS):
        bare = timed(forward)
        measured = timed(lambda: probe.run(model, topics, progress=False))
        sums_only = timed(lambda: lp.HeadTopicSimilarity(keep_vectors=False).run(model, topics, progress=False))
        scan = timed(lambda: lp.TopicActivity().run(model, topics, progress=False))
        rounds.append(
            (measured / bare, sums_only / bare, timed(lambda: result.test(groups=groups)) / bare, scan / bare)
        )
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {processor()}\n")
    print("| measured, 600 prompts x 270 heads | against | ratio | range |")
    print("|---|---|---|---|")
    test = "test: 1,000 permutations and 1,000 resamples"
    names = ("run", "run, keep_vectors=False", test, "`TopicActivity`, run")
    for name, ratios in zip(names, zip(*rounds, strict=True), strict=True):
        span = f"{min(ratios):.2f} to {max(ratios):.2f}"
        print(f"| {name} | forward pass | {statistics.median(ratios):.2f} | {span} |")
    print("\n| extra peak memory, sums by topic only | prompts | MB |\n|---|---|---|")
    for times in (1, 10):
        child = subprocess.run([sys.executable, __file__, str(times)], stdout=subprocess.PIPE, text=True, check=True)
        print(f"| `HeadTopicSimilarity` and `TopicActivity` in one run | {600 * times:,} | {child.stdout.strip()} |")


if __name__ == "__main__":
    peak(int(sys.argv[1])) if sys.argv[1:] else main()
