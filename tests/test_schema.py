"""What follows from a declaration: titles, headline, tables, comparisons and figures, on numbers counted by hand."""

from typing import Any

import numpy as np
import plotly.graph_objects as go
import pytest
import torch
from jaxtyping import Float, Int
from test_result import tokens_of
from torch import Tensor

import lens_probes as lp
from lens_probes.maths import inference
from lens_probes.result import (
    LayerTokenResult,
    Provenance,
    Quantity,
    Result,
    TokenResult,
    derived,
    measured,
    schema,
    summed,
)
from lens_probes.text.prompts import Tokens


class PathResult(LayerTokenResult):
    """Numbers per layer and token, with a null."""

    place: Int[Tensor, "layer token"] = measured("place in the list", low=0, missing=-1, null="chance", low_on_top=True)
    chance: Int[Tensor, "layer token"] = measured("place of another entry", low=0, missing=-1)
    size: Float[Tensor, "layer token"] = measured("size", unit="nats", low=0, logarithmic=True)
    extra: Float[Tensor, "layer token"] | None = measured("asked for at times", default=None)

    @derived("twice the size", unit="nats", low=0)
    def double(self) -> Float[Tensor, "layer token"]:
        """Twice the size."""
        return 2 * self.size


class FactResult(TokenResult):
    """Numbers per token."""

    fact: Float[Tensor, " token"] = measured("fact about the id", low=-1, high=1, by_id=True)
    other: Float[Tensor, " token"] = measured("number of the token", low=0)


class GridResult(Result):
    """A sum, and a grid of layers and heads as the headline."""

    headline = "mean"
    layer: tuple[str, ...]
    head: tuple[str, ...]
    total: Float[Tensor, "layer head"] = summed("sum")

    @derived("mean of something", low=-1, high=1)
    def mean(self) -> Float[Tensor, "layer head"]:
        """Half the sum."""
        return self.total.float() / 2


class LineResult(Result):
    """One number per layer."""

    layer: tuple[str, ...]
    share: Float[Tensor, " layer"] = measured("share of all", low=0, high=1)


class OddResult(Result):
    """Axes that no default figure draws."""

    value: Float[Tensor, "draw step"] = measured("value")


def words(classes: str, prompts: list[int] | None = None) -> Tokens:
    """Tokens that are words of class content (c), function (f) or none (-); special ones (s)."""
    n = len(classes)
    names = {"c": "content", "f": "function", "-": "", "s": ""}
    tokens = tokens_of(prompts or [0] * n)
    return Tokens(
        **tokens.columns()
        | {
            "word": torch.tensor([i if each in "cf" else -1 for i, each in enumerate(classes)]),
            "word_class": tuple(names[each] for each in classes),
            "special": torch.tensor([each == "s" for each in classes]),
        }
    )


def paths(classes: str = "scfcf-", **changes: Any) -> PathResult:
    n = len(classes)
    given: dict[str, Any] = {
        "layer": ("0_post", "1_post"),
        "token": words(classes),
        "place": torch.stack([torch.arange(n), 10 * torch.arange(n)]),
        "chance": torch.full((2, n), 7),
        "size": torch.stack([torch.arange(n) / 2, torch.arange(n) * 2.0]),
    }
    return PathResult(**given | changes)


# Declarations


@pytest.mark.parametrize(
    ("quantity", "title"),
    [
        (Quantity("rank", low=0, high=399), "rank (0 to 399)"),
        (Quantity("entropy", "nats", low=0), "entropy (nats, 0 or more)"),
        (Quantity("log-probability", "nats", high=0), "log-probability (nats, at most 0)"),
        (Quantity("value"), "value"),
        (Quantity("cosine", low=-1, high=1), "cosine (-1 to 1)"),
        (Quantity("contribution", "logits"), "contribution (logits)"),
        (Quantity("rank", low=0, high=49151), "rank (0 to 49,151)"),
    ],
)
def test_a_title_has_unit_and_range(quantity: Quantity, title: str) -> None:
    assert quantity.title == title


def test_quantities_are_those_of_fields_and_of_properties_in_order() -> None:
    found = schema(PathResult)
    assert found.over("layer", "token") == ["place", "chance", "size", "extra", "double"]
    assert found.quantities["double"].unit == "nats" and found.quantities["place"].missing == -1
    assert found.headline == "place"
    assert schema(GridResult).headline == "mean" and schema(FactResult).headline == "fact"
    assert schema(GridResult).kind == {"total": "sum"}

    class SumResult(Result):
        """A sum first."""

        total: Float[Tensor, ""] = summed("sum")
        share: Float[Tensor, ""] = measured("share")

    assert schema(SumResult).headline == "share"


