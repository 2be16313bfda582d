"""What several tests share: the method written out plainly, adapters with an effect, and how a refusal must look."""

from __future__ import annotations

import contextlib
import copy
import os
import re
import signal
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm

from spd_lens.errors import SPDError
from spd_lens.examples import Example

EXAMPLES = [
    Example("Tom has 12 apples and buys 30 more.", "12 + 30 = 42. The answer is 42.", [(28, 30)], "apples"),
    Example("7 * 3", "21", [(0, 2)], "short"),
    Example(
        "A baker sells 7 loaves at 3 dollars each. How much money does she make?",
        "7 * 3 = 21 dollars.\n#### 21",
        [(8, 10), (25, 27)],
        "baker",
    ),
    Example("def add(a, b):", "    return a + b\n\nassert add(2, 3) == 5", [(38, 39)], "code"),
    Example("Which planet is the largest?", "Answer: C", [(8, 9)], "planet"),
    Example("Sara reads 15 pages a day, how many in 4 days? été €", "15 * 4 = 60 €", [(9, 13)], "pages"),
]
"""Of unequal length; some with several spans or characters of several bytes."""

LONG_EXAMPLE = Example("Tom has 12 apples and buys 30 more. " * 10, "12 + 30 = 42 and 7", [(10, 12), (17, 18)], "long")
"""Of 170 tokens in the tests' tokenizer: many times the windows of the tests' models."""


@contextlib.contextmanager
def norms_in_full_precision():
    """transformers computes RMS norms in float32 even for a float64 model; derivatives need the real thing."""

    def forward(self, x):
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LlamaRMSNorm, "forward", forward)
        patch.setattr(Qwen2RMSNorm, "forward", forward)
        yield


ALL_KINDS = ("k", "v", "q", "z", "resid")


def hook_at(hf, site, function):
    """Let `function` see, and unless it returns None replace, a site's activation in the twin, all heads side by side.

    Written out per kind, and independent of the library's own.
    """
    layer = hf.model.layers[site.layer]
    if site.kind == "z":
        return layer.self_attn.o_proj.register_forward_pre_hook(lambda _module, args: function(args[0]))
    modules = {"k": layer.self_attn.k_proj, "v": layer.self_attn.v_proj, "q": layer.self_attn.q_proj, "resid": layer}
    return modules[site.kind].register_forward_hook(lambda _module, _args, output: function(output))


def reference_rows(hf, encoded, sites):
    """Gradients and activations of every token, and each example's loss: Eq. 6-8, one example at a time, in float64.

    Returns `{site: [token, width]}` twice and a list of losses in nats.
    """
    wide = copy.deepcopy(hf).double()
    gradients, activations = {site: [] for site in sites}, {site: [] for site in sites}
    losses = []
    for e in encoded:
        outputs = {}

        def keep(site, outputs=outputs):
            return lambda activation: outputs.__setitem__(site, activation)

        with contextlib.ExitStack() as stack:
            stack.enter_context(norms_in_full_precision())
            for site in sites:
                stack.callback(hook_at(wide, site, keep(site)).remove)
            embeddings = wide.get_input_embeddings()(torch.tensor([e.ids])).detach().requires_grad_()
            log_p = wide(inputs_embeds=embeddings, use_cache=False).logits[0].log_softmax(dim=-1)
        loss = -sum(log_p[t - 1, e.ids[t]] for t in e.scored) / len(e.scored)
        grads = torch.autograd.grad(loss, [outputs[site] for site in sites])
        losses.append(loss.item())
        for site, g in zip(sites, grads, strict=True):
            gradients[site].append(g[0])
            activations[site].append(outputs[site][0].detach())
    stack_rows = {site: torch.cat(rows) for site, rows in gradients.items()}
    return stack_rows, {site: torch.cat(rows) for site, rows in activations.items()}, losses


def relative_error(value, reference):
    """Frobenius norm of the difference over that of the reference."""
    return ((value - reference).norm() / reference.norm()).item()


def sine(basis, reference_basis):
    """Sine of the largest principal angle between the column spaces: norm of (I - P_ref) V."""
    rest = basis - reference_basis @ (reference_basis.T @ basis)
    return torch.linalg.matrix_norm(rest, 2).item()


