"""Multiple choice: the letter that a completion settles on, or the choice whose text it gives."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import islice
from typing import NamedTuple

from spd_lens.tasks.scoring.reading import answer_part, boxes, marks, retracted, tidy, without_choices
from spd_lens.tasks.scoring.words import same_text, short_answer, squashed

_SAYS = r"(?:think|believe|choose|chose|would|pick|select|guess|say|go|am|will|conclude)"
_LEADING = re.compile(
    r"(?:[\s*_`:({\[\"'<“‘«>=→,-]|\\[(\[]|\\(?:boxed|text|textbf|mathrm|mathbf|mathbb)\b\s?\{?|\$"
    rf"|\b(?:the|most|correct|right|best|final|likely|answer|option|choice|letter|is|it|it['’]s|i(?=\s{_SAYS}\b)|i['’]d"
    rf"|{_SAYS}|be|must|should|with|definitely|clearly|probably|therefore|so|that)\b)*+"
    r"(?P<letter>[A-Za-z])(?![^\W_]|[+#]|['’]\w|-\w|\s?=|\.\w)(?P<close>[)\]}>\"'”’*`]*)",
    re.IGNORECASE,
)
"""A letter, after markup and words that say no more than that it comes."""
_TOKEN = re.compile(
    r"(?<![\w'’+#&/\\^.-])(?P<open>[(\[<“\"'*`{]{0,3})(?P<letter>[A-Z])(?P<close>[)\]>”\"'*`}]{0,3})"
    r"(?![\w+#]|['’]\w|[-/&]\w|\s?=|\.\w)"
)
_JOINED = re.compile(
    r"\s*(?:,|/|&|\||,?\s?\b(?:or|and|nor)\b)\s*(?:maybe|perhaps|possibly|also)?\s*(?:option|choice)?\s*", re.IGNORECASE
)
_OTHER_LETTER = re.compile(
    r"\s*(?:,|/|&|\||,?\s?\(?\b(?:or|and)\b(?:\s(?:maybe|perhaps|possibly|also))?)\s*\(?[A-Z](?![\w'’])"
    r"(?!\s(?:is|was|can|cannot|can['’]t|would|does|has)\b)"
    r"|(?:\s+\(?[A-Z]\)?(?![\w'’.])){2}"
)
_VERB = re.compile(
    r"\s(?:is|was|has|would|will|must|should|seems|appears|because|since|as|and|or|but|cannot|can|does"
    r"|fits|matches|holds|works|follows)\b"
)
_REASON = re.compile(r"\s+(?:because|since|as|due|for)\b")
_INITIALS = re.compile(r"\.\s?[A-Z]\.")
_BE = r"(?:is|are|was|were|seems?|looks?|appears?|would|could|can|should|must|may|might|do|does|did|has|have|will)"
_NEGATED_AFTER = re.compile(
    rf"\s(?:also\s|clearly\s|therefore\s|thus\s|both\s|all\s)?(?:(?P<verb>{_BE})\s(?:\w{{1,12}}\s){{0,3}}?(?:not\b|incorrect|wrong"
    r"|false|invalid|irrelevant|unlikely|out\b|eliminated|excluded|ruled\sout|impossible|never|unrelated|untrue|inaccurate)"
    r"|(?:cannot|(?:is|are|was|do|does|ca|wo|would|could)n['’]t)\b)",
    re.IGNORECASE,
)
_NAME = r"(?:the\s)?(?:correct\s|right\s|best\s)?(?:options?|choices?|answers?|letters?|statements?)?"
_NEGATED_BEFORE = re.compile(
    r"(?:\bnot|n['’]t(?:\sbe)?|\bneither|\bnor|\bnever|\brather\sthan|\binstead\sof|\bunlike|\bexcept|\beliminat\w{1,4}"
    rf"|\bexclud\w{{1,4}}|\breject\w{{0,3}}|\brul\w{{1,3}}\sout|\bcannot\sbe|\bthan|\b(?:anything|everything|all)\sbut)\s{_NAME}[^\w\n]{{0,4}}$",
    re.IGNORECASE,
)
_AFFIRMED_AFTER = re.compile(
    r",?\s(?:(?:is|are|was|seems|appears|looks|(?:would|must|should|has\sto)\sbe)\s(?:\w{1,12},?\s){0,6}?"
    r"(?:correct|right|true|best|answer|accurate|appropriate|valid|likely|choice|option)\b"
    r"|(?:fits|matches|holds|works|follows|answers)\b)",
    re.IGNORECASE,
)
_AFFIRMED_BEFORE = re.compile(
    r"(?:\b(?:must|should|would|will|only|to)\sbe|\bis|\bit['’]?s|\bthat['’]?s|\b(?:choose|chose|pick|select|say|guess|conclude)"
    r"|\bopt\sfor|\bgo(?:ing)?\s(?:with|for)|\b(?:so|therefore|thus|hence)|[→⇒]|=>|\banswer)[\s,:]{0,3}(?:that\s)?"
    rf"{_NAME}[\s:]{{0,2}}(?:is\s)?$",
    re.IGNORECASE,
)
_LOWER = re.compile(r"\b((?:option|choice|answer)s?\s\(?)([b-hj-z]|[ai](?=[).,;!?\n]|$))(?![\w'’])", re.IGNORECASE)
_NAMED = re.compile(r"\b(?:option|choice)\s?[^\w\n]{0,3}$", re.IGNORECASE)
_BEFORE_A_LETTER = frozenset(
    """option options choice choices answer answers letter letters statement statements alternative response is be
    was it's its that's say choose chose chosen pick picked select selected guess conclude with for to so
    therefore thus hence then because since and or nor but not than of between either neither both while although
    though if as when only just likely probably definitely clearly correct right best think believe prefer prefers
    eliminate eliminates exclude excludes out reject over unlike except isn't wasn't aren't considered considering
    leaves like that means indicates maybe perhaps possibly also""".split()
)
"""What may stand before a letter that means a choice; "vitamin D" and "plan B" are something else."""
_TITLE = re.compile(r"\b(?:Mrs?|Ms|Dr|Prof|St)\.\s$")
_NO_CHOICE_BEFORE = re.compile(
    r"(?:\b(?:not|never|nor|neither|no|cannot|than|except|unlike|eliminate|exclude|reject|rule\sout|instead\sof|(?:any|every)thing\sbut"
    r"|all\sbut)|n['’]t)(?:\s\w+){0,3}\s$"
)
_ASKED = re.compile(r"[^.!?]{0,80}\?")
_TOKENS_READ, _TEXTS_READ = 400, 50


class _Said(NamedTuple):
    letter: str
    affirmed: bool
    named: bool
    negated: bool
    start: int
    end: int
    plural: bool


def answer_letter(text: str, letters: str = "ABCD") -> str | None:
    """The letter that a multiple-choice completion settles on; `None` if it is not clear.

    What follows the last "Answer:" or "answer is", or stands in a box; else a letter that the text begins with; else
    the last one that is said to be right ("It must be D", "B is correct"); else the last "option C"; else the only
    letter that stands alone and is not said to be wrong. A letter in another role (the article "A", the pronoun "I",
    "vitamin D") is none.
    """
    part = without_choices(answer_part(text))
    found, end = _settled(part, letters)
    if found is None or retracted(part, end):
        found = _sentences(part[end:] if found else part, letters) or found
    return found or None


def _settled(part: str, letters: str) -> tuple[str | None, int]:
    """The letter after the last mark that gives one, or at the beginning, and where its mark ends. It is "" where it is
    none of `letters`."""
    named = [(mark.end, mark.rest) for mark in marks(part)] + list(boxes(part))
    for end, rest in sorted(named, reverse=True):
        if (found := _leading(rest, letters, marked=True)) is not None:
            return found, end
    return _leading(part, letters, marked=False), len(part) - len(part.lstrip()) + 1


def _sentences(text: str, letters: str) -> str | None:
    """The letter that free sentences settle on."""
    said = _said(text, letters)
    for wanted in ([one for one in said if one.affirmed], [one for one in said if one.named]):
        if right := [one.letter for one in wanted if not one.negated]:
            return right[-1]
    standing = {one.letter for one in said} - {one.letter for one in said if one.negated}
    return standing.pop() if len(standing) == 1 else None


def _leading(text: str, letters: str, *, marked: bool) -> str | None:
    """The letter that a text begins with; "" where it is none of the letters; `None` where no letter is meant."""
    match = _LEADING.match(text)
    if match is None:
        return None
    letter, behind = match["letter"], text[match.end() :]
    word_follows = re.match(r"\s+\w", behind) is not None and not match["close"] and not _REASON.match(behind)
    alone = marked or ")" in match["close"] or not behind.strip(" \n.!*_")
    if letter.islower() and (word_follows or not alone):
        return None  # "a number", "i think"
    if letter == "I" and word_follows:
        return None
    if not marked:
        if _INITIALS.match(behind) or (word_follows and re.match(r"\s+[a-z]", behind)):
            return None  # "A cat"; "B is correct" is read as a sentence
        if text[: match.start("letter")].strip(" \t\n*_`\"'([<{$\\"):
            return None  # words come before it
    if _OTHER_LETTER.match(behind) or _NEGATED_AFTER.match(behind):
        return None
    return letter.upper() if letter.upper() in letters else ""


def _said(text: str, letters: str) -> list[_Said]:
    """The letters of a free text that mean choices, and what is said of them."""
    text = _LOWER.sub(lambda match: match[1] + match[2].upper(), text)
    found: list[_Said] = []
    for token in list(_TOKEN.finditer(text))[-_TOKENS_READ:]:
        letter, (before, after) = token["letter"], _around(token, text)
        if letter in letters and _means_a_choice(token, before, after):
            negation = _NEGATED_AFTER.match(after)
            negated = negation is not None or _NEGATED_BEFORE.search(before) is not None
            affirmed = not negated and bool(_AFFIRMED_AFTER.match(after) or _AFFIRMED_BEFORE.search(before))
            plural = negation is not None and negation["verb"] in ("are", "were", "do", None)
            named = _NAMED.search(before) is not None
            found.append(_Said(letter, affirmed, named, negated, token.start(), token.end(), plural))
    return _joined(found, text)


def _around(match: re.Match[str], text: str, behind: int = 80) -> tuple[str, str]:
    """The 80 characters before a match, and those behind it."""
    return text[max(0, match.start() - 80) : match.start()], text[match.end() : match.end() + behind]


def _means_a_choice(token: re.Match[str], before: str, after: str) -> bool:
    if token["open"] and token["close"]:
        return True
    if _INITIALS.match(after):  # "D. H. Lawrence"
        return False
    if token["letter"] in "AI" and re.match(r"\s[a-z]", after) and not _VERB.match(after):
        return False  # "A cat", "I think"
    if token["letter"] == "I" and re.match(r"\s(?!is\b)[a-z]|['’]", after):
        return False
    if _TITLE.search(before):
        return False
    word = re.search(r"([\w'’]+)[ \t]+$", before)
    return not word or bool(re.fullmatch("[A-Z]", word[1])) or word[1].lower().replace("’", "'") in _BEFORE_A_LETTER


def _joined(said: list[_Said], text: str) -> list[_Said]:
    """What is said of one of several joined letters holds for all ("neither A nor B", "A, B and D are wrong"), and
    "A or B" settles on neither."""
    for order in (1, -1):
        for index in range(len(said))[::order]:
            other = index + order
            if not 0 <= other < len(said):
                continue
            first, second = sorted((said[index], said[other]), key=lambda one: one.start)
            between = text[first.end : second.start]
            if len(between) > 20 or not _JOINED.fullmatch(between):
                continue
            if said[index].negated and (order == 1 or said[index].plural or between.strip() != ","):
                said[other] = said[other]._replace(negated=True, affirmed=False, plural=said[index].plural)
            if not first.negated and not second.negated:
                said[index] = said[index]._replace(affirmed=False, named=False)
                said[other] = said[other]._replace(affirmed=False, named=False)
    return said


def same_choice(gold: str, choices: Sequence[str], text: str) -> bool:
    """Whether a completion picks the right choice: by its letter, or by giving the choice's own text."""
    letters = "".join(chr(65 + index) for index in range(len(choices)))
    said = short_answer(text) or ""
    if len(said.strip()) > 1 or said.upper() not in letters:
        named = [letter for letter, choice in zip(letters, choices, strict=True) if same_text(choice, said)]
        if len(named) == 1:
            return named[0] == gold
    letter = answer_letter(text, letters)
    if letter is None and _settled(without_choices(answer_part(text)), letters)[0] is None:
        letter = _choice_in(text, choices, letters)
    return letter == gold


