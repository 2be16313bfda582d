"""Examples and prompts as records."""

import dataclasses
import pathlib
import uuid

import datasets
import numpy as np
import pandas as pd
import pytest
import torch

from spd_lens.examples import Example, as_examples, worked_examples
from spd_lens.generation.corpus import Corpus, Record
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


@pytest.mark.parametrize(
    ("id", "kept"),
    [
        (7, "7"), (0, "0"), (-1, "-1"), ("7", "7"), (np.int64(7), "7"), (np.uint8(0), "0"), (np.array(3), "3"),
        (np.str_("a"), "a"), (None, ""), (torch.tensor(5), "5"), (10**20, "1" + 20 * "0"),
        (uuid.UUID(int=1), "00000000-0000-0000-0000-000000000001"),
    ],
)  # fmt: skip
def test_ids_are_texts_from_the_start(id, kept):
    example = Example("q", "x", id=id)
    assert example.id == kept and type(example.id) is str
    assert as_examples([example])[0].id == (kept or "0")
    assert Corpus([record := Record(example.id, "q", "x", (1,), (2,), "eos")])[0] == Record.from_json(record.to_json())


@pytest.mark.parametrize(
    "id", [7.0, float("nan"), np.float64(7), True, np.bool_(True), b"7", ("a", 1), ["a"], "\udc80"]
)
def test_ids_that_would_not_be_the_same_again(id):
    with refused("id", "half a character" if id == "\udc80" else "str("):
        Example("q", id=id)


@pytest.mark.parametrize(("first", "second"), [(7, "7"), (np.int64(1), 1), (0, 0)])
def test_one_id_in_two_spellings_is_one_id(first, second):
    with refused(repr(str(second)), "id"):
        as_examples([Example("a", id=first), Example("b", id=second)])


def test_a_number_as_id_beside_a_plain_text():
    with refused("'1'", "id of its own"):
        as_examples([Example("a", id=1), "b"])
    assert [example.id for example in as_examples([Example("a", id=0), "b"])] == ["0", "1"]


ROWS = [{"question": "What is 2 + 2?", "answer": "4"}]


@pytest.mark.parametrize(
    ("prompts", "words"),
    [
        (None, ["None"]),
        (3.5, ["3.5"]),
        ([3.5], ["[0]", "3.5"]),
        (["a", None], ["[1]", "None"]),
        (["a", float("nan")], ["[1]", "nan"]),
        (ROWS, ["[0]", "dict", "question"]),
        (ROWS[0], ["dict"]),
        ([b"bytes"], ["[0]", "bytes"]),
        (b"bytes", ["bytes"]),
        ({"a", "b"}, ["set"]),
        ([("a", "b")], ["[0]", "tuple"]),
        ([["a"]], ["[0]", "list"]),
        (datasets.Dataset.from_list(ROWS), ["[0]", "dict"]),
        (datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS)}), ["DatasetDict"]),
        (datasets.Dataset.from_list(ROWS).to_iterable_dataset(), ["[0]", "dict"]),
        (pd.DataFrame(ROWS), ["DataFrame"]),
        (pd.Series([1, 2]), ["[0]", "1"]),
        (list(pd.DataFrame(ROWS).itertuples()), ["[0]", "Pandas"]),
        (pathlib.Path("prompts.jsonl"), ["prompts.jsonl"]),
        (np.array([["a", "b"]]), ["[0]", "ndarray"]),
    ],
    ids=lambda value: "" if isinstance(value, list) else type(value).__name__,
)
def test_what_is_neither_a_text_nor_an_example(prompts, words):
    with refused(*words, 'Example(row["question"], row["answer"]) for row in'):
        as_examples(prompts)
    with refused(*words):
        worked_examples(prompts)


@pytest.mark.parametrize(
    "prompts",
    [
        ("a", "b"), iter(["a", "b"]), np.array(["a", "b"]), pd.Series(["a", "b"]), [np.str_("a"), "b"],
        datasets.Dataset.from_dict({"q": ["a", "b"]})["q"],
    ],
    ids=lambda value: type(value).__name__,
)  # fmt: skip
def test_every_ordered_collection_of_texts_will_do(prompts):
    found = as_examples(prompts)
    assert found == [Example("a", id="0"), Example("b", id="1")]
    assert all(type(example.prompt) is str for example in found)


