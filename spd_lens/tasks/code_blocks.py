"""The program in a completion: where code begins and ends, and which of several pieces is meant.

Nothing here runs code: a piece of text is code if Python can compile it.
"""

from __future__ import annotations

import ast
import doctest
import re
import textwrap
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile

from spd_lens.tasks.code_names import BUILTIN, DEFINITION, Names, compiled, first_line, parse, source_of, with_needed
from spd_lens.tasks.thoughts import without_thoughts

_FENCE = re.compile(r"^(?P<before>.*?)(?P<fence>`{3,}|~{3,})[ \t]*(?P<info>[^`~]*)$")
_LIST_MARK = re.compile(r"[ \t]*(?:(?:[-*+]|\d+[.)])[ \t]+)?\Z")
_LANGUAGE = re.compile(r"[{.\s]*([\w+-]*)")
_PYTHON = {"python", "py", "python3", "py3", "python2", "ipython", "ipython3", "pycon"}
_MARKS = ("BEGIN", "DONE", "END", "PYTHON", "CODE", "ANSWER", "SOLUTION", "TEST", "TESTS")
_SPECIAL = r"<\|[^\s<>|]{1,40}\|>|</?s>|<(?:eos|end_of_turn)>"
_TAG = re.compile(r"^[ \t]*<(?:code|pre|python|answer|solution)>|</(?:code|pre|python|answer|solution)>[ \t]*$")
_DEFINES = re.compile(r"^[ \t]*(?:async[ \t]+def|def|class)[ \t]+(\w+)", re.MULTILINE)
_MAX_LINES, _MAX_CLOSINGS, _MAX_TRIES = 400, 12, 12
"""Lines of code without a fence, fences that may close a block, lines at which the compiler may stop: a looping model
writes thousands."""


@dataclass(frozen=True)
class Block:
    """A piece of a completion that is code, or was meant to be."""

    code: str
    cut: bool = False
    """Whether the text ends, or code does, in the middle of a definition."""

    @property
    def names(self) -> set[str]:
        """The names that the block defines; functions and classes alone where it is not valid Python."""
        return set(_DEFINES.findall(self.code) if parse(self.code) is None else Names.of(self.code).defined)


def extract_code(text: str, functions: Collection[str] = (), header: str = "") -> str | None:
    """The program in a completion: the last block that defines what is tested, with what it needs of other blocks.

    A block stands in a fence, or is a run of lines that Python can compile. A block that breaks off in the middle of
    a definition, or only repeats the beginning of an earlier one, does not replace a whole block.

    Args:
        text: The completion.
        functions: Names that the tests call. If there are none, any function or class will do.
        header: The line `def f(a, b)`, for a completion that continues after it.
    """
    text = _without_marks(without_thoughts(text).lstrip("\ufeff").replace("\r\n", "\n").replace("\r", "\n"))
    blocks = list(_blocks(text))
    places = [place for place, block in enumerate(blocks) if _has(block, functions)]
    # how the function is used elsewhere: `from solution import f`
    places = [place for place in places if not _only_imports(blocks[place], functions)] or places
    while len(places) > 1 and _stands_behind(blocks[places[-1]], [blocks[place] for place in places[:-1]]):
        places.pop()
    if places:
        return with_needed([block.code for block in blocks], places[-1], functions)
    unfenced = "\n".join(line for line in text.split("\n") if not _FENCE.match(line)).strip("\n").rstrip()
    if header and "..." not in header:
        bodies = [_continued(header, body) for body in (*(block.code for block in blocks), unfenced)]
        if found := [body for body in bodies if body]:
            return found[-1]
    rest = [block.code for block in blocks if _DEFINES.search(block.code)][-1:] or [block.code for block in blocks]
    return (rest[0] if rest else unfenced.strip()) or None


def _has(block: Block, functions: Collection[str]) -> bool:
    return bool(block.names & set(functions) if functions else _DEFINES.search(block.code))


def _only_imports(block: Block, functions: Collection[str]) -> bool:
    tree = parse(block.code)
    imports = [node for node in tree.body if isinstance(node, ast.ImportFrom)] if tree else []
    imported = {alias.asname or alias.name for node in imports for alias in node.names}
    return bool(imported & set(functions)) and not set(functions) & set(_DEFINES.findall(block.code))


