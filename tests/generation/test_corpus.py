from __future__ import annotations

import errno
import hashlib
import json
import os
import resource
from pathlib import Path
from typing import Any

import pytest

from spd_lens.errors import SPDError
from spd_lens.files import read_json, write_json
from spd_lens.files.contents import _NOTED
from spd_lens.generation.corpus import Corpus, CorpusWriter, Record, Streamed, settings_path
from tests.helpers import refused

SETTINGS = {"model": "tiny", "seed": 42, "temperature": 0.7}


def record(id: str, text: str = "21", sample: int = 0) -> Record:
    return Record(id, f"prompt of {id}", text, (0, 5, 6), (7, 8, 1), "eos", sample)


RECORDS = [record("a"), record("b", "Zeilen\numbruch \u2028 und \r\n €"), record("c"), record("d")]
ORDER = [r.key for r in RECORDS]


def write(path: Path, records: list[Record], *, settings: dict = SETTINGS, order: list = ORDER) -> None:
    with CorpusWriter(path, settings, order) as writer:
        writer.append(records)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run" / "corpus.jsonl"


def test_records_come_back_in_prompt_order(path: Path) -> None:
    write(path, [RECORDS[2], RECORDS[0]])
    write(path, [RECORDS[3], RECORDS[1]])
    corpus = Corpus.load(path)
    assert corpus.records == RECORDS == list(corpus)
    assert corpus[1].completion == RECORDS[1].completion
    assert corpus.settings == SETTINGS
    assert corpus.complete and len(corpus) == 4 and corpus.path == path
    lines = [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]]
    assert [line["id"] for line in lines] == ["c", "a", "d", "b"]  # append-only, in order of completion
    assert lines[0]["n_prompt_tokens"] == 3 and lines[0]["n_completion_tokens"] == 3


def test_nothing_is_left_but_corpus_and_settings(path: Path) -> None:
    write(path, RECORDS)
    names = {p.name for p in path.parent.iterdir()} - {"corpus.jsonl.lock"}  # some filelock versions keep it
    assert names == {"corpus.jsonl", "corpus.settings.json"}


def test_an_unfinished_corpus_says_so(path: Path) -> None:
    write(path, RECORDS[:2])
    corpus = Corpus.load(path)
    assert not corpus.complete
    assert len(corpus) == 2


@pytest.mark.parametrize("left", [1, 20, -1])
def test_a_half_written_last_line_is_dropped(path: Path, left: int) -> None:
    write(path, RECORDS[:2])
    whole = path.read_bytes()
    path.write_bytes(whole + (RECORDS[2].to_json().encode() + b"\n")[:left])
    assert Corpus.load(path).records == RECORDS[:2]
    with CorpusWriter(path, SETTINGS, ORDER) as writer:
        assert list(writer.done) == ORDER[:2]
        assert path.read_bytes() == whole
        writer.append(RECORDS[2:])
    assert Corpus.load(path).records == RECORDS


def test_what_a_power_failure_left_as_zeros_is_cut_off(path: Path) -> None:
    write(path, RECORDS[:2])
    safe = path.read_bytes()
    write(path, RECORDS[2:])
    half = (len(safe) + (whole := path.read_bytes()).rindex(b"\n", 0, -1)) // 2
    path.write_bytes(safe.ljust(half, b"\0") + whole[half:])  # the end of what was appended is there, its start is not
    assert Corpus.load(path).records == RECORDS[:2]
    write(path, RECORDS[2:])
    assert path.read_bytes() == whole


def test_other_settings_are_refused_by_name_and_the_file_is_left_alone(path: Path) -> None:
    write(path, RECORDS[:2])
    before = path.read_bytes()
    with refused("temperature = 0.7", "temperature = 0.2", path):
        write(path, RECORDS[2:], settings=SETTINGS | {"temperature": 0.2})
    with refused("top_p = null", "top_p = 0.9"):
        write(path, RECORDS[2:], settings=SETTINGS | {"top_p": 0.9})
    assert path.read_bytes() == before
    assert Corpus.load(path).settings == SETTINGS


def test_more_prompts_extend_a_corpus_and_fewer_are_refused(path: Path) -> None:
    write(path, RECORDS[:2], order=ORDER[:2])
    assert Corpus.load(path).complete
    write(path, RECORDS[2:])
    assert Corpus.load(path).records == RECORDS
    with refused("'c'"):
        write(path, [], order=ORDER[:2])


def test_a_file_without_its_settings_is_not_continued_but_can_be_read(path: Path) -> None:
    write(path, RECORDS)
    settings_path(path).unlink()
    with refused(path, settings_path(path).name):
        write(path, [])
    corpus = Corpus.load(path)
    assert corpus.records == RECORDS and corpus.settings == {} and corpus.complete


