"""Sums over calibration tokens along directions of one site, and what value directions write into the vocabulary."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from einops import einsum, rearrange
from jaxtyping import Float
from torch import Tensor

from spd_lens.analysis.common import place
from spd_lens.analysis.directions.readout import Directions, Unembedding, matches, written
from spd_lens.models import ModelPair
from spd_lens.sites import Site
from spd_lens.subspaces import TokenGradients


@dataclass
class Tally:
    """Sums over tokens for some directions of one site and, with `keep`, the pull and the match of every token."""

    site: Site
    directions: Directions
    keep: bool = True
    examples: list[int] = field(default_factory=list)
    sums: dict[str, Any] = field(default_factory=lambda: defaultdict(float))
    """Sums over all tokens, `[head, n]`; `total`, the gradient energy of the head, is `[head]`."""
    energies: list[Float[Tensor, "head n"]] = field(default_factory=list)
    """Energy along the directions, by example."""
    n_queries: int = 0
    pulls: list[Float[Tensor, "token head n"]] = field(default_factory=list)
    cosines: list[Float[Tensor, "token head group n"]] = field(default_factory=list)

    def add(self, hf: Any, rows: TokenGradients) -> None:
        """Add one example's tokens."""
        heads = self.directions.shape[0]
        g = rearrange(rows.gradient[self.site].cpu(), "token (head d_head) -> token head d_head", head=heads)
        pull = -einsum(g, self.directions, "token head d_head, head d_head n -> token head n")
        self.examples.append(rows.index)
        self.energies.append(pull.square().sum(dim=0))
        self.sums["signed"] += pull.sum(dim=0)
        self.sums["absolute"] += pull.abs().sum(dim=0)
        self.sums["total"] += g.square().sum(dim=(0, 2))
        self.sums["at first"] += pull[0].square()
        if self.keep:
            self.pulls.append(pull)
        if self.site.kind == "k":
            d_head = self.directions.shape[1]
            flat = rows.activation[Site(self.site.layer, "q")]
            queries = rearrange(flat, "token (q_head d_head) -> token q_head d_head", d_head=d_head)
            cosine = matches(hf, self.site.layer, queries, self.directions).cpu()
            self.sums["matched"] += cosine.square().sum(dim=(0, 2))
            self.sums["aligned"] += cosine.sum(dim=(0, 2))
            self.n_queries += cosine.shape[0] * cosine.shape[2]
            if self.keep:
                self.cosines.append(cosine.float())

    @property
    def signs(self) -> Float[Tensor, "head n"]:
        """The sign that turns each direction: values towards lower loss, keys towards the mean query."""
        return torch.where(self.sums["aligned" if self.n_queries else "signed"] < 0, -1.0, 1.0).double()

    def measures(self) -> dict[str, Float[Tensor, "head n"]]:
        """The measures that need no read-out."""
        by_example, sums = torch.stack(self.energies), self.sums
        energy = by_example.sum(dim=0)
        found = {
            "energy share": energy / sums["total"].clamp_min(1e-300)[:, None],
            "one-sidedness": sums["signed"].abs() / sums["absolute"].clamp_min(1e-300),
            "first-token share": sums["at first"] / energy.clamp_min(1e-300),
            "effective examples": energy.square() / by_example.square().sum(dim=0).clamp_min(1e-300),
        }
        if self.n_queries:
            found["query energy"] = sums["matched"] / self.n_queries * self.directions.shape[1]
        return found

    def contexts(
        self, head: int, i: int, sign: float, texts: Sequence[Sequence[str]], top: int
    ) -> Iterable[dict[str, Any]]:
        """The tokens that pull hardest, and for keys those whose queries match each pole best."""

        def row(role: str, pole: str, query: int, rank: int, n: int, position: int, value: float) -> dict[str, Any]:
            example = self.examples[n]
            return {
                "role": role, "pole": pole, "query_head": query, "place": rank + 1, "token": texts[example][position],
                "value": value, "null": 0.0, "example": example, "position": position,
            }  # fmt: skip

        pulls = [pull[:, head, i] * sign for pull in self.pulls]
        for rank, (n, position, value) in enumerate(_hardest([pull.abs() for pull in pulls], top)):
            yield row("pull", "+" if pulls[n][position] > 0 else "-", -1, rank, n, position, value)
        for pole, turn in (("+", sign), ("-", -sign)) if self.cosines else ():
            best = [(cosine[:, head, :, i] * turn).max(dim=1) for cosine in self.cosines]
            for rank, (n, position, value) in enumerate(_hardest([b.values for b in best], top)):
                if value <= 0:
                    break
                member = int(best[n].indices[position])
                yield row("query", pole, head * self.cosines[0].shape[2] + member, rank, n, position, value)


