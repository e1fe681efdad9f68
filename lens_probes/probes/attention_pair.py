"""AttentionPair: how does a query token attend to given key tokens, and what does it read from them?

For a query token and one or more key tokens of each prompt, in every head, from the model's own queries, keys and
values (after rotary positions and their norms):

    terms[..., d_head] = q[d_head] k[d_head] / sqrt(d_head)     per dimension; the model's own scale
    dot                = sum over d_head of terms
    score              = dot after the soft cap of the model, if it has one
    weight             = softmax of score over all tokens that the query can attend to         0 to 1
    value_norm         = |v|          written_norm = |weight v W_O|, what the key token adds to the query token

Values are those that the heads mix (OLMo clips them first), and W_O includes the model's residual multiplier (Granite).

`contrast` compares two keys over minimal pairs, prompts that differ in a cue only:

    contrast = (score of the first key - score of the second) in the prompt whose cue refers to the first,
               minus the same in the prompt whose cue refers to the second     in nats: a log ratio of the two weights

A difference of scores does not depend on the weights of other tokens, so an attention sink has no effect on it. If the
words are at the same positions in both prompts, distance has no effect either.

Raises if softmax(score) does not reproduce the model's own pattern (position biases such as ALiBi, attention sinks in
the softmax). Two queries are checked: the given one, and the one that spreads its attention most, since a query that
attends to one token has weight 1 for any score. Raises if the weighted values do not sum to the outputs of the heads,
or these do not add up to what attention adds to the stream. Raises if a prompt lacks a word or has it twice, and if a
key follows the query in a decoder.

Source: Henry Dashwood, "How to Think About Self-Attention Intuitively", whose toy is `lp.toy`; Vaswani et al. 2017,
arXiv 1706.03762.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, Unpack

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import torch
from einops import einsum, rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lens_probes import figures
from lens_probes.maths import inference
from lens_probes.messages import amount, brief, interval
from lens_probes.model import ModelView, tolerance
from lens_probes.probe import Probe
from lens_probes.reading import Reading
from lens_probes.result import Quantity, Result, Shown, derived, measured, paired
from lens_probes.settings import Allowed, Layers
from lens_probes.text.places import PLACE, Place, is_place, name_of, place_of, shown
from lens_probes.text.prompts import PromptTable, whole_number

NULL = "attention does not depend on the cue; the two prompts of a pair swapped at random"


class AttentionPairResult(Result):
    """Scores, weights and values of each key, one row per prompt. Memory scales with the number of prompts."""

    headline = "weight"
    query: str
    layer: tuple[str, ...]
    head: tuple[str, ...]
    key: tuple[str, ...]
    prompt: PromptTable
    query_position: Int[Tensor, " prompt"] = measured("position of the query token in its prompt", low=0)
    key_position: Int[Tensor, "prompt key"] = measured("position of the key token in its prompt", low=0)
    terms: Float[Tensor, "layer head prompt key d_head"] = measured("one dimension's term of the score", unit="nats")
    dot: Float[Tensor, "layer head prompt key"] = measured("scaled product of query and key", unit="nats")
    score: Float[Tensor, "layer head prompt key"] = measured("score, the input of the softmax", unit="nats")
    weight: Float[Tensor, "layer head prompt key"] = measured("attention to the key", low=0, high=1)
    value: Float[Tensor, "layer head prompt key d_value"] = measured("value of the key token")
    written_norm: Float[Tensor, "layer head prompt key"] = measured(
        "length of the vector that the key token adds to the query token", low=0
    )

    @derived("length of the key token's value", low=0)
    def value_norm(self) -> Float[Tensor, "layer head prompt key"]:
        """The length of the key token's value."""
        return self.value.norm(dim=-1)

    def written(self, model: Any, layer: int | str, head: int | str) -> Float[Tensor, "prompt key d_model"]:
        """The vector that each key token adds to the query token through head `head` of layer `layer`.

        Read those of a prompt with `lp.read_vector(model, written[prompt])`. In models with a norm between attention
        and the residual stream (Gemma 2), they are the vectors before that norm.
        """
        view = ModelView(model)
        if self.provenance.model != view.name or self.provenance.processed != view.processed:
            raise ValueError(
                f"written needs the model of this result, {self.provenance.describe()}; got {view.name} "
                f"({'processed' if view.processed else 'raw'} weights): pass the same model"
            )
        at = i, j = self.index_of("layer", layer), self.index_of("head", head)
        return self.weight[at][..., None] * self.value[at] @ view.W_O(int(self.layer[i]))[j].float().cpu()

    def conditions(self) -> str:
        """The query and the keys."""
        more = f" and {len(self.key) - 4} more" if len(self.key) > 4 else ""
        return f"query “{self.query}”, keys “{'”, “'.join(self.key[:4])}”{more}"

    # The page

    def shown(self) -> dict[str, Shown]:
        """The contrast of minimal pairs by head, and quantities by head; positions are labels here."""
        shown = {name: each for name, each in super().shown().items() if not name.endswith("_position")}
        try:
            effect = self.contrast(permutations=1)["effect"].to_numpy()
        except ValueError:  # prompts that are no pairs have none
            return shown
        shape = (len(self.layer), len(self.head))
        return {"contrast": Shown(self._contrast("score"), ("layer", "head"), effect.reshape(shape)), **shown}

    def findings(self) -> list[str]:
        """In how many heads the cue moves attention, and in which most; nothing where prompts are no pairs."""
        try:
            table = self.contrast()
        except ValueError:
            return []
        if not np.isfinite(table["effect"]).any():
            return []
        best: dict[str, Any] = table.loc[table["effect"].abs().idxmax()].to_dict()
        return [
            f"In {np.count_nonzero(table['q'] < 0.05)} of {len(table)} heads the cue moves attention between the keys "
            f"(q < 0.05, {amount(int(best['pairs']), 'pair')}), most in L{best['layer']}{best['head']}: "
            f"{table.attrs['effect']} {best['effect']:.2f} ({interval(best['low'], best['high'])}). The null: "
            f"{table.attrs['null']}."
        ]

    # Minimal pairs

    def contrast(
        self,
        *,
        quantity: Literal["score", "weight"] = "score",
        permutations: int = inference.PERMUTATIONS,
        seed: int = 0,
    ) -> pd.DataFrame:
        """Per head: does the cue shift attention from the second key to the first? Effect, interval, p, q over heads.

        Prompts 0 and 1 are a pair, 2 and 3, and so on; in the first of a pair the cue refers to the first key. A pair
        counts only if its three words have the same positions in both prompts: `pairs`, of `pairs_given`.
        `quantity="score"` is in nats and independent of attention sinks; `quantity="weight"` compares the raw weights.
        In a decoder, a cue after the query has an effect of exactly 0, with p 1. `attention_on_keys` is the mean weight
        of both keys together. The 95 % interval is Student's t over pairs; p is two-sided, by swapping the prompts of a
        pair.
        """
        says, first = self._contrast(quantity).title, self._pairs()
        on_keys = self.weight[:, :, torch.stack([first, first + 1]), :2].sum(-1).mean((2, 3))
        return paired(
            self.cells("layer", "head"),
            self._moved(quantity),
            says=says,
            null=NULL,
            permutations=permutations,
            seed=seed,
            attention_on_keys=on_keys.flatten().numpy(),
            pairs=len(first),
            pairs_given=len(self.prompt) // 2,
        )

    def _contrast(self, quantity: str) -> Quantity:
        """Name and unit of the contrast of scores or weights."""
        if quantity not in ("score", "weight"):
            raise ValueError(f"quantity must be 'score' or 'weight'; got {brief(quantity)}")
        keys = " over ".join(f"“{key}”" for key in self.key[:2])
        return Quantity(f"effect of the cue on the {quantity} of {keys}", self.quantity(quantity).unit)

    def _moved(self, quantity: str) -> Float[np.ndarray, "unit pair"]:
        """The contrast of each pair, layers and heads laid end to end."""
        first = self._pairs()
        one, other = getattr(self, quantity)[..., :2].double().unbind(-1)
        return ((one - other)[:, :, first] - (one - other)[:, :, first + 1]).flatten(0, 1).numpy()

    def _pairs(self) -> Int[Tensor, " pair"]:
        """The first prompt of each pair whose words have the same positions in both prompts."""
        n = len(self.prompt)
        if len(self.key) < 2 or n % 2 or not n:
            raise ValueError(
                f"contrast needs two keys and an even number of prompts, two per pair; got {len(self.key)} keys and "
                f"{n} prompts: name two keys, and give the prompts of each pair one after the other"
            )
        positions = torch.cat([self.query_position[:, None], self.key_position], dim=1)
        first = torch.arange(0, n, 2)
        same = (positions[first] == positions[first + 1]).all(1)
        if not same.any():
            raise ValueError(
                f"query and keys must have the same positions in both prompts of a pair; got {len(first)} pairs, none "
                f"of which has: use prompts of equal length"
            )
        return first[same]

    # Figures

    def figure(self, **look: Unpack[figures.Look]) -> go.Figure:
        """The mean attention of the query to each key, by layer and head, on one colour scale."""
        weight = self.weight.mean(2)
        return figures.small_grids(
            [(figures.named(key), weight[:, :, number].tolist()) for number, key in enumerate(self.key)],
            x=self.head,
            y=self.layer,
            title=self.title(f"Mean attention of “{self.query}” to each key, per head"),
            x_title="head",
            y_title="layer",
            colour_title=self.quantity("weight").title,
            low=0,
            **look,
        )

    def figure_contrast(self, **look: Unpack[figures.Look]) -> go.Figure:
        """How far the cue moves each head from the second key to the first, in scores.

        For stars, draw a test: `result.figure_test(result.contrast())`.
        """
        effect = self._moved("score").mean(1).reshape(len(self.layer), len(self.head))
        title = self.title(f"Effect of the cue on attention to “{self.key[0]}” over “{self.key[1]}”")
        return self.draw_grid(effect, self._contrast("score"), title, **look)

    def figure_terms(
        self, layer: int | str, head: int | str, prompt: int = 0, **look: Unpack[figures.Look]
    ) -> go.Figure:
        """What each dimension of a head adds to the score of each key (in brackets), in one prompt."""
        whole_number("prompt", prompt)
        if not 0 <= prompt < len(self.prompt):
            raise ValueError(f"prompt {prompt} is out of range: this result has prompts 0 to {len(self.prompt) - 1}")
        at = i, j, _ = self.index_of("layer", layer), self.index_of("head", head), prompt
        sums, name = self.dot[at].tolist(), f"L{self.layer[i]}{self.head[j]}"
        question = f"Terms of the score of “{self.query}” with each key, per dimension of {name}, prompt {prompt}"
        return figures.small_grids(
            [("", self.terms[at].tolist())],
            x=[str(i) for i in range(self.terms.shape[-1])],
            y=[f"{figures.named(key)} ({dot:.2f})" for key, dot in zip(self.key, sums, strict=True)],
            title=self.title(f"{question}\n{figures.spelled(self.prompt.text[prompt], 90)}"),
            x_title="dimension of the head",
            y_title="key (score before a soft cap)",
            colour_title=self.quantity("terms").title,
            signed=True,
            **look,
        )