def test_a_subclass_is_a_frozen_dataclass_without_a_decorator() -> None:
    one = paths()
    with pytest.raises(AttributeError, match="cannot assign to field 'size'"):
        one.size = torch.zeros(2, 6)
    assert one != paths()
    with pytest.raises(TypeError, match=r"takes 1 positional argument|positional"):
        LineResult(("0",), torch.zeros(1))


def test_what_is_missing_is_nan_when_it_is_known() -> None:
    known = paths(place=torch.tensor([[0, -1, 2, 3, 4, 5]] * 2)).known("place")
    assert known.dtype == np.float64
    assert np.isnan(known[:, 1]).all() and known[0, 2] == 2
    with pytest.raises(ValueError, match="got 'extra', which the settings of this run leaves out"):
        paths().known("extra")
    with pytest.raises(ValueError, match=r"a quantity of a PathResult must be one of place, .*; got 'nothing'"):
        paths().quantity("nothing")


def test_a_null_that_is_not_declared_or_has_other_axes_is_refused() -> None:
    class LostResult(LayerTokenResult):
        """Its null is misspelt."""

        place: Float[Tensor, "layer token"] = measured("place", null="chanse")
        chance: Float[Tensor, "layer token"] = measured("chance")

    class ShortResult(LayerTokenResult):
        """Its null has the wrong axis."""

        place: Float[Tensor, "layer token"] = measured("place", null="chance")
        chance: Float[Tensor, " token"] = measured("chance")

    for kind in (LostResult, ShortResult):
        with pytest.raises(TypeError, match=r"place: null='chan.e' must be the name of another quantity with the axes"):
            schema(kind)


# Tables and comparisons


def test_classes_are_summarised_for_every_quantity_special_tokens_left_out() -> None:
    table = paths().by_word_class()
    assert list(dict.fromkeys(table["quantity"])) == ["place", "chance", "size", "double"]
    own = table[(table["layer"] == "1_post") & (table["word_class"] == "content")].set_index("quantity")
    assert own["median"]["place"] == 20 and own["median"]["size"] == 4 and own["median"]["double"] == 8
    assert own["median"]["chance"] == 7 and set(own["words"]) == {2}
    assert "special" not in set(table["word_class"])
    assert "special" in set(paths().by_word_class(special=True)["word_class"])


def test_a_missing_value_counts_in_no_summary() -> None:
    place = torch.stack([torch.tensor([0, -1, 2, 3, 4, 5]), 10 * torch.arange(6)])
    table = paths(place=place).by_word_class()
    first = table[(table["quantity"] == "place") & (table["layer"] == "0_post") & (table["word_class"] == "content")]
    assert first["median"].item() == 3  # of 3 alone: token 1 has no place


def test_a_comparison_is_that_of_inference_and_takes_any_quantity_of_the_axes() -> None:
    one = paths()
    pd_equal = inference.with_layers(inference.compare(one.known("place"), one.token, "content", "function"), one.layer)
    assert one.compare().equals(pd_equal)
    assert one.compare("function", "content", quantity="double")["effect"].tolist() == [0.75, 0.75]
    with pytest.raises(ValueError, match="quantity must be one of place, chance, size, double; got 'extra'"):
        one.compare(quantity="extra")


def test_facts_about_ids_are_compared_as_types_and_others_as_tokens() -> None:
    tokens = words("ccff", [0, 0, 1, 1])
    tokens = Tokens(**tokens.columns() | {"id": torch.tensor([5, 5, 6, 7]), "text": ("a", "a", "b", "c")})
    result = FactResult(token=tokens, fact=torch.tensor([0.9, 0.9, 0.1, 0.2]), other=torch.arange(4.0))
    fact, other = result.compare(), result.compare(quantity="other")
    with pytest.raises(ValueError, match="weigh must be 'types' for fact, a fact about ids; got 'tokens'"):
        result.compare(weigh="tokens")
    assert fact["content_types"].item() == 1 and fact["effect"].item() == 1 and "unit" not in fact
    assert other["content_tokens"].item() == 2 and other["effect"].item() == 0
    table = result.by_word_class().set_index(["quantity", "word_class"])
    assert table["median"]["fact", "content"] == pytest.approx(0.9)
    assert table["median"]["other", "function"] == 2.5
    drawn = result.figure()
    assert drawn.data[0].y[0] == pytest.approx(0.9)
    assert drawn.layout.yaxis.title.text == "fact about the id (-1 to 1)"


