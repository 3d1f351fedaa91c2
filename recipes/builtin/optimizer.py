"""Muon for the transformer's matrices, AdamW for everything else."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

# Coefficients of the quintic iteration, best for three steps (Polar Express, Amsel et al. 2025).
STEPS = ((8.2872, -23.5959, 17.3004), (4.1071, -2.9478, 0.5448), (3.9487, -2.9089, 0.5518))


def orthogonalised(blocks: Tensor) -> Tensor:
    """The nearest orthogonal matrix of each of (m, n, n), roughly: three Newton-Schulz steps."""
    x = blocks / (1.02 * blocks.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for a, b, c in STEPS:
        square = x @ x.mT
        x = a * x + (b * square + c * square @ square) @ x
    return x


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised (Jordan et al. 2024), over square blocks.

    A matrix whose longer side is a multiple of the shorter counts as that many square ones (the queries of qkv are not
    mixed with its keys), so that equal sizes run as one batched product; torch's own Muon takes the matrices one
    by one, in bfloat16, which a CPU without that unit emulates slowly.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], rate: float, momentum: float = 0.95) -> None:
        super().__init__(parameters, {"lr": rate, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        assert closure is None
        for group in self.param_groups:
            by_side: dict[int, list[tuple[nn.Parameter, Tensor]]] = {}
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if "momentum" not in state:
                    state["momentum"] = torch.zeros_like(parameter)
                momentum: Tensor = state["momentum"]
                momentum.lerp_(parameter.grad, 1 - group["momentum"])
                direction = parameter.grad.lerp(momentum, group["momentum"])
                by_side.setdefault(min(parameter.shape), []).append((parameter, _blocks(direction)))
            for side, entries in by_side.items():
                made = orthogonalised(torch.cat([blocks for _, blocks in entries]))
                for (parameter, _), blocks in zip(entries, made.split([len(b) for _, b in entries]), strict=True):
                    parameter.sub_(_whole(blocks, parameter.shape), alpha=group["lr"] * 0.2 * side**0.5)


def splits(parameter: Tensor) -> bool:
    """Whether the matrix divides into square blocks."""
    return parameter.ndim == 2 and max(parameter.shape) % min(parameter.shape) == 0


def _blocks(matrix: Tensor) -> Tensor:
    rows, columns = matrix.shape
    if rows >= columns:
        return matrix.reshape(rows // columns, columns, columns)
    return matrix.reshape(rows, columns // rows, rows).transpose(0, 1)


def _whole(blocks: Tensor, shape: torch.Size) -> Tensor:
    rows, columns = shape
    return blocks.reshape(shape) if rows >= columns else blocks.transpose(0, 1).reshape(shape)


EMBEDDING_BOOST = 8.0  # a word is seen in few batches, so its embedding takes longer steps


def optimizers(networks: nn.Module, muon_rate: float, adam_rate: float) -> tuple[Muon, torch.optim.AdamW]:
    """Muon for the matrices inside blocks and layers; AdamW for embeddings, inputs, outputs, modulation and vectors.

    Each group carries its own full rate as "rate".
    """
    matrices: list[nn.Parameter] = []
    embeddings: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in networks.named_parameters():
        inside = any(part in name for part in (".joint.", ".single.", ".layers.")) and "modulation" not in name
        if inside and splits(parameter):
            matrices.append(parameter)
        else:
            (embeddings if ".tokens." in name else others).append(parameter)
    groups = [
        {"params": others, "lr": adam_rate, "rate": adam_rate},
        {"params": embeddings, "lr": adam_rate, "rate": EMBEDDING_BOOST * adam_rate},
    ]
    muon = Muon(matrices, muon_rate)
    muon.param_groups[0]["rate"] = muon_rate
    return muon, torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.0)
