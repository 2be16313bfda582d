"""To the hub and back, over its own protocol: what arrives is what was sent, and nothing of this machine with it."""

import json
from dataclasses import replace

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

import spd_lens as spd
from spd_lens.models import adapter_digest
from spd_lens.subspaces.findings import write_findings
from spd_lens.subspaces.projection import fold_to
from spd_lens.subspaces.sharing import copy_from_hub, from_hub, push_to_hub, spectrum_svg
from tests.helpers import EXAMPLES, make_adapter, refused
from tests.hub_server import commit_of
from tests.hub_server import hub as served
from tests.stats.test_grading import finding


@pytest.fixture
def hub(monkeypatch, tmp_path):
    from huggingface_hub import constants

    with served() as there:
        monkeypatch.setenv("HF_TOKEN", there.token)
        monkeypatch.setattr(constants, "ENDPOINT", there.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", there.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        yield there


@pytest.fixture(scope="module")
def subspace(tiny_pair):
    found = spd.extract(tiny_pair, EXAMPLES, engine="twin", progress=False).subspace(3)
    return replace(found, provenance={"model": "org/tiny", "task": "gsm8k", "data": {"train.jsonl": "ab"}})


def card(files):
    head, _, text = files["README.md"].decode().removeprefix("---\n").partition("\n---\n")
    return yaml.safe_load(head), text


def test_a_subspace_and_its_card(hub, subspace, tmp_path):
    shown = finding(kind="subspace", digest=subspace.digest())
    address = push_to_hub(subspace.with_findings(shown), "me/arithmetic", licence="apache-2.0")
    files = hub.repositories["me/arithmetic"][-1]
    assert address.endswith(commit_of(files)) and set(files) == {"README.md", "spectrum.svg", "subspace.safetensors"}
    head, text = card(files)
    assert head["base_model"] == "org/tiny" and head["license"] == "apache-2.0" and "spd-lens" in head["tags"]
    assert "Licence of the data: MIT" in text and "`ab`" in text and "(spectrum.svg)" in text
    assert str(shown.difference) in text and f"Grade: **{subspace.with_findings(shown).grade}**" in text
    found = spd.Subspace.load(from_hub("me/arithmetic"))
    assert found.digest() == subspace.digest() and found.provenance == subspace.provenance
    for site in subspace.sites:
        assert torch.equal(found.bases[site], subspace.bases[site])
    kept = copy_from_hub("me/arithmetic", tmp_path / "s.safetensors", revision=commit_of(files))
    assert spd.Subspace.load(kept).digest() == subspace.digest()
    with refused("s.safetensors", "there already"):
        copy_from_hub("me/arithmetic", kept)


def test_an_adapter_loses_the_paths_of_this_machine(hub, tiny_pair, subspace, tmp_path):
    adapter = subspace.to_lora(tiny_pair.hf, tmp_path / "lora")
    (adapter / "training_args.bin").write_bytes(b"a pickle")
    with refused(str(adapter), "path of this machine", "--base-model"):
        push_to_hub(adapter, "me/lora")
    assert "me/lora" not in hub.repositories
    push_to_hub(adapter, "me/lora", base_model="org/tiny", data_licence="CC0")
    files = hub.repositories["me/lora"][-1]
    assert set(files) == {"README.md", "adapter_config.json", "adapter_model.safetensors", "projection.json"}
    assert not any(
        str(tmp_path).encode() in content or tiny_pair.name.encode() in content for content in files.values()
    )
    assert card(files)[0]["base_model"] == "org/tiny" and "computed and not trained" in card(files)[1]
    assert "Licence of the data: CC0" in card(files)[1]
    config = json.loads((from_hub("me/lora") / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "org/tiny"
    assert json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"] != "org/tiny"


def test_a_trained_adapter_carries_the_effect_that_its_run_measured(hub, tiny_pair, tmp_path):
    adapter = make_adapter(tiny_pair.hf, tmp_path / "run" / "adapter")
    write_findings(tmp_path / "run", [shown := finding(kind="adapter", digest=adapter_digest(adapter))])
    push_to_hub(adapter, "me/tuned", base_model="org/tiny")
    text = card(hub.repositories["me/tuned"][-1])[1]
    assert str(shown.difference) in text and "Licence of the data: unknown" in text


def test_a_projected_model_is_an_ordinary_one(hub, tiny_pair, subspace, tmp_path):
    folded = fold_to(tiny_pair.hf, subspace, tmp_path / "folded", tokenizer=tiny_pair.tokenizer)
    push_to_hub(folded, "me/folded")
    files = hub.repositories["me/folded"][-1]
    assert not any(str(tiny_pair.name).encode() in content for content in files.values())
    there = AutoModelForCausalLM.from_pretrained("me/folded", cache_dir=tmp_path / "other")
    wanted = AutoModelForCausalLM.from_pretrained(folded)
    assert all(torch.equal(a, b) for a, b in zip(there.parameters(), wanted.parameters(), strict=True))
    assert spd.detect("me/folded").subspace.ranks == subspace.ranks
    assert copy_from_hub("me/folded", tmp_path / "copy").is_dir() and (tmp_path / "copy" / "config.json").is_file()


def test_what_the_hub_refuses_is_a_sentence(hub, subspace, tmp_path, monkeypatch):
    with refused("me/nothing", "cannot be had from the hub"):
        from_hub("me/nothing")
    push_to_hub(subspace, "me/s")
    with refused("me/s", "'v9'", "cannot be had"):
        from_hub("me/s", revision="v9")
    hub.repositories["me/other"] = [{"README.md": b"x"}]
    with refused("me/other", "no subspace, adapter or model"):
        from_hub("me/other")
    with refused("no/such/name", "cannot be published"):
        push_to_hub(subspace, "no/such/name")
    monkeypatch.setenv("HF_TOKEN", "wrong")
    with refused("me/t", "log in"):
        push_to_hub(subspace, "me/t")
    with refused(str(tmp_path), "RUN/subspace.safetensors"):
        push_to_hub(tmp_path, "me/t")


def test_the_picture_has_a_line_for_each_block_and_is_text_alone(subspace):
    picture = spectrum_svg(subspace)
    assert picture.count("<polyline") == sum(len(ranks) for ranks in subspace.ranks.values())
    assert "nan" not in picture and "<script" not in picture
    assert "<polyline" not in spectrum_svg(subspace.random_like(0))


@pytest.fixture
def keys(tmp_path):
    """Private and public key of a publisher, and the public key of another."""
    pytest.importorskip("model_signing", reason="signatures need the extra 'signing'")
    from cryptography.hazmat.primitives import serialization as forms
    from cryptography.hazmat.primitives.asymmetric import ec

    for name in ("mine", "other"):
        private = ec.generate_private_key(ec.SECP256R1())
        traditional, plain = forms.PrivateFormat.TraditionalOpenSSL, forms.NoEncryption()
        (tmp_path / f"{name}.pem").write_bytes(private.private_bytes(forms.Encoding.PEM, traditional, plain))
        public = private.public_key().public_bytes(forms.Encoding.PEM, forms.PublicFormat.SubjectPublicKeyInfo)
        (tmp_path / f"{name}.pub").write_bytes(public)
    return tmp_path / "mine.pem", tmp_path / "mine.pub", tmp_path / "other.pub"


def test_a_signature_says_who_published_all_of_it(hub, subspace, keys, tmp_path):
    private, public, other = keys
    push_to_hub(subspace, "me/signed", sign_key=private)
    assert "model.sig" in hub.repositories["me/signed"][-1]
    assert spd.Subspace.load(from_hub("me/signed", key=public)).digest() == subspace.digest()
    with pytest.warns(UserWarning, match="signed, but by whom was not checked"):
        from_hub("me/signed")
    with refused("other.pub over the files as they are"):
        from_hub("me/signed", key=other)
    with refused("none.pub is no file"):
        from_hub("me/signed", key=tmp_path / "none.pub")
    push_to_hub(subspace, "me/plain")
    with refused("there is no model.sig"):
        copy_from_hub("me/plain", tmp_path / "plain.safetensors", key=public)
    assert not (tmp_path / "plain.safetensors").exists()
    with refused("nothing can be signed with", "mine.pub"):
        push_to_hub(subspace, "me/plain", sign_key=public)


@pytest.mark.parametrize("change", ["another subspace", "a file more", "a file less", "no signature in it"])
def test_what_was_changed_after_signing_is_refused(hub, subspace, keys, tmp_path, change):
    private, public, _ = keys
    push_to_hub(subspace, "me/signed", sign_key=private)
    files = dict(hub.repositories["me/signed"][-1])
    if change == "another subspace":
        files["subspace.safetensors"] = subspace.random_like(0).save(tmp_path / "x.safetensors").read_bytes()
    elif change == "a file more":
        files["adapter_config.json"] = b"{}"
    elif change == "a file less":
        del files["README.md"]
    else:
        files["model.sig"] = b"{}"
    hub.repositories["me/signed"].append(files)
    with refused("its signature is not that of"):
        from_hub("me/signed", key=public)