def test_a_frame_without_a_name_is_that_of_the_headline_or_of_what_there_is() -> None:
    grid = GridResult(layer=("0",), head=("H0", "H1"), total=torch.tensor([[2.0, 4.0]]))
    assert grid.to_frame()["mean"].tolist() == [1, 2]
    assert paths().to_frame()["place"].tolist()[:3] == [0, 1, 2]


# Figures


def test_the_default_figure_of_classes_draws_nulls_and_turns_axes_as_declared() -> None:
    figure = paths("scfcfcfcfcfcfcfcfcfcfcf").figure()
    titles = [figure.layout[axis].title.text for axis in ("yaxis", "yaxis2", "yaxis3")]
    assert titles == ["place in the list (0 or more)", "size (nats, 0 or more)", "twice the size (nats, 0 or more)"]
    assert figure.layout.yaxis.autorange == "reversed" and figure.layout.yaxis2.autorange is True
    assert figure.layout.yaxis2.type == "log" and figure.layout.yaxis3.type is None
    named = {trace.name: list(trace.y) for trace in figure.data if trace.name and "another" in trace.name}
    assert named == {"content: place of another entry": [7, 7], "function: place of another entry": [7, 7]}
    assert figure.layout.xaxis.title.text == "layer (read point)"


def test_paths_take_any_quantity_and_a_place_and_say_which() -> None:
    figure = paths().figure_paths(0, 2, quantity="size")
    bold = max((trace for trace in figure.data if trace.line.width), key=lambda trace: trace.line.width)
    assert list(bold.y) == [1.0, 4.0]
    assert "Size, prompt 0 (bold: 't2', token 2)" in figure.layout.title.text
    assert figure.layout.yaxis.title.text == "size (nats, 0 or more)"


def test_grids_and_lines_are_drawn_from_their_axes_and_others_are_asked_for() -> None:
    grid = GridResult(layer=("0", "1"), head=("H0", "H1"), total=torch.tensor([[2.0, 4.0], [-4.0, 0.0]]))
    drawn = grid.figure()
    assert isinstance(drawn, go.Figure)
    assert [list(row) for row in drawn.data[0].z] == [[1, 2], [-2, 0]]
    assert drawn.data[0].zmin == -2 and drawn.data[0].zmax == 2  # red below 0, blue above
    assert drawn.data[0].colorbar.title.text == "mean of something (-1 to 1)"
    line = LineResult(layer=("0", "1"), share=torch.tensor([0.25, 0.5])).figure()
    assert list(line.data[0].y) == [0.25, 0.5] and line.layout.yaxis.title.text == "share of all (0 to 1)"
    with pytest.raises(NotImplementedError, match=r"OddResult\.value \[draw step\] has no figure of its own: write"):
        OddResult(value=torch.zeros(2, 2)).figure()


class NullGridResult(Result):
    """Grids whose nulls are one number, one per layer, and one per cell."""

    headline = "cell"
    layer: tuple[str, ...]
    head: tuple[str, ...]
    cell: Float[Tensor, "layer head"] = measured("share of a cell", low=0, high=1, null="chance")
    row: Float[Tensor, "layer head"] = measured("share of a row", low=0, null="by_layer")
    one: Float[Tensor, "layer head"] = measured("size", unit="nats", null="number")
    chance: Float[Tensor, "layer head"] = measured("share in chance's cell", low=0, high=1)
    by_layer: Float[Tensor, " layer"] = measured("share in chance's row", low=0)
    number: Float[Tensor, ""] = measured("size by chance", unit="nats")


def null_grid() -> NullGridResult:
    return NullGridResult(
        layer=("0", "1"),
        head=("H0", "H1", "H2"),
        cell=torch.tensor([[0.1, 0.2, 0.3], [0.4, 0.5, 0.6]]),
        row=torch.tensor([[0.1, 0.2, 0.3], [0.4, 0.5, 0.6]]),
        one=torch.tensor([[-1.0, 2.0, 0.0], [0.0, 1.0, -2.0]]),
        chance=torch.full((2, 3), 0.25),
        by_layer=torch.tensor([0.7, 0.8]),
        number=torch.tensor(3.0),
    )


