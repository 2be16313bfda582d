"""What the library computes on an accelerator is what it computes on the CPU, and every tensor is there.

The accelerator is `tests/fake_device.py`, where an operation on tensors of two devices raises. Each path below runs on
both devices, and its results are compared.
"""

from __future__ import annotations

import dataclasses
import shutil
from functools import partial
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import spd_lens as spd
from spd_lens import estimators
from spd_lens.analysis.common.subject import Subject
from spd_lens.analysis.dashboard.playground import Ask, Playground
from spd_lens.analysis.directions.command import read_directions
from spd_lens.analysis.distilled.absorption import absorption
from spd_lens.analysis.distilled.drift import moments_after
from spd_lens.analysis.heads.ablation import head_effects
from spd_lens.analysis.heads.attention import attention_of
from spd_lens.analysis.sweeps.engine import sweep
from spd_lens.analysis.sweeps.grid import Grid
from spd_lens.analysis.tokens.command import token_energy
from spd_lens.evaluation.choices import most_likely
from spd_lens.evaluation.matching import at_equal_kl
from spd_lens.evaluation.skip_layers import exact_starts
from spd_lens.evaluation.teacher_forced import teacher_forced
from spd_lens.files import read_json
from spd_lens.generation import slots
from spd_lens.generation.engines import plain_batch
from spd_lens.generation.jobs import Decoding
from spd_lens.generation.slots import Slots
from spd_lens.models.attention import attention_received
from spd_lens.models.fingerprint import weights_digest
from spd_lens.runs.model_check import check_model
from spd_lens.runs.rounds import merged
from spd_lens.settings import Extraction
from spd_lens.subspaces.policy import Policy
from tests.fake_device import fake_device
from tests.generation.test_slots import GREEDY, HOT, by_id, jobs_of
from tests.helpers import EXAMPLES, make_adapter

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a real accelerator is here: tests/test_cuda.py")

SOME = EXAMPLES[:4]
PROMPTS = ["Tom has 12 apples.", "def add(a, b):", "7 * 3"]
PATHS = {}


def path(function):
    """A function of a model pair and of what was made before, whose result must not depend on the device."""
    PATHS[function.__name__] = function
    return function


@pytest.fixture(scope="module")
def device():
    with fake_device() as name:
        yield name


@pytest.fixture(scope="module")
def there(tiny_llama_dir, device):
    return spd.load(str(tiny_llama_dir), dtype="float32", device=device)


@pytest.fixture(scope="module")
def made(tiny_pair, tmp_path_factory):
    moments = spd.extract(tiny_pair, SOME, layers="all", engine="twin", progress=False)
    subspace = moments.subspace(rank=0.5)
    corpus = spd.generate(tiny_pair, PROMPTS, subspace=subspace, max_new_tokens=6, temperature=1.0, progress=False)
    adapter = make_adapter(tiny_pair.hf, tmp_path_factory.mktemp("adapter"))
    return {"moments": moments, "subspace": subspace, "corpus": corpus, "adapter": adapter}


def assert_same(found, wanted):
    """Equal, but for the rounding of tensors, columns and numbers: 1e-3 of their norm."""
    if dataclasses.is_dataclass(found):
        found, wanted = vars(found), vars(wanted)
    if isinstance(found, pd.DataFrame):
        found, wanted = found.to_dict("list"), wanted.to_dict("list")
    if isinstance(found, dict):
        assert found.keys() == wanted.keys()
        for key, own in found.items():
            assert_same(own, wanted[key])
    elif isinstance(found, list | tuple) and not all(isinstance(x, float) for x in found):
        assert len(found) == len(wanted)
        for own, other in zip(found, wanted, strict=True):
            assert_same(own, other)
    elif isinstance(found, Tensor | float | list | tuple):
        one, other = (torch.as_tensor(x).detach().cpu().double().nan_to_num(12345.0) for x in (found, wanted))
        assert (one - other).norm() <= 1e-3 * other.norm() + 1e-6
    else:
        assert found == wanted


