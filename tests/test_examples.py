"""Examples and prompts as records."""

import dataclasses

import pytest

from spd_lens.examples import Example, as_examples
from tests.helpers import refused


def test_an_example_is_frozen_and_its_spans_are_tuples():
    example = Example("q", "x=42", [[2, 4]], "one", {"answer": 42})
    assert example.spans == ((2, 4),)
    assert example == Example("q", "x=42", [(2, 4)], "one", {"answer": 0}), "what a scorer needs is no identity"
    assert len({example, Example("q", "x=42", [(2, 4)], "one")}) == 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        example.prompt = "other"


def test_plain_strings_get_their_position_as_id():
    records = as_examples(
        ["a", Example("b", "x", [(0, 1)], "mine", {"k": 1}), Example("c", "y", [(0, 1)], meta={"k": 2})]
    )
    assert [record.id for record in records] == ["0", "mine", "2"]
    assert [record.prompt for record in records] == ["a", "b", "c"]
    assert records[2].spans == ((0, 1),)
    assert records[2].completion == "y"
    assert records[2].meta == {"k": 2}


def test_ids_are_unique():
    with refused("'1'", "id"):
        as_examples([Example("a", id="1"), "b"])


@pytest.mark.parametrize("span", [(0, 0), (2, 1), (-1, 1), (0, 3), (2, 3)])
def test_spans_lie_in_the_completion(span):
    with refused(str(span), "'one'", "2 characters"):
        Example("q", "42", [span], "one")
    with refused(str(span), "'a question"):
        Example("a question of some length", "42", [span])
