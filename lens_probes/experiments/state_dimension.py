"""StateDimension: in how many directions do the states of a layer spread?

Of the states of all tokens at a read point, with covariance eigenvalues e[1] >= e[2] >= ... and their shares
p[i] = e[i] / sum e:

    effective_rank[layer] = exp(-sum p log p)                                      1 to d_model
    participation[layer]  = (sum e)^2 / sum e^2                                    1 to d_model
    two_nn[layer]         = (n - 1) / sum over states of log(r2 / r1)              more than 0

r1 and r2 are the distances of a state to its two nearest neighbours. The first two ask in how many directions of the
whole space there is variance; TwoNN asks how many dimensions the states fill locally, where they may lie on a bent
surface. Its null, `gaussian`, is the same estimate for as many normal draws with the same covariance: TwoNN is too low
in high dimensions, by as much there. What is left of the difference is what no Gaussian has: a bent surface, or
clusters, such as the states of one word.

Special tokens are left out, and states that are equal count once (in the embedding all tokens of one id). The 95 %
intervals take random halves of the prompts again and again; they are about other prompts of this kind. All three grow
with the number of states, so compare models and layers on the same text.

It takes one forward pass, and n^2 distances and an eigendecomposition per layer and half.

Source: Roy & Vetterli 2007, "The Effective Rank"; Facco et al. 2017, arXiv 1803.06992 (TwoNN); of tokens in language
models Viswanathan et al. 2025, arXiv 2501.10573.
"""

from typing import Annotated, NamedTuple, Unpack

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import torch
from jaxtyping import Float, Float64
from torch import Tensor

from lens_probes import figures
from lens_probes.maths import inference
from lens_probes.maths.sampling import mixed
from lens_probes.messages import amount, interval
from lens_probes.model import ModelView, ReadPoint
from lens_probes.probe import Study, TextExperiment
from lens_probes.reading import Reading, batches, pad
from lens_probes.result import Result, comparison, measured
from lens_probes.settings import Layers, Positive, Seed, at_least
from lens_probes.text.prompts import Tokens

NULL = "the states are as if drawn from a Gaussian with their covariance"


class Dimensions(NamedTuple):
    """The statistics of one cloud of states."""

    effective_rank: float
    participation: float
    two_nn: float
    gaussian: float


class StateDimensionResult(Result):
    """The number of directions and of dimensions by layer, and of random halves of the prompts."""

    headline = "two_nn"
    layer: tuple[str, ...]
    effective_rank: Float64[Tensor, " layer"] = measured("effective rank of the states", low=0)
    participation: Float64[Tensor, " layer"] = measured("participation ratio of the states", low=0)
    two_nn: Float64[Tensor, " layer"] = measured("dimension of the states (TwoNN)", low=0, null="gaussian")
    gaussian: Float64[Tensor, " layer"] = measured("the same of Gaussian draws with their covariance", low=0)
    half: Float64[Tensor, "statistic layer draw"] = measured("the same four of random halves of the prompts", low=0)
    n_states: int
    n_prompts: int

    def table(self) -> pd.DataFrame:
        """One row per layer: `effect` is TwoNN minus that of Gaussian draws, with its 95 % interval, p and q.

        Then each statistic with its interval. Intervals are those of other prompts: the standard error is the spread
        over random halves of the prompts (that of halves drawn without replacement is the standard error of the whole).
        With fewer than five prompts there is none.
        """
        halves = dict(zip(Dimensions._fields, self.half.numpy(), strict=True))
        values = {name: getattr(self, name).numpy() for name in Dimensions._fields}
        bend, error = values["two_nn"] - values["gaussian"], self._error(halves["two_nn"] - halves["gaussian"])
        columns = {}
        for name in Dimensions._fields:
            low, high, _ = inference.student(values[name], self._error(halves[name]), self.n_prompts)
            columns |= {name: values[name], f"{name}_low": low, f"{name}_high": high}
        low, high, p = inference.student(bend, error, self.n_prompts)
        return comparison(
            self.cells("layer"),
            effect=bend,
            low=low,
            high=high,
            p=p,
            says="TwoNN minus that of a Gaussian with the same covariance",
            null=NULL,
            **columns,
            states=self.n_states,
            prompts=self.n_prompts,
        )

    def _error(self, halves: Float64[np.ndarray, "layer draw"]) -> Float64[np.ndarray, " layer"]:
        return halves.std(axis=1, ddof=1) if halves.shape[1] > 1 else np.full(len(halves), np.nan)

    def findings(self) -> list[str]:
        """Where the dimension is largest, and whether the states bend."""
        table = self.table()
        if self.two_nn.isnan().all():
            return []
        row = table.loc[table["two_nn"].idxmax()].to_dict()
        return [
            f"The states have the most dimensions at {row['layer']}: {row['two_nn']:.1f} "
            f"({interval(row['two_nn_low'], row['two_nn_high'], '.1f')}), where a Gaussian of the same covariance has "
            f"{row['gaussian']:.1f} and the effective rank is {row['effective_rank']:.0f} "
            f"({amount(self.n_states, 'state')} of {amount(self.n_prompts, 'prompt')}). The null: {NULL}."
        ]

    def figure(self, **look: Unpack[figures.Look]) -> go.Figure:
        """Effective rank and participation ratio by layer, and TwoNN beside its null, with 95 % intervals."""
        table = self.table()

        def line(name: str, says: str, colour: str, *, dashed: bool = False) -> figures.Line:
            own, low, high = (list(table[column]) for column in (name, f"{name}_low", f"{name}_high"))
            return figures.Line(says, own, low, high, colour, dashed=dashed)

        panels = {
            "directions with variance (1 or more)": [
                line("effective_rank", "effective rank", figures.CHOSEN),
                line("participation", "participation ratio", figures.OTHER_COLOURS[1]),
            ],
            "local dimension (0 or more)": [
                line("two_nn", "TwoNN", figures.CHOSEN),
                line("gaussian", "TwoNN of a Gaussian with the same covariance", figures.GREY, dashed=True),
            ],
        }
        return figures.lines(
            panels,
            self.layer,
            title=self.title(f"In how many directions {amount(self.n_states, 'state')} spread"),
            x_title=figures.layer_title(self.layer),
            **look,
        )


