"""AttentionPair: what does one token look for in another, and what does it get?

For a query token and one or more key tokens of each prompt, in every head, from the model's own queries, keys and
values (after rotary positions and their norms):

    terms[..., d_head] = q[d_head] k[d_head] / sqrt(d_head)     what each dimension adds; the model's own scale
    dot                = sum over d_head of terms
    score              = dot after the soft cap of the model, if it has one
    weight             = softmax of score over all tokens that the query may look at           0 to 1
    value_norm         = |v|          written_norm = |weight v W_O|, what the key token adds to the query token

Values are as the heads mix them (OLMo clips them first), and W_O has the factor with which the model adds what its
attention puts out (Granite).

Which of two keys is looked at more, `contrast` asks of minimal pairs: prompts that differ in a cue only.

    contrast = (score of the first key - score of the second) where the cue means the first,
               less the same where it means the second                    in nats: a log ratio of the two weights

A difference of scores does not depend on what goes to other tokens, so an attention sink cannot make or hide it; and
with the words of both prompts at the same places, neither can distance.

Raises where softmax(score) is not the model's own pattern (position biases such as ALiBi, attention sinks in the
softmax), at the query asked for and at the one whose attention is spread most, since a query that looks at one token
has weight 1 whatever the score. Raises where the weighted values do not sum to what the heads put out, or what they
write does not add up to what attention adds to the stream. Raises where a prompt lacks a word or has it twice, and
where a decoder would have to look ahead.

Source: Henry Dashwood, "How to Think About Self-Attention Intuitively", whose toy is `lp.toy`; Vaswani et al. 2017,
arXiv 1706.03762.
"""

from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import Any, Literal

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import torch
from jaxtyping import Float, Int
from torch import Tensor

from lens_probes import figures
from lens_probes.maths import inference
from lens_probes.messages import brief
from lens_probes.model import ModelView, tolerance
from lens_probes.probe import Probe
from lens_probes.reading import Reading
from lens_probes.result import Result, measured
from lens_probes.settings import Layers
from lens_probes.text.prompts import PromptTable, Tokens, prompt_table, whole_number

Place = str | int | Sequence[str]
NULL = "what a head looks at does not depend on the cue; the two prompts of a pair swapped at random"


