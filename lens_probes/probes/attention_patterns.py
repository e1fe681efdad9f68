"""AttentionPatterns: which tokens does each head attend to?

Every query that can attend to two tokens or more counts. Special tokens are excluded as queries but kept as keys. With
a the query's row of the attention pattern, over its n allowed keys:

    first_token     = a on the first token of the prompt                  0 to 1, the attention sink
    self            = a on the query token                                0 to 1
    previous_token  = a on the token before                               0 to 1
    duplicate_token = a on earlier copies of the query token              0 to 1, over the queries that have one
    induction       = a on the tokens right after earlier copies          0 to 1, over the queries that have one
    entropy         = -sum a log a / log n                                0 (one token) to 1 (uniform)
    max             = max a                                               0 to 1
    distance        = sum a |query - key|                                 in tokens, 0 or more

`mean[statistic, layer, head]` is the mean over queries, and `uniform[statistic]` its value under uniform attention to
the allowed keys. `by_word_class` splits attention by the word classes of query and key, again with the value under
uniform attention. The result's size does not depend on the number of tokens; `keep_patterns=True` also stores the
patterns, 4 bytes per layer, head and pair of tokens, at most 1 GB. Raises for prompts longer than a layer's attention
window.

Source: Vaswani et al. 2017, arXiv 1706.03762 (the appendix shows single heads); Olsson et al. 2022, "In-context
Learning and Induction Heads", arXiv 2209.11895. The names of heads are those of `transformer_lens.head_detector`.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, NamedTuple, Unpack

import pandas as pd
import plotly.graph_objects as go
import torch
from einops import einsum, rearrange
from jaxtyping import Bool, Float64, Int, Shaped
from torch import Tensor

from lens_probes import figures
from lens_probes.maths import inference
from lens_probes.messages import brief
from lens_probes.model import ModelView
from lens_probes.probe import Probe
from lens_probes.reading import Reading
from lens_probes.result import NO_PAIRS, PatternResult, Quantity, Shown, added, spread, summed
from lens_probes.settings import Layers
from lens_probes.text.prompts import PairTable, Tokens, concatenate

Statistic = Literal[
    "first_token", "self", "previous_token", "duplicate_token", "induction", "entropy", "max", "distance"
]
STATISTICS: Mapping[str, Quantity] = {
    "first_token": Quantity("attention to the first token", low=0, high=1),
    "self": Quantity("attention to the token itself", low=0, high=1),
    "previous_token": Quantity("attention to the previous token", low=0, high=1),
    "duplicate_token": Quantity("attention to earlier copies of the token", low=0, high=1),
    "induction": Quantity("attention to the tokens after earlier copies", low=0, high=1),
    "entropy": Quantity("entropy of attention / entropy of uniform attention", low=0, high=1),
    "max": Quantity("largest attention to one token", low=0, high=1),
    "distance": Quantity("mean distance from query to key", "tokens", low=0),
}
CLASSES = (*inference.CLASSES, "other", "special")


class AttentionPatternsResult(PatternResult):
    """Sums over queries, by the query's word class; patterns if they were kept."""

    quantities = STATISTICS
    keeping = "AttentionPatterns(keep_patterns=True)"
    not_keeping = "AttentionPatterns() without keep_patterns"
    statistic: tuple[Statistic, ...]
    word_class: tuple[str, ...]
    queries: Float64[Tensor, "statistic word_class"] = summed("number of queries that count")
    total: Float64[Tensor, "statistic word_class layer head"] = summed("sum of the statistic over these queries")
    uniform_total: Float64[Tensor, "statistic word_class"] = summed("the same sum under uniform attention")
    class_total: Float64[Tensor, "word_class other_word_class layer head"] = summed(
        "attention from queries of one class to keys of another, summed over queries"
    )
    class_uniform_total: Float64[Tensor, "word_class other_word_class"] = summed("the same under uniform attention")

    def _of_all(self, sums: Shaped[Tensor, "statistic word_class *axes"]) -> Shaped[Tensor, "statistic *axes"]:
        """A sum over queries of all word classes."""
        return sums.sum(1)

    def by_word_class(self) -> pd.DataFrame:
        """Mean attention from queries of one class to keys of another, per head; `uniform`: under uniform attention."""
        queries = self.queries[self._index("max")]  # all of them
        if not queries.any():
            raise ValueError(
                "a query must have two keys or more; got none that has: pass prompts of two tokens or more"
            )
        asking = rearrange(queries, "query_class -> query_class 1 1 1")
        uniform = rearrange(self.class_uniform_total, "query_class key_class -> query_class key_class 1 1")
        frame = self.cells("word_class", "other_word_class", "layer", "head")
        frame = frame.set_axis(["query_class", "key_class", "layer", "head"], axis=1)
        frame = frame[["layer", "head", "query_class", "key_class"]].assign(
            attention=(self.class_total / asking).flatten().numpy(),
            uniform=(uniform / asking).expand_as(self.class_total).flatten().numpy(),
            queries=asking.expand_as(self.class_total).flatten().long().numpy(),
        )
        return frame.query("queries > 0").reset_index(drop=True)

    # The page

    def shown(self) -> dict[str, Shown]:
        """Each statistic on its own scale, beside its value under uniform attention."""
        shown = super().shown()
        mean, of_uniform = (shown.pop(name).values for name in ("mean", "uniform"))
        for at, statistic in enumerate(self.statistic):
            quantity, uniform = STATISTICS[statistic], f"uniform_{statistic}"
            shown[statistic] = Shown(quantity._replace(null=uniform), ("layer", "head"), mean[at])
            shown[uniform] = Shown(Quantity("uniform attention", quantity.unit), (), of_uniform[at, ...])
        return shown

    def findings(self) -> list[str]:
        """The attention sink: how much attention goes to the first token, and in which head most."""
        mean = self.mean_of("first_token")
        if mean.isnan().all():
            return []
        return [
            f"Heads attend to the first token with weight {mean.nanmean():.2f} on average. The head that does so most "
            f"is {self.highest('first_token')}"
        ]

    # Figures

    def figure(self, statistic: Statistic = "first_token", **look: Unpack[figures.Look]) -> go.Figure:
        """One statistic by layer and head; the last column is the null, uniform attention."""
        return self.draw_statistic(statistic, **look)

    def figure_head(
        self, layer: int | str, head: int | str, prompt: int = 0, **look: Unpack[figures.Look]
    ) -> go.Figure:
        """The pattern of one head, over all tokens of a prompt."""
        return self.figure_heads([(layer, head)], prompt, **look)

    def figure_heads(
        self, heads: Sequence[tuple[int | str, int | str]], prompt: int = 0, **look: Unpack[figures.Look]
    ) -> go.Figure:
        """The patterns of some heads side by side, over all tokens of a prompt."""
        pairs = list(heads) if isinstance(heads, Iterable) else []
        if not pairs or not all(isinstance(each, tuple) and len(each) == 2 for each in pairs):
            raise ValueError(f"heads must be (layer, head) pairs, such as [(0, 1), (2, 3)]; got {brief(heads)}")
        pattern, panels = self.pattern(prompt), []
        for layer, head in pairs:
            i, j = self.index_of("layer", layer), self.index_of("head", head)
            panels.append((f"L{self.layer[i]}{self.head[j]}", pattern[i, j]))
        question = f"Attention of {', '.join(name for name, _ in panels)}, prompt {prompt}"
        return self.draw_patterns(panels, prompt, question, quantity="attention", **look)

    def figure_token(
        self, layer: int | str, token: int | str, prompt: int = 0, **look: Unpack[figures.Look]
    ) -> go.Figure:
        """The attention of one query token in all heads of a layer: a position, or a word that the prompt has once."""
        row, at = self.token.row(prompt, token), self.index_of("layer", layer)
        position, text = self.token.rows(prompt).index(row), figures.quoted(self.token.text[row])
        return self.draw_patterns(
            [("", self.pattern(prompt)[at, :, position])],
            prompt,
            f"Attention of {text}, token {position} of prompt {prompt}, in layer {self.layer[at]}",
            quantity="attention",
            rows=self.head,
            y_title="head",
            **look,
        )


