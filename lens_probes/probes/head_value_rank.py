"""HeadValueRank: does a head put out its own token's value, or is another value closer?

A head's output z mixes the values of the tokens that it looks at. It is compared with the values that the same head
would make of every vocabulary entry's embedding w:

    value[v]                  = norm(w[v]) W_V + b_V                             of the layer and key/value head
    score[layer, head, token] = cosine of z and value[id of the token]           -1 to 1
    rank[layer, head, token]  = #{v != id : value[v] is strictly closer to z than value[id]}      0 to vocab - 1
    null_rank                 = the rank, for the same output, of another token of the same prompt and word class

    margin(s)         = cosine of z and the value at token s - the largest cosine of z and value[v], v != id of s
    other_margin      = the largest margin of the earlier tokens s of the prompt                  -2 to 2
    null_other_margin = the margin of a random one of them

A margin above 0 says that z is closer to an earlier token than to any vocabulary entry but that token's own. The tokens
s are not special and have other ids than the token; their values are those of the run, in context. An output that mixes
few values is close to one of them in any model. To see what training adds, `compare_with` an untrained model.

Embeddings have no positions here. Query heads of one key/value head share its values. Products are in float32. The
probe raises where the values of the run are not W_V of the normed states.

Source: the first version of "Paying Attention" (github.com/danavery/attention-encodings, README at 95d0415). It
compared the outputs of all layers with values of layer 0. A head's W_V has a basis of its own, in which only its own
values can be compared, so every layer's own W_V and norm are used here; in layer 0 they are the same.
"""

from typing import Any, Unpack

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import torch
from einops import einsum, rearrange
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import normalize

from lens_probes import figures
from lens_probes.maths import inference
from lens_probes.maths.ascent import seeded
from lens_probes.maths.vocabulary import nearest, ranks
from lens_probes.model import ModelView
from lens_probes.probe import Probe
from lens_probes.probes.rank_shift import null_ids
from lens_probes.reading import Reading
from lens_probes.result import Quantity, Result, measured, paired
from lens_probes.settings import Count, Layers, Seed
from lens_probes.text.prompts import Tokens

NULL = "the token's own value is as often closer to the head's output as another token's"
MODELS_NULL = "the two models are exchangeable within each prompt; q is a false-discovery rate over heads"


