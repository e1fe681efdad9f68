"""What a prediction is asked for: the token that follows, the token itself, the model's own choice, or fixed ids."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal, get_args

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from lens_probes.settings import Allowed
from lens_probes.text.prompts import Tokens

Target = Literal["next", "own", "final"]
"""The token that follows, the token itself, or what the model itself predicts."""


def named_or_ids(target: Any) -> str | tuple[int, ...]:
    """A target as results keep it: its name, or its ids; no ids where it holds anything but whole numbers.

    >>> named_or_ids("own"), named_or_ids(5), named_or_ids(np.array([5, 6])), named_or_ids([True])
    ('own', (5,), (5, 6), ())
    """
    if isinstance(target, str):
        return target
    try:
        ids = torch.as_tensor(target).flatten()
    except (TypeError, ValueError, RuntimeError):
        return ()
    return () if ids.is_floating_point() or ids.dtype == torch.bool else tuple(ids.tolist())


def _is_target(target: Any) -> bool:
    found = named_or_ids(target)
    if isinstance(found, str):
        return found in get_args(Target)
    return 0 < len(found) == len(set(found)) and min(found) >= 0


Targets = Annotated[
    Target | int | np.integer | Sequence[Any] | np.ndarray | Tensor,
    Allowed(
        "'next', 'own', 'final', or token ids, each once and 0 or more (of a text: those of its tokens)", _is_target
    ),
]
"""A setting: one of these by name, or one or several ids in any form."""


def target_ids(tokens: Tokens, target: str | Sequence[int]) -> Int[Tensor, "token target"]:
    """The ids that each token is asked for: what follows it in its prompt (-1 at the end), its own, or fixed ones."""
    if target == "next":
        ids = tokens.id.roll(-1)
        return torch.where(_has_next(tokens), ids, -1)[:, None]
    if target == "own":
        return tokens.id[:, None]
    return torch.tensor(target).expand(len(tokens), -1)


def asked_about(tokens: Tokens, target: str | Sequence[int]) -> Tokens:
    """The tokens, with the words of their targets where these are the tokens that follow."""
    return following(tokens) if target == "next" else tokens


def target_name(target: str | Sequence[int], vocab: Sequence[str] = ()) -> str:
    """How a figure calls a target: fixed ids by their texts where these are known, four of them at most.

    >>> target_name("own"), target_name((3, 1), ["a", "b", "c", " d"]), target_name((7,))
    ('token itself', "' d' or 'b'", 'id 7')
    """
    names = {"next": "next token", "own": "token itself", "final": "model's own choice"}
    if isinstance(target, str):
        return names[target]
    shown = [repr(vocab[i]) if vocab else f"id {i}" for i in target[:4]]
    return " or ".join(shown) + (f" or {len(target) - 4} others" if len(target) > 4 else "")


def check_target(asked: object, target: str | Sequence[int], model_name: str, d_vocab: int) -> None:
    """Raise unless fixed targets are ids of the model's vocabulary."""
    outside = [] if isinstance(target, str) else [i for i in target if not 0 <= i < d_vocab]
    if outside:
        raise ValueError(
            f"{type(asked).__name__}(target=...) must be ids of {model_name}, 0 to {d_vocab - 1}; got {outside[0]}"
        )


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
