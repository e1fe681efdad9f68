"""What each probe costs on a GPU: `python benchmarks/gpu.py` prints ratios to a bare forward pass, and peak memory.

SmolLM2, and a Llama of 8 billion random weights, both in bfloat16; prompts of 128 random tokens. A cached forward pass
keeps all activations. Peak memory is what a run takes beyond the model and its inputs. Without a GPU,
`--device cpu --small` asks SmolLM2 alone on a few tokens, which shows that the script works and nothing else.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

import lens_probes as lp

LENGTH, ROUNDS = 128, 3
PROBES: dict[str, Any] = {
    name: kind
    for name, kind in sorted(lp.list_probes().items())
    if name
    not in ("AttentionPair", "CrossAttention", "HeadTopicSimilarity", "LensComparison", "Summary", "TopicActivity")
}  # those that need no settings, no topics and no encoder-decoder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="SmolLM2 and four prompts only")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("there must be a CUDA device; got none: use --device cpu --small to see that the script works")
    device = torch.cuda.get_device_name() if options.device == "cuda" else "CPU"
    print(f"torch {torch.__version__}, {device}, bfloat16, prompts of {LENGTH} tokens\n")
    print("| model | prompts | measured | of a forward pass | range | peak memory, MB |\n|---|---|---|---|---|---|")
    small = lp.load_model("smollm2-135m", device=options.device, dtype=torch.bfloat16)
    table("SmolLM2", small, 4 if options.small else 32)
    if not options.small:
        table("random, 8 billion", random_llama(small.tokenizer, options.device), 8)


def table(name: str, model: Any, n: int) -> None:
    """The rows of one model; all but the passes from ids to result."""
    ids = torch.randint(20, 40_000, (n, LENGTH), generator=torch.Generator().manual_seed(0))
    given = ids.to(model.cfg.device)

    def forward() -> None:
        with torch.no_grad():
            model(given)

    def cached() -> None:
        with torch.no_grad():
            model.run_with_cache(given)

    work: dict[str, Callable[[], object]] = {"cached forward pass": cached}
    work |= {f"`{each}`": lambda kind=kind: kind().run(model, ids, progress=False) for each, kind in PROBES.items()}
    for what, do in work.items():
        try:
            pairs = [(measured(do), measured(forward)) for _ in range(ROUNDS + 1)][1:]  # the first warms up
        except (RuntimeError, ValueError) as refused:
            print(f"| {name} | {n} | {what} | {str(refused).splitlines()[0][:80]} | | |", flush=True)
            continue
        ratios = [own[0] / bare[0] for own, bare in pairs]
        span, peak = f"{min(ratios):.2f} to {max(ratios):.2f}", max(own[1] for own, _ in pairs)
        print(f"| {name} | {n} | {what} | {statistics.median(ratios):.2f} | {span} | {peak:,.0f} |", flush=True)


def measured(do: Callable[[], object]) -> tuple[float, float]:
    """Seconds, and the peak of memory on the GPU beyond what was there, in MB."""
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    before, begun = torch.cuda.memory_allocated() if on_gpu else 0, time.perf_counter()
    do()
    if on_gpu:
        torch.cuda.synchronize()
    took = time.perf_counter() - begun
    return took, (torch.cuda.max_memory_allocated() - before) / 1e6 if on_gpu else float("nan")


def random_llama(tokenizer: Any, device: str) -> Any:
    """The shape of Llama 3.1 8B."""
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        vocab_size=128_256,
        hidden_size=4096,
        intermediate_size=14_336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
    )
    with torch.device(device):
        source = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    source.set_attn_implementation("eager")  # which TransformerLens reads patterns of
    return TransformerBridge.boot_transformers(
        "random-8b", hf_model=source, tokenizer=tokenizer, dtype=torch.bfloat16, device=device
    )


if __name__ == "__main__":
    main()
