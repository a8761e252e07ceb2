"""A pass from a function, a matcher, and a module with its coupling rule."""

from __future__ import annotations

from torch import Tensor, fx, nn

import vfsurgery as surgery
from vfsurgery.groups.axes import tie_all
from vfsurgery.matching import MATCHERS, Matching, Problem


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


class Softsign(nn.Module):
    """Something that the library does not know; not written so that it could be traced through."""

    def forward(self, x: Tensor) -> Tensor:
        """``x / (1 + |x|)``; looks at values, so only a rule keeps it whole."""
        return x if bool((x == 0).all()) else x / (1 + x.abs())


@surgery.rule(Softsign)
def softsign(op):
    """Each element by itself."""
    yield from tie_all(op.input, op.output)
