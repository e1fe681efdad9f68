"""Merging, tables and files follow from a result's annotations: shown on toys whose answers are counted by hand."""

import json
import math
import os
import struct
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import fields, replace
from itertools import permutations
from pathlib import Path
from typing import Any

import pandas as pd
import plotly.graph_objects as go
import pytest
import torch
from jaxtyping import Bool, Float, Float64, Int
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

import lens_probes as lp
from lens_probes.examples import tiny
from lens_probes.messages import amount
from lens_probes.result import Provenance, Result, derived, load, measured, schema, summed
from lens_probes.result.merging import with_prompts_in_order
from lens_probes.text.prompts import PairTable, PromptTable, Table, Tokens


class ToyResult(Result):
    """One field of every kind."""

    layer: tuple[str, ...]
    topic: tuple[str, ...]
    token: Tokens
    prompt: PromptTable
    pair: PairTable
    rank: Int[Tensor, "layer token"] = measured("rank", low=0)
    length: Float[Tensor, " prompt"] = measured("length of the prompt", low=0)
    attention: Float[Tensor, "pair layer"] = measured("attention", low=0, high=1)
    total: Float64[Tensor, "layer topic"] = summed("sum by topic")
    product: Float64[Tensor, "topic other_topic"] = summed("sum by two topics")
    count: Float64[Tensor, ""] = summed("number of tokens")
    bias: Float[Tensor, " layer"] = measured("the same for all")
    used: Bool[Tensor, " layer"] = measured("the same for all")
    note: str = ""
    extra: Float[Tensor, "token k"] | None = measured("not always asked for", default=None)
    extra_total: Float64[Tensor, " topic"] | None = summed("not always asked for", default=None)

    @derived("mean by topic")
    def mean(self) -> Float64[Tensor, "layer topic"]:
        """Mean by topic."""
        return self.total / self.count

    @derived("twice the rank", low=0)
    def double(self) -> Int[Tensor, "layer token"]:
        """Twice the rank."""
        return 2 * self.rank

    @property
    def name(self) -> str:
        """No tensor."""
        return "toy"

    def figure(self, **look: Any) -> go.Figure:
        """Nothing to see."""
        return go.Figure()


class PlainResult(Result):
    """Rows of one axis without labels, and a few plain values."""

    value: Float[Tensor, "row column"] = measured("a value")
    pairs: tuple[tuple[str, int], ...] = ()
    text: str = ""
    number: float = 0.0
    flag: bool = False

    def figure(self, **look: Any) -> go.Figure:
        """Nothing to see."""
        return go.Figure()


class PromptsResult(Result):
    """Square in prompts: two axes with one table of labels."""

    prompt: PromptTable
    distance: Float[Tensor, "prompt other_prompt"] = measured("distance", low=0)

    def figure(self, **look: Any) -> go.Figure:
        """Nothing to see."""
        return go.Figure()


def tokens_of(prompts: Sequence[int], first: int = 0) -> Tokens:
    """Tokens of these prompts, ids counted from `first`."""
    n = len(prompts)
    return Tokens(
        prompt=torch.tensor(prompts, dtype=torch.int64),
        position=torch.arange(n),
        id=torch.arange(first, first + n),
        text=tuple(f"t{i}" for i in range(first, first + n)),
        word=torch.full((n,), -1),
        word_class=("content",) * n,
        special=torch.zeros(n, dtype=torch.bool),
        topic=("",) * n,
        document=torch.tensor(prompts, dtype=torch.int64),
    )


def part(topics: str, prompts: Sequence[int], n_prompts: int, first: int = 0, **changes: Any) -> ToyResult:
    """A toy whose numbers are powers of two, so that sums are exact and can be read off."""
    n, topic = len(prompts), tuple(topics)
    numbers = sorted(set(prompts))
    power = torch.tensor([2.0 ** (first + i) for i in range(len(topic))], dtype=torch.float64)
    given: dict[str, Any] = {
        "provenance": Provenance(probe="Toy()", model="toy", dtype="float32", n_prompts=n_prompts, n_tokens=n),
        "layer": ("0_pre", "0_post"),
        "topic": topic,
        "token": tokens_of(prompts, first),
        "prompt": PromptTable(
            prompt=torch.tensor(numbers, dtype=torch.int64),
            text=tuple(f"p{i}" for i in numbers),
            topic=("",) * len(numbers),
            n_tokens=torch.tensor([prompts.count(i) for i in numbers], dtype=torch.int64),
            last_text=tuple(f"t{i}" for i in numbers),
        ),
        "pair": PairTable(
            prompt=torch.tensor(prompts, dtype=torch.int64),
            query=torch.arange(n),
            key=torch.zeros(n, dtype=torch.int64),
        ),
        "rank": first + torch.arange(2 * n).reshape(2, n),
        "length": torch.tensor([float(list(prompts).count(i)) for i in numbers]),
        "attention": torch.full((n, 2), 0.5),
        "total": torch.stack([power, 3 * power]),
        "product": torch.outer(power, power),
        "count": torch.tensor(float(n), dtype=torch.float64),
        "bias": torch.tensor([1.0, torch.nan]),
        "used": torch.tensor([True, False]),
    }
    return ToyResult(**given | changes)


