"""The asked form: gold completions have it, near misses do not."""

from __future__ import annotations

import pytest

from spd_lens import tasks

FORMS = {
    "synthetic-math": {
        "3 + 4 = 7\n#### 7": True,
        "#### $1,200.50": True,
        "**#### 7**": True,
        "#### 3 + 4 = 7": True,
        "#### -7 apples": True,
        "The answer is 7.": False,
        "#### Step 2\nWe add 3 and 4.": False,
        "so 3 + 4 = 7 #### 7": False,
        "####": False,
        "": False,
    },
    "synthetic-qa": {
        "Answer: B": True,
        "Let me think.\nanswer: (C) because": True,
        "**Answer: A**": True,
        "B": False,
        "The answer is B": False,
        "Answer:": False,
        "Answer: maybe": False,
    },
    "synthetic-code": {
        "def f(x):\n    return x": True,
        "Here it is:\n```python\nimport re\n\ndef f(x):\n    return x\n```\nDone.": True,
        "class A:\n    pass": True,
        "```python\ndef f(x):\n    return (x\n```": False,
        "print(3)": False,
        "I would sort the list first.": False,
    },
}


@pytest.mark.parametrize(("name", "text", "holds"), [(n, t, h) for n, own in FORMS.items() for t, h in own.items()])
def test_by_hand(name, text, holds):
    assert tasks.get(name).in_asked_form(text) is holds


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("difficulty", ["easy", "hard"])
def test_gold_completions_have_the_form(name, difficulty):
    task = tasks.get(name, difficulty=difficulty)
    assert all(task.in_asked_form(item.completion) for item in task.test(30, 0))


def test_a_task_of_ones_own_asks_for_what_it_can_extract(tmp_path):
    path = tmp_path / "own.jsonl"
    path.write_text('{"prompt": "p", "completion": "value=3", "spans": [[6, 7]], "split": "test"}\n')
    task = tasks.get(str(path), pattern=r"value=(?P<answer>\d)")
    assert task.in_asked_form("so value=4") and not task.in_asked_form("4")
