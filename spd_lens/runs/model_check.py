"""`check_model`: does everything that spd_lens relies on hold for this model, here, in this dtype?"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Float
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor
from transformers import GenerationConfig

from spd_lens.errors import SPDError
from spd_lens.examples import Example
from spd_lens.models import (
    CHECK_TEXTS,
    ModelPair,
    Parity,
    dtype_name,
    named_outputs,
    neutrally,
    probe,
    relative_error,
    right_pad,
    run_twin,
    text_ids,
)
from spd_lens.output import visible
from spd_lens.sites import Site
from spd_lens.subspaces import GradientMoments, Subspace, extract, folded, projected, projected_twin

EXAMPLES = (
    Example(
        "Tom has 12 apples and buys 30 more. How many apples does he have now?", "12 + 30 = 42", ((10, 12),), "sum"
    ),
    Example("Which planet is the largest?", "Jupiter.", ((0, 7),), "planet"),
)
"""Two worked examples of unequal length."""

N_NEW_TOKENS = 6

LENGTH = 512
"""Tokens of the text on which lens and twin are compared, where the context holds it."""


@dataclass(frozen=True)
class Check:
    """One line of the report."""

    name: str
    passed: bool | None
    """None for a line that only informs."""
    says: str
    """What was found, with numbers."""


@neutrally
def check_model(pair: ModelPair, layers: str = "last_mid") -> list[Check]:
    """Run every check; a check that cannot run is a failed one that says why.

    The projections are onto random half-rank subspaces per head at the given layers, so nothing needs data.
    """
    pair = pair.with_span_rule("overlap")  # for which the spans of the examples are written
    found = []
    for name, check in _CHECKS.items():
        try:
            passed, says = check(pair, layers)
        except SPDError as error:
            passed, says = False, str(error)
        found.append(Check(name, passed, says))
    return found


@neutrally
def require_core(pair: ModelPair, layers: str | int | Iterable[int], kinds: str | Sequence[str]) -> None:
    """Check what a run relies on, with the twin alone and in about a second. Every run does this first.

    Heads are where the table of architectures says, hooks do what folded weights do, and a gradient reaches every
    site. The lens model is compared with the twin whenever it is built.

    Raises:
        SPDError: one of them does not hold.
    """
    sites = pair.sites(layers, kinds)
    probe(pair.hf, pair.tokenizer, sites)
    subspace = _random(pair, sites)
    with projected_twin(pair.hf, subspace):
        hooked = pair.check_logits(pair.hf)
    with folded(pair.hf, subspace):
        found = Parity.between(pair.check_logits(pair.hf), hooked)
    if not found.within(pair.dtype):
        raise SPDError(
            f"hooks and folded weights disagree for {pair.name} (logits by {found.logits:.2g} of their spread); "
            "use dtype='float32', or report this architecture"
        )
    plain = pair.with_span_rule("overlap")  # for which the spans of the examples are written
    moments = extract(plain, EXAMPLES[:1], layers=layers, kinds=kinds, engine="twin", progress=False, parallel=False)
    if silent := _silent(moments):
        raise SPDError(f"no gradient reaches {', '.join(silent)} in {pair.name}; choose other layers or kinds")


def _shape(pair: ModelPair, layers: str) -> tuple[None, str]:
    f = pair.fingerprint
    return None, (
        f"{type(pair.hf).__name__}: {f.n_layers} layers, {f.n_heads} heads, {f.n_kv_heads} KV heads of {f.d_head}, "
        f"d_model {f.d_model}, context {pair.n_ctx}, {dtype_name(pair.dtype)} on {pair.device}, backend {pair.backend}"
    )


def _tokens(pair: ModelPair, layers: str) -> tuple[bool, str]:
    """Prompts begin with one BOS or none, with the chat template and without."""
    tokenizer = pair.tokenizer
    named = ", ".join(
        f"{name} {getattr(tokenizer, f'{name}_token')!r} ({getattr(tokenizer, f'{name}_token_id')})"
        for name in ("bos", "eos", "pad")
    )
    ids = pair.prompt_ids(EXAMPLES[0])
    bos = tokenizer.bos_token_id
    n_bos = 0 if bos is None else next((i for i, id in enumerate(ids) if id != bos), len(ids))
    adds = (
        "adds BOS to raw text"
        if bos is not None and text_ids(tokenizer, "a")[:1] == [bos]
        else "adds no BOS to raw text"
    )
    return n_bos <= 1, f"{named}; the tokenizer {adds}; {pair.format.name} prompts begin with {n_bos} BOS"


def _spans(pair: ModelPair, layers: str) -> tuple[bool, str]:
    """The scored tokens of an example hold its answer."""
    encoded = pair.encode(EXAMPLES[0])
    answer = EXAMPLES[0].completion[slice(*EXAMPLES[0].spans[0])]
    text = pair.tokenizer.decode([encoded.ids[t] for t in encoded.scored])
    return answer in text, f"the span {answer!r} is the token(s) {text!r} in a {pair.format.name} prompt"


def _lens(pair: ModelPair, layers: str) -> tuple[bool | None, str]:
    """Lens and twin on the same tokens: short texts, and a longer one beyond each window and rope regime."""
    lens = pair.lens_if_any(min(pair.n_ctx, LENGTH))
    if lens is None:
        return None, f"no lens model of {type(pair.hf).__name__} agrees with the twin, which works alone"
    passed, says = _compared(pair, pair.check_logits(pair.hf), pair.check_logits(lens))
    return passed, f"{says}; as near on texts of up to {pair.proven_length} tokens ({pair.backend})"


def _hook(pair: ModelPair, layers: str) -> tuple[bool, str]:
    """Hooks on the lens model, or where there is none on the twin, against folded weights of the twin."""
    subspace = _random(pair, pair.sites(layers))
    plain = pair.check_logits(pair.hf)
    lens = pair.lens_if_any(0)
    if lens is None:
        with projected_twin(pair.hf, subspace):
            hooked = pair.check_logits(pair.hf)
        with folded(pair.hf, subspace):
            return _compared(pair, pair.check_logits(pair.hf), hooked)
    with projected(lens, subspace) as projection:
        hooked = pair.check_logits(lens)
    with folded(pair.hf, subspace):
        in_weights = pair.check_logits(pair.hf)
    effect = Parity.between(plain, in_weights)
    passed, says = _compared(pair, in_weights, hooked)
    fired = set(projection.firings.values()) == {1}
    acts = effect.kl > 0 and not torch.equal(plain, in_weights)
    return (
        passed and fired and acts,
        f"{says}; each hook fired once; the projection's own effect is a KL of {effect.kl:.2g}",
    )


def _heads(pair: ModelPair, layers: str) -> tuple[bool, str]:
    """Heads as the table of architectures has them, against the model's own cache of keys and values."""
    found = probe(pair.hf, pair.tokenizer, pair.sites("all"))
    return True, f"keys and values of all {pair.n_layers} layers within {max(found.values()):.2g} of the cached ones"