def _are_keys(asked: object) -> bool:
    """Whether a value names one token or more, each once."""
    if isinstance(asked, str) or not isinstance(asked, Sequence | Mapping) or not len(asked):
        return False
    places = list(asked.values()) if isinstance(asked, Mapping) else list(asked)
    return all(map(is_place, places)) and len(named(asked)) == len(asked)


if TYPE_CHECKING:
    Keys = Sequence[Place] | Mapping[str, Place]
else:
    Keys = Annotated[
        Any,
        Allowed(f"a list of different keys, or name -> key; each is {PLACE}", _are_keys, kind="Sequence | Mapping"),
    ]


class AttentionPair(Probe[AttentionPairResult]):
    """The attention of a query token to key tokens of each prompt, and what it reads from them.

    `query` and each of `keys` is a word, a position, or several words of which a prompt has one. `keys` may have names:
    `{"animal": ["cat", "dog"], "thing": ["mat", "sofa"]}`. For a word of several tokens, the last token counts.

    >>> import lens_probes as lp
    >>> result = lp.AttentionPair("it", ("cat", "mat")).run(lp.tiny.bridge(), "The cat left the mat. Tired, it slept.")
    >>> tuple(result.weight.shape), bool((result.terms.sum(-1) - result.dot).abs().max() < 1e-5)
    ((3, 4, 1, 2), True)
    """

    query: Place
    keys: Keys
    layers: Layers = None

    def hooks(self, model: ModelView) -> list[str]:
        """Queries, keys, values and patterns of every layer, and the outputs of its heads and its attention."""
        of_heads = (model.hook_query, model.hook_key, model.hook_value, model.hook_pattern)
        names = [
            name
            for layer in model.layers(self.layers)
            for name in (*(hook(layer) for hook in of_heads), *model.hooks_written(layer))
        ]
        return list(dict.fromkeys(names))  # the stream after one layer is the stream before the next

    def measure(self, reading: Reading) -> AttentionPairResult:
        """Find the tokens, then compute layer by layer."""
        model, keys = reading.model, named(self.keys)
        layers, prompts = model.layers(self.layers), list(reading.by_prompt())
        query_position = torch.tensor([place_of(one.tokens, self.query) for one in prompts])
        key_position = torch.tensor([[place_of(one.tokens, key) for key in keys.values()] for one in prompts])
        ahead = (key_position > query_position[:, None]).any(1)
        if not model.encoder and ahead.any():
            raise ValueError(
                f"keys must precede the query, since {model.name} attends to earlier tokens only; got a later key in "
                f"{shown(prompts[int(ahead.nonzero()[0])].tokens)}: put the query after its keys"
            )
        found = [of_layer(reading, layer, prompts, query_position, key_position) for layer in layers]
        return self.result(
            reading,
            query=name_of(self.query),
            layer=tuple(map(str, layers)),
            key=tuple(keys),
            query_position=query_position,
            key_position=key_position,
            **{name: torch.stack([each[name] for each in found]) for name in found[0]},
        )


