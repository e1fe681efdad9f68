"""MaxActivatingTokens: which tokens excite a unit?

A unit is a neuron (its value after the activation function), a dimension of the residual stream or a direction in it,
a(e) its activation where token embeddings are e, at one place of a prompt (`position`) or in the mean over all:

    value[prompt, unit, vocab] = a(e with this vocabulary entry at that place, or at all)    in the unit's own units
    ascended[prompt, unit]     = max a(e) over soft embeddings of the vocabulary's median length, by gradient ascent
    nearest[token, unit, k]    = the entries with the largest cosines to the soft embedding found
    pull[token, unit]          = |d a / d e[token]| where the ascent starts                  units of a over those of e

The complete search is the answer; the ascent is what published features rest on, and `agreement` says how far it is to
be trusted. A dimension of the residual stream also answers to the embedding's own entry, before any layer has done
anything: `path` holds that entry for each vocabulary row, `embedding_path` compares, and the same for
`lp.untrained(model)` shows what needs no learning. No pull comes from later tokens on decoders: that is the mask.

Source: blbadger.github.io, "Language Model Representations and Features"; activation maximisation: Erhan et al. 2009,
"Visualizing Higher-Layer Features of a Deep Network", Technical report 1341, Université de Montréal.
"""

import hashlib
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

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
from lens_probes.maths import inference
from lens_probes.maths.vocabulary import check_entries
from lens_probes.model import Continuation, ModelView, ReadPoint
from lens_probes.probe import Experiment
from lens_probes.reading import TOKENS_PER_BATCH, finite
from lens_probes.result import Result, measured, provenance
from lens_probes.text.prompts import Prompts, PromptTable, Tokens, prompt_table, tokenize, whole_number

RATE = 0.3  # of an ascent's steps, in standard deviations of the vocabulary's entries


