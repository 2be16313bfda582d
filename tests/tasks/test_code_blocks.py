"""Which program a completion gives: where code begins and ends, which of several blocks is meant, what is joined."""

import pytest

import spd_lens.tasks as tasks
from spd_lens.tasks.code import extract_code, signature, without_asserts

GOOD = "def add(a, b):\n    return a + b"
WRONG = "def add(a, b):\n    return a - b"
LONG = "def add(a, b):\n    c = a + b\n    return c"
RECORD = {
    "source_file": "x",
    "task_id": 11,
    "prompt": "Write a function to add.",
    "code": GOOD,
    "test_imports": [],
    "test_list": ["assert add(1, 2) == 3", "assert add(-1, 4) == 3"],
}


def fenced(code, language="python", fence="```"):
    return f"{fence}{language}\n{code}\n{fence}\n"


@pytest.fixture
def passes(write):
    """Whether a completion passes the tests of a problem whose function is `add(a, b)`. All that is run stands here."""

    def run(code, tests, setup):
        names = {"__name__": "program"}
        try:
            exec("\n".join([code, setup, *tests]), names)
        except Exception:
            return False
        return True

    records = [RECORD, {**RECORD, "task_id": 2, "prompt": "Write a function for training."}]
    task = tasks.get("mbpp", path=write("sanitized-mbpp.json", records), executor=run, version="sanitized")
    item = task.test(1)[0]
    return lambda text: task.score(item, text) == 1.0


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("def f(x):\n    return x", "def f(x):\n    return x"),
        ("```python\ndef f(x):\n    return x\n```", "def f(x):\n    return x"),
        ("Here:\n```\nf(1)\n```\nand\n```python\ndef f(x):\n    return x\n```\nDone.", "def f(x):\n    return x"),
        ("Sure!\n```python\ndef f(x):\n    return", "def f(x):\n    return"),  # cut off inside the fence
        ("```bash\npip install x\n```\n```py\ndef f(): pass\n```", "def f(): pass"),
        (
            "Here is it:\n\nimport math\ndef f(x):\n    return x\n\nThis returns x.",
            "import math\ndef f(x):\n    return x",
        ),
        ("def f(x):\n    return x\n\nassert f(1) == 1", "def f(x):\n    return x\n\nassert f(1) == 1"),
        ("@cache\ndef f(x):\n    return x", "@cache\ndef f(x):\n    return x"),
        ("def f(x:\n", "def f(x:"),  # nothing in it parses: left to fail where it is run
        ("return x", "return x"),
        ("N = 3\n# limit\nM = N\n\ndef f(x):\n    return N", "N = 3\n# limit\nM = N\n\ndef f(x):\n    return N"),
        ("Set N to 3:\nN = 3\ndef f(x):\n    return N", "N = 3\ndef f(x):\n    return N"),
        ("", None),
        ("```python\n```", None),
    ],
)
def test_extract_code(text, code):
    assert extract_code(text) == code


def test_extract_code_survives_odd_text():
    for text in ("(" * 20_000, "def f" * 5_000, "```" * 5_000, "import x\n" * 3_000 + "(", "\x00", "def f(): '\ud800'"):
        extract_code(text)
        without_asserts(text)


@pytest.mark.parametrize(
    "words",
    ["[DONE]", "Explanation", "Explanation:\nThis adds.", "...", "[END]", "Done", "This is it", "> Note",
     "[DONE]\n\nWrite a function to add.\n[BEGIN]\ndef add(a, b):\n    return 0", "### Explanation\n\n* adds",
     "Time: O(n)\nSpace: O(1)", "Note - all",
     "Question: Subtract.\n\ndef sub(a, b):\n    return a - b", "<|im_end|>\n<|im_start|>user\nThanks", "</code>",
     "assert add(1, 2) ==", "assert", "def sub(a, b):\n    return a -", "def sub(a, b):", "```\nThis adds.", "'''",
     "```\nCall it:\n```python\nprint(add(1, 2))\n```", "def add(a, b):\n    c = a + b", "def add(a, b):\n    c = a +",
     "def add(a, b):\n    '''doc", "from math import *\n\nExplanation", "def add(a, b):"],
)  # fmt: skip
def test_what_follows_raw_code_is_no_part_of_it(passes, words):
    assert passes(f"{LONG}\n\n{words}") and passes(f"{LONG}\n{words}".replace("\n", "\r\n"))
    assert not passes(f"{LONG.replace('+', '-')}\n\n{words}")


