"""The loop that runs and studies share."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from spd_lens.runs.stages import Step, work


@pytest.mark.parametrize("keeps_lens", [True, False])
def test_what_is_not_done_is_done_in_order_and_without_the_lens_model(keeps_lens):
    seen = []
    pair = SimpleNamespace(drop_lens=lambda: seen.append("lens dropped"))
    steps = [
        Step("extract", "moments", lambda: True, lambda: seen.append("never")),
        Step("extract", "subspace", lambda: False, lambda: seen.append("subspace")),
        Step("generate", "corpus", lambda: False, lambda: seen.append("corpus")),
    ]

    def do(step, place, rest):
        step.do()
        seen.append((place, [other.what for other in rest]))

    work(steps, pair, keeps_lens, do)
    dropped = [] if keeps_lens else ["lens dropped"]
    assert seen == ["subspace", ("[1/2]", ["corpus"]), *dropped, "corpus", ("[2/2]", []), *dropped]