@path
def lens(pair, made):
    pair.check()
    return pair.check_logits(pair.lens)


def extraction(pair, made, **how):
    found = spd.extract(pair, SOME, progress=False, **how)
    return [found.gradient, found.activation]


for engine in ("twin", "lens"):
    PATHS[f"extraction_on_the_{engine}"] = partial(extraction, engine=engine)
    PATHS[f"all_kinds_on_the_{engine}"] = partial(extraction, engine=engine, layers=[1], kinds=["q", "z", "resid"])
PATHS["extraction_with_everything"] = partial(
    extraction, engine="twin", keep=["classes", "cross"], sinks="attended", labels="sampled", seed=1
)


@path
def hooks_on_the_lens(pair, made):
    with spd.projected(pair.lens, made.subspace, strength=0.5):
        return pair.check_logits(pair.lens)


@path
def hooks_around_the_mean(pair, made):
    with Policy("p", made.moments.subspace(rank=4, center=True)).applied(pair) as model:
        return pair.check_logits(model)


@path
def folded(pair, made):
    with spd.folded(pair.hf, made.subspace):
        return pair.check_logits(pair.hf)


@path
def exported(pair, made):
    spd.fold_to(pair.hf, made.subspace, made.folder)
    return load_file(made.folder / "model.safetensors")


def generation(pair, made, **how):
    found = spd.generate(pair, PROMPTS, subspace=made.subspace, max_new_tokens=5, progress=False, **how)
    return [record.completion_ids for record in found]


for engine in ("twin", "lens"):
    for temperature in (0.0, 1.0):
        PATHS[f"generation_on_the_{engine}_at_{temperature}"] = partial(
            generation, engine=engine, temperature=temperature, top_p=0.9
        )


@path
def slots_as_on_cuda(pair, made):
    """The way that CUDA takes, all but the graphs: rows in powers of two, other lengths, no inference mode."""
    own = Slots(pair.hf, Decoding(HOT, 0, 6, ()), 3)
    own._on = "cuda"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(slots, "CudaGraphs", lambda function: function)
        return by_id(own.run(jobs_of(pair, [3, 30, 11, 19, 7], prefix=64)))


@path
def a_plain_batch(pair, made):
    return plain_batch(pair, Decoding(GREEDY, 0, 5, ()), jobs_of(pair, [3, 9]))


@path
def teacher_forcing(pair, made):
    policies = [Policy("base"), Policy("p", made.subspace), Policy("a", adapter=made.adapter)]
    assert exact_starts(pair, {1, 3}) == {1, 3}
    return teacher_forced(pair, SOME, policies, progress=False)


@path
def evaluation(pair, made):
    task = spd.tasks.get("synthetic-qa", max_new_tokens=4)
    return [vars(item) for item in spd.evaluate(pair, task, 2, made.subspace, progress=False).items]


@path
def choices(pair, made):
    task = spd.tasks.get("synthetic-qa")
    items = task.test(3)
    return most_likely(pair, items, {item.id: task.choices(item) for item in items}, Policy("p", made.subspace))


@path
def equal_kl(pair, made):
    return at_equal_kl(pair, made.subspace, SOME[:2], 0.05, tolerance=0.3).strength


@path
def attention_rests(pair, made):
    return attention_received(pair.hf, pair.encode(SOME[0]).ids, [0, 2])


@path
def training(pair, made):
    places = set()
    watched = pair.hf.get_input_embeddings().register_forward_pre_hook(lambda _, args: places.add(args[0].device))
    # no dropout: how a batch is divided, and so which noise it gets, goes by the kind of device
    spd.finetune(pair, made.corpus, out=made.folder, epochs=2, lr=0.01, batch_size=2, dropout=0.0, progress=False)
    watched.remove()
    assert places == {pair.device}
    return [[entry["loss"], entry["grad_norm"]] for entry in read_json(made.folder / "training.json")["log"]]


