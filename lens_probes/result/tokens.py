"""Results with one number per token, or per layer and token: summaries, comparisons and figures by word class."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Unpack

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from lens_probes import figures
from lens_probes.maths import inference
from lens_probes.messages import amount, brief, interval
from lens_probes.result.base import Result
from lens_probes.result.schema import Quantity, schema
from lens_probes.text.prompts import Tokens, whole_number

PANELS = 3  # of a figure of classes, side by side


class WordResult(Result):
    """A result with a number per token, or per layer and token, that is compared between classes of words."""

    token: Tokens
    over: ClassVar[tuple[str, ...]] = ("token",)

    def words(self) -> Tokens:
        """The tokens with the words and classes that a number is about: its own, unless a result says otherwise."""
        return self.token

    def sampled(
        self, weigh: inference.Weigh, strata: inference.Strata | None = None
    ) -> tuple["WordResult", inference.Strata | None]:
        """What statistics with these weights are asked of, with its strata: itself, unless a result holds samples."""
        return self, strata

    def compare(
        self,
        first: str = "content",
        second: str = "function",
        *,
        quantity: str | None = None,
        strata: inference.Strata | None = None,
        weigh: inference.Weigh = "types",
        permutations: int = inference.PERMUTATIONS,
        seed: int = 0,
    ) -> pd.DataFrame:
        """The probability that a token of class `first` has the larger value, its interval, p, q, n; one row per layer.

        `quantity`: the first declared unless another is named. See `inference.compare`, and for a fact about ids
        `inference.compare_types`: each id counts once, ids of both classes are left out, and there is no `weigh`. For
        frequency matching give `strata`, one number per token:
        `lens_probes.text.words.merge_order(model.tokenizer)[result.words().id]`, or counts of your own.
        """
        name, (of, strata) = self.asked(quantity), self.sampled(weigh, strata)
        values, words = np.atleast_2d(of.known(name)), of.words()
        options: dict[str, Any] = {"strata": strata, "permutations": permutations, "seed": seed}
        if self.quantity(name).by_id:
            if weigh != "types":
                raise ValueError(
                    f"weigh must be 'types' for {name}, a fact about ids; got {brief(weigh)}: leave it out"
                )
            frame = inference.compare_types(values, words, first, second, **options)
        else:
            frame = inference.compare(values, words, first, second, weigh=weigh, **options)
        layer = self.labels("layer")
        return frame.drop(columns="unit") if layer is None else inference.with_layers(frame, layer)

    def asked(self, quantity: str | None) -> str:
        """The name of a quantity, checked; the first if none is given."""
        known = self.compared()
        if quantity is not None and quantity not in tuple(known):
            raise ValueError(f"quantity must be one of {', '.join(known)}; got {brief(quantity)}")
        return known[0] if quantity is None else quantity

    def findings(self) -> list[str]:
        """Content against function words: in the last layer, and in how many layers they differ."""
        quantity = self.quantity(self.asked(None))
        try:
            table = self.compare()
        except ValueError as error:  # a text without one of the classes is no mistake
            return [f"Content and function words were not compared: {error}."]
        last: dict[str, Any] = table.iloc[-1].to_dict()
        apart, layers = np.count_nonzero(table["q"] < 0.05), self.labels("layer") if "layer" in self.over else None
        kind = "type" if quantity.by_id else "word"
        n = " and ".join(amount(int(last[f"{each}_{kind}s"]), f"{each} {kind}") for each in ("content", "function"))
        where, says = f"In the last layer, {layers[-1]}, the" if layers else "The", quantity.says.partition(",")[0]
        few = min(int(last["content_prompts"]), int(last["function_prompts"])) < inference.CLUSTERS_FOR_INTERVAL
        generality = ", for other words in these prompts" if few and not quantity.by_id else ""
        in_layers = f"; q < 0.05 in {apart} of {len(table)} layers" if layers else ""
        return [
            f"{where} {says} is larger for a content word than for a function word with probability "
            f"{last['effect']:.2f} ({interval(last['low'], last['high'])}; {n} of "
            f"{amount(int(last['content_prompts']), 'prompt')}), {'q' if layers else 'p'} = "
            f"{last['q' if layers else 'p']:.3g}{in_layers}{generality}. The null: {table.attrs['null']}."
        ]

    def compared(self) -> list[str]:
        """The quantities that this run has and that are numbers: the ids of vocabulary entries have no median."""
        names = [name for name in schema(type(self)).over(*self.over) if getattr(self, name) is not None]
        return [name for name in names if not self.quantity(name).into]


class TokenResult(WordResult):
    """A result whose quantities are `[token]`: facts about tokens, or about their ids."""

    def by_word_class(self, *, weigh: inference.Weigh = "types") -> pd.DataFrame:
        """Each quantity by word class: n, median, quartiles and the interval of the median.

        Word types weigh equally unless `weigh="tokens"`. A fact about ids counts every id once. A quantity that no word
        has in this run is left out.
        """
        frames, classes = [], inference.classes_of(self.words().word_class)
        of_class = np.isin(self.words().word_class, classes)
        known = [name for name in self.compared() if not np.isnan(self.known(name)[of_class]).all()]
        for name in known or self.compared()[:1]:
            if self.quantity(name).by_id:
                frame = inference.describe_types(self.known(name)[None], self.words())
            else:
                frame = inference.describe(self.known(name)[None], self.words(), classes, weigh=weigh)
            frames.append(frame.assign(quantity=name).drop(columns="unit"))
        frame = pd.concat(frames, ignore_index=True)
        return frame.reindex(columns=["quantity", *(column for column in frame.columns if column != "quantity")])

    def figure(self, **look: Unpack[figures.Look]) -> go.Figure:
        """The median of the first quantity by word class, with its 95 % interval."""
        name, table = self.compared()[0], self.by_word_class()
        table = table[table["quantity"] == name]
        count = "types" if self.quantity(name).by_id else "words"
        rows = list(zip(*(table[column] for column in ("word_class", "median", "low", "high", count)), strict=True))
        return figures.bars(
            {word_class: (median, low, high) for word_class, median, low, high, _ in rows},
            notes={word_class: amount(n, count.removesuffix("s")) for word_class, *_, n in rows},
            title=self.title(f"{self.quantity(name).heading}, by word class (medians)"),
            y_title=self.quantity(name).title,
            **look,
        )


class LayerTokenResult(WordResult):
    """A result whose quantities are `[layer token]`: paths of tokens through the layers."""

    layer: tuple[str, ...]
    over: ClassVar[tuple[str, ...]] = ("layer", "token")

    def by_word_class(self, *, special: bool = False, weigh: inference.Weigh = "types") -> pd.DataFrame:
        """Each quantity by word class and layer: n, median, quartiles and the interval of the median.

        One row per quantity, class and layer, with columns as `inference.describe` gives them; word types weigh equally
        unless `weigh="tokens"`. Special tokens are left out unless `special`: their states are outliers.
        """
        of, _ = self.sampled(weigh)
        values = {name: of.known(name) for name in self.compared()}
        return inference.by_word_class(values, self.layer, of.words(), special=special, weigh=weigh)

    def figure(self, **look: Unpack[figures.Look]) -> go.Figure:
        """The medians of the first quantities by word class over layers, with 95 % intervals; their nulls are dashed.

        Classes of fewer than ten words are left out, unless there are no others.
        """
        nulls = {self.quantity(name).null for name in self.compared()}
        shown = [name for name in self.compared() if name not in nulls][:PANELS]
        headings = [self.quantity(shown[0]).heading, *(self.quantity(name).says for name in shown[1:])]
        return self.draw_classes(self.class_panels(*shown), f"{', '.join(headings)}: medians by word class", **look)

    def class_panels(self, *quantities: str) -> dict[str, list[figures.Line]]:
        """The lines of each quantity by word class, with those of its null; panels by the title of their axis."""
        table = self.by_word_class()
        classes = figures.shown_classes(table)
        panels = {}
        for name in quantities:
            axis, added = self._on_axis(name)
            table.loc[table["quantity"].isin([name, axis.null]), ["median", "low", "high"]] += added
            lines = figures.class_lines(table, name, classes)
            for word_class in classes if axis.null else ():
                label = f"{word_class}: {self.quantity(axis.null).says}"
                lines += [
                    replace(line, name=label, low=None, high=None, dashed=True)
                    for line in figures.class_lines(table, axis.null, [word_class])
                ]
            panels[axis.title] = lines
        return panels

    def draw_classes(
        self, panels: dict[str, list[figures.Line]], question: str, **look: Unpack[figures.Look]
    ) -> go.Figure:
        """Panels over the layers of this result, turned and scaled as their quantities say."""
        declared = {(axis := self._on_axis(name)[0]).title: axis for name in self.compared()}
        return figures.lines(
            panels,
            self.layer,
            title=self.title(question),
            x_title=figures.layer_title(self.layer),
            upside_down=[title for title in panels if title in declared and declared[title].low_on_top],
            logarithmic=[title for title in panels if title in declared and declared[title].logarithmic],
            **look,
        )

    def figure_paths(
        self,
        prompt: int = 0,
        token: int | str | None = None,
        *,
        quantity: str | None = None,
        **look: Unpack[figures.Look],
    ) -> go.Figure:
        """One prompt's tokens through the layers, one token bold: a position, or a word that the prompt has once.

        By default it is the first token that is not special and has a value.
        """
        name = self.asked(quantity)
        rows, values = self.token.rows(prompt), self.known(name)
        known = [i for i in rows if not self.token.special[i] and np.isfinite(values[:, i]).any()]
        row = (known or rows)[0] if token is None else self.token.row(prompt, token)
        bold = rows.index(row)
        texts = [self.token.text[i] for i in rows]
        classes = ["special" if self.token.special[i] else self.token.word_class[i] or "no word" for i in rows]
        return figures.paths(
            [
                figures.TokenPath(
                    text,
                    kind,
                    values[:, i].tolist(),
                    figures.class_colour(kind, classes),
                    f" (token {int(self.token.position[i])})",
                )
                for text, kind, i in zip(texts, classes, rows, strict=True)
            ],
            bold=bold,
            x=self.layer,
            title=self.title(
                f"{self.quantity(name).heading}, prompt {prompt} (bold: {figures.quoted(texts[bold])}, "
                f"token {int(self.token.position[rows[bold]])})"
            ),
            x_title=figures.layer_title(self.layer),
            y_title=self.quantity(name).title,
            upside_down=self.quantity(name).low_on_top,
            **look,
        )

    def figure_prompt(
        self, prompt: int = 0, *, quantity: str | None = None, first: int = 0, **look: Unpack[figures.Look]
    ) -> go.Figure:
        """One prompt, layers across and tokens down: sixty tokens, from number `first` on."""
        name = self.asked(quantity)
        return self.draw_prompt(self.quantity(name).heading, prompt, quantity=name, first=first, **look)

    def draw_prompt(
        self,
        question: str,
        prompt: int,
        *,
        quantity: str,
        first: int,
        farthest: float = math.inf,
        text: Callable[[int, int], str] | None = None,
        hover: Callable[[int, int], str] | None = None,
        **look: Unpack[figures.Look],
    ) -> go.Figure:
        """A prompt as a heatmap, with a text in each cell and another on hovering, both of a layer and a row.

        Colours end at `farthest` from 0. Texts must have gone through `visible`.
        """
        asked = self.quantity(self.asked(quantity))
        rows, layers, signed = self.rows_shown(prompt, first), range(len(self.layer)), asked.low < 0 < asked.high
        low, high = (
            float(bound) if math.isfinite(bound) and not (signed or asked.logarithmic) else None
            for bound in (max(asked.low, -farthest), min(asked.high, farthest))
        )
        return figures.heatmap(
            self.known(quantity)[:, rows].T.tolist(),
            x=self.layer,
            y=[f"{figures.visible(self.token.text[i], 14)} {self.token.position[i]}" for i in rows],
            title=self.title(f"{question}, prompt {prompt}, {_span([int(self.token.position[i]) for i in rows])}"),
            x_title=figures.layer_title(self.layer),
            y_title="token",
            colour_title=asked.title,
            low=low,
            high=high,
            signed=signed,
            dark_is_high=not asked.low_on_top,
            logarithmic=asked.logarithmic,
            text=[[text(layer, i) for layer in layers] for i in rows] if text else None,
            hover=[[hover(layer, i) for layer in layers] for i in rows] if hover else None,
            narrowest=36 if text else 6,
            **look,
        )

    def rows_shown(self, prompt: int, first: int) -> list[int]:
        """The rows of a prompt's tokens from number `first` on, as many as a heatmap can show."""
        whole_number("first", first)
        rows = self.token.rows(prompt)[first : first + figures.ROWS] if first >= 0 else []
        if not rows:
            n = len(self.token.rows(prompt))
            raise ValueError(f"first must be the number of a token of prompt {prompt}, 0 to {n - 1}; got {first}")
        return rows

    def _on_axis(self, name: str) -> tuple[Quantity, int]:
        """A quantity as lines show it, and what is added to it: counts on a logarithmic axis, which has no 0, get 1."""
        quantity = self.quantity(name)
        if not quantity.logarithmic or quantity.missing is None:
            return quantity, 0
        return quantity._replace(says=f"1 + {quantity.says}", low=quantity.low + 1, high=quantity.high + 1), 1


def _span(positions: Sequence[int]) -> str:
    """Tokens as a title names them: the first and the last of a range, or each of a few.

    >>> _span([2, 3, 4]), _span([5]), _span([0, 7])
    ('tokens 2 to 4', 'token 5', 'tokens 0, 7')
    """
    first, last = positions[0], positions[-1]
    if len(positions) == 1:
        return f"token {first}"
    if last - first == len(positions) - 1:
        return f"tokens {first} to {last}"
    return f"tokens {', '.join(map(str, positions[:6]))}{', ...' if len(positions) > 6 else ''}"
