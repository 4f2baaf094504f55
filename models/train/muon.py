"""Muon for matrices (momentum, orthogonalised) and Adam for everything else, in one optimizer."""

from __future__ import annotations

import torch
from torch import Tensor, nn

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
MOMENTUM = 0.95
BETAS = (0.9, 0.98)


def orthogonalise(batch: Tensor, steps: int = 5) -> Tensor:
    """Bring the singular values of each matrix of a batch near one (Newton-Schulz, in bfloat16)."""
    a, b, c = COEFFICIENTS
    tall = batch.shape[-2] > batch.shape[-1]
    x = batch.mT if tall else batch
    x = (x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)).bfloat16()
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    out: Tensor = (x.mT if tall else x).float()
    return out


class Optimizer:
    """Keeps float32 weights and moments by name; the model itself holds bfloat16 copies."""

    def __init__(self, model: nn.Module, decay: float = 0.02) -> None:
        """Sort the parameters into matrices, by shape, and the rest."""
        self.decay = decay
        self.matrices: dict[tuple[int, ...], list[tuple[str, nn.Parameter]]] = {}
        self.rest: list[tuple[str, nn.Parameter]] = []
        self.state: dict[str, Tensor] = {}
        for name, weight in model.named_parameters():
            wide = weight.detach().float().clone()
            self.state[f"{name}.w"], self.state[f"{name}.m"] = wide, torch.zeros_like(wide)
            if weight.ndim == 2 and not name.startswith("embed"):
                self.matrices.setdefault(tuple(weight.shape), []).append((name, weight))
            else:
                self.rest.append((name, weight))
                self.state[f"{name}.v"] = torch.zeros_like(wide)

    @torch.no_grad()
    def load(self, state: dict[str, Tensor]) -> None:
        """Take over a saved state and bring the model to it."""
        self.state = state
        for group in (*self.matrices.values(), self.rest):
            for name, weight in group:
                weight.copy_(state[f"{name}.w"])

    @torch.no_grad()
    def step(self, rate: float, rest_rate: float, step: int) -> None:
        """Update every parameter from its gradient and clear the gradient."""
        for group in self.matrices.values():
            self._step_matrices(group, rate)
        for name, weight in self.rest:
            self._step_rest(name, weight, rest_rate, step)

    def _step_matrices(self, group: list[tuple[str, nn.Parameter]], rate: float) -> None:
        """Muon with Nesterov momentum for matrices of one shape, stacked."""
        updates = []
        for name, weight in group:
            assert weight.grad is not None
            gradient, moment = weight.grad.float(), self.state[f"{name}.m"]
            moment.lerp_(gradient, 1 - MOMENTUM)
            updates.append(gradient.lerp(moment, MOMENTUM))
        stacked = orthogonalise(torch.stack(updates))
        scale = max(1.0, stacked.shape[-2] / stacked.shape[-1]) ** 0.5
        for (name, weight), update in zip(group, stacked, strict=True):
            wide = self.state[f"{name}.w"]
            wide.mul_(1 - rate * self.decay).add_(update, alpha=-rate * scale)
            weight.copy_(wide)
            weight.grad = None

    def _step_rest(self, name: str, weight: nn.Parameter, rate: float, step: int) -> None:
        """Adam for one embedding or scale."""
        assert weight.grad is not None
        gradient, moment, second = weight.grad.float(), self.state[f"{name}.m"], self.state[f"{name}.v"]
        moment.lerp_(gradient, 1 - BETAS[0])
        second.lerp_(gradient.square(), 1 - BETAS[1])
        top = moment / (1 - BETAS[0] ** (step + 1))
        bottom = (second / (1 - BETAS[1] ** (step + 1))).sqrt() + 1e-10
        wide = self.state[f"{name}.w"].add_(top / bottom, alpha=-rate)
        weight.copy_(wide)
        weight.grad = None