class AttentionPatterns(Probe[AttentionPatternsResult]):
    """Statistics of every head's attention pattern, and the patterns themselves if `keep_patterns`.

    >>> import lens_probes as lp
    >>> result = lp.AttentionPatterns().run(lp.tiny.bridge(), lp.demo.sentences()[:4], progress=False)
    >>> tuple(result.mean.shape), result.statistic[:3], tuple(result.mean_of("induction").shape)
    ((8, 3, 4), ('first_token', 'self', 'previous_token'), (3, 4))
    """

    reads_stacks = True
    keep_patterns: bool = False
    layers: Layers = None

    def hooks(self, model: ModelView) -> dict[str, str]:
        """The attention pattern of every layer."""
        return {str(layer): model.hook_pattern(layer) for layer in model.layers(self.layers)}

    def measure(self, reading: Reading) -> AttentionPatternsResult:
        """Prompt by prompt, then the sums over the batch."""
        model, tokens = reading.model, reading.tokens
        classes = (*CLASSES, *sorted(set(word_classes(tokens)) - set(CLASSES)))
        sums, patterns, pairs = [], [], []
        for one in reading.by_prompt():
            pattern = torch.stack([one.pattern(hook) for hook in one.points.values()]).double().cpu()
            everything = torch.ones(pattern.shape[2:], dtype=torch.bool)
            allowed = everything if model.encoder else everything.tril()
            _check_window(model, model.layers(self.layers), one.tokens, pattern)
            own = sums_of(pattern, allowed, one.tokens, classes)
            sums.append(own._asdict() | spread(own.queries.sum(1), own.total.sum(1)))
            if self.keep_patterns:
                query, key = allowed.nonzero(as_tuple=True)
                pairs.append(PairTable(torch.full_like(query, int(one.tokens.prompt[0])), query, key))
                patterns.append(pattern[:, :, query, key].float())
        return self.result(
            reading,
            statistic=tuple(STATISTICS),
            word_class=classes,
            **added(sums),
            token=tokens if self.keep_patterns else tokens[torch.zeros(0, dtype=torch.int64)],
            pair=concatenate(pairs, [0] * len(pairs)) if pairs else NO_PAIRS,
            attention=torch.cat(patterns, dim=2) if patterns else None,
        )


