"""AttentionPatterns: where does each head look?

Over all queries that may look at more than one token (n allowed keys; special tokens ask nothing here, but may be
looked at), with a the pattern's row:

    entropy   = -sum a log a / log n                  0: one token, 1: all alike
    largest   = max a                                 0 to 1
    distance  = sum a |query - key|                   in tokens
    first     = a on the first token of the prompt    0 to 1, the attention sink
    previous  = a on the token before                 0 to 1
    itself    = a on the query token                  0 to 1
    copies    = a on earlier copies of the same token           0 to 1, over the queries that have one
    induction = a on the tokens right after earlier copies      0 to 1, over the queries that have one

`mean[statistic, layer, head]` is the mean over queries, and `chance[statistic]` what a head has that looks at all
allowed tokens alike. `by_word_class` splits a by the classes of query and key, with the share of allowed keys beside
it. Memory does not grow with the text; `keep_patterns=True` keeps the patterns too, 4 bytes a layer, head and pair of
tokens, and refuses more than 1 GB.

Source: Vaswani et al. 2017, arXiv 1706.03762 (the appendix shows single heads); Olsson et al. 2022, "In-context
Learning and Induction Heads", arXiv 2209.11895.
"""

from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple, get_args

import pandas as pd
import plotly.graph_objects as go
import torch
from jaxtyping import Bool, Float, Float64, Int
from torch import Tensor

from lens_probes import figures
from lens_probes.maths import inference
from lens_probes.messages import brief
from lens_probes.model import ModelView
from lens_probes.probe import Probe
from lens_probes.reading import Reading
from lens_probes.result import Result, measured, summed
from lens_probes.settings import Layers
from lens_probes.text.prompts import PairTable, Tokens, concatenate

Statistic = Literal["entropy", "largest", "distance", "first", "previous", "itself", "copies", "induction"]
STATISTICS: tuple[Statistic, ...] = get_args(Statistic)
CLASSES = (*inference.CLASSES, "other", "special")
LIMIT = 1e9  # bytes of patterns kept