def make_adapter(hf, directory, *, std=0.1, seed=0, r=2, targets=("q_proj", "k_proj", "v_proj", "o_proj")):
    """A LoRA adapter with random A and B (PEFT itself starts with B = 0, an adapter without effect)."""
    model = get_peft_model(copy.deepcopy(hf).float(), LoraConfig(r=r, lora_alpha=2 * r, target_modules=list(targets)))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(std * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(directory, save_embedding_layers=False)
    return directory


def save_adapter(hf, directory, config, *, std=0.15, seed=0, embeddings=0.0):
    """An adapter of any of PEFT's kinds, all that it trains moved at random, saved as PEFT does. Returns PEFT's model.

    `embeddings`: move the embeddings by so much, too, and save them with it, as for new tokens.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = get_peft_model(copy.deepcopy(hf), config)
    with torch.no_grad():
        moved = [(weight, std) for weight in model.parameters() if weight.requires_grad]
        if embeddings:
            moved.append((model.get_input_embeddings().weight, embeddings))
        for weight, size in moved:
            weight.add_(size * torch.randn(weight.shape, generator=generator))
    model.save_pretrained(directory, save_embedding_layers=bool(embeddings))
    return model.eval()


def assert_same_bits(model, state):
    """The model's parameters and buffers are bit for bit those of `state`, no more and no fewer."""
    now = model.state_dict()
    assert now.keys() == state.keys()
    changed = [name for name in state if not torch.equal(now[name], state[name])]
    assert not changed


def killed_once_there(processes, out, pattern, function, *args, **kwargs):
    """Run a function in a process of its own that is killed by the operation which puts a file of `pattern` into `out`.

    No clock and no polling: a machine's speed has no part in where it ends.
    """
    process = processes.Process(target=_until_there, args=(out, pattern, function, args, kwargs))
    process.start()
    process.join(timeout=250)
    process.kill()  # where it hangs
    process.join()
    assert process.exitcode == -signal.SIGKILL and there(out, pattern), pattern


def _until_there(out, pattern, function, args, kwargs):
    signal_once_there(out, pattern, signal.SIGKILL)
    function(*args, **kwargs)


def signal_once_there(out, pattern, number):
    """From now on this process sends itself a signal, once, when a file operation of its own has made `there` true."""
    sent = []

    def look():
        if not sent and there(out, pattern):
            sent.append(number)
            os.kill(os.getpid(), number)

    def watched(operation):
        def call(*args, **kwargs):
            look()  # a file written by other means may be gone after this
            done = operation(*args, **kwargs)
            look()
            return done

        return call

    for name in ("open", "fsync", "replace", "rename", "mkdir", "unlink", "rmdir"):
        setattr(os, name, watched(getattr(os, name)))


def there(out, pattern):
    """Whether a file or folder of the pattern is in `out`; one of lines has at least one."""
    return any(path.suffix != ".jsonl" or b"\n" in path.read_bytes() for path in Path(out).glob(pattern))


@contextlib.contextmanager
def refused(*words, kind=SPDError):
    """An SPDError of one short paragraph that contains all of `words`, the offending value among them."""
    with pytest.raises(kind) as caught:
        yield
    message = str(caught.value)
    missing = [word for word in map(str, words) if word not in message]
    assert not missing, f"{missing} not in: {message}"
    assert "\n" not in message
    assert len(message) < 700


def greedy(logits_of, ids, n):
    """Greedy tokens with the whole sequence run anew for each: no cache that could hide a mistake."""
    tokens = torch.tensor([ids])
    for _ in range(n):
        with torch.no_grad():
            logits = logits_of(tokens)
        tokens = torch.cat([tokens, logits[:, -1].argmax(dim=-1, keepdim=True)], dim=1)
    return tokens[0, len(ids) :].tolist()


def publish(monkeypatch, numbers):
    """Let nothing be published but `numbers`: by model and task, the values and the format of each."""
    module = sys.modules["spd_lens.evaluation.published"]  # the face has the function of this name
    rows = {
        key: [module.Baseline(*key, value, form, f"source {i}") for i, (value, form) in enumerate(values)]
        for key, values in numbers.items()
    }
    monkeypatch.setattr(module, "_table", lambda: (rows, {module._plain(model): model for model, _ in rows}))


def without_sums(path: Path) -> list[str]:
    """The lines of a corpus in any order, without their running sums, which depend on it."""
    return sorted(re.sub(r', "sum": "[0-9a-f]+"}$', "}", line) for line in path.read_text().splitlines())
