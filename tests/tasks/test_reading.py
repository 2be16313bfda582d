"""What of a completion is read: thoughts and further questions are not, whatever the form; and never slowly."""

from __future__ import annotations

import time

import pytest

from spd_lens import tasks
from spd_lens.tasks.scoring.letters import answer_letter, same_choice
from spd_lens.tasks.scoring.numbers import final_number
from spd_lens.tasks.scoring.short_answers import same_short_answer

FORMS = {
    "number": (lambda text: final_number(text), "3 * 6 = 18\n#### 18", "#### 3", "18", "3"),
    "letter": (lambda text: answer_letter(text), "Answer: B", "Answer: D", "B", "D"),
    "word": (lambda text: next((w for w in ("Yes", "No") if same_short_answer(w, text)), None),
             "Answer: Yes", "Answer: No", "Yes", "No"),
}  # fmt: skip
"""A reader, a completion, another question's completion, and what the two give."""

NEXT_QUESTION = [
    "\n\nQuestion: What is next?\n",
    "\nQ: What is next?\nA: ",
    "\n\n**Question 2:** What is next?\n",
    "\n\n[Question 2] What is next?\n",
    "\nQ. What is next?\n",
    "\n\nWhat is the capital?\n",
    "\n\nTom has five apples and eats two. Find the number of apples that are left.\n",
    "\n\n### Question\nWhat is next?\n",
    "\n\nProblem 7. Find it.\n",
    "\n\nExample 3\nFind it.\n",
    "\n\nNext problem: find it.\n",
    "\n\nHere's another question: what is it?\n",
    "\nUser: And now?\nAssistant: ",
    "\nHuman: And now?\n\n",
    "\n\n### Instruction:\nFind it.\n\n### Response:\n",
    "<|im_end|>\n<|im_start|>user\nAnd now?<|im_end|>\n<|im_start|>assistant\n",
    "<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nAnd now?\n",
    "</s>[INST] And now? [/INST] ",
    "\nuser\nAnd now?\nassistant\n",
    "\n\n2. How many of them are there in the end?\n",
    "\n\nTom has five apples. How many of them does he eat?\n",
    "\n\nThe capital is\nA. Rome\nB. Oslo\n\n",
    "\n\nTom has apples.\n\nEnd with a line that says '#### ' followed by the final number.\n",
    "\n\nThe following is a multiple choice question about anatomy.\n\nWhich?\n\n"
    "Reply with one line that says 'Answer: ' followed by the letter of the right choice.\n",
]
CORRECTION = [
    "\nWait, that is wrong.\n",
    "\n\nWait, is this really what was asked for here?\n",
    "\n\nHmm, did I count all of them in the end?\nI did not.\n",
    "\nLet me check it step by step.\n",
    "\n\nIs it the right answer to what was asked?\nNo.\n",
]
THOUGHT = [
    "<think>{}</think>",
    "<thinking>\n{}\n</thinking>\n\n",
    "<reasoning>{}</reasoning>\n",
    "{}\n</think>\n\n",  # opened in the prompt
    "<think>a</think>{}</think>",
    "[THINK]{}[/THINK]",
    "◁think▷{}◁/think▷",
    "<|begin_of_thought|>{}<|end_of_thought|>",
    "<|channel|>analysis<|message|>{}<|end|><|start|>assistant<|channel|>final<|message|>",
    "<|START_THINKING|>{}<|END_THINKING|>",
]


@pytest.fixture(params=FORMS)
def form(request):
    return FORMS[request.param]


@pytest.mark.parametrize("question", NEXT_QUESTION)
def test_what_follows_as_a_new_question_is_not_read(form, question):
    read, one, other, first, second = form
    assert read(one + question + other) == first
    assert read(other + question + one) == second


@pytest.mark.parametrize("words", CORRECTION)
def test_a_correction_is_read(form, words):
    read, one, other, first, second = form
    assert read(other + words + one) == first and read(one + words + other) == second


@pytest.mark.parametrize("block", THOUGHT)
def test_a_thought_is_not_read(form, block):
    read, one, other, first, _ = form
    assert read(block.format(other) + one) == first


@pytest.mark.parametrize(
    "block",
    [
        "<think>{}",
        "<reasoning>Let me see.\n{}",
        "{}</think>",
        "<|channel|>analysis<|message|>{}",
        "◁think▷{}",
        "{} assistantfinal",
    ],
)
def test_a_thought_without_an_answer_gives_none(form, block):
    read, one, *_ = form
    assert read(block.format(one)) is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Question: Ann has 3.\nAnswer: 6\n\nQuestion: Ben has 4.\nAnswer: 8", "6"),  # the task restated first
        ("Let's restate it.\n\nProblem: 3 * 6.\n\n#### 18\n\nProblem: 3.\n#### 3", "18"),
        ("Let's split it:\nQ1: How many are left?\nAnswer: 9\nQ2: How much is it?\nAnswer: 18\n#### 18", "18"),
        ("It is 18.\n\nQuestion: How many?\n#### 3", "18"),
        ("#### Step 1: How many eggs are left over?\n16 - 7 = 9\n#### 9", "9"),
        ("End with a line that says '#### ' followed by the final number.\n#### 18", "18"),
        ("<answer>18</answer> since 9 * 2 = 18, x = 9", "18"),
        ("<|im_start|>assistant\n#### 18<|im_end|>", "18"),
        ("Question: 3 * 6?", "6"),
    ],
)
def test_questions_of_the_same_task(text, expected):
    assert final_number(text) == expected


def test_the_asked_form_is_looked_for_in_what_is_read():
    task = tasks.get("synthetic-math")
    assert not task.in_asked_form("<think>\n#### 7\n</think>\nIt is 7.")
    assert not task.in_asked_form("It is 7.\n\nQuestion: 1 + 1?\n#### 2")
    assert task.in_asked_form("<think>no</think>\n#### negative 7") and task.in_asked_form("#### ½")
    choice = tasks.get("synthetic-qa")
    assert not choice.in_asked_form("<think>\nAnswer: B</think>\nB is right")
    assert choice.in_asked_form("Answer: B</s>")


UNITS = (
    "# | #### |#### |1,|11,|111.|1 |9|-|*|*_`:({['\"|Answer: |Answer: *|answer is |Answer:\n|\\boxed{|"
    "\\boxed{1}|(|((a|[|<think>|</think>|<answer>|Question:\n|\nQ: 1?\n#### 3|\n|  |\\frac{|\\text{a}|$|^|2^{|"
    "1=|1 + |A |A or |B is wrong |not A |the |the answer |final |one |two and |\\,|1\\,|½|1~|user\n|"
    "a b c d e f?\n|A. x\nB. y\n|'|a|1 to |/|1/1/|1. a\n|#### 1. Read\n|it is |] )"
).split("|")


@pytest.mark.parametrize("unit", UNITS)
def test_reading_is_never_slow(unit):
    """Time grows with the length: a pattern whose time grows with its square would take minutes here."""
    text = "a " + unit * (40_000 // len(unit)) + "x"
    began = time.process_time()
    final_number(text)
    same_choice("A", ["x", "the a"], text)
    same_short_answer("barn dot", text)
    same_short_answer("] )", text)
    assert time.process_time() - began < 5
