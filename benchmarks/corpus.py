"""What a corpus costs: `python benchmarks/corpus.py` prints a table of ratios, all of them from this one run.

Prompts have 64 tokens each, so that `lp.run` and a corpus make the same batches. Each comparison alternates its two
sides and prints the median of the ratios. `--workers` compares two Ray workers of one thread with one; it needs two
cores without other work, and `pip install "lens-probes[ray]"`.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import lens_probes as lp
from lens_probes.model import ModelView
from lens_probes.reading import batches, pad
from lens_probes.text.prompts import tokenize

LENGTH, ROUNDS = 64, 3
RANKS = lp.Summary(lp.RankShift())
NEURONS = lp.MaxActivatingExamples()


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # pyright: ignore[reportOptionalMemberAccess]
    parser.add_argument("--tokens", type=int, default=2048, help="length of the corpus")
    parser.add_argument("--workers", action="store_true", help="compare two Ray workers with one")
    options = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {options.tokens:,} tokens\n")
    print("| measured | against | ratio | range |")
    print("|---|---|---|---|")
    if options.workers:
        one, two = (workers(n, options.tokens) for n in (1, 2))
        print(f"| tokens per second of two workers, one thread each | of one | {two / one:.2f} | |")
        return
    model, ids = lp.load_model("smollm2-135m"), prompts(options.tokens)
    row(
        "`run_corpus`, `Summary(RankShift())`",
        "`lp.run`",
        lambda: corpus(model, ids, RANKS),
        lambda: run(model, ids, RANKS),
    )
    row(
        "`lp.run`, `Summary(RankShift())`",
        "`lp.run`, `RankShift()`",
        lambda: run(model, ids, RANKS),
        lambda: run(model, ids, lp.RankShift()),
    )
    row(
        "`MaxActivatingExamples()`, all neurons",
        "forward pass with the same activations",
        lambda: run(model, ids, NEURONS),
        lambda: passes(model, ids),
    )
    tiny = lp.tiny.bridge()
    for n in (1, 4):
        few, many = ids_below(prompts(n * options.tokens), 400), ids_below(prompts(4 * n * options.tokens), 400)
        row(
            f"tiny model, {4 * n * options.tokens:,} tokens, `Summary(RankShift())`",
            f"{n * options.tokens:,} tokens",
            lambda many=many: run(tiny, many, RANKS),
            lambda few=few: run(tiny, few, RANKS),
        )


def prompts(tokens: int) -> torch.Tensor:
    """Random ids, a prompt per row."""
    return torch.randint(20, 40_000, (tokens // LENGTH, LENGTH), generator=torch.Generator().manual_seed(0))


def ids_below(ids: torch.Tensor, n: int) -> torch.Tensor:
    """Ids of a small vocabulary."""
    return 20 + ids % (n - 20)


def run(model: Any, ids: torch.Tensor, probe: Any) -> None:
    """In memory."""
    probe.run(model, ids, progress=False)


def corpus(model: Any, ids: torch.Tensor, probe: Any) -> None:
    """Through a folder."""
    with tempfile.TemporaryDirectory() as folder:
        lp.run_corpus([probe], model, list(ids), Path(folder) / "run", progress=False)


def passes(model: Any, ids: torch.Tensor) -> None:
    """Forward passes that keep every layer's neurons."""
    view = ModelView(model)
    names = list(NEURONS.hooks(view).values())
    for batch in batches(tokenize(ids, view)):
        view.activations(*pad(batch, view), names)


def workers(n: int, tokens: int) -> float:
    """Tokens per second of so many workers, their start not counted: that of one shard is."""
    ids = prompts(tokens)

    def timed(texts: list[torch.Tensor]) -> float:
        with tempfile.TemporaryDirectory() as folder:
            begun = time.perf_counter()
            lp.cluster.run_corpus(
                [RANKS], load_on_one_thread, texts, Path(folder) / "run", workers=n, shard_size=8, progress=False
            )
            return time.perf_counter() - begun

    return len(ids) * LENGTH / (timed(list(ids)) - timed(list(ids[:8])))


def load_on_one_thread() -> Any:
    """The demo model, in a process of one thread."""
    torch.set_num_threads(1)
    return lp.load_model("smollm2-135m")


def row(measured: str, against: str, ours: Callable[[], object], theirs: Callable[[], object]) -> None:
    """One line of the table."""
    ratios = []
    for _ in range(ROUNDS + 1):  # the first warms up
        seconds = []
        for each in (ours, theirs):
            begun = time.perf_counter()
            each()
            seconds.append(time.perf_counter() - begun)
        ratios.append(seconds[0] / seconds[1])
    ratios = ratios[1:]
    print(
        f"| {measured} | {against} | {statistics.median(ratios):.2f} | {min(ratios):.2f} to {max(ratios):.2f} |",
        flush=True,
    )


if __name__ == "__main__":
    main()
