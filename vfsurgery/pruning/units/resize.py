"""A smaller model of the same class: a copy whose tensors have lost units and whose modules know their new sizes.

A copy is made that takes the smaller tensors in place of the large ones, ties included. Then torch's own modules are
told: what a module states about sizes (``out_channels``, ``num_features``, ``normalized_shape``, …) follows from its
new tensors by its class. Sizes that a forward holds in other places (a number of heads, a chunk) are not known here;
whether the forward still runs is for :mod:`vfsurgery.pruning.units.rehearsal` to see.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from torch import Tensor, fx, nn

from vfsurgery.errors import SurgeryError, explain
from vfsurgery.pruning.units.cut import Cut
from vfsurgery.tracing.copies import copied
from vfsurgery.tracing.modes import in_training
from vfsurgery.tracing.ops import OpReader, canonical_parameters


def with_tensors(model: nn.Module, tensors: Mapping[str, Tensor]) -> nn.Module:
    """A copy of a model with other tensors, of any shape, under the canonical names that are given.

    Tensors left out are copied. Ties stay ties.

    >>> import torch
    >>> net = nn.Linear(4, 2)
    >>> tuple(with_tensors(net, {"weight": torch.zeros(2, 3)}).weight.shape)
    (2, 3)
    """
    memo: dict[int, Any] = {}
    for name, own in _named_tensors(model).items():
        tensor = tensors.get(name)
        if tensor is not None:  # the model gets it as it is, without a copy
            isparameter = isinstance(own, nn.Parameter)
            memo[id(own)] = nn.Parameter(tensor, own.requires_grad) if isparameter else tensor
    return copied(model, memo)


@dataclass(frozen=True, eq=False)
class Resizer:
    """Makes smaller copies of one model.

    ``inputs`` are nodes whose values go into its modules, and their shapes, for those without tensors of their own.
    """

    model: nn.Module
    names: Mapping[int, str]
    inputs: Mapping[str, tuple[str, tuple[int, ...]]]

    @staticmethod
    def of(model: nn.Module, graph_module: fx.GraphModule) -> Resizer:
        """Read a traced model."""
        graphs = [graph for graph in (in_training(graph_module), graph_module) if graph is not None]
        calls = [op for graph in graphs for op in OpReader(graph) if op.module is not None and op.inputs]
        inputs = {op.path: (op.input_name, op.input.shape) for op in calls}
        return Resizer(model, canonical_parameters(model), inputs)

    def shrink(self, cut: Cut, state: Mapping[str, Tensor]) -> nn.Module:
        """A copy of the model, with the values of ``state``, from which units are cut.

        Raises:
            SurgeryError: a module cannot be of the size that is left.
        """
        changed: dict[str, Tensor] = {}
        for name, own in _named_tensors(self.model).items():
            value = state[name]
            tensor = cut.tensor(name, value)
            if tensor is not value or value.data_ptr() != own.data_ptr():  # else the copy has one of its own
                changed[name] = tensor
        smaller = with_tensors(self.model, changed)
        for (path, old), (_, new) in zip(self.model.named_modules(), smaller.named_modules(), strict=True):
            fit = next((fit for kind, fit in FITS.items() if isinstance(new, kind)), _fit_by_attribute)
            fit(new, _Kept(self, cut, path, old))
        return smaller


@dataclass(frozen=True, eq=False)
class _Kept:
    """What is kept along the dims of one module's tensors."""

    resizer: Resizer
    cut: Cut
    path: str
    old: Any

    def rows(self, name: str = "weight") -> np.ndarray | None:
        """What is kept along the first dim of one of its tensors; ``None`` for all, or without that tensor."""
        tensor = getattr(self.old, name, None)
        if not isinstance(tensor, Tensor):
            return None
        return self.cut.index(self.resizer.names.get(id(tensor), ""), 0, tensor.shape[0])

    def at_input(self, dim: int) -> np.ndarray | None:
        """What is kept along a dim of its input; ``None`` for all of it, or where the input is not known."""
        if self.path not in self.resizer.inputs:
            return None
        node, shape = self.resizer.inputs[self.path]
        return self.cut.node_index(node, dim % len(shape), shape[dim])

    def groups(self, index: np.ndarray | None, size: int, groups: int) -> int:
        """How many of ``groups`` equal runs of ``size`` indices keep any.

        Raises:
            SurgeryError: those that do keep different numbers of indices.
        """
        if index is None or groups == 1:
            return groups
        runs, counts = np.unique(index // (size // groups), return_counts=True)
        if len(set(counts.tolist())) > 1:
            raise SurgeryError(
                explain("groups of channels would keep different numbers", module=self.path, channels=set(counts))
            )
        return len(runs)


Fit: TypeAlias = Callable[[Any, _Kept], None]


def _fit_convolution(conv: Any, kept: _Kept) -> None:
    conv.groups = kept.groups(kept.rows(), kept.old.weight.shape[0], conv.groups)
    rows, columns = conv.weight.shape[0], conv.weight.shape[1] * conv.groups
    conv.out_channels, conv.in_channels = (columns, rows) if conv.transposed else (rows, columns)


def _fit_linear(linear: Any, kept: _Kept) -> None:
    linear.out_features, linear.in_features = linear.weight.shape


def _fit_channel_norm(norm: Any, kept: _Kept) -> None:
    own = norm.weight if norm.weight is not None else norm.running_mean
    index = kept.at_input(1) if own is None else None
    if own is not None:
        norm.num_features = own.shape[0]
    elif index is not None:
        norm.num_features = len(index)


def _fit_group_norm(norm: Any, kept: _Kept) -> None:
    index = kept.rows() if norm.weight is not None else kept.at_input(1)
    if index is not None:
        norm.num_groups = kept.groups(index, norm.num_channels, norm.num_groups)
        norm.num_channels = len(index)


def _fit_last_dims(norm: Any, kept: _Kept) -> None:
    if getattr(norm, "weight", None) is not None:
        norm.normalized_shape = tuple(norm.weight.shape)
        return
    left = [kept.at_input(dim - len(norm.normalized_shape)) for dim in range(len(norm.normalized_shape))]
    sizes = zip(norm.normalized_shape, left, strict=True)
    norm.normalized_shape = tuple(size if index is None else len(index) for size, index in sizes)


def _fit_embedding(embedding: Any, kept: _Kept) -> None:
    embedding.num_embeddings, embedding.embedding_dim = embedding.weight.shape


def _fit_bilinear(bilinear: Any, kept: _Kept) -> None:
    bilinear.out_features, bilinear.in1_features, bilinear.in2_features = bilinear.weight.shape


def _fit_prelu(prelu: Any, kept: _Kept) -> None:
    prelu.num_parameters = prelu.weight.shape[0]


def _fit_attention(attention: Any, kept: _Kept) -> None:
    rows = attention.out_proj.weight.shape[0]
    attention.embed_dim, attention.head_dim = rows, rows // attention.num_heads
    if attention.in_proj_weight is not None:
        attention.kdim = attention.vdim = attention.in_proj_weight.shape[1]
    else:
        attention.kdim, attention.vdim = attention.k_proj_weight.shape[1], attention.v_proj_weight.shape[1]


def _fit_recurrent(rnn: Any, kept: _Kept) -> None:
    gates = kept.old.weight_ih_l0.shape[0] // kept.old.hidden_size
    rnn.input_size, rnn.hidden_size = rnn.weight_ih_l0.shape[1], rnn.weight_ih_l0.shape[0] // gates
    if rnn.proj_size:
        rnn.proj_size = rnn.weight_hr_l0.shape[0]


def _fit_recurrent_cell(cell: Any, kept: _Kept) -> None:
    cell.hidden_size, cell.input_size = cell.weight_hh.shape[1], cell.weight_ih.shape[1]


def _fit_by_attribute(module: Any, kept: _Kept) -> None:
    """Norms of other libraries that state their shape as torch's do."""
    weight, shape = getattr(module, "weight", None), getattr(module, "normalized_shape", None)
    if isinstance(weight, Tensor) and isinstance(shape, tuple) and tuple(kept.old.weight.shape) == shape:
        module.normalized_shape = tuple(weight.shape)


FITS: dict[Any, Fit] = {
    nn.modules.conv._ConvNd: _fit_convolution,
    nn.Linear: _fit_linear,
    nn.Bilinear: _fit_bilinear,
    nn.modules.batchnorm._NormBase: _fit_channel_norm,
    nn.GroupNorm: _fit_group_norm,
    (nn.LayerNorm, nn.RMSNorm): _fit_last_dims,
    (nn.Embedding, nn.EmbeddingBag): _fit_embedding,
    nn.PReLU: _fit_prelu,
    nn.MultiheadAttention: _fit_attention,
    nn.RNNBase: _fit_recurrent,
    nn.RNNCellBase: _fit_recurrent_cell,
}
"""How a module of torch learns the sizes of its new tensors, by class."""


def _named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers themselves, each once under its canonical name."""
    names = canonical_parameters(model)
    return {name: tensor for name, tensor in model.state_dict(keep_vars=True).items() if names.get(id(tensor)) == name}
