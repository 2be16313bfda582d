"""Whether a completion answers in the form that its prompt asked for: stricter than extracting an answer from it."""

from __future__ import annotations

import ast
import re
import warnings

from spd_lens.tasks.base import Task
from spd_lens.tasks.bbh import BBH
from spd_lens.tasks.code import CodeTask, extract_code
from spd_lens.tasks.forms import ANSWER_MARK, ChosenLetter, FinalNumber
from spd_lens.tasks.scoring import answer_part, hash_lines

_ANSWER_LINE = re.compile(rf"^[ \t*]*+{ANSWER_MARK.strip()}[\s*]*+\S", re.MULTILINE | re.IGNORECASE)


def in_asked_form(task: Task, completion: str) -> bool:
    """Whether a completion gives an answer that the task can extract, in the form that its prompt asks for.

    | task | form |
    | --- | --- |
    | final number (GSM8K, SVAMP, synthetic-math) | a line of `####` and a number |
    | choice or short answer (MMLU, BBH, synthetic-qa) | a line `Answer: ...` from which the answer can be taken |
    | code (MBPP, synthetic-code) | Python that parses and defines something |
    | others, and tasks of one's own | `task.extract` finds an answer |

    The form is looked for where the answer is read from (`scoring.answer_part`): in no thoughts and no second question.
    `task.extract` alone is more lenient: it takes the last number, or the only letter, of any text.
    """
    if task.extract(completion) is None:
        return False
    if isinstance(task, FinalNumber):
        return bool(hash_lines(answer_part(completion), line_start=True))
    if isinstance(task, ChosenLetter | BBH):
        return _ANSWER_LINE.search(answer_part(completion)) is not None
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
