"""Proof that permutations preserve a function: the certificate of every merge, and the stronger ``verify``.

A certificate compares one aligned source with itself, on the weights at hand. ``verify`` proves groups for an
architecture: in float64, with normalization parameters and buffers made random (at initialization a forgotten
BatchNorm changes nothing), each group alone and all together, with a negative control that must fail.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from vfsurgery.errors import CertificateError, explain
from vfsurgery.groups import GroupSet, Permutation, PermutationGroup, permute_tensor, random_permutations
from vfsurgery.maps import Order, map_tensor
from vfsurgery.report import Certificate
from vfsurgery.sources import Source, canonical_state, eval_mode
from vfsurgery.tracing.borrowed import borrowed
from vfsurgery.tracing.copies import copied, fresh
from vfsurgery.tracing.precision import Precise, as_real, in_precision, is_inexact, raised, real

TOLERANCE: dict[torch.dtype, float] = {torch.float64: 1e-9, torch.float32: 1e-4}
"""Largest relative output error by the precision computed in; half precision is checked in float32."""


FAINT = 1e-3
"""A matrix whose largest number is smaller (a class token at initialization) changes too little where it is moved."""
LAST_PLACE = 2.0**-52
"""Relative change of a float64 number in its last place."""
ROUNDING_FACTOR = 100
"""How many times the effect of one change in the last place rounding may explain: sums round at every term."""
CONTROLS = 8
"""How many groups are broken on purpose in a verification, at most."""


def outputs_of(
    model: nn.Module, state: Mapping[str, Tensor], inputs: tuple[Tensor, ...], dtype: torch.dtype | None = None
) -> tuple[Tensor, ...]:
    """The tensors a model returns under other parameters and buffers, in eval mode and without gradients.

    Model, state and inputs are afterwards what they were, whatever the forward writes. With ``dtype`` nothing is
    computed in a lower precision: neither what the model holds besides ``state``, nor what its forward casts.
    """
    precise = contextlib.nullcontext() if dtype is None else Precise(dtype)
    with borrowed(model, state, None if dtype is None else partial(raised, dtype=dtype)), torch.no_grad(), precise:
        model.eval()
        result = model(*(x.clone() for x in inputs))
    return tuple(tensor.detach() for tensor in tensors_of(result))


def tensors_of(result: object) -> list[Tensor]:
    """The tensors in what a model returns, in order."""
    if isinstance(result, Tensor):
        return [result]
    if isinstance(result, Mapping):
        return [tensor for item in result.values() for tensor in tensors_of(item)]
    if isinstance(result, tuple | list):
        return [tensor for item in result for tensor in tensors_of(item)]
    return []


def relative_error(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> float:
    """Largest absolute difference over the largest absolute expected value; infinite where NaN appears.

    >>> relative_error((torch.tensor([1.0, 2.5]),), (torch.tensor([1.0, 2.0]),))
    0.25
    """
    scale = max((float(tensor.abs().max()) for tensor in expected), default=0.0)
    worst = max((float((x - y).abs().max()) for x, y in zip(found, expected, strict=True)), default=0.0)
    if worst != worst or scale != scale:
        return float("inf")
    return worst / scale if scale else worst


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
    orders: Mapping[str, Permutation],
    inputs: tuple[Tensor, ...],
    scratch: Mapping[str, Tensor],
) -> Certificate:
    """Compare an aligned source with itself and refuse a difference.

    Args:
        number: The source's place, for messages.
        source: The source as it is.
        groups: The groups of its architecture.
        orders: The order of units it was brought into.
        inputs: What both are run on.
        scratch: Tensors by state-dict key into which reordered ones are written, so that no memory is needed for them.

    Raises:
        CertificateError: the outputs differ by more than the tolerance; names the group that broke them.
    """
    dtype = precision_of(source)
    state = {name: raised(tensor, dtype) for name, tensor in source.state.items()}
    inputs = tuple(raised(x, dtype) for x in inputs)
    expected = outputs_of(source.model, state, inputs, dtype)

    def permute(name: str, chosen: Mapping[str, Permutation]) -> Tensor:
        tensor, place = state[name], scratch[name]
        permuted = permute_tensor(name, tensor, groups, chosen)
        return permuted if permuted is tensor or permuted.dtype != place.dtype else place.copy_(permuted)

    def error(chosen: Mapping[str, Permutation]) -> float:
        permuted = {name: permute(name, chosen) for name in state}
        return relative_error(outputs_of(source.model, permuted, inputs, dtype), expected)

    found = error(orders)
    certificate = Certificate(number, found, TOLERANCE[dtype], str(dtype).removeprefix("torch."))
    if not certificate:
        raise CertificateError(_refusal(certificate, groups, error, orders))
    return certificate


def _refusal(
    certificate: Certificate,
    groups: GroupSet,
    error: Callable[[Mapping[str, Permutation]], float],
    orders: Mapping[str, Permutation],
) -> str:
    """Why a source is refused: a forward that draws random numbers, or the group that breaks the function."""
    number, size = certificate.source, f"{certificate.error:.2e} relative, tolerance {certificate.tolerance:.0e}"
    if error({}) > certificate.tolerance:
        return explain(
            f"source {number} gives different outputs each time it runs; nothing was merged",
            error=size,
            remedy="its forward draws random numbers even in eval mode, or changes its own buffers: make it repeatable",
        )
    alone = {name: error({name: order}) for name, order in orders.items()}
    guilty = max(alone, key=lambda name: alone[name])
    return explain(
        f"aligned source {number} does not compute what source {number} computes; nothing was merged",
        error=f"{size} in {certificate.dtype}",
        group=f"{groups[guilty]}, alone {alone[guilty]:.2e}",
        members=", ".join(map(str, groups[guilty].members[:8])),
        remedy="please report the model; matching='identity' merges without permutations",
    )


@dataclass(frozen=True)
class Verification:
    """Outcome of :func:`verify`: truthy when every group is proven and every negative control failed as it must.

    ``error`` is the largest relative output error, made by ``worst_group``; ``control_error`` the smallest one of the
    groups that were broken on purpose, and must lie above ``tolerance``; it is infinite where no group can be broken.
    ``rounding`` is measured where ``error`` exceeds the tolerance: the output error when nothing moves but every weight
    is off in its last place. Where that is as large, the model is ``undecided``: it computes what no tolerance can tell
    from rounding.
    """

    error: float
    worst_group: str
    control_error: float
    tolerance: float
    groups: int
    rounding: float = 0.0

    def __bool__(self) -> bool:
        return self.error <= self.tolerance and self.control_error > self.tolerance

    @property
    def undecided(self) -> bool:
        """Whether the error is no larger than what rounding alone can make of this model."""
        return self.tolerance < self.error <= ROUNDING_FACTOR * self.rounding

    def __str__(self) -> str:
        verdict = "proven" if self else "NOT proven"
        if self.undecided:
            verdict = f"UNDECIDED, rounding alone makes {self.rounding:.1e}"
        worst = f" ({self.worst_group})" if self.worst_group else ""
        return (
            f"{self.groups} groups {verdict}: largest relative error {self.error:.1e}{worst}, "
            f"negative control {self.control_error:.1e}, tolerance {self.tolerance:.0e}"
        )


def prove(
    model: nn.Module,
    groups: GroupSet,
    inputs: tuple[Tensor, ...],
    *,
    seed: int = 0,
    each: bool = True,
    controls: int = CONTROLS,
) -> Verification:
    """Verify groups on a float64 copy of ``model`` with random weights; see :func:`vfsurgery.verify`.

    Without ``each`` the groups are permuted together only, not on their own too: a tenth of the time for large models.
    At most ``controls`` groups are broken on purpose.
    """
    generator = torch.Generator().manual_seed(seed)
    model = in_precision(copied(fresh(model, inputs)), torch.float64).eval()
    inputs = tuple(raised(x.detach(), torch.float64) for x in inputs)
    randomize(model, generator)
    with Precise(torch.float64):
        return _prove(model, groups, inputs, generator, each, controls)


def _prove(
    model: nn.Module,
    groups: GroupSet,
    inputs: tuple[Tensor, ...],
    generator: torch.Generator,
    each: bool,
    controls: int,
) -> Verification:
    keep_signals_alive(model, inputs, generator)
    state = canonical_state(model)
    expected = outputs_of(model, state, inputs)
    orders = {name: _moving(groups[name], order) for name, order in random_permutations(groups, generator).items()}

    def permuted(chosen: Mapping[str, Permutation]) -> dict[str, Tensor]:
        return {name: permute_tensor(name, tensor, groups, chosen) for name, tensor in state.items()}

    def error(changed: Mapping[str, Tensor]) -> float:
        return relative_error(outputs_of(model, changed, inputs), expected)

    alone = groups if each else ()
    errors = {f"group {group}": error(permuted({group.name: orders[group.name]})) for group in alone}
    together = permuted(orders)
    errors["all groups together"] = error(together)
    worst = max(errors, key=lambda name: errors[name])
    broken: list[float] = []
    # a group of one parameter alone (columns that read equal copies) has nothing that it could fall behind
    breakable = [group for group in groups if len({member.parameter for member in group.members}) > 1]
    for group in breakable[:: -(-len(breakable) // controls) or 1]:
        producer = group.members[0].parameter  # stays where it is in this group, while all the rest moves
        left_behind = permute_tensor(producer, state[producer], _without_producer(groups, group), orders)
        control = error({**together, producer: left_behind})
        if control > TOLERANCE[torch.float64] or _has_influence(model, state, group, inputs, expected):
            broken.append(control)
    control = min(broken, default=0.0 if breakable else float("inf"))
    rounding = 0.0
    if errors[worst] > TOLERANCE[torch.float64]:
        rounding = error({name: _off_in_its_last_place(tensor, generator) for name, tensor in state.items()})
    return Verification(errors[worst], worst, control, TOLERANCE[torch.float64], len(groups), rounding)


def _off_in_its_last_place(tensor: Tensor, generator: torch.Generator) -> Tensor:
    if not is_inexact(tensor):
        return tensor
    signs = torch.randint(0, 2, tensor.shape, generator=generator, dtype=torch.float64).to(tensor) * 2 - 1
    return tensor * (1 + LAST_PLACE * signs)


def _has_influence(
    model: nn.Module,
    state: Mapping[str, Tensor],
    group: PermutationGroup,
    inputs: tuple[Tensor, ...],
    expected: tuple[Tensor, ...],
) -> bool:
    """Whether the outputs depend on a group's units at all; units that nothing reads are no control."""
    member = group.members[0]
    places = torch.from_numpy(member.positions().reshape(-1)).to(state[member.parameter].device)
    changed = state[member.parameter].index_fill(member.dim, places, 0.0)
    return relative_error(outputs_of(model, {**state, member.parameter: changed}, inputs), expected) > 0


