"""What runs otherwise on CUDA: graphs of decoding steps, and the same numbers as on the CPU."""

from __future__ import annotations

import pytest
import torch

import spd_lens as spd
from spd_lens.generation.cuda_graphs import CudaGraphs
from spd_lens.generation.jobs import Decoding
from spd_lens.generation.slots import Slots
from spd_lens.models.architectures import takes_slots
from spd_lens.models.pair import ModelPair
from tests.conftest import build_tokenizer
from tests.generation.test_slots import GREEDY, by_id, jobs_of, recomputed
from tests.models.zoo import ZOO, build_twin

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

AS_IT_IS = ("mixtral", "qwen2_moe", "qwen3_moe", "falcon, groups", "falcon, one KV head")
"""Ask for values on the way, on which what follows depends: not always to be captured."""


@pytest.fixture(scope="module", params=sorted(name for name in ZOO if takes_slots(build_twin(name))))
def member(request):
    return request.param, ModelPair(build_twin(request.param).cuda(), build_tokenizer(chat=False))


def test_every_architecture_makes_the_tokens_of_plain_recomputation(member):
    name, pair = member
    jobs = jobs_of(pair, [3, 30, 11, 19, 7])
    decoding = Decoding(GREEDY, 0, 14, ())
    expected = {job.example.id: recomputed(pair.hf, job, decoding) for job in jobs}
    for n_slots in (2, 8):
        slots = Slots(pair.hf, decoding, n_slots)
        assert by_id(slots.run(jobs)) == expected
        if name not in AS_IT_IS:
            assert slots._forward._graphs, "no step came from a graph"


def test_moments_are_those_of_the_cpu(member):
    _, pair = member
    examples = spd.tasks.get("synthetic-math").calibration(6, 0)
    found = spd.extract(pair, examples, engine="twin", progress=False)
    own = ModelPair(pair.hf.cpu(), pair.tokenizer)
    try:
        wanted = spd.extract(own, examples, engine="twin", progress=False)
    finally:
        pair.hf.cuda()
    for site, gram in wanted.gradient.items():
        assert (found.gradient[site] - gram).norm() <= 1e-4 * gram.norm()


def test_a_graph_computes_with_what_its_inputs_hold_now():
    inputs = torch.arange(8.0, device="cuda")
    graphs = CudaGraphs(lambda n, length: inputs[:n] * length)
    for shift in range(4):
        inputs.copy_(torch.arange(8.0) + shift)
        for n, length in ((8, 3), (4, 3), (8, 2)):
            assert graphs(n, length).tolist() == [(i + shift) * length for i in range(n)]
    assert len(graphs._graphs) == 3


def test_what_cannot_be_captured_runs_as_it_is():
    inputs = torch.ones(4, device="cuda")

    def asks(n, length):
        return inputs[:n] * inputs.sum().item()

    graphs = CudaGraphs(asks)
    assert [graphs(4, 1).tolist() for _ in range(4)] == [[4.0] * 4] * 4
    assert not graphs._graphs
    assert (torch.ones(3, device="cuda") * 2).tolist() == [2.0] * 3  # CUDA goes on after the failed capture
