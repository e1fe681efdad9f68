"""What a probe sees of a batch, and how prompts become batches.

tokens -> padded batch -> activations -> Reading (valid tokens only)
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lens_probes.messages import brief
from lens_probes.model import ModelView
from lens_probes.text.prompts import Prompts, Tokens, tokenize
from lens_probes.text.targets import target_ids
from lens_probes.text.words import WordClasses

Edits = Mapping[str, Callable[[Tensor], Tensor]]
"""Functions of activations that return their replacements, by the names of the activations."""

TOKENS_PER_BATCH = 512  # what a batch holds, padding included: enough to fill matrix products, little enough to keep


@runtime_checkable
class Cache(Protocol):
    """Activations by name, as `model.run_with_cache` gives them: an ActivationCache (which is no Mapping) or a dict."""

    def keys(self) -> Iterable[str]: ...  # noqa: D102
    def __getitem__(self, name: str, /) -> Tensor: ...


@dataclass(frozen=True, eq=False)
class Reading:
    """What a probe sees of a batch: the valid tokens only, prompts laid end to end. Padding never reaches a probe.

    `reading[name]` is an activation `[token ...]`, `reading.tokens` the table of the same tokens, `reading.model` the
    model's weights and `unembed`. Where the probe's hooks have labels, `points` are these hooks by label, `layer` the
    labels and `stack()` all activations as `[layer token d]`. `by_prompt()` yields readings of one prompt each, and
    those give `pattern(name)`, `[head query key]`, of what is square in position.
    """

    model: ModelView
    tokens: Tokens
    _cache: Mapping[str, Tensor]
    _mask: Bool[Tensor, "prompt position"]
    points: Mapping[str, str] = field(default_factory=dict)
    _logits: Float[Tensor, "few vocab"] | None = None  # the model's own, of the first tokens

    def check_head(self) -> None:
        """Raise unless final norm, unembedding and cap of the last states are the model's own logits."""
        if self._logits is None:  # of a cache: a pass of its own
            self.model.check_head()
        else:
            last = self[self.model.hook("resid_post", -1)]
            self.model.check_read(last[: len(self._logits)], self._logits)

    @property
    def layer(self) -> tuple[str, ...]:
        """The labels of the hooks: those of the result's layer axis."""
        return tuple(self.points)

    def stack(self, names: Iterable[str] | None = None) -> Float[Tensor, "layer token ..."]:
        """Activations in float32 in this order (None: those of all labelled hooks), on the model's device."""
        names = list(self.points.values() if names is None else names)
        if not names:
            raise ValueError(
                "stack() needs hooks with labels; got a plain list of hooks: return model.states(...) from hooks, or "
                "name the activations, as stack([name, ...])"
            )
        return torch.stack([self[name].float() for name in names])

    def dtype(self, name: str) -> torch.dtype:
        """The precision of an activation."""
        return self._activation(name).dtype

    def __getitem__(self, name: str) -> Float[Tensor, "token ..."]:
        """A copy of an activation, `[token ...]`, in the model's precision and on the model's device."""
        activation = self._whole(name)
        return finite(name, activation[self._mask.to(activation.device)])

    def at(self, name: str, rows: Int[Tensor, " row"]) -> Float[Tensor, "row ..."]:
        """The same at some of the tokens, in this order: quicker than a copy of all, of which some are taken."""
        places = self._mask.flatten().nonzero().flatten()[rows.cpu()]
        activation = self._whole(name)
        return finite(name, activation.flatten(0, 1).index_select(0, places.to(activation.device)))

    def check_widths(self, widths: Iterable[int]) -> None:
        """Raise unless the layers have as many units as each other; in some mixtures of experts they have not."""
        if len(found := set(widths)) > 1:
            raise ValueError(
                f"the layers that are asked must have as many units as each other; got {min(found)} and {max(found)} "
                f"in {self.model.name}: ask some of its layers, as layers=[...]"
            )

    def by_prompt(self) -> Iterator["Reading"]:
        """One prompt at a time, each with its own rows of the table and its prompt numbers as they are here."""
        for row, (_, tokens) in enumerate(self.tokens.by_prompt()):
            cache = {name: activation[row : row + 1] for name, activation in self._cache.items()}
            yield Reading(self.model, tokens, cache, self._mask[row : row + 1], self.points)

    def pattern(self, name: str, keys: int | None = None) -> Float[Tensor, "head query key"]:
        """An attention pattern or score of one prompt, `[head query key]`, without padding.

        `keys`: their number where they are tokens of another sequence (cross-attention), padded on the right.
        """
        if len(self._mask) != 1:
            raise ValueError(
                f"pattern({name!r}) is about one prompt; this reading has {len(self._mask)}: use by_prompt()"
            )
        valid = self._mask[0].nonzero().flatten().to(self._activation(name).device)
        rows = self._activation(name)[0].index_select(-2, valid)
        return finite(name, rows.index_select(-1, valid) if keys is None else rows[..., :keys], masked=True)

    def _whole(self, name: str) -> Float[Tensor, "prompt position ..."]:
        """An activation with its padding."""
        activation = self._activation(name)
        if activation.shape[:2] != self._mask.shape:
            raise ValueError(
                f"activation {name!r} of shape {tuple(activation.shape)} has no token axis after the batch: "
                f"read it with `for one in reading.by_prompt(): one.pattern({name!r})`"
            )
        return activation

    def _activation(self, name: str) -> Tensor:
        if name not in self._cache:
            raise ValueError(
                f"an activation must be named by the probe's hooks; got {name!r}, and they name "
                f"{', '.join(self._cache) or 'none'}: add it to hooks"
            )
        return self._cache[name]


