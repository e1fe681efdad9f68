"""What RankShift costs: `python benchmarks/rank_shift.py` prints a table of ratios, all of them from this one run.

The yardstick is the bare product: states in chunks of 124 rows (31 states of 4 tokens) times the whole float32
vocabulary matrix, output thrown away. Against it: `vocabulary.ranks` (rank and score of the own entry, rank of the
null), the way of the original (sort the whole vocabulary for every state), and the fastest blocked product found. Each
comparison alternates its two sides and prints the median of the ratios. Memory is read in processes of their own.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import normalize

import lens_probes as lp
from lens_probes.maths.vocabulary import ranks

LAYERS, ROUNDS = 30, 3
TOKENS = (64, 512, 4096)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # pyright: ignore[reportOptionalMemberAccess]
    parser.add_argument("--memory", type=int, metavar="TOKENS", help="print the extra peak memory in MB, nothing else")
    options = parser.parse_args()
    if options.memory:
        print(f"{extra_peak_memory(options.memory):.0f}")
        return
    model = lp.load_model("smollm2-135m")
    W_E = model.W_E.detach().float()
    directions = normalize(W_E, dim=-1)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {processor()}\n")
    print("| measured | tokens | against | ratio | range |")
    print("|---|---|---|---|---|")

    for n in TOKENS[:1]:
        row("rank, score and null", n, "bare product", *against_bare_product(W_E, directions, n))

    states, targets = example(64, len(W_E))
    ours, sorted_ = compare(lambda: ranks(states, W_E, targets), lambda: by_sorting(states, directions, targets), 3)
    row("sorting the vocabulary, as the original", 64, "rank, score and null", sorted_, ours)

    shapes = [(rows, block) for rows in (124, 512, 1024, 2048) for block in (2048, 4096, 8192, len(W_E))]
    once = {shape: timed(lambda shape=shape: product(states, directions, *shape)) for shape in shapes}
    best = min(once, key=once.__getitem__)
    blocked, bare = compare(
        lambda: product(states, directions, *best), lambda: product(states, directions, 124), ROUNDS
    )
    row(f"fastest blocked product ({best[0]} x {best[1]})", 64, "bare product", blocked, bare)

    texts = lp.demo.sentences()[:8]
    result = lp.RankShift().run(model, texts, progress=False)
    states, _ = example(len(result.token), len(W_E))
    whole, least = compare(
        lambda: lp.RankShift().run(model, texts, progress=False),
        lambda: (forward(model, result), product(states, directions, 124)),
        3,
    )
    row("RankShift().run, text to result", len(result.token), "forward pass + bare product", whole, least)

    print("\n| extra peak memory of RankShift().from_cache | tokens | MB |\n|---|---|---|")
    for n in TOKENS:
        command = [sys.executable, __file__, "--memory", str(n)]
        # The allocator gives freed memory back at once, so that what is read is memory in use.
        environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
        run = subprocess.run(command, capture_output=True, check=True, text=True, env=environment)
        print(f"| one prompt | {n:,} | {run.stdout.strip()} |")


def against_bare_product(vocabulary: Tensor, directions: Tensor, n: int) -> tuple[list[float], list[float]]:
    states, targets = example(n, len(vocabulary))
    return compare(lambda: ranks(states, vocabulary, targets), lambda: product(states, directions, 124), ROUNDS)


def example(n_tokens: int, n_vocab: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(LAYERS * n_tokens, 576, generator=generator)
    return states, torch.randint(0, n_vocab, (len(states), 2), generator=generator)


def product(states: Tensor, vocabulary: Tensor, rows: int, block: int | None = None) -> None:
    for some in vocabulary.split(block or len(vocabulary)):
        for chunk in states.split(rows):
            _ = chunk @ some.T


def by_sorting(states: Tensor, vocabulary: Tensor, targets: Tensor) -> list[Tensor]:
    found = []
    for chunk, ids in zip(normalize(states, dim=-1).split(124), targets.split(124), strict=True):
        order = (chunk @ vocabulary.T).argsort(dim=-1, descending=True)
        found += [(order == ids[:, k, None]).int().argmax(-1) for k in range(2)]
    return found


def forward(model: object, result: lp.Result) -> None:
    """The same batches through the model, with the same activations kept."""
    from lens_probes.reading import batches, pad

    view = lp.ModelView(model)
    for batch in batches(result.token, None):  # pyright: ignore[reportAttributeAccessIssue]
        view.activations(*pad(batch, view), [view.hook("resid_mid", layer) for layer in range(LAYERS)])


def timed(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def compare(one: Callable[[], object], other: Callable[[], object], rounds: int) -> tuple[list[float], list[float]]:
    """Seconds of both, alternating, after one warm-up where there is more than one round."""
    if rounds > 1:
        one()
        other()
    pairs = [(timed(one), timed(other)) for _ in range(rounds)]
    return [first for first, _ in pairs], [second for _, second in pairs]


def row(what: str, n: int, against: str, seconds: list[float], yardstick: list[float]) -> None:
    ratios = [first / second for first, second in zip(seconds, yardstick, strict=True)]
    print(f"| {what} | {n:,} | {against} | {statistics.median(ratios):.2f} | {min(ratios):.2f} to {max(ratios):.2f} |")


def processor() -> str:
    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return names[0].split(":")[1].strip() if names else "unknown processor"


def extra_peak_memory(n_tokens: int) -> float:
    """How far the resident memory rises above what model, tokens and cache already take, in MB (Linux)."""
    model = lp.load_model("smollm2-135m")
    view = lp.ModelView(model)
    ids = torch.randint(20, 40_000, (1, n_tokens), generator=torch.Generator().manual_seed(0))
    cache = {view.hook("resid_mid", layer): torch.randn(1, n_tokens, view.d_model) for layer in range(LAYERS)}
    lp.RankShift(layers=[0]).from_cache(model, ids[:, :8], {name: x[:, :8] for name, x in cache.items()})
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = memory("VmRSS")
    lp.RankShift().from_cache(model, ids, cache)
    return (memory("VmHWM") - before) / 1000


def memory(name: str) -> float:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return float(line.split()[1])


if __name__ == "__main__":
    main()