@pytest.mark.parametrize("words", ["[DONE]", " [DONE]", "[/PYTHON]", "</code>", "</s>", "<|endoftext|>", "```"])
def test_marks_at_the_ends_of_lines(passes, words):
    assert passes(GOOD + words) and passes(f"[PYTHON]{GOOD}{words}\n[/PYTHON]\n[TESTS]\nassert add(1, 2) == 3")


@pytest.mark.parametrize(
    "words",
    ["Sure, here it is:", "from this we see that\nimport the thing\nclass of problems", "if you want it:", "[BEGIN]",
     "Solution", "1. ", "# Solution", "<answer>", "[PYTHON]", "It's easy (see below", "Write `def add(a, b)`:",
     "Set x = 5:\nx = 5", "First.\n\n    pip install numpy", "<think>\n\n</think>"],
)  # fmt: skip
def test_what_precedes_raw_code_is_no_part_of_it(passes, words):
    assert passes(f"{words}\n\n{GOOD}") and passes(f"{words}\n{GOOD}\n\nThis adds.")
    assert not passes(f"{words}\n\n{WRONG}")


@pytest.mark.parametrize(
    "text",
    [
        "1. Do:\n\n   ```python\n   def add(a, b):\n       return a + b\n   ```\n2. Done.",
        "- ```python\n  def add(a, b):\n      return a + b\n  ```",
        "* A\n    1. B:\n        ```py\n        def add(a, b):\n            return a + b\n        ```",
        "> ```python\n> def add(a, b):\n>     return a + b\n> ```",
        *(
            fenced(GOOD, language)
            for language in ("py", "python3", "Python", "{python}", "python title=a.py", "text", "")
        ),
        fenced(GOOD, fence="~~~"),
        fenced(GOOD, "", "~~~~"),
        fenced(GOOD, fence="````"),
        f"The code: ```python\n{GOOD}\n```",
        f"```python\n{GOOD}```\nDone.",
        f"Sure\n```python\n{GOOD}\n```\n".replace("\n", "\r\n"),
        f"```python\n{GOOD}",
        f"```python\n{GOOD}\n\nThis function adds.",
        f"```python\n{GOOD}\n[DONE]",
        f"~~~\n{GOOD}",
        f"```python\n{GOOD}\n\nassert add(1, 2) ==",
        f"```python\n{GOOD}\n```python\nprint(add(1, 2))\n```",
        fenced('def add(a, b):\n    """Adds.\n\n    ```\n    add(1, 2)\n    ```\n    """\n    return a + b'),
        fenced('def add(a, b):\n    """Adds.\n```python\nadd(1, 2)\n```\n"""\n    return a + b'),
        fenced(">>> def add(a, b):\n...     return a + b\n>>> add(1, 2)\n3"),
        "Like so:\n\n>>> def add(a, b):\n...     return a + b\n...\n>>> add(1, 2)\n3\n\nDone.",
        "Here:\n\n    def add(a, b):\n        return a + b\n\nThat is all.",
        fenced("pip install add", "bash") + fenced(GOOD) + fenced("python add.py", "sh") + fenced("3", ""),
        fenced(GOOD) + fenced("def add(a, b)\n  a * b\nend", "ruby"),
        fenced("some words here", "") + fenced(GOOD, ""),
        fenced(f"{GOOD}\n\nif __name__ == '__main__':\n    print(add(int(input()), 1))"),
        fenced("def add(a, b):\n    DONE = 4\n    return a + b + 0 * [DONE][0]"),
        fenced('def add(a, b):\n    assert """\n<pre>\n"""[1] == "<"\n    return a + b'),
    ],
)
def test_fences_and_sessions(passes, text):
    assert passes(text) and not passes(text.replace("a + b", "a - b"))


