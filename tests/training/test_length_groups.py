"""Steps in passes: none of their sequences is lost, little of them is padding, and memory decides on checkpointing."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from spd_lens.generation.corpus import Corpus, Record
from spd_lens.training import length_groups as passes_module
from spd_lens.training.finetune import finetune
from spd_lens.training.length_groups import needs_checkpointing, passes, split_by_length
from spd_lens.training.rows import collated, token_rows

LENGTHS = [(5, 80, 7, 81, 40, 6), (3,), (9, 9, 9, 9), (1, 2, 3, 4, 5, 6), (100, 10, 55, 54, 11, 99)]


def partitions(items):
    """All ways to put items into groups."""
    if not items:
        yield []
        return
    first, *rest = items
    for smaller in partitions(rest):
        yield [[first], *smaller]
        for i, group in enumerate(smaller):
            yield [*smaller[:i], [first, *group], *smaller[i + 1 :]]


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("pass_cost", [0, 3, 40, 10_000])
def test_no_other_grouping_costs_less(lengths, pass_cost):
    def cost(groups):
        return sum(pass_cost + len(group) * max(lengths[i] for i in group) for group in groups)

    found = split_by_length(lengths, pass_cost)
    assert sorted(i for group in found for i in group) == list(range(len(lengths)))
    assert cost(found) == min(map(cost, partitions(list(range(len(lengths))))))


def test_passes_hold_every_row_and_no_more_padding_than_they_must(monkeypatch):
    monkeypatch.setattr(passes_module, "_PASS_COSTS", {"cpu": 4})
    records = [Record(str(i), "p", "c", (7, 8), tuple(range(10, 10 + n)), "eos") for i, n in enumerate((1, 30, 2, 31))]
    rows = token_rows(records, "completion")
    batch = collated(rows, pad_id=2)
    found = passes(batch)
    assert [part["input_ids"].shape for part in found] == [(2, 33), (2, 4)]
    seen = []
    for part in found:
        for ids, mask, labels in zip(part["input_ids"], part["attention_mask"], part["labels"], strict=True):
            n = int(mask.sum())
            assert (ids[n:] == 2).all()
            assert (labels[n:] == -100).all()
            seen.append({"input_ids": ids[:n].tolist(), "labels": labels[:n].tolist()})
    assert sorted(seen, key=lambda row: len(row["input_ids"])) == [rows[i] for i in (0, 2, 1, 3)]


def test_checkpointing_follows_free_memory(fresh_pair, tmp_path, monkeypatch):
    corpus = Corpus([Record(str(n), "p", "c", (5, 6), tuple(range(10, 10 + n)), "eos") for n in (3, 20, 8)])
    needed = 34 * fresh_pair.n_layers * fresh_pair.fingerprint.d_model * 4 * 2 * 22
    calls = []
    fresh_pair.hf.model.layers[1].input_layernorm.register_forward_hook(
        lambda *_: calls.append(torch.is_grad_enabled()) if torch.is_grad_enabled() else None
    )
    made = []
    for free in (2 * needed + 10**5, 2 * needed):
        monkeypatch.setattr(passes_module, "free_memory", lambda device, free=free: free)
        calls.clear()
        out = finetune(fresh_pair, corpus, out=tmp_path / str(free), lr=1e-3, epochs=1, batch_size=2, progress=False)
        made.append((len(calls), load_file(out / "adapter_model.safetensors")))
    (plain, weights), (recomputed, same) = made
    assert recomputed == 2 * plain > 0
    assert all(torch.equal(weights[name], same[name]) for name in weights)


def test_optimizer_states_count_as_memory(tiny_pair, monkeypatch):
    activations = 34 * tiny_pair.n_layers * tiny_pair.fingerprint.d_model * 4 * 10
    monkeypatch.setattr(passes_module, "free_memory", lambda device: 2 * activations + 1200)
    assert not needs_checkpointing(tiny_pair, 10, n_trained=100)
    assert needs_checkpointing(tiny_pair, 10, n_trained=101)
