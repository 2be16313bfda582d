"""Files that say of themselves whether they are what was written, and what is not taken up at all."""

from __future__ import annotations

import hashlib
import json
import struct
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import with_config

from spd_lens.errors import DamagedFile, SPDError
from spd_lens.files import STRICT, Schema, fitting, load_tensors, read_csv, read_json, save_tensors, write_json
from spd_lens.files.contents import _NOTED
from spd_lens.files.digests import signed, unsigned
from tests.helpers import refused

TENSORS = {"b": torch.arange(6, dtype=torch.float64).reshape(2, 3), "a": torch.tensor([1, 2])}
HEADER = {"rank": 2, "name": "né"}


def parts_of(path: Path) -> tuple[dict[str, Any], bytes]:
    """Header and data of a safetensors file, by its documentation."""
    content = path.read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def put(path: Path, header: dict[str, Any], data: bytes) -> None:
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def test_the_digest_of_tensors_is_the_documented_one(tmp_path):
    """Written again with hashlib and numpy alone."""
    header, data = parts_of(save_tensors(tmp_path / "x.safetensors", "things", TENSORS, HEADER))
    metadata = header.pop("__metadata__")

    def text(value: Any) -> bytes:
        return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()

    digest = hashlib.sha256(text({key: value for key, value in metadata.items() if key != "sha256"}))
    for name in sorted(header):
        start, end = header[name]["data_offsets"]
        kind = {"F64": "float64", "I64": "int64"}[header[name]["dtype"]]
        assert np.frombuffer(data[start:end], kind).tolist() == TENSORS[name].flatten().tolist()
        digest.update(text([name, kind, header[name]["shape"]]) + data[start:end])
    assert metadata["sha256"] == digest.hexdigest()


def test_equal_content_is_an_equal_file(tmp_path):
    written = {save_tensors(tmp_path / str(n), "things", TENSORS, HEADER).read_bytes() for n in range(6)}
    assert len(written) == 1
    [content] = written
    assert struct.unpack("<Q", content[:8])[0] % 8 == 0


def test_a_file_says_whether_it_is_what_was_written(tmp_path, caplog):
    path = save_tensors(tmp_path / "x.safetensors", "things", TENSORS, HEADER)
    header, data = parts_of(path)
    tensors, found = load_tensors(path, "things")
    assert found == HEADER and all(torch.equal(tensors[name], TENSORS[name]) for name in TENSORS)
    put(path, header, data[:-1] + bytes([data[-1] ^ 1]))
    with refused(path, "sha256", kind=DamagedFile):
        load_tensors(path, "things")
    put(path, {**header, "__metadata__": {"spd_lens": header["__metadata__"]["spd_lens"], "format": "pt"}}, data)
    with refused(path, "sha256"):  # not an earlier version's, which had one entry
        load_tensors(path, "things")
    put(path, {**header, "__metadata__": {"spd_lens": header["__metadata__"]["spd_lens"]}}, data)
    _NOTED.discard(tmp_path)
    for _ in range(2):
        assert load_tensors(path, "things")[1] == HEADER
    assert len([r for r in caplog.records if "without a sha256" in r.getMessage()]) == 1


def test_loaded_tensors_stay_what_they_were(tmp_path):
    path = save_tensors(tmp_path / "x.safetensors", "things", TENSORS, HEADER)
    found = load_tensors(path, "things")[0]
    with path.open("r+b") as file:
        file.write(b"\0" * path.stat().st_size)
        file.truncate(10)
    assert torch.equal(found["b"], TENSORS["b"])


def test_a_header_without_end_is_not_taken_up(tmp_path):
    path = tmp_path / "x.safetensors"
    put(path, {f"t{n}": {"dtype": "F64", "shape": [0], "data_offsets": [0, 0]} for n in range(30_001)}, b"")
    start = time.process_time()
    with refused("30000 tensors", kind=DamagedFile):
        load_tensors(path, "things")
    assert time.process_time() - start < 2
    path.write_bytes(struct.pack("<Q", 2**62) + b"{}")
    with refused("header does not fit", kind=DamagedFile):
        load_tensors(path, "things")


