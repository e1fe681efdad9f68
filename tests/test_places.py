"""Positions: which tokens of each prompt a setting names, and what it may not name."""

from typing import Any

import pytest
from test_result import tokens_of

from lens_probes.model import ModelView
from lens_probes.settings import allows
from lens_probes.text.places import Positions, rows_at
from lens_probes.text.prompts import Tokens, tokenize

TEXTS = ["The old cat sat.", "A cat, fed at noon, slept all day."]


@pytest.fixture
def tokens(gpt2: Any) -> Tokens:
    return tokenize(TEXTS, ModelView(gpt2))


def test_positions_count_from_each_prompts_beginning_or_end() -> None:
    tokens = tokens_of([0, 0, 0, 1, 1])
    for positions, rows in (
        (None, [0, 1, 2, 3, 4]),
        (0, [0, 3]),
        (-1, [2, 4]),
        ([-1, 0, 0], [0, 2, 3, 4]),
        (slice(1, None), [1, 2, 4]),
        (slice(None, None, -2), [0, 2, 4]),
    ):
        assert rows_at(tokens, positions).tolist() == rows


def test_a_word_is_its_last_token_and_each_word_of_a_list_is_a_place_of_its_own(tokens: Tokens) -> None:
    cat, last = [tokens.row(prompt, "cat") for prompt in (0, 1)], [tokens.row(prompt, -1) for prompt in (0, 1)]
    verbs = [tokens.row(0, "sat"), tokens.row(1, "slept")]
    assert tokens.text[cat[0] - 1 : cat[0] + 1] == (" ca", "t")
    for positions, rows in (
        ("cat", cat),
        ("Cat", cat),
        (["cat", -1], [*cat, *last]),
        ([["sat", "slept"]], verbs),
        (["cat", ("sat", "slept"), "cat"], [*cat, *verbs]),
    ):
        assert rows_at(tokens, positions).tolist() == sorted(rows)


@pytest.mark.parametrize(
    ("positions", "message"),
    [
        (99, "a position must be within every prompt; got 99, and 'The old cat sat.' has"),
        ([0, -99], "a position must be within every prompt; got -99, and 'The old cat sat.' has"),
        ("noon", "every prompt must have the word 'noon' once; got it 0 times in 'The old cat sat.': name one word"),
        (slice(99, None), r"positions must name a token of every prompt; got slice\(99, None, None\), and 'The old"),
    ],
)
def test_a_place_that_a_prompt_lacks_is_refused_with_that_prompt(positions: Any, message: str, tokens: Tokens) -> None:
    with pytest.raises(ValueError, match=message):
        rows_at(tokens, positions)


@pytest.mark.usefixtures("as_users_run_it")
def test_a_long_prompt_is_shortened_in_a_refusal(gpt2: Any) -> None:
    tokens = tokenize("a cat, " * 15, ModelView(gpt2))
    with pytest.raises(ValueError, match="within every prompt") as refused:
        rows_at(tokens, 999)
    assert len(str(refused.value)) < 250


@pytest.mark.parametrize("positions", [slice(None, None, 0), slice("a"), [1.5], [], True, 1.5, [True], [slice(1)]])
def test_what_names_no_token_is_no_setting(positions: Any) -> None:
    assert not allows(Positions, positions)