class AttentionPairResult(Result):
    """What the query makes of each key, one row a prompt. It grows with the number of prompts."""

    query: str
    layer: tuple[str, ...]
    head: tuple[str, ...]
    key: tuple[str, ...]
    prompt: PromptTable
    query_position: Int[Tensor, " prompt"] = measured("place of the query token in its prompt", low=0)
    key_position: Int[Tensor, "prompt key"] = measured("place of the key token in its prompt", low=0)
    terms: Float[Tensor, "layer head prompt key d_head"] = measured("what each dimension adds to dot")
    dot: Float[Tensor, "layer head prompt key"] = measured("product of query and key, scaled")
    score: Float[Tensor, "layer head prompt key"] = measured("dot as the softmax gets it")
    weight: Float[Tensor, "layer head prompt key"] = measured("share of attention", low=0, high=1)
    value: Float[Tensor, "layer head prompt key d_head"] = measured("the key token's value")
    written_norm: Float[Tensor, "layer head prompt key"] = measured(
        "length of what the key token adds to the query token", low=0
    )

    @property
    def value_norm(self) -> Float[Tensor, "layer head prompt key"]:
        """The length of the key token's value."""
        return self.value.norm(dim=-1)

    def written(self, model: Any, layer: int, head: int) -> Float[Tensor, "prompt key d_model"]:
        """The vector that each key token adds to the query token through head `head` of layer `layer`.

        Read that of a prompt with `lp.read_vector(model, written[prompt])`. On models with a norm between attention and
        the residual stream (Gemma 2) it is what comes before that norm.
        """
        view = ModelView(model)
        if self.provenance.model != view.name or self.provenance.processed != view.processed:
            raise ValueError(f"these values are of {self.provenance.model} and {view.name} came: pass the same model")
        at = self.index_of("layer", layer), self.index_of("head", head)
        W_O = view.W_O(layer)[head].float().cpu()
        return (self.weight[at][:, :, None] * self.value[at]) @ W_O

    # Minimal pairs

    def contrast(
        self, *, of: Literal["score", "weight"] = "score", permutations: int = inference.PERMUTATIONS, seed: int = 0
    ) -> pd.DataFrame:
        """Per head: does the cue move the query from the second key to the first? Effect, interval, p, q over heads.

        Prompts 0 and 1 are a pair, 2 and 3, and so on; the first of a pair has the cue for the first key. Only pairs
        whose three words stand at the same places in both prompts count: `pairs`, of `pairs_given`. `of="score"`: in
        nats, free of attention sinks; `of="weight"`: differences of the raw weights. A cue behind the query moves no
        decoder: exactly 0, p 1. `on_keys`: the mean weight on both keys together. The 95 % interval is
        Student's t over pairs; p is two-sided, from swapping the prompts of a pair.
        """
        if of not in ("score", "weight"):
            raise ValueError(f"contrast(of=...) is score or weight; {brief(of)} came")
        matched = self._pairs()
        values = getattr(self, of).double()
        difference = values[..., 0] - values[..., 1]
        moved = (difference[:, :, matched] - difference[:, :, matched + 1]).flatten(0, 1).numpy()  # unit, pair
        low, high = inference.mean_interval(moved)
        p = inference.sign_flip_p(moved, permutations, seed=seed)
        both = torch.stack([matched, matched + 1])
        frame = self.cells("layer", "head").assign(
            effect=moved.mean(1),
            low=low,
            high=high,
            p=p,
            q=inference.false_discovery(p),
            on_keys=self.weight[:, :, both, :2].sum(-1).mean((2, 3)).flatten().numpy(),
            pairs=len(matched),
            pairs_given=len(self.prompt) // 2,
        )
        frame.attrs["null"] = NULL
        return frame

    def _pairs(self) -> Int[Tensor, " pair"]:
        """The first prompts of the pairs whose words stand at the same places in both."""
        n = len(self.prompt)
        if len(self.key) < 2 or n % 2 or not n:
            raise ValueError(
                f"contrast needs two keys and an even number of prompts, two a pair; there are {len(self.key)} keys "
                f"and {n} prompts"
            )
        places = torch.cat([self.query_position[:, None], self.key_position], dim=1)
        first = torch.arange(0, n, 2)
        same = (places[first] == places[first + 1]).all(1)
        if not same.any():
            raise ValueError("in no pair do query and keys stand at the same places in both prompts: use equal lengths")
        return first[same]

    # Figures

    def figure(self) -> go.Figure:
        """The mean weight that the query gives each key, by layer and head, on one colour scale."""
        weight = self.weight.mean(2)
        return figures.small_grids(
            [(figures.named(key), weight[:, :, number].tolist()) for number, key in enumerate(self.key)],
            x=self.head,
            y=self.layer,
            title=self._title(f"Which heads look from “{self.query}” at each key?"),
            x_title="head",
            y_title="layer",
            colour_title="mean weight (0 to 1)",
        )

    def figure_contrast(self) -> go.Figure:
        """How far the cue moves each head from the second key to the first; a star where q < 0.05."""
        table = self.contrast()
        size = (len(self.layer), len(self.head))
        stars = np.asarray(table["q"] < 0.05).reshape(size)
        found = f"star: q < 0.05, {int(stars.sum())} of {stars.size}"
        return figures.heatmap(
            np.asarray(table["effect"]).reshape(size).tolist(),
            x=self.head,
            y=self.layer,
            title=self._title(f"Does the cue move “{self.query}” from “{self.key[1]}” to “{self.key[0]}”? ({found})"),
            x_title="head",
            y_title="layer",
            colour_title="contrast of scores (nats)",
            signed=True,
            text=[["*" if star else "" for star in row] for row in stars.tolist()],
        )

    def figure_terms(self, layer: int, head: int, prompt: int = 0) -> go.Figure:
        """What each dimension of a head adds to the score of each key (in brackets), in one prompt."""
        whole_number("prompt", prompt)
        if not 0 <= prompt < len(self.prompt):
            raise ValueError(f"prompt {prompt} was asked for and this result has prompts 0 to {len(self.prompt) - 1}")
        at = self.index_of("layer", layer), self.index_of("head", head), prompt
        sums = self.dot[at].tolist()
        return figures.small_grids(
            [("", self.terms[at].tolist())],
            x=[str(i) for i in range(self.terms.shape[-1])],
            y=[f"{figures.named(key)} ({dot:.2f})" for key, dot in zip(self.key, sums, strict=True)],
            title=f"What “{figures.spelled(self.query)}” finds in each key, in L{layer}H{head}\n"
            f"{figures.spelled(self.prompt.text[prompt], 90)}\n{self.provenance.describe()}",
            x_title="dimension of the head",
            y_title="",
            colour_title="term of the score",
            signed=True,
        )

    def _title(self, question: str) -> str:
        return f"{question}\n{self.provenance.describe()}"


