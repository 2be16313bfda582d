"""Tables of tricky completions, one per scorer."""

import threading

import pytest

from spd_lens.tasks.scoring import (
    answer_letter,
    final_number,
    same_choice,
    same_number,
    same_short_answer,
    short_answer,
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("so 6 * 7 = 42\n#### 42", "42"),
        ("#### 12\nWait, no.\n#### 42", "42"),  # the last one counts
        ("#### 42\nThere were 7 days.", "42"),  # what follows the line does not
        ("####42", "42"),
        ("#### $1,234.50", "$1,234.50"),
        ("#### -7", "-7"),
        ("#### \u22127", "-7"),  # a typographic minus
        ("#### **18**", "18"),
        ("#### The final answer is 18.", "18"),
        ("#### Answer: 18 apples", "18"),
        ("#### \\(18\\)", "18"),
        ("#### 5 + 3 = 8", "8"),
        ("#### 8 = 5 + 3", "8"),
        ("#### 3/4 of a cup", "3/4"),
        ("#### 1 1/2 hours", "1 1/2"),
        ("#### 25%", "25%"),
        ("#### 25\\%", "25\\%"),
        ("#### 42.", "42"),
        ("#### 16\n#### 16\n#### 1", "16"),  # a repetition that ran out of tokens
        ("#### 16\n#### 1\n", "1"),  # a correction
        # headings that happen to contain a number
        ("#### Step 1: Add\n1 + 1 = 2\n#### Step 2: Multiply\n2 * 4 = 8\nThe answer is 8.", "8"),
        ("#### 1. Read the problem\nThere are 3.\n#### 2. Solve it\nIt is 9.", "9"),
        ("#### \nnothing there, but 5 before", "5"),
        # boxes
        ("Thus \\boxed{42}.", "42"),
        ("\\boxed{1} and then \\boxed{\\frac{3}{4}} of 8 days", "\\frac{3}{4}"),
        ("\\boxed{x = 12}", "12"),
        ("\\boxed{\\text{12 apples}}", "12"),
        ("\\boxed{2\\sqrt{9}}", "2\\sqrt{9}"),
        ("\\boxed{42", "42"),  # cut off
        # "answer is"
        ("The answer is 15 because 3 * 5.", "15"),
        ("**Answer:** 15 (of 20)", "15"),
        ("Answer: x = 15\nCheck: 15 - 3 = 12", "15"),
        ("The final answer is $15.00, from 3 bags.", "$15.00"),
        # the last number
        ("He has 3 + 4 = 7 left.", "7"),
        ("From 10-5 we get 5", "5"),
        ("so we have 18 - 15", "15"),  # an operator, not a sign
        ("so we have 18-15", "15"),
        ("so it is -15", "-15"),
        ("it rose by 1,200.50 dollars", "1,200.50"),
        ("a loss of -$30", "-$30"),
        ("a loss of $-30", "$-30"),
        ("2 million people", "2 million"),
        ("in 1,2,3 order", "3"),  # a list, not a thousands separator
        ("no number at all", None),
        ("", None),
    ],
)
def test_final_number(text, expected):
    assert final_number(text) == expected


@pytest.mark.parametrize(
    ("gold", "answer"),
    [
        ("1,080", "1080"),
        ("1080", "$1,080.00"),
        ("1080", "1 080".replace(" ", "\u202f")),
        ("42", "42.0"),
        ("42", "042"),
        ("42", "+42"),
        ("0.5", "1/2"),
        ("0.5", ".50"),
        ("0.5", "\\frac{1}{2}"),
        ("1.5", "1 1/2"),
        ("50", "50%"),
        ("0.5", "50%"),
        ("50%", "0.5"),
        ("-3", "\u22123"),
        ("-3", "-$3"),
        ("-3", "$-3.00"),
        ("1/3", "0.3333333"),
        ("2000000", "2 million"),
        ("18", "18 apples"),
        ("1000", "1e3"),
        ("6", "2\\sqrt{9}"),
        ("\\sqrt{12}", "2\\sqrt{3}"),
    ],
)
def test_same_number(gold, answer):
    if "sqrt" in gold + answer:
        pytest.importorskip("math_verify")
    assert same_number(gold, answer)


