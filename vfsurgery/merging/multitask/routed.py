"""What stands beside a linear op: the low-rank experts, and the router that says which of them counts.

``y = W_0 x + b_0 + sum_i w_i (U_i S_i V_i^T x + b_i - b_0)``. Router ``i`` looks at ``|V_i^T x|``, the energy of the
input in the expert's first right singular directions. All experts' codes are computed at once and multiplied by their
weights, so that no shape depends on data. A convolution is the linear map of its patches: the right singular vectors
are kernels, the left ones a convolution of one pixel behind them, group by group.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, cast

import torch
from torch import Tensor, fx, nn
from torch.nn import functional

Gate: TypeAlias = Literal["image", "token", "mean"]
RANK = 1e-6
"""Singular values below this share of the largest are none; in float64, far below it."""


@dataclass(frozen=True)
class Factors:
    """The differences of all experts from a weight, ``(groups, experts, units, columns)``, by singular vectors.

    ``left`` holds ``U S``, ``(groups, experts, units, k)``; ``right`` ``V^T``, ``(groups, experts, k, columns)``, zero
    where a difference has fewer directions.
    """

    left: Tensor
    right: Tensor

    @staticmethod
    def of(differences: Tensor, most: int | None = None) -> Factors:
        """The first ``most`` directions, or all that there are, decomposed in float64 and kept as they came."""
        u, s, v = torch.linalg.svd(differences.double(), full_matrices=False)
        limit = s.amax(-1, keepdim=True) * (RANK if differences.dtype != torch.float64 else 1e-13)
        there = (s > limit).to(s)
        rank = int(there.sum(-1).max()) if there.numel() else 0
        kept = rank if most is None else min(most, rank)
        left, right = u * (s * there).unsqueeze(-2), v * there.unsqueeze(-1)
        return Factors(*(x.to(differences.dtype).clone() for x in (left[..., :kept], right[..., :kept, :])))

    @property
    def rank(self) -> int:
        """Directions of the expert that has most."""
        return self.right.shape[2]


@dataclass(frozen=True)
class Layout:
    """Where the images of an input lie: on ``dim``; of windows, on ``dim`` 0 with all those of an image in a row."""

    dim: int = 0
    windows: bool = False


class Routed(nn.Module):
    """The experts beside one op; a trace of it is what is put into the graph.

    Args:
        factors: Of the experts' differences.
        biases: Differences of biases, ``(experts, units)``, if there are any.
        k: Directions of each expert.
        k_gate: Directions that the router looks at.
        gate: One choice for each image, each token, or none: the mean.
        layout: Of the input.
        ndim: Of the input.
        top_k: Experts that count.
        kernel: Of a convolution.
        settings: Of a convolution.
        dtype: Of the parameters.
    """

    def __init__(
        self,
        factors: Factors,
        biases: Tensor | None,
        *,
        k: int,
        k_gate: int,
        gate: Gate,
        layout: Layout,
        ndim: int,
        top_k: int,
        kernel: Sequence[int] = (),
        settings: Mapping[str, Any] | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.groups, self.experts, _, columns = factors.right.shape
        self.k, self.k_gate, self.gate_kind, self.layout, self.ndim, self.top_k = k, k_gate, gate, layout, ndim, top_k
        self.kernel, self.settings = tuple(kernel), dict(settings or {})
        self.convolves = settings is not None and bool(settings)
        inputs = (columns // math.prod(self.kernel), *self.kernel)
        ones = (1,) * len(self.kernel)

        def kept(tensor: Tensor) -> nn.Parameter:
            return nn.Parameter(tensor.to(dtype).contiguous(), requires_grad=False)

        self.down = self.up = self.gate = self.bias = None
        if k:
            self.down = kept(factors.right[:, :, :k].reshape(self.groups * self.experts * k, *inputs))
            up = factors.left[..., :k].movedim(1, 2)  # (groups, units, experts, k)
            self.up = kept(up.reshape(-1, self.experts * k, *ones))
        if gate != "mean":
            self.gate = kept(factors.right[:, :, :k_gate].reshape(self.groups * self.experts * k_gate, *inputs))
        if biases is not None:
            self.bias = kept(biases.T.reshape(-1, self.experts, *ones))

    def forward(self, x: Tensor, forced: Tensor, free: Tensor, images: int) -> Tensor:
        """What is added to the op's output.

        Args:
            x: Its input.
            forced: ``(experts,)``, 1 for the one that is chosen from outside, else zeros.
            free: 1 where none is.
            images: In the batch.
        """
        if self.convolves and "mode" in self.settings:
            x = functional.pad(x, list(self.settings["pad"]), mode=self.settings["mode"])
        weights = self._weights(x, forced, free, images)
        if self.convolves:
            return self._convolved(x, weights)
        total = None if self.bias is None else functional.linear(weights, cast(Tensor, self.bias))
        if self.k:
            codes = functional.linear(x, cast(Tensor, self.down)).unflatten(-1, (self.experts, self.k))
            codes = (codes * weights.unsqueeze(-1)).flatten(-2)
            part = functional.linear(codes, cast(Tensor, self.up))
            total = part if total is None else total + part
        assert total is not None
        return total

    def _weights(self, x: Tensor, forced: Tensor, free: Tensor, images: int) -> Tensor:
        """``(..., experts)``; of a convolution ``(batch, experts, ...)``."""
        dim, ones = (1, (1,) * len(self.kernel)) if self.convolves else (-1, ())
        forced = forced.reshape(self.experts, *ones)
        if self.gate_kind == "mean":
            mean = forced + free / self.experts
            return mean.unsqueeze(0) if self.convolves else mean
        energies = self._energies(x)
        if self.gate_kind == "image":
            energies = self._pooled(energies, images)
        weights = torch.softmax(energies, dim)
        if self.top_k < self.experts:
            values, places = torch.topk(weights, self.top_k, dim)
            weights = torch.zeros_like(weights).scatter(dim, places, values)
            weights = weights / weights.sum(dim, keepdim=True)
        return weights * free + forced

    def _energies(self, x: Tensor) -> Tensor:
        if not self.convolves:
            codes = functional.linear(x, cast(Tensor, self.gate)).unflatten(-1, (self.experts, self.k_gate))
            return torch.linalg.vector_norm(codes, dim=-1)
        codes = self._sliding(x, self.gate).unflatten(1, (self.groups, self.experts, self.k_gate))
        return torch.linalg.vector_norm(codes, dim=(1, 3))

    def _pooled(self, energies: Tensor, images: int) -> Tensor:
        """The mean over all places of an image."""
        units = 1 if self.convolves else self.ndim - 1
        if self.layout.windows:
            apart = energies.unflatten(0, (images, -1))
            dims = [dim for dim in range(1, self.ndim + 1) if dim != units + 1]
            return apart.mean(dims, keepdim=True).expand_as(apart).flatten(0, 1)
        dims = [dim for dim in range(self.ndim) if dim not in (self.layout.dim, units)]
        return energies.mean(dims, keepdim=True) if dims else energies

    def _convolved(self, x: Tensor, weights: Tensor) -> Tensor:
        total = None if self.bias is None else self._pixelwise(weights, self.bias, 1)
        if self.k:
            codes = self._sliding(x, self.down).unflatten(1, (self.groups, self.experts, self.k))
            codes = (codes * weights.unsqueeze(1).unsqueeze(3)).flatten(1, 3)
            part = self._pixelwise(codes, self.up, self.groups)
            total = part if total is None else total + part
        assert total is not None
        return total

    def _sliding(self, x: Tensor, kernels: nn.Parameter | None) -> Tensor:
        names = ("stride", "padding", "dilation", "groups")
        return self._convolve(x, kernels, None, *(self.settings[name] for name in names))

    def _pixelwise(self, x: Tensor, kernels: nn.Parameter | None, groups: int) -> Tensor:
        return self._convolve(x, kernels, None, 1, 0, 1, groups)

    @property
    def _convolve(self) -> Any:
        return (functional.conv1d, functional.conv2d, functional.conv3d)[len(self.kernel) - 1]


def recorded(routed: Routed) -> fx.GraphModule:
    """A graph of it, over its parameters, which runs where this library is not installed."""
    graph = fx.Tracer().trace(routed)
    return fx.GraphModule(routed, graph, "Routed")