class AttentionPair(Probe[AttentionPairResult]):
    """What the query token looks for in the key tokens of each prompt.

    `query` and each of `keys` is a word, a position, or several words of which a prompt has one; `keys` may have names:
    `{"animal": ["cat", "dog"], "thing": ["mat", "sofa"]}`. Of a word of several tokens the last is taken.

    >>> import lens_probes as lp
    >>> result = lp.AttentionPair("it", ("cat", "mat")).run(lp.tiny.bridge(), "The cat left the mat. Tired, it slept.")
    >>> tuple(result.weight.shape), bool((result.terms.sum(-1) - result.dot).abs().max() < 1e-5)
    ((3, 4, 1, 2), True)
    """

    query: Place
    keys: Sequence[Place] | Mapping[str, Place]
    layers: Layers = None

    def __post_init__(self) -> None:
        keys = self.keys
        if isinstance(keys, str) or not isinstance(keys, Sequence | Mapping) or not len(keys):
            raise ValueError(f"AttentionPair(keys=...) is a list of words or positions; {brief(keys)} came")
        places = keys.values() if isinstance(keys, Mapping) else keys
        for setting, place in [("query", self.query), *(("keys", place) for place in places)]:
            if not _is_place(place):
                raise ValueError(
                    f"AttentionPair({setting}=...) names a token by a word, by a position, or by several words of "
                    f"which each prompt has one; got {brief(place)}: ask about one position at a time"
                )
        if len(self._named()) < len(keys):
            raise ValueError(f"AttentionPair(keys=...) names each key once; {brief(keys)} came")

    def hooks(self, model: ModelView) -> list[str]:
        """Queries, keys, values and patterns of every layer, and what its heads and its attention put out."""
        of_heads = (model.hook_query, model.hook_key, model.hook_value, model.hook_pattern)
        names = [
            name
            for layer in model.layers(self.layers)
            for name in (*(hook(layer) for hook in of_heads), *model.hooks_written(layer))
        ]
        return list(dict.fromkeys(names))  # the stream after one layer is that before the next

    def measure(self, reading: Reading) -> AttentionPairResult:
        """Find the tokens, then compute a layer at a time."""
        model, named = reading.model, self._named()
        layers = model.layers(self.layers)
        prompts = list(reading.by_prompt())
        query = torch.tensor([place_of(one.tokens, self.query) for one in prompts])
        keys = torch.tensor([[place_of(one.tokens, key) for key in named.values()] for one in prompts])
        if not model.encoder and (keys > query[:, None]).any():
            row = int((keys > query[:, None]).any(1).nonzero()[0])
            raise ValueError(
                f"in {_shown(prompts[row].tokens)} a key stands after the query, and {model.name} looks back only: put "
                f"the query after its keys"
            )
        of_layers = [self._of_layer(reading, layer, prompts, query, keys) for layer in layers]
        terms, dot, score, weight, value, written_norm = (torch.stack(each) for each in zip(*of_layers, strict=True))
        return AttentionPairResult(
            query=_name(self.query),
            layer=tuple(map(str, layers)),
            head=tuple(f"H{head}" for head in range(model.n_heads)),
            key=tuple(named),
            prompt=prompt_table(reading.tokens),
            query_position=query,
            key_position=keys,
            terms=terms,
            dot=dot,
            score=score,
            weight=weight,
            value=value,
            written_norm=written_norm,
        )

    def _named(self) -> dict[str, Place]:
        return dict(self.keys) if isinstance(self.keys, Mapping) else {_name(key): key for key in self.keys}

    def _of_layer(
        self,
        reading: Reading,
        layer: int,
        prompts: Sequence[Reading],
        query: Int[Tensor, " prompt"],
        keys: Int[Tensor, "prompt key"],
    ) -> tuple[Tensor, ...]:
        """Terms, dot, score, weight, value and length written of one layer, `[head prompt key ...]`."""
        model, position = reading.model, reading.tokens.position
        q = model.rotated(reading[model.hook_query(layer)].float(), position)
        k = model.per_head(model.rotated(reading[model.hook_key(layer)].float(), position))
        v = model.per_head(model.mixed(reading[model.hook_value(layer)].float()))
        z, W_O = reading[model.hook_z(layer)].float(), model.W_O(layer).float()
        model.check_written(layer, reading.__getitem__)
        found = []
        for number, one in enumerate(prompts):
            own = torch.searchsorted(reading.tokens.prompt, one.tokens.prompt[0])  # its first row
            rows = slice(int(own), int(own) + len(one.tokens))
            pattern = one.pattern(model.hook_pattern(layer))  # head query key
            may = model.seen(layer, one.tokens.id, pattern)
            asked, at = int(query[number]), keys[number]
            if not may[asked, at].all():
                raise ValueError(
                    f"layer {layer} of {model.name} looks at a window of tokens that ends before a key in "
                    f"{_shown(one.tokens)}: ask for other layers, or bring query and keys nearer to each other"
                )
            close = tolerance(pattern.dtype)
            pattern = pattern.float()
            largest = pattern.amax(-1).amin(0)  # in the head of each query that spreads its attention most
            spread = int(largest.argmin())
            if not largest[spread] < 1 - close:  # else any larger scale would pass
                raise ValueError(
                    f"a prompt needs one query that shares out its attention in layer {layer} of {model.name}, since "
                    f"scores are checked by it; in {_shown(one.tokens)} got a weight of {float(largest[spread]):.4g} "
                    f"on one token from every query: use longer prompts, or other layers"
                )
            for place in (spread, asked):
                terms = q[rows][place] * k[rows] * model.attention_scale(layer)  # key head d_head
                dot = terms.sum(-1)
                score = model.scores(dot)
                weight = score.masked_fill(~may[place, :, None], -torch.inf).softmax(0)
                error = float((weight - pattern[:, place].T).abs().max())
                if not error <= close:
                    raise ValueError(
                        f"layer {layer} of {model.name} does something to the products of queries and keys that we do "
                        f"not know, such as a position bias, a sink or another scale (our weights differ from its "
                        f"pattern by {error:.2g}): use another model"
                    )
            size = float(v[rows].abs().max())
            off = float((torch.einsum("hqk,khd->qhd", pattern, v[rows]) - z[rows]).abs().max())
            if not off <= close * size:
                raise ValueError(
                    f"weights times values must sum to what the heads of layer {layer} of {model.name} put out; got "
                    f"sums that are off by {off:.2g}, with values up to {size:.2g}: use another model"
                )
            value = v[rows][at]
            written = torch.einsum("ihk,hkd->ihd", weight[at, :, None] * value, W_O)
            found.append((terms[at], dot[at], score[at], weight[at], value, written.norm(dim=-1)))
        return tuple(torch.stack(each).movedim(2, 0).cpu() for each in zip(*found, strict=True))


