"""What a question about one sentence costs: `python benchmarks/one_sentence.py` prints ratios, all from this one run.

Seven tokens, from text to result. Against `LogitLens`: TransformerLens 4's own `logit_lens` at all positions, for top-k
and for targets. Against the others: a cached forward pass. On SmolLM2, and on a model of its shape with random weights
and 256,000 entries. Rounds alternate all of them.
"""

import argparse
import statistics
from collections.abc import Callable
from typing import Any

import torch
from rank_shift import processor, timed

import lens_probes as lp

ROUNDS = 7
ENTRIES = 256_000
TEXT = "Time flies like an arrow."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # pyright: ignore[reportOptionalMemberAccess]
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    rounds = parser.parse_args().rounds
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {processor()}\n")
    print("| measured on one sentence of 7 tokens | entries | against | ratio | range |")
    print("|---|---|---|---|---|")
    model = lp.load_model("smollm2-135m")
    for each in (model, planted(model)):
        compare(each, rounds)


def compare(model: Any, rounds: int) -> None:
    """Print the ratios of one model."""
    ids = model.to_tokens(TEXT)
    work: dict[str, Callable[[], object]] = {
        "cached forward pass": lambda: model.run_with_cache(ids),
        "their lens, top 5": lambda: theirs(model, ids, top_k=5),
        "their lens, targets": lambda: theirs(model, ids, targets=ids[0]),
        "LogitLens": lambda: lp.LogitLens().run(model, TEXT),
        "DirectLogitAttribution": lambda: lp.DirectLogitAttribution().run(model, TEXT),
        "SourceAttribution": lambda: lp.SourceAttribution().run(model, TEXT),
        "RankShift": lambda: lp.RankShift().run(model, TEXT),
        "AttentionPatterns": lambda: lp.AttentionPatterns().run(model, TEXT),
    }
    seconds: dict[str, list[float]] = {name: [] for name in work}
    for n in range(rounds + 1):
        for name, do in work.items():
            took = timed(do)
            if n:  # the first round warms up
                seconds[name].append(took)
    against = {"LogitLens": ("their lens, top 5", "their lens, targets")}
    for name in list(work)[3:]:
        for yardstick in against.get(name, ("cached forward pass",)):
            ratios = [own / other for own, other in zip(seconds[name], seconds[yardstick], strict=True)]
            span = f"{min(ratios):.2f} to {max(ratios):.2f}"
            says = yardstick.replace("their lens", "TransformerLens `logit_lens`")
            print(f"| `{name}` | {model.cfg.d_vocab:,} | {says} | {statistics.median(ratios):.2f} | {span} |")
    forward = statistics.median(seconds["cached forward pass"])
    print(f"| cached forward pass, in seconds | {model.cfg.d_vocab:,} | | {forward:.2f} | |")


def theirs(model: Any, ids: torch.Tensor, **selected: Any) -> object:
    from transformer_lens.tools.analysis import logit_lens

    selected = {name: value[None] if isinstance(value, torch.Tensor) else value for name, value in selected.items()}
    with torch.no_grad():
        return logit_lens(model, ids, positions=None, return_type="log_probs", **selected)


def planted(model: Any) -> Any:
    """A model of the same shape with random weights and a vocabulary of 256,000."""
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import AutoModelForCausalLM

    config = model.original_model.config.__class__(**{**model.original_model.config.to_dict(), "vocab_size": ENTRIES})
    torch.manual_seed(0)
    source = AutoModelForCausalLM.from_config(config).float().eval()
    return TransformerBridge.boot_transformers(
        "random-256k", hf_model=source, tokenizer=model.tokenizer, dtype=torch.float32, device="cpu"
    )


if __name__ == "__main__":
    main()