class Sums(NamedTuple):
    """One prompt's contribution to the sums of a result."""

    queries: Float64[Tensor, "statistic word_class"]
    total: Float64[Tensor, "statistic word_class layer head"]
    uniform_total: Float64[Tensor, "statistic word_class"]
    class_total: Float64[Tensor, "word_class other_word_class layer head"]
    class_uniform_total: Float64[Tensor, "word_class other_word_class"]


def sums_of(
    pattern: Float64[Tensor, "layer head query key"],
    allowed: Bool[Tensor, "query key"],
    tokens: Tokens,
    classes: Sequence[str],
) -> Sums:
    """Every statistic summed over a prompt's queries by their word class, and attention from class to class."""
    number = torch.tensor([classes.index(name) for name in word_classes(tokens)])
    members = torch.nn.functional.one_hot(number, len(classes)).double()
    asks = ~tokens.special & (allowed.sum(1) > 1)
    values, uniform, counts = statistics_of(pattern, allowed, tokens.id)
    counted = (counts & asks).double()
    asking = members * asks[:, None]
    share = allowed.double() / allowed.sum(1, keepdim=True)
    return Sums(
        queries=counted @ members,
        total=einsum(counted, members, values, "stat query, query cls, stat layer head query -> stat cls layer head"),
        uniform_total=(counted * uniform) @ members,
        class_total=einsum(
            asking, pattern, members, "query cls, layer head query key, key other -> cls other layer head"
        ),
        class_uniform_total=asking.T @ share @ members,
    )


def statistics_of(
    pattern: Float64[Tensor, "layer head query key"], allowed: Bool[Tensor, "query key"], ids: Int[Tensor, " query"]
) -> tuple[
    Float64[Tensor, "statistic layer head query"], Float64[Tensor, "statistic query"], Bool[Tensor, "statistic query"]
]:
    """Every statistic of every query, its value under uniform attention, and the queries that count for it."""
    n = len(ids)
    query, key = torch.arange(n)[:, None], torch.arange(n)
    apart, number = (query - key).abs().double(), allowed.sum(1).double()
    copy = (ids[:, None] == ids) & (key < query)
    after = copy.roll(1, 1) & (key > 0)
    on = torch.stack([(key == 0).expand(n, n), key == query, key == query - 1, copy, after]) & allowed
    entropy = torch.special.entr(pattern).sum(-1) / number.log().clamp(min=1e-9)
    attended = einsum(pattern, on.double(), "layer head query key, stat query key -> stat layer head query")
    values = torch.stack([*attended, entropy, pattern.amax(-1), (pattern * apart).sum(-1)])
    uniform = [*(on.sum(-1) / number), torch.ones(n), 1 / number, (apart * allowed).sum(1) / number]
    everyone = torch.ones(n, dtype=torch.bool)
    counts = [everyone, everyone, key > 0, copy.any(1), after.any(1), everyone, everyone, everyone]
    return values, torch.stack(uniform).double(), torch.stack(counts)


def word_classes(tokens: Tokens) -> list[str]:
    """The word class of every token; special tokens are one class, and tokens of no word another."""
    return [
        "special" if special else own or "other"
        for own, special in zip(tokens.word_class, tokens.special.tolist(), strict=True)
    ]


def _check_window(
    model: ModelView, layers: Sequence[int], tokens: Tokens, pattern: Float64[Tensor, "layer head query key"]
) -> None:
    """Raise if in a layer the last token cannot attend to all earlier tokens: the statistics count them as keys."""
    for layer, own in zip(layers, pattern, strict=True):
        if not model.seen(layer, tokens.id, own)[-1].all():
            raise ValueError(
                f"prompts must not be longer than the attention window of a layer; got {len(tokens)} tokens, more than "
                f"the window of layer {layer} of {model.name}: use shorter prompts, or other layers"
            )
