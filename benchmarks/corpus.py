"""What a corpus costs: `python benchmarks/corpus.py` prints a table of ratios, all of them from this one run.

Parts may be named: `python benchmarks/corpus.py run examples --tokens 20480`. Each comparison alternates its two sides
after a short warm-up, and prints the median of the ratios of their times. Prompts have 64 tokens each where `lp.run`
and a corpus must make the same batches.

    run        run_corpus against lp.run; a Summary against the rows
    examples   MaxActivatingExamples of all neurons against forward passes that keep the same activations
    sorted     texts of very different lengths: batches of similar lengths against batches in the order of the texts
    growth     twice as many tokens, layers or units
    memory     resident memory of a tiny model's run, up to --memory-tokens (not by default)
    workers    two Ray workers of one thread against one, and one against this process (not by default: it needs two
               cores without other work, and `pip install "lens-probes[ray]"`)
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

import lens_probes as lp
from lens_probes.model import ModelView
from lens_probes.reading import batches, pad
from lens_probes.text.prompts import tokenize

LENGTH, WARM = 64, 8  # tokens per prompt; prompts of a warm-up
RANKS = lp.Summary(lp.RankShift())
NEURONS = lp.MaxActivatingExamples()
TINY_VOCAB = 400
Ids = Sequence[torch.Tensor]
Work = Callable[[Ids], object]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)} (default: the first four)")
    parser.add_argument("--tokens", type=int, default=2048, help="length of the corpus (default: 2048)")
    parser.add_argument("--memory-tokens", type=int, default=1_000_000, help="of part memory (default: 1000000)")
    parser.add_argument("--rounds", type=int, default=3, help="of each comparison (default: 3)")
    options = parser.parse_args()
    parts = options.parts or list(PARTS)[:4]
    if unknown := set(parts).difference(PARTS):
        parser.error(f"a part must be one of {', '.join(PARTS)}; got {min(unknown)}")
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {options.tokens:,} tokens\n")
    print("| measured | against | ratio | range | must be |")
    print("|---|---|---|---|---|", flush=True)
    for part in parts:
        PARTS[part](options)


def of_run(options: argparse.Namespace) -> None:
    """A corpus with its folder, and a summary."""
    model, ids = lp.load_model("smollm2-135m"), prompts(options.tokens)
    row(
        "`run_corpus`, `Summary(RankShift())`: weights hashed, files written",
        "`lp.run`",
        lambda some: corpus(model, some, RANKS),
        lambda some: run(model, some, RANKS),
        ids,
        options.rounds,
        "at most 1.03",
    )
    row(
        "`lp.run`, `Summary(RankShift())`",
        "`lp.run`, `RankShift()`",
        lambda some: run(model, some, RANKS),
        lambda some: run(model, some, lp.RankShift()),
        ids,
        options.rounds,
    )


def of_examples(options: argparse.Namespace) -> None:
    """All neurons."""
    model, ids = lp.load_model("smollm2-135m"), prompts(options.tokens)
    row(
        "`MaxActivatingExamples()`, all 46,080 neurons",
        "cached forward pass: `run_with_cache` of the same activations",
        lambda some: run(model, some, NEURONS),
        lambda some: cached(model, some),
        ids,
        options.rounds,
        "at most 1.3",
    )
    row(
        "the same",
        "a pass that ends at the last of them, without logits",
        lambda some: run(model, some, NEURONS),
        lambda some: passes(model, some),
        ids,
        options.rounds,
    )


def of_sorted(options: argparse.Namespace) -> None:
    """Texts of 8 to 512 tokens, half of them shorter than 64."""
    model, probe = lp.load_model("smollm2-135m"), lp.ResidualMean()
    random = torch.Generator().manual_seed(0)
    ids, left = [], options.tokens
    while left > 0:
        length = int((64 * torch.randn((), generator=random).exp()).clamp(8, 512))
        ids.append(torch.randint(20, 40_000, (length,), generator=random))
        left -= length
    row(
        "`run_corpus`, `ResidualMean()`, texts of 8 to 512 tokens",
        "`lp.run`: batches in the order of the texts",
        lambda some: corpus(model, some, probe),
        lambda some: run(model, some, probe),
        ids,
        options.rounds,
    )


def of_growth(options: argparse.Namespace) -> None:
    """Twice as much of everything."""
    tiny, ids = lp.tiny.bridge(), prompts(4 * options.tokens, TINY_VOCAB)
    for n in (1, 2):
        few = n * options.tokens // LENGTH
        row(
            f"a tiny model, `Summary(RankShift())`, {2 * few * LENGTH:,} tokens",
            f"{few * LENGTH:,} tokens",
            lambda some: run(tiny, some, RANKS),
            lambda some: run(tiny, some[: len(some) // 2], RANKS),
            ids[: 2 * few],
            options.rounds,
            "about 2 or less",
        )
    model, ids = lp.load_model("smollm2-135m"), prompts(options.tokens // 2)
    all_layers, half = (lp.Summary(lp.RankShift(layers=range(n))) for n in (20, 10))
    row(
        "`Summary(RankShift())`, 20 layers",
        "10 layers",
        lambda some: run(model, some, all_layers),
        lambda some: run(model, some, half),
        ids,
        options.rounds,
        "about 2 or less",
    )
    all_units, half_of_them = (lp.MaxActivatingExamples(units=range(n)) for n in (1536, 768))
    row(
        "`MaxActivatingExamples()`, 1,536 neurons per layer",
        "768 neurons",
        lambda some: run(model, some, all_units),
        lambda some: run(model, some, half_of_them),
        ids,
        options.rounds,
        "about 2 or less",
    )


def of_memory(options: argparse.Namespace) -> None:
    """Resident memory at powers of ten of the tokens that were read."""
    model, read = lp.tiny.bridge(), 0
    at = [*(10**n for n in range(4, 10) if 10**n < options.memory_tokens), options.memory_tokens]
    found: list[tuple[int, float]] = []

    def texts() -> Iterator[torch.Tensor]:
        nonlocal read
        for block in range(options.memory_tokens // (LENGTH * 256) + 1):
            for ids in prompts(LENGTH * 256, TINY_VOCAB, seed=block):
                if read >= at[len(found)]:
                    found.append((read, resident()))
                if len(found) == len(at):
                    return
                yield ids
                read += LENGTH

    begun = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        lp.run_corpus([RANKS, NEURONS], model, texts(), Path(folder) / "run", progress=False)
    (first, least), *others = found
    for read, megabytes in others:
        print(f"| resident memory, a tiny model, {read:,} tokens | {first:,} tokens | {megabytes / least:.2f} | | |")
    print(f"| | | {least:,.0f} to {found[-1][1]:,.0f} MB | {time.perf_counter() - begun:.0f} s | |", flush=True)


def resident() -> float:
    """The memory of this process, in MB (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith("VmRSS")) / 1000