class AttentionPatternsResult(Result):
    """Sums over queries, by the query's word class; patterns if asked for."""

    layer: tuple[str, ...]
    head: tuple[str, ...]
    statistic: tuple[str, ...]
    word_class: tuple[str, ...]
    queries: Float64[Tensor, "statistic word_class"] = summed("queries that count for a statistic")
    total: Float64[Tensor, "statistic word_class layer head"] = summed("its sum over them")
    even: Float64[Tensor, "statistic word_class"] = summed("its sum if all allowed keys had the same")
    looked: Float64[Tensor, "word_class other_word_class layer head"] = summed(
        "sum over queries of one class of the attention on keys of another"
    )
    allowed: Float64[Tensor, "word_class other_word_class"] = summed("the same if all allowed keys had the same")
    token: Tokens
    pair: PairTable
    pattern: Float[Tensor, "layer head pair"] | None = measured(
        "attention of the query on the key", low=0, high=1, default=None
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.pair.check_positions(self.token)
        if self.pattern is not None and self.pattern.nbytes > LIMIT:
            raise ValueError(
                f"patterns of {self.pattern.nbytes / 1e9:.1f} GB were to be kept, the limit is {LIMIT / 1e9:.0f} GB: "
                "ask for fewer layers or prompts, or AttentionPatterns() without keep_patterns"
            )

    @property
    def mean(self) -> Float[Tensor, "statistic layer head"]:
        """Each statistic's mean over queries; NaN where no query counts."""
        return (self.total.sum(1) / self.queries.sum(1)[:, None, None]).float()

    @property
    def chance(self) -> Float[Tensor, " statistic"]:
        """What looking at all allowed tokens alike would give."""
        return (self.even.sum(1) / self.queries.sum(1)).float()

    def of(self, statistic: Statistic) -> Float[Tensor, "layer head"]:
        """One statistic's mean."""
        return self.mean[self._number(statistic)]

    def by_word_class(self) -> pd.DataFrame:
        """Attention from queries of one class to keys of another: mean, share of allowed keys, one row a head."""
        rows = []
        queries = self.queries[self.statistic.index("largest")]
        for i, asking in enumerate(self.word_class):
            for j, asked in enumerate(self.word_class):
                if queries[i] == 0:
                    continue
                mean = self.looked[i, j] / queries[i]
                rows.append(
                    self.cells("layer", "head").assign(
                        query_class=asking,
                        key_class=asked,
                        attention=mean.flatten().numpy(),
                        allowed=float(self.allowed[i, j] / queries[i]),
                        queries=int(queries[i]),
                    )
                )
        if not rows:
            raise ValueError("no token here may look at another: pass prompts of two tokens or more")
        return pd.concat(rows, ignore_index=True)

    def square(self, prompt: int) -> Float[Tensor, "layer head query key"]:
        """The pattern of one prompt, 0 where a query may not look."""
        if self.pattern is None:
            raise ValueError("this run kept sums only, no patterns: run AttentionPatterns(keep_patterns=True)")
        rows = torch.tensor(self.token.rows(prompt))
        own = self.pair.prompt == prompt
        pattern = self.pattern.new_zeros(len(self.layer), len(self.head), len(rows), len(rows))
        pattern[:, :, self.pair.query[own], self.pair.key[own]] = self.pattern[:, :, own]
        return pattern

    def _number(self, statistic: Statistic) -> int:
        if statistic not in self.statistic:
            raise ValueError(f"statistic is one of {', '.join(self.statistic)}; {brief(statistic)} came")
        return self.statistic.index(statistic)

    # Figures

    def figure(self, statistic: Statistic = "first") -> go.Figure:
        """One statistic by layer and head, with its value by chance in the title."""
        number = self._number(statistic)
        queries = float(self.queries[number].sum())
        return figures.heatmap(
            self.mean[number].tolist(),
            x=self.head,
            y=self.layer,
            title=f"{TITLES[statistic]} (chance {self.chance[number]:.2f}, {queries:,.0f} queries)\n"
            f"{self.provenance.describe()}",
            x_title="head",
            y_title="layer",
            colour_title=f"{statistic} ({'tokens' if statistic == 'distance' else '0 to 1'})",
            low=0.0 if statistic != "distance" else None,
            high=1.0 if statistic != "distance" else None,
        )

    def figure_head(self, layer: int, head: int, prompt: int = 0) -> go.Figure:
        """One head, all tokens of a prompt."""
        return self.figure_heads([(layer, head)], prompt)

    def figure_heads(self, heads: Sequence[tuple[int, int]], prompt: int = 0) -> go.Figure:
        """Some heads side by side, all tokens of a prompt."""
        pairs = list(heads) if isinstance(heads, Iterable) else []
        if not pairs or not all(isinstance(each, tuple) and len(each) == 2 for each in pairs):
            raise ValueError(f"figure_heads draws (layer, head) pairs, such as [(0, 1), (2, 3)]; {brief(heads)} came")
        pattern = self.square(prompt)
        texts = self._texts(prompt)
        return figures.squares(
            [
                (f"L{layer}H{head}", pattern[self.index_of("layer", layer), self.index_of("head", head)].tolist())
                for layer, head in pairs
            ],
            x=texts,
            y=texts,
            title=f"Where do the tokens of prompt {prompt} look?\n{self.provenance.describe()}",
            x_title="key",
            y_title="query",
            colour_title="attention",
        )

    def figure_token(self, layer: int, token: int | str, prompt: int = 0) -> go.Figure:
        """One query token, all heads of a layer."""
        texts = self._texts(prompt)
        row = self.token.row(prompt, token)
        position = self.token.rows(prompt).index(row)
        pattern = self.square(prompt)[self.index_of("layer", layer), :, position]
        return figures.squares(
            [("", pattern.tolist())],
            x=texts,
            y=self.head,
            title=f"Where does “{figures.spelled(self.token.text[row])}”, token {position} of prompt {prompt}, look "
            f"in layer {layer}?\n{self.provenance.describe()}",
            x_title="key",
            y_title="head",
            colour_title="attention",
        )

    def _texts(self, prompt: int) -> list[str]:
        return [figures.visible(self.token.text[row], 14) for row in self.token.rows(prompt)]


TITLES: dict[str, str] = {
    "entropy": "How spread out is attention?",
    "largest": "How much goes to the token looked at most?",
    "distance": "How far do heads look?",
    "first": "How much goes to the first token?",
    "previous": "How much goes to the token before?",
    "itself": "How much goes to the token itself?",
    "copies": "How much goes to earlier copies of the token?",
    "induction": "How much goes to what followed earlier copies?",
}


class AttentionPatterns(Probe[AttentionPatternsResult]):
    """Statistics of every head's attention, and the patterns if `keep_patterns`.

    >>> import lens_probes as lp
    >>> result = lp.AttentionPatterns().run(lp.tiny.bridge(), lp.demo.sentences()[:4], progress=False)
    >>> tuple(result.mean.shape), result.statistic[:3]
    ((8, 3, 4), ('entropy', 'largest', 'distance'))
    """

    keep_patterns: bool = False
    layers: Layers = None

    def hooks(self, model: ModelView) -> list[str]:
        """The pattern of every layer."""
        return [model.hook_pattern(layer) for layer in model.layers(self.layers)]

    def measure(self, reading: Reading) -> AttentionPatternsResult:
        """A prompt at a time, and the sums over the batch."""
        model, layers, hooks = reading.model, reading.model.layers(self.layers), self.hooks(reading.model)
        own = set(_classes(reading.tokens))
        classes = (*CLASSES, *sorted(own - set(CLASSES)))
        parts, patterns, pairs = [], [], []
        for one in reading.by_prompt():
            pattern = torch.stack([one.pattern(hook) for hook in hooks]).double().cpu()
            everything = torch.ones(pattern.shape[2:], dtype=torch.bool)
            may = everything if model.encoder else everything.tril()
            _check_window(model, layers, one.tokens, pattern)
            parts.append(sums_of(pattern, may, one.tokens, classes))
            if self.keep_patterns:
                query, key = may.nonzero(as_tuple=True)
                pairs.append(PairTable(torch.full_like(query, int(one.tokens.prompt[0])), query, key))
                patterns.append(pattern[:, :, query, key].float())
        sums = Sums(*(torch.stack(each).sum(0) for each in zip(*parts, strict=True)))
        return AttentionPatternsResult(
            layer=tuple(map(str, layers)),
            head=tuple(f"H{head}" for head in range(model.n_heads)),
            statistic=STATISTICS,
            word_class=classes,
            queries=sums.queries,
            total=sums.total,
            even=sums.even,
            looked=sums.looked,
            allowed=sums.allowed,
            token=reading.tokens if self.keep_patterns else reading.tokens[torch.zeros(0, dtype=torch.int64)],
            pair=concatenate(pairs, [0] * len(pairs)) if pairs else NO_PAIRS,
            pattern=torch.cat(patterns, dim=2) if patterns else None,
        )


NO_PAIRS = PairTable(*torch.zeros(3, 0, dtype=torch.int64))


class Sums(NamedTuple):
    """What one prompt adds to the sums of a result."""

    queries: Float64[Tensor, "statistic word_class"]
    total: Float64[Tensor, "statistic word_class layer head"]
    even: Float64[Tensor, "statistic word_class"]
    looked: Float64[Tensor, "word_class other_word_class layer head"]
    allowed: Float64[Tensor, "word_class other_word_class"]


def sums_of(
    pattern: Float64[Tensor, "layer head query key"],
    may: Bool[Tensor, "query key"],
    tokens: Tokens,
    classes: Sequence[str],
) -> Sums:
    """Every statistic summed over a prompt's queries by their word class, and attention from class to class."""
    number = torch.tensor([classes.index(name) for name in _classes(tokens)])
    members = torch.nn.functional.one_hot(number, len(classes)).double()
    asks = ~tokens.special & (may.sum(1) > 1)
    values, uniform, counts = statistics_of(pattern, may, tokens.id)
    counted = (counts & asks).double()
    asking = members * asks[:, None]
    share = may.double() / may.sum(1, keepdim=True)
    return Sums(
        queries=counted @ members,
        total=torch.einsum("sq,qc,slhq->sclh", counted, members, values),
        even=(counted * uniform) @ members,
        looked=torch.einsum("qc,lhqk,kd->cdlh", asking, pattern, members),
        allowed=asking.T @ share @ members,
    )


def statistics_of(
    pattern: Float64[Tensor, "layer head query key"], may: Bool[Tensor, "query key"], ids: Int[Tensor, " query"]
) -> tuple[
    Float64[Tensor, "statistic layer head query"], Float64[Tensor, "statistic query"], Bool[Tensor, "statistic query"]
]:
    """Every statistic of every query, its value if all allowed keys had the same, and the queries that count for it."""
    n = len(ids)
    place = torch.arange(n)
    apart = (place[:, None] - place).abs().double()
    copy = (ids[:, None] == ids) & (place < place[:, None])  # key is an earlier copy of query
    after = copy.roll(1, 1) & (place > 0)  # key stands right after one
    number = may.sum(1).double()
    masks = (
        torch.stack([place.expand(n, n) == 0, apart.eq(1) & (place < place[:, None]), apart == 0, copy, after]) & may
    )
    entropy = torch.special.entr(pattern).sum(-1) / number.log().clamp(min=1e-9)
    on = torch.einsum("lhqk,mqk->mlhq", pattern, masks.double())
    values = torch.stack([entropy, pattern.amax(-1), (pattern * apart).sum(-1), *on])
    share = masks.sum(-1) / number
    uniform = torch.stack([torch.ones(n), 1 / number, (apart * may).sum(1) / number, *share]).double()
    everyone = torch.ones(4, n, dtype=torch.bool)
    counts = torch.cat([everyone, (place > 0)[None], everyone[:1], copy.any(1)[None], after.any(1)[None]])
    return values, uniform, counts


def _classes(tokens: Tokens) -> list[str]:
    """The word class of every token; special tokens are one, and what is no word another."""
    return [
        "special" if special else own or "other"
        for own, special in zip(tokens.word_class, tokens.special.tolist(), strict=True)
    ]


def _check_window(
    model: ModelView, layers: Sequence[int], tokens: Tokens, pattern: Float64[Tensor, "layer head query key"]
) -> None:
    """Raise for a layer that may not look at all tokens that come before: it has a window, and we count beyond it."""
    for layer, own in zip(layers, pattern, strict=True):
        if not model.seen(layer, tokens.id, own)[-1].all():
            raise ValueError(
                f"layer {layer} of {model.name} looks at a window of tokens shorter than this prompt of {len(tokens)}, "
                f"and AttentionPatterns counts all that come before: use shorter prompts, or other layers"
            )
