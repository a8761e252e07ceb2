"""A pass from a function, a matcher, a pruner, a data set, a stage of recipes, and a module with its coupling rule."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx, nn
from torch.utils.data import TensorDataset

import vfsurgery as surgery
from vfsurgery.data.datasets import DATA
from vfsurgery.groups.axes import tie_all
from vfsurgery.matching import MATCHERS, Matching, Problem
from vfsurgery.pruning import PRUNERS, Pruning
from vfsurgery.recipes.bench import Bench, Told
from vfsurgery.recipes.stage import Stage, stage


@surgery.register_pass(preserves_function=True)
def move_scale(graph_module: fx.GraphModule, context: surgery.Context, *, factor: float = 2.0) -> None:
    """Make the layer before a ReLU ``factor`` times as large and the linear layer behind it as much smaller."""
    first, second = surgery.select(graph_module, op=nn.Linear)[-2:]
    graph_module.get_submodule(str(first.target)).weight.mul_(factor)
    graph_module.get_submodule(str(first.target)).bias.mul_(factor)
    graph_module.get_submodule(str(second.target)).weight.div_(factor)
    context.notes.append(f"moved a factor of {factor}")


@MATCHERS.register("reversed")
class Reversed:
    """Every group the other way round: a matcher that asks for nothing."""

    name = "reversed"
    needs_data = False

    def match(self, problem: Problem) -> list[Matching]:
        """Reverse the units of groups that are not nested."""
        plain = [group for group in problem.groups if not group.outer and group.blocks == 1]
        orders = {group.name: surgery.Permutation(tuple(reversed(range(group.units)))) for group in plain}
        return [Matching(orders) for _ in problem.states[1:]]


@PRUNERS.register("last")
@dataclass(frozen=True)
class Last(surgery.Pruner):
    """Keep the entries that stand last, ``shift`` places further round."""

    name: ClassVar[str] = "last"
    shift: int = 0

    def score(self, work: Pruning) -> Iterator[tuple[str, Tensor]]:
        """Their places."""
        for name, weight in work.weights.items():
            yield name, torch.arange(weight.numel(), dtype=torch.float32).roll(self.shift).view(weight.shape)


@DATA.register("stripes")
def stripes(*, seed: int = 0, count: int = 40) -> TensorDataset:
    """Images of 8 x 8 with one bright row, which is the class."""
    images = torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(seed))
    labels = torch.arange(count) % 8
    images[torch.arange(count), 0, labels] += 5
    return TensorDataset(images, labels)


class Softsign(nn.Module):
    """Something that the library does not know; not written so that it could be traced through."""

    def forward(self, x: Tensor) -> Tensor:
        """``x / (1 + |x|)``; looks at values, so only a rule keeps it whole."""
        return x if bool((x == 0).all()) else x / (1 + x.abs())


@surgery.rule(Softsign)
def softsign(op):
    """Each element by itself."""
    yield from tie_all(op.input, op.output)


@stage("count-zeros", images=False, kept=False)
class CountZeros(Stage):
    """Say how many parameters of the networks are zero."""

    text: str = "parameters are zero"

    def work(self, bench: Bench) -> tuple[dict[str, nn.Module], Told]:
        """Count."""
        counts = [sum(int((each == 0).sum()) for each in model.parameters()) for model in bench.models.values()]
        return {}, Told(lines=[f"{count} {self.text}" for count in counts])