class HeadValueRankResult(Result):
    """Ranks and scores of every token's own value, by layer and head. Memory scales with the number of tokens."""

    headline = "rank"
    layer: tuple[str, ...]
    head: tuple[str, ...]
    token: Tokens
    n_vocab: int
    vocab: dict[int, str]  # the texts of the closest entries
    rank: Int[Tensor, "layer head token"] = measured(
        "rank of the own token's value", low=0, missing=-1, null="null_rank", low_on_top=True
    )
    score: Float[Tensor, "layer head token"] = measured("cosine with the own token's value", low=-1, high=1)
    null_rank: Int[Tensor, "layer head token"] = measured(
        "rank of the value of another token of the prompt and class", low=0, missing=-1
    )
    other: Int[Tensor, "layer head token"] = measured(
        "position of the earlier token whose value is closest", low=0, missing=-1
    )
    other_margin: Float[Tensor, "layer head token"] = measured(
        "cosine with the closest earlier token less that with the closest entry",
        low=-2,
        high=2,
        null="null_other_margin",
    )
    null_other_margin: Float[Tensor, "layer head token"] = measured(
        "cosine with a random earlier token less that with the closest entry", low=-2, high=2
    )
    neighbour_ids: Int[Tensor, "layer head token k"] | None = measured(
        "the entries with the nearest values, nearest first", low=0, missing=-1, into="vocab", default=None
    )
    neighbour_score: Float[Tensor, "layer head token k"] | None = measured(
        "cosine with the nearest values", low=-1, high=1, default=None
    )

    def by_head(self) -> pd.DataFrame:
        """One row per head: is the token's own value closer to its output than the control token's?

        `effect` is the share of tokens for which it is minus the share for which the control's is, -1 to 1: a mean over
        prompts with Student's t interval, p from swapping the two in each prompt at random. `rank` and `null_rank` are
        medians over the tokens that have both. Special tokens are excluded.
        """
        own, null = self.known("rank"), self.known("null_rank")
        values, says = self._by_prompt(np.sign(null - own)), "own value closer minus control's closer (share)"
        both = ~self.token.special.numpy() & ~np.isnan(own + null).all((0, 1))
        columns: dict[str, Any] = {"prompts": values.shape[1]}
        columns |= {name: np.median(each[..., both], -1).ravel() for name, each in (("rank", own), ("null_rank", null))}
        return paired(self.cells("layer", "head"), values, says=says, null=NULL, **columns)

    def by_other(self) -> pd.DataFrame:
        """One row per head: how often is its output closer to an earlier token's value than to any other entry's?

        `share` is that of the tokens whose closest earlier token is, `null_share` that of a random earlier one: means
        over prompts, with Student's t intervals. The closest is never farther than the random one, so there is no p.
        Special tokens are excluded, and those with no earlier token of another id.
        """
        frame = self.cells("layer", "head")
        for name, prefix in (("other_margin", ""), ("null_other_margin", "null_")):
            shares = self._by_prompt(self._above(name))
            low, high = inference.mean_interval(shares)
            frame = frame.assign(
                **{f"{prefix}share": shares.mean(1), f"{prefix}low": low, f"{prefix}high": high},
                prompts=shares.shape[1],
            )
        return frame

    def compare_with(self, other: "HeadValueRankResult") -> pd.DataFrame:
        """This model's `share` of `by_other` minus another's (such as an untrained one) on the same prompts, per head.

        The interval is Student's t over prompts; p swaps the two models at random, prompt by prompt.
        """
        self.check_comparable(other)
        own, theirs = (each._by_prompt(each._above("other_margin")) for each in (self, other))
        columns = {"share": own.mean(1), "other_share": theirs.mean(1), "prompts": own.shape[1]}
        labels, says = self.cells("layer", "head"), "difference between the models (share)"
        return paired(labels, own - theirs, says=says, null=MODELS_NULL, **columns)

    def _above(self, name: str) -> Float[np.ndarray, "layer head token"]:
        values = self.known(name)
        return np.where(np.isnan(values), np.nan, values > 0)

    def _by_prompt(self, values: Float[np.ndarray, "layer head token"]) -> Float[np.ndarray, "unit prompt"]:
        """Means over the tokens of each prompt, sorted by ids; tokens for which no head has a value are left out."""
        counted = torch.from_numpy(~np.isnan(values).all((0, 1))) & ~self.token.special
        if not counted.any():
            raise ValueError(
                "prompts must have two tokens that are not special, with different ids; got none that has: pass longer "
                "prompts"
            )
        kept, rows = (
            self.token[counted],
            rearrange(values[..., counted.numpy()], "layer head token -> (layer head) token"),
        )
        numbers = kept.prompt.unique().tolist()
        means = np.stack([rows[:, kept.rows(number)].mean(1) for number in numbers], axis=1)
        of_kept = self.token[torch.isin(self.token.prompt, kept.prompt)]
        return means[:, inference.prompt_order(of_kept)]

    def figure(self, **look: Unpack[figures.Look]) -> go.Figure:
        """The median rank of the own token's value by layer and head; the title says what the control has."""
        text = ~self.token.special.numpy()
        own, null = np.median(self.known("rank")[..., text], axis=-1), self.known("null_rank")[..., text]
        known = null[~np.isnan(null)]
        control = f" (a control token's: {np.median(known):,.0f})" if known.size else ""
        title = f"Median rank of each token's own value in the outputs of heads{control}"
        drawn = self.quantity("rank")._replace(logarithmic=True)
        beside = ("a control token's value", np.nanmedian(null, axis=-1)) if known.size else None
        return self.draw_grid(own, drawn, self.title(title), text="{:,.0f}".format, null=beside, **look)

    def figure_others(self, **look: Unpack[figures.Look]) -> go.Figure:
        """The share of tokens for which an output is closer to an earlier token than to any entry, beside the null."""
        table = self.by_other()
        size = (len(self.layer), len(self.head))
        panels = {"closest earlier token": "share", "random earlier token": "null_share"}
        return figures.small_grids(
            [(name, table[column].to_numpy().reshape(size).tolist()) for name, column in panels.items()],
            x=self.head,
            y=self.layer,
            title=self.title("How often a head's output is closer to an earlier token's value than to any entry's"),
            x_title="head",
            y_title="layer",
            colour_title="share of tokens (0 to 1)",
            low=0.0,
            high=1.0,
            **look,
        )

    def quantity(self, name: str) -> Quantity:
        """Description, unit and range of a tensor; for ranks, those of this run's vocabulary."""
        own = super().quantity(name)
        return own._replace(high=self.n_vocab - 1) if name in ("rank", "null_rank") else own


