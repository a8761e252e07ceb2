"""The certificate of every merge: an aligned source compared with itself, on the weights at hand.

Where training computes another graph than eval mode, so it is in both: with dropout off, and BatchNorm on the
statistics of the batch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TypeAlias

import torch
from torch import Tensor, nn

from vfsurgery.discovery.maps import Order, map_tensor
from vfsurgery.errors import CertificateError, explain
from vfsurgery.groups import GroupSet
from vfsurgery.records.report import Certificate
from vfsurgery.tracing.borrowed import borrowed
from vfsurgery.tracing.chance import several, without_chance
from vfsurgery.tracing.modes import in_training
from vfsurgery.tracing.precision import Precise, is_inexact, raised, real
from vfsurgery.tracing.sources import Source
from vfsurgery.tracing.values import tensors_of

TOLERANCE: dict[torch.dtype, float] = {torch.float64: 1e-9, torch.float32: 1e-4}
"""Largest relative output error by the precision computed in; half precision is checked in float32."""
ROUNDING_FACTOR = 100
"""How many times the effect of one change in the last place rounding may explain: sums round at every term."""


def outputs_of(
    model: nn.Module,
    state: Mapping[str, Tensor],
    inputs: tuple[Tensor, ...],
    dtype: torch.dtype | None = None,
    *,
    training: bool = False,
) -> tuple[Tensor, ...]:
    """The tensors a model returns under other parameters and buffers, in eval mode and without gradients.

    Model, state and inputs are afterwards what they were, whatever the forward writes. With ``dtype`` nothing is
    computed in a lower precision: neither what the model holds besides ``state``, nor what its forward casts. Under
    ``training`` it runs in training, what is left to chance taken out (:func:`without_chance`).
    """
    precise = contextlib.nullcontext() if dtype is None else Precise(dtype)
    with borrowed(model, state, None if dtype is None else partial(raised, dtype=dtype)), torch.no_grad(), precise:
        model.train(training)
        with without_chance(training):
            result = model(*(x.clone() for x in inputs))
    return tuple(tensor.detach() for tensor in tensors_of(result))


def relative_error(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Largest absolute difference over the largest absolute expected value; infinite where NaN appears.

    Infinite values count where they differ alone. Of tensors of no fractions (masks, class indices) it is the share of
    entries that differ, and the larger of both counts.

    >>> relative_error((torch.tensor([1.0, 2.5]),), (torch.tensor([1.0, 2.0]),))
    0.25
    >>> relative_error((torch.tensor([True, False]),), (torch.tensor([True, True]),))
    0.5
    """
    scale, worst, share = 0.0, 0.0, 0.0
    for x, y in zip(found, expected, strict=True):
        x, y = x.detach(), y.detach()
        if not y.numel():
            continue
        if not (y.is_floating_point() or y.is_complex()):
            share = max(share, float((x != y).double().mean()))
            continue
        scale = max(scale, float(y.abs().nan_to_num(posinf=0.0).max()))
        difference = float((x - y).abs().masked_fill(x == y, 0.0).max())
        worst = max(worst, difference if difference == difference else float("inf"))
    return max(worst / scale if scale else worst, share)


def precision_of(source: Source) -> torch.dtype:
    """What a certificate of a source is computed in: the highest precision of its tensors, at least float32.

    A network of several precisions is checked in the highest: its own casts would leave no more than the lowest.
    """
    dtypes = {real(tensor.dtype) for tensor in source.state.values() if is_inexact(tensor)}
    return max(dtypes | {torch.float32}, key=lambda dtype: dtype.itemsize)


def drift(source: Source, groups: GroupSet, orders: Mapping[str, Order], inputs: tuple[Tensor, ...]) -> float:
    """Relative difference between the outputs of a source under maps of its units and its own."""
    dtype = precision_of(source)
    state = {name: raised(tensor, dtype) for name, tensor in source.state.items()}
    inputs = tuple(raised(x, dtype) for x in inputs)
    mapped = {name: map_tensor(name, tensor, groups, orders) for name, tensor in state.items()}
    for path, module in source.model.named_modules():
        name = f"{path}.running_var".lstrip(".")
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and name in mapped:
            mapped[name] = mapped[name].clamp_min(0)  # a sum with negative coefficients, as in the average
    expected = outputs_of(source.model, state, inputs, dtype)
    return relative_error(outputs_of(source.model, mapped, inputs, dtype), expected)