@pytest.mark.parametrize("line", ["{}", "no json", '{"id": 3}', RECORDS[0].to_json().replace('"eos"', '"tired"')])
def test_a_line_that_is_no_record_is_named(path: Path, line: str) -> None:
    write(path, RECORDS[:1])
    with path.open("a") as file:
        file.write(line + "\n")
    with refused("line 2", path):
        Corpus.load(path)
    with refused("line 2", path):
        write(path, RECORDS[1:])


def test_damaged_settings_are_named(path: Path) -> None:
    write(path, RECORDS[:1])
    settings_path(path).write_text("{")
    with refused("corpus.settings.json"):
        Corpus.load(path)


def test_a_completion_that_is_there_twice_is_an_error(path: Path) -> None:
    write(path, RECORDS[:2])
    path.write_text("".join(f"{record.to_json()}\n" for record in (*RECORDS[:2], RECORDS[0])))  # without sums
    with refused("line 3", "'a'"):
        Corpus.load(path)


def test_two_samples_of_a_prompt_are_two_records(path: Path) -> None:
    samples = [record("a", sample=0), record("a", sample=1)]
    write(path, samples[::-1], order=[r.key for r in samples])
    assert Corpus.load(path).records == samples


def test_a_corpus_that_is_being_written_is_refused(path: Path) -> None:
    with CorpusWriter(path, SETTINGS, ORDER), refused("another process", path):
        CorpusWriter(path, SETTINGS, ORDER)
    write(path, RECORDS)  # free again


def test_a_full_disk_keeps_whole_records_and_says_how_to_go_on(path: Path) -> None:
    write(path, RECORDS[:1])
    size = path.stat().st_size
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with CorpusWriter(path, SETTINGS, ORDER) as writer:
        # the kernel takes part of a record and refuses the rest, as on a full disk (with another number)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 30, limits[1]))
        try:
            with refused(path, "1 completions of 4 are kept", "run the same again"):
                writer.append(RECORDS[1:3])
            assert path.stat().st_size == size
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert Corpus.load(path).records == RECORDS[:1]
    write(path, RECORDS[1:])
    assert Corpus.load(path).records == RECORDS


def test_a_disk_that_fills_up_when_flushing_loses_nothing(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with CorpusWriter(path, SETTINGS, ORDER) as writer:
        writer.append(RECORDS[:1])
        with monkeypatch.context() as patch, refused("No space left", "1 completions of 4"):
            patch.setattr(os, "fsync", full)
            writer.append(RECORDS[1:])
        writer.append(RECORDS[1:])
    assert Corpus.load(path).records == RECORDS


def test_places_that_cannot_be_written_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with refused(tmp_path / "file"):
        write(tmp_path / "file" / "corpus.jsonl", RECORDS)
    with refused(tmp_path):
        write(tmp_path, RECORDS)
    with refused("does not exist"):
        Corpus.load(tmp_path / "none.jsonl")


def test_write_json_replaces_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert read_json(path) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]
    with pytest.raises(SPDError):
        Corpus.load(path)