class MaxActivatingTokensResult(Result):
    """What every vocabulary entry does to every unit, in every prompt. It grows with prompts x units x vocabulary."""

    token: Tokens
    prompt: PromptTable
    unit: tuple[str, ...]
    vocab: tuple[str, ...]
    value: Float[Tensor, "prompt unit vocab"] = measured("activation; missing where not yet searched")
    ascended: Float[Tensor, "prompt unit"] = measured("activation that the ascent came to")
    nearest: Int[Tensor, "token unit k"] = measured(
        "entries nearest to the ascent's end, -1: fixed", low=0, missing=-1, into="vocab"
    )
    pull: Float[Tensor, "token unit"] = measured("|d a / d e| where the ascent starts", low=0)
    path: Float[Tensor, "unit vocab"] = measured("the embedding's own entry; missing outside the residual stream")
    embed_mean: Float[Tensor, " d_model"] = measured("mean embedding, by which the model is told")

    @property
    def mean_value(self) -> Float[Tensor, "unit vocab"]:
        """The mean over prompts."""
        return self.value.mean(0)

    def top(self, unit: int, k: int = 10) -> pd.DataFrame:
        """The entries that excite a unit most, in the mean over prompts with its interval; `unit` is its number."""
        whole_number("k", k)
        if k < 1:
            raise ValueError(f"top(k=...) is the number of entries shown, 1 or more; got {k}")
        values = self.value[inference.prompt_order(self.token), self.index_of("unit", unit)].double()
        ids = _highest(values.mean(0), k)
        low, high = inference.mean_interval(values[:, ids].T.numpy())
        texts = [self.vocab[i] for i in ids.tolist()]
        columns = {"value": values[:, ids].mean(0).numpy(), "low": low, "high": high}
        return pd.DataFrame({"id": ids.tolist(), "token": texts, **columns, "prompts": len(values)})

    def agreement(self) -> pd.DataFrame:
        """Per unit: does the ascent find what the complete search finds?

        `same`: share of prompts where the entry nearest to the ascent's end is the best of all; `percentile`: the share
        of the vocabulary that excites less than that entry (a random one: 0.5), with its interval over prompts.
        """
        rows = []
        for i, name in enumerate(self.unit):
            percentile, same, gap = [], [], []
            for place in inference.prompt_order(self.token):
                number = int(self.prompt.prompt[place])
                values = self.value[place, i]
                nearest = self.nearest[self.token.prompt == number, i, 0]
                found = nearest[nearest >= 0]
                if values.isnan().any() or not len(found):
                    continue
                reached = values[found]
                percentile.append(float((values < reached[:, None]).float().mean()))
                same.append(float((found == values.argmax()).float().mean()))
                gap.append(float(values.max() - reached.max()))
            low, high = inference.mean_interval(np.array([percentile])) if percentile else np.full((2, 1), np.nan)
            rows.append(
                {
                    "unit": name,
                    "same": np.mean(same) if same else np.nan,
                    "percentile": np.mean(percentile) if percentile else np.nan,
                    "low": low[0],
                    "high": high[0],
                    "best_minus_found": np.mean(gap) if gap else np.nan,
                    "prompts": len(percentile),
                }
            )
        return pd.DataFrame(rows)

    def embedding_path(self, k: int = 10) -> pd.DataFrame:
        """Per unit: how much of its feature is the embedding itself, on the path past all layers?

        Spearman's rho between values and `path` over the vocabulary, and the share of the k most exciting entries that
        are among the k highest of `path`; by chance that share is k / vocabulary.
        """
        if self.path.isnan().all():
            raise ValueError("only the residual stream holds the embedding: ask of resid_pre, resid_mid or resid_post")
        whole_number("k", k)
        if not 1 <= k <= len(self.vocab):
            raise ValueError(f"embedding_path(k=...) is 1 to {len(self.vocab)}, the size of the vocabulary; {k} came")
        rows = []
        for name, values, path in zip(self.unit, self.mean_value, self.path, strict=True):
            common = len(set(_highest(values, k).tolist()) & set(_highest(path, k).tolist())) / k
            rho = float(scipy.stats.spearmanr(values.numpy(), path.numpy())[0])  # pyright: ignore[reportArgumentType]
            rows.append({"unit": name, "rho": rho, "common": common, "chance": k / len(path)})
        return pd.DataFrame(rows)

    def figure(self) -> go.Figure:
        """The tokens that excite each unit most, coloured by the mean value."""
        k = min(10, len(self.vocab))
        ids = torch.stack([_highest(values, k) for values in self.mean_value])
        return figures.heatmap(
            self.mean_value.gather(1, ids).tolist(),
            x=[str(i + 1) for i in range(k)],
            y=[figures.named(name) for name in self.unit],
            title=f"Which tokens excite units of {self.provenance.read}?\n{self.provenance.describe()}",
            x_title="place among all tokens",
            y_title="unit",
            colour_title="mean activation",
            text=[[figures.visible(self.vocab[i], 10) for i in row] for row in ids.tolist()],
        )

    def figure_positions(self, prompt: int = 0) -> go.Figure:
        """Which tokens of a prompt pull at each unit: shares of the pull."""
        rows = self.token.rows(prompt)
        pull = self.pull[rows].T
        return figures.squares(
            [(self.provenance.read, (pull / pull.sum(1, keepdim=True).clamp(min=1e-30)).tolist())],
            x=[figures.visible(self.token.text[row], 14) for row in rows],
            y=[figures.named(name) for name in self.unit],
            title=f"Which tokens of prompt {prompt} pull at each unit?\n{self.provenance.describe()}",
            x_title="token",
            y_title="unit",
            colour_title="share of pull",
        )


