"""The loss a chunk at a time, and a whole training, against the same written out plainly."""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

from spd_lens.generation.corpus import Corpus, Record
from spd_lens.models.pair import ModelPair
from spd_lens.training import loss as loss_module
from spd_lens.training.finetune import finetune
from spd_lens.training.loss import IGNORED, NextTokenLoss
from tests.conftest import build_tokenizer, randomise
from tests.helpers import relative_error
from tests.models.zoo import ZOO, build_twin

LENGTHS = (23, 4, 17, 9)
FEW_POSITIONS = 4 * 400 * 5
"""Bytes of the logits of five positions: several chunks in every batch."""


@pytest.fixture(autouse=True)
def several_chunks(monkeypatch):
    monkeypatch.setattr(loss_module, "_CHUNK_BYTES", FEW_POSITIONS)


def a_batch(lengths=LENGTHS, *, prompt=0, seed=0):
    """Padded token ids and labels; with `prompt`, that many tokens of each row are not scored."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(5, 400, (len(lengths), max(lengths)), generator=generator)
    labels = torch.full_like(tokens, IGNORED)
    for row, length in enumerate(lengths):
        tokens[row, length:] = 2
        labels[row, max(1, prompt) : length] = tokens[row, max(1, prompt) : length]
    return tokens, labels


def plain(model, tokens, labels, lengths=LENGTHS):
    """Summed loss and gradients, one unpadded sequence and one token at a time, in float64."""
    wide = copy.deepcopy(model).double()
    if hasattr(wide, "set_experts_implementation"):
        wide.set_experts_implementation("eager")  # grouped products know no float64
    total = torch.zeros((), dtype=torch.float64)
    for row, length in enumerate(lengths):
        log_p = wide(input_ids=tokens[row : row + 1, :length]).logits[0].double().log_softmax(-1)
        for t in range(1, length):
            if labels[row, t] != IGNORED:
                total = total - log_p[t - 1, tokens[row, t]]
    total.backward()
    return total.item(), {name: p.grad for name, p in wide.named_parameters() if p.grad is not None}


def agrees(model, inner, *, prompt=0, known=True):
    """Loss and every gradient within 1e-4 of the plain way's."""
    tokens, labels = a_batch(prompt=prompt)
    expected, gradients = plain(model, tokens, labels)
    next_token_loss = NextTokenLoss(inner)
    assert next_token_loss._tail_is_known is known
    value = next_token_loss(model, tokens, labels)
    value.backward()
    assert value.item() == pytest.approx(expected, rel=1e-5)
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    largest = max(g.norm() for g in gradients.values())
    assert len(found) > 4
    for name, gradient in gradients.items():
        if gradient.norm() > 1e-6 * largest:  # a bias of keys has none but rounding: softmax does not see it
            assert relative_error(found[name].double(), gradient) < 1e-4, name


@pytest.mark.parametrize("name", sorted(ZOO))
def test_loss_and_all_gradients_are_those_of_the_plain_way(name):
    twin = build_twin(name)
    agrees(twin.requires_grad_(True), twin)


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("Gemma2", {"final_logit_softcapping": 2.0, "head_dim": 8, "query_pre_attn_scalar": 8}),
        ("Cohere", {"logit_scale": 0.3}),
        ("Granite", {"logits_scaling": 3.0}),
        ("Llama", {"tie_word_embeddings": True}),
    ],
)
@pytest.mark.parametrize("prompt", [0, 3])
def test_caps_and_scales_of_logits_and_tied_weights(family, options, prompt):
    config = getattr(transformers, f"{family}Config")(
        vocab_size=400, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=64, pad_token_id=2, **options,
    )  # fmt: skip
    twin = randomise(getattr(transformers, f"{family}ForCausalLM")(config))
    tail = loss_module.tail_of(config)
    changed = not torch.allclose(tail(torch.tensor([3.0])), torch.tensor([3.0]))
    assert changed == (family != "Llama")
    agrees(twin.requires_grad_(True), twin, prompt=prompt)


