"""Are the tests and intervals of `lens_probes.inference` calibrated? Simulations on real sentences; one table.

    python benchmarks/inference.py            1,000 trials per cell, about forty minutes on one core
    python benchmarks/inference.py --trials 100

Each trial draws sentences of `lp.demo.sentences()` at random and gives every token a value with variance 1:

    a  prompt effects    half of the variance is common to a prompt; classes at random, by word type
    b  word effects      half is common to the tokens of a word; classes at random, by word type
    c  type effects      half is common to a word type, wherever it occurs; classes at random, by word type
    d  real recurrence   a fifth by prompt, half by type, and the sentences' own content and function words

An effect of 0.65 is planted as a shift of the first class. A cell prints how many of its trials have p < 0.05, and how
many intervals hold the planted effect. The other rows: any of five correlated layers with q < 0.05, medians of a class,
means of prompts, resampled means, and a topic's contrast: with an interaction of topic and template, with words that
recur over topics, and with words of each topic's own, which a test of topics does find.
"""

import argparse
from collections.abc import Callable, Iterator
from dataclasses import replace
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
import torch

from lens_probes.examples import demo
from lens_probes.maths import inference
from lens_probes.maths.topics import TopicOrder
from lens_probes.text import words
from lens_probes.text.prompts import Tokens

Trial = Callable[[np.random.Generator], tuple[bool | None, bool | None]]
"""Draws data, and says whether p < 0.05 and whether the interval holds the truth; None if that is not asked."""
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
        document=torch.tensor(prompt),
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
    rest = 1 - scenario.prompt - scenario.word - scenario.type
    parts = (
        (scenario.prompt, tokens.prompt.tolist()),
        (scenario.word, word),
        (scenario.type, inference.forms(tokens)),
        (rest, range(len(tokens))),
    )
    total = np.zeros((n_units, len(tokens)))
    for share, labels in parts:
        _, number = np.unique(np.asarray(labels), return_inverse=True)
        groups = int(number.max()) + 1
        of_group = (random.normal(size=groups) + random.normal(size=(n_units, groups))) / 2**0.5
        total += share**0.5 * of_group[:, number]
    shift = 2**0.5 * NormalDist().inv_cdf(effect)
    return total + shift * (np.asarray(tokens.word_class) == "content")


# Cells of the table: how many of the trials have p < 0.05, and how many intervals hold the truth


def compared(scenario: Scenario, n_prompts: int, effect: float, weigh: inference.Weigh = "types") -> Trial:
    """A comparison of content with function words."""
    tokens = corpus()

    def trial(random: np.random.Generator) -> tuple[bool, bool]:
        own = drawn(tokens, n_prompts, scenario, random)
        values = values_of(own, scenario, effect, 1, random)
        seed = int(random.integers(2**31))
        row = inference.compare(values, own, "content", "function", weigh=weigh, seed=seed).iloc[0]
        return row["p"] < 0.05, row["low"] <= effect <= row["high"]

    return trial


def any_layer(n_prompts: int) -> Trial:
    """Whether any of some correlated layers has q < 0.05 without an effect."""
    tokens, scenario = corpus(), SCENARIOS["d real recurrence"]

    def trial(random: np.random.Generator) -> tuple[bool, None]:
        own = drawn(tokens, n_prompts, scenario, random)
        values = values_of(own, scenario, 0.5, LAYERS, random)
        table = inference.compare(values, own, "content", "function", seed=int(random.integers(2**31)))
        return bool((table["q"] < 0.05).any()), None

    return trial


def median(n_prompts: int) -> Trial:
    """Whether the interval of the median of function words holds the median of all function words."""
    tokens, scenario = corpus(), SCENARIOS["d real recurrence"]

    def trial(random: np.random.Generator) -> tuple[None, bool]:
        own = drawn(tokens, n_prompts, scenario, random)
        row = inference.describe(values_of(own, scenario, 0.5, 1, random), own, ["function"]).iloc[0]
        return None, row["low"] <= 0 <= row["high"]

    return trial


def median_of_types(n_prompts: int) -> Trial:
    """The same for a fact about token ids, whose type effects are all there is."""
    tokens = corpus()

    def trial(random: np.random.Generator) -> tuple[None, bool]:
        own = drawn(tokens, n_prompts, SCENARIOS["d real recurrence"], random)
        of_id = random.normal(size=int(tokens.id.max()) + 1)
        table = inference.describe_types(of_id[own.id.numpy()][None], own).set_index("word_class")
        return None, bool(table.loc["function", "low"] <= 0 <= table.loc["function", "high"])

    return trial


def mean_of_prompts(n_prompts: int) -> Trial:
    """Student's t for the mean of one number per prompt."""

    def trial(random: np.random.Generator) -> tuple[None, bool]:
        (low,), (high,) = inference.mean_interval(random.normal(size=(1, n_prompts)))
        return None, low <= 0 <= high

    return trial


