"""Optimizers (Muon for matrices and Adam for the rest, or AdamW for all) and learning-rate schedules.

Muon (Jordan et al. 2024) orthogonalises the momentum of every weight matrix. torch.optim.Muon accepts only
two-dimensional weights and processes them one by one. This Muon flattens convolution kernels and iterates over all
matrices of equal shape as one batch, which makes it affordable for models of a few million weights on a CPU.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator
from math import cos, pi
from typing import Any, Literal

import torch
from torch import Tensor, nn

# The quintic Newton-Schulz iteration of the Muon paper, which pushes all singular values towards 1.
NEWTON_SCHULZ_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
NEWTON_SCHULZ_STEPS = 5


def orthogonalise(m_NRC: Tensor, precision: torch.dtype) -> Tensor:
    """Return approximately the nearest semi-orthogonal matrix of each [R, C] matrix in a batch [N, R, C]."""
    tall = m_NRC.shape[-2] > m_NRC.shape[-1]
    x = (m_NRC.mT if tall else m_NRC).to(precision)
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    a, b, c = NEWTON_SCHULZ_COEFFICIENTS
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).to(m_NRC.dtype)


def choose_muon_dtype() -> torch.dtype:
    """Return bf16, which is enough for the iteration, if matrix products in it are fast, otherwise fp32."""
    native = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()
    return torch.bfloat16 if native or torch.cuda.is_available() else torch.float32


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalised, with decoupled weight decay, for weights of two or more dimensions."""

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        precision: torch.dtype | None = None,
    ):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self.precision = precision or choose_muon_dtype()

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            if not parameters:
                continue
            for parameter in parameters:
                if "momentum_buffer" not in self.state[parameter]:
                    self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
            buffers = [self.state[parameter]["momentum_buffer"] for parameter in parameters]
            gradients = [parameter.grad for parameter in parameters]
            torch._foreach_lerp_(buffers, gradients, 1 - group["momentum"])
            updates = torch._foreach_lerp(gradients, buffers, group["momentum"])
            by_shape: dict[tuple[int, int], list[tuple[nn.Parameter, Tensor]]] = defaultdict(list)
            for parameter, update in zip(parameters, updates, strict=True):
                flat = update.flatten(1)
                by_shape[(flat.shape[0], flat.shape[1])].append((parameter, flat))
            for shape, pairs in by_shape.items():
                self.apply_updates(group, shape, pairs)

    def apply_updates(
        self, group: dict[str, Any], shape: tuple[int, int], pairs: list[tuple[nn.Parameter, Tensor]]
    ) -> None:
        """Orthogonalise the updates of parameters of one shape and apply them."""
        orthogonal = orthogonalise(torch.stack([update for _, update in pairs]), self.precision)
        scale = max(1.0, shape[0] / shape[1]) ** 0.5
        parameters: list[Tensor] = [parameter for parameter, _ in pairs]
        if group["weight_decay"]:
            torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
        updates = [update.view_as(parameter) for parameter, update in zip(parameters, orthogonal, strict=True)]
        torch._foreach_add_(parameters, updates, alpha=-group["lr"] * scale)


def is_matrix(name: str, parameter: nn.Parameter) -> bool:
    """Return whether a weight is a hidden matrix, for Muon; Adam trains embeddings, queries, gains and biases."""
    tables = ("embed_tokens", "shared", "lm_head", "query", "markers", "scale_shift_table", "position_embedding")
    return parameter.ndim >= 2 and min(parameter.flatten(1).shape) > 1 and not any(t in name for t in tables)


NamedParameters = list[tuple[str, nn.Parameter]]
OptimizerName = Literal["muon", "adamw"]
ADAM_BETAS = (0.9, 0.98)


def split_matrices(parameters: Iterable[tuple[str, nn.Parameter]]) -> tuple[NamedParameters, NamedParameters]:
    """Return the matrices and the other parameters."""
    parameters = list(parameters)
    return [pair for pair in parameters if is_matrix(*pair)], [pair for pair in parameters if not is_matrix(*pair)]


def group_names_by_optimizer(
    parameters: Iterable[tuple[str, nn.Parameter]], optimizer: OptimizerName = "muon"
) -> list[list[str]]:
    """Return the names of the parameters of each optimizer that `build_optimizers` builds, in its order."""
    name_groups = [[name for name, _ in part] for part in split_matrices(parameters) if part]
    return name_groups if optimizer == "muon" else [[name for part in name_groups for name in part]]


def build_optimizers(
    parameters: Iterable[tuple[str, nn.Parameter]],
    lr: float,
    adam_lr: float,
    weight_decay: float = 0.0,
    optimizer: OptimizerName = "muon",
) -> list[torch.optim.Optimizer]:
    """Build Muon for the matrices at `lr` and Adam for the rest at `adam_lr`, or AdamW for all at `adam_lr`.

    Weight decay applies to matrices only. Parameter groups store their peak rate as "peak_lr".
    """
    matrices, rest = ([parameter for _, parameter in part] for part in split_matrices(parameters))
    optimizers: list[torch.optim.Optimizer] = []
    if optimizer == "adamw":
        parts = [(matrices, weight_decay), (rest, 0.0)]
        param_groups: list[dict[str, Any]] = [{"params": part, "weight_decay": decay} for part, decay in parts if part]
        fused = all(parameter.is_cuda for parameter in matrices + rest)
        optimizers.append(torch.optim.AdamW(param_groups, lr=adam_lr, betas=ADAM_BETAS, eps=1e-8, fused=fused))
    if optimizer == "muon" and matrices:
        optimizers.append(Muon(matrices, lr=lr, weight_decay=weight_decay))
    if optimizer == "muon" and rest:
        optimizers.append(torch.optim.Adam(rest, lr=adam_lr, betas=ADAM_BETAS, eps=1e-8))
    for group in iter_param_groups(optimizers):
        group["peak_lr"] = group["lr"]
    return optimizers


def cosine_lr_scale(step: int, steps: int, warmup: int) -> float:
    """Return the fraction of the peak rate at a step: linear warm-up, then half a cosine to zero."""
    rising = (step + 1) / max(1, warmup)
    progress = (step - warmup) / max(1, steps - warmup)
    return rising if rising < 1 else (1 + cos(pi * min(1.0, max(0.0, progress)))) / 2


def trapezoidal_lr_scale(step: int, steps: int, warmup: int, decay_from: float) -> float:
    """Return the fraction of the peak rate at a step: linear warm-up, constant, then linear decay to zero.

    The decay begins at the fraction `decay_from` of the run.
    """
    rising = min(1.0, (step + 1) / max(1, warmup))
    start = decay_from * steps
    falling = min(1.0, max(0.0, (steps - step) / max(1.0, steps - start)))
    return rising * falling


def set_lr_scale(optimizers: list[torch.optim.Optimizer], lr_scale: float) -> None:
    """Set the learning rate of every group to a fraction of its peak."""
    for group in iter_param_groups(optimizers):
        group["lr"] = group["peak_lr"] * lr_scale


def iter_param_groups(optimizers: list[torch.optim.Optimizer]) -> Iterator[dict[str, Any]]:
    for optimizer in optimizers:
        yield from optimizer.param_groups
