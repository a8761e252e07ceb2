"""What the input of a network reaches: activations, told apart from values that are made of parameters alone.

``x @ A.T @ B.T`` has two activations, ``x @ A.T`` and the result; ``A.T`` and ``B.T`` are nodes too, but they hold
weights, the same whatever comes in, and what lies along their other dims are units and not samples. So are weights that
a forward multiplies, masks, normalizes or stacks.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import fx

from vfsurgery.tracing.ops import SHAPE_QUERIES, canonical_key


def reached_by_input(graph: fx.Graph) -> frozenset[str]:
    """Names of the nodes whose values depend on what the network is given; on its size alone does not count.

    A value that is written into (``out[:, 3:] = x``, ``out.add_(x)``) depends on what is written from there on, and so
    does all that it is a view of.

    >>> import torch, vfsurgery as surgery
    >>> class LowRank(torch.nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.a, self.b = (torch.nn.Parameter(torch.randn(shape)) for shape in ((2, 6), (3, 2)))
    ...     def forward(self, x):
    ...         return x @ self.a.T @ self.b.T
    >>> graph = surgery.trace(LowRank(), torch.randn(4, 6)).graph
    >>> sorted(reached_by_input(graph))
    ['matmul', 'matmul_1', 'output', 'x']
    """
    reached: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op == "placeholder":
            reached.add(node)
        elif not _asks_for_size(node) and not reached.isdisjoint(node.all_input_nodes):
            reached.add(node)
            if _writes(node):
                reached.update(_written_into(node.args[0]))
    return frozenset(node.name for node in reached)


def reaching_output(graph: fx.Graph) -> frozenset[str]:
    """Names of the nodes whose values the outputs depend on: what is only counted or kept is not among them.

    >>> import torch, vfsurgery as surgery
    >>> class Counting(torch.nn.Linear):
    ...     calls = torch.zeros(())
    ...     def forward(self, x):
    ...         self.calls.add_(1)
    ...         return super().forward(x)
    >>> sorted(reaching_output(surgery.trace(Counting(2, 2), torch.randn(1, 2)).graph))
    ['bias', 'linear', 'output', 'weight', 'x']
    """
    reaching: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        writes = _writes(node) and not reaching.isdisjoint(_written_into(node.args[0]))
        if node.op == "output" or node in reaching or writes:
            reaching.update((node, *node.all_input_nodes))
    return frozenset(node.name for node in reaching)


def _asks_for_size(node: fx.Node) -> bool:
    if node.op not in ("call_function", "call_method"):
        return False
    return (node.args[1] if node.target is getattr else canonical_key(node.target)) in SHAPE_QUERIES


def _writes(node: fx.Node) -> bool:
    """Whether a node changes its first operand: an item assignment, or a method whose name ends in ``_``."""
    if node.op not in ("call_function", "call_method") or not node.args:
        return False
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return name == "setitem" or (name.endswith("_") and not name.endswith("__"))


def _written_into(place: object) -> Iterator[fx.Node]:
    """The node that is written into, and all that it may be a view of."""
    while isinstance(place, fx.Node) and place.op not in ("placeholder", "get_attr"):
        yield place
        place = place.args[0] if place.args else None
