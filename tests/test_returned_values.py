"""Masks in forwards, and what forwards return: masks, dataclasses, named tuples; all read by one function."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import vfsurgery as surgery
from vfsurgery.discovery.verification import randomize, relative_error
from vfsurgery.errors import TraceError
from vfsurgery.tracing.values import tensors_of

X = torch.randn(3, 3, 7, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
Step = Callable[[Tensor], Any]


@dataclass
class Inner:
    mask: Tensor
    names: tuple[str, ...] = ("a",)


@dataclass
class Result:
    logits: Tensor
    inner: Inner
    extra: Any = None


class Pair(NamedTuple):
    logits: Tensor
    mask: Tensor


class Net(nn.Module):
    def __init__(self, inside: Step, returned: Step) -> None:
        super().__init__()
        self.a, self.b, self.out = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 6, 3), nn.Linear(6, 4)
        self.inside, self.returned = inside, returned

    def forward(self, x: Tensor) -> Any:
        return self.returned(self.out(F.relu(self.b(self.inside(self.a(x)))).mean((2, 3))))


def net(inside: Step = F.relu, returned: Step = lambda y: y, seed: int = 0) -> Net:
    torch.manual_seed(seed)
    model = Net(inside, returned).double().eval()
    randomize(model, torch.Generator().manual_seed(seed))
    return model


def written(x: Tensor) -> Tensor:
    x = x.clone()
    x[x < 0] = 0.1
    return x


MASKS: dict[str, Step] = {
    "where": lambda x: torch.where(x > 0, x, 0.1 * x),
    "x.where": lambda x: x.where(x.gt(0), torch.zeros_like(x)),
    "masked_fill": lambda x: x.masked_fill(~(x >= 0) | torch.isnan(x), 0.0),
    "product": lambda x: x * ((x > -1) & (x < 1)).to(x.dtype),
    "logical": lambda x: x * torch.logical_xor(x.less(0.5), torch.isclose(x, x + 1)),
    "written": written,
    "of another": lambda x: x * (x > x.mean((2, 3), keepdim=True)),
    "any": lambda x: x * (x > 0).any(1, keepdim=True),
    "by name": lambda x: F.relu(input=x) * x.flatten(2).max(-1).values[..., None, None],
}


@pytest.mark.parametrize("name", MASKS)
def test_masks_in_a_forward(name: str) -> None:
    model = net(MASKS[name])
    groups = surgery.find_groups(model, X)
    assert not groups.unknown_ops
    assert surgery.verify(model, groups, X)
    assert "a.weight" in {member.parameter for group in groups for member in group.members}
    merged = surgery.merge(model, net(MASKS[name], seed=1), data=X.repeat(20, 1, 1, 1), progress=False)
    assert all(bool(x.isfinite().all()) for x in tensors_of(merged(X)))


RETURNED: dict[str, Step] = {
    "mask": lambda y: (y, y > 0),
    "mask alone": lambda y: y > 0,
    "classes": lambda y: {"logits": y, "classes": y.argmax(1)},
    "infinite": lambda y: (y, y.masked_fill(y < 0, -float("inf"))),
    "nothing": lambda y: [y, y[:0]],
    "dataclass": lambda y: Result(y, Inner(y > 0), extra=[y * 2, 3]),
    "named tuple": lambda y: Pair(y, y > 0),
}


@pytest.mark.parametrize("name", RETURNED)
def test_what_forwards_return(name: str) -> None:
    model = net(returned=RETURNED[name])
    graph_module = surgery.trace(model, X)
    assert type(graph_module(X)) is type(model(X))
    assert relative_error(tensors_of(graph_module(X)), tensors_of(model(X))) == 0
    groups = surgery.find_groups(model, X)
    assert len(groups) == 2
    assert surgery.verify(model, groups, X) or name == "mask alone"  # of which a control may change nothing
    merged = surgery.merge(model, net(returned=RETURNED[name], seed=1), data=X.repeat(40, 1, 1, 1), progress=False)
    assert type(merged(X)) is type(model(X))
    smaller = surgery.prune_units(model, 0.3, example_inputs=X)
    assert smaller.a.weight.shape[0] < 6


def test_a_mask_that_changes_is_noticed() -> None:
    wrong = surgery.find_groups(net(), X)
    fixed = torch.arange(6.0, dtype=torch.float64).view(1, 6, 1, 1) > 2
    model = net(lambda x: x.masked_fill(fixed, 0.0), lambda y: (y, y > y.mean()))
    assert not surgery.verify(model, wrong, X)
    assert surgery.verify(model, surgery.find_groups(model, X), X)


def test_a_module_in_the_middle_may_return_a_dataclass() -> None:
    class Middle(nn.Module):
        def forward(self, x: Tensor) -> Result:
            return Result(x * 2, Inner(x > 0))

    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.middle = Middle()

        def forward(self, x: Tensor) -> Tensor:
            found = self.middle(x)
            return found.logits * found.inner.mask

    model = net(Around())
    assert len(surgery.find_groups(model, X)) == 2
    whole = surgery.find_groups(model, X, leaf="inside.middle")  # a node whose fields are read
    assert len(whole) == 1 and len(whole.unknown_ops) == 1 and surgery.verify(model, whole, X)


def test_differences_of_masks_count_by_entries_and_of_infinities_where_they_differ() -> None:
    infinite = torch.tensor([1.0, -torch.inf])
    assert relative_error([infinite], [infinite.clone()]) == 0
    assert relative_error([torch.tensor([1.0, 2.0])], [infinite]) == float("inf")
    assert relative_error([torch.tensor([torch.nan])], [torch.tensor([torch.nan])]) == float("inf")
    ones = torch.tensor([1, 2, 3, 4], dtype=torch.uint8)
    assert relative_error([ones], [torch.tensor([1, 2, 3, 5], dtype=torch.uint8)]) == 0.25
    assert relative_error([torch.tensor([2.0]), ones > 1], [torch.tensor([2.0]), ones > 2]) == 0.25


class Deciding(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * (1 + int(x.mean() > 0.5))


def test_a_number_that_a_forward_asks_for_is_named_with_module_line_and_remedy() -> None:
    model = net(Deciding())
    message = r"(?s)asks for a number that depends on .*module +inside\n +line +File .*, in forward: return x.*"
    with pytest.raises(TraceError, match=message + r"remedy .*torch.where.*leaf='inside'"):
        surgery.merge(model, net(Deciding(), seed=1), example_inputs=X, progress=False)
    assert surgery.verify(model, surgery.find_groups(model, X, leaf="inside"), X)

    def decides(y: Tensor) -> Tensor:
        return y * 2 if y.mean() > 0 else y

    with pytest.raises(TraceError, match=r"(?s)module +the model itself, a Net\n +line .*y \* 2 if .*into a module"):
        surgery.trace(net(returned=decides), X)
    with pytest.raises(TraceError, match="a tensor whose size depends on the values of its input"):
        surgery.trace(net(lambda x: x * x[x > 0].sum()), X)
