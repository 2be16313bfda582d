"""Write the tables of docs/speed.md and docs/speed-tables.md from the JSON of `make bench` in benchmarks/results/.

    make speed-table

Each `<!-- NAME -->` ... `<!-- end of NAME -->` in a page becomes the table of `benchmarks/results/NAME.json`; where
there is no such file, the page stays as it is.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from benchmarks.table import Row

ROOT = Path(__file__).parents[1]
DOCUMENTS = (ROOT / "docs" / "speed.md", ROOT / "docs" / "speed-tables.md")
RESULTS = ROOT / "benchmarks" / "results"


def table(record: dict[str, object], rows: list[Row]) -> str:
    """The machine in one line, then a line for each comparison."""
    versions = record["versions"]
    assert isinstance(versions, dict)
    named = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    where = f"{record['gpu']}, " if record["gpu"] else ""
    lines = [
        f"Measured {record['date']} on {where}{record['machine']}, {record['cores']} cores; {named}.",
        "",
        "| | model | dtype | against | median [lowest, highest] | goal | bound | ours | theirs |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    stage = ""
    for row in rows:
        if row.stage != stage:
            stage = row.stage
            lines.append(f"| **{stage}** |" + " |" * 8)
        mark = {True: "✓", False: "short", None: ""}[row.met]
        goal = "" if row.target is None else f"{'≥' if row.at_least else '≤'} {row.target:g}"
        digits = ".2f" if abs(row.value) >= 0.1 else ".1e"
        value = f"{row.value:{digits}}{'' if row.unit in ('x', '') else ' ' + row.unit}"
        spread = "" if row.low == row.high else f" [{row.low:{digits}}, {row.high:{digits}}]"
        what = f"{row.what} ({row.note})" if row.note else row.what
        cells = (mark, row.model, row.dtype, what, value + spread, goal, row.bound, row.ours, row.peer)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def written(text: str, results: Path) -> str:
    """The page with all of its tables as the JSON files have them."""
    for name in re.findall(r"<!-- end of ([\w-]+) -->", text):
        if not (path := results / f"{name}.json").exists():
            continue
        record = json.loads(path.read_text(encoding="utf-8"))
        rows = [Row(**{key: value for key, value in row.items() if key != "met"}) for row in record["rows"]]
        begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
        head, rest = text.split(begin)
        text = f"{head}{begin}\n{table(record, rows)}\n{end}{rest.split(end)[1]}"
    return text


def main() -> None:
    """All tables of the pages."""
    for page in DOCUMENTS:
        page.write_text(written(page.read_text(encoding="utf-8"), RESULTS), encoding="utf-8")


if __name__ == "__main__":
    main()
