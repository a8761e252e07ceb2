"""Proof that a smaller model computes what the original computes without the removed units.

The reference is the original in which the removed units are silent: what reads them has zeros there, and their
activations are zero wherever they appear. A norm layer that looks across units (LayerNorm, RMSNorm, GroupNorm) would
count those zeros; in the reference it looks at the kept units only, as it does in the smaller model. All other ops run
as they are, at their original size: where one mixes units in another way (a mean over channels, a split at a constant
place) the outputs differ, and the cut is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from vfsurgery.discovery.roles import READS
from vfsurgery.discovery.verification import TOLERANCE, relative_error, several, without_chance
from vfsurgery.pruning.units.cut import Cut
from vfsurgery.pruning.units.rehearsal import reason_of
from vfsurgery.pruning.units.resize import with_tensors
from vfsurgery.tracing.borrowed import borrowed
from vfsurgery.tracing.graph_modules import put_over
from vfsurgery.tracing.modes import in_training, not_followed
from vfsurgery.tracing.ops import Op, OpReader
from vfsurgery.tracing.precision import Precise
from vfsurgery.tracing.transformers import one_by_one
from vfsurgery.tracing.values import tensors_of

LAST_DIMS = (nn.LayerNorm, nn.RMSNorm)
RUNS = (nn.GroupNorm,)
FUNCTIONS = ("layer_norm", "rms_norm", "group_norm")


@dataclass(frozen=True)
class CutCertificate:
    """How far the outputs of a smaller model are from those of the original with the removed units silent.

    ``error`` is the largest absolute difference over the largest absolute output, ``tolerance`` the bound for
    ``dtype``, the precision that was computed in. ``effect`` is how far silencing the units takes the outputs of the
    original: where that is no more than the tolerance, nothing can be seen, and ``random_weights`` made the proof.
    ``norms`` are norm layers whose statistics are now of the kept units alone. ``failure`` is what a forward raised.
    ``training`` says whether training computes another graph than eval mode, and was compared, too: its forward and
    backward run.
    """

    error: float
    tolerance: float
    dtype: str
    effect: float = 0.0
    random_weights: bool = False
    norms: tuple[str, ...] = ()
    failure: str = ""
    training: bool = False

    def __bool__(self) -> bool:
        return self.error <= self.tolerance

    def __str__(self) -> str:
        verdict = ("holds, in training too" if self.training else "holds") if self else "FAILS"
        verdict += " (shown on random weights)" if self.random_weights else ""
        return (
            f"smaller model == original with the removed units silent: {verdict}, "
            f"relative error {self.error:.1e} (tolerance {self.tolerance:.0e}, {self.dtype})"
        )


def certify_cut(
    model: nn.Module,
    graph_module: fx.GraphModule,
    cut: Cut,
    state: Mapping[str, Tensor],
    smaller: nn.Module,
    inputs: tuple[Tensor, ...],
    precision: torch.dtype,
) -> CutCertificate:
    """Compare a smaller model with the original with silenced units; false where they differ.

    Args:
        model: The original.
        graph_module: Its trace.
        cut: What was removed.
        state: The values it was removed from, by canonical name: the original's, or with removed units folded in.
        smaller: The result, in the precision of ``state`` and ``inputs``.
        inputs: What both are run on.
        precision: The least that casts in their forwards cast to.
    """
    silent = with_tensors(model, {name: _unread(cut, name, tensor) for name, tensor in state.items()})
    dtype = next(tensor.dtype for tensor in state.values() if tensor.is_floating_point())
    name, errors, effects, norms = str(dtype).removeprefix("torch."), list[float](), list[float](), list[str]()
    graphs = {False: graph_module, True: in_training(graph_module)}
    for training, graph in graphs.items():
        if graph is None:
            if (
                training
                and not_followed(graph_module)
                and (failure := _cannot_train(model, smaller, inputs, precision))
            ):
                return CutCertificate(float("inf"), TOLERANCE[dtype], name, failure=failure)
            continue
        reference = Silenced(put_over(silent, graph), cut)
        given = several(inputs) if training else inputs
        try:
            found = run_in(smaller, given, training, precision)
            if training:
                _run_backward(smaller, given, precision)
        except Exception as error:  # whatever a forward may raise when sizes do not fit
            failure = ("in training: " if training else "") + reason_of(error, smaller)
            return CutCertificate(float("inf"), TOLERANCE[dtype], name, failure=failure, training=training)
        expected = run_in(reference.module, given, training, precision, reference.run)
        whole = run_in(model, given, training, precision)
        errors.append(float("inf"))
        if [x.shape for x in found] == [x.shape for x in expected]:
            errors[-1] = relative_error(tuple(found), tuple(expected))
        effects.append(relative_error(tuple(expected), tuple(whole)))
        norms += reference.norms.values()
    return CutCertificate(
        max(errors), TOLERANCE[dtype], name, max(effects), norms=tuple(dict.fromkeys(norms)), training=len(errors) > 1
    )


def run_in(
    model: nn.Module,
    inputs: tuple[Tensor, ...],
    training: bool,
    precision: torch.dtype,
    forward: Callable[..., Any] | None = None,
) -> list[Tensor]:
    """What a model, or a forward that runs its modules, returns in a mode, as the trace goes; no buffer changes."""
    with borrowed(model, {}), torch.no_grad(), one_by_one(), without_chance(training), Precise(precision):
        model.train(training)
        return tensors_of((forward or model)(*inputs))


def _cannot_train(model: nn.Module, smaller: nn.Module, inputs: tuple[Tensor, ...], precision: torch.dtype) -> str:
    """What a smaller model raises in training where the original trains on these inputs."""
    try:
        _run_backward(model, several(inputs), precision)
    except Exception:  # it needs targets, say
        return ""
    try:
        _run_backward(smaller, several(inputs), precision)
    except Exception as error:  # whatever a forward may raise when sizes do not fit
        return "in training: " + reason_of(error, smaller)
    return ""


def _run_backward(model: nn.Module, inputs: tuple[Tensor, ...], precision: torch.dtype) -> None:
    """A step of training without the step: forward, and backward through all outputs."""
    with borrowed(model, {}), torch.enable_grad(), without_chance(), Precise(precision):
        model.train()
        outputs = [x for x in tensors_of(model(*inputs)) if x.requires_grad]
        if outputs:
            torch.stack([x.sum() for x in outputs]).sum().backward()


def _unread(cut: Cut, name: str, tensor: Tensor) -> Tensor:
    """A weight with zeros where it reads removed units."""
    for mask in cut.masks(name, tuple(tensor.shape), lambda member: member.role == READS):
        tensor = tensor.masked_fill(~mask.to(tensor.device), 0)
    return tensor


class Silenced(fx.Interpreter):
    """Runs a traced model with some units zero wherever they appear."""

    def __init__(self, graph_module: fx.GraphModule, cut: Cut) -> None:
        super().__init__(graph_module)
        self.cut = cut
        self._ops = {op.node.name: op for op in OpReader(graph_module) if looks_across_units(op)}
        self._ops = {name: op for name, op in self._ops.items() if self._kept(op)}
        self.norms = {name: op.path or name for name, op in self._ops.items()}

    def run_node(self, n: fx.Node) -> Any:
        """Run one node, and silence the removed units in its value."""
        op = self._ops.get(n.name)
        value = super().run_node(n) if op is None else self._over_kept(n, op)
        if isinstance(value, Tensor) and n.op != "get_attr":
            for mask in self.cut.masks(n.name, tuple(value.shape)):
                value = value.masked_fill(~mask.to(value.device), 0)
        return value

    def _kept(self, op: Op) -> dict[int, np.ndarray]:
        """What is kept along each dim that a norm looks along."""
        shape = op.input.shape
        runs = op.key == "group_norm" or isinstance(op.module, RUNS)
        dims = [1] if runs else range(len(shape) - len(op.argument("normalized_shape", 1)), len(shape))
        found = {dim: self.cut.node_index(op.input_name, dim, shape[dim]) for dim in dims}
        return {dim: index for dim, index in found.items() if index is not None}

    def _over_kept(self, n: fx.Node, op: Op) -> Tensor:
        """A norm of the kept units, put back among zeros."""
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        x: Tensor = args[0] if args else kwargs["input"]
        kept = {dim: torch.from_numpy(index).to(x.device) for dim, index in self._kept(op).items()}
        inner = x
        for dim, index in kept.items():
            inner = inner.index_select(dim, index)
        first = 1 if 1 in kept and (op.key == "group_norm" or isinstance(op.module, RUNS)) else None
        owner = cast(Any, op.module and self.module.get_submodule(op.path))

        def own(name: str, place: int) -> Tensor | None:
            tensor = (
                getattr(owner, name, None) if owner else kwargs.get(name, args[place] if place < len(args) else None)
            )
            if tensor is None:
                return None
            for dim, index in kept.items():
                tensor = tensor.index_select(0 if first else dim - (x.ndim - tensor.ndim), index)
            return tensor

        weight, eps = own("weight", 2), op.argument("eps", 4, None)
        if first:
            y = functional.group_norm(inner, self._runs(op, kept[1]), weight, own("bias", 3), eps or 1e-5)
        else:
            shape = inner.shape[x.ndim - len(op.argument("normalized_shape", 1)) :]
            if op.key == "rms_norm" or isinstance(op.module, nn.RMSNorm):
                y = functional.rms_norm(inner, shape, weight, op.argument("eps", 3, None))
            else:
                y = functional.layer_norm(inner, shape, weight, own("bias", 3), eps or 1e-5)
        for dim, index in reversed(kept.items()):
            wide = [*y.shape[:dim], x.shape[dim], *y.shape[dim + 1 :]]
            y = y.new_zeros(wide).index_copy(dim, index, y)
        return y

    @staticmethod
    def _runs(op: Op, kept: Tensor) -> int:
        groups = op.argument("num_groups", 1)
        return len((kept // (op.input.shape[1] // groups)).unique())


def looks_across_units(op: Op) -> bool:
    """Whether an op is a norm over several units."""
    return op.key in FUNCTIONS or isinstance(op.module, (*LAST_DIMS, *RUNS))