def test_a_chat_is_not_a_list_of_prompts():
    with refused("[0]", "message of a chat", "system message"):
        as_examples([{"role": "user", "content": "Hi"}])
    with refused("list"):
        as_examples([[{"role": "user", "content": "Hi"}]])


def test_one_text_or_example_alone():
    assert as_examples("ab") == [Example("ab", id="0")]
    assert as_examples(Example("q", id="one")) == worked_examples(Example("q", id="one")) == [Example("q", id="one")]
    with refused("items[0]", "'q'", "Example(prompt, completion"):
        worked_examples("q", "items")


@pytest.mark.parametrize("fields", [{"prompt": None}, {"prompt": ROWS[0]}, {"prompt": "q", "completion": None},
                                    {"prompt": b"q"}, {"prompt": "q", "completion": 4}])  # fmt: skip
def test_prompt_and_completion_are_texts(fields):
    with refused("not a text", "'mine'"):
        Example(**fields, id="mine")


@pytest.mark.parametrize(
    "spans",
    [[(2, 4)], ((2, 4),), [[2, 4]], np.array([[2, 4]]), [np.array([2, 4])], [(np.int32(2), np.uint8(4))],
     torch.tensor([[2, 4]])],
)  # fmt: skip
def test_spans_of_every_kind_of_number(spans):
    for found in (Example("q", "x=42", spans).spans, Example("x=42", "q", prompt_spans=spans).prompt_spans):
        assert found == ((2, 4),) and all(type(end) is int for end in found[0])


@pytest.mark.parametrize(
    ("spans", "words"),
    [
        ((2, 4), ["(2, 4)", "spans=[(2, 4)]"]),
        ([2, 4], ["(2, 4)", "spans=[(2, 4)]"]),
        (np.array([2, 4]), ["(2, 4)", "spans=[(2, 4)]"]),
        ([(2, 4, 5)], ["(2, 4, 5)", "pair"]),
        ([(2,)], ["(2,)", "pair"]),
        ([(2.0, 4.0)], ["(2.0, 4.0)", "whole numbers"]),
        ([(1.5, 4)], ["1.5", "whole numbers"]),
        ([("2", "4")], ["'2'", "whole numbers"]),
        ([(True, 4)], ["True", "whole numbers"]),
        ([2, 4, 5], ["2", "pair"]),
        ([None], ["None", "pair"]),
        (["42"], ["'42'", "pair"]),
        ("42", ["'42'", "pairs"]),
        (None, ["None", "pairs"]),
        (7, ["7", "pairs"]),
        ({"start": 2, "end": 4}, ["dict", "pairs"]),
        ([{"start": 2, "end": 4}], ["dict", "pair"]),
        ([(4, 2)], ["(4, 2)", "4 characters"]),
        ([(-2, 4)], ["(-2, 4)", "4 characters"]),
        ([(2, 2)], ["(2, 2)", "4 characters"]),
        ([(2, 5)], ["(2, 5)", "4 characters"]),
    ],
    ids=str,
)
def test_what_is_no_span(spans, words):
    with refused("'mine'", *words):
        Example("q", "x=42", spans, "mine")
    with refused("'mine'", *[word.replace("spans=", "prompt_spans=") for word in words]):
        Example("x=42", "q", id="mine", prompt_spans=spans)
    with refused("'mine'", *[word for word in words if "spans=" not in word and word != "pairs"]):
        Example("q", "x=42", id="mine", marks={"results": spans})


def test_marks_are_spans_by_kind():
    example = Example("q", "x=42", marks={"results": np.array([[2, 4]]), "copies": []})
    assert example.marks == {"results": ((2, 4),)}  # a kind without spans is not there
    with refused("marks", "mapping"):
        Example("q", "x=42", marks=[(2, 4)])
