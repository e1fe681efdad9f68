"""One token of every prompt, named by its position, by a word, or by several words of which each prompt has one."""

from collections.abc import Sequence
from numbers import Integral
from typing import TYPE_CHECKING, Annotated, Any

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


PLACE = "a word, a position, or several words of which each prompt has one"
if TYPE_CHECKING:
    Place = str | int | Sequence[str]
else:
    Place = Annotated[Any, Allowed(PLACE, is_place)]
"""A token named by a position (negative ones count from the end), by a word, or by several words."""


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


def shown(prompt: Tokens) -> str:
    """The text of a prompt, for an error message."""
    return repr("".join(prompt[~prompt.special].text).strip())