@path
def sync(pair, made):
    pair.sync(to="lens", adapter=made.adapter)
    tuned = pair.check_logits(pair.lens)
    pair.sync(to="lens")
    return [tuned, pair.check_logits(pair.lens)]


@path
def sync_to_the_twin(pair, made):
    pair.check()
    pair.sync(to="twin")
    return pair.check_logits(pair.hf)


@path
def merging(pair, made):
    other = merged(pair, made.adapter)
    assert other.device == pair.device
    return other.check_logits(other.hf)


@path
def checks_of_the_model(pair, made):
    found = check_model(pair)
    assert all(check.passed is not False for check in found), found
    return [check.name for check in found]


@path
def digest_and_fingerprint(pair, made):
    return [weights_digest(pair.hf), pair.fingerprint.to_dict()]


def estimated(pair, made, name):
    source = estimators.Calibration(pair, SOME, seed=3, settings=Extraction(engine="twin"))
    found = estimators.get(name).subspace(source, estimators.Shape(rank=4))
    return {site: found.projector(site) for site in found.sites}


for name in ("attribution-contrast", "fisher", "whitened", "no-sink", "learned", "random"):
    PATHS[f"estimator_{name}"] = partial(estimated, name=name)


@path
def gradients_after_training(pair, made):
    return moments_after(pair, made.adapter, SOME, progress=False).gradient


@path
def absorbed(pair, made):
    return absorption(pair, SOME, made.subspace, made.adapter, n_random=1, progress=False)


@path
def a_sweep(pair, made):
    return sweep(pair, made.moments, SOME, Grid(ranks=[4], layers=["3"], n_random=3), progress=False).table()


@path
def heads(pair, made):
    return head_effects(pair, SOME, made.subspace.select(made.subspace.sites[:1]), progress=False)


@path
def attention_patterns(pair, made):
    return attention_of(pair, SOME).gradient


@path
def directions(pair, made):
    measures, tokens = read_directions(pair, SOME, made.moments, n=2, n_random=3, layers=[1], progress=False)
    return [measures, tokens["token"].tolist()]


@path
def tokens(pair, made):
    return token_energy(pair, SOME, made.subspace, progress=False)


@path
def playground(pair, made):
    shutil.copytree(made.request.getfixturevalue("finished_run").path, made.folder)
    answers = Playground(Subject(made.folder, pair=pair, progress=False))
    asked = Ask(PROMPTS[0], layers=[1, 3], kinds=["k", "v"], rank=3, max_new_tokens=4, also=["random", "spd"])
    return [[said.text, said.kl, said.probabilities] for said in answers.answer(asked).said]


@pytest.mark.parametrize("name", PATHS)
def test_the_same_on_both_devices(name, there, tiny_pair, made, tmp_path, request):
    found = []
    for pair in (there, tiny_pair):
        own = SimpleNamespace(**made, folder=tmp_path / pair.device.type, request=request)
        found.append(PATHS[name](pair, own))
        placed = [x for model in pair.models for x in (*model.parameters(), *model.buffers())]
        assert all(x.device == pair.device for x in placed)
    assert_same(*found)


def test_devices_do_not_mix(device):
    here, there = torch.arange(6.0), torch.arange(6.0, device=device)
    assert str(there.device) == f"{device}:0" and torch.tensor([1.0], device=device).device == there.device
    for mixed in (
        lambda: here + there, lambda: there.add_(here), lambda: torch.cat([there, here]), lambda: here[there.long()],
        lambda: torch.stack([there[0], here[0]]), lambda: here[0].add_(there[0]), lambda: there.numpy(),
        lambda: torch.nn.functional.linear(there, torch.ones(2, 6)),
    ):  # fmt: skip
        with pytest.raises((RuntimeError, TypeError), match="same device|can't convert"):
            mixed()
    there[:2] = here[4:]  # a copy, a number, and an index may come from the CPU
    there *= torch.tensor(2.0)
    assert there[torch.tensor([0, 5])].tolist() == [8.0, 10.0] and here.tolist() == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]