def finite(name: str, activation: Tensor, *, masked: bool = False) -> Tensor:
    """The activation; raises if it contains NaN or Inf."""
    if activation.sum().isfinite():  # several times quicker than asking each; a sum may overflow where no entry does
        return activation
    known = torch.isfinite(activation)
    if masked:
        known |= activation == -torch.inf  # the score where attention may not look
    if not known.all():
        raise ValueError(
            f"activation {name!r} must be finite; got NaN or Inf: run the model in float32 or bfloat16, and check its "
            f"weights"
        )
    return activation


def prompt_loss(view: ModelView, tokens: Tokens, edits: Edits | None = None) -> Float[Tensor, " prompt"]:
    """The mean of -log p(next token) over each prompt, special ones not counted, nats; `edits` as `ModelView.logits`.

    Each prompt must have a token to predict.
    """
    return torch.cat([batch_loss(view, batch, edits) for batch in batches(tokens)])


def batch_loss(view: ModelView, batch: Tokens, edits: Edits | None = None) -> Float[Tensor, " prompt"]:
    """`prompt_loss` of one batch, in one pass."""
    ids, mask = pad(batch, view)
    logits = view.logits(ids, mask, edits)[mask.to(view.device)].float()
    target = target_ids(batch, "next")[:, 0]
    counted = (target >= 0) & ~batch.special.roll(-1)
    asked = logits[counted.to(view.device)]
    of_target = asked.gather(1, target[counted, None].to(view.device))[:, 0]
    loss = torch.zeros(len(batch)).masked_scatter(counted, (asked.logsumexp(-1) - of_target).cpu())
    losses = []
    for number in batch.prompt.unique().tolist():
        own = batch.prompt == number
        if not (own & counted).any():
            raise ValueError(f"prompt {number} has no token to predict: prompts need two tokens or more")
        own_loss = loss[own].sum() / counted[own].sum()
        if not own_loss.isfinite():
            raise ValueError(
                f"the loss of prompt {number} must be finite; got {own_loss.item()}: check the model's weights, or "
                f"run it in float32"
            )
        losses.append(own_loss)
    return torch.stack(losses)


