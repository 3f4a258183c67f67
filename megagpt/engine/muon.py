"""Muon (Jordan et al. 2024): the update of a matrix is its momentum with all singular values moved towards 1.

The matrices of the blocks are updated so, and everything else by AdamW. ZeRO and tensor parallelism give each rank pieces of a
matrix, and singular values need all of it. So the ranks sum their pieces to full matrices, one after the other, and each rank
takes its own pieces of the result: the update is that of one process.
"""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.optim.adamw import adamw

from megagpt.checkpoint.boxes import Piece
from megagpt.parallel.parameter import Shard

STEPS = 5
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of x -> a x + b x^3 + c x^5, which moves singular values between 0 and 1 to between 0.7 and 1.2 in `STEPS` steps."""
SCALE = 0.2
"""An update has this root mean square, as one of AdamW has, so both use one learning rate (Liu et al., arXiv 2502.16982)."""


class Segment(NamedTuple):
    """One matrix of a group, and the pieces that this rank has of it in its flat partition."""

    shard: Shard
    pieces: Sequence[Piece]
    """Empty if other ranks have all of it."""
    offset: int
    """Position in the flat partition that the starts of the pieces are counted from."""
    groups: tuple[ProcessGroup, ...]
    """Groups over which the pieces are summed to the full matrix."""


class Muon(torch.optim.Optimizer):
    """Muon for the groups with "orthogonal", AdamW for the others.

    `attach` must be called once before the first step.
    """

    def __init__(
        self, groups: Iterable[dict[str, Any]], lr: float, betas: tuple[float, float], eps: float, momentum: float
    ) -> None:
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "momentum": momentum, "segments": []})

    @staticmethod
    def attach(group: dict[str, Any], segments: Sequence[Segment]) -> None:
        """Set the matrices of a group, the same ones in the same order on every rank."""
        group["segments"] = list(segments)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update the weights. Collective."""
        for group in self.param_groups:
            for flat in group["params"]:
                if flat.grad is not None:
                    (self._orthogonal_step if group["orthogonal"] else self._adamw_step)(group, flat, flat.grad)

    def _orthogonal_step(self, group: dict[str, Any], flat: Tensor, gradient: Tensor) -> None:
        state = self.state[flat]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(flat)
        momentum, buffer = group["momentum"], state["momentum_buffer"]
        buffer.mul_(momentum).add_(gradient)
        direction = gradient.add(buffer, alpha=momentum)  # Nesterov's
        flat.mul_(1 - group["lr"] * group["weight_decay"])
        for segment in group["segments"]:
            full = _full_matrix(segment, direction)
            update = orthogonalized(full).mul_(SCALE * max(full.shape[-2:]) ** 0.5)
            for piece in segment.pieces:
                start = segment.offset + piece.start
                values = update[_slices(piece)].reshape(-1)
                flat.narrow(0, start, piece.box.numel).sub_(values, alpha=group["lr"])

    def _adamw_step(self, group: dict[str, Any], flat: Tensor, gradient: Tensor) -> None:
        state = self.state[flat]
        for name in ("exp_avg", "exp_avg_sq"):
            if name not in state:
                state[name] = torch.zeros_like(flat)
        if "step" not in state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=flat.device)
        adamw(
            [flat],
            [gradient],
            [state["exp_avg"]],
            [state["exp_avg_sq"]],
            [],
            [state["step"]],
            fused=True,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )


def orthogonalized(matrix: Tensor) -> Tensor:
    """Return [..., out, in] with singular values near 1; leading dims are matrices of their own."""
    a, b, c = COEFFICIENTS
    x = matrix / (torch.linalg.matrix_norm(matrix, keepdim=True) + 1e-7)
    tall = x.shape[-2] > x.shape[-1]
    if tall:  # the smaller product
        x = x.mT
    for _ in range(STEPS):
        square = x @ x.mT
        x = a * x + (b * square + c * square @ square) @ x
    return (x.mT if tall else x).contiguous()


def _full_matrix(segment: Segment, flat: Tensor) -> Tensor:
    """Return the full matrix of which `flat` has this rank's pieces. Collective."""
    full = torch.zeros(segment.shard.shape, dtype=flat.dtype, device=flat.device)
    for piece in segment.pieces:
        values = flat.narrow(0, segment.offset + piece.start, piece.box.numel)
        full[_slices(piece)] = values.view(piece.box.size)
    for group in segment.groups:
        dist.all_reduce(full, group=group)
    return full


def _slices(piece: Piece) -> tuple[slice, ...]:
    return tuple(slice(first, first + length) for first, length in zip(piece.box.offset, piece.box.size, strict=True))
