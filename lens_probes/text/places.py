"""Tokens of every prompt, each named by its position, by a word, or by several words of which each prompt has one."""

from collections.abc import Sequence
from numbers import Integral
from typing import TYPE_CHECKING, Annotated, Any

import torch
from jaxtyping import Int
from torch import Tensor

from lens_probes.messages import brief
from lens_probes.settings import Allowed
from lens_probes.text.prompts import Tokens


def is_place(asked: object) -> bool:
    """Whether a value names a token.

    >>> is_place("cat"), is_place(-1), is_place(["cat", "dog"]), is_place(True), is_place([1, 2]), is_place([])
    (True, True, True, False, False, False)
    """
    if isinstance(asked, str | Integral):
        return not isinstance(asked, bool)
    return isinstance(asked, Sequence) and len(asked) > 0 and all(isinstance(word, str) for word in asked)


def are_positions(asked: object) -> bool:
    """Whether a value names tokens of each prompt.

    >>> are_positions(-1), are_positions([0, "cat"]), are_positions(slice(1, None)), are_positions([])
    (True, True, True, False)
    """
    if isinstance(asked, slice):
        return asked.step != 0 and all(n is None or type(n) is int for n in (asked.start, asked.stop, asked.step))
    if asked is None or is_place(asked):
        return True
    return isinstance(asked, Sequence) and not isinstance(asked, str) and len(asked) > 0 and all(map(is_place, asked))


PLACE = "a word, a position, or several words of which each prompt has one"
POSITIONS = "a position such as -1, a word, a list of these, a slice of whole numbers, or None for all"
if TYPE_CHECKING:
    Place = str | int | Sequence[str]
    Positions = Place | Sequence[Place] | slice | None
else:
    Place = Annotated[Any, Allowed(PLACE, is_place, kind="str | int | Sequence[str]")]
    Positions = Annotated[Any, Allowed(POSITIONS, are_positions, kind="str | int | Sequence | slice | None")]
"""`Place`: a token named by a position (negative ones count from the end), by a word, or by several words.

`Positions`: the tokens of each prompt that a probe reads: one place, a list of places, a slice, or None for all. In a
list, each word is a place of its own.
"""


def name_of(asked: Place) -> str:
    """A short name for a place.

    >>> name_of("it"), name_of(-1), name_of(["cat", "dog"])
    ('it', '-1', 'cat|...')
    """
    if isinstance(asked, str) or not isinstance(asked, Sequence):
        return str(asked)
    return asked[0] if len(asked) == 1 else f"{asked[0]}|..."


def place_of(prompt: Tokens, asked: Place) -> int:
    """The position of the named token in a prompt. For a word of several tokens it is the position of the last."""
    if not isinstance(asked, Sequence):
        if not -len(prompt) <= asked < len(prompt):
            raise ValueError(
                f"a position must be within every prompt; got {asked}, and {shown(prompt)} has {len(prompt)} tokens: "
                f"name a position that every prompt has"
            )
        return int(asked) % len(prompt)
    wanted = {asked.lower()} if isinstance(asked, str) else {word.lower() for word in asked}
    words: dict[int, str] = {}
    for word, text in zip(prompt.word.tolist(), prompt.text, strict=True):
        words[word] = words.get(word, "") + text
    found = [word for word, text in words.items() if word >= 0 and text.strip().lower() in wanted]
    if len(found) != 1:
        raise ValueError(
            f"every prompt must have the word {name_of(asked)!r} once; got it {len(found)} times in {shown(prompt)}: "
            f"name one word that every prompt has once, or positions"
        )
    return int((prompt.word == found[0]).nonzero().max())


def rows_at(tokens: Tokens, positions: Positions) -> Int[Tensor, " row"]:
    """The row numbers of these tokens of every prompt, each once, in the order of the table."""
    if positions is None:
        return torch.arange(len(tokens))
    found, first = [], 0
    for _, prompt in tokens.by_prompt():
        if isinstance(positions, slice):
            places = range(len(prompt))[positions]
        else:
            asked = [positions] if isinstance(positions, str) or not isinstance(positions, Sequence) else positions
            places = [place_of(prompt, place) for place in asked]
        if not places:
            raise ValueError(
                f"positions must name a token of every prompt; got {positions}, and {shown(prompt)} has {len(prompt)} "
                f"tokens: name positions that every prompt has"
            )
        found += [first + place for place in sorted(set(places))]
        first += len(prompt)
    return torch.tensor(found)


def shown(prompt: Tokens) -> str:
    """The text of a prompt, for an error message."""
    return brief("".join(prompt[~prompt.special].text).strip())
