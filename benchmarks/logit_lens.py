"""What LogitLens costs: `python benchmarks/logit_lens.py` prints a table of ratios, all of them from this one run.

The yardstick is that of `rank_shift.py`, the bare product. Against it: all statistics at once from a cache, and
TransformerLens 4's own `logit_lens` with targets and with top-k, on the same states. Rounds alternate all of them.
Memory is read in processes of their own.
"""

import argparse
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from rank_shift import memory, processor, product, timed

import lens_probes as lp

ROUNDS = 3
TOKENS = (64, 512, 4096)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # pyright: ignore[reportOptionalMemberAccess]
    parser.add_argument("--memory", type=int, metavar="TOKENS", help="print the extra peak memory in MB, nothing else")
    parser.add_argument("--theirs", action="store_true", help="with --memory, that of TransformerLens's logit_lens")
    parser.add_argument("--tokens", type=int, default=512, help="how many tokens the ratios are for (512)")
    options = parser.parse_args()
    if options.memory:
        print(f"{extra_peak_memory(options.memory, theirs=options.theirs):.0f}")
        return

    model, ids, cache = example(options.tokens)
    W_U = lp.ModelView(model).unembedding.float().contiguous()
    states = torch.cat(
        [cache[f"blocks.{i}.hook_resid_post"][0] for i in range(30)] + [cache["blocks.0.hook_resid_pre"][0]]
    )
    contenders = {
        "LogitLens, all statistics and top 5": lambda: lp.LogitLens().from_cache(model, ids, cache),
        "TransformerLens logit_lens, targets": lambda: their_lens(model, ids, cache, targets=ids[0]),
        "TransformerLens logit_lens, top 5": lambda: their_lens(model, ids, cache, top_k=5),
    }
    lp.LogitLens(layers=[0]).from_cache(model, ids[:, :8], {name: x[:, :8] for name, x in cache.items()})  # warm
    seconds = []
    for _ in range(ROUNDS):
        bare = timed(lambda: product(states, W_U, 124))
        seconds.append([timed(contender) / bare for contender in contenders.values()])
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {processor()}\n")
    print("| measured | tokens | against | ratio | range |")
    print("|---|---|---|---|---|")
    for name, ratios in zip(contenders, zip(*seconds, strict=True), strict=True):
        span = f"{min(ratios):.2f} to {max(ratios):.2f}"
        print(f"| {name} | {options.tokens:,} | bare product | {statistics.median(ratios):.2f} | {span} |")

    print("\n| extra peak memory | tokens | MB |\n|---|---|---|")
    asked = [("LogitLens().from_cache", n, []) for n in TOKENS] + [
        ("TransformerLens logit_lens, targets", 512, ["--theirs"])
    ]
    for name, n, more in asked:
        command = [sys.executable, __file__, "--memory", str(n), *more]
        # The allocator gives freed memory back at once, so that what is read is memory in use.
        environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
        run = subprocess.run(command, capture_output=True, check=True, text=True, env=environment)
        print(f"| {name} | {n:,} | {run.stdout.strip()} |")


def example(n_tokens: int) -> tuple[object, torch.Tensor, dict[str, torch.Tensor]]:
    """SmolLM2, ids, and random states of a plausible size at every layer."""
    model = lp.load_model("smollm2-135m")
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(20, 40_000, (1, n_tokens), generator=generator)
    names = [f"blocks.{i}.hook_resid_{at}" for i in range(30) for at in ("pre", "post")]
    return model, ids, {name: torch.randn(1, n_tokens, 576, generator=generator) for name in names}


def their_lens(model: object, ids: torch.Tensor, cache: dict[str, torch.Tensor], **selected: Any) -> object:
    from transformer_lens import ActivationCache
    from transformer_lens.tools.analysis import logit_lens

    selected = {name: value[None] if isinstance(value, torch.Tensor) else value for name, value in selected.items()}
    with torch.no_grad():
        activations = ActivationCache(dict(cache), model)
        return logit_lens(model, ids, cache=activations, positions=None, return_type="log_probs", **selected)


def extra_peak_memory(n_tokens: int, *, theirs: bool) -> float:
    """How far the resident memory rises above what model, tokens and cache already take, in MB (Linux)."""
    model, ids, cache = example(n_tokens)
    few = {name: x[:, :8] for name, x in cache.items()}
    if theirs:
        their_lens(model, ids[:, :8], few, targets=ids[0, :8])
    lp.LogitLens(layers=[0]).from_cache(model, ids[:, :8], few)
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = memory("VmRSS")
    if theirs:
        their_lens(model, ids, cache, targets=ids[0])
    else:
        lp.LogitLens().from_cache(model, ids, cache)
    return (memory("VmHWM") - before) / 1000


if __name__ == "__main__":
    main()
