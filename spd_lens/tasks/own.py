"""Anyone's own data: JSON lines with a prompt, its gold completion, and where in it correctness is decided."""

from __future__ import annotations

import re
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from spd_lens.errors import SPDError, shortened
from spd_lens.examples import Example, Span
from spd_lens.tasks.base import Pools, Split, Task, check_count, split_off
from spd_lens.tasks.marks import copies
from spd_lens.tasks.patterns import compiled, last_match
from spd_lens.tasks.scoring.numbers import final_number
from spd_lens.tasks.scoring.reading import answer_part
from spd_lens.tasks.scoring.values import is_number, same_number
from spd_lens.tasks.scoring.words import same_text, short_answer
from spd_lens.tasks.sources import Row, read_rows

_SPLITS: tuple[Split, ...] = ("calibration", "train", "test")
_KNOWN = ("id", "split", "prompt", "completion", "spans", "prompt_spans", "answer", "pattern", "results")
_PLACE = "{prompt}"
"""Where the prompt of a record stands in a template."""
_SECONDS_IN_ALL = 60.0
"""Time that a data set's slow searches (of a hundredth of a second or more) may take together."""
_FENCED = re.compile(r"```[^\n`]*\n(.*?)```", re.DOTALL)


@dataclass(kw_only=True)
class OwnData(Task):
    """A `.jsonl` file, or a directory with `train.jsonl` and perhaps `calibration.jsonl` and `test.jsonl`.

    Every record has a `prompt`; one with a `completion` also has `spans` (a list of `[start, end]` in characters of
    the completion), `answer` (a text that stands in the completion; its last occurrence counts) or `pattern` (a
    regular expression with a named group, which is the span; its last match counts), or `prompt_spans` (a list of
    `[start, end]` in characters of the prompt), alone or beside one of the three. `results` (a list of `[start, end]`
    in characters of the completion) says where something is computed. `id` and `split` are optional, too.

    Records without a completion are prompts: they serve for training, since the model answers those itself. Scored by
    normalised exact match of the answer, which is the text of the last span. Where a completion's line (or the whole of
    it) has the words around the gold answer, what stands between them is its answer.
    """

    name: ClassVar[str] = "jsonl"

    pattern: str | None = None
    """Pattern for records that have none of the three, and for reading the answer out of a completion."""
    test_share: float = 0.3
    """Part of the records with completions that is held out, always the same, where the data names no test set."""
    prompt_template: str | None = None
    """The text of every prompt, with `{prompt}` where the record's own stands. Prompt and completion are then taken as
    they are written. None: white space is taken off the end of the prompt and the beginning of the completion."""
    span: Literal["given", "results"] = "given"
    """What decides correctness: what the records say, or their `results`."""
    _digests: dict[str, str] = field(default_factory=dict, init=False, repr=False)
    _seconds_left: float = field(default=_SECONDS_IN_ALL, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.path is None:
            raise SPDError("own data needs a path: a .jsonl file, or a directory with train.jsonl")
        self.path = Path(self.path).expanduser()
        try:
            str(self.path).encode()
        except UnicodeEncodeError as error:  # ids begin with the name, and results are kept under it
            raise SPDError(f"{shortened(repr(str(self.path)))} is no name in Unicode; rename the data") from error
        share = self.test_share
        if isinstance(share, bool) or not isinstance(share, int | float) or not 0 <= share < 1:
            raise SPDError(f"test_share must be at least 0 and below 1, not {self.test_share!r}")
        if self.pattern is not None:
            if not isinstance(self.pattern, str):
                raise SPDError(f"the option pattern must be a regular expression, not {self.pattern!r}")
            compiled(self.pattern, "the option pattern")
        if self.prompt_template is not None:
            check_template(self.prompt_template)
        self.check_option("span", ("given", "results"))

    def options(self) -> dict[str, Any]:
        options = super().options()
        if self.span == "given":  # records that were written before this option lack it
            del options["span"]
        return options

    @property
    def label(self) -> str:
        """The name of the file or directory, with which ids begin."""
        assert isinstance(self.path, Path)
        return self.path.stem

    def load(self) -> Pools:
        sides: dict[str, list[Example]] = {split: [] for split in (*_SPLITS, "open")}
        for file, split in self._files():
            rows, self._digests[file.name] = read_rows(file)
            for number, row in enumerate(rows, 1):
                example = self._example(row, f"{self.label}-{split}-{number}" if split else f"{self.label}-{number}")
                sides[self._split(row, split, example)].append(example)
        ids = Counter(example.id for side in sides.values() for example in side)
        if repeated := [id for id, times in ids.items() if times > 1]:
            raise SPDError(f"two records have the id {shortened(repr(repeated[0]))}; every id must be there once")
        if sides["open"]:  # no split named: divide what can be tested on, unless there is a test set
            n_test = 0 if sides["test"] else round(self.test_share * len(sides["open"]))
            train, test = split_off(sides["open"], "own data", n_test)
            sides["train"] += train
            sides["test"] += test
        return Pools(sides["train"], sides["test"], sides["calibration"] or None)

    def draw(self, split: Split, n: int | None, seed: int) -> list[Example]:
        pool = self.pool(split)
        if split == "train":
            return super().draw(split, n, seed)
        worked = [example for example in pool if example.completion]
        n = check_count(self.label, split, len(worked) if n is None else n, None)  # a number, before it is compared
        if n > len(worked) and len(worked) < len(pool):
            raise SPDError(
                f"{n} {split} examples of {self.label} were asked for, and {len(worked)} of its {len(pool)} records "
                "have a completion; add completions, or ask for fewer"
            )
        check_count(self.label, split, n, len(worked))
        drawn = super().draw(split, len(pool), seed)
        return [example for example in drawn if example.completion][:n]

    def check_scorable(self) -> None:
        for item in self.pool("test"):
            self._gold(item)

    def sources(self) -> dict[str, str]:
        self.pool("train")
        return dict(self._digests)

    def extract(self, text: str) -> str | None:
        """The last match of the task's pattern; without one, what follows `####`, "Answer:", or stands in a box or a
        last fenced block, else the last line that is not empty."""
        if self.pattern is not None:
            found = self._last_match(self.pattern, text, "the option pattern")
            return None if found is None else text[slice(*found)]
        part = answer_part(text).strip()
        if "####" in part:
            return part.rpartition("####")[2].strip().partition("\n")[0].strip() or None
        blocks = _FENCED.findall(part) if part.endswith("```") else []
        return (blocks[-1].strip() or None) if blocks else short_answer(part, unmarked="last")

    def score(self, item: Example, text: str) -> float:
        start, end = self._gold(item)
        gold = item.completion[start:end].strip()
        if pattern := item.meta.get("pattern") or self.pattern:
            found = self._last_match(pattern, text, item.id)
            said = text[slice(*found)] if found else None
        elif same_text(gold, text):
            return 1.0
        else:
            said = between(item.completion[:start], item.completion[end:], text) or self.extract(text)
        if said is None:
            return 0.0
        if is_number(gold):
            return float(same_number(gold, said if pattern else final_number(said)))
        return float(same_text(gold, said))

    @staticmethod
    def _gold(item: Example) -> Span:
        """Where in an item's completion its answer stands."""
        if item.spans:
            return item.meta.get("answer") or item.spans[-1]
        if item.completion:
            raise SPDError(
                f"{item.id} has spans in its prompt only, so that completions cannot be scored; give it spans, answer "
                "or pattern as well"
            )
        raise SPDError(f"{item.id} is a prompt without an answer, so that completions cannot be scored")

    def _last_match(self, pattern: str, text: str, where: str) -> Span | None:
        """`last_match`, with the time that all of the data's patterns have left."""
        if self._seconds_left <= 0:
            raise SPDError(
                f"{where}: slow searches for the regular expressions of {self.label} have taken {_SECONDS_IN_ALL:g} "
                "seconds by now; make them simpler"
            )
        began = time.process_time()
        try:
            return last_match(pattern, text, where)
        finally:
            spent = time.process_time() - began
            self._seconds_left -= spent if spent > 0.01 else 0.0

    def _files(self) -> list[tuple[Path, Split | None]]:
        assert isinstance(self.path, Path)
        if self.path.is_file():
            return [(self.path, None)]
        if not (self.path / "train.jsonl").is_file():
            raise SPDError(f"{self.path} is neither a .jsonl file nor a directory with train.jsonl")
        return [(file, split) for split in _SPLITS if (file := self.path / f"{split}.jsonl").is_file()]

    def _split(self, row: Row, of_file: Split | None, example: Example) -> str:
        split = row.data.get("split", of_file)
        if split not in (*_SPLITS, None):
            raise SPDError(
                f"{row.where}: the split must be one of {', '.join(_SPLITS)}, and is {shortened(repr(split))}"
            )
        if not example.completion and split in ("calibration", "test"):
            raise SPDError(f"{row.where}: a record for {split} needs a completion")
        return split or ("open" if example.completion else "train")

    def _example(self, row: Row, id: str) -> Example:
        for name in row.data:
            if name not in _KNOWN:
                raise SPDError(f"{row.where}: unknown field {shortened(repr(name))}; there are {', '.join(_KNOWN)}")
        id = row.text("id") if "id" in row.data else id
        prompt, prompt_spans = self._prompt(row)
        if "completion" not in row.data:
            return Example(prompt, id=id, prompt_spans=prompt_spans)
        completion = row.text("completion")
        spans = self._spans(row, completion)
        results = spans_of(row, "results", completion, "completion") if "results" in row.data else []
        # leading white space would be doubled where the completion is joined to the prompt
        cut = len(completion) - len(completion.lstrip()) if self.prompt_template is None else 0
        completion = completion[cut:]
        spans, results = ([(max(0, start - cut), end - cut) for start, end in given] for given in (spans, results))
        if any(end <= 0 for _, end in (*spans, *results)):
            raise SPDError(f"{row.where}: a span covers nothing but the white space before the completion")
        meta = {"pattern": row.data.get("pattern")}
        marks = {"results": tuple(results), "copies": copies(completion, spans)}
        if self.span == "results":
            if not (results and spans):
                lacks = "an answer" if results else "the field 'results'"
                raise SPDError(f"{row.where}: with span='results' a record with a completion needs {lacks}; add it")
            meta["answer"], spans, prompt_spans = spans[-1], results, ()
        return Example(prompt, completion, tuple(spans), id, meta, prompt_spans, marks)

    def _prompt(self, row: Row) -> tuple[str, tuple[Span, ...]]:
        """The prompt as the model is asked it, and the spans in it."""
        prompt = row.text("prompt")
        spans = spans_of(row, "prompt_spans", prompt, "prompt") if "prompt_spans" in row.data else []
        if self.prompt_template is not None:
            before, _, after = self.prompt_template.partition(_PLACE)
            n = len(before)
            return f"{before}{prompt}{after}", tuple((start + n, end + n) for start, end in spans)
        prompt = prompt.rstrip()
        if any(start >= len(prompt) for start, _ in spans):
            raise SPDError(f"{row.where}: a prompt span covers nothing but the white space behind the prompt")
        return prompt, tuple((start, min(end, len(prompt))) for start, end in spans)

    def _spans(self, row: Row, completion: str) -> list[Span]:
        given = [name for name in ("spans", "answer", "pattern") if name in row.data]
        if not (given or self.pattern) and "prompt_spans" in row.data:
            return []
        if len(given) > 1 or not (given or self.pattern):
            has = f"has {' and '.join(given)}" if given else "has none"
            raise SPDError(f"{row.where}: a record with a completion needs one of spans, answer and pattern, and {has}")
        if given == ["spans"]:
            return spans_of(row, "spans", completion, "completion")
        if given == ["answer"]:
            answer = row.text("answer")
            start = completion.rfind(answer)
            if start < 0:
                raise SPDError(f"{row.where}: the answer {answer[:60]!r} does not occur in the completion")
            return [(start, start + len(answer))]
        pattern = row.text("pattern") if given else self.pattern
        assert pattern is not None
        found = self._last_match(pattern, completion, row.where)
        if found is None:
            raise SPDError(f"{row.where}: the pattern {shortened(repr(pattern))} finds nothing in the completion")
        return [found]


def check_template(template: Any) -> None:
    """`SPDError` for a template that is no text, does not show the prompt once, or spells out its line breaks."""
    if not isinstance(template, str) or template.count(_PLACE) != 1:
        raise SPDError(
            f"prompt_template is {template!r}; write a text that holds {_PLACE} once, as in 'Question: {_PLACE}'"
        )
    if "\\n" in template:
        raise SPDError(
            f"prompt_template {template!r} holds a backslash and an n where a line break may be meant; in a shell "
            "write --task-option $'prompt_template=...\\n...', or put the option into a file for --config"
        )


def spans_of(row: Row, field: str, text: str, what: str) -> list[Span]:
    """A field with spans, checked against the text that they lie in; `what` is what a message calls that."""
    value: Any = row.data[field]
    if not isinstance(value, list) or not value:
        raise SPDError(f"{row.where}: the field {field!r} must be a list of [start, end] that is not empty")
    for span in value:
        numbers = isinstance(span, list) and len(span) == 2 and all(type(end) is int for end in span)
        if not numbers or not 0 <= span[0] < span[1] <= len(text):
            raise SPDError(
                f"{row.where}: the {field.replace('_', ' ').removesuffix('s')} {str(span)[:60]} does not lie in the "
                f"{what} of {len(text)} characters; give [start, end] with 0 <= start < end"
            )
    return [(start, end) for start, end in value]


def between(before: str, after: str, text: str) -> str | None:
    """What stands in `text` between the words that stand around a gold answer: in the whole of it, else in a line.

    `None` where they are not there, or where there are none. Punctuation at the end counts for nothing.
    """
    line = (before.rpartition("\n")[2], after.partition("\n")[0], text.split("\n")[::-1])
    for first, last, candidates in ((before, after, [text]), line):
        first, last = first.lstrip(), last.rstrip()
        for closing in ("", ".!*_"):
            last = last.rstrip(closing or None)
            for candidate in candidates if first or last else ():
                said = candidate.strip().rstrip(closing or None)
                if said.startswith(first) and said.endswith(last) and len(said) > len(first) + len(last):
                    return said[len(first) : len(said) - len(last)].strip()
    return None