class StateDimension(TextExperiment[StateDimensionResult]):
    """The dimension of the states of each layer.

    `states`: of longer text, so many of its tokens are read, drawn by their content. `draws`: random halves of the
    prompts, for the intervals.

    >>> import lens_probes as lp
    >>> result = lp.StateDimension(draws=4).run(lp.tiny.bridge(), lp.demo.sentences()[:8], progress=False)
    >>> result.layer, tuple(result.half.shape)
    (('0_post', '1_post', '2_post'), (4, 3, 4))
    """

    at: ReadPoint = "resid_post"
    states: Annotated[int, at_least(3)] = 2000
    draws: Positive = 20
    layers: Layers = None
    seed: Seed = 0

    def perform(self, study: Study) -> StateDimensionResult:
        """Layer by layer, all states and then halves of the prompts."""
        view, tokens = study.view, _sample(study.tokens, self.states)
        points = view.states(self.at, self.layers)
        keys, prompt = tokens.prompt_keys().unique(return_inverse=True)  # in an order that is not that of the prompts
        draw = torch.Generator().manual_seed(self.seed)
        orders = torch.stack([torch.randperm(len(keys), generator=draw) for _ in range(self.draws)])
        chosen = orders[:, prompt] < len(keys) // 2  # the tokens of each half
        states = _states(view, study.tokens, list(points.values()), tokens)

        def of_layer(label: str) -> Float64[Tensor, "statistic draw"]:
            own = states[points[label]]
            clouds = [own, *(own[each] for each in chosen)]
            return torch.tensor([dimensions(each, self.seed) for each in clouds], dtype=torch.float64).T

        found = torch.stack(study.each(of_layer, points, doing="measuring", unit="layer"), dim=1)
        return StateDimensionResult(
            layer=tuple(points)[: found.shape[1]],
            half=found[..., 1:],
            n_states=len(tokens),
            n_prompts=len(keys),
            **dict(zip(Dimensions._fields, found[..., 0], strict=True)),
            provenance=study.provenance(list(points.values())),
        )


def dimensions(states: Float[Tensor, "state d_model"], seed: int = 0) -> Dimensions:
    """The four statistics of a cloud; NaN where it has fewer than three different states.

    >>> random = torch.Generator().manual_seed(0)
    >>> plane = torch.randn(2000, 2, generator=random) @ torch.randn(2, 50, generator=random)
    >>> [round(each) for each in dimensions(plane)]
    [2, 2, 2, 2]
    """
    different = states.double().unique(dim=0)
    if len(different) < 3:
        return Dimensions(*[float("nan")] * 4)
    values = torch.linalg.svdvals(different - different.mean(0)).square()
    share = values / values.sum()
    random = torch.randn(
        len(different), len(values), generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    return Dimensions(
        float(torch.special.entr(share).sum().exp()),
        float(1 / share.square().sum()),
        two_nn(different),
        two_nn(random * values.sqrt()),  # a turn of the draws changes no distance
    )


def two_nn(states: Float64[Tensor, "state d_model"]) -> float:
    """The dimension of different states by the distances to their two nearest neighbours.

    >>> line = torch.tensor([[0.0], [1.0], [3.0]], dtype=torch.float64)  # r2 / r1 is 3, 2 and 1.5
    >>> round(two_nn(line), 6) == round(2 / torch.tensor([3.0, 2.0, 1.5]).log().sum().item(), 6)
    True
    """
    nearest = torch.cdist(states, states, compute_mode="donot_use_mm_for_euclid_dist").fill_diagonal_(torch.inf)
    first, second = nearest.topk(2, largest=False).values.T
    return float((len(states) - 1) / (second / first).log().sum())


def _sample(tokens: Tokens, n: int) -> Tokens:
    """The tokens that are not special; of more than n, those with the lowest keys, made from their content."""
    kept = tokens[~tokens.special]
    if len(kept) < 3:
        raise ValueError(
            f"prompts must have three tokens or more that are not special; got {len(kept)}: pass more text"
        )
    key = torch.from_numpy(mixed(kept.prompt_keys().numpy(), kept.position.numpy()))
    return kept[key.argsort(stable=True)[:n].sort().values]


def _states(
    view: ModelView, tokens: Tokens, hooks: list[str], kept: Tokens
) -> dict[str, Float[Tensor, "state d_model"]]:
    """The states of the kept tokens by activation."""
    asked = set(zip(kept.prompt.tolist(), kept.position.tolist(), strict=True))
    found: dict[str, list[Tensor]] = {hook: [] for hook in hooks}
    for batch in batches(tokens):
        rows = [each in asked for each in zip(batch.prompt.tolist(), batch.position.tolist(), strict=True)]
        ids, mask = pad(batch, view)
        reading = Reading(view, batch, view.activations(ids, mask, hooks), mask)
        for hook in hooks:
            found[hook].append(reading[hook][torch.tensor(rows)].float().cpu())
    return {hook: torch.cat(parts) for hook, parts in found.items()}