class MaxActivatingTokens(Experiment[MaxActivatingTokensResult]):
    """Search the whole vocabulary, and ascend, for some units of one layer. The prompts are the contexts.

    `units`: their numbers, or None for the sum of all. `at`: "neuron", or a read point, where `directions`
    [unit d_model] may take the units' place. `position` counts the tokens of a prompt (-1 the last, on BERT `[SEP]`);
    None varies and reads all tokens but special ones. A search passes the whole vocabulary through the layers below,
    once a prompt; on encoders and for None all tokens of the prompt with it, through the whole model. Interrupted, it
    gives what is done; `run(..., resume=result)` goes on from there.

    >>> import lens_probes as lp
    >>> result = lp.MaxActivatingTokens(1, units=[3, 5], steps=5).run(lp.tiny.bridge(), "Time flies.", progress=False)
    >>> result.value.shape, int(result.top(3).id[0]) == int(result.value[0, 0].argmax())
    (torch.Size([1, 2, 400]), True)
    """

    layer: int
    units: Sequence[int] | None = None
    at: Literal["neuron"] | ReadPoint = "neuron"
    directions: Float[Tensor, "unit d_model"] | None = None
    position: int | None = -1
    steps: int = 100
    restarts: int = 3
    k: int = 5
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "restarts", "k"):
            if getattr(self, name) < 1:
                raise ValueError(f"MaxActivatingTokens({name}=...) is 1 or more; {getattr(self, name)} came")
        if self.directions is not None and not isinstance(self.directions, Tensor):
            raise TypeError(f"directions is a tensor [unit d_model]; {type(self.directions).__name__} came")
        if self.directions is not None and (self.at == "neuron" or self.units is not None):
            raise ValueError("directions stand in the residual stream, in place of units: choose at='resid_post', say")

    def __repr__(self) -> str:
        shown = [f"{name}={getattr(self, name)!r}" for name in self.__dataclass_fields__ if name != "directions"]
        if self.directions is not None:
            numbers = self.directions.detach().float().cpu().numpy().tobytes()
            shown.append(f"directions=<content {hashlib.blake2b(numbers, digest_size=4).hexdigest()}>")
        return f"MaxActivatingTokens({', '.join(shown)})"

    def run(
        self,
        model: Any,
        prompts: Prompts,
        *,
        progress: bool = True,
        resume: MaxActivatingTokensResult | None = None,
    ) -> MaxActivatingTokensResult:
        """The ascents of all prompts, then the search, a batch of vocabulary entries at a time."""
        view = ModelView(model)
        hook = view.hook_units(self.at, self.layer)
        check_entries(view.token_embeddings, f"the embedding of {view.name}")
        tokens = tokenize(prompts, view)
        read = self._reader(view, hook)
        every = [_Place(view, own, self.position) for _, own in tokens.by_prompt()]
        labels = self._labels()
        came_from = provenance(self, view, view.W_E.dtype, [view.hook_token_embed, hook], tokens)
        if resume is not None:
            same = all(torch.equal(getattr(resume.token, name), getattr(tokens, name)) for name in ("id", "prompt"))
            if resume.provenance != came_from or not same:
                raise ValueError(f"resume= is a result of {self!r} on the same model and prompts; another one came")
            view.refuse_other("resume= is a result", resume.provenance, resume.embed_mean)
        if self.k > view.d_vocab:
            raise ValueError(f"k={self.k} entries were asked for and {view.name} has {view.d_vocab}")
        if resume is None:
            value = torch.full((len(every), len(labels), view.d_vocab), torch.nan)
            ascended = torch.full((len(every), len(labels)), torch.nan)
            nearest = torch.full((len(tokens), len(labels), self.k), -1)
            pull = torch.zeros(len(tokens), len(labels))
        else:
            value, ascended, nearest, pull = (
                each.clone() for each in (resume.value, resume.ascended, resume.nearest, resume.pull)
            )
        todo = int(value[:, 0].isnan().sum())
        with tqdm(total=todo, desc="searching", unit="token", disable=not progress) as bar, _interruptible():
            for i, place in enumerate(every):
                if ascended[i].isnan().any():
                    rows = torch.tensor(tokens.rows(int(place.tokens.prompt[0])))
                    ascended[i], nearest[rows], pull[rows] = self._ascend(view, place, hook, read)
            for i, place in enumerate(every):
                untried = value[i, 0].isnan().nonzero().flatten()
                for ids in untried.split(place.batch) if len(untried) else ():
                    value[i, :, ids] = finite(hook, read(place.searched(hook, ids))).cpu().T
                    bar.update(len(ids))
        return MaxActivatingTokensResult(
            token=tokens,
            prompt=prompt_table(tokens),
            unit=labels,
            vocab=view.vocabulary_texts,
            value=value,
            ascended=ascended,
            nearest=nearest,
            pull=pull,
            path=self._path(view, len(labels)),
            embed_mean=view.embed_mean,
            provenance=came_from,
        )

    def _labels(self) -> tuple[str, ...]:
        if self.directions is not None:
            return tuple(f"direction {i}" for i in range(len(self.directions)))
        return ("all",) if self.units is None else tuple(str(number) for number in self.units)

    def _reader(self, view: ModelView, hook: str) -> Callable[[Tensor], Tensor]:
        """What makes the units' activations of the activation that holds them."""
        if self.directions is not None:
            if self.directions.ndim != 2 or self.directions.shape[1] != view.d_model or not len(self.directions):
                raise ValueError(
                    f"directions is [unit d_model] with d_model {view.d_model}; {tuple(self.directions.shape)} came"
                )
            along = self.directions.detach().clone().float().to(view.device)
            if not along.isfinite().all():
                raise ValueError("directions hold numbers that are not finite: look at what made them")
            return lambda states: states @ along.T
        if self.units is None:
            return lambda states: states.sum(-1, keepdim=True)
        width = view.activations(torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1, dtype=torch.bool), [hook])
        units = view.units(self.units, hook, width[hook].shape[-1])
        return lambda states: states[..., units]

    def _path(self, view: ModelView, n: int) -> Float[Tensor, "unit vocab"]:
        """The units' entries in the embeddings themselves."""
        in_stream = self.at.startswith("resid") and view.W_E.shape[1] == view.d_model
        if not in_stream or (self.units is None and self.directions is None):
            return torch.full((n, view.d_vocab), torch.nan)
        rows = view.token_embeddings.float().cpu()
        if self.directions is not None:
            return (rows @ self.directions.detach().float().cpu().T).T.contiguous()
        return rows[:, list(self.units or ())].T.contiguous()

    def _ascend(
        self, view: ModelView, place: "_Place", hook: str, read: Callable[[Tensor], Tensor]
    ) -> tuple[Float[Tensor, " unit"], Int[Tensor, "token unit k"], Float[Tensor, "token unit"]]:
        """Every unit's own ascents, all restarts side by side."""
        ids = place.tokens.id
        vocabulary = view.token_embeddings.float()
        length, spread = vocabulary.norm(dim=-1).median(), float(vocabulary.std(0).mean())
        directions, true = normalize(vocabulary, dim=-1), vocabulary[ids]
        varied = place.varied.to(true.device)[:, None]
        n, reached, nearest, pull = len(self._labels()), [], [], []
        for u, number in enumerate(self.units or range(n)):
            random = torch.Generator().manual_seed(zlib.crc32(ids.numpy().tobytes(), self.seed + number) % 2**32)
            noise = torch.randn(self.restarts, *true.shape, generator=random).to(true)
            soft = (length * normalize(noise, dim=-1)).requires_grad_()
            optimiser = torch.optim.Adam([soft], lr=RATE * spread, maximize=True)
            for step in range(self.steps + 1):
                now = torch.where(varied, soft, true)
                states = view.from_embeddings(now, ids.expand(self.restarts, -1), [hook])[0]
                activation = read(place.at(states))[:, u]
                (slope,) = torch.autograd.grad(activation.sum(), now)
                if step == 0:
                    pull.append(slope.norm(dim=-1).mean(0).cpu())
                if step == self.steps:
                    best = int(activation.nan_to_num(-torch.inf).argmax())
                    reached.append(activation[best].detach().cpu())
                    found = (now[best].detach() @ directions.T).topk(self.k).indices
                    nearest.append(torch.where(varied, found, -1).cpu())
                    break
                soft.grad = slope
                optimiser.step()
                with torch.no_grad():
                    soft.copy_(length * normalize(soft, dim=-1))
        return torch.stack(reached), torch.stack(nearest, dim=1), torch.stack(pull, dim=1)