class Squared(LlamaForCausalLM):
    """Does what no configuration says."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = output.logits.square() / 4
        return output


def test_what_no_configuration_says_is_seen_and_left_to_the_model():
    twin = Squared(build_twin("llama").config)
    randomise(twin)
    agrees(twin.requires_grad_(True), twin, known=False)


def test_an_adapter_on_the_unembedding():
    twin = build_twin("llama")
    model = get_peft_model(twin, LoraConfig(r=2, target_modules=["lm_head", "q_proj", "down_proj"]))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(1))
    agrees(model, twin)


def test_no_more_logits_at_once_than_a_chunk(monkeypatch):
    twin, seen = build_twin("llama").requires_grad_(True), []
    tokens, labels = a_batch()
    next_token_loss = NextTokenLoss(twin)
    twin.lm_head.register_forward_hook(lambda module, args, output: seen.append(output.numel() // 400))
    next_token_loss(twin, tokens, labels)
    assert max(seen) == 5
    assert sum(seen) == sum(length - 1 for length in LENGTHS)


def corpus_of(lengths=LENGTHS):
    tokens, _ = a_batch(lengths)
    rows = [tokens[row, :length].tolist() for row, length in enumerate(lengths)]
    return Corpus([Record(str(i), "p", "c", tuple(ids[:2]), tuple(ids[2:]), "length") for i, ids in enumerate(rows)])


def plain_training(model, corpus, *, loss_on, lr, steps):
    """AdamW, cosine to 0, gradients clipped to norm 1; one unpadded sequence after the other; the loss of each step."""
    trained = [p for p in model.parameters() if p.requires_grad]
    still = [p for name, p in model.named_parameters() if p.requires_grad and ("norm" in name or "bias" in name)]
    decaying = [p for p in trained if not any(p is other for other in still)]
    # norms and biases do not decay, as is the custom
    optimizer = torch.optim.AdamW([{"params": decaying}, {"params": still, "weight_decay": 0.0}], lr, weight_decay=0.01)
    losses = []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * (1 + math.cos(math.pi * step / steps)) / 2
        optimizer.zero_grad()
        starts = [len(r.prompt_ids) if loss_on == "completion" else 1 for r in corpus]
        rows = [[*r.prompt_ids, *r.completion_ids] for r in corpus]
        n_scored = sum(len(ids) - start for ids, start in zip(rows, starts, strict=True))
        total = 0.0
        for ids, start in zip(rows, starts, strict=True):
            log_p = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
            loss = -log_p[torch.arange(start - 1, len(ids) - 1), ids[start:]].sum() / n_scored
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        losses.append(total)
    return losses


@pytest.mark.parametrize(
    ("name", "method", "loss_on", "batch_size"),
    [
        ("llama", "lora", "all", 4),
        ("gpt2", "lora", "completion", 2),
        ("gemma2", "lora", "all", 1),
        ("gemma2", "full", "all", 2),
        ("llama", "full", "completion", 2),
    ],
)
def test_a_training_is_the_plain_loop(tmp_path, name, method, loss_on, batch_size):
    # all sequences in every step, in one batch or accumulated: what the seed's order is does not matter
    twin, corpus, lr, epochs = build_twin(name), corpus_of(), 1e-3, 3
    for module in twin.modules():
        if isinstance(module, torch.nn.Dropout):  # GPT-2's own
            module.p = 0.0
    out = finetune(
        ModelPair(copy.deepcopy(twin), build_tokenizer(chat=False)), corpus, out=tmp_path / "out", method=method,
        dropout=0.0, lr=lr, epochs=epochs, batch_size=batch_size, gradient_accumulation=len(corpus) // batch_size,
        loss_on=loss_on, progress=False,
    )  # fmt: skip
    summary = json.loads((out / "training.json").read_text())
    if method == "lora":
        torch.manual_seed(42)  # LoRA's first weights
        config = LoraConfig(r=8, lora_alpha=8, target_modules=summary["settings"]["targets"])
        model = get_peft_model(twin, config)
        made = load_file(out / "adapter_model.safetensors")
    else:
        model = twin.requires_grad_(True)
        made = load_file(out / "model.safetensors")
    before = {key: value.detach().clone() for key, value in model.named_parameters() if value.requires_grad}
    losses = plain_training(model.train(), corpus, loss_on=loss_on, lr=lr, steps=epochs)
    assert [entry["loss"] for entry in summary["log"]] == pytest.approx(losses, rel=1e-4)
    moved = 0
    for key, value in model.named_parameters():
        if value.requires_grad:
            moved += not torch.equal(value, before[key])
            found = made[key.replace(".default", "")]
            # AdamW divides by the gradient's own size, so that where it is nothing but rounding signs may differ
            assert ((found - value).abs() > 1e-2 * lr).float().mean() < 0.02, key
            assert (found - before[key]).abs().max() <= 3.1 * lr + 0.01 * lr
    assert moved == len(before)
