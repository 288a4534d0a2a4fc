"""Muon for the hidden matrices of a small transformer: momentum, then the nearest (semi-)orthogonal matrix by Newton-Schulz.

Source: https://kellerjordan.github.io/posts/muon/. torch.optim.Muon iterates in bf16, slow and coarse on a CPU; this one
stays in fp32 and runs matrices of one shape as a batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

_A, _B, _C = 3.4445, -4.7750, 2.0315
_STEPS = 5


def orthogonalized(stack_NRC: torch.Tensor) -> torch.Tensor:
    """Each (rows <= columns) matrix of a stack with its singular values moved near 1."""
    x_NRC: torch.Tensor = stack_NRC / (stack_NRC.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(_STEPS):
        gram_NRR = x_NRC @ x_NRC.transpose(1, 2)
        poly_NRR = torch.baddbmm(gram_NRR, gram_NRR, gram_NRR, beta=_B, alpha=_C)
        x_NRC = torch.baddbmm(x_NRC, poly_NRR, x_NRC, beta=_A)
    return x_NRC


class Muon:
    """Steps matrices in place; `rate` is the spectral norm of a square matrix's step. Only 2-D parameters."""

    def __init__(self, matrices: Sequence[torch.nn.Parameter], *, momentum: float = 0.9) -> None:
        self._momentum = momentum
        self._groups: dict[tuple[int, int], list[torch.nn.Parameter]] = {}
        for p in matrices:
            self._groups.setdefault((min(p.shape), max(p.shape)), []).append(p)
        self._averages = {p: torch.zeros_like(p) for p in matrices}

    @torch.no_grad()
    def step(self, rate: float, weight_decay: float) -> None:
        for parameters in self._groups.values():
            stack_NRC = torch.stack([self._direction(p) for p in parameters])
            for p, update in zip(parameters, orthogonalized(stack_NRC), strict=True):
                wide = update if p.shape[0] <= p.shape[1] else update.T
                scale = max(1.0, p.shape[0] / p.shape[1]) ** 0.5
                p.mul_(1 - rate * weight_decay).add_(wide, alpha=-rate * scale)

    def _direction(self, p: torch.nn.Parameter) -> torch.Tensor:
        """Nesterov momentum, turned so that there are no more rows than columns."""
        assert p.grad is not None
        average = self._averages[p].lerp_(p.grad, 1 - self._momentum)
        direction = p.grad.lerp(average, self._momentum)
        return direction if p.shape[0] <= p.shape[1] else direction.T