def test_a_grid_has_a_null_of_one_number_or_of_one_per_layer_in_a_last_column_on_the_same_colours() -> None:
    for name, last in (("row", [0.7, 0.8]), ("one", [3.0, 3.0])):
        result = null_grid()
        (drawn,) = result.grid(name, "title").data
        assert [row[-1] for row in drawn.z] == pytest.approx(last)
        assert [list(row[:-1]) for row in drawn.z] == pytest.approx(getattr(result, name).numpy())
        assert drawn.x == ("H0", "H1", "H2", "null") and drawn.zmax >= max(last)
    figure = null_grid().grid("one", "Sizes")
    assert "null: size by chance" in figure.layout.title.text
    (border,) = figure.layout.shapes
    assert border.x0 == border.x1 == 2.5


def test_the_column_of_the_null_is_named_however_many_others_are_left_out() -> None:
    n = 100
    result = NullGridResult(
        **{name: getattr(null_grid(), name) for name in ("by_layer", "number", "layer")},
        head=tuple(f"H{i}" for i in range(n)),
        **{name: torch.linspace(0, 1, 2 * n).reshape(2, n) for name in ("cell", "row", "one", "chance")},
    )
    for width in (400, 700):
        axis = result.grid("one", "title", width=width).layout.xaxis
        assert axis.categoryarray[-1] == axis.tickvals[-1] == "null"
        assert "one column in " in result.grid("one", "title", width=width).layout.title.text


def test_a_grid_with_a_null_per_cell_stands_beside_it_on_the_same_colours() -> None:
    result = null_grid()
    cells, chance = result.figure().data
    assert np.allclose(cells.z, result.cell.numpy()) and np.allclose(chance.z, result.chance.numpy())
    assert (cells.zmin, cells.zmax) == (chance.zmin, chance.zmax) == (0, 1)
    names = [note.text for note in result.figure().layout.annotations]
    assert names == ["share of a cell", "null"] and "null: share in chance's cell" in result.figure().layout.title.text


def test_texts_of_cells_are_those_of_the_null_too() -> None:
    result = null_grid()
    drawn = {"quantity": result.quantity("one"), "title": "t", "text": "{:.1f}".format}
    (column,) = result.draw_grid(result.one, null=("null", result.number), **drawn).data
    assert list(column.text[0]) == ["-1.0", "2.0", "0.0", "3.0"]
    own, beside = result.draw_grid(result.cell, null=("null", result.chance), **drawn).data
    assert list(own.text[1]) == ["0.4", "0.5", "0.6"] and list(beside.text[1]) == ["0.2"] * 3
    assert result.draw_grid(result.cell, null=("null", result.chance), **drawn, width=200).data[0].text is None


class NullLineResult(Result):
    """One number per layer, and what it is by chance."""

    layer: tuple[str, ...]
    share: Float[Tensor, " layer"] = measured("share of all", low=0, high=1, null="chance")
    chance: Float[Tensor, ""] = measured("share by chance", low=0, high=1)


def test_a_line_over_layers_has_its_null_dashed() -> None:
    own, null = NullLineResult(layer=("0", "1"), share=torch.tensor([0.2, 0.5]), chance=torch.tensor(0.5)).figure().data
    assert (list(null.y), null.name, null.line.dash) == ([0.5, 0.5], "share by chance", "dash")
    assert own.line.dash is None


def test_a_title_has_the_question_the_conditions_and_the_model() -> None:
    class AtResult(LineResult):
        """With a condition."""

        def conditions(self) -> str:
            return "resid_post"

    by = Provenance(model="tiny", dtype="float32", n_prompts=2, n_tokens=9)
    plain = LineResult(layer=("0",), share=torch.zeros(1), provenance=by)
    assert plain.title("Why?") == "Why?\ntiny (raw weights, float32), 2 prompts, 9 tokens"
    conditioned = AtResult(layer=("0",), share=torch.zeros(1), provenance=by)
    assert conditioned.title("Why?") == "Why?\nresid_post; tiny (raw weights, float32), 2 prompts, 9 tokens"


@pytest.mark.usefixtures("as_users_run_it")
def test_ten_thousand_tokens_are_drawn_sixty_at_a_time_and_a_wrong_first_is_refused() -> None:
    one = paths("c" * 100)
    assert one.rows_shown(0, 30) == list(range(30, 90))
    for first in (-1, 100):
        with pytest.raises(ValueError, match=rf"first must be the number of a token of prompt 0, 0 to 99; got {first}"):
            one.rows_shown(0, first)
    with pytest.raises(TypeError, match="first must be a whole number"):
        one.rows_shown(0, "one")