def of_workers(options: argparse.Namespace) -> None:
    """Tokens per second, the start not counted: that of a run over one shard is."""
    ids = prompts(options.tokens)
    torch.set_num_threads(1)
    model = lp.load_model("smollm2-135m")
    here = after_start(lambda some: corpus(model, some, RANKS, shard_size=WARM), ids)
    one, two = (after_start(lambda some, n=n: with_ray(n, some), ids) for n in (1, 2))
    print(f"| two Ray workers of one thread: tokens per second | one | {one / two:.2f} | | at least 1.8 |")
    print(f"| one Ray worker: seconds | this process | {one / here:.2f} | | at most 1.05 |", flush=True)


def after_start(work: Work, ids: Ids) -> float:
    """Seconds that more than one shard takes."""
    return seconds(work, ids) - seconds(work, ids[:WARM])


def with_ray(n: int, ids: Ids) -> None:
    with tempfile.TemporaryDirectory() as folder:
        lp.cluster.run_corpus(
            [RANKS], load_on_one_thread, ids, Path(folder) / "run", workers=n, shard_size=WARM, progress=False
        )


def load_on_one_thread() -> Any:
    """The demo model, in a process of one thread."""
    torch.set_num_threads(1)
    return lp.load_model("smollm2-135m")


def prompts(tokens: int, vocab: int = 40_000, seed: int = 0) -> Ids:
    """Random ids, a prompt per row."""
    shape = max(WARM, tokens // LENGTH), LENGTH
    return list(torch.randint(20, vocab, shape, generator=torch.Generator().manual_seed(seed)))


def run(model: Any, ids: Ids, probe: Any) -> None:
    """In memory."""
    probe.run(model, ids, progress=False)


def corpus(model: Any, ids: Ids, probe: Any, **options: Any) -> None:
    """Through a folder."""
    with tempfile.TemporaryDirectory() as folder:
        lp.run_corpus([probe], model, ids, Path(folder) / "run", progress=False, **options)


def passes(model: Any, ids: Ids) -> None:
    """Forward passes that keep every layer's neurons and end there."""
    view = ModelView(model)
    names = list(NEURONS.hooks(view).values())
    for batch in batches(tokenize(ids, view)):
        view.activations(*pad(batch, view), names)


def cached(model: Any, ids: Ids) -> None:
    """The same through TransformerLens."""
    view = ModelView(model)
    names = list(NEURONS.hooks(view).values())
    for batch in batches(tokenize(ids, view)):
        given, mask = pad(batch, view)
        with torch.no_grad():
            model.run_with_cache(given, attention_mask=mask.long(), names_filter=names)


def seconds(work: Work, ids: Ids) -> float:
    begun = time.perf_counter()
    work(ids)
    return time.perf_counter() - begun


def row(measured: str, against: str, ours: Work, theirs: Work, ids: Ids, rounds: int, must_be: str = "") -> None:
    """One line of the table."""
    for each in (ours, theirs):
        each(ids[:WARM])
    ratios = [seconds(ours, ids) / seconds(theirs, ids) for _ in range(rounds)]
    between = f"{min(ratios):.2f} to {max(ratios):.2f}"
    print(f"| {measured} | {against} | {statistics.median(ratios):.2f} | {between} | {must_be} |", flush=True)


PARTS: dict[str, Callable[[argparse.Namespace], None]] = {
    "run": of_run,
    "examples": of_examples,
    "sorted": of_sorted,
    "growth": of_growth,
    "memory": of_memory,
    "workers": of_workers,
}

if __name__ == "__main__":
    main()
