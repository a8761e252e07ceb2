"""Proof that groups are what they are said to be, for an architecture: ``verify``.

In float64, with normalization parameters and buffers made random (at initialization a forgotten BatchNorm changes
nothing), all groups are reordered at once, several times, and outputs compared. One pass proves them all, since the
errors of wrong groups do not cancel: every group has orders of its own, so that not even the halves of a group that was
torn in two move alike each time. Groups broken on purpose show that an error would be seen. Only where one is seen are
halves of the groups tried, to name the wrong ones.

Where training computes another graph than eval mode, all that happens in both.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor, nn

from vfsurgery.discovery.canonical import Canonical, canonical, drawn_map
from vfsurgery.discovery.maps import Order, UnitMap, map_tensor
from vfsurgery.discovery.recording import record
from vfsurgery.discovery.verification.certificate import ROUNDING_FACTOR, TOLERANCE, outputs_of, relative_error
from vfsurgery.discovery.verification.halving import culprits
from vfsurgery.discovery.verification.lively import keep_signals_alive, randomize
from vfsurgery.errors import SurgeryError
from vfsurgery.groups import GroupSet, Permutation, PermutationGroup
from vfsurgery.tracing.chance import several
from vfsurgery.tracing.computed import settle
from vfsurgery.tracing.copies import copied, fresh
from vfsurgery.tracing.examples import ExampleInputs, example_inputs_of
from vfsurgery.tracing.modes import in_training
from vfsurgery.tracing.precision import Precise, in_precision, is_inexact, raised
from vfsurgery.tracing.sources import canonical_state
from vfsurgery.tracing.wrappers import network

MOST_PASSES = 10
"""Forward passes that prove a model that holds, unless groups broken on purpose turn out to be of no effect."""
DRAWS = 2
"""How often all groups are reordered, at least: more often where many small groups leave few orders to tell apart."""
CONTROLS = 4
"""How many groups are broken on purpose, at most."""
TRIED = 8
"""How many of them may turn out to be of no effect."""
TRIES = 100
"""How often orders are drawn that no other group has."""
ROUNDED = 1e-13
"""Relative output errors up to which nothing has changed."""
LAST_PLACE = 2.0**-52
"""Relative change of a float64 number in its last place."""


@dataclass(frozen=True)
class Verification:
    """Outcome of :func:`vfsurgery.verify`: truthy if every group is proven, and those broken on purpose were seen.

    ``error`` is the largest relative output error. Where it exceeds the tolerance, ``worst_group`` names the group that
    makes the largest one, and ``wrong`` all groups that do. ``control_error`` is the smallest error of the groups that
    were broken on purpose, and must lie above ``tolerance``; it is infinite where no group can be broken.
    ``rounding`` is measured where ``error`` exceeds the tolerance: the output error when nothing moves but every weight
    is off in its last place. Where that is as large, or no broken group is seen, the model is ``undecided``.
    ``training`` says whether training computes another graph, and all was shown there, too; ``passes``
    how often the model ran. Of the groups, ``continuous`` were mapped by matrices of their symmetry, too.
    """

    error: float
    worst_group: str
    control_error: float
    tolerance: float
    groups: int
    rounding: float = 0.0
    wrong: tuple[str, ...] = ()
    training: bool = False
    passes: int = 0
    continuous: int = 0

    def __bool__(self) -> bool:
        return self.error <= self.tolerance and self.control_error > self.tolerance

    @property
    def undecided(self) -> bool:
        """Whether the outputs cannot tell.

        Either the error is no larger than what rounding alone makes of this model, or nothing that was broken on
        purpose changes the outputs by more than the tolerance: they hardly depend on the groups.
        """
        if self.error <= self.tolerance:
            return self.control_error <= self.tolerance
        return self.error <= ROUNDING_FACTOR * self.rounding

    def __str__(self) -> str:
        verdict = "proven" if self else "NOT proven"
        if self.undecided:
            blind = "the outputs hardly depend on groups that were broken on purpose"
            why = blind if self.error <= self.tolerance else f"rounding alone makes {self.rounding:.1e}"
            verdict = f"UNDECIDED, {why}"
        verdict += ", in training too" if self and self.training else ""
        worst = f" ({self.worst_group})" if self.worst_group else ""
        others = [name for name in self.wrong if name != self.worst_group]
        also = f", also wrong: {'; '.join(others)}" if others else ""
        mapped = f", {self.continuous} of them mapped by random matrices too" if self.continuous else ""
        return (
            f"{self.groups} groups{mapped} {verdict}: largest relative error {self.error:.1e}{worst}{also}, "
            f"negative control {self.control_error:.1e}, tolerance {self.tolerance:.0e}"
        )


def prove(
    model: nn.Module, groups: GroupSet, inputs: tuple[Tensor, ...], *, seed: int = 0, controls: int = CONTROLS
) -> Verification:
    """Verify groups on a float64 copy of ``model`` with random weights; see :func:`vfsurgery.verify`.

    At most ``controls`` groups are broken on purpose.
    """
    generator = torch.Generator().manual_seed(seed)
    training = _computes_otherwise(model, inputs) if groups.in_training is None else groups.in_training
    model = in_precision(copied(fresh(model, inputs)), torch.float64).eval()
    inputs = tuple(raised(x.detach(), torch.float64) for x in inputs)
    randomize(model, generator)
    settle(model)  # random vectors would make of spectral norm a division by anything
    with Precise(torch.float64):
        keep_signals_alive(model, inputs, generator)
        runs = _Runs(model, groups, canonical_state(model), inputs, passes=1)
        return _prove(runs, (False, True) if training else (False,), generator, controls)


def _computes_otherwise(model: nn.Module, inputs: tuple[Tensor, ...]) -> bool:
    """Whether training computes another graph, as far as that can be seen."""
    try:
        return in_training(record(model, inputs)) is not None
    except SurgeryError:
        return False


@dataclass
class _Runs:
    """Runs of one model under other orders of its units, or maps of them, counted."""

    model: nn.Module
    groups: GroupSet
    state: Mapping[str, Tensor]
    inputs: tuple[Tensor, ...]
    passes: int = 0
    _expected: dict[bool, tuple[Tensor, ...]] = field(default_factory=dict[bool, "tuple[Tensor, ...]"])

    @cached_property
    def canonical(self) -> Canonical:
        """The weights in the form that maps of units suppose."""
        return canonical(self.state, self.groups)

    def moved(self, orders: Mapping[str, Order], groups: GroupSet | None = None) -> dict[str, Tensor]:
        """The weights under other orders, or maps, of the units of all groups, or of others in their place."""
        mapped = any(isinstance(order, UnitMap) for order in orders.values())
        state = self.canonical.state if mapped else self.state
        return {name: map_tensor(name, tensor, groups or self.groups, orders) for name, tensor in state.items()}

    def error(self, state: Mapping[str, Tensor], training: bool) -> float:
        """How far other weights take the outputs."""
        if training not in self._expected:
            self._expected[training] = self._outputs(self.state, training)
        return relative_error(self._outputs(state, training), self._expected[training])

    def _outputs(self, state: Mapping[str, Tensor], training: bool) -> tuple[Tensor, ...]:
        self.passes += 1
        return outputs_of(self.model, state, several(self.inputs) if training else self.inputs, training=training)


def _prove(runs: _Runs, modes: Sequence[bool], generator: torch.Generator, controls: int) -> Verification:
    tolerance = TOLERANCE[torch.float64]
    continuous = [group for group in runs.groups if runs.canonical.maps(group)]
    most = (MOST_PASSES - runs.passes - len(modes) * (1 + bool(continuous)) - 1) // len(modes)
    draws: list[Mapping[str, Order]] = [*drawn_orders(runs.groups, generator, min(_enough_draws(runs.groups), most))]
    if continuous:
        draws.append({**draws[-1], **{group.name: drawn_map(group, generator) for group in continuous}})
    errors = {(mode, n): runs.error(runs.moved(orders), mode) for n, orders in enumerate(draws) for mode in modes}
    (mode, draw), error = max(errors.items(), key=lambda item: item[1])
    rounding, wrong = 0.0, dict[str, float]()
    if error > tolerance:
        nudged = {name: _off_in_its_last_place(tensor, generator) for name, tensor in runs.state.items()}
        rounding = runs.error(nudged, mode)
    if error > max(tolerance, ROUNDING_FACTOR * rounding):
        wrong = _wrong_groups(runs, draws[draw], mode)
        error = max(error, *wrong.values())
    control = _control_error(runs, draws, modes[-1], min(controls, max(1, MOST_PASSES - runs.passes)))
    worst = max(wrong, key=lambda name: wrong[name], default="")
    return Verification(
        error,
        worst,
        control,
        tolerance,
        len(runs.groups),
        rounding,
        tuple(wrong),
        len(modes) > 1,
        runs.passes,
        continuous=len(continuous),
    )


def _wrong_groups(runs: _Runs, orders: Mapping[str, Order], training: bool) -> dict[str, float]:
    """The groups whose orders change the outputs, in words, and by how much."""
    errors: dict[tuple[str, ...], float] = {}

    def fails(names: Sequence[str]) -> bool:
        state = runs.moved({name: orders[name] for name in names})
        errors[tuple(names)] = runs.error(state, training)
        return errors[tuple(names)] > TOLERANCE[torch.float64]

    everywhere = list(orders)
    fails(everywhere)
    suffix = " in training" if training else ""
    return {_in_words(runs.groups, names) + suffix: errors[names] for names in culprits(everywhere, fails)}


def _in_words(groups: GroupSet, names: Sequence[str]) -> str:
    if len(names) == 1:
        return f"group {groups[names[0]]}"
    return f"only together: {', '.join(str(groups[name]) for name in names)}"


def drawn_orders(groups: GroupSet, generator: torch.Generator, draws: int) -> list[dict[str, Permutation]]:
    """Random orders of all groups, drawn several times: each group moves at least once, no two alike each time.

    Only where there are more groups of a few units than orders of them, some do.

    >>> drawn_orders(GroupSet(()), torch.Generator(), 2)
    [{}, {}]
    """
    found: list[dict[str, Permutation]] = [{} for _ in range(draws)]
    taken: set[tuple[Permutation, ...]] = set()
    for group in groups:
        orders = next(_candidates(group, generator, draws, taken), (_rotated(group),) * draws)
        taken.add(orders)
        for own, order in zip(found, orders, strict=True):
            own[group.name] = order
    return found


def _candidates(
    group: PermutationGroup, generator: torch.Generator, draws: int, taken: set[tuple[Permutation, ...]]
) -> Iterator[tuple[Permutation, ...]]:
    """Orders that move a group and that no other group has."""
    for _ in range(TRIES):
        orders = tuple(group.random(generator) for _ in range(draws))
        if orders not in taken and not all(order.is_identity for order in orders):
            yield orders


def _enough_draws(groups: GroupSet) -> int:
    """How many draws tell all groups of equal size apart."""
    draws = DRAWS
    for (size, blocks), count in Counter((group.size, group.blocks) for group in groups).items():
        orders = math.factorial(min(size, 8)) ** min(blocks, 8)
        while orders**draws <= count:
            draws += 1
    return draws


def _rotated(group: PermutationGroup) -> Permutation:
    """The order that moves each unit by one place within its block."""
    size = group.size
    return Permutation(tuple(unit + 1 if (unit + 1) % size else unit + 1 - size for unit in range(group.units)))


def _control_error(runs: _Runs, draws: Sequence[Mapping[str, Order]], training: bool, controls: int) -> float:
    """The smallest error of groups that are broken on purpose, spread over the network; 0 if none has any.

    The parameter that produces a group's units stays where it is, while all the rest moves. A group of one parameter
    alone (columns that read equal copies) has nothing that it could fall behind, and where breaking a group changes
    nothing at all (units that nothing reads, or only their mean) another one is tried.
    """
    breakable = [group for group in runs.groups if len({member.parameter for member in group.members}) > 1]
    chosen = breakable[:: -(-len(breakable) // controls) or 1]
    broken: list[float] = []
    for number, group in enumerate([*chosen, *(group for group in breakable if group not in chosen)][:TRIED]):
        if number >= len(chosen) and broken:
            break
        orders = next(drawn for drawn in reversed(draws) if not drawn[group.name].is_identity)
        error = runs.error(runs.moved(orders, _without_producer(runs.groups, group)), training)
        if error > ROUNDED:
            broken.append(error)
    return min(broken, default=0.0 if breakable else float("inf"))


def _off_in_its_last_place(tensor: Tensor, generator: torch.Generator) -> Tensor:
    if not is_inexact(tensor):
        return tensor
    signs = torch.randint(0, 2, tensor.shape, generator=generator, dtype=torch.float64).to(tensor) * 2 - 1
    return tensor * (1 + LAST_PLACE * signs)


def _without_producer(groups: GroupSet, broken: PermutationGroup) -> GroupSet:
    """The same groups, but one of them leaves the parameter that produces its units where it is."""
    # a scale is folded away where units are mapped, and stays as it is anyway
    producer = next((member for member in broken.members if not member.scales), broken.members[0]).parameter
    members = tuple(member for member in broken.members if member.parameter != producer)
    changed = replace(broken, members=members)
    return GroupSet(tuple(changed if group == broken else group for group in groups))


def verify(
    model: nn.Module, groups: GroupSet, example_inputs: ExampleInputs | None = None, *, seed: int = 0
) -> Verification:
    """Prove that permuting any of ``groups`` leaves what ``model`` computes unchanged.

    In float64 on a copy whose normalization parameters and buffers are random: all groups together, several times, with
    a relative output error below 1e-9; and some groups with a member left out, whose errors must be larger. Also in
    training mode, where that is another graph. The model runs ten times at most, unless an error is seen: then halves
    of the groups are tried until the wrong ones are known.

    Returns:
        A value that is truthy when proven and prints its figures, and the wrong groups.

    >>> from vfsurgery import find_groups
    >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> bool(verify(net, find_groups(net, torch.randn(2, 4)), torch.randn(2, 4)))
    True
    """
    model = network(model)
    return prove(model, groups, example_inputs_of(model, example_inputs), seed=seed)
