"""A subspace carries its findings and shows its grade; findings that are not of it, or no longer stored, are none."""

from __future__ import annotations

import copy
import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch

from spd_lens.files import load_tensors, save_tensors
from spd_lens.models import adapter_digest
from spd_lens.models.fingerprint import Fingerprint
from spd_lens.sites import Site
from spd_lens.stats import Finding
from spd_lens.subspaces import Subspace, adapter_grade, random_basis, read_findings, write_findings
from tests.helpers import make_adapter, refused

SITE = Site(1, "k")


def drawn(seed: int = 0) -> Subspace:
    """A random subspace of two blocks."""
    generator = torch.Generator().manual_seed(seed)
    return Subspace.from_blocks({SITE: [random_basis(8, 4, generator) for _ in range(2)]})


def found_with(subspace: Subspace, **changes: Any) -> Finding:
    """A gain on held-out items that was measured under a subspace."""
    about: dict[str, Any] = {
        "kind": "subspace", "digest": subspace.digest(), "method": "spd", "outcome": "aligned_loss", "task": "gsm8k",
        "data": "held-out", "against": "base", "model": "one", "fingerprint": "1" * 16, "seed": 1, "kl": 0.1,
        "sources": {"effects/gsm8k.json": "0" * 64}, **changes,
    }  # fmt: skip
    return Finding.paired([1.0, 1.1, 0.9, 1.0] * 5, [0.8, 1.0, 0.7, 0.7] * 5, **about)


def test_the_grade_is_shown_and_saved(tmp_path: Path) -> None:
    subspace = drawn()
    assert repr(subspace).endswith("grade: none)")
    graded = subspace.with_findings(found_with(subspace), found_with(drawn(1)))
    assert repr(graded).endswith("grade: held out)")
    again = Subspace.load(graded.save(tmp_path / "subspace.safetensors"))
    assert (again.findings, str(again.grade), again.digest()) == (graded.findings, "held out", subspace.digest())
    assert graded.with_findings(*graded.findings).findings == graded.findings


def test_a_file_without_findings_has_the_bytes_that_it_had(tmp_path: Path) -> None:
    one, two = drawn().save(tmp_path / "one"), drawn().with_findings().save(tmp_path / "two")
    assert one.read_bytes() == two.read_bytes()
    assert b"findings" not in one.read_bytes()


def test_what_is_made_of_a_subspace_has_no_findings() -> None:
    subspace = drawn()
    graded = subspace.with_findings(found_with(subspace))
    made = [graded[:2], graded.truncate(4), graded.select([SITE]), graded.random_like(0), ~graded]
    made += [graded | drawn(1), drawn(1) & graded]
    assert [one.findings for one in made] == [()] * len(made)


def test_findings_of_another_subspace_do_not_count() -> None:
    assert str(drawn(1).with_findings(found_with(drawn(0))).grade) == "none"


def test_a_grade_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(AttributeError):
        drawn().grade = "replicated over models"  # type: ignore[misc, assignment]
    with pytest.raises(TypeError):
        Subspace.from_blocks({SITE: drawn().blocks(SITE)}, grade="held out")
    path = drawn().save(tmp_path / "subspace.safetensors")
    tensors, header = load_tensors(path, "a subspace")
    save_tensors(path, "a subspace", tensors, {**header, "grade": "held out"})
    assert str(Subspace.load(path).grade) == "none"
    typed = {**found_with(drawn()).to_dict(), "grade": "replicated over models"}
    save_tensors(path, "a subspace", tensors, {**header, "findings": [typed]})
    with refused("a finding cannot be read", "grade"):
        Subspace.load(path)


def stored_beside(folder: Path, finding: Finding, text: str = "[1, 2]") -> Finding:
    """The same finding with a stored result that is there, in `findings.json`."""
    (folder / "effects").mkdir(exist_ok=True)
    (folder / "effects/gsm8k.json").write_text(text)
    sources = {"effects/gsm8k.json": hashlib.sha256(text.encode()).hexdigest()}
    real = Finding.from_dict({**finding.to_dict(), "sources": sources})
    write_findings(folder, [real])
    return real


def test_findings_are_read_from_the_folder_or_that_of_the_study(tmp_path: Path) -> None:
    cell = tmp_path / "gsm8k/spd/42"
    cell.mkdir(parents=True)
    path = drawn().save(cell / "subspace.safetensors")
    finding = stored_beside(tmp_path, found_with(drawn()))
    assert Subspace.load(path).findings == (finding,)
    assert drawn().digest() == Subspace.load(path).digest()
    deep = tmp_path / "a/b/c/d/subspace.safetensors"
    deep.parent.mkdir(parents=True)
    assert Subspace.load(drawn().save(deep)).findings == ()
    write_findings(cell, [])  # nearer
    assert Subspace.load(path).findings == ()


def test_a_finding_whose_stored_result_has_changed_is_none(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = drawn().save(tmp_path / "subspace.safetensors")
    stored_beside(tmp_path, found_with(drawn()))
    assert str(Subspace.load(path).grade) == "held out"
    saved = Subspace.load(path).save(tmp_path / "copy.safetensors")
    (tmp_path / "effects/gsm8k.json").write_text("[1, 3]")
    assert read_findings(tmp_path) == ()
    assert str(Subspace.load(path).grade) == str(Subspace.load(saved).grade) == "none"
    assert "effects/gsm8k.json is not what aligned_loss was computed from" in caplog.text
    (tmp_path / "effects/gsm8k.json").unlink()  # a subspace that was handed on without the run
    assert str(Subspace.load(saved).grade) == "held out"


NONSENSE = ["", "[]", "{", '{"findings": []}', '{"kind": "findings of spd_lens", "findings": [{"kind": "subspace"}]}',
            '{"kind": "findings of spd_lens", "findings": 3}', "[" * 5000]  # fmt: skip


@pytest.mark.parametrize("text", NONSENSE)
def test_a_foreign_file_of_that_name_is_one_sentence_and_no_obstacle(
    text: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "findings.json").write_text(text)
    with refused("findings.json"):
        read_findings(tmp_path)
    assert Subspace.load(drawn().save(tmp_path / "subspace.safetensors")).findings == ()
    assert "no evidence: " in caplog.text


def test_an_adapter_has_the_grade_that_findings_beside_it_carry(tmp_path: Path, tiny_pair: Any) -> None:
    adapter = make_adapter(tiny_pair.hf, tmp_path / "adapter")
    assert str(adapter_grade(adapter)) == "none"
    stored_beside(tmp_path, found_with(drawn(), kind="adapter", digest=adapter_digest(adapter)))
    assert str(adapter_grade(adapter)) == "held out"
    make_adapter(tiny_pair.hf, adapter, seed=1)
    assert str(adapter_grade(adapter)) == "none"


def test_the_digest_of_a_model_is_the_same_in_every_dtype(tiny_pair: Any, tiny_qwen2_pair: Any) -> None:
    digest = Fingerprint.of(tiny_pair.hf).digest()
    assert Fingerprint.of(copy.deepcopy(tiny_pair.hf).bfloat16()).digest() == digest
    assert Fingerprint.of(tiny_pair.lens).digest() == digest
    assert Fingerprint.of(tiny_qwen2_pair.hf).digest() != digest
    assert len(digest) == 16
