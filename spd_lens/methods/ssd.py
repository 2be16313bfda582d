"""Simple self-distillation (arXiv 2604.01193): own outputs under truncated sampling at high temperature."""

from __future__ import annotations

from collections.abc import Mapping

from spd_lens.generation import Corpus
from spd_lens.methods.base import Method
from spd_lens.methods.registry import register
from spd_lens.runs import Experiment


@register
class SimpleSelfDistillation(Method):
    """Sampled as the published models' cards say: temperature 1.6, top-p 0.8, top-k 20; every completion is kept."""

    name = "ssd"
    says = "simple self-distillation: temperature 1.6, top-p 0.8, top-k 20 (arXiv 2604.01193, model cards)"
    temperature = 1.6

    def sampling(self, experiment: Experiment) -> Mapping[str, float | int | None]:
        return {"temperature": self.temperature, "top_p": 0.8, "top_k": 20}


@register
class SimpleSelfDistillationReference(Method):
    """The row of that name in the reference code: SPD's own sampling and training, without a projection."""

    name = "ssd-reference"
    says = '"SSD" of the reference code: temperature 0.7, top-p 0.9, no projection'

    def sampling(self, experiment: Experiment) -> Mapping[str, float | int | None]:
        return {"temperature": 0.7, "top_p": 0.9, "top_k": experiment.config.top_k}


@register
class SimpleSelfDistillationFile(SimpleSelfDistillation):
    """Sampled as the published configuration file says: temperature 1.5; the shortest tenth is dropped."""

    name = "ssd-config"
    says = "simple self-distillation: temperature 1.5, shortest 10 % dropped (arXiv 2604.01193, configuration file)"
    temperature = 1.5
    dropped = 0.1

    def curated(self, corpus: Corpus) -> Corpus:
        n_dropped = int(self.dropped * len(corpus))
        # by length, then by place, so that equal lengths give one answer
        by_length = sorted(range(len(corpus)), key=lambda i: (corpus[i].n_completion_tokens, i))
        dropped = set(by_length[:n_dropped])
        kept = [record for i, record in enumerate(corpus) if i not in dropped]
        return Corpus(kept, settings={**corpus.settings, "dropped_shortest": self.dropped})
