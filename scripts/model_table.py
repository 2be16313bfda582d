"""Write the tables of docs/models.md from what tests/models/test_matrix.py found: `make model-table` runs both.

    python scripts/model_table.py HOOKED.xml BRIDGE.xml

The arguments are the JUnit reports of the two lanes. A cell is a tick only if every test of that cell passed.
"""

from __future__ import annotations

import sys
import xml.etree.ElementTree as ET
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from spd_lens.models import ARCHITECTURES, TOLERANCE
from spd_lens.runs import MOMENTS_TOLERANCE

DOCUMENT = Path(__file__).parents[1] / "docs" / "models.md"
BACKENDS = (("hooked", "hooked"), ("hooked", "bridge"), ("bridge", "bridge"))
"""Lane and backend: HookedTransformer of 3.9, the bridge of 3.9, the bridge of 4.x."""
COLUMNS = ("capture", "hooks", "fold", "LoRA + sync")
HALVES = ("bfloat16", "float16")
_SIZES = {
    ("capture", "moments"): "lens and twin: moments, relative",
    ("hooks", "kl"): "hooks on lens and twin: KL",
    ("hooks", "logits"): "hooks on lens and twin: logits",
    ("fold", "kl"): "hooks and folded weights: KL",
    ("fold", "logits"): "hooks and folded weights: logits",
    ("LoRA + sync", "kl"): "adapter merged and unmerged: KL",
    ("LoRA + sync", "logits"): "adapter merged and unmerged: logits",
}

Place = tuple[str, str, str, str]
"""Lane, architecture, backend, dtype."""


@dataclass
class Results:
    """What the tests of both lanes told."""

    passed: dict[tuple[Place, str], list[bool]] = field(default_factory=lambda: defaultdict(list))
    refused: dict[Place, list[bool]] = field(default_factory=lambda: defaultdict(list))
    measured: dict[tuple[str, str, str], list[float]] = field(default_factory=lambda: defaultdict(list))
    """Measured values by dtype, column and name."""

    def read(self, lane: str, report: Path) -> None:
        for case in ET.parse(report).iter("testcase"):
            properties = {p.attrib["name"]: p.attrib["value"] for p in case.iter("property")}
            ok = not any(case.find(word) is not None for word in ("failure", "error", "skipped"))
            if "refused" in properties:
                name, backend, dtype = properties.pop("refused").split("|")
                self.refused[lane, name, backend, dtype].append(ok)
            elif "cell" in properties:
                name, backend, dtype, column = properties.pop("cell").split("|")
                self.passed[(lane, name, backend, dtype), column].append(ok)
                for what, value in properties.items():
                    self.measured[dtype, column, what].append(float(value))

    def architectures(self) -> list[str]:
        """Their names, in the order of the tests."""
        return list(dict.fromkeys(place[1] for place in [*(place for place, _ in self.passed), *self.refused]))

    def marks(self, name: str, dtype: str, columns: Iterable[str]) -> str:
        """One mark per backend."""
        return " ".join(self._mark((lane, name, backend, dtype), columns) for lane, backend in BACKENDS)

    def _mark(self, place: Place, columns: Iterable[str]) -> str:
        if place in self.refused:
            return "–" if all(self.refused[place]) else "✗"
        verdicts = [self.passed.get((place, column), []) for column in columns]
        if not all(verdicts):
            return "?"  # no test said anything
        return "✓" if all(map(all, verdicts)) else "✗"


def matrix(results: Results) -> str:
    """Architecture × column, three marks in each cell."""
    lines = ["| architecture | " + " | ".join((*COLUMNS, "bf16", "fp16")) + " |", "| --- |" + " :-: |" * 6]
    for name in results.architectures():
        cells = [results.marks(name, "float32", [column]) for column in COLUMNS]
        cells += [results.marks(name, dtype, (*COLUMNS, "check")) for dtype in HALVES]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    for name, layout in ARCHITECTURES.items():
        if layout.refused:
            lines.append(f"| {name} | refused: {layout.refused} |" + " |" * 5)
    return "\n".join(lines)


def tolerances(results: Results) -> str:
    """The largest value seen in any cell beside what is allowed, by dtype."""
    dtypes = ("float32", *HALVES)
    allowed = {str(dtype).removeprefix("torch."): pair for dtype, pair in TOLERANCE.items()}
    moments = {str(dtype).removeprefix("torch."): value for dtype, value in MOMENTS_TOLERANCE.items()}
    lines = ["| largest difference seen (allowed) | " + " | ".join(dtypes) + " |", "| --- |" + " --: |" * 3]
    for (column, what), label in _SIZES.items():
        cells = []
        for dtype in dtypes:
            limit = moments[dtype] if what == "moments" else allowed[dtype][what == "kl"]
            cells.append(f"{max(results.measured[dtype, column, what], default=float('nan')):.1g} ({limit:g})")
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def written(document: str, tables: dict[str, str]) -> str:
    """The document with each table between its two markers."""
    for name, table in tables.items():
        begin, end = f"<!-- {name}: written by make model-table -->", f"<!-- end of {name} -->"
        head, rest = document.split(begin)
        document = f"{head}{begin}\n{table}\n{end}{rest.split(end)[1]}"
    return document


def main(hooked: str, bridge: str) -> None:
    """Write the tables from the two lanes' JUnit reports into the document."""
    results = Results()
    results.read("hooked", Path(hooked))
    results.read("bridge", Path(bridge))
    tables = {"matrix": matrix(results), "tolerances": tolerances(results)}
    DOCUMENT.write_text(written(DOCUMENT.read_text(), tables))


if __name__ == "__main__":
    main(*sys.argv[1:])
