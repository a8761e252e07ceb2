"""What must hold for every network. A law returns what is wrong, or ``None``."""

from __future__ import annotations

import copy
import io
import random
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import numpy
import torch
from program import Program
from torch import Tensor, nn

import vfsurgery as surgery
from vfsurgery.groups import GroupSet, Permutation, permute_tensor, random_permutations
from vfsurgery.passes import NORMALIZATIONS
from vfsurgery.tracing.sources import canonical_state

EXACT, SINGLE = 1e-9, 1e-4
"""Relative errors allowed in float64, and where a forward rounds to single precision on its way."""
RESTORED = 1e-4
"""The same after a renormalization, which estimates and solves."""
CHANGES = ("bias-removal", "bias-calibration")
"""Normalizations that change a network that nothing is wrong with: they look at shares alone, not at what units do."""
NOTHING_TO_DO = ("found no layer", "needs BatchNorm")
BATCH = 12


def tensors(result: object) -> list[Tensor]:
    """All tensors of what a network returns."""
    if isinstance(result, Tensor):
        return [result]
    if isinstance(result, dict):
        return [t for item in result.values() for t in tensors(item)]
    if isinstance(result, tuple | list):
        return [t for item in result for t in tensors(item)]
    if is_dataclass(result):
        return [t for f in fields(result) for t in tensors(getattr(result, f.name))]
    return []


@torch.no_grad()
def outputs(model: nn.Module, x: Tensor, training: bool) -> list[Tensor]:
    """What a copy of the network returns; dropout is off, since masks do not move with the units."""
    model = copy.deepcopy(model).train(training)
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.eval()
    functional, nn.functional.dropout = nn.functional.dropout, lambda x, *args, **kwargs: x
    try:
        return [t.double() for t in tensors(model(x.clone()))]
    finally:
        nn.functional.dropout = functional


def distance(found: list[Tensor], expected: list[Tensor]) -> float:
    """Largest relative difference of corresponding tensors."""
    assert len(found) == len(expected) > 0
    worst = 0.0
    for x, y in zip(found, expected, strict=True):
        assert x.shape == y.shape
        difference = float((x - y).abs().max()) / (float(y.abs().max()) or 1.0)
        worst = max(worst, difference if difference == difference else float("inf"))
    return worst


def permuted(model: nn.Module, groups: GroupSet, orders: dict[str, Permutation]) -> nn.Module:
    """A copy whose units stand in another order."""
    result = copy.deepcopy(model)
    with torch.no_grad():
        for name, tensor in canonical_state(result).items():
            tensor.copy_(permute_tensor(name, tensor.clone(), groups, orders))
    return result


@dataclass
class Subject:
    """A network with its groups; made once and read by all laws."""

    program: Program

    def __post_init__(self) -> None:
        self.model = self.program.build()
        self.x = self.program.images(BATCH)
        self.tolerance = SINGLE if "cast" in self.program.has else EXACT
        self.groups = surgery.find_groups(self.model, self.x[:2])
        self.planted = permuted(self.model, self.groups, self._orders(0))

    def _orders(self, seed: int) -> dict[str, Permutation]:
        return random_permutations(self.groups, torch.Generator().manual_seed(seed))

    def differs(self, other: nn.Module, tolerance: float | None = None) -> str | None:
        """Whether another network computes something else, in eval or in train mode."""
        for training in (False, True):
            error = distance(outputs(other, self.x, training), outputs(self.model, self.x, training))
            if error > (tolerance or self.tolerance):
                return f"differs by {error:.1e} in {'train' if training else 'eval'} mode"
        return None


def groups_preserve_the_function(subject: Subject) -> str | None:
    """Every group alone and all together leave the function unchanged, and verify says so."""
    orders = subject._orders(1)
    for group in subject.groups:
        wrong = subject.differs(permuted(subject.model, subject.groups, {group.name: orders[group.name]}))
        if wrong:
            return f"group {group} {wrong}"
    wrong = subject.differs(subject.planted)
    return f"all groups together: {wrong}" if wrong else None


