"""What InputReconstruction and PositionReach cost: `python benchmarks/reconstruction.py` prints ratios of this one run.

The sequential search on SmolLM2, 16 tokens, layer 15, against the same search with the whole prefix in every batch of
candidates; and its checks alone, on the batches that it came to. All passes end at layer 15. PositionReach at three
layers against that number of bare backward passes through the same graph. Rounds alternate.
"""

import statistics
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from rank_shift import compare, processor
from torch import Tensor

import lens_probes as lp
from lens_probes import soft_tokens
from lens_probes.experiments.position_reach import squared_gradients
from lens_probes.model import Continuation, ModelView

TEXT = "A heavy rain fell on the orchard all day, and the branches bent low"
LAYER, TOKENS, ROUNDS = 15, 16, 3


class WholePrefixes:
    """What `Continuation` gives, from whole prefixes."""

    def __init__(self, view: ModelView, prefix: Tensor, name: str) -> None:
        self.view, self.prefix, self.name = view, prefix, name

    def states(self, ids: Tensor) -> Tensor:
        """All of the prefix for every candidate."""
        rows = torch.cat([self.prefix.expand(len(ids), -1), ids[:, None]], dim=1)
        return self.view.activations(rows, torch.ones_like(rows, dtype=torch.bool), [self.name])[self.name][:, -1]

    def soft(self, embeddings: Tensor) -> Tensor:
        """The same with gradients."""
        n, ids = len(embeddings), torch.cat([self.prefix, torch.zeros(1, dtype=torch.int64)])
        prefix = self.view.token_embeddings[self.prefix].expand(n, -1, -1)
        whole = torch.cat([prefix, embeddings[:, None]], dim=1)
        return self.view.from_embeddings(whole, ids.expand(n, -1), [self.name])[0][:, -1]


def main() -> None:
    model = lp.load_model("smollm2-135m")
    view = ModelView(model)
    search = lp.InputReconstruction(LAYER, method="sequential")
    checked: list[tuple[Tensor, Tensor]] = []
    found = recorded(checked, lambda: search.run(model, TEXT, progress=False))
    assert len(found.token) == TOKENS and found.exact.item() == 1
    asked = found.candidates[~found.token.special].double()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {processor()}\n")

    def whole_search() -> lp.Result:
        with mock.patch.object(soft_tokens, "Continuation", WholePrefixes):
            return search.run(model, TEXT, progress=False)

    hook = view.hook("resid_post", LAYER)
    prefixes = {len(prefix): prefix for prefix, _ in checked}

    def check(kind: Callable[[ModelView, Tensor, str], Any]) -> None:
        ways = {n: kind(view, prefix, hook) for n, prefix in prefixes.items()}
        for prefix, ids in checked:
            ways[len(prefix)].states(ids)

    ours, whole = compare(lambda: search.run(model, TEXT, progress=False), whole_search, ROUNDS)
    print(
        f"sequential, {TOKENS} tokens, layer {LAYER}: {statistics.median(ours):.1f} s; candidates per token: median "
        f"{asked.median():.0f}, mean {asked.mean():.0f}, most {asked.max():.0f}\n"
    )
    print("| measured | against | ratio | range |\n|---|---|---|---|")
    row("whole prefixes: the search", "`InputReconstruction`, sequential", whole, ours)
    ours, whole = compare(lambda: check(Continuation), lambda: check(WholePrefixes), ROUNDS)
    row("whole prefixes: the checks alone", "its checks", whole, ours)

    reach = lp.PositionReach(projections=4, layers=[0, LAYER, -1])
    hooks = [view.hook("resid_post", layer) for layer in view.layers(reach.layers)]
    ids, queries = found.token.id, torch.arange(TOKENS)
    directions = torch.randn(reach.projections, len(hooks), TOKENS, view.d_model)
    embedded, states = view.differentiable(ids.expand(TOKENS, -1), hooks)

    def bare() -> None:
        for i, state in enumerate(states):
            for along in directions[:, i]:
                torch.autograd.grad((state[queries, queries] * along).sum(), embedded, retain_graph=True)

    measured, passes = compare(lambda: reach.run(model, TEXT, progress=False), bare, ROUNDS)
    n = count_backward(lambda: squared_gradients(view, ids, queries, hooks, directions))
    row(f"`PositionReach`, {n} backward passes ({n / TOKENS:.2f} per token)", "as many bare passes", measured, passes)


def recorded(checked: list[tuple[Tensor, Tensor]], work: Callable[[], Any]) -> Any:
    """Do it, and note every batch of candidates with its prefix."""

    class Noting(Continuation):
        def __init__(self, view: ModelView, prefix: Tensor, name: str) -> None:
            self.prefix: Tensor | None = None  # until its own checks are done, which are no candidates
            super().__init__(view, prefix, name)
            self.prefix = prefix.clone()

        def states(self, ids: Tensor) -> Tensor:
            if self.prefix is not None:
                checked.append((self.prefix, ids))
            return super().states(ids)

    with mock.patch.object(soft_tokens, "Continuation", Noting):
        return work()


def count_backward(work: Callable[[], object]) -> int:
    """How often a gradient is asked for."""
    with mock.patch("torch.autograd.grad", wraps=torch.autograd.grad) as grad:
        work()
    return grad.call_count


def row(what: str, against: str, seconds: list[float], yardstick: list[float]) -> None:
    ratios = [first / second for first, second in zip(seconds, yardstick, strict=True)]
    print(f"| {what} | {against} | {statistics.median(ratios):.2f} | {min(ratios):.2f} to {max(ratios):.2f} |")


if __name__ == "__main__":
    main()