def cached(
    view: ModelView,
    names: Sequence[str],
    prompts: Prompts,
    cache: Cache,
    *,
    asked: str,
    attention_mask: Tensor | None,
    prepend_bos: bool | None,
    word_class: WordClasses | None,
) -> Reading:
    """A reading of these activations, which the user has already; `asked` names who reads them."""
    if isinstance(cache, tuple):
        raise TypeError(
            "from_cache takes the cache alone; got a tuple, such as the pair (logits, cache) that run_with_cache "
            "returns: pass its second part"
        )
    if not isinstance(cache, Cache):
        raise TypeError(
            f"a cache holds activations by name, as model.run_with_cache returns it; got {brief(cache)}: write "
            f"from_cache(model, prompts, cache)"
        )
    available = set(cache.keys())
    missing = [name for name in names if name not in available]
    if missing:
        raise ValueError(
            f"{asked} reads {', '.join(names[:3])}{' ...' if len(names) > 3 else ''} and the cache lacks "
            f"{missing[0]}: run the model with names_filter=probe.hook_names(model), or without a filter"
        )
    embed = [name for name in (view.hook_token_embed,) if name in available]  # what ids alone give: tells other ids
    activations = {name: view.by_head(name, _batched(cache, name)) for name in (*names, *embed)}
    if attention_mask is not None and isinstance(prompts, Tensor) and prompts.ndim == 2:
        if attention_mask.shape != prompts.shape:
            raise ValueError(
                f"attention_mask has shape {tuple(attention_mask.shape)} and the ids {tuple(prompts.shape)}: "
                f"they must be equal"
            )
        prompts = [row[valid.bool()] for row, valid in zip(prompts, attention_mask, strict=True)]
    tokens = tokenize(prompts, view, prepend_bos=prepend_bos, word_class=word_class)
    _, mask = pad(tokens, view)
    if attention_mask is not None:
        given = attention_mask.cpu().bool()
        if given.ndim != 2 or given.sum(1).tolist() != mask.sum(1).tolist():
            raise ValueError(
                f"attention_mask marks {given.sum(-1).tolist()} tokens a prompt and the prompts have "
                f"{mask.sum(1).tolist()}: pass the mask (and the ids) that the model was run with"
            )
        mask = given
    for name, activation in activations.items():
        if activation.shape[0] != mask.shape[0] or mask.shape[1] not in activation.shape[1:]:
            raise ValueError(
                f"activation {name!r} in the cache has shape {tuple(activation.shape)} and the prompts make a batch of "
                f"{tuple(mask.shape)}: pass the token ids that the model was run with"
            )
    for name in embed:
        _check_embedded(view, tokens, Reading(view, tokens, activations, mask)[name])
    return Reading(view, tokens, {name: activations[name] for name in names}, mask)


def _check_embedded(view: ModelView, tokens: Tokens, held: Float[Tensor, "token d"]) -> None:
    """Raise unless the embeddings in a cache are those that the model gives these tokens, to the coarser precision."""
    own = view.embedded(tokens.id).to(held.device)
    precision = max(1e-4, *(2 * torch.finfo(dtype).eps for dtype in (held.dtype, own.dtype)))
    own, held = own.float(), held.float()
    if held.shape == own.shape:
        other = ~((held - own).norm(dim=-1) <= precision * own.norm(dim=-1))
    else:
        other = torch.ones(len(own), dtype=torch.bool)
    if other.any():
        row = int(other.nonzero()[0])
        raise ValueError(
            f"the cache must come from the same tokens and model; got another embedding at token "
            f"{int(tokens.position[row])} of prompt {int(tokens.prompt[row])} than {view.name} gives "
            f"{tokens.text[row]!r}: pass the ids and the model that the cache was made with"
        )


def batches(tokens: Tokens, batch_size: int | None = None, sources: Tokens | None = None) -> list[Tokens]:
    """The prompts in order, in batches of `batch_size`, or of at most TOKENS_PER_BATCH padded tokens.

    `sources`: those of an encoder-decoder, which are padded too.
    """
    found: list[Tokens] = []
    start, end, size, longest = 0, 0, 0, 0
    source = {} if sources is None else {number: len(own) for number, own in sources.by_prompt()}
    numbers, lengths = tokens.prompt.unique_consecutive(return_counts=True)
    for number, length in zip(numbers.tolist(), lengths.tolist(), strict=True):
        padded = max(length, source.get(number, 0))
        longest = max(longest, padded)
        full = size >= batch_size if batch_size is not None else (size + 1) * longest > TOKENS_PER_BATCH
        if size and full:
            found.append(tokens[start:end])
            start, size, longest = end, 0, padded
        size, end = size + 1, end + length
    return [*found, tokens[start:end]]


def pad(tokens: Tokens, view: ModelView) -> tuple[Int[Tensor, "prompt position"], Bool[Tensor, "prompt position"]]:
    """A batch of ids, padded on the side the tokenizer says, and the mask of what is not padding."""
    rows = [part.id for _, part in tokens.by_prompt()]
    width = max(len(row) for row in rows)
    ids = torch.full((len(rows), width), view.pad_id)
    mask = torch.zeros(len(rows), width, dtype=torch.bool)
    for i, row in enumerate(rows):
        place = slice(width - len(row), width) if view.padding_side == "left" else slice(0, len(row))
        ids[i, place] = row
        mask[i, place] = True
    return ids, mask


def _batched(cache: Cache, name: str) -> Tensor:
    """An activation with its batch axis, which an ActivationCache may have removed."""
    return cache[name] if getattr(cache, "has_batch_dim", True) else cache[name][None]