def _moving(group: PermutationGroup, order: Permutation) -> Permutation:
    """The order itself, or a rotation of each block where chance has drawn the one that moves nothing."""
    if not order.is_identity:
        return order
    size = group.size
    return Permutation(tuple(unit + 1 if (unit + 1) % size else unit + 1 - size for unit in range(group.units)))


def _without_producer(groups: GroupSet, broken: PermutationGroup) -> GroupSet:
    """The same groups, but one of them leaves the parameter that produces its units where it is."""
    members = tuple(member for member in broken.members if member.parameter != broken.members[0].parameter)
    changed = replace(broken, members=members)
    return GroupSet(tuple(changed if group == broken else group for group in groups))


@torch.no_grad()
def randomize(model: nn.Module, generator: torch.Generator) -> None:
    """Give vectors (norm parameters, biases, buffers) and constant or faint matrices values that permutations change.

    What is positive (scales, variances) comes to lie in [0.5, 1.5], the rest in [-0.5, 0.5]. Other matrices keep their
    values but for a factor: the small ones of transformers, whose attention would hardly depend on queries and keys,
    come to be as large as torch draws them by default.
    """
    for value in canonical_state(model).values():
        if not is_inexact(value) or not value.numel():
            continue
        tensor = as_real(value)
        noise = torch.rand(tensor.shape, generator=generator, dtype=torch.float64).to(tensor)
        if value.ndim <= 1:
            positive = bool((tensor > 0).all())  # scales and variances
            tensor.copy_(0.5 + noise if positive else noise - 0.5)
        elif bool((tensor == tensor.flatten()[0]).all()) or float(tensor.abs().max()) < FAINT:
            tensor.copy_(noise - 0.5)
        else:
            usual = (3 * tensor.numel() / tensor.shape[0]) ** -0.5  # as torch draws linear layers by default
            tensor.mul_((usual / tensor.std()).clamp_min(1.0))


