"""What each weight axis does with the units on it, and which groups any linear map may be applied to.

A permutation moves all axes of a group alike, and every op of a group lets it through. A general linear map of units,
as a many-to-one pairing (ZipIt!) or a rotation (CCA) needs more. Axes that *write* units take the map, axes that *read*
them take its inverse: for ``z = V f(W x)`` with units mapped by ``T``, ``W`` becomes ``T W`` and ``V`` becomes
``V T^-1``. And it passes only ops that are linear in the units, or that act on all of them alike and element by element
(where it holds approximately, as for ReLU). Products of units, attention, grouped convolutions and norms that look
across units let nothing but permutations through.

Roles follow from the coupling rules: an axis that a rule ties to the op's input alone reads, one that it ties to the
output alone writes, one tied to both (a norm's scale, an added embedding) *scales* single units. Inside an op that is
several layers in one (a recurrent network, attention with its projections) the rule says which axes read.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import networkx as nx
from torch import nn

from vfsurgery.groups.axes import AxisRef, Constraint, Fresh, Reads, Tie, mentioned
from vfsurgery.tracing.ops import Op

READS, WRITES, SCALES = "reads", "writes", "scales"

PASSING_RULES = (
    "vfsurgery.discovery.rules.linear",
    "vfsurgery.discovery.rules.pool",
    "vfsurgery.discovery.rules.movement",
)
"""Modules of :mod:`vfsurgery.discovery.rules` whose ops are linear in the units, or treat each by itself."""
PASSING_OPS = ("add", "sub", "cat", "concat", "concatenate", "chunk", "split", "split_with_sizes", "tensor_split")


@dataclass
class Roles:
    """Roles of parameter axes, and the axes that a general map cannot pass; fed one op after the other.

    ``reached`` are the nodes that depend on the network's input, by name.
    """

    of: dict[AxisRef, str] = field(default_factory=dict[AxisRef, str])
    closed: set[AxisRef] = field(default_factory=set[AxisRef])
    reached: frozenset[str] = frozenset()

    def see(self, op: Op, constraints: Sequence[Constraint], module: str) -> None:
        """Take in what the rule of one op, which stands in ``module``, says."""
        ties = [constraint for constraint in constraints if isinstance(constraint, Tie)]
        if op.node.name not in self.reached:  # what becomes of a weight here decides its roles: not followed
            self.closed.update(ref for tie in ties for ref in mentioned(tie) if isinstance(ref, AxisRef))
            return
        if not self._passes(op, module):
            self.closed.update(ref for tie in ties for ref in mentioned(tie) if isinstance(ref, AxisRef))
        read = {constraint.axis for constraint in constraints if isinstance(constraint, Reads)}
        for component in _joined(ties):
            sides = {_side(ref, op) for ref in component} - {""}
            role = SCALES if len(sides) > 1 else READS if sides == {"input"} else WRITES
            for ref in component:
                if isinstance(ref, Fresh) or ref.tensor.kind != "parameter":
                    continue
                own = READS if ref in read else role
                if self.of.setdefault(ref, own) != own:  # a shared weight that plays two parts
                    self.closed.add(ref)

    def _passes(self, op: Op, module: str) -> bool:
        if op.key in PASSING_OPS or isinstance(op.module, nn.modules.batchnorm._BatchNorm):
            return True
        if module == "vfsurgery.discovery.rules.conv":
            return op.argument("groups", 6, 1) == 1
        if module == "vfsurgery.discovery.rules.pointwise":
            return len([tensor for tensor in op.inputs if tensor.ndim]) == 1
        return module in PASSING_RULES and not any(
            tensor.name not in self.reached for tensor in op.inputs if tensor.kind == "node"
        )


def _side(ref: AxisRef | Fresh, op: Op) -> str:
    if isinstance(ref, Fresh) or ref.tensor.kind != "node":
        return ""
    return "output" if ref.tensor.name == op.node.name else "input"


def _joined(ties: Iterable[Tie]) -> list[set[AxisRef | Fresh]]:
    """The axes of one op in classes of those that are tied to each other."""
    graph: nx.Graph[AxisRef | Fresh] = nx.Graph()
    for tie in ties:
        refs = list(mentioned(tie))
        nx.add_path(graph, refs)
    return list(nx.connected_components(graph))
