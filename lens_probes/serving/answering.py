"""What is asked of the server, and how the model's probes answer it.

A question is one text or two to compare, a target word if one is asked for, and topics if there are any; it may name
the measure and the vectors by which entries of the vocabulary are near a state. One that names a head asks for what its
tokens attend to and add, for the page has all heads of short texts only. One forward pass serves all probes. A question
can be cancelled between probes, layers of the pass and blocks of the vocabulary. A probe that refuses the texts is left
out, and its sentence is shown; the others then run one by one.

The vocabulary costs most: a product with every state. Patterns take most memory. So of a long text some layers are
read, evenly spaced.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields, replace
from itertools import groupby
from typing import Any, get_args

import numpy as np

from lens_probes.maths.vocabulary import Metric
from lens_probes.messages import brief
from lens_probes.model import ModelView
from lens_probes.pages.packing import MOST_PAIRS, packed
from lens_probes.probe import Probe, result_class, run
from lens_probes.probes.head_topic_similarity import HeadTopicSimilarity
from lens_probes.probes.head_value_rank import HeadValueRank
from lens_probes.probes.key_value_overlap import KeyValueOverlap
from lens_probes.probes.logit_lens import LogitLens
from lens_probes.probes.massive_activations import MassiveActivations
from lens_probes.probes.max_activating_examples import MaxActivatingExamples
from lens_probes.probes.rank_shift import RankShift, Reference
from lens_probes.probes.residual_mean import ResidualMean
from lens_probes.probes.topic_activity import TopicActivity
from lens_probes.probes.unit_activation import UnitActivation
from lens_probes.result import PairResult
from lens_probes.serving.questions import Step
from lens_probes.stopping import stopped_by
from lens_probes.text.prompts import tokenize
from lens_probes.text.targets import target_of

LETTERS = 8_000  # of a text
TOKENS = 2_048  # of a text, where the model takes more
STATES = (
    2**14
)  # that are multiplied with the vocabulary: a text of more than about 500 tokens of SmolLM2 has fewer layers
TOPIC_PROMPTS = 200
TOPIC_LETTERS = 500  # of a prompt of a topic
OF_TOPICS = (HeadTopicSimilarity, TopicActivity)
PATTERNS = 2**25  # numbers in the attention patterns that are held to be summed up
OF_VOCABULARY = (RankShift, LogitLens)
NOT_OF_A_TEXT = (ResidualMean, HeadValueRank, KeyValueOverlap, MaxActivatingExamples)  # of a corpus or weights, or slow


@dataclass(frozen=True)
class Asked:
    """A question: texts (one, two to compare, or none beside topics), and what is asked of them."""

    texts: tuple[str, ...] = ()
    target: str | int = ""  # a token by its text or id
    layer: int | None = None  # of which attention is shown where that of all layers would be too much
    head: int | None = None  # of that layer: its attention is asked for, and nothing else
    metric: Metric = "cosine"  # of the entries nearest to a state,
    reference: Reference = "embed"  # and what stands for an entry
    topics: dict[str, tuple[str, ...]] = field(default_factory=dict)

    @classmethod
    def read(cls, given: Any) -> "Asked":
        """A question from JSON; raises one sentence if it is none.

        >>> asked = Asked.read({"texts": ["Time flies."], "target": " like"})
        >>> asked.texts, asked.target, asked.metric
        (('Time flies.',), ' like', 'cosine')
        """
        if not isinstance(given, dict):
            raise ValueError(f"a question must be an object; got {brief(given)}: send texts, or topics")
        known = [each.name for each in fields(cls)]
        if unknown := [name for name in given if name not in known]:
            raise ValueError(f"a question may have {', '.join(known)}; got {brief(unknown[0])}")
        texts, target = given.get("texts", []), given.get("target", "")
        layer, head, topics = given.get("layer"), given.get("head"), given.get("topics", {})
        metric, reference = given.get("metric", cls.metric), given.get("reference", cls.reference)
        if not isinstance(texts, list) or len(texts) > 2:
            raise ValueError(f"texts must be a list of one or two; got {brief(texts)}")
        if not isinstance(topics, dict) or not all(isinstance(each, list) for each in topics.values()):
            raise ValueError(f"topics must be an object, topic -> list of texts; got {brief(topics)}")
        for name, number in (("layer", layer), ("head", head)):
            if number is not None and (isinstance(number, bool) or not isinstance(number, int)):
                raise ValueError(f"{name} must be a whole number; got {brief(number)}")
        for name, chosen, known in (("metric", metric, Metric), ("reference", reference, Reference)):
            if chosen not in get_args(known):
                raise ValueError(f"{name} must be one of {', '.join(get_args(known))}; got {brief(chosen)}")
        if head is not None and (layer is None or not texts):
            raise ValueError("a head must be one of a layer and of a text; got it without: send layer and texts")
        of_topics = [text for prompts in topics.values() for text in prompts]
        if not texts and not of_topics:
            raise ValueError("a question must have a text or topics; got neither: write a text")
        if len(of_topics) > TOPIC_PROMPTS:
            raise ValueError(f"topics must have at most {TOPIC_PROMPTS} texts; got {len(of_topics)}: leave some out")
        for text in texts:
            _check("a text", text, LETTERS)
        for text in of_topics:
            _check("a text of a topic", text, TOPIC_LETTERS)
        if isinstance(target, bool) or not isinstance(target, int):
            _check("a target", target, TOPIC_LETTERS)
        for topic in topics:
            _check("a topic", topic, TOPIC_LETTERS)
        of_topic = {topic: tuple(prompts) for topic, prompts in topics.items()}
        return cls(tuple(texts), target, layer, head, metric, reference, of_topic)


def _check(what: str, text: Any, longest: int) -> None:
    if not isinstance(text, str):
        raise ValueError(f"{what} must be text; got {brief(text)}")
    if len(text) > longest:
        raise ValueError(f"{what} must have at most {longest:,} characters; got {len(text):,}: shorten it")
    if any("\ud800" <= letter <= "\udfff" for letter in text):
        raise ValueError(f"{what} must be whole characters; got half of one (a lone surrogate): leave it out")


class Answering:
    """The probes of a model that fit short texts, and the data that a page shows of their results."""

    def __init__(self, model: Any, probes: Sequence[Probe[Any]]) -> None:
        self.view = ModelView(model)
        self.of_topics = [probe for probe in probes if isinstance(probe, OF_TOPICS)]
        self.of_texts = [probe for probe in probes if not isinstance(probe, (*OF_TOPICS, *NOT_OF_A_TEXT))]

    def about(self) -> dict[str, Any]:
        """What the page says of the model."""
        view = self.view
        of_model = {"model": view.name, "class": view.class_name, "layers": view.n_layers}
        return {**of_model, "positions": view.has_positions, "letters": LETTERS}

    def __call__(self, asked: Asked, step: Step) -> bytes:
        """The answer as JSON: the data of the page, and the sentences of probes that were left out."""
        step("reading the text", 0, 1)
        runs = self.runs(asked)
        results, without, told = [], {}, _Told(step, len(runs))
        with stopped_by(told):
            for _, group in groupby(runs, key=lambda each: id(each[1])):  # those of the same prompts
                probes, prompts = zip(*group, strict=True)
                found, refused = self._run(list(probes), prompts[0])
                results += found
                without |= refused
            if not results:
                raise ValueError(next(iter(without), f"no probe fits {self.view.name} and this question: write a text"))
            told("drawing")
            keep = [] if asked.layer is None or asked.head is None else [(asked.layer, asked.head)]
            page = packed(results, f"lens_probes on {self.view.name}", keep=keep)
        answer = {"page": page, "without": [f"{name}: {sentence}" for sentence, name in without.items()]}
        return json.dumps(answer, separators=(",", ":"), allow_nan=False).encode()

    def _run(self, probes: list[Probe[Any]], prompts: Any) -> tuple[list[Any], dict[str, str]]:
        """The results of all probes in one pass; where one refuses the prompts, of all others, and what it says."""
        model, results, refused = self.view.model, [], {}
        with suppress(ValueError):
            return run(probes, model, prompts, progress=False), {}
        for probe in probes:
            try:
                results.append(probe.run(model, prompts, progress=False))
            except ValueError as error:
                refused[str(error)] = type(probe).__name__
        return results, refused

    def runs(self, asked: Asked) -> list[tuple[Probe[Any], Any]]:
        """Each probe with its prompts; raises one sentence if this model cannot read them."""
        of_texts = self._of_texts(asked)
        if asked.head is not None:
            return [(probe, texts) for probe, texts in of_texts if _is_of_pairs(probe)]
        return [*of_texts, *((probe, asked.topics) for probe in self.of_topics if asked.topics)]

    def _of_texts(self, asked: Asked) -> Iterator[tuple[Probe[Any], list[str]]]:
        """The probes of the texts, as they are asked: of the target if there is one, of one layer if texts are long."""
        if not asked.texts:
            return
        texts, view = list(asked.texts), self.view
        sizes = tokenize(texts, view).prompt.bincount().tolist()
        if max(sizes) > TOKENS:
            raise ValueError(f"a text must have at most {TOKENS:,} tokens; got {max(sizes):,}: shorten it")
        pairs = sum(size * (size if view.encoder else size + 1) // (1 if view.encoder else 2) for size in sizes)
        layer = view.n_layers // 2 if asked.layer is None else asked.layer
        view.layers([layer])  # raises unless there is one
        of_one = asked.layer is not None or pairs * view.n_layers * view.n_heads > MOST_PAIRS
        of_vocabulary = spread(view.n_layers, STATES // sum(sizes))
        of_patterns = spread(view.n_layers, PATTERNS // (pairs * view.n_heads))
        if asked.reference == "embed_pos":
            view.check_positions()
        for probe in self.of_texts:
            if isinstance(probe, RankShift):
                probe = replace(probe, metric=asked.metric, reference=asked.reference)
            has = {each.name for each in fields(probe)}  # pyright: ignore[reportArgumentType]
            if isinstance(probe, UnitActivation) or (of_one and _is_of_pairs(probe)):
                probe = replace(probe, layers=[layer])  # pyright: ignore[reportArgumentType]
            elif isinstance(probe, OF_VOCABULARY) and len(of_vocabulary) < view.n_layers:
                probe = replace(probe, layers=of_vocabulary)
            elif isinstance(probe, MassiveActivations) and len(of_patterns) < view.n_layers:
                probe = replace(probe, layers=of_patterns)
            if asked.target != "" and "target" in has:
                if isinstance(probe, LogitLens):
                    yield probe, texts
                    probe = replace(probe, top_k=0)
                probe = replace(probe, target=asked.target)  # pyright: ignore[reportArgumentType, reportCallIssue]
                target_of(probe, "target", view)  # raises unless it is a token
            yield probe, texts


class _Told:
    """Tells a question what is done and which part of all that is, anew for each batch."""

    def __init__(self, step: Step, probes: int) -> None:
        self.step, self.parts = step, probes + 2  # the pass before, and drawing after
        self.doing, self.part = "", 0

    def __call__(self, doing: str) -> None:
        """At each step of the work."""
        if doing and doing != self.doing:
            self.doing, self.part = doing, 0 if doing == "forward pass" else min(self.part + 1, self.parts - 1)
        self.step(self.doing, self.part, self.parts)


def spread(n: int, some: int) -> list[int]:
    """At least two numbers of 0 to n - 1, the first and the last among them, evenly spaced; all if there are as many.

    >>> spread(30, 4), spread(3, 9)
    ([0, 10, 19, 29], [0, 1, 2])
    """
    return sorted(set(np.linspace(0, n - 1, max(2, min(some, n))).round().astype(int).tolist()))


def _is_of_pairs(probe: Probe[Any]) -> bool:
    return issubclass(result_class(type(probe)), PairResult)