class _Place:
    """Where tokens of a prompt are varied and the units are read: at one position, or at all that are not special."""

    def __init__(self, view: ModelView, tokens: Tokens, position: int | None) -> None:
        n = len(tokens)
        if position is not None and not -n <= position < n:
            raise ValueError(f"position {position} was asked for and prompt {int(tokens.prompt[0])} has {n} tokens")
        self.view, self.tokens = view, tokens
        self.varied: Bool[Tensor, " token"] = ~tokens.special
        if position is not None:
            self.varied = torch.zeros(n, dtype=torch.bool)
            self.varied[position] = True
        elif tokens.special.all():
            raise ValueError(f"prompt {int(tokens.prompt[0])} has special tokens only: there is nothing to vary")
        self._continues = position is not None and not view.encoder
        self._following: Continuation | None = None
        self.batch = TOKENS_PER_BATCH if self._continues else max(1, TOKENS_PER_BATCH // n)

    def at(self, states: Float[Tensor, "batch token width"]) -> Float[Tensor, "batch width"]:
        """The mean over the tokens that are varied."""
        return states[:, self.varied.to(states.device)].float().mean(1)

    def searched(self, hook: str, ids: Int[Tensor, " candidate"]) -> Float[Tensor, "candidate width"]:
        """The activation with each of these tokens in place; what stands after a decoder's token cannot matter."""
        if self._continues:
            if self._following is None:
                self._following = Continuation(self.view, self.tokens.id[: int(self.varied.nonzero())], hook)
            return self._following.states(ids).float()
        filled = torch.where(self.varied, ids[:, None], self.tokens.id)
        return self.at(self.view.activations(filled, torch.ones_like(filled, dtype=torch.bool), [hook])[hook])


def _highest(values: Float[Tensor, " vocab"], k: int) -> Int[Tensor, " k"]:
    """The ids of the highest values, those not searched last."""
    return values.nan_to_num(-torch.inf).topk(min(k, len(values))).indices


@contextmanager
def _interruptible() -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        tqdm.write("interrupted: pass the result on as run(..., resume=result) to go on from here")
