"""Targets of predictions: the token that follows, the token itself, the model's own choice, or fixed tokens."""

import functools
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal, get_args

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from lens_probes.settings import Allowed
from lens_probes.text.prompts import Tokenizing, Tokens

Target = Literal["next", "own", "final"]
"""The token that follows, the token itself, or what the model itself predicts."""


def plain(target: Any) -> str | tuple[int | str, ...]:
    """A target as it prints in the call that makes it: a text, or several ids and texts; () if it is no target.

    >>> plain("own"), plain(5), plain(np.array([5, 6])), plain([" Paris", 6]), plain([True])
    ('own', (5,), (5, 6), (' Paris', 6), ())
    """
    if isinstance(target, str):
        return target
    if isinstance(target, Sequence) and any(isinstance(each, str) for each in target):
        each = [(one,) if isinstance(one, str) else plain(one) for one in target]
        return tuple(one[0] for one in each) if all(each) else ()
    try:
        ids = torch.as_tensor(target).flatten()
    except (TypeError, ValueError, RuntimeError):
        return ()
    return () if ids.is_floating_point() or ids.dtype == torch.bool else tuple(ids.tolist())


def _is_target(target: Any) -> bool:
    found = plain(target)
    each = (found,) if isinstance(found, str) else found
    return 0 < len(each) == len(set(each)) and all(one if isinstance(one, str) else one >= 0 for one in each)


TARGET = "'next', 'own', 'final', a token's text such as ' Paris', or its id"
Targets = Annotated[
    str | int | np.integer | Sequence[Any] | np.ndarray | Tensor,
    Allowed(f"{TARGET}; or several texts and ids, each once", _is_target, kind="str | int | Sequence"),
]
"""A setting: one of these by name, or one or several tokens by their texts or ids."""

OneTarget = Annotated[
    str | int, Allowed(TARGET, lambda target: bool(target) if isinstance(target, str) else target >= 0)
]
"""A setting: one of these by name, or one token."""


def target_of(asked: object, setting: str, model: Tokenizing, tokens: Tokens | None = None) -> str | tuple[int, ...]:
    """What a setting asks of this model: a name, or the ids of tokens; a text must be that of one token.

    `tokens`: those of the run. A text without its space is warned of where they go on with a space.
    """
    target, says = plain(getattr(asked, setting)), f"{type(asked).__name__}({setting}=...)"
    if target in get_args(Target):
        return str(target)
    several = (target,) if isinstance(target, str) else target
    ids = [_token_of(one, model, says) if isinstance(one, str) else one for one in several]
    if tokens is not None and _goes_on_with_a_space(tokens):
        for text in (one for one in several if isinstance(one, str)):
            _warn_without_space(text, model, says)
    outside = [i for i in ids if not 0 <= i < model.d_vocab]
    if outside:
        raise ValueError(f"{says} must be ids of {model.name}, 0 to {model.d_vocab - 1}; got {outside[0]}")
    if len(set(ids)) < len(ids):
        raise ValueError(f"{says} must name each token once; got {target!r}, where a text is that of an id")
    return tuple(ids)


def _token_of(text: str, model: Tokenizing, says: str) -> int:
    """The id of the one token that a text is."""
    ids, pieces = _read(text, model)
    if pieces != [text]:
        spaced = f" {text}"
        hint = "check its spelling and its leading space, or pass the id of a token"
        if _read(spaced, model)[1] == [spaced]:
            hint = f"write {spaced!r}, with its leading space"
        raise ValueError(
            f"{says} must be the text of one token of {model.name}; got {text!r}, which is read as "
            f"{', '.join(map(repr, pieces))}: {hint}"
        )
    return ids[0]


def _read(text: str, model: Tokenizing) -> tuple[list[int], list[str]]:
    """The tokens of a text, without special ones, such as that for unknown characters: their ids and their texts."""
    ids, _ = model.encode(text, False)
    ids = [i for i in ids if i not in model.special_ids] or ids
    return ids, model.token_texts(ids)


def _goes_on_with_a_space(tokens: Tokens) -> bool:
    """Whether a prompt ends in a word or a mark behind which a space follows."""
    ends = [prompt.text[-1][-1:] for _, prompt in tokens.by_prompt() if not prompt.special[-1]]
    return any(end.isalnum() or end in set(",.;:!?") for end in ends)


def _warn_without_space(text: str, model: Tokenizing, says: str) -> None:
    """Warn of the text of a token that has a twin with a leading space."""
    spaced = f" {text}"
    if text[0].isalnum() and _read(spaced, model)[1] == [spaced]:
        _warn_once(
            f"{says} is {text!r}, the token without a space, and the prompts go on with a space: write {spaced!r} if "
            f"you mean the next word"
        )


@functools.cache
def _warn_once(message: str) -> None:
    """A warning for the whole session: Python's own filter forgets it whenever somebody else's filter changes."""
    warnings.warn(message, stacklevel=4)


def check_targets(tokens: Tokens, targets: Tokens) -> None:
    """Raise unless the tokens and their targets are of the same prompts."""
    if not torch.equal(tokens.prompt, targets.prompt):
        raise ValueError(
            f"a result must have a target for every token; got {len(targets)} targets of other prompts for "
            f"{len(tokens)} tokens"
        )


def target_ids(tokens: Tokens, target: str | Sequence[int]) -> Int[Tensor, "token target"]:
    """The target ids of each token: the next token of its prompt (-1 at the end), its own id, or fixed ids."""
    if target == "next":
        ids = tokens.id.roll(-1)
        return torch.where(_has_next(tokens), ids, -1)[:, None]
    if target == "own":
        return tokens.id[:, None]
    return torch.tensor(target).expand(len(tokens), -1)


def asked_about(tokens: Tokens, target: str | Sequence[int]) -> Tokens:
    """The tokens, with the words of their targets where these are the tokens that follow."""
    return following(tokens) if target == "next" else tokens


def target_name(target: str | Sequence[int], texts: Mapping[int, str]) -> str:
    """How a figure calls a target: tokens by their texts, four of them at most.

    >>> target_name("own", {}), target_name((3, 1), {1: "b", 3: " d"})
    ('token itself', "' d' or 'b'")
    """
    names = {"next": "next token", "own": "token itself", "final": "model's own choice"}
    if isinstance(target, str):
        return names[target]
    shown = [repr(texts[i]) if i in texts else f"id {i}" for i in target[:4]]
    return " or ".join(shown) + (f" or {len(target) - 4} others" if len(target) > 4 else "")


def following(tokens: Tokens) -> Tokens:
    """The same tokens with the id, text, word and class of what follows each in its prompt; the last has no class.

    The last has the id of the first, so that prompts that differ anywhere still differ. What is special, or is followed
    by something special, has no class either: no prediction about text is made there.
    """
    has_next = _has_next(tokens)
    first = torch.searchsorted(tokens.prompt, tokens.prompt)  # the first row of each token's prompt
    after = torch.where(has_next, torch.arange(len(tokens)) + 1, first)
    special = tokens.special | (tokens.special[after] & has_next)
    counted = (has_next & ~special).tolist()
    return replace(
        tokens,
        id=tokens.id[after],
        text=tuple(tokens.text[i] for i in after.tolist()),
        word=torch.where(has_next, tokens.word[after], -1),
        word_class=tuple(tokens.word_class[i] if counted[n] else "" for n, i in enumerate(after.tolist())),
        special=special,
    )


def _has_next(tokens: Tokens) -> Bool[Tensor, " token"]:
    same = tokens.prompt == tokens.prompt.roll(-1)
    same[-1] = False
    return same
