"""Reading the answer out of a completion, and deciding whether it is right.

Everything here works on plain text and is a pure function; `tests/tasks/test_scoring.py` has a table of tricky cases
for each. `reading` says what part of a completion is its answer; `numbers`, `letters` and `words` read it;
`short_answers` compares BBH's; `values` and `spelled` say what a number is.
"""

from spd_lens.tasks.scoring.letters import answer_letter, same_choice
from spd_lens.tasks.scoring.numbers import final_number, hash_lines
from spd_lens.tasks.scoring.reading import answer_part, last_box, tidy
from spd_lens.tasks.scoring.short_answers import same_short_answer
from spd_lens.tasks.scoring.values import NUMBER, is_number, same_number, values
from spd_lens.tasks.scoring.words import same_text, short_answer

__all__ = [
    "NUMBER", "answer_letter", "answer_part", "final_number", "hash_lines", "is_number", "last_box", "same_choice",
    "same_number", "same_short_answer", "same_text", "short_answer", "tidy", "values",
]  # fmt: skip