def _stands_behind(block: Block, earlier: Sequence[Block]) -> bool:
    """Whether a block is only the beginning of an earlier one, from a model that repeats itself until it is stopped."""
    return (block.cut and not all(other.cut for other in earlier)) or any(
        other.code.startswith(block.code) and other.code != block.code for other in earlier
    )


# --- blocks ----------------------------------------------------------------------------------------------------------


def _without_marks(text: str) -> str:
    """`text` without marks of prompts and templates at the ends of lines (`[BEGIN]`, `<|im_end|>`), up to `[DONE]`."""
    done = re.search(r"^[ \t]*\[DONE\]", text, re.MULTILINE)
    if done and _DEFINES.search(text[: done.start()]):
        text = text[: done.start()]
    words = [word for word in _MARKS if not re.search(rf"\b{word}\b(?!\])", text)]  # else `x[END]` may be code
    marks = "|".join([_SPECIAL, *(rf"\[/?{word}\]" for word in words)])
    text = re.sub(rf"^[ \t]*(?:{marks})|(?:{marks})[ \t]*$", "\n", text, flags=re.MULTILINE)
    quoted = re.search(r"^[ \t]*> ?(?:```|~~~)", text, re.MULTILINE)
    return re.sub(r"^[ \t]*> ?", "", text, flags=re.MULTILINE) if quoted else text


def _blocks(text: str) -> Iterator[Block]:
    """The pieces of code in a text, in their order."""
    lines, outside, at = text.split("\n"), list[str](), 0
    while at < len(lines):
        opening = _FENCE.match(lines[at])
        found = _fenced(lines, at, opening) if opening and _opens(opening) else None
        if found is None:
            outside.append(_TAG.sub("", opening["before"] if opening else lines[at]))
            at += 1
            continue
        yield from _unfenced(outside)
        outside = []
        block, at = found
        if block.code.strip():
            yield block
    yield from _unfenced(outside)


def _opens(fence: re.Match[str]) -> bool:
    before = fence["before"]
    return bool(_LIST_MARK.match(before)) or before.rstrip().endswith(":") or _language(fence) in _PYTHON


def _language(fence: re.Match[str]) -> str:
    match = _LANGUAGE.match(fence["info"])
    return match[1].lower() if match else ""


def _fenced(lines: Sequence[str], at: int, opening: re.Match[str]) -> tuple[Block, int] | None:
    """The block that the fence in line `at` opens, and the line behind it; `None` if it opens nothing.

    It ends at the first fence at which its content is Python, as docstrings may hold fences too; else at the first. One
    that is never closed opens nothing: the text may have ended before the block did. Nor does one without a language
    before what is neither Python nor a definition: it closed what began in the prompt.
    """
    content: list[str] = []
    ends: list[tuple[str, int]] = []
    for number in range(at + 1, len(lines)):
        closing = _FENCE.match(lines[number])
        if closing and closing["fence"].startswith(opening["fence"]):
            opens_next = closing["info"] != ""
            if not closing["before"].strip():
                ends.append((_source(content), number + (not opens_next)))
            elif not opens_next:
                ends.append((_source([*content, closing["before"]]), number + 1))
        if len(ends) == _MAX_CLOSINGS:
            break
        content.append(lines[number])
    for code, end in ends:
        if parse(code) is not None:
            return Block(code), end
    if not ends:
        return None
    code, end = ends[0]
    if _language(opening) in _PYTHON or (_language(opening) == "" and _DEFINES.search(code)):
        return Block(code), end  # to fail where it is run
    return (Block(""), end) if _language(opening) else None


def _source(lines: Sequence[str]) -> str:
    """Lines as a program: without common indentation and without the interpreter's prompts."""
    text = "\n".join(lines).strip("\n").rstrip()
    code = textwrap.dedent(text) if text[:1].isspace() else text  # which else changes lines of blanks in strings
    return _session(code) if code.lstrip().startswith(">>>") else code


def _session(text: str) -> str:
    """The statements that were typed in a session of the interpreter; everything else becomes comments."""
    try:
        return doctest.script_from_examples(text).strip("\n")
    except ValueError:
        return ""