def _is_place(asked: object) -> bool:
    if isinstance(asked, str | Integral):
        return not isinstance(asked, bool)
    return isinstance(asked, Sequence) and len(asked) > 0 and all(isinstance(word, str) for word in asked)


def place_of(prompt: Tokens, asked: Place) -> int:
    """Where a prompt has the token asked for: a position, or the last token of the one word that is asked for."""
    if not isinstance(asked, Sequence):
        if not -len(prompt) <= asked < len(prompt):
            raise ValueError(f"position {asked} was asked for and {_shown(prompt)} has {len(prompt)} tokens")
        return int(asked) % len(prompt)
    wanted = {asked.lower()} if isinstance(asked, str) else {word.lower() for word in asked}
    words: dict[int, str] = {}
    for word, text in zip(prompt.word.tolist(), prompt.text, strict=True):
        words[word] = words.get(word, "") + text
    found = [word for word, text in words.items() if word >= 0 and text.strip().lower() in wanted]
    if len(found) != 1:
        raise ValueError(
            f"the word {_name(asked)!r} was asked for and {_shown(prompt)} has it {len(found)} times: name one "
            f"word that every prompt has once, or positions"
        )
    return int((prompt.word == found[0]).nonzero().max())


def _name(asked: Place) -> str:
    if isinstance(asked, str) or not isinstance(asked, Sequence):
        return str(asked)
    return asked[0] if len(asked) == 1 else f"{asked[0]}|..."


def _shown(prompt: Tokens) -> str:
    return repr("".join(prompt[~prompt.special].text).strip())