def assert_equal(one: Result, other: Result) -> None:
    """The same to the last bit, missing values included."""
    assert type(one) is type(other)
    assert one.provenance == other.provenance
    for name in (field.name for field in fields(one) if field.name != "provenance"):
        value = getattr(one, name)
        columns = value.columns() if isinstance(value, Table) else {"": value}
        others = getattr(other, name).columns() if isinstance(value, Table) else {"": getattr(other, name)}
        for column, own in columns.items():
            if isinstance(own, Tensor):
                torch.testing.assert_close(own, others[column], rtol=0, atol=0, equal_nan=True)
            else:
                assert own == others[column], (name, column)


# What the annotations say


def test_the_schema_is_read_off_the_annotations() -> None:
    found = schema(ToyResult)
    assert found.axes["rank"] == ("layer", "token")
    assert found.axes["count"] == ()
    assert found.axes["extra"] == ("token", "k")
    assert found.derived == {"mean": ("layer", "topic"), "double": ("layer", "token")}
    assert {name: kind for name, kind in found.kind.items() if kind != "constant"} == {
        **dict.fromkeys(("rank", "length", "attention", "extra"), "rows"),
        **dict.fromkeys(("total", "product", "count", "extra_total"), "sum"),
    }
    assert found.tables == {"token": Tokens, "prompt": PromptTable, "pair": PairTable}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"rank": torch.zeros(2, 4, dtype=torch.int64)},
            r"rank has 4 entries on axis 'token', and the labels .* have 3",
        ),
        ({"rank": torch.zeros(3, 3, dtype=torch.int64)}, r"rank has 3 entries on axis 'layer', .* have 2"),
        ({"layer": ("0_pre",)}, r"rank has 2 entries on axis 'layer', .* have 1"),
        (
            {"length": torch.zeros(2, 2)},
            r"ToyResult.length must be \[prompt\] on the CPU; got a tensor of shape \(2, 2\) on cpu",
        ),
        (
            {"count": torch.zeros(1, dtype=torch.float64)},
            r"count must be \[\] on the CPU; got a tensor of shape \(1,\)",
        ),
        ({"rank": torch.zeros(2, 3, dtype=torch.int64, device="meta")}, r"on the CPU; got .* on meta$"),
        (
            {"product": torch.zeros(2, 3, dtype=torch.float64)},
            r"product has 3 entries on axis 'other_topic', .* have 2",
        ),
        ({"extra": torch.zeros(4, 2)}, r"extra has 4 entries on axis 'token'"),
    ],
)
@pytest.mark.usefixtures("as_users_run_it")
def test_shapes_and_labels_that_do_not_fit_are_refused_when_the_result_is_made(
    changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        part("ab", [0, 0, 1], 2, **changes)


def test_two_fields_on_an_axis_without_labels_must_have_its_size() -> None:
    class TwoResult(PlainResult):  # pyright: ignore[reportGeneralTypeIssues]
        """A second field on the axis `row`."""

        other: Float[Tensor, " row"] = measured("other")

    TwoResult(value=torch.zeros(2, 3), other=torch.zeros(2))
    with pytest.raises((ValueError, TypeError), match=r"other has 3 entries on axis 'row', .* another field have 2"):
        TwoResult(value=torch.zeros(2, 3), other=torch.zeros(3))


def test_amounts_have_their_noun_in_the_right_number() -> None:
    assert [amount(n, "prompt") for n in (0, 1, 2, 12345)] == ["0 prompts", "1 prompt", "2 prompts", "12,345 prompts"]


def test_provenance_is_told_in_one_line() -> None:
    told = Provenance(model="tiny", processed=True, dtype="bfloat16", n_prompts=1, n_tokens=1024).describe()
    assert told == "tiny (processed weights, bfloat16), 1 prompt, 1,024 tokens"


# Merging


def three_parts() -> list[ToyResult]:
    """Prompts 1 and 3 of the first part, and all of the last one's, have no rows; topics overlap."""
    return [part("ab", [0, 0, 2], 4), part("cb", [0, 1, 1, 1], 2, first=10), part("a", [], 3, first=20)]


def test_rows_are_laid_end_to_end_and_prompts_renumbered_with_those_that_have_no_rows() -> None:
    merged = ToyResult.merge(three_parts())
    assert merged.token.prompt.tolist() == [0, 0, 2, 4, 5, 5, 5]
    assert merged.token.position.tolist() == [0, 1, 2, 0, 1, 2, 3]
    assert merged.token.text == ("t0", "t1", "t2", "t10", "t11", "t12", "t13")
    assert merged.prompt.prompt.tolist() == [0, 2, 4, 5]
    assert merged.pair.prompt.tolist() == [0, 0, 2, 4, 5, 5, 5]
    assert merged.pair.query.tolist() == [0, 1, 2, 0, 1, 2, 3]
    assert merged.rank.tolist() == [[0, 1, 2, 10, 11, 12, 13], [3, 4, 5, 14, 15, 16, 17]]
    assert merged.length.tolist() == [2, 1, 1, 3]
    assert merged.attention.shape == (7, 2)
    assert (merged.provenance.n_prompts, merged.provenance.n_tokens) == (9, 7)


def test_sums_are_added_by_label() -> None:
    merged = ToyResult.merge(three_parts())
    assert merged.topic == ("a", "b", "c")
    a, b, c = 1 + 2**20, 2 + 2**11, 2**10
    assert merged.total.tolist() == [[a, b, c], [3 * a, 3 * b, 3 * c]]
    # The products of the parts: a and b of the first, c and b of the second, a of the third.
    assert merged.product.tolist() == [
        [1 + 2**40, 2, 0],
        [2, 4 + 2**22, 2**21],
        [0, 2**21, 2**20],
    ]
    assert merged.count == 7
    assert merged.mean[0].tolist() == [a / 7, b / 7, c / 7]
    assert merged.total.dtype == merged.product.dtype == torch.float64


def test_merging_is_associative_and_merging_one_changes_nothing() -> None:
    a, b, c = three_parts()
    whole = Result.merge([a, b, c])
    assert_equal(whole, Result.merge([Result.merge([a, b]), c]))
    assert_equal(whole, Result.merge([a, Result.merge([b, c])]))
    assert_equal(a, Result.merge([a]))
    assert_equal(a, three_parts()[0])  # and has not changed its parts


def test_the_order_of_parts_changes_numbers_of_prompts_and_order_of_labels_and_no_sum() -> None:
    for order in permutations(three_parts()):
        merged = ToyResult.merge(order)
        by_topic = dict(zip(merged.topic, merged.total[0].tolist(), strict=True))
        assert by_topic == {"a": 1 + 2**20, "b": 2 + 2**11, "c": 2**10}
        assert sorted(merged.token.text) == ["t0", "t1", "t10", "t11", "t12", "t13", "t2"]


def test_optional_fields_are_merged_where_all_have_them_and_stay_out_where_none_has() -> None:
    optional = [
        {"extra": torch.full((3, 2), 1.0), "extra_total": torch.tensor([1.0, 2.0], dtype=torch.float64)},
        {"extra": torch.full((4, 2), 2.0), "extra_total": torch.tensor([4.0, 8.0], dtype=torch.float64)},
        {"extra": torch.empty(0, 2), "extra_total": torch.tensor([16.0], dtype=torch.float64)},
    ]
    asked = [replace(one, **values) for one, values in zip(three_parts(), optional, strict=True)]
    merged = ToyResult.merge(asked)
    assert merged.extra is not None
    assert merged.extra[:, 0].tolist() == [1, 1, 1, 2, 2, 2, 2]
    assert merged.extra_total is not None
    assert merged.extra_total.tolist() == [17, 10, 4]
    without = ToyResult.merge(three_parts())
    assert without.extra is None
    assert without.extra_total is None
    for name in ("extra", "extra_total"):
        with pytest.raises(ValueError, match=f"results that differ in '{name}' cannot be merged"):
            Result.merge([asked[0], replace(asked[1], **{name: None})])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bias": torch.tensor([1.0, 2.0])}, "differ in 'bias' cannot be merged .*: they come from different settings"),
        ({"used": torch.tensor([True, True])}, "differ in 'used'"),
        ({"layer": ("0_pre", "1_post")}, "differ in 'layer'"),
        ({"note": "another"}, r"differ in 'note' cannot be merged \( and another\)"),
        ({"provenance": Provenance(probe="Toy()", model="other", dtype="float32")}, "runs .*: they differ in model$"),
        ({"provenance": Provenance(probe="T()", model="toy", dtype="float64")}, "they differ in probe, dtype"),
    ],
)
def test_results_of_different_settings_or_models_are_not_merged(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Result.merge([part("a", [0], 1), part("a", [0], 1, **changes)])


def test_equal_constants_are_kept_missing_values_included() -> None:
    merged = ToyResult.merge(three_parts())
    torch.testing.assert_close(merged.bias, torch.tensor([1.0, torch.nan]), rtol=0, atol=0, equal_nan=True)
    assert merged.used.tolist() == [True, False]


def test_nothing_and_results_of_two_kinds_are_not_merged() -> None:
    plain = PlainResult(value=torch.zeros(1, 1))
    wrong: Any = [plain]
    with pytest.raises(ValueError, match="merge takes one result or more; got none"):
        Result.merge([])
    with pytest.raises(TypeError, match=r"one kind, Result; got PlainResult, ToyResult"):
        Result.merge([part("a", [0], 1), plain])
    with pytest.raises(TypeError, match=r"one kind, ToyResult; got PlainResult"):
        ToyResult.merge(wrong)


def test_what_is_square_in_prompts_is_not_laid_end_to_end() -> None:
    one = PromptsResult(
        prompt=PromptTable(
            prompt=torch.arange(2),
            text=("x", "y"),
            topic=("", ""),
            n_tokens=torch.ones(2, dtype=torch.int64),
            last_text=("", ""),
        ),
        distance=torch.zeros(2, 2),
    )
    with pytest.raises(ValueError, match=r"'distance' \[prompt other_prompt\] cannot be laid end to end"):
        Result.merge([one, one])


# Tables


@pytest.fixture
def toy() -> ToyResult:
    return part("ab", [0, 0, 2], 4, extra=torch.arange(6.0).reshape(3, 2))


def test_a_frame_has_one_row_a_cell_and_all_that_shares_its_axes_as_columns(toy: ToyResult) -> None:
    frame = toy.to_frame("rank")
    assert list(frame.columns) == ["layer", *toy.token.columns(), "rank", "double"]
    assert frame["layer"].tolist() == ["0_pre"] * 3 + ["0_post"] * 3
    assert frame["text"].tolist() == ["t0", "t1", "t2"] * 2
    assert frame["prompt"].tolist() == [0, 0, 2] * 2
    assert frame["rank"].tolist() == [0, 1, 2, 3, 4, 5]
    assert frame["double"].tolist() == [0, 2, 4, 6, 8, 10]
    pd.testing.assert_frame_equal(frame, toy.to_frame())  # rank is the first field
    pd.testing.assert_frame_equal(frame, toy.to_frame("double"))


def test_a_layer_or_a_head_is_found_by_number_or_by_label() -> None:
    class Cells(Result):
        layer: tuple[str, ...]
        head: tuple[str, ...]
        value: Float[Tensor, "layer head"] = measured("value")

    result = Cells(layer=("9", "10", "21"), head=("H0", "H6"), value=torch.zeros(3, 2))
    assert [result.index_of("layer", asked) for asked in (21, "21", "9")] == [2, 2, 0]
    assert [result.index_of("head", asked) for asked in (6, "6", "H6")] == [1, 1, 1]
    for asked in ("H1", 1, -1, True, "x6", ""):
        with pytest.raises(ValueError, match=f"head must be one of H0, H6, by label or number; got {asked!r}"):
            result.index_of("head", asked)
    frame = result.to_frame().sort_values(["layer", "head"])
    assert list(frame["layer"].cat.categories) == ["9", "10", "21"] and frame["head"].cat.ordered
    assert frame["layer"].tolist() == ["9", "9", "10", "10", "21", "21"]
    assert result.cells("layer", "head")["layer"].cat.ordered


def test_probabilities_stand_beside_log_probabilities() -> None:
    class Asked(Result):
        top_log_prob: Float[Tensor, " token"] = measured("log-probability", unit="nats", high=0)

    frame = Asked(top_log_prob=torch.tensor([0.0, -1.0])).to_frame()
    assert list(frame) == ["token", "top_log_prob", "top_prob"]
    assert frame["top_prob"].tolist() == pytest.approx([1, math.exp(-1)])


def test_a_file_of_any_result_is_read_by_one_function(tmp_path: Path) -> None:
    result = PlainResult(value=torch.zeros(2, 3), text="a")
    result.save(tmp_path / "plain.safetensors")
    assert repr(load(tmp_path / "plain.safetensors")) == repr(result)


def test_there_is_a_frame_for_every_set_of_axes(toy: ToyResult) -> None:
    pairs = toy.to_frame("attention")
    assert list(pairs.columns) == ["prompt", "query", "key", "layer", "attention"]
    assert pairs["query"].tolist() == [0, 0, 1, 1, 2, 2]
    assert pairs["layer"].tolist() == ["0_pre", "0_post"] * 3
    assert toy.to_frame("length").to_dict("list") == {
        "prompt": [0, 2],
        "text": ["p0", "p2"],
        "topic": ["", ""],
        "n_tokens": [2, 1],
        "last_text": ["t0", "t2"],
        "length": [2.0, 1.0],
    }
    assert toy.to_frame("product").to_dict("list") == {
        "topic": ["a", "a", "b", "b"],
        "other_topic": ["a", "b", "a", "b"],
        "product": [1, 2, 2, 4],
    }
    assert toy.to_frame("total").to_dict("list") == {
        "layer": ["0_pre", "0_pre", "0_post", "0_post"],
        "topic": ["a", "b", "a", "b"],
        "total": [1, 2, 3, 6],
        "mean": [1 / 3, 2 / 3, 1, 2],
    }
    assert toy.to_frame("count").to_dict("list") == {"count": [3]}
    extra = toy.to_frame("extra")
    assert extra["k"].tolist() == [0, 1] * 3
    assert extra["extra"].tolist() == [0, 1, 2, 3, 4, 5]


def test_the_second_of_two_axes_with_one_table_has_columns_of_its_own() -> None:
    prompts = PromptTable(
        prompt=torch.tensor([0, 1]),
        text=("x", "y"),
        topic=("t", "u"),
        n_tokens=torch.ones(2, dtype=torch.int64),
        last_text=("x", "y"),
    )
    frame = PromptsResult(prompt=prompts, distance=torch.tensor([[0.0, 1.0], [2.0, 0.0]])).to_frame()
    assert frame.to_dict("list") == {
        "prompt": [0, 0, 1, 1],
        "text": ["x", "x", "y", "y"],
        "topic": ["t", "t", "u", "u"],
        "n_tokens": [1, 1, 1, 1],
        "last_text": ["x", "x", "y", "y"],
        "other_prompt": [0, 1, 0, 1],
        "other_text": ["x", "y", "x", "y"],
        "other_topic": ["t", "u", "t", "u"],
        "other_n_tokens": [1, 1, 1, 1],
        "other_last_text": ["x", "y", "x", "y"],
        "distance": [0, 1, 2, 0],
    }


def test_a_frame_of_nothing_has_its_columns_and_no_rows() -> None:
    frame = part("a", [], 1).to_frame("rank")
    assert len(frame) == 0
    assert list(frame.columns)[:2] == ["layer", "prompt"]


def test_a_frame_of_what_there_is_not_is_refused_with_what_there_is(toy: ToyResult) -> None:
    with pytest.raises(ValueError, match=r"ToyResult has no tensor 'note'; it has rank, length, .*mean"):
        toy.to_frame("note")
    with pytest.raises(ValueError, match=r"got 'extra', which Toy\(\) leaves out: run it with other settings"):
        part("a", [0], 1).to_frame("extra")


def test_an_xarray_dataset_has_every_tensor_with_its_labels(toy: ToyResult) -> None:
    pytest.importorskip("xarray", reason="to_xarray needs lens-probes[xarray]")
    data = toy.to_xarray()
    assert data["rank"].dims == ("layer", "token")
    assert data["rank"].sel(layer="0_post").values.tolist() == [3, 4, 5]
    assert data["token_text"].values.tolist() == ["t0", "t1", "t2"]
    assert data["pair_query"].dims == ("pair",)
    assert data["product"].sel(topic="b", other_topic="a") == 2
    assert data["count"].ndim == 0
    assert "extra_total" not in data
    assert set(schema(ToyResult).axes) - set(data.data_vars) == {"extra_total"}
    assert json.loads(data.attrs["provenance"])["model"] == "toy"
    assert part("a", [0], 1, extra=None).to_xarray().sizes["token"] == 1


def test_without_xarray_one_is_told_what_to_install(toy: ToyResult, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "xarray", None)
    with pytest.raises(ImportError, match=r'to_xarray needs xarray: pip install "lens-probes\[xarray\]"'):
        toy.to_xarray()


# Files


AWKWARD = ("", "naïve 東京", "🙂", "<script>alert('x')</script>", 'a "quoted" \\ one', "\n\t\u2028", "\ud83d")


def test_a_file_gives_back_what_was_saved_to_the_last_bit(tmp_path: Path) -> None:
    token = replace(tokens_of([0] * len(AWKWARD)), text=AWKWARD, topic=AWKWARD)
    n = len(AWKWARD)
    toy = part(
        "ab",
        [0] * n,
        1,
        token=token,
        rank=torch.full((2, n), -1),
        attention=torch.tensor([[torch.nan, 0.1]] * n),
        bias=torch.tensor([torch.inf, -0.0]),
        count=torch.tensor(1 / 3, dtype=torch.float64),
        note=AWKWARD[3],
        extra_total=torch.tensor([torch.nan, 1e-300], dtype=torch.float64),
    )
    provenance = replace(
        toy.provenance, probe=AWKWARD[3], processed=True, hooks=("a", "b"), versions=(("torch", "2"), ("python", "3"))
    )
    toy = replace(toy, provenance=provenance)
    path = tmp_path / "sub.dir" / "no suffix"
    path.parent.mkdir()
    toy.save(path)
    for kind in (ToyResult, Result):
        loaded = kind.load(str(path))
        assert_equal(toy, loaded)
        assert repr(loaded) == repr(toy)
    assert [file.name for file in path.parent.iterdir()] == ["no suffix"]
    assert math.copysign(1, ToyResult.load(path).bias[1]) == -1


def test_empty_tables_and_empty_tensors_survive_a_file(tmp_path: Path) -> None:
    for empty in (part("a", [], 0), part("", [], 0), PlainResult(value=torch.empty(0, 5))):
        empty.save(tmp_path / "empty")
        assert_equal(empty, type(empty).load(tmp_path / "empty"))


def test_plain_values_come_back_with_their_types(tmp_path: Path) -> None:
    plain = PlainResult(value=torch.zeros(1, 1), pairs=(("a", 1), ("b", 2)), text="x", number=0.1, flag=True)
    plain.save(tmp_path / "plain")
    loaded = PlainResult.load(tmp_path / "plain")
    assert (loaded.pairs, loaded.text, loaded.number, loaded.flag) == ((("a", 1), ("b", 2)), "x", 0.1, True)


def test_tensors_that_share_their_memory_or_are_views_are_saved_apart(tmp_path: Path) -> None:
    shared = torch.arange(12, dtype=torch.float64).reshape(3, 4)
    toy = part("ab", [0, 0, 1], 2, total=shared[:2, :2], product=shared[1:, ::2], extra_total=shared[0, :2])
    prompt = toy.token.prompt
    toy = replace(toy, pair=PairTable(prompt=prompt, query=prompt, key=prompt))
    toy.save(tmp_path / "shared")
    assert_equal(toy, ToyResult.load(tmp_path / "shared"))


def test_saving_over_a_file_replaces_it(tmp_path: Path) -> None:
    for n in (2.0, 3.0):
        PlainResult(value=torch.full((2, 2), n)).save(tmp_path / "one")
    assert PlainResult.load(tmp_path / "one").value.tolist() == [[3, 3], [3, 3]]


@pytest.mark.parametrize("step", ["write", "replace"])
def test_a_failed_save_leaves_the_old_file_and_nothing_else(
    step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "one"
    PlainResult(value=torch.zeros(2, 2)).save(path)
    old = path.read_bytes()

    def half_written(temporary: Path, content: bytes) -> None:
        temporary.write_text("half")
        raise OSError("no space left")

    def failing(source: Any, target: Any) -> None:
        raise OSError("no space left")

    if step == "write":
        monkeypatch.setattr(Path, "write_bytes", half_written)
    else:
        monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(OSError, match="no space left"):
        PlainResult(value=torch.ones(2, 2)).save(path)
    assert path.read_bytes() == old
    assert [file.name for file in tmp_path.iterdir()] == ["one"]


def test_saving_into_a_folder_that_is_not_there_is_an_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*nowhere to save one in: make it first"):
        PlainResult(value=torch.zeros(2, 2)).save(tmp_path / "nowhere" / "one")


def test_a_file_that_is_not_there_is_refused_as_such(tmp_path: Path) -> None:
    for path in (tmp_path / "none", tmp_path):
        with pytest.raises(FileNotFoundError, match="there is no result file at"):
            Result.load(path)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "saved.safetensors"
    part("ab", [0, 0, 2], 4).save(path)
    return path


@pytest.mark.parametrize("content", [b"", b"{}", b"\x80\x04garbage" * 50, b"\xff" * 100, struct.pack("<Q", 2**62)])
def test_garbage_is_refused_as_no_result(content: bytes, saved: Path) -> None:
    saved.write_bytes(content)
    with pytest.raises(ValueError, match=r"saved.safetensors is not a lens_probes result, or was cut short .*save it"):
        Result.load(saved)


def test_a_file_cut_short_anywhere_is_refused(saved: Path) -> None:
    whole = saved.read_bytes()
    for length in (1, 7, 8, 9, 100, len(whole) // 2, len(whole) - 1):
        saved.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="is not a lens_probes result, or was cut short"):
            Result.load(saved)


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}, {"format": "lens_probes result", "plain": "{}"}])
def test_a_safetensors_file_of_others_is_refused(metadata: Any, saved: Path) -> None:
    save_file({"weight": torch.zeros(3)}, saved, metadata=metadata)
    says = (metadata or {}).get("format")
    with pytest.raises(ValueError, match=f"is not a lens_probes result: its format is {says!r}"):
        Result.load(saved)


