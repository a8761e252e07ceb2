"""The public conformance suite: our own passes, matchers and rules keep it, and each kind of mistake is found."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor, fx, nn
from torch.utils.data import Dataset, TensorDataset

import vfsurgery as surgery
from vfsurgery.data.datasets import DATA
from vfsurgery.errors import CertificateError, OptionError
from vfsurgery.groups import Permutation
from vfsurgery.groups.axes import tie_all
from vfsurgery.matching import MATCHERS, Identity, Matching, Problem, WeightMatching, ZipMatching
from vfsurgery.passes import PASSES, Average, CalibrateBiases, Context, Fold, Pass, RemoveBiases, Repair, Rescale, Reset
from vfsurgery.pruning import PRUNERS, Pruning
from vfsurgery.testing import check_data, check_matcher, check_pass, check_pruner, check_rule, make_net
from vfsurgery.testing.nets import NETS, example_images

FLOAT = [torch.float32]


@pytest.fixture(autouse=True)
def _own_names() -> Iterator[None]:
    before = dict(PASSES._entries)
    yield
    PASSES._entries.clear()
    PASSES._entries.update(before)


OWN = [Average(), Fold(), Reset(), Repair(), Rescale(), CalibrateBiases(), RemoveBiases(layers=1)]


@pytest.mark.parametrize("step", OWN, ids=lambda step: step.name)
def test_passes_of_the_library_conform(step):
    check_pass(step)


@pytest.mark.parametrize("matcher", [Identity(), WeightMatching(), ZipMatching()], ids=lambda matcher: matcher.name)
def test_matchers_of_the_library_conform(matcher):
    check_matcher(matcher, nets=["residual"])


@pytest.mark.parametrize("name", NETS)
def test_networks_are_lively_and_leave_the_random_state(name):
    before = torch.get_rng_state()
    model = make_net(name)
    assert torch.equal(torch.get_rng_state(), before)
    with torch.no_grad():
        outputs = model(example_images(8))
    assert outputs.shape == (8, 5) and bool((outputs.std(0) > 1e-3).all())
    assert surgery.verify(model, surgery.find_groups(model, example_images(2)), example_images(2))


@dataclass(frozen=True, kw_only=True)
class Act(Pass):
    """Does one thing to the graph module; the mistakes below are functions of it."""

    name: ClassVar[str] = "act"
    act: int = 0

    def run(self, graph_module: fx.GraphModule, context: Context) -> fx.GraphModule:
        MISTAKES[self.act][0](graph_module, context)
        return graph_module


def first(graph_module: fx.GraphModule) -> nn.Parameter:
    return next(graph_module.parameters())


def put_first(graph_module: fx.GraphModule, make) -> None:
    name, tensor = next(iter(graph_module.named_parameters()))
    owner, _, leaf = name.rpartition(".")
    setattr(graph_module.get_submodule(owner), leaf, nn.Parameter(make(tensor)))


def extra_parameter(graph_module: fx.GraphModule, context: Context) -> None:
    name = next(iter(graph_module.named_parameters()))[0]
    graph_module.get_submodule(name.rpartition(".")[0]).register_parameter("extra", nn.Parameter(torch.zeros(1)))


def one_image(graph_module: fx.GraphModule, context: Context) -> None:
    out = graph_module.graph.output_node()
    with graph_module.graph.inserting_before(out):
        out.args = (graph_module.graph.call_method("reshape", (out.args[0], (2, 5))),)


def unpicklable(graph_module: fx.GraphModule, context: Context) -> None:
    class Local(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x

    with surgery.edit(graph_module) as graph:
        graph.insert_before(graph.graph.output_node(), Local())


COUNTER = [0.0]


def counting(graph_module: fx.GraphModule, context: Context) -> None:
    COUNTER[0] += 1
    first(graph_module).add_(COUNTER[0])


MISTAKES = [
    (lambda graph_module, context: None, None),
    (
        lambda graph_module, context: context.sources[1].state.popitem()[1].add_(1),
        "changed a model that it was to read",
    ),
    (lambda graph_module, context: torch.rand(1), "used torch's or Python's global random state"),
    (lambda graph_module, context: random.random(), "used torch's or Python's global random state"),
    (lambda graph_module, context: np.random.rand(), "used numpy's global random state"),
    (lambda graph_module, context: first(graph_module).fill_(torch.nan), "outputs that are not finite"),
    (lambda graph_module, context: put_first(graph_module, lambda tensor: tensor.double()), "changes dtype or device"),
    (extra_parameter, r"(?s)changes the state_dict keys.*extra.*created_biases"),
    (one_image, "does not run for a batch of 1"),
    (unpicklable, "the result has no pickle"),
    (counting, "gives another result the second time"),
    (lambda graph_module, context: context.sources[0].model.train(), "left a model in another training mode"),
]


@pytest.mark.parametrize("number", range(len(MISTAKES)))
def test_each_mistake_of_a_pass_is_found(number):
    step, message = Act(act=number), MISTAKES[number][1]
    if message is None:
        check_pass(step, nets=["chain"], dtypes=FLOAT, registered=False)
        return
    with pytest.raises(AssertionError, match=message):
        check_pass(step, nets=["chain"], dtypes=FLOAT, registered=False)


class Liar(Act):
    preserves_function = True

    def run(self, graph_module: fx.GraphModule, context: Context) -> fx.GraphModule:
        first(graph_module).mul_(1.5)
        return graph_module


def test_a_false_promise_is_found():
    with pytest.raises(CertificateError, match="pass 'act' declares that it preserves the function"):
        check_pass(Liar(), nets=["chain"], dtypes=FLOAT, registered=False)


def test_a_pass_that_declines_everything_is_not_tested():
    with pytest.raises(AssertionError, match=r"(?s)declines all networks.*residual +bias calibration is defined for"):
        check_pass(CalibrateBiases(), nets=["residual", "layer-norm"], dtypes=FLOAT)


@dataclass(frozen=True)
class Listed(Act):
    options: list[int] = field(default_factory=list)


@dataclass(unsafe_hash=True)
class Open(Pass):
    name: ClassVar[str] = "open"


@dataclass(frozen=True)
class Stands(Act):
    after = ("nowhere",)


@dataclass(frozen=True)
class Shifting(Act):
    size: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "size", self.size + 1)


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (Listed(), r"(?s)cannot be hashed.*use tuples"),
        (Open(), r"(?s)pass 'open' is no frozen dataclass"),
        (Stands(), r"(?s)after or before a pass that does not exist.*nowhere"),
        (Shifting(), r"(?s)is another one when read from its options.*'size': 1"),
    ],
)
def test_options_that_do_not_conform_are_found(step, message):
    with pytest.raises(AssertionError, match=message):
        check_pass(step, registered=False)


def test_a_pass_that_is_not_registered_is_found():
    with pytest.raises(AssertionError, match=r"(?s)pass 'act' is not registered.*@register_pass"):
        check_pass(Act())
    surgery.register_pass(Act)
    check_pass(Act(), nets=["chain"], dtypes=FLOAT)


class Odd:
    """A matcher with one mistake."""

    name, needs_data = "odd", False

    def __init__(self, mistake: str) -> None:
        self.mistake, self.calls = mistake, 0

    def match(self, problem: Problem) -> list[Matching]:
        self.calls += 1
        orders = {group.name: group.identity() for group in problem.groups}
        if self.mistake == "group":
            orders = {"g99": Permutation((0,))}
        elif self.mistake == "size":
            orders = dict.fromkeys(orders, Permutation((0, 1)))
        elif self.mistake == "random":
            torch.rand(1)
        elif self.mistake == "again":
            orders = {} if self.calls > 1 else orders
        elif self.mistake == "states":
            next(iter(problem.states[1].values())).add_(1)
        elif self.mistake == "count":
            return [Matching(orders)] * 7
        return [Matching(orders) for _ in problem.states[1:]]


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        ("group", "orders a group that does not exist"),
        ("size", "an order that does not fit to its group"),
        ("again", r"(?s)gives other orders the second time.*problem.generator"),
        ("states", "changed a model that it was to read only"),
        ("count", "gives 7 matchings"),
    ],
)
def test_each_mistake_of_a_matcher_is_found(mistake, message):
    with pytest.raises(AssertionError, match=message):
        check_matcher(Odd(mistake), nets=["chain"], registered=False)


def test_a_matcher_without_mistake_passes_and_must_be_registered():
    check_matcher(Odd(""), nets=["chain"], registered=False)
    with pytest.raises(AssertionError, match="matcher 'odd' is not registered"):
        check_matcher(Odd(""), nets=["chain"])
    assert "odd" not in MATCHERS


@pytest.mark.parametrize("name", ["magnitude", "random", "wanda", "sparsegpt"])
def test_pruners_of_the_library_conform(name):
    check_pruner(PRUNERS[name](), nets=["chain", "residual"])


@dataclass(frozen=True)
class Guess(surgery.Pruner):
    """A pruner with one mistake."""

    name: ClassVar[str] = "guess"
    mistake: str = ""

    def score(self, work: Pruning) -> Iterator[tuple[str, Tensor]]:
        if self.mistake == "global":
            torch.rand(1)
        for name, weight in work.weights.items():
            draws = torch.Generator().manual_seed(time.perf_counter_ns()) if self.mistake == "again" else work.generator
            yield name, torch.rand(weight.shape, generator=draws)


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        ("again", r"(?s)gives other weights the second time.*work\.generator"),
        ("global", "used torch's or Python's global random state"),
    ],
)
def test_each_mistake_of_a_pruner_is_found(mistake, message):
    check_pruner(Guess(), nets=["chain"], registered=False)
    with pytest.raises(AssertionError, match=message):
        check_pruner(Guess(mistake), nets=["chain"], registered=False)


def test_a_pruner_must_be_registered_and_an_instance():
    with pytest.raises(AssertionError, match="pruner 'guess' is not registered"):
        check_pruner(Guess(), nets=["chain"])
    with pytest.raises(AssertionError, match="is a class"):
        check_pruner(Guess)  # type: ignore[arg-type]
    with pytest.raises(AssertionError, match="is no pruner"):
        check_pruner("guess")  # type: ignore[arg-type]


def odd_data(mistake: str, seed: int) -> Dataset:
    generator = None if mistake == "global" else torch.Generator().manual_seed(seed)
    if mistake == "again":
        generator = torch.Generator().manual_seed(time.perf_counter_ns())
    images = torch.randn(20, 3, 4, 4, generator=generator)
    labels = torch.arange(20) % 3
    if mistake == "bytes":
        images = images.byte()
    if mistake == "labels":
        labels = labels - 0.5
    return TensorDataset(images) if mistake == "pairs" else TensorDataset(images, labels)


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        ("again", "the part train of data 'odd' has other images the second time"),
        ("global", "used torch's or Python's global random state"),
        ("bytes", r"(?s)no float tensors of one shape.*uint8 \(3, 4, 4\)"),
        ("labels", "has labels that are no class"),
        ("pairs", "yields no pairs of image and label"),
    ],
)
def test_each_mistake_of_a_data_set_is_found(mistake, message, monkeypatch):
    monkeypatch.setattr(DATA, "_entries", dict(DATA._entries))
    with pytest.raises(AssertionError, match="data 'odd' is not registered"):
        check_data("odd")
    DATA.register("odd")(lambda seed, mistake="": odd_data(mistake, seed))
    check_data("odd")
    with pytest.raises(AssertionError, match=message):
        check_data("odd", {"mistake": mistake})


class Twice(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


class Rolled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.roll(1, -1) + x


@surgery.rule(Twice, Rolled)
def by_element(op):
    """True of the first class, and not of the second."""
    yield from tie_all(op.input, op.output)


def around(module: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), module, nn.Linear(8, 2))


def test_a_right_rule_passes_and_a_wrong_one_is_found():
    check_rule(around(Twice()), torch.randn(2, 4), groups=1)
    with pytest.raises(AssertionError, match="permuting the groups changes the function"):
        check_rule(around(Rolled()), torch.randn(2, 4))
    with pytest.raises(AssertionError, match="has 1 groups and not 2"):
        check_rule(around(Twice()), torch.randn(2, 4), groups=2)
    with pytest.raises(AssertionError, match="nothing in the model may be permuted"):
        check_rule(nn.Sequential(nn.Linear(4, 2)), torch.randn(2, 4))


def test_an_instance_is_asked_for():
    with pytest.raises(AssertionError, match="is no Pass"):
        check_pass(Repair)  # type: ignore[arg-type]
    with pytest.raises((AssertionError, OptionError), match="is a class"):
        check_matcher(WeightMatching)  # type: ignore[arg-type]
