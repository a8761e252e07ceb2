"""The conformance suite of combining methods: our own keep it, and each kind of mistake is found."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from vfsurgery.combining import COMBINERS, Combiner, Entry, Problem, TaskArithmetic
from vfsurgery.combining.arithmetic import weighted_sum
from vfsurgery.errors import OptionError
from vfsurgery.testing import check_combiner
from vfsurgery.testing.nets import NETS


@pytest.mark.parametrize("name", list(COMBINERS))
def test_methods_of_the_library_conform(name):
    check_combiner(COMBINERS[name](), nets=["grouped"])


def test_all_networks_are_tried():
    check_combiner(TaskArithmetic())
    with pytest.raises(KeyError, match="none"):
        check_combiner(TaskArithmetic(), nets=[*NETS, "none"])


@dataclass(frozen=True)
class Act(Combiner):
    """Does one thing to a sum of task vectors; the mistakes below are functions of it."""

    act: int = 0
    scale: float = 1.0
    name: ClassVar[str] = "act"

    def combine(self, entry: Entry) -> Tensor:
        return MISTAKES[self.act][0](entry, weighted_sum(entry))


COUNTER = [0]


def counting(entry: Entry, total: Tensor) -> Tensor:
    COUNTER[0] += 1
    return total * COUNTER[0]


def into_a_source(entry: Entry, total: Tensor) -> Tensor:
    return entry.stores[0].read(entry.name, 0, entry.count).reshape(entry.shape).add_(total)


MISTAKES = [
    (lambda entry, total: total, None),
    (lambda entry, total: total.float(), r"(?s)another shape or dtype.*tensor +matrix.*float32.*float64"),
    (lambda entry, total: total.reshape(-1), "another shape or dtype"),
    (into_a_source, "changed a model that it was to read only"),
    (lambda entry, total: total + 0 * float(torch.rand(1)), "global random state"),
    (counting, r"(?s)gives other numbers the second time.*entry.generator"),
    (lambda entry, total: total / 0, "values that are not finite"),
    (lambda entry, total: total + 0.01, r"(?s)moves what no source moved.*zero task vectors stay zero"),
    (lambda entry, total: entry.task_vector(0), r"(?s)sources come in another order.*ordered = True"),
    (lambda entry, total: total * total.abs(), None),
]


@pytest.mark.parametrize("number", range(len(MISTAKES)))
def test_each_mistake_of_a_method_is_found(number):
    method, message = Act(number), MISTAKES[number][1]
    if message is None:
        check_combiner(method, nets=["chain"], registered=False)
        return
    with pytest.raises(AssertionError, match=message):
        check_combiner(method, nets=[], registered=False)


class Scaling(Act):
    def combine(self, entry: Entry) -> Tensor:
        return weighted_sum(entry) * self.scale


class Normed(Act):
    """Takes the norm of what it is given, and says that parts will do."""

    elementwise = True

    def combine(self, entry: Entry) -> Tensor:
        total = weighted_sum(entry)
        return total / total.norm().clamp_min(1e-12)


class Ordered(Act):
    ordered = True

    def combine(self, entry: Entry) -> Tensor:
        return entry.task_vector(0)


class Refusing(Act):
    def plan(self, problem: Problem):
        raise OptionError("never")


@dataclass
class Thawed(Combiner):
    name: ClassVar[str] = "thawed"


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (Scaling(), r"(?s)does not move twice as far with twice the scale.*multiplies it by scale"),
        (Normed(), r"(?s)is elementwise, and numbers of a part depend on others.*elementwise = False"),
        (Refusing(), "refuses any number of sources from 1 to 3"),
        (Thawed(), "Thawed is no frozen dataclass"),
        (Act, "is a class"),
        ("ties", "is no combiner"),
    ],
    ids=str,
)
def test_broken_promises_are_found(method, message):
    with pytest.raises(AssertionError, match=message):
        check_combiner(method, nets=[], registered=False)


def test_what_is_declared_may_be_and_names_have_to_be_registered():
    check_combiner(Ordered(), nets=[], registered=False)
    with pytest.raises(AssertionError, match=r"(?s)'act' is not registered under its name.*@register_combiner"):
        check_combiner(Act(), nets=[])
    check_combiner(replace(TaskArithmetic(), scale=0.7), nets=[])
