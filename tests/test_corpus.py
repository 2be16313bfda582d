from __future__ import annotations

import errno
import json
import os
import resource
from pathlib import Path

import pytest

from spd_lens.corpus import Corpus, CorpusWriter, Record, settings_path, write_json
from spd_lens.errors import SPDError
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
    with path.open("a") as file:
        file.write(RECORDS[0].to_json() + "\n")
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
    assert json.loads(path.read_text()) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]
    with pytest.raises(SPDError):
        Corpus.load(path)