def verify_agrees(subject: Subject) -> str | None:
    """``verify`` proves what holds, unless the outputs cannot tell."""
    found = surgery.verify(subject.model, subject.groups, subject.x[:2])
    return None if found or found.undecided else f"verify says: {found}"


def planted_orders_are_recovered(subject: Subject) -> str | None:
    """A network merged with a reordered copy of itself, matched by weights, computes what it computed."""
    merged = _merged(subject, matching="weights", renormalize=None, example_inputs=subject.x[:2])
    return subject.differs(merged, 1e3 * subject.tolerance)


def result_is_a_network_of_its_own(subject: Subject) -> str | None:
    """The result has a's class, keys, ties and modes, shares no storage with a source, and loads again."""
    merged = _merged(subject, matching="weights", renormalize=None, example_inputs=subject.x[:2])
    model = subject.model
    if type(merged) is not type(model) or list(merged.state_dict()) != list(model.state_dict()):
        return "has another class or other keys"
    if [*map(_ties(merged).get, merged.state_dict())] != [*map(_ties(model).get, model.state_dict())]:
        return "has other ties"
    if [(n, m.training) for n, m in merged.named_modules()] != [(n, m.training) for n, m in model.named_modules()]:
        return "has other modules or modes"
    storages = {t.untyped_storage().data_ptr() for m in (model, subject.planted) for t in _all_tensors(m) if t.numel()}
    if any(t.untyped_storage().data_ptr() in storages for t in _all_tensors(merged) if t.numel()):
        return "shares storage with a source"
    if [(n, p.requires_grad) for n, p in merged.named_parameters()] != [
        (n, p.requires_grad) for n, p in model.named_parameters()
    ]:
        return "has other parameters that take gradients"
    file = io.BytesIO()
    torch.save(merged.state_dict(), file)
    file.seek(0)
    fresh = subject.program.build()
    fresh.load_state_dict(torch.load(file))
    for training in (False, True):
        if distance(outputs(fresh, subject.x, training), outputs(merged, subject.x, training)):
            return "computes something else once it is saved and loaded"
    return None


def sources_stay_as_they_are(subject: Subject) -> str | None:
    """Nothing of a source or of the process changes, not even the identity of a tensor."""
    sources = [subject.model, subject.planted]
    for source in sources:
        for number, parameter in enumerate(source.parameters()):
            parameter.grad = torch.full_like(parameter, 0.5) if number % 2 else None
            parameter.requires_grad_(number % 3 > 0)
    next(iter(sources[1].modules())).train()
    before = [_fingerprint(source) for source in sources]
    state = torch.get_rng_state(), random.getstate(), numpy.random.get_state()[1].tolist()
    try:
        surgery.merge(*sources, data=[subject.x], matching="activations", renormalize=None, progress=False)
    finally:
        after = [_fingerprint(source) for source in sources]
        same = torch.equal(torch.get_rng_state(), state[0]) and random.getstate() == state[1]
        same = same and numpy.random.get_state()[1].tolist() == state[2]
        for source in sources:
            source.eval().requires_grad_(True)
            for parameter in source.parameters():
                parameter.grad = None
    for number, (old, new) in enumerate(zip(before, after, strict=True)):
        changed = [name for name in {**old, **new} if not _same(old.get(name), new.get(name))]
        if changed:
            return f"source {number} changed: {', '.join(changed[:5])}"
    return None if same else "the global random state changed"


@torch.no_grad()
def settled(model: nn.Module, x: Tensor) -> nn.Module:
    """A copy whose BatchNorm layers have the statistics of what its eval mode gives them, all calls counted the same.

    RESET has those of the training mode, and they differ: by ``n / (n - 1)`` in the variances, and behind a layer that
    is called several times, whose calls share their statistics in eval mode alone.
    """
    model = copy.deepcopy(model)
    for norm in model.modules():  # in the order in which they are called
        if isinstance(norm, nn.modules.batchnorm._BatchNorm):
            norm.momentum = None
            norm.reset_running_stats()
            norm.train()
            model(x.clone())
            norm.eval()
    return model