def test_a_file_of_another_class_is_refused_with_both_names(saved: Path) -> None:
    with pytest.raises(ValueError, match=r"holds a ToyResult and PlainResult.load reads .*PlainResult.*: use that"):
        PlainResult.load(saved)


def rewritten(saved: Path, **changes: Any) -> None:
    """The saved file with other metadata, or with other plain values."""
    with safe_open(saved, "pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    metadata["plain"] = json.dumps(json.loads(metadata["plain"]) | changes.pop("plain", {}))
    save_file(tensors, saved, metadata=metadata | changes)


def test_a_file_of_an_unknown_class_is_refused_and_nothing_is_imported(saved: Path, tmp_path: Path) -> None:
    (tmp_path / "evil.py").write_text("raise SystemExit('imported')\nclass EvilResult: ...")
    sys.path.insert(0, str(tmp_path))
    try:
        for name in ("EvilResult", "evil.EvilResult", "__import__('os').system('true')", "Path", "Result"):
            rewritten(saved, result=name)
            with pytest.raises(ValueError, match=r"holds a .* use that class, or import the package that defines it"):
                Result.load(saved)
    finally:
        sys.path.remove(str(tmp_path))
    assert "evil" not in sys.modules


@pytest.mark.usefixtures("as_users_run_it")
@pytest.mark.parametrize(
    "plain",
    [
        {"provenance": {"stranger": 1}},
        {"provenance": [1]},
        {"provenance": None},
        {"layer": 5},
        {"layer": ["0_pre"]},
        {"rank": 5},
        {"token.text": None},
        {"token.text": ["one"]},
        {"extra": "text"},
    ],
    ids=repr,
)
def test_a_file_whose_parts_do_not_fit_is_refused(plain: dict[str, Any], saved: Path) -> None:
    if "rank" in plain:
        with safe_open(saved, "pt") as file:
            metadata, names = file.metadata(), [name for name in file.keys() if name != "rank"]  # noqa: SIM118
            tensors = {name: file.get_tensor(name) for name in names}
        save_file(tensors, saved, metadata=metadata)
    rewritten(saved, plain=plain)
    with pytest.raises(ValueError, match=r"saved.safetensors (lacks|does not fit) .*ToyResult"):
        Result.load(saved)


def test_a_file_that_lacks_a_part_is_refused_by_what_it_lacks(saved: Path) -> None:
    with safe_open(saved, "pt") as file:
        metadata, names = file.metadata(), [name for name in file.keys() if name != "rank"]  # noqa: SIM118
        tensors = {name: file.get_tensor(name) for name in names}
    save_file(tensors, saved, metadata=metadata)
    with pytest.raises(
        ValueError, match=r"saved\.safetensors lacks 'rank' of a ToyResult: it was written by another ver"
    ):
        Result.load(saved)


def test_loading_runs_nothing_and_unpickles_nothing(saved: Path) -> None:
    code = (
        "import sys, pickle, builtins\n"
        "from lens_probes import Result\n"
        "def refuse(*arguments, **options): raise SystemExit('executed')\n"
        "pickle.load = pickle.loads = pickle.Unpickler = builtins.eval = builtins.exec = refuse\n"
        "before = set(sys.modules)\n"
        "try:\n    Result.load(sys.argv[1])\n"
        "except ValueError as error:\n    print(error)\n"
        "print(sorted(set(sys.modules) - before))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(saved)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "holds a ToyResult" in done.stdout  # a class of this test, which that process does not know
    assert done.stdout.splitlines()[-1] == "[]"


# Showing


def test_a_result_prints_its_sizes_and_a_hash_of_its_content(toy: ToyResult) -> None:
    sizes = "layer 2, token 3, prompt 2, pair 3, topic 2, other_topic 2, k 2"
    assert repr(toy) == f"ToyResult({sizes}; content {toy.content_hash()})"
    big = PlainResult(value=torch.zeros(1200, 1))
    assert repr(big).startswith("PlainResult(row 1,200, column 1; content ")


def test_the_hash_is_that_of_the_stored_numbers_and_labels(toy: ToyResult) -> None:
    assert len(toy.content_hash()) == 8
    same = part("ab", [0, 0, 2], 4, extra=torch.arange(6.0).reshape(3, 2))
    assert same.content_hash() == toy.content_hash()
    assert replace(toy, rank=toy.rank + 1).content_hash() != toy.content_hash()
    assert replace(toy, extra=None).content_hash() != toy.content_hash()
    assert replace(toy, layer=("0_pre", "other")).content_hash() != toy.content_hash()
    values = torch.arange(6.0).reshape(2, 3)
    one, other = PlainResult(value=values), PlainResult(value=values.T.contiguous().T)  # laid out otherwise
    assert one.content_hash() == other.content_hash()


def test_the_html_is_short_and_escapes_what_the_user_wrote(toy: ToyResult) -> None:
    evil = replace(toy.provenance, probe="<script>alert('x')</script>", model="<b>&")
    shown = replace(toy, provenance=evil)._repr_html_()
    assert "<script>" not in shown
    assert "&lt;script&gt;alert(&#x27;x&#x27;)&lt;/script&gt;" in shown
    assert "&lt;b&gt;&amp; (raw weights, float32), 4 prompts, 3 tokens" in shown
    assert "<code>rank</code> [layer token] rank" in shown
    assert "extra_total" not in shown
    assert len(shown) < 1500


def test_results_are_compared_by_identity_and_cannot_be_changed(toy: ToyResult) -> None:
    assert toy != part("ab", [0, 0, 2], 4)
    with pytest.raises(AttributeError):
        toy.note = "other"  # pyright: ignore[reportAttributeAccessIssue]


def test_prompts_in_another_order_have_their_topics_and_the_sums_of_these_in_order_too():
    topics = {"animals": ["The cat sat.", "A dog ran away."], "food": ["The bread rose.", "A soup boiled over."]}
    model = tiny.bridge()
    asked = lp.TopicActivity(component="head").run(model, topics, progress=False)
    other = lp.TopicActivity(component="head").run(model, dict(reversed(topics.items())), progress=False)
    assert other.topic == ("food", "animals")
    ordered = with_prompts_in_order(other, [2, 3, 0, 1], ("animals", "food"))
    assert ordered.topic == asked.topic
    assert ordered.prompt.text == asked.prompt.text
    assert not torch.allclose(asked.abs_sum[:, 0], asked.abs_sum[:, 1])  # the topics differ, so order shows
    torch.testing.assert_close(ordered.abs_sum, asked.abs_sum)
    torch.testing.assert_close(ordered.mean, asked.mean)


def test_a_finding_of_few_prompts_says_what_its_p_is_about():
    few, more = (lp.RankShift().run(tiny.bridge(), lp.demo.sentences()[:n], progress=False) for n in (4, 6))
    assert "layers, for other words in these prompts. The null" in few.findings()[0]
    assert "for other words" not in more.findings()[0]
