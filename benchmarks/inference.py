"""Are the tests and intervals of `lens_probes.inference` calibrated? Simulations on real sentences; one table.

    python benchmarks/inference.py            1,000 trials per cell, about half an hour on one core
    python benchmarks/inference.py --trials 100

Each trial draws sentences of `lens_probes.demo.sentences()` at random and gives every token a value with variance 1:

    a  prompt effects    half of the variance is common to a prompt; classes at random, by word type
    b  word effects      half is common to the tokens of a word; classes at random, by word type
    c  type effects      half is common to a word type, wherever it occurs; classes at random, by word type
    d  real recurrence   a fifth by prompt, half by type, and the sentences' own content and function words

An effect of 0.65 is planted as a shift of the first class. A cell prints how many of its trials have p < 0.05, and how
many intervals hold the planted effect. The last rows: any of five correlated layers with q < 0.05, the median of a
class, the mean of prompts, the resampled mean of prompts, and topic tests with an interaction of topic and template.
"""

import argparse
from dataclasses import replace
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
import torch

from lens_probes import demo, inference, words
from lens_probes.prompts import Tokens

LAYERS = 5
LONG = 6  # letters of the first token of a word


class Scenario(NamedTuple):
    """Shares of the variance that prompts, words and types have, and whether classes are the words' own."""

    prompt: float
    word: float
    type: float
    real: bool


SCENARIOS = {
    "a prompt effects": Scenario(0.5, 0.0, 0.0, False),
    "b word effects": Scenario(0.0, 0.5, 0.0, False),
    "c type effects": Scenario(0.0, 0.0, 0.5, False),
    "d real recurrence": Scenario(0.2, 0.0, 0.5, True),
}


def corpus() -> Tokens:
    """The content and function words of the package's sentences as tokens; long words have two."""
    rows, ids = [], {}
    for number, text in enumerate(demo.sentences()):
        own = [word for word in words.closed_class(text) if word.word_class in ("content", "function")]
        pieces = [
            (i, text[start:end], word.word_class)
            for i, word in enumerate(own)
            for start, end in ((word.start, min(word.start + LONG, word.end)), (word.start + LONG, word.end))
            if start < end
        ]
        for position, (i, piece, word_class) in enumerate(pieces):
            rows.append((number, position, ids.setdefault(piece, len(ids)), piece, i, word_class))
    prompt, position, number, piece, word, word_class = zip(*rows, strict=True)
    return Tokens(
        prompt=torch.tensor(prompt),
        position=torch.tensor(position),
        id=torch.tensor(number),
        text=piece,
        word=torch.tensor(word),
        word_class=word_class,
        special=torch.zeros(len(rows), dtype=torch.bool),
        topic=("",) * len(rows),
    )


def drawn(tokens: Tokens, n_prompts: int, scenario: Scenario, random: np.random.Generator) -> Tokens:
    """Some sentences, with the classes that the scenario says."""
    chosen = random.choice(int(tokens.prompt.max()) + 1, n_prompts, replace=False)
    own = tokens[torch.isin(tokens.prompt, torch.from_numpy(chosen))]
    if scenario.real:
        return own
    by_chance = {form: random.choice(["content", "function"]) for form in sorted(set(inference.forms(own)))}
    return replace(own, word_class=tuple(by_chance[form] for form in inference.forms(own)))


def values_of(
    tokens: Tokens, scenario: Scenario, effect: float, n_units: int, random: np.random.Generator
) -> inference.Values:
    """Values of variance 1 with the scenario's effects; units share half of everything."""
    word = [f"{prompt} {number}" for prompt, number in zip(tokens.prompt.tolist(), tokens.word.tolist(), strict=True)]
    shares = {
        scenario.prompt: tokens.prompt.tolist(),
    }
    total = 0.0
    parts = [(scenario.prompt, tokens.prompt.tolist()), (scenario.word, word), (scenario.type, inference.forms(tokens))]
    parts.append((1 - sum(share for share, _ in parts), range(len(tokens))))
    for share, labels in parts:
        _, number = np.unique(np.asarray(labels), return_inverse=True)
        of_group = (random.normal(size=number.max() + 1) + random.normal(size=(n_units, number.max() + 1))) / 2**0.5
        total = total + share**0.5 * of_group[:, number]
    shift = 2**0.5 * NormalDist().inv_cdf(effect)
    return total + shift * (np.asarray(tokens.word_class) == "content")