@torch.no_grad()
def keep_signals_alive(model: nn.Module, inputs: tuple[Tensor, ...], generator: torch.Generator) -> None:
    """Set the running statistics of BatchNorm layers near those of ``inputs``, each unit off by a factor of its own.

    With statistics far from the activations, what depends on the input fades from layer to layer, and an error in a
    deep group would hide below the tolerance; or it grows, and rounding with it. Each layer is set when its turn comes,
    on what the layers before it, set already, make of the inputs.
    """

    def set_statistics(norm: nn.modules.batchnorm._BatchNorm, args: tuple[Tensor, ...]) -> None:
        x = args[0]
        if x.numel() == x.shape[1]:  # one value per channel: such statistics do not exist, the random ones stay
            return
        var, mean = torch.var_mean(x, dim=[dim for dim in range(x.ndim) if dim != 1], correction=0)
        var = var.clamp_min(FAINT * float(var.mean()))
        noise = torch.rand((2, len(var)), generator=generator, dtype=torch.float64).to(var)
        assert norm.running_mean is not None and norm.running_var is not None
        norm.running_mean.copy_(mean + 0.2 * (noise[0] - 0.5) * var.sqrt())
        norm.running_var.copy_(var * (0.9 + 0.2 * noise[1]))

    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.running_var is not None]
    hooks = [norm.register_forward_pre_hook(set_statistics) for norm in norms]
    try:
        with eval_mode(model):
            model(*inputs)
    finally:
        for hook in hooks:
            hook.remove()
