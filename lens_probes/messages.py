"""Values and numbers as errors and titles show them: short, and never a whole model."""

import math
import reprlib

import torch


class _Brief(reprlib.Repr):
    def repr_instance(self, x: object, level: int) -> str:
        """A module or an array by its class (and shape): its repr may have thousands of lines."""
        if isinstance(x, torch.nn.Module):
            return f"<{type(x).__name__}>"
        if shape := getattr(x, "shape", None):  # not (), the shape of a NumPy number, whose repr is short
            return f"<{type(x).__name__} of shape {tuple(shape)}>"
        return super().repr_instance(x, level)


_BRIEF = _Brief()
_BRIEF.maxstring = _BRIEF.maxother = 80


def brief(value: object) -> str:
    """The value in about one line of text or less.

    >>> brief([1, "two"]), brief(torch.nn.Linear(2, 2)), brief([torch.zeros(3, 4)])
    ("[1, 'two']", '<Linear>', '[<Tensor of shape (3, 4)>]')
    """
    return _BRIEF.repr(value)


def amount(n: int, noun: str, plural: str = "") -> str:
    """A number with its noun.

    >>> amount(1, "prompt"), amount(1200, "token"), amount(2, "query", "queries")
    ('1 prompt', '1,200 tokens', '2 queries')
    """
    return f"{n:,} {noun}" if n == 1 else f"{n:,} {plural or f'{noun}s'}"


def interval(low: float, high: float, form: str = ".2f") -> str:
    """A 95 % interval of prompts in words.

    >>> interval(0.5, 0.75), interval(float("nan"), float("nan"))
    ('95 % interval 0.50 to 0.75', 'no interval: it needs five prompts')
    """
    known = math.isfinite(low) and math.isfinite(high)
    return f"95 % interval {low:{form}} to {high:{form}}" if known else "no interval: it needs five prompts"