def foreign(path: Path, content: bytes) -> Path:
    """A corpus of another program: no settings beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


LINES = [r.to_json().encode() for r in RECORDS[:3]]


@pytest.mark.parametrize(
    "content",
    [
        b"\n".join(LINES),
        b"\n".join(LINES) + b"\n",
        b"\n".join(LINES) + b"\n\n",
        b"\r\n".join(LINES),
        b"\r\n".join(LINES) + b"\r\n\r\n",
        b"\xef\xbb\xbf" + b"\n".join(LINES),
        b"\n\n" + b"\n \n".join(LINES) + b"\n  \t",
    ],
)
def test_other_programs_may_end_lines_and_files_as_they_like(path: Path, content: bytes) -> None:
    corpus = Corpus.load(foreign(path, content))
    assert corpus.records == RECORDS[:3]
    assert corpus.complete

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("spd_lens.generation.corpus.STREAMED_FROM", 0)
        assert list(Corpus.load(path)) == RECORDS[:3]


def test_a_large_file_is_read_record_by_record_in_prompt_order(path: Path, monkeypatch) -> None:
    monkeypatch.setattr("spd_lens.generation.corpus.STREAMED_FROM", 0)
    write(path, [RECORDS[2], RECORDS[0]])
    write(path, [RECORDS[3]])
    path.write_bytes(path.read_bytes() + b"\n" + RECORDS[1].to_json().encode()[:-3])
    part = Corpus.load(path)
    assert isinstance(part.records, Streamed) and not part.complete
    assert list(part) == [RECORDS[0], *RECORDS[2:]] and part.settings == SETTINGS
    write(path, [RECORDS[1]])
    corpus = Corpus.load(path)
    assert list(corpus) == RECORDS and corpus.complete and len(corpus) == 4
    assert corpus[-1] == RECORDS[3] and corpus[1:3] == RECORDS[1:3]
    with pytest.raises(IndexError):
        corpus[4]
    with refused("line 2", "repeats"):
        Corpus.load(foreign(path.with_name("twice.jsonl"), LINES[0] + b"\n" + LINES[0]))
    path.write_bytes(path.read_bytes()[9:])
    with refused(path, "has changed since it was opened"):
        corpus[2]
    path.unlink()
    with refused(path, "has changed since it was opened"):
        corpus[2]


def test_one_record_without_a_line_break_is_a_corpus(path: Path) -> None:
    assert Corpus.load(foreign(path, LINES[0])).records == RECORDS[:1]


@pytest.mark.parametrize("content", [b"\n".join(LINES)[:-5], LINES[0] + b"\n" + b"\0" * 40, b"\xff\xfe" + LINES[0]])
def test_another_programs_file_that_is_cut_off_or_damaged_is_refused(path: Path, content: bytes) -> None:
    with refused(path, "is no record of a corpus"):
        Corpus.load(foreign(path, content))


def test_blank_lines_in_our_own_file_are_read_over_and_kept(path: Path) -> None:
    write(path, RECORDS[:2])
    path.write_bytes(path.read_bytes() + b"\n\r\n")
    assert Corpus.load(path).records == RECORDS[:2]
    write(path, RECORDS[2:])
    assert Corpus.load(path).records == RECORDS


def test_our_own_last_line_without_its_line_break_is_not_whole(path: Path) -> None:
    write(path, RECORDS)
    path.write_bytes(path.read_bytes()[:-1])
    assert Corpus.load(path).records == RECORDS[:3] and not Corpus.load(path).complete
    write(path, RECORDS[3:])
    assert Corpus.load(path).records == RECORDS


@pytest.mark.parametrize(
    ("field", "value", "word"),
    [
        ("prompt_ids", "[1.5, 2.5]", "1.5"),
        ("completion_ids", "[1.0]", "1.0"),
        ("completion_ids", '"12345"', "12345"),
        ("completion_ids", "[true]", "true"),
        ("completion_ids", '["7"]', "7"),
        ("prompt_ids", "null", "null"),
        ("prompt_ids", "[null]", "null"),
        ("completion_ids", "[[1]]", "[1]"),
        ("completion_ids", "[1e400]", "Infinity"),
        ("completion_ids", "[NaN]", "NaN"),
        ("completion_ids", '{"0": 1}', "0"),
        ("completion_ids", "[" + "1" * 5000 + "]", "digits"),
        ("completion_ids", "[" * 100_000 + "]" * 100_000, "recursion"),
        ("sample", "1e400", "Infinity"),
        ("sample", "true", "true"),
        ("sample", '"0"', "0"),
        ("id", "null", "null"),
        ("id", "true", "true"),
        ("prompt", "null", "null"),
        ("completion", "3", "3"),
        ("finish_reason", "[]", "finish_reason"),
    ],
)
def test_fields_of_another_kind_are_refused(path: Path, field: str, value: str, word: str) -> None:
    fields = {key: json.dumps(found) for key, found in json.loads(LINES[1]).items()} | {field: value}
    line = "{" + ", ".join(f'"{key}": {found}' for key, found in fields.items()) + "}"
    with refused("line 2", path, word):
        Corpus.load(foreign(path, LINES[0] + b"\n" + line.encode()))


@pytest.mark.parametrize(
    "content",
    [
        '{"settings": null, "order": []}',
        '{"settings": [], "order": []}',
        '{"settings": {}, "order": null}',
        '{"settings": {}, "order": [["a"]]}',
        '{"settings": {}, "order": [["a", 1e400]]}',
        '{"settings": {}, "order": [["a", true]]}',
        '{"settings": {}, "order": [["a", 0.0]]}',
        '{"settings": {}, "order": [[null, 0]]}',
        '{"order": []}',
        "[]",
        "",
        "[" * 100_000,
    ],
)
def test_settings_that_would_skip_the_checks_are_refused(path: Path, content: str) -> None:
    write(path, RECORDS[:1])
    settings_path(path).write_text(content)
    with refused("corpus.settings.json"):
        Corpus.load(path)
    with refused("corpus.settings.json"):
        write(path, RECORDS[1:])


@pytest.mark.parametrize("settings", [None, b"", b"\0" * 100, b'{"settings": {"seed": 1}, "order": []}', b"{"])
@pytest.mark.parametrize("records", [None, b"", b"\0" * 50])
def test_a_beginning_that_was_killed_is_begun_again(path: Path, settings: bytes | None, records: bytes | None) -> None:
    path.parent.mkdir()
    for place, content in ((settings_path(path), settings), (path, records)):
        if content is not None:
            place.write_bytes(content)
    path.with_name(".corpus.settings.json.123-0a1b2c3d.tmp").touch()
    assert not Corpus.is_finished(path)
    write(path, RECORDS)
    assert Corpus.load(path).records == RECORDS and Corpus.load(path).settings == SETTINGS


def test_a_corpus_with_records_of_unknown_settings_is_not_begun_again(path: Path) -> None:
    write(path, RECORDS[:2])
    before = path.read_bytes()
    settings_path(path).write_bytes(b"")
    with refused("corpus.settings.json", "generate it again"):
        write(path, RECORDS)
    assert path.read_bytes() == before


def test_a_link_in_place_of_a_corpus_is_not_written_through(path: Path, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("one line without an end")
    path.parent.mkdir()
    path.symlink_to(victim)
    settings_path(path).write_text(json.dumps({"settings": SETTINGS, "order": ORDER}))
    with refused(path, "is a link"):
        write(path, RECORDS)
    assert victim.read_text() == "one line without an end"


def test_half_characters_in_ids_are_kept(path: Path) -> None:
    odd = [record("a\udc80")]
    write(path, odd, order=[odd[0].key])
    assert Corpus.load(path).records == odd


def test_every_line_carries_a_sum_and_is_plain_json(path: Path) -> None:
    """Written again with hashlib: the sum of the line before, and the line without its own."""
    write(path, RECORDS[:3])
    before = b""
    for line, record in zip(path.read_bytes().splitlines(), RECORDS[:3], strict=True):
        fields = json.loads(line)
        content = record.to_json().encode()
        before = hashlib.sha256(before + content).hexdigest()[:16].encode()
        assert fields.pop("sum").encode() == before and fields == json.loads(content)


def edited(number: int, change: Any) -> Any:
    def edit(lines: list[bytes]) -> list[bytes]:
        lines[number] = change(lines[number])
        return lines

    return edit


EDITS: dict[str, tuple[Any, str]] = {
    "a token": (edited(1, lambda line: line.replace(b'"completion_ids": [', b'"completion_ids": [9, ')), "line 2"),
    "a text": (edited(0, lambda line: line.replace(b'"prompt": "', b'"prompt": "A')), "line 1"),
    "its sum": (edited(1, lambda line: line[:-3] + (b"0" if line[-3:-2] != b"0" else b"1") + line[-2:]), "line 2"),
    "no sum": (edited(1, lambda line: line[: line.rindex(b', "sum"')] + b"}"), "line 2"),
    "a key behind it": (edited(2, lambda line: line[:-1] + b', "x": 1}'), "line 3"),
    "a line gone": (lambda lines: [lines[0], lines[2]], "line 2"),
    "lines exchanged": (lambda lines: [lines[1], lines[0], lines[2]], "line 1"),
}


@pytest.mark.parametrize("edit", EDITS)
def test_an_edited_line_is_named(path: Path, edit: str) -> None:
    write(path, RECORDS[:3])
    change, named = EDITS[edit]
    path.write_bytes(b"".join(line + b"\n" for line in change(path.read_bytes().splitlines())))
    with refused(named, path, "sum"):
        Corpus.load(path)
    with refused(named, path, "sum"):
        write(path, RECORDS)
    settings_path(path).unlink()  # nor does it pass for another program's
    with refused(named, path, "sum"):
        Corpus.load(path)


def test_a_corpus_of_an_earlier_version_goes_on_with_sums(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(path, RECORDS[:2])
    old = "".join(f"{record.to_json()}\n" for record in RECORDS[:2])
    path.write_text(old)
    _NOTED.discard(path.parent.absolute())
    assert list(Corpus.load(path)) == RECORDS[:2]
    assert "without a sha256" in caplog.text
    write(path, RECORDS[2:3])
    assert path.read_text().startswith(old) and '"sum"' in path.read_text().split("\n")[2]
    assert list(Corpus.load(path)) == RECORDS[:3]
    path.write_text(path.read_text().replace(RECORDS[0].prompt, "another"))
    with refused("line 3"):  # whose sum is over the lines before, too
        Corpus.load(path)


def test_a_streamed_line_that_changes_later_is_seen(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(path, RECORDS[:3])
    monkeypatch.setattr("spd_lens.generation.corpus.STREAMED_FROM", 1)
    corpus = Corpus.load(path)
    assert corpus[1] == RECORDS[1]
    path.write_bytes(path.read_bytes().replace(b'"completion": "', b'"completion":" ', 2))
    with refused("changed since it was opened"):
        corpus[1]