def _choice_in(text: str, choices: Sequence[str], letters: str) -> str | None:
    """The choice with whose text begins what is named as the answer; else the only one whose text stands there, or, if
    nothing is named, in the whole text, and is neither denied nor asked about."""
    part = without_choices(answer_part(text))
    named = [mark.rest for mark in marks(part)]
    where = " ".join(tidy(named[-1] if named else part).casefold().split())
    taken: list[tuple[int, int]] = []
    found, denied = set[str](), set[str]()
    for letter, choice in sorted(_without_articles(choices, letters).items(), key=lambda item: -len(item[1])):
        if not choice or (not named and len(choice) < 3):  # a small number stands in any calculation
            continue
        for match in islice(_whole(choice).finditer(where), _TEXTS_READ):
            if any(start <= match.start() and match.end() <= end for start, end in taken):
                continue
            taken.append(match.span())
            before, after = _around(match, where, behind=120)
            if _NO_CHOICE_BEFORE.search(before) or _NEGATED_AFTER.match(after) or _ASKED.match(after):
                denied.add(letter)
            elif named and before in ("", "the ", "a ", "an ") and not re.match(r",?\s(?:or|and)\b|\s?[/&]", after):
                return letter
            else:
                found.add(letter)
    found -= denied
    return found.pop() if len(found) == 1 else None


def _without_articles(choices: Sequence[str], letters: str) -> dict[str, str]:
    """The choices by letter, without the article and full stop that a sentence may give otherwise."""
    whole = [squashed(choice).rstrip(".") for choice in choices]
    plain = [re.sub(r"^(?:the|an?) (?=\w\w)", "", choice) for choice in whole]
    return dict(zip(letters, plain if len(set(plain)) == len(plain) else whole, strict=True))


def _whole(choice: str) -> re.Pattern[str]:
    """A choice that stands in a text, and not as a part of another word or number."""
    pieces = r"\s*".join(map(re.escape, re.findall(r"\w+|[^\w\s]", choice)))
    return re.compile(rf"(?<![\w+/-])(?<!\d[.,]){pieces}(?![\w%/]|-\w|[.,]\d)")
