"""Whether a short answer, a word, a list or brackets, is the gold one, as BBH's are."""

from __future__ import annotations

import re
from collections.abc import Iterator

from spd_lens.tasks.scoring.letters import answer_letter
from spd_lens.tasks.scoring.numbers import final_number, number_of_line
from spd_lens.tasks.scoring.reading import answer_part
from spd_lens.tasks.scoring.values import is_number, same_value
from spd_lens.tasks.scoring.words import same_text, short_answer, squashed

_SAYING = re.compile(
    r"(?:(?:so|thus|hence|therefore|then|yes|no)[\s,]{1,3})?(?:it|this|that|he|she|they|the\s[\w\s'’-]{1,80}?|which)\s"
    r"(?:is|are|was|evaluates\sto|equals|simplifies\sto|gives)\s(?:therefore\s|thus\s|also\s|\w{2,15}ly\s)*",
    re.IGNORECASE,
)
_ENDING = re.compile(r".*(?:\b(?:is|are|be|equals|to)\b|[=:→])\s*(?:therefore\s|\w{2,15}ly\s)?", re.IGNORECASE)
_HEAD_END = re.compile(r"[,.;:!?(\n]|\s[-\u2013\u2014]\s|\b(?:because|since|as)\b")
_WORD = re.compile(r"[^\W_]+(?:[&'’-][^\W_]+)*")


def same_short_answer(gold: str, text: str | None) -> bool:
    """Normalised exact match (BBH) of a completion, or of a short answer taken from one, with a gold answer.

    A gold letter `(B)` also matches `B` and `(B) 12/25/1937`; a gold number also one with a unit; a single gold word
    also one in a sentence, or one that an explanation follows; a list of words also one with commas, or line by line;
    brackets also with other spaces.
    """
    said = None if text is None else short_answer(text)
    if text is None or said is None:
        return False
    if letter := re.fullmatch(r"\(?([A-Z])\)", gold):
        return answer_letter(text, "ABCDEFGHIJKLMNOPQRSTUVWXYZ") == letter[1]
    if not re.search(r"\w", gold):
        return _symbols(gold) == _symbols(_ended(said) if re.search(r"\w\w", said) else said)
    if is_number(gold):
        number = number_of_line(said) or final_number(text)
        return number is not None and same_value(gold, number)
    if same_text(gold, said):
        return True
    if len(gold.split()) > 1:
        return any(_words(gold) == _words(candidate) for candidate in _lists(text, said))
    saying = _SAYING.match(said)
    sentences = [said, said[saying.end() :] if saying else "", _ended(said)]
    return any(same_text(gold, _HEAD_END.split(sentence)[0]) or same_text(gold, sentence) for sentence in sentences)


def _ended(sentence: str) -> str:
    """What a sentence ends on: `True` for `not ( True ) or True is True`."""
    match = _ENDING.match(sentence)
    return sentence[match.end() :] if match else sentence


def _symbols(text: str) -> str:
    return re.sub(r"[\s`*,\"']", "", re.split(r"\((?=[^\W\d_])|\b\w\w|\.\s|\.$", text)[0])


def _lists(text: str, said: str) -> Iterator[str]:
    """Where a list of words may stand: the line of the answer, what follows its colon, or the lines from it on."""
    part = answer_part(text)
    yield said
    yield re.sub(r"\((?=[^\W\d_])[^()]*\)", "", said.rpartition(":")[2])
    block = re.split(r"\n\s*\n", part[max(part.rfind(said), 0) :], maxsplit=1)[0]
    yield re.sub(r"^\s*(?:\d+[.)]|[-*•])\s+", "", block, flags=re.MULTILINE)
    yield re.sub(r"\b\d+[.)]\s", "", said)


def _words(text: str) -> list[str]:
    words = _WORD.findall(squashed(text))
    return words[:-2] + words[-1:] if len(words) > 2 and words[-2] == "and" else words
