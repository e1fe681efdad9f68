"""Samples of words that can be merged: which words are kept depends on their content alone.

Every word has a key, a number made from its content (document and place), and so has its type. The words of a class
with the lowest keys are a random sample of all its words. A sample of the union of two corpora needs the samples of
both only, so merging is associative, and equal to one pass over everything (bottom-k sampling; Cohen & Kaplan 2007,
"Summarizing data using bottom-k sketches").
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int, UInt64


class Words(NamedTuple):
    """The words of a table of tokens, one entry per word: the number of its class, and its keys."""

    word_class: Int[np.ndarray, " word"]
    type_key: Int[np.ndarray, " word"]
    key: Int[np.ndarray, " word"]


def mixed(*numbers: Int[np.ndarray, " item"]) -> Int[np.ndarray, " item"]:
    """A key per item, made of several numbers: SplitMix64, so keys are uniform, and equal for equal numbers.

    >>> one, other = mixed(np.array([1, 1]), np.array([2, 3]))
    >>> bool(one == other), bool(one == mixed(np.array([1]), np.array([2]))[0])
    (False, True)
    """
    state: UInt64[np.ndarray, " item"] = np.zeros(len(numbers[0]), np.uint64)
    with np.errstate(over="ignore"):
        for each in numbers:
            state = state + each.astype(np.int64).view(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
            state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            state = state ^ (state >> np.uint64(31))
    return state.view(np.int64)


def of_words(words: Words, n: int) -> Bool[np.ndarray, " word"]:
    """Which words are among the n of their class with the lowest keys: every word is as likely as any other.

    >>> of_words(Words(np.array([0, 0, 1]), np.array([5, 5, 5]), np.array([3, 1, 9])), 1)
    array([False,  True,  True])
    """
    return _first(n, words.word_class, words.key)


def of_types(words: Words, n: int) -> Bool[np.ndarray, " word"]:
    """Which words are among n of their class that are taken type by type: a word of every type, then a second, ...

    Types come in the order of their keys, and the words of a type in the order of theirs. So each type is as likely as
    any other, and the words of a type are a random sample of them.

    >>> of_types(Words(np.array([0, 0, 0]), np.array([5, 5, 7]), np.array([3, 1, 9])), 2)
    array([False,  True,  True])
    """
    order = np.lexsort((words.key, words.type_key, words.word_class))
    starts = _starts(words.word_class[order], words.type_key[order])
    occurrence = np.empty(len(order), np.int64)
    occurrence[order] = _places(starts)
    return _first(n, words.word_class, occurrence, words.type_key)


def _first(n: int, word_class: Int[np.ndarray, " word"], *keys: Int[np.ndarray, " word"]) -> Bool[np.ndarray, " word"]:
    """The n first of each class, in the order of these keys."""
    order = np.lexsort((*reversed(keys), word_class))
    kept = np.zeros(len(order), dtype=bool)
    kept[order] = _places(_starts(word_class[order])) < n
    return kept


def _starts(*columns: Int[np.ndarray, " word"]) -> Bool[np.ndarray, " word"]:
    """Where a run of equal rows starts."""
    starts = np.ones(len(columns[0]), dtype=bool)
    starts[1:] = np.any([column[1:] != column[:-1] for column in columns], axis=0)
    return starts


def _places(starts: Bool[np.ndarray, " word"]) -> Int[np.ndarray, " word"]:
    """The place of each row in its run, from 0."""
    index = np.arange(len(starts))
    return index - np.maximum.accumulate(np.where(starts, index, 0))