class Scored(NamedTuple):
    """The scores of one query with every token of its prompt, and the resulting weights."""

    terms: Float[Tensor, "key head d_head"]
    dot: Float[Tensor, "key head"]
    score: Float[Tensor, "key head"]
    weight: Float[Tensor, "key head"]


def scored(
    query: Float[Tensor, "head d_head"],
    keys: Float[Tensor, "key head d_head"],
    allowed: Bool[Tensor, " key"],
    scale: float,
    cap: Callable[[Float[Tensor, "key head"]], Float[Tensor, "key head"]],
) -> Scored:
    """Terms, their sum, the score after the model's soft cap, and its softmax over the allowed keys.

    >>> query, keys = torch.tensor([[1.0, 2.0]]), torch.tensor([[[2.0, 0.0]], [[0.0, 1.0]]])
    >>> scored(query, keys, torch.tensor([True, True]), 0.5, lambda dot: dot).weight
    tensor([[0.5000],
            [0.5000]])
    """
    terms = query * keys * scale
    dot = terms.sum(-1)
    score = cap(dot)
    return Scored(terms, dot, score, score.masked_fill(~allowed[:, None], -torch.inf).softmax(0))


def of_layer(
    reading: Reading,
    layer: int,
    prompts: Sequence[Reading],
    query_position: Int[Tensor, " prompt"],
    key_position: Int[Tensor, "prompt key"],
) -> dict[str, Float[Tensor, "head prompt key ..."]]:
    """One layer's scores, values and outputs, with the checks that the module docstring lists."""
    model, position, lengths = reading.model, reading.tokens.position, [len(one.tokens) for one in prompts]
    model.check_written(layer, reading.__getitem__)
    activations = (
        model.rotated(reading[model.hook_query(layer)].float(), position),
        model.per_head(model.rotated(reading[model.hook_key(layer)].float(), position)),
        model.per_head(model.mixed(reading[model.hook_value(layer)].float())),
        reading[model.hook_z(layer)].float(),
    )
    by_prompt = zip(prompts, *(each.split(lengths) for each in activations), strict=True)
    W_O, found = model.W_O(layer).float(), {}
    for (one, q, k, v, z), asked, at in zip(by_prompt, query_position.tolist(), key_position, strict=True):
        pattern = one.pattern(model.hook_pattern(layer))
        allowed, close = model.seen(layer, one.tokens.id, pattern), tolerance(pattern.dtype)
        if not allowed[asked, at].all():
            raise ValueError(
                f"keys must be within the query's attention window in layer {layer} of {model.name}; got one before it "
                f"in {shown(one.tokens)}: use other layers, or a shorter distance between query and keys"
            )
        pattern = pattern.float()
        largest = pattern.amax(-1).amin(0)  # for each query, in the head that spreads its attention most
        spread = int(largest.argmin())
        if not largest[spread] < 1 - close:  # otherwise any larger scale would pass
            raise ValueError(
                f"a prompt must have a query that spreads its attention in layer {layer} of {model.name}, to check the "
                f"scores; in {shown(one.tokens)} got a weight of {float(largest[spread]):.4g} on one token from every "
                f"query: use longer prompts, or other layers"
            )
        for place in (spread, asked):
            own = scored(q[place], k, allowed[place], model.attention_scale(layer), model.scores)
            off = float((own.weight - pattern[:, place].T).abs().max())
            if not off <= close:
                raise ValueError(
                    f"softmax(q.k) must reproduce the attention pattern of layer {layer} of {model.name}; got weights "
                    f"that differ by {off:.2g}, as with a position bias, an attention sink or another scale: use "
                    f"another model"
                )
        size = float(v.abs().max())
        off = float((einsum(pattern, v, "head query key, key head d -> query head d") - z).abs().max())
        if not off <= close * size:
            raise ValueError(
                f"weights times values must sum to the outputs of the heads of layer {layer} of {model.name}; got sums "
                f"that are off by {off:.2g}, with values up to {size:.2g}: use another model"
            )
        written = einsum(own.weight[at, :, None] * v[at], W_O, "key head d_head, head d_head d -> key head d")
        for name, numbers in {**own._asdict(), "value": v}.items():
            found.setdefault(name, []).append(numbers[at])
        found.setdefault("written_norm", []).append(written.norm(dim=-1))
    return {
        name: rearrange(torch.stack(each), "prompt key head ... -> head prompt key ...").cpu()
        for name, each in found.items()
    }


def named(keys: Keys) -> dict[str, Place]:
    """Keys by name; a key without a name is named after itself."""
    return dict(keys) if isinstance(keys, Mapping) else {name_of(key): key for key in keys}