def self_merge_is_the_network(subject: Subject) -> str | None:
    """Every renormalization of a network merged with itself returns it, where its statistics are those of the data.

    Of the data in training mode, which is what RESET sets; in eval mode for regress, which runs the sources in it.
    """
    data, plain = [subject.x], subject.model
    names = [name for name in NORMALIZATIONS if name not in CHANGES]
    has_norms = any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in plain.modules())
    reset = surgery.run_passes(plain, "reset", data=data, progress=False) if has_norms else plain
    for name in names:
        model = settled(plain, subject.x) if name == "regress" else reset
        try:
            merged = surgery.merge(
                model, copy.deepcopy(model), data=data, matching="identity", renormalize=name, progress=False
            )
        except surgery.SurgeryError as error:
            if any(words in str(error) for words in NOTHING_TO_DO):
                continue
            raise
        error = distance(outputs(merged, subject.x, False), outputs(model, subject.x, False))
        if error > RESTORED:
            return f"{name} changed it by {error:.1e}"
    return None


LAWS: tuple[Callable[[Subject], str | None], ...] = (
    groups_preserve_the_function,
    verify_agrees,
    planted_orders_are_recovered,
    result_is_a_network_of_its_own,
    sources_stay_as_they_are,
    self_merge_is_the_network,
)


def broken_law(program: Program, laws: tuple[Callable[[Subject], str | None], ...] = LAWS) -> str | None:
    """The first law that a network breaks, in words; errors that are no refusal of something unsupported count."""
    try:
        subject = Subject(program)
    except Exception as error:
        return f"find_groups: {type(error).__name__}: {error}"
    for law in laws:
        try:
            wrong = law(subject)
        except Exception as error:
            wrong = f"{type(error).__name__}: {error}"
        if wrong:
            return f"{law.__name__}: {wrong}"
    return None


def _merged(subject: Subject, **options: Any) -> nn.Module:
    return surgery.merge(subject.model, subject.planted, progress=False, **options)


def _ties(model: nn.Module) -> dict[str, str]:
    first: dict[int, str] = {}
    return {name: first.setdefault(id(t), name) for name, t in model.state_dict(keep_vars=True).items()}


def _all_tensors(model: nn.Module) -> Iterator[Tensor]:
    for module in model.modules():
        for value in (*module._parameters.values(), *module._buffers.values(), *vars(module).values()):
            if isinstance(value, Tensor):
                yield value


def _fingerprint(model: nn.Module) -> dict[str, Any]:
    """All that a module holds: objects by identity, tensors by value too."""
    found: dict[str, Any] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        found[f"{path} is"] = id(module)
        for name, value in vars(module).items():
            if isinstance(value, dict):
                found[f"{path}.{name}"] = [(key, id(item)) for key, item in value.items()]
                for key, item in value.items():
                    if isinstance(item, Tensor):
                        found[f"{path}.{key}"] = (item.detach().clone(), item.requires_grad, item._version)
                        found[f"{path}.{key}.grad"] = None if item.grad is None else item.grad.clone()
            else:
                found[f"{path}.{name}"] = value.clone() if isinstance(value, Tensor) else value
    return found


def _same(old: Any, new: Any) -> bool:
    if isinstance(old, Tensor) and isinstance(new, Tensor):
        return torch.equal(old, new)
    if isinstance(old, tuple | list) and isinstance(new, tuple | list):
        return len(old) == len(new) and all(_same(x, y) for x, y in zip(old, new, strict=True))
    return old is new or (type(old) is type(new) and not isinstance(old, weakref.ref) and bool(old == new))
