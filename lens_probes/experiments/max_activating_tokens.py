"""MaxActivatingTokens: which tokens activate a unit most?

A unit is a neuron (its value after the activation function), a dimension of the residual stream or a direction in it.
a(e) is its activation for token embeddings e, at one `position` of a prompt or as the mean over all:

    value[prompt, unit, vocab] = a(e with this vocabulary entry at that position, or at all) in the unit's own units
    ascended[prompt, unit]     = max a(e) over soft embeddings of the vocabulary's median length, by gradient ascent
    nearest[token, unit, k]    = the entries with the largest cosines to the soft embedding found
    pull[token, unit]          = |d a / d e[token]| at the start of the ascent               units of a over those of e

The search of the whole vocabulary is exact. Published features use the ascent, and `agreement` shows how reliable it
is. A dimension of the residual stream also contains the same entry of the embedding, before any layer: `path` is that
entry for each vocabulary row, and `embedding_path` compares the two. `lp.untrained(model)` is a random-weights
baseline. In decoders later tokens have no pull, because of the mask.

Source: blbadger.github.io, "Language Model Representations and Features"; activation maximisation: Erhan et al. 2009,
"Visualizing Higher-Layer Features of a Deep Network", Technical report 1341, Université de Montréal.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal, Unpack

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import scipy.stats
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import normalize
from tqdm.auto import tqdm

from lens_probes import figures
from lens_probes.directions import Directions, check_directions, directions_for
from lens_probes.maths import inference
from lens_probes.maths.ascent import ascend, seeded
from lens_probes.messages import amount, brief
from lens_probes.model import ReadPoint
from lens_probes.probe import Options, Study, TextExperiment
from lens_probes.reading import finite
from lens_probes.result import Result, derived, measured
from lens_probes.settings import Positive, Seed, Units
from lens_probes.soft_tokens import SoftTokens, Varied
from lens_probes.text.prompts import Prompts, PromptTable, Tokens, prompt_table, whole_number

RATE = 0.3  # of an ascent's steps, in standard deviations of the vocabulary's entries
SHOWN = 10  # tokens per unit in the figure

Reader = Callable[[Float[Tensor, "*any width"]], Float[Tensor, "*any unit"]]
"""Selects the units from the activation that holds them."""


class MaxActivatingTokensResult(Result):
    """The activation of every unit by every vocabulary entry, in every prompt.

    Memory scales with prompts x units x vocabulary.
    """

    token: Tokens
    prompt: PromptTable
    unit: tuple[str, ...]
    vocab: tuple[str, ...]
    value: Float[Tensor, "prompt unit vocab"] = measured("activation with this token in the varied position")
    ascended: Float[Tensor, "prompt unit"] = measured("activation at the end of the ascent")
    nearest: Int[Tensor, "token unit k"] = measured(
        "ids of the tokens nearest to the end of the ascent", low=0, missing=-1, into="vocab"
    )
    pull: Float[Tensor, "token unit"] = measured("norm of the gradient with respect to the token's embedding", low=0)
    path: Float[Tensor, "unit vocab"] = measured("the unit's entry of the token's embedding")
    embed_mean: Float[Tensor, " d_model"] = measured("mean embedding, which identifies the model")

    @derived("mean activation over prompts")
    def mean_value(self) -> Float[Tensor, "unit vocab"]:
        """The mean over prompts."""
        return self.value.mean(0)

    def top(self, unit: int | str, k: int = 10) -> pd.DataFrame:
        """The tokens that activate a unit most, by their mean over prompts, with its interval."""
        whole_number("k", k)
        if k < 1:
            raise ValueError(f"top(k=...) must be a number of tokens, 1 or more; got {k}")
        values = self.value[inference.prompt_order(self.token), self.index_of("unit", unit)].double()
        ids = _highest(values.mean(0), k)
        low, high = inference.mean_interval(values[:, ids].T.numpy())
        texts = [self.vocab[i] for i in ids.tolist()]
        columns = {"value": values[:, ids].mean(0).numpy(), "low": low, "high": high}
        return pd.DataFrame({"id": ids.tolist(), "token": texts, **columns, "prompts": len(values)})

    def agreement(self) -> pd.DataFrame:
        """Per unit: does the ascent find the same token as the exhaustive search?

        `same`: share of prompts where the token nearest to the ascent's end is the best of all. `percentile`: share of
        the vocabulary that activates the unit less than that token (0.5 for a random token), with its interval over
        prompts. `best_minus_found`: difference of their activations. Prompts that were not searched are excluded.
        """
        same, percentile, gap = np.full((3, len(self.unit), len(self.prompt)), np.nan)
        for i, number in enumerate(self.prompt.prompt):
            values, nearest = self.value[i], self.nearest[self.token.prompt == number, :, 0]
            found = nearest[(nearest >= 0).all(1)].T.contiguous()  # [unit place]
            if values.isnan().any() or not found.numel():
                continue
            reached, best = values.gather(1, found), values.max(1)
            below = torch.searchsorted(values.sort(1).values, reached) / values.shape[1]
            percentile[:, i] = below.mean(1)
            same[:, i] = (found == best.indices[:, None]).float().mean(1)
            gap[:, i] = best.values - reached.amax(1)
        mean, low, high, n = inference.prompt_means(percentile, self.token)
        columns = {"percentile": mean, "low": low, "high": high}
        shares, gaps = (inference.prompt_means(each, self.token)[0] for each in (same, gap))
        return pd.DataFrame({"unit": self.unit, "same": shares, **columns, "best_minus_found": gaps, "prompts": n})

    def embedding_path(self, k: int = 10) -> pd.DataFrame:
        """Per unit: how much of its feature comes directly from the embedding, along the residual stream?

        `rho` is Spearman's correlation between values and `path` over the vocabulary. `common` is the share of the k
        tokens with the highest values that are among the k with the highest `path`; `chance` is its chance level,
        k / vocabulary.
        """
        if self.path.isnan().all():
            raise ValueError(
                f"embedding_path needs units of the residual stream, which contains the embedding; got those of "
                f"{self.provenance.read}: run with at='resid_pre', 'resid_mid' or 'resid_post'"
            )
        whole_number("k", k)
        if not 1 <= k <= len(self.vocab):
            raise ValueError(
                f"embedding_path(k=...) must be 1 to {len(self.vocab)}, the size of the vocabulary; got {k}"
            )
        rows = []
        for name, values, path in zip(self.unit, self.mean_value, self.path, strict=True):
            common = len(set(_highest(values, k).tolist()) & set(_highest(path, k).tolist())) / k
            rho = float(scipy.stats.spearmanr(values.numpy(), path.numpy())[0])  # pyright: ignore[reportArgumentType]
            rows.append({"unit": name, "rho": rho, "common": common, "chance": k / len(path)})
        return pd.DataFrame(rows)

    def figure(self, **look: Unpack[figures.Look]) -> go.Figure:
        """The tokens that activate each unit most, coloured by the mean value."""
        k = min(SHOWN, len(self.vocab))
        ids = torch.stack([_highest(values, k) for values in self.mean_value])
        return figures.heatmap(
            self.mean_value.gather(1, ids).tolist(),
            x=[str(i + 1) for i in range(k)],
            y=[figures.named(name) for name in self.unit],
            title=self.title("Tokens that activate each unit most"),
            x_title="place among all tokens",
            y_title="unit",
            colour_title=self.quantity("mean_value").title,
            signed=True,
            text=[[figures.visible(self.vocab[i], 10) for i in row] for row in ids.tolist()],
            **look,
        )

    def figure_positions(self, prompt: int = 0, **look: Unpack[figures.Look]) -> go.Figure:
        """Which tokens of a prompt pull at each unit: shares of the pull."""
        rows = self.token.rows(prompt)
        pull = self.pull[rows].T
        return figures.small_grids(
            [("", (pull / pull.sum(1, keepdim=True).clamp(min=1e-30)).tolist())],
            x=[f"{figures.visible(self.token.text[row], 14)} {n}" for n, row in enumerate(rows)],
            y=[figures.named(name) for name in self.unit],
            title=self.title(f"Share of each token of prompt {prompt} in the gradient of each unit"),
            x_title="token",
            y_title="unit",
            colour_title="share of the gradient's length (0 to 1)",
            low=0,
            high=1,
            tokens=True,
            **look,
        )

    def conditions(self) -> str:
        """The activation that holds the units."""
        return self.provenance.read


class MaxActivatingTokens(TextExperiment[MaxActivatingTokensResult]):
    """Search the whole vocabulary, and ascend, for some units of one layer. The prompts are the contexts.

    `units`: their numbers, or None for the sum of all. `at`: "neuron" or a read point; with a read point you can pass
    `directions` [unit d_model] instead of units. `position`: a token of the prompt (-1 is the last, in BERT `[SEP]`);
    None varies and reads all tokens that are not special. A search passes the whole vocabulary through the layers
    below, once per prompt; in encoders and for None, together with the whole prompt, through the whole model.

    >>> import lens_probes as lp
    >>> result = lp.MaxActivatingTokens(1, units=[3, 5], steps=5).run(lp.tiny.bridge(), "Time flies.", progress=False)
    >>> result.value.shape, int(result.top(3).id[0]) == int(result.value[0, 0].argmax())
    (torch.Size([1, 2, 400]), True)
    """

    layer: int
    units: Units | None = None
    at: Literal["neuron", ReadPoint] = "neuron"
    directions: Directions | None = None
    position: int | None = -1
    steps: Positive = 100
    restarts: Positive = 3
    k: Positive = 5
    seed: Seed = 0

    def __post_init__(self) -> None:
        check_directions(self)

    def run(
        self,
        model: Any,
        prompts: Prompts,
        *,
        resume: MaxActivatingTokensResult | None = None,
        **options: Unpack[Options],
    ) -> MaxActivatingTokensResult:
        """Search in these prompts; `prepend_bos`, `word_class` and `progress` are as in `lens_probes.run`.

        After an interrupt the result holds what is done. Pass it as `resume` to do the rest.
        """
        return self.perform(Study.of(self, model, prompts, **options), resume)

    def perform(self, study: Study, resume: MaxActivatingTokensResult | None = None) -> MaxActivatingTokensResult:
        """The ascents of all prompts, then the search, a batch of vocabulary entries at a time."""
        view = study.view
        layer = SoftTokens(view, view.hook_units(self.at, self.layer))
        if self.k > view.d_vocab:
            raise ValueError(
                f"MaxActivatingTokens(k=...) must be at most {view.d_vocab}, the size of the vocabulary; got {self.k}"
            )
        read = self._reader(layer)
        prompts = list(study.tokens.by_prompt())
        places = [Varied(layer, own.id, self._varied(number, own)) for number, own in prompts]
        done = self._nothing(study, layer, read) if resume is None else self._checked(resume, study, layer)

        def work(i: int, ids: Tensor | None) -> None:
            if ids is None:
                own = study.tokens.prompt == prompts[i][0]
                done.ascended[i], done.nearest[own], done.pull[own] = self._ascend(layer, places[i], read)
            else:
                done.value[i, :, ids] = finite(layer.hook, read(places[i].states(ids))).cpu().T

        plan: list[tuple[int, Tensor | None]] = [
            (i, None) for i in range(len(places)) if done.ascended[i].isnan().any()
        ]
        for i, place in enumerate(places):
            untried = done.value[i, 0].isnan().nonzero().flatten()
            plan += [(i, ids) for ids in untried.split(place.batch) if len(ids)]
        worked = study.each(lambda part: work(*part), plan, doing="searching", unit="batch", least=0)
        if len(worked) < len(plan):
            tqdm.write("to do the rest, run(..., resume=result)")
        return done

    def _varied(self, number: int, own: Tokens) -> Bool[Tensor, " token"]:
        """Which tokens of a prompt are varied and read."""
        n = len(own)
        if self.position is None:
            own.check_text()
            return ~own.special
        if not -n <= self.position < n:
            raise ValueError(
                f"MaxActivatingTokens(position=...) must be a token of every prompt; got {self.position}, and prompt "
                f"{number} has {amount(n, 'token')}: pass longer prompts, or -1 for the last token"
            )
        return torch.arange(n) == self.position % n

    def _nothing(self, study: Study, layer: SoftTokens, read: Reader) -> MaxActivatingTokensResult:
        """An empty result, to be filled."""
        tokens, view, unit = study.tokens, study.view, self._unit()
        prompts = prompt_table(tokens)
        path = torch.full((len(unit), view.d_vocab), torch.nan)
        if self.at.startswith("resid") and view.W_E.shape[1] == view.d_model and unit != ("all",):
            path = read(layer.vocabulary).T.cpu().contiguous()
        return MaxActivatingTokensResult(
            token=tokens,
            prompt=prompts,
            unit=unit,
            vocab=view.vocabulary_texts,
            value=torch.full((len(prompts), len(unit), view.d_vocab), torch.nan),
            ascended=torch.full((len(prompts), len(unit)), torch.nan),
            nearest=torch.full((len(tokens), len(unit), self.k), -1),
            pull=torch.zeros(len(tokens), len(unit)),
            path=path,
            embed_mean=view.embed_mean,
            provenance=study.provenance([view.hook_token_embed, layer.hook]),
        )

    def _checked(self, resume: MaxActivatingTokensResult, study: Study, layer: SoftTokens) -> MaxActivatingTokensResult:
        """A copy of an interrupted run's result. Raises unless experiment, model and prompts are the same."""
        if not isinstance(resume, MaxActivatingTokensResult):
            raise TypeError(
                f"resume= must be a MaxActivatingTokensResult; got {brief(resume)}: pass what the interrupted run "
                f"returned"
            )
        asked = study.provenance([study.view.hook_token_embed, layer.hook])
        same = all(torch.equal(getattr(resume.token, name), getattr(study.tokens, name)) for name in ("id", "prompt"))
        if resume.provenance != asked or not same:
            raise ValueError(
                f"resume= must be a result of this experiment on the same model and prompts; got one of "
                f"{resume.provenance.probe} on {resume.provenance.describe()}: pass what the interrupted run returned"
            )
        study.view.refuse_other("resume=", resume.provenance, resume.embed_mean)
        return replace(
            resume, **{name: getattr(resume, name).clone() for name in ("value", "ascended", "nearest", "pull")}
        )

    def _unit(self) -> tuple[str, ...]:
        if self.directions is not None:
            return tuple(f"direction {i}" for i in range(len(self.directions)))
        return ("all",) if self.units is None else tuple(str(number) for number in self.units)

    def _reader(self, layer: SoftTokens) -> Reader:
        view, hook = layer.view, layer.hook
        if self.directions is not None:
            along = directions_for(self, view)
            return lambda states: states @ along.T
        if self.units is None:
            return lambda states: states.sum(-1, keepdim=True)
        width = layer.soft(layer.vocabulary[None, :1], torch.tensor([0])).shape[-1]
        units = view.units(self.units, hook, width)
        return lambda states: states[..., units]

    def _ascend(
        self, layer: SoftTokens, place: Varied, read: Reader
    ) -> tuple[Float[Tensor, " unit"], Int[Tensor, "token unit k"], Float[Tensor, "token unit"]]:
        """Every unit's ascents: the highest end, the tokens nearest to it, and the slope at the start."""
        seeds = [self.seed + number for number in self.units or range(len(self._unit()))]
        found = [self._ascend_one(layer, place, read, u, seed) for u, seed in enumerate(seeds)]
        end, nearest, pull = zip(*found, strict=True)
        return torch.stack(end), torch.stack(nearest, dim=1), torch.stack(pull, dim=1)

    def _ascend_one(
        self, layer: SoftTokens, place: Varied, read: Reader, u: int, seed: int
    ) -> tuple[Float[Tensor, ""], Int[Tensor, "token k"], Float[Tensor, " token"]]:
        """All restarts in parallel; tokens that are not varied keep their embeddings."""
        ids, true = place.ids, layer.vocabulary[place.ids]
        varied, length = place.varied.to(true.device)[:, None], layer.vocabulary.norm(dim=-1).median()
        noise = torch.randn(self.restarts, *true.shape, generator=seeded(ids.numpy().tobytes(), seed)).to(true)

        def project(soft: Tensor, _: int) -> Tensor:
            return torch.where(varied, length * normalize(soft, dim=-1), true)

        def height(soft: Tensor, _: int) -> Tensor:
            return read(place.soft(soft))[:, u]

        rate = RATE * float(layer.spread.mean())
        path = ascend(project(noise, 0), height, self.steps, rate=rate, project=project)
        first = next(path)
        (end,) = deque(path, maxlen=1)
        best = int(end.height.nan_to_num(-torch.inf).argmax())
        nearest = (end.point[best] @ layer.directions.T).topk(self.k).indices
        pull = first.slope.norm(dim=-1).mean(0)
        return end.height[best].cpu(), torch.where(varied, nearest, -1).cpu(), pull.cpu()


def _highest(values: Float[Tensor, " vocab"], k: int) -> Int[Tensor, " k"]:
    """The ids of the highest values; ids that were not searched are last."""
    return values.nan_to_num(-torch.inf).topk(min(k, len(values))).indices