HELPED = "def add(a, b):\n    return helper(a) + helper(b)"
HELPER = "def helper(x):\n    return x"


@pytest.mark.parametrize(
    "text",
    [
        f"First:\n{fenced(WRONG)}But wait, better:\n{fenced(GOOD)}",
        f"{WRONG}\n\nThat is wrong. Instead:\n\n{GOOD}\n\nNow it is right.",
        f"{fenced(WRONG)}No:\n\n{GOOD}",
        f"{WRONG}\n```\nNo:\n{fenced(GOOD)}",  # the first fence was opened in the prompt
        f"<think>\n{fenced(WRONG)}</think>\n{fenced(GOOD)}",
        f"{fenced(WRONG)}</think>\n{fenced(GOOD)}",
        f"{fenced(GOOD)}<think>{fenced(WRONG)}</think>",
        f"{fenced(GOOD)}<think>{WRONG}",
        fenced(GOOD) + fenced("def main():\n    print(add(1, 2))\nmain()"),
        fenced(GOOD) + fenced("from solution import add\nprint(add(1, 2))"),
        fenced("from operator import add"),
        f"\ufeff{GOOD}",
        fenced(GOOD) + fenced("class Calculator:\n    def add(self, a, b):\n        return 0"),
        fenced(HELPER) + fenced(HELPED),
        f"{fenced(HELPED)}with\n{fenced(HELPER)}",
        fenced("def helper(x):\n    return 0") + fenced(HELPER) + fenced(HELPED) + fenced("helper(3)"),
        fenced("import math\nfrom functools import *")
        + fenced("def add(a, b):\n    return reduce(max, [math.fsum([a, b])])"),
        fenced("A = 1\nB = A - 1") + fenced("def helper(x):\n    return x + B") + fenced(HELPED),
        fenced("import math")
        + fenced("from __future__ import annotations\ndef add(a, b):\n    return math.ceil(a + b)"),
        f"import math\n\nand then\n\n{fenced('def add(a, b): return math.ceil(a + b)')}",
        fenced("n = int(input())\nassert n") + fenced(GOOD) + fenced("x = add(n, 2)"),
        fenced("add = lambda a, b: a + b"),
        fenced("try:\n    from nowhere import add\nexcept ImportError:\n    def add(a, b): return a + b"),
        fenced(LONG) * 2 + f"```python\n{LONG[:-9]}",
        fenced(LONG) * 2 + f"```python\n{LONG[:-1]}",
        fenced(LONG) + "```python\ndef add(a, b):\n    return max(a,",
        "    return a + b",
        "c = a + b\n    return c\n\nThis adds.",
        "return a + b",
        fenced("    return a + b"),
    ],
)
def test_the_block_that_is_meant(passes, text):
    assert passes(text)


@pytest.mark.parametrize(
    "text",
    [
        f"{fenced(GOOD)}Better:\n{fenced(WRONG)}",
        f"{GOOD}\n\nOr rather:\n\n{WRONG}",
        fenced(GOOD) + fenced("def add(a, b)\n    return a + b"),  # its final word is no Python
        fenced(f"{GOOD}\n{WRONG}"),
        fenced(f"{GOOD}\nprint(int('x'))"),  # what a fence holds runs as it stands
        fenced(f"{GOOD}\n\nExplanation"),
        f"<think>{fenced(GOOD)}",
        fenced("def other(a, b):\n    return a + b"),
        fenced("def other():\n    def add(a, b):\n        return a + b"),
        "I cannot.",
        "",
        "```",
        "return",
        "Sure! return the sum.",
    ],
)
def test_what_is_no_right_answer(passes, text):
    assert not passes(text)


def test_published_solutions_are_extracted_as_they_are(data):
    task = tasks.get("mbpp", path=data)
    for item in [*task.test(60), *task.train(60)]:
        gold = item.completion
        _, functions = signature(gold, item.meta["tests"])
        for text in (gold, f"Here:\n{fenced(gold)}Done.", f"{gold}\n[DONE]", f"Some text\n\n{gold}\n\nExplanation"):
            assert extract_code(text, functions) == gold.strip("\n").rstrip()