def resampled(n_prompts: int) -> Trial:
    """Expanded percentiles for a mean over tokens, from resampled prompts."""
    tokens, scenario = corpus(), SCENARIOS["a prompt effects"]

    def trial(random: np.random.Generator) -> tuple[None, bool]:
        own = drawn(tokens, n_prompts, scenario, random)
        values = values_of(own, scenario, 0.5, 1, random)
        _, (low,), (high,) = inference.token_means(values, own, seed=int(random.integers(2**31)))
        return None, low <= 0 <= high

    return trial


# Topics: ten of six templates and ten prompts each, as `demo.topics()`

TOPICS, TEMPLATES, EACH = 10, 6, 10


def topic_values(kind: str, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """One unit's activity on every prompt [topic template prompt], and what it is in the mean [topic template].

    interaction   each topic x template has an effect of its own, no topic has one
    words         each prompt is the mean of five words from one pool of 200 that all topics share
    topic words   each topic has a pool of its own, of 20 words
    """
    size = (TOPICS, TEMPLATES, EACH)
    if kind == "interaction":
        expected = random.normal(size=(TOPICS, TEMPLATES)) + random.normal(size=TEMPLATES)
        return random.normal(size=size) + expected[..., None], expected
    pools = random.normal(size=(1, 200) if kind == "words" else (TOPICS, 20))
    pool = np.broadcast_to(pools, (TOPICS, pools.shape[1]))
    chosen = random.integers(pool.shape[1], size=(*size, 5))
    said = pool[np.arange(TOPICS)[:, None, None, None], chosen].mean(-1)
    return said + random.normal(size=size) / 4, np.broadcast_to(pool.mean(1, keepdims=True), (TOPICS, TEMPLATES))


def topic_test(kind: str) -> Trial:
    """The mean of one topic less that of the others, templates being groups; the truth is of these templates."""
    topic, template, _ = (each.ravel() for each in np.indices((TOPICS, TEMPLATES, EACH)))
    order = TopicOrder(np.arange(topic.size), topic, template, TOPICS)

    def difference(weights: np.ndarray, values: np.ndarray) -> np.ndarray:
        means = weights @ values / weights.sum(-1)
        return means[..., 0] - means[..., 1:].mean(-1)

    def trial(random: np.random.Generator) -> tuple[bool, bool]:
        values, expected = topic_values(kind, random)
        flat, seed = values.ravel(), int(random.integers(2**31))
        observed = difference(order.members.numpy(), flat)[None]
        null = np.concatenate([difference(some.numpy(), flat) for some in order.permutations(199, seed=seed)])
        drawn = np.concatenate([difference(some.numpy(), flat) for some in order.resamples(seed=seed)])
        (low,), (high,) = order.bounds(drawn[:, None])
        truth = expected[0].mean() - expected[1:].mean()
        return bool(inference.permutation_p(observed, null[:, None])[0] < 0.05), bool(low <= truth <= high)

    return trial


def table() -> Iterator[tuple[str, int, str, Trial]]:
    """What is simulated: name, prompts, what is planted or asked, and a trial."""
    real = SCENARIOS["d real recurrence"]
    for name, scenario in SCENARIOS.items():
        for n_prompts in (10, 30):
            for effect in (0.5, 0.65):
                yield name, n_prompts, f"effect {effect}", compared(scenario, n_prompts, effect)
    for n_prompts in (5, 7):
        yield "d real recurrence", n_prompts, "effect 0.65", compared(real, n_prompts, 0.65)
    for effect in (0.6, 0.64):
        for weigh in ("types", "tokens"):
            yield f"d real recurrence, by {weigh}", 30, f"effect {effect}", compared(real, 30, effect, weigh)
    for n_prompts in (10, 30):
        yield f"any of {LAYERS} layers, q", n_prompts, "effect 0.5", any_layer(n_prompts)
        yield "median of a class", n_prompts, "", median(n_prompts)
        yield "median of a class of ids", n_prompts, "", median_of_types(n_prompts)
    for n_prompts in (5, 10, 30):
        yield "mean of prompts", n_prompts, "", mean_of_prompts(n_prompts)
        yield "mean of tokens, resampled", n_prompts, "", resampled(n_prompts)
    for kind in ("interaction", "words", "topic words"):
        yield f"topics: {kind}", TOPICS * TEMPLATES * EACH, "", topic_test(kind)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=1000)
    parser.add_argument("--only", default="", help="rows whose name contains this")
    asked = parser.parse_args()
    print(
        f"{'':32} {'prompts':>7}  {'planted':12} {'p < 0.05':>9} {'interval holds it':>18}   of {asked.trials} trials"
    )
    for number, (name, n_prompts, planted, trial) in enumerate(table()):
        if asked.only in name:
            found = [trial(np.random.default_rng([number, each])) for each in range(asked.trials)]
            rejected, held = (
                "" if found[0][i] is None else str(sum(bool(each[i]) for each in found)) for i in range(2)
            )
            print(f"{name:32} {n_prompts:7}  {planted:12} {rejected:>9} {held:>18}", flush=True)
