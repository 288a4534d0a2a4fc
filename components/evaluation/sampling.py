"""Sampled answers that depend on nothing but the model, the prompt and the seed: not on who shares the batch, nor on which of
many workers asks."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch

from components.evaluation.decode import Choose, Row
from components.evaluation.settings import Sampling


def drawn(sampling: Sampling, names: Sequence[str]) -> Choose:
    """Tokens by inverse transform in the order of the vocabulary: in that of their likelihood two that are nearly equal would
    change places with the last bit. `names`: of each prompt, what makes its draws its own."""

    def choose(logits_BV: torch.Tensor, rows: Sequence[Row]) -> torch.Tensor:
        likely_BV = (logits_BV / sampling.temperature).softmax(-1).double()
        if sampling.top_p < 1:
            likely_BV = _nucleus(likely_BV, sampling.top_p)
        reached_BV = likely_BV.cumsum(-1)
        draws = [uniform(sampling.seed, names[row.index], len(row.tokens)) for row in rows]
        draws_B = torch.tensor(draws, dtype=torch.float64, device=logits_BV.device) * reached_BV[:, -1]
        # The first token whose share is not passed; one of no share never is it.
        return torch.searchsorted(reached_BV, draws_B[:, None], right=True)[:, 0].clamp(max=logits_BV.shape[-1] - 1)

    return choose


def _nucleus(likely_BV: torch.Tensor, top_p: float) -> torch.Tensor:
    """0 for what is not among the likeliest that together have the share: a token is where those before it have less."""
    sorted_BV = likely_BV.sort(-1, descending=True).values
    last_B1 = ((sorted_BV.cumsum(-1) - sorted_BV) < top_p).sum(-1, keepdim=True) - 1
    return likely_BV.where(likely_BV >= sorted_BV.gather(-1, last_B1), 0.0)


def uniform(seed: int, name: str, step: int) -> float:
    """In [0, 1), 53 bits of a hash."""
    digest = hashlib.blake2b(f"{seed}\0{name}\0{step}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) / 2**53