def _gradients(pair: ModelPair, layers: str) -> tuple[bool, str]:
    """Every site gets a gradient, the same on lens and twin."""
    twin = extract(pair, EXAMPLES, layers="all", engine="twin", progress=False, parallel=False)
    if silent := _silent(twin):
        return False, f"no gradient reaches {', '.join(silent)}"
    if pair.lens_if_any(0) is None:
        return True, f"all {len(twin.sites)} sites of the twin"
    lens = extract(pair, EXAMPLES, layers="all", engine="lens", progress=False, parallel=False)
    errors = [relative_error(lens.gradient[site].sum(0), twin.gradient[site].sum(0)) for site in twin.sites]
    says = f"all {len(twin.sites)} sites; lens and twin differ by up to {max(errors):.2g} of the moments' norm"
    return max(errors) <= MOMENTS_TOLERANCE[pair.dtype], says


def _right(pair: ModelPair, layers: str) -> tuple[bool, str]:
    """Compare right-padded rows with the same rows alone."""
    rows = [text_ids(pair.tokenizer, text) for text in CHECK_TEXTS]
    alone = torch.cat([_logits(pair, [row]) for row in rows])
    return _compared(pair, alone, _logits(pair, rows))


def _cached(pair: ModelPair, layers: str) -> tuple[bool, str]:
    """Compare left-padded, cached generation under the projection with the same tokens alone and without a cache."""
    rows = [pair.prompt_ids(example) for example in EXAMPLES]
    longest = max(map(len, rows))
    tokens = torch.tensor([[pair.pad_id] * (longest - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    with folded(pair.hf, _random(pair, pair.sites(layers))), named_outputs(pair.hf), torch.no_grad():
        twin: Any = copy.copy(pair.hf)  # a view without the model's own settings, such as another kind of cache
        twin.generation_config = GenerationConfig(do_sample=False, use_cache=True, pad_token_id=pair.pad_id)
        made: Any = twin.generate(
            input_ids=tokens.to(pair.device), attention_mask=mask.to(pair.device), max_new_tokens=N_NEW_TOKENS,
            return_dict_in_generate=True, output_logits=True,
        )  # fmt: skip
        stepwise = torch.stack(made.logits, dim=1).double().cpu()
        whole = []
        for i, row in enumerate(rows):
            full = _logits(pair, [row + made.sequences[i, longest:].tolist()])
            whole.append(full[len(row) - 1 : -1])
    return _compared(pair, torch.stack(whole), stepwise)


def _compared(pair: ModelPair, reference: Tensor, found: Tensor) -> tuple[bool, str]:
    parity = Parity.between(reference, found)
    return parity.within(pair.dtype), f"logits within {parity.logits:.2g} of their spread, KL {parity.kl:.2g} nats"


@torch.no_grad()
def _logits(pair: ModelPair, rows: list[list[int]]) -> Float[Tensor, "token d_vocab"]:
    tokens, mask = right_pad(rows, pair.pad_id, pair.device)
    logits = run_twin(pair.hf, tokens, attention_mask=mask, use_cache=False).logits
    return logits[mask.bool()].double().cpu()


def _random(pair: ModelPair, sites: list[Site]) -> Subspace:
    shape = {}
    for site in sites:
        n_heads, d_head = pair.fingerprint.heads_at(site)
        shape[site] = [torch.zeros(d_head, max(d_head // 2, 1), dtype=torch.float64)] * n_heads
    return Subspace.from_blocks(shape, fingerprint=pair.fingerprint).random_like(0)


def _silent(moments: GradientMoments) -> list[str]:
    return [str(site) for site in moments.sites if not moments.gradient[site].sum(0).trace() > 0]


# Largest relative difference of gradient moments between two engines. Seen: 3e-6 in float32, 0.06 in bfloat16.
MOMENTS_TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-3, torch.float16: 0.1, torch.bfloat16: 0.5}

_CHECKS: dict[str, Callable[[ModelPair, str], tuple[bool | None, str]]] = {
    "model": _shape,
    "special tokens": _tokens,
    "answer spans": _spans,
    "lens = twin": _lens,
    "heads = cache": _heads,
    "hook = fold": _hook,
    "gradients": _gradients,
    "batched = single": _right,
    "cached, left-padded = whole": _cached,
}


def tokens_of(pair: ModelPair, prompt: str) -> list[tuple[int, int, str]]:
    """Position, id and text of each token that a prompt becomes, template and special tokens included."""
    return [(n, id, pair.tokenizer.decode([id])) for n, id in enumerate(pair.prompt_ids(Example(prompt)))]


def print_report(pair: ModelPair, console: Console, *, as_json: bool = False, prompt: str | None = None) -> bool:
    """Print all checks and, of a prompt, its tokens; whether every check passed."""
    checks = check_model(pair)
    passed = all(check.passed is not False for check in checks)
    tokens = [] if prompt is None else tokens_of(pair, prompt)
    if as_json:
        record = {"model": pair.name, "passed": passed, "checks": [asdict(check) for check in checks]}
        if prompt is not None:
            record["tokens"] = [{"position": n, "id": id, "text": text} for n, id, text in tokens]
        text = json.dumps(record, ensure_ascii=not console.encoding.startswith("utf"))
        console.print(text, highlight=False, markup=False)
        return passed
    table = Table(title=Text(f"check of {pair.name}"))
    for column in ("", "check", "found"):
        table.add_column(column)
    for check in checks:
        mark = {True: Text("ok", "green"), False: Text("FAILED", "bold red"), None: Text("-")}[check.passed]
        table.add_row(mark, check.name, Text(check.says))
    console.print(table)
    for n, id, text in tokens:
        console.print(Text(f"{n:5d} {id:7d}  {visible(text)!r}"))
    return passed
