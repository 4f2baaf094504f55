"""Muon for matrices (momentum, orthogonalised) and AdamW for everything else, in one optimizer."""

from __future__ import annotations

import torch
from torch import Tensor, nn

COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def orthogonalise(batch: Tensor, steps: int = 5) -> Tensor:
    """Bring the singular values of each matrix of a batch near one (Newton-Schulz)."""
    a, b, c = COEFFICIENTS
    tall = batch.shape[-2] > batch.shape[-1]
    x = batch.mT if tall else batch
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


class Optimizer:
    """Holds the state by parameter name, so that it saves as plain tensors."""

    def __init__(self, model: nn.Module, decay: float = 0.02) -> None:
        """Sort the parameters into matrices, by shape, and the rest."""
        self.decay = decay
        self.matrices: dict[tuple[int, ...], list[tuple[str, nn.Parameter]]] = {}
        self.rest: list[tuple[str, nn.Parameter]] = []
        for name, weight in model.named_parameters():
            if weight.ndim == 2 and not name.startswith("embed"):
                self.matrices.setdefault(tuple(weight.shape), []).append((name, weight))
            else:
                self.rest.append((name, weight))
        self.state: dict[str, Tensor] = {}
        for name, weight in model.named_parameters():
            self.state[f"{name}.m"] = torch.zeros_like(weight)
        for name, weight in self.rest:
            self.state[f"{name}.v"] = torch.zeros_like(weight)

    @torch.no_grad()
    def step(self, rate: float, rest_rate: float, step: int) -> None:
        """Update every parameter from its gradient and clear the gradient."""
        for group in self.matrices.values():
            self._step_matrices(group, rate)
        for name, weight in self.rest:
            self._step_rest(name, weight, rest_rate, step)

    def _step_matrices(self, group: list[tuple[str, nn.Parameter]], rate: float, momentum: float = 0.95) -> None:
        """Muon with Nesterov momentum for matrices of one shape, stacked."""
        updates = []
        for name, weight in group:
            assert weight.grad is not None
            moment = self.state[f"{name}.m"]
            moment.lerp_(weight.grad, 1 - momentum)
            updates.append(weight.grad.lerp(moment, momentum))
            weight.grad = None
        stacked = orthogonalise(torch.stack(updates))
        scale = max(1.0, stacked.shape[-2] / stacked.shape[-1]) ** 0.5
        for (_, weight), update in zip(group, stacked, strict=True):
            weight.mul_(1 - rate * self.decay)
            weight.add_(update, alpha=-rate * scale)

    def _step_rest(self, name: str, weight: nn.Parameter, rate: float, step: int) -> None:
        """Adam for one embedding or scale."""
        assert weight.grad is not None
        moment, second = self.state[f"{name}.m"], self.state[f"{name}.v"]
        moment.lerp_(weight.grad, 0.1)
        second.lerp_(weight.grad.square(), 0.02)
        top = moment / (1 - 0.9 ** (step + 1))
        bottom = (second / (1 - 0.98 ** (step + 1))).sqrt() + 1e-10
        weight.add_(top / bottom, alpha=-rate)
        weight.grad = None