@pytest.mark.parametrize("value", [{"a": 1, "é": [1.5, None]}, {}, {1: 2.0, "x": {"y": -0.0}}, {"a": "\udc80"}])
def test_json_carries_its_digest(tmp_path, value):
    path = write_json(tmp_path / "x.json", value)
    content = {str(key): part for key, part in value.items()}
    assert read_json(path) == content
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    assert json.loads(path.read_text())["sha256"] == hashlib.sha256(text.encode()).hexdigest()
    path.write_text(json.dumps(json.loads(path.read_text()), indent=7))  # other spaces, the same content
    assert read_json(path) == content
    path.write_text(json.dumps({**json.loads(path.read_text()), "b": 0}))
    with refused(path, "sha256", kind=DamagedFile):
        read_json(path)


def test_other_json_is_read_as_it_is(tmp_path):
    for value in ([1, 2], 3, None, {"a": "0" * 64}, {"sha": "x"}, {"a": {"sha256": "0" * 64}}):
        (tmp_path / "x.json").write_text(json.dumps(value))
        assert read_json(tmp_path / "x.json") == value
    assert unsigned(json.loads(signed([1]))) == [1]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"[" * 5000 + b"]" * 5000, "recursion"),
        (b"[" * 500 + b"]" * 500, "recursion"),
        (b'{"a": "\xff"}', "utf-8"),
        (b"", "empty"),
        (b"\0\0", "empty"),
        (b'{"a": 1', "delimiter"),
    ],
)
def test_what_is_no_json_is_one_sentence(tmp_path, content, said):
    (tmp_path / "x.json").write_bytes(content)
    with refused("x.json", said, kind=DamagedFile):
        read_json(tmp_path / "x.json")


def test_json_without_end_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr("spd_lens.files.limits._JSON_BYTES", 100)
    with refused("x.json", "bytes"):
        read_json(write_json(tmp_path / "x.json", {"a": "b" * 100}))


class Thing(Schema):
    name: str
    loss: float
    steps: list[int] = []


@pytest.mark.parametrize(
    ("value", "place"),
    [
        ({"name": 3, "loss": 0.5}, "name (3)"),
        ({"name": "a", "loss": "0.5"}, "loss ('0.5')"),
        ({"name": "a", "loss": float("nan")}, "loss (nan)"),
        ({"name": "a", "loss": True}, "loss (True)"),
        ({"name": "a", "loss": 10**400}, "loss"),
        ({"name": "a", "loss": 1, "steps": [1, 1.5]}, "steps.1 (1.5)"),
        ({"name": "a"}, "loss"),
        ({"name": "a", "loss": 1, "other": 1}, "other"),
        ([1], "its content"),
    ],
)
def test_values_are_of_their_types_exactly(value, place):
    with refused("x.json", f"at {place}", kind=DamagedFile):
        fitting(Thing, value, "x.json")
    assert fitting(Thing, {"name": "a", "loss": 1}, "x.json").loss == 1.0


@with_config(STRICT)
@dataclass
class Point:
    x: float


def test_dataclasses_are_schemas_too():
    assert fitting(dict[str, list[Point]], {"a": [{"x": 1}]}, "p") == {"a": [Point(1.0)]}
    with refused("a.0.x"):
        fitting(dict[str, list[Point]], {"a": [{"x": None}]}, "p")


@pytest.mark.parametrize("content", [b"", b"a,b\n1,2,3\n4,5,6,7\n", b"\xff\xfe,\x00", b'a,"b\n1'])
def test_what_is_no_table_is_one_sentence(tmp_path, content):
    (tmp_path / "x.csv").write_bytes(content)
    with refused("x.csv", "table"):
        read_csv(tmp_path / "x.csv")


def test_a_missing_table_is_one_sentence(tmp_path):
    with pytest.raises(SPDError, match="table"):
        read_csv(tmp_path / "x.csv")