class HeadValueRank(Probe[HeadValueRankResult]):
    """The rank of each token's own value in the output of every head, and the closest earlier token.

    Per layer and batch it costs a product of all embeddings with W_V, and two of tokens x heads x vocabulary x d_head:
    three layers of SmolLM2 take seven times the forward pass of 175 tokens. So name a few `layers`.
    `neighbours`: number of nearest entries to store. `null_seed`: seed of the draws of control tokens.

    >>> import lens_probes as lp
    >>> result = lp.HeadValueRank(layers=[0]).run(lp.tiny.bridge("llama"), "Time flies like an arrow.")
    >>> result.rank[0, :, 0].tolist()  # without positions, the first token's value is its embedding's
    [0, 0, 0, 0]
    """

    neighbours: Count = 0
    null_seed: Seed = 0
    layers: Layers = None

    def hooks(self, model: ModelView) -> list[str]:
        """Per layer, the states before it, values and outputs of the heads."""
        if model.encoder:
            raise ValueError(
                f"a model must be a decoder, whose layers norm their input; got {model.name}, where embeddings pass a "
                f"norm together with positions: use a decoder"
            )
        model.check_input_norm()
        if self.neighbours > model.d_vocab:
            raise ValueError(
                f"HeadValueRank(neighbours=...) must be at most {model.d_vocab}, the size of the vocabulary; got "
                f"{self.neighbours}"
            )
        return [name for layer in model.layers(self.layers) for name in self._names(model, layer)]

    def _names(self, model: ModelView, layer: int) -> tuple[str, str, str]:
        return model.hook("resid_pre", layer), model.hook_value(layer), model.hook_z(layer)

    def measure(self, reading: Reading) -> HeadValueRankResult:
        """Layer by layer, the heads of one key/value head at a time."""
        model, tokens = reading.model, reading.tokens
        layers = model.layers(self.layers)
        of_layers = [self._of_layer(reading, layer) for layer in layers]
        found = {name: torch.stack([each[name] for each in of_layers]).cpu() for name in of_layers[0]}
        ids = found.pop("neighbour_ids")[..., : self.neighbours]
        scores = found.pop("neighbour_score")[..., : self.neighbours]
        return self.result(
            reading,
            layer=tuple(map(str, layers)),
            token=tokens,
            n_vocab=model.d_vocab,
            vocab=model.texts_of(ids),
            neighbour_ids=ids if self.neighbours else None,
            neighbour_score=scores if self.neighbours else None,
            **found,
        )

    def _of_layer(self, reading: Reading, layer: int) -> dict[str, Tensor]:
        """All quantities of one layer, `[head token ...]`."""
        model, tokens = reading.model, reading.tokens
        states, values, z = (reading[name] for name in self._names(model, layer))
        model.check_values(layer, states, values)
        outputs = rearrange(z.float(), "token head d_head -> head token d_head")
        targets = torch.stack([tokens.id, null_ids(tokens, self.null_seed)], dim=1).to(outputs.device)
        group, parts = model.n_heads // model.n_kv_heads, []
        for kv_head, some in enumerate(outputs.split(group)):
            vocabulary, rows = model.token_values(layer, kv_head), some.flatten(0, 1)
            closest = nearest(rows, vocabulary, min(max(2, self.neighbours), model.d_vocab))
            parts.append((*ranks(rows, vocabulary, targets.repeat(len(some), 1)), *closest))
        rank, score, ids, closeness = (
            torch.cat([part.unflatten(0, (group, -1)) for part in each]) for each in zip(*parts, strict=True)
        )
        mixed = rearrange(model.per_head(model.mixed(values)).float(), "token head d_head -> head token d_head")
        others = margins(outputs, mixed, ids[..., :2], closeness[..., :2], tokens, self.null_seed)
        return {
            "rank": rank[..., 0],
            "score": score[..., 0],
            "null_rank": rank[..., 1],
            "neighbour_ids": ids,
            "neighbour_score": closeness,
            **others,
        }


def margins(
    outputs: Float[Tensor, "head token d_head"],
    values: Float[Tensor, "head token d_head"],
    closest: Int[Tensor, "head token two"],
    closeness: Float[Tensor, "head token two"],
    tokens: Tokens,
    seed: int,
) -> dict[str, Tensor]:
    """How much closer each output is to an earlier token's value than to the closest entry with another id.

    `closest` are the two nearest entries and `closeness` their cosines. The random token's seed is `seed`, the prompt's
    ids and the position.
    """
    n_heads, n, _ = outputs.shape
    other = torch.full((n_heads, n), -1)
    best, null = (torch.full((n_heads, n), torch.nan) for _ in range(2))
    for number, prompt in tokens.by_prompt():
        rows = torch.tensor(tokens.rows(number), device=outputs.device)
        cosine = einsum(
            normalize(outputs[:, rows], dim=-1), normalize(values[:, rows], dim=-1), "head q d, head k d -> head q k"
        )
        ids = prompt.id.to(outputs.device)
        entry = torch.where(
            closest[:, rows, :1] == ids, closeness[:, rows, 1:], closeness[:, rows, :1]
        )  # of an id other than the key's
        margin = (cosine - entry).cpu()
        may = (prompt.id[:, None] != prompt.id) & ~prompt.special
        may = may & torch.ones_like(may).tril(-1)
        for query, row in enumerate(rows.tolist()):
            allowed = may[query].nonzero().flatten()
            if len(allowed):
                best[:, row], which = margin[:, query, allowed].max(-1)
                other[:, row] = allowed[which].where(best[:, row].isfinite(), -1)
                drawn = torch.randint(len(allowed), (), generator=seeded(f"{query} {prompt.id.tolist()}", seed))
                null[:, row] = margin[:, query, allowed[drawn]]
    return {"other": other, "other_margin": best, "null_other_margin": null}