class Vocabulary:
    """Reads value directions of one site through `W_O`, final norm and unembedding."""

    def __init__(self, pair: ModelPair, unembed: Unembedding, site: Site, top: int) -> None:
        self._pair, self._unembed, self._site, self._top = pair, unembed, site, top

    def __call__(self, directions: Directions) -> tuple[Float[Tensor, "head n"], dict[tuple[int, int], Tensor]]:
        """The kurtosis, as the mean over query heads; and for each head and query head the first `top` tokens of both
        poles, `[n, pole, 2, top]`: their logits in standard deviations, and their ids."""
        residual = written(self._pair.hf, self._site.layer, directions)
        heads, group, n, _ = residual.shape
        kurtosis = torch.zeros(heads, n, dtype=torch.float64)
        best: dict[tuple[int, int], Tensor] = {}
        for head in range(heads):
            for member in range(group):  # one at a time: n rows of the vocabulary are in memory
                logits = self._unembed(residual[head, member])
                z = logits / logits.std(dim=-1, correction=0, keepdim=True).clamp_min(1e-30)
                kurtosis[head] += (z.double().pow(4).mean(dim=-1) - 3).cpu() / group
                poles = [torch.stack([t.values.double(), t.indices.double()], dim=1)
                         for t in ((turn * z).topk(self._top, dim=-1) for turn in (1, -1))]  # fmt: skip
                best[head, head * group + member] = torch.stack(poles, dim=1).cpu()
        return kurtosis, best

    def rows(
        self,
        found: Mapping[tuple[int, int], Tensor],
        random: Mapping[tuple[int, int], Tensor],
        ranks: Sequence[int],
    ) -> Iterable[dict[str, Any]]:
        """Rows of tokens of each head's leading directions, as many as its rank, with how common they are at random."""
        for (head, query), best in found.items():
            ids, counts = random[head, query][:, :, 1].long().unique(return_counts=True)
            poles = 2 * len(random[head, query])
            often = dict(zip(ids.tolist(), (counts / poles).tolist(), strict=True))
            for i in range(ranks[head]):
                for p, pole in enumerate("+-"):
                    for rank, (value, id) in enumerate(best[i, p].T.tolist()):
                        yield {
                            **place(self._site, head, per_head=True), "direction": i + 1, "role": "vocabulary",
                            "pole": pole, "query_head": query, "place": rank + 1, "token": self._text(int(id)),
                            "value": value, "null": often.get(int(id), 0.0), "example": -1, "position": -1,
                        }  # fmt: skip

    def _text(self, id: int) -> str:
        text = self._pair.tokenizer.decode([id])
        return text if text and "\ufffd" not in text else str(self._pair.tokenizer.convert_ids_to_tokens(id))


def _hardest(values: Sequence[Tensor], top: int) -> list[tuple[int, int, float]]:
    """The largest value of each example after its first token, descending: number of the example, position, value."""
    best = [(n, 1 + int(v[1:].argmax()), float(v[1:].max())) for n, v in enumerate(values)]
    return sorted(best, key=lambda found: -found[2])[:top]