# What a probe's `result` fills in


def test_a_probe_fills_in_labels_and_settings(gpt2: Any) -> None:
    result = lp.ResidualMean(at="resid_post", layers=[2, 0]).run(gpt2, "one two")
    assert result.at == "resid_post" and result.layer == ("2_post", "0_post")
    update = lp.ResidualUpdate(layers=[1]).run(gpt2, ["one two", "three"])
    assert (
        update.layer == ("1",)
        and len(update.prompt) == 2
        and len(update.token) == int(update.prompt.n_tokens.sum()) + int(update.token.special.sum())
    )


def test_a_fact_about_an_id_of_two_classes_is_summarised_for_neither() -> None:
    tokens = words("cfcf")
    tokens = Tokens(**tokens.columns() | {"id": torch.tensor([5, 5, 6, 7]), "text": ("a", "a", "b", "c")})
    result = FactResult(token=tokens, fact=torch.tensor([0.9, 0.9, 0.1, 0.2]), other=torch.arange(4.0))
    table = result.by_word_class().set_index(["quantity", "word_class"])["median"]
    assert table["fact", "content"] == pytest.approx(0.1) and table["fact", "function"] == pytest.approx(0.2)
    assert table["other", "content"] == 1.0  # of tokens 0 and 2


def test_paths_of_a_quantity_that_is_low_on_top_are_turned() -> None:
    assert paths().figure_paths(0, 2).layout.yaxis.autorange == "reversed"
    assert paths().figure_paths(0, 2, quantity="size").layout.yaxis.autorange is True


def test_layers_without_labels_and_misspelt_quantities_are_refused_with_what_to_do(gpt2: Any) -> None:
    class Unlabelled(lp.Probe[LineResult]):
        """Names hooks in a plain list, and may misspell its quantity."""

        name: str = "share"

        def hooks(self, model: Any) -> list[str]:
            return [model.hook("resid_post", 0)]

        def measure(self, reading: Any) -> LineResult:
            return self.result(reading, **{self.name: torch.zeros(1)})

    with pytest.raises(ValueError, match="the layers of a Unlabelled must have labels; got a plain list of hooks"):
        Unlabelled().run(gpt2, "one")
    with pytest.raises(TypeError, match=r"LineResult has the fields .*; got 'shore': declare it, or rename it"):
        Unlabelled("shore").run(gpt2, "one")


class EntryResult(TokenResult):
    """A number and an entry of the vocabulary per token."""

    vocab: dict[int, str]
    entry: Int[Tensor, " token"] = measured("nearest entry", low=0, missing=-1, into="vocab")
    size: Float[Tensor, " token"] = measured("size", low=0)


def test_ids_of_entries_are_not_compared_between_classes_of_words() -> None:
    token = words("cfcf")
    result = EntryResult(token=token, vocab={7: "a"}, entry=torch.tensor([7, -1, 7, 7]), size=torch.arange(4.0))
    assert result.compared() == ["size"] and set(result.by_word_class()["quantity"]) == {"size"}
    with pytest.raises(ValueError, match="quantity must be one of size; got 'entry'"):
        result.compare(quantity="entry")


class CountResult(LayerTokenResult):
    """A count on a logarithmic axis, which has no 0."""

    rank: Int[Tensor, "layer token"] = measured("rank", low=0, high=9, missing=-1, logarithmic=True)


def test_counts_on_a_logarithmic_axis_are_drawn_as_one_more_than_they_are() -> None:
    rank = torch.zeros(2, 22, dtype=torch.int64)
    rank[1] = 4
    figure = CountResult(layer=("0_post", "1_post"), token=words("cf" * 11), rank=rank).figure()
    assert figure.layout.yaxis.title.text == "1 + rank (1 to 10)" and figure.layout.yaxis.type == "log"
    assert [list(trace.y) for trace in figure.data if trace.fill != "toself"] == [[1.0, 5.0], [1.0, 5.0]]


def test_paths_are_of_the_first_token_that_is_not_special_unless_one_is_named() -> None:
    result = paths("scfc")
    assert f"token {int(result.token.position[1])})" in result.figure_paths().layout.title.text
    assert f"token {int(result.token.position[0])})" in result.figure_paths(0, 0).layout.title.text
