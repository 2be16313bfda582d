"""Pointers of git-lfs and pages of failed downloads are called what they are, wherever a file is read."""

from __future__ import annotations

import shutil

import pytest

from spd_lens.evaluation.results import EvalResult
from spd_lens.files.stand_ins import refuse_stand_in
from spd_lens.generation.corpus import Corpus
from spd_lens.models.adapters import check_adapter
from spd_lens.models.load import load
from spd_lens.models.tokenizer import load_tokenizer
from spd_lens.runs.config import SPDConfig
from spd_lens.runs.run_dir import Run
from spd_lens.subspaces.moments import GradientMoments
from spd_lens.subspaces.subspace import Subspace
from spd_lens.tasks.sources import read_rows
from tests.helpers import make_adapter, refused

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22\nsize 12345\n"


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (POINTER, "git lfs pull"),
        (POINTER.replace("git-lfs.github.com", "hawser.github.com"), "git lfs pull"),
        ("/annex/objects/SHA256E-s12345--4d7a.safetensors\n", "git-annex"),
        ("\n  <!DOCTYPE html>\n<html><title>404</title></html>", "a web page"),
        ("\ufeff<HTML lang='en'>", "a web page"),
        ("<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", "XML"),
    ],
)
def test_what_stands_in_is_named(tmp_path, content, word):
    path = tmp_path / "model.safetensors"
    path.write_text(content)
    with refused(path, word):
        refuse_stand_in(path)


@pytest.mark.parametrize(
    "content", [b"", b"\x3c\0\0\0\0\0\0\0{}", b'{"a": "version https://git-lfs.github.com"}', b"<"]
)
def test_what_is_itself_is_let_through(tmp_path, content):
    (tmp_path / "x").write_bytes(content)
    refuse_stand_in(tmp_path / "x")
    refuse_stand_in(tmp_path / "missing")


READERS = {
    "subspace.safetensors": Subspace.load,
    "moments.safetensors": GradientMoments.load,
    "corpus.jsonl": Corpus.load,
    "eval.json": EvalResult.load,
    "train.jsonl": read_rows,
    "train.csv": read_rows,
    "test.json": read_rows,
    "config.yaml": SPDConfig.read,
    "model.gguf": lambda path: load(str(path)),
    "a directory/model.gguf": lambda path: load(str(path.parent)),
}


@pytest.mark.parametrize("name", READERS)
def test_files_that_are_read_by_name(tmp_path, name):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(POINTER)
    with refused(path, "git lfs pull"):
        READERS[name](path)


@pytest.mark.parametrize(
    "name", ["model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"]
)
def test_files_of_a_model(tiny_llama_dir, tmp_path, name):
    shutil.copytree(tiny_llama_dir, tmp_path / "m")
    (tmp_path / "m" / name).write_text(POINTER)
    for read in (load, load_tokenizer):
        with refused(tmp_path / "m" / name, "git lfs pull"):
            read(str(tmp_path / "m"))


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json"])
def test_files_of_an_adapter(tiny_pair, tmp_path, name):
    make_adapter(tiny_pair.hf, tmp_path / "a")
    (tmp_path / "a" / name).write_text(POINTER)
    with refused(tmp_path / "a" / name, "git lfs pull"):
        check_adapter(tmp_path / "a")
    with refused(tmp_path / "a" / name, "git lfs pull"):
        load(str(tmp_path / "a"))


def test_files_of_a_run(finished_run, tmp_path):
    shutil.copytree(finished_run.path, tmp_path / "r")
    for name in ("corpus.settings.json", "run.json", "config.yaml"):
        (tmp_path / "r" / name).write_text(POINTER)
        with refused(tmp_path / "r" / name, "git lfs pull"):
            {
                "corpus.settings.json": lambda r: r.corpus,
                "run.json": lambda r: r.notes,
                "config.yaml": lambda r: r.config,
            }[name](Run(tmp_path / "r"))