def _unfenced(lines: list[str]) -> Iterator[Block]:
    """The code in lines without fences; where none of it is Python, what begins like code, to fail where it is run."""
    lines = lines[:_MAX_LINES]
    found = list(_runs(lines))
    if any(re.match(r"[ \t]*>>> ", line) for line in lines):
        found.insert(0, Block(_session("\n".join(lines))))
    text = "\n".join(lines)
    if not any(_DEFINES.search(block.code) for block in found) and (start := _DEFINES.search(text)):
        found.append(Block(text[start.start() :].rstrip(), cut=True))
    yield from (block for block in found if block.code)


def _runs(lines: Sequence[str]) -> Iterator[Block]:
    """The longest runs of lines that are Python, without statements that are only words."""
    at = 0
    while at < len(lines):
        indent = lines[at][: len(lines[at]) - len(lines[at].lstrip())]
        run = _level(lines[at:], indent)
        length = _compiling(run) if run[0] else 0
        after = next((line for line in run[length:] if line.strip()), "")
        if length and (code := _without_words("\n".join(run[:length]), cut=after[:1].isspace())):
            yield Block(code, cut=after[:1].isspace())
        at += length or 1


def _level(lines: Sequence[str], indent: str) -> list[str]:
    """The first lines, as far as they are indented, without that indentation."""
    indented = takewhile(lambda line: line.startswith(indent) or not line.strip(), lines)
    return [line.removeprefix(indent) for line in indented]


def _compiling(lines: Sequence[str]) -> int:
    """How many of the first lines are a program: where the compiler stops at a line, those before it are tried."""
    end = len(lines)
    for _ in range(_MAX_TRIES):
        if end <= 0:
            break
        try:
            compiled("\n".join(lines[:end]))
            return end
        except SyntaxError as error:
            end = min(end, error.lineno or end) - 1
        except (ValueError, RecursionError, MemoryError):
            return 0
    return 0


def _without_words(code: str, *, cut: bool) -> str:
    """Code without top-level expressions that do nothing (`Explanation`, `Time: O(n)`: words that happen to be Python),
    and without a last definition that only begins like an earlier one."""
    tree = compiled(code)
    known = BUILTIN | Names.of(code).defined
    drop = [node for node in tree.body if _only_words(node, known)]
    definitions = [node for node in tree.body if isinstance(node, DEFINITION)]
    if definitions and (last := definitions[-1]) is tree.body[-1]:
        earlier = [source_of(node, code) for node in definitions[:-1] if node.name == last.name]
        text = source_of(last, code)
        if (earlier and cut) or any(other.startswith(text) and other != text for other in earlier):
            drop.append(last)
    if len(drop) == len(tree.body):
        return ""
    gone = {number for node in drop for number in range(first_line(node), (node.end_lineno or 0) + 1)}
    lines = ["" if number in gone else line for number, line in enumerate(code.split("\n"), 1)]
    shorter = "\n".join(lines).strip("\n").rstrip()
    return shorter if parse(shorter) is not None else code  # a line may hold more than the words


def _only_words(node: ast.stmt, known: frozenset[str]) -> bool:
    if isinstance(node, ast.AnnAssign) and node.value is None:
        value = node.annotation
    elif isinstance(node, ast.Expr) and not isinstance(node.value, ast.Constant):
        value = node.value
    else:
        return False
    parts = list(ast.walk(value))
    if any(isinstance(part, ast.NamedExpr) for part in parts):
        return False
    calls = [part.func for part in parts if isinstance(part, ast.Call)]
    return all(isinstance(call, ast.Name) and call.id not in known and "*" not in known for call in calls)


def _continued(header: str, body: str) -> str | None:
    """A function made of the header in the prompt and a body in the completion; `None` if the body is not one."""
    lines = body.strip("\n").split("\n")[:_MAX_LINES]
    for first, others in (("", ""), ("    ", ""), ("    ", "    ")):
        moved = [header + ":", first + lines[0], *(others + line for line in lines[1:])]
        code = "\n".join(moved[: _compiling(moved)]).rstrip()
        tree = parse(code)
        if tree and tree.body and any(isinstance(node, ast.Return | ast.Yield) for node in ast.walk(tree.body[0])):
            return _without_words(code, cut=False)
    return None
