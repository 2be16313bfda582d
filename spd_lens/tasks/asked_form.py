"""Whether a completion answers in the form that its prompt asked for: stricter than extracting an answer from it."""

from __future__ import annotations

import ast
import re
import warnings

from spd_lens.tasks.base import Task
from spd_lens.tasks.bbh import BBH
from spd_lens.tasks.code import CodeTask, extract_code
from spd_lens.tasks.forms import ANSWER_MARK, ChosenLetter, FinalNumber

_NUMBER_LINE = re.compile(r"^[\s*]*####[ \t]*(?:.*=)?[^\w\n]{0,4}\d", re.MULTILINE)
_ANSWER_LINE = re.compile(rf"^[\s*]*{ANSWER_MARK.strip()}[\s*]*\S", re.MULTILINE | re.IGNORECASE)


def in_asked_form(task: Task, completion: str) -> bool:
    """Whether a completion gives an answer that the task can extract, in the form that its prompt asks for.

    | task | form |
    | --- | --- |
    | final number (GSM8K, SVAMP, synthetic-math) | a line of `####` and a number |
    | choice or short answer (MMLU, BBH, synthetic-qa) | a line `Answer: ...` from which the answer can be taken |
    | code (MBPP, synthetic-code) | Python that parses and defines something |
    | others, and tasks of one's own | `task.extract` finds an answer |

    `task.extract` alone is more lenient: it takes the last number, or the only letter, of any text.
    """
    if task.extract(completion) is None:
        return False
    if isinstance(task, FinalNumber):
        return _NUMBER_LINE.search(completion) is not None
    if isinstance(task, ChosenLetter | BBH):
        return _ANSWER_LINE.search(completion) is not None
    if isinstance(task, CodeTask):
        return _defines_something(extract_code(completion) or "")
    return True


def _defines_something(code: str) -> bool:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "\\d" in a model's code is not the user's concern
            tree = ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return any(isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) for node in tree.body)