@pytest.mark.parametrize(
    ("gold", "answer"),
    [
        ("42", "43"),
        ("42", "-42"),
        ("42", "4.2"),
        ("42", "42,000"),
        ("1,080", "1"),
        ("1/3", "0.33"),
        ("50", "0.5"),
        ("0.5", "5%"),
        ("3", "3/4"),
        ("1", "1 1/2"),
        ("2", "2\\sqrt{9}"),
        ("2", "2^9"),
        ("42", "1/0"),
        ("42", "none"),
        ("42", ""),
        ("42", None),
        ("1", "9^{9^{9^{9}}}"),  # never handed to a computer algebra system
        ("100000001", "100000002.5e3"),
    ],
)
def test_different_number(gold, answer):
    assert not same_number(gold, answer)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Answer: B", "B"),
        ("answer: b", "B"),
        ("Answer: (b)", "B"),
        ("**Answer:** B", "B"),
        ("**Answer: B**", "B"),
        ("Answer:\n\nB", "B"),
        ("Answer: \\boxed{B}", "B"),
        ("Answer: $\\boxed{\\text{B}}$", "B"),
        ("The correct answer is B.", "B"),
        ("The answer is option C, because", "C"),
        ("The answer is: (A) Gravity", "A"),
        ("Answer: A\nWait.\nAnswer: D", "D"),
        ("Let me think. B is wrong.\nAnswer: C", "C"),
        ("Answer: A", "A"),
        ("B", "B"),
        ("B. Because of gravity", "B"),
        ("(C) foo", "C"),
        ("**D**", "D"),
        ("A", "A"),
        ("A. gravity", "A"),
        ("I would choose option B here", "B"),
        ("It must be (D), I think", "D"),
        # not clear, or not a letter
        ("A cat sat on the mat", None),
        ("A or B", None),
        ("Answer: A or B", None),
        ("Answer: a number of things", None),
        ("Answer: vitamin C", None),
        ("Answer: Because", None),
        ("Answer: E", None),
        ("It is C's fault", None),
        ("Answer:", None),
        ("", None),
    ],
)
def test_answer_letter(text, expected):
    assert answer_letter(text) == expected


@pytest.mark.parametrize(
    ("gold", "text", "right"),
    [
        ("C", "Answer: C", True),
        ("C", "Answer: vitamin C", True),  # the choice itself; its letter is C as well
        ("B", "Answer: vitamin C", False),
        ("A", "vitamin D", True),  # the whole text is choice A, although a letter D stands in it
        ("D", "vitamin D", False),
        ("A", "Answer: Vitamin D.", True),
        ("A", "Answer: B", False),
        ("A", "", False),
    ],
)
def test_same_choice(gold, text, right):
    assert same_choice(gold, ["vitamin D", "vitamin B", "vitamin C", "none"], text) is right


@pytest.mark.parametrize(
    ("gold", "text", "right"),
    [
        ("(B)", "Answer: (B)", True),
        ("(B)", "Answer: B", True),
        ("(B)", "Answer: (B) 12/25/1937", True),
        ("(B)", "The answer is (B).", True),
        ("(B)", "Answer: (A)", False),
        ("(R)", "Answer: (R)", True),  # some subtasks have 18 options
        ("(B)", "Answer: Because", False),
        ("Yes", "Answer: yes.", True),
        ("Yes", "Answer: Yes, because he caused it", True),
        ("Yes", "**Answer:** **Yes**", True),
        ("Yes", "Answer: Yes and no", False),
        ("Yes", "Yes", True),
        ("No", "Answer: Not really", False),
        ("True", "Answer: False", False),
        ("valid", "Answer: invalid", False),
        ("8", "Answer: 8 objects", True),
        ("8", "Answer: 8.0", True),
        ("8", "Answer: 80", False),
        ("8", "Answer: 5 + 3", False),
        ("-35", "Answer: -35", True),
        ("-35", "Answer: 35", False),
        ("barn damp dot", "Answer: barn, damp, dot", True),
        ("barn damp dot", "Answer: barn dot damp", False),
        ("barn damp dot", "Answer: barn", False),
        ("] ) }", "Answer: ])}", True),
        ("] ) }", "Answer: ] ) } )", False),
        (")", "Answer: )", True),
        (")", "Answer:", False),
        ("Yes", "", False),
    ],
)
def test_short_answers(gold, text, right):
    assert same_short_answer(gold, short_answer(text)) is right


@pytest.mark.parametrize("text", ["9^{9^{9^{9}}}", "9**9**9**9", "99999999!", "\\binom{99999999}{4999999}"])
def test_no_expression_keeps_scoring_busy(text):
    """In a thread, where `math-verify` has no time limit of its own."""
    worker = threading.Thread(target=same_number, args=("\\sqrt{4}", text), daemon=True)
    worker.start()
    worker.join(5)
    assert not worker.is_alive()


def test_scoring_survives_long_and_odd_text():
    """Model output can be anything; nothing here may raise or take long."""
    for text in (
        "#" * 20_000,
        "1," * 20_000,
        "\\boxed{" * 5_000,
        "1 " * 20_000,
        "9" * 5_000,
        "\x00\ud800",
        "-" * 20_000,
    ):
        final_number(text)
        same_number("1", text)
        answer_letter(text)
        same_choice("A", ["x", "y"], text)
        same_short_answer("(B)", short_answer(text))