def certify(
    number: int,
    source: Source,
    groups: GroupSet,
    orders: Mapping[str, Order],
    inputs: tuple[Tensor, ...],
    original: Source | None = None,
) -> Certificate:
    """Compare an aligned source with itself and refuse a difference.

    Args:
        number: The source's place, for messages.
        source: The source as it is.
        groups: The groups of its architecture.
        orders: The order of units it was brought into, or exact maps of them.
        inputs: What both are run on.
        original: The source as it came, if it was brought to a canonical form since.

    Raises:
        CertificateError: the outputs differ by more than the tolerance; names the group that broke them.
    """
    dtype, both = precision_of(source), in_training(source.graph_module) is not None
    certificate = Certificate(number, 0.0, TOLERANCE[dtype], str(dtype).removeprefix("torch."))
    for training in (False, True) if both else (False,):
        error = _comparison(source, groups, inputs, dtype, training, original)
        found = error(orders)
        if found > certificate.tolerance and dtype != torch.float64:  # a fault, or rounding that depth has multiplied?
            dtype = torch.float64
            error = _comparison(source, groups, inputs, dtype, training, original)
            found = error(orders)
        certificate = replace(
            certificate,
            error=max(found, certificate.error),
            dtype=str(dtype).removeprefix("torch."),
            training=training,
        )
        if certificate.error > certificate.tolerance:
            raise CertificateError(_refusal(certificate, groups, error, orders))
    return certificate


Comparison: TypeAlias = Callable[[Mapping[str, Order]], float]
"""How far orders of units take a model's outputs."""


def _comparison(
    source: Source,
    groups: GroupSet,
    inputs: tuple[Tensor, ...],
    dtype: torch.dtype,
    training: bool,
    original: Source | None,
) -> Comparison:
    """Of a source in one mode and precision with itself as it came."""
    state = {name: raised(tensor, dtype) for name, tensor in source.state.items()}
    given = tuple(raised(x, dtype) for x in (several(inputs) if training else inputs))
    came = state if original is None else {name: raised(each, dtype) for name, each in original.state.items()}
    expected = outputs_of(source.model, came, given, dtype, training=training)

    def error(chosen: Mapping[str, Order]) -> float:
        permuted = {name: map_tensor(name, tensor, groups, chosen) for name, tensor in state.items()}
        return relative_error(outputs_of(source.model, permuted, given, dtype, training=training), expected)

    return error


def _refusal(
    certificate: Certificate,
    groups: GroupSet,
    error: Comparison,
    orders: Mapping[str, Order],
) -> str:
    """Why a source is refused: a forward that draws random numbers, or the group that breaks the function."""
    number, size = certificate.source, f"{certificate.error:.2e} relative, tolerance {certificate.tolerance:.0e}"
    mode = " in training" if certificate.training else ""
    if error({}) > certificate.tolerance:
        return explain(
            f"source {number} gives different outputs each time it runs{mode}; nothing was merged",
            error=size,
            remedy=f"its forward draws random numbers{mode or ' even in eval mode'}, or changes its own buffers: "
            "make it repeatable",
        )
    alone = {name: error({name: order}) for name, order in orders.items()}
    guilty = max(alone, key=lambda name: alone[name])
    return explain(
        f"aligned source {number} does not compute{mode} what source {number} computes; nothing was merged",
        error=f"{size} in {certificate.dtype}",
        group=f"{groups[guilty]}, alone {alone[guilty]:.2e}",
        members=", ".join(map(str, groups[guilty].members[:8])),
        remedy="please report the model; matching='identity' merges without permutations",
    )
