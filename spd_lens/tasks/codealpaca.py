"""CodeAlpaca: code instructions with model-written outputs (Chaudhary 2023; the paper's second code benchmark)."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import ClassVar, Literal

from spd_lens.errors import SPDError
from spd_lens.examples import Example
from spd_lens.tasks.base import Pools, split_off
from spd_lens.tasks.paper import PaperTask, bare_example
from spd_lens.tasks.scoring import reference
from spd_lens.tasks.sources import Row
from spd_lens.tasks.thoughts import without_thoughts

FILES = ("code_alpaca_20k.json", "code_alpaca_2k.json", "new_codealpaca.json")
_LAST = 100
"""How many at the end of the file are for testing in file order."""
_FENCED = re.compile(r"```[\w+-]*[ \t]*\n(.*?)(?:\n[ \t]*```|\Z)", re.DOTALL)


@dataclass(kw_only=True)
class CodeAlpaca(PaperTask):
    """Instruction, perhaps with an input, and an output. No split at the source: a tenth, always the same, is held out;
    in file order the last 100.

    The paper uses the 20k set and measures the likelihood of the outputs. `sources()` names the file that was used.
    """

    name: ClassVar[str] = "codealpaca"
    local_form: ClassVar[str] = f"one of {', '.join(FILES)}"

    hub: str = "sahil2801/CodeAlpaca-20k"
    max_new_tokens: int = 256
    file: str | None = None
    """Which local file; `None`: the first one there is, in the order 20k, 2k, new."""
    span: Literal["output", "code"] = "output"
    """What decides correctness: the whole output, or, where it has fenced blocks, only what stands in them."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_option("span", ("output", "code"))
        if self.file is not None:
            self.check_option("file", FILES)

    def load(self) -> Pools:
        rows = self.source.file(self._file()) if self.path else self.source.dataset(None, "train")
        made = [self._example(row, f"codealpaca-{index}") for index, row in enumerate(rows)]
        examples = [example for example in made if example is not None]
        if self.order == "file":
            return Pools(train=examples[:-_LAST], test=examples[-_LAST:])
        return Pools(*split_off(examples, "codealpaca", n_test=max(1, round(0.1 * len(examples)))))

    def _file(self) -> str:
        assert self.source.path is not None
        there = [name for name in (self.file,) if name] or [n for n in FILES if (self.source.path / n).is_file()]
        if not there:
            raise SPDError(f"{self.source.path} has no data for codealpaca; it needs {self.local_form}")
        return there[0]

    def _example(self, row: Row, id: str) -> Example | None:
        instruction, given = row.text("instruction").strip(), row.text("input", empty=True).strip()
        output = row.text("output", empty=True).replace("\r\n", "\n").strip()
        if not output:
            return None  # two records of the 2k file have no output, and so nothing to learn or to measure
        if self.bare:
            return bare_example(id, f"Instruction: {row.text('instruction')}\nCode:", row.text("output"))
        prompt = f"{instruction}\n\nInput:\n{given}" if given else instruction
        spans = [(0, len(output))]
        if self.span == "code":
            spans = [match.span(1) for match in _FENCED.finditer(output) if match[1]] or spans
        return Example(prompt, output, tuple(spans), id)

    def extract(self, text: str) -> str | None:
        """The fenced block, if there is one, or the whole text, without thoughts."""
        if self.scoring == "reference":
            return text.strip() or None
        text = without_thoughts(text).replace("\r\n", "\n")
        match = _FENCED.search(text)
        return (match[1] if match else text).strip() or None

    def score(self, item: Example, text: str) -> float:
        """1.0 if the code equals the reference but for white space: strict, and near 0 for every model. The likelihood
        of the reference outputs is this benchmark's measure. With the reference code's scoring: 1.0 if the completion
        parses as Python."""
        if self.scoring == "reference":
            return float(reference.parses(text))
        said, gold = self.extract(text), self.extract(item.completion)
        return float(said is not None and gold is not None and said.split() == gold.split())
