"""Where in a graph something happened, for people: the node, its module, the line of the forward, the nodes around.

Errors carry this as a note, which Python prints below the message: the message itself stays what the failing code said.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any

from torch import fx, nn

from vfsurgery.errors import explain
from vfsurgery.tracing.ops import module_path
from vfsurgery.tracing.values import VALUE, TensorValue

AROUND = 3
"""How many nodes before and after the one in question an excerpt shows."""
LONGEST = 100
"""Characters of a node's line in an excerpt."""
MARK = "while at node"
"""How the note about a node begins."""


def excerpt(node: fx.Node, around: int = AROUND) -> str:
    """The node's line of the graph, marked, with ``around`` lines before and after it.

    >>> graph = fx.symbolic_trace(nn.Sequential(nn.Linear(4, 8), nn.ReLU())).graph
    >>> print(excerpt(list(graph.nodes)[1], around=1))
        input_1 = placeholder()
      > _0 = 0(input_1)
        _1 = 1(_0)
    """
    nodes = list(node.graph.nodes)
    place = nodes.index(node)
    shown = nodes[max(place - around, 0) : place + around + 1]
    return "\n".join(f"  {'>' if each is node else ' '} {describe_call(each)}" for each in shown)


def describe_call(node: fx.Node, longest: int | None = LONGEST) -> str:
    """One node as a line: its name, what it calls and on what, and its shape where that is known.

    A line that must not be cut (``longest=None``) comes without the shape.
    """
    if node.op in ("placeholder", "get_attr", "output"):
        called = "return" if node.op == "output" else "placeholder" if node.op == "placeholder" else str(node.target)
    else:
        called = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
    method = "." if node.op == "call_method" else ""
    given = [*map(str, node.args), *(f"{name}={value}" for name, value in node.kwargs.items())]
    arguments = "" if node.op == "get_attr" else f"({', '.join(given if node.op != 'placeholder' else [])})"
    value = node.meta.get(VALUE)
    shape = f"  {value.shape}" if isinstance(value, TensorValue) and longest is not None else ""
    line = f"{node.name} = {method}{called}{arguments}{shape}"
    return line if longest is None or len(line) <= longest else f"{line[: longest - 3]}..."


def source_line(node: fx.Node) -> str | None:
    """The line of the user's forward that made a node, ``file:line in function: code``; ``None`` if none is known."""
    lines = [line.strip() for line in (node.stack_trace or "").strip().splitlines()]
    place = next((index for index in reversed(range(len(lines))) if lines[index].startswith("File ")), None)
    if place is None:
        return None
    code = f": {lines[place + 1]}" if place + 1 < len(lines) else ""
    return f"{lines[place].removeprefix('File ')}{code}"


def describe_node(node: fx.Node, graph_module: nn.Module | None = None) -> str:
    """All that tells where a node is: name, module, source line, the shapes it reads, and an excerpt of the graph."""
    module = path = None
    if node.op == "call_module":
        path = str(node.target)
        module = None if graph_module is None else _submodule(graph_module, path)
    inside = path or module_path(node)
    values = ((before.name, before.meta.get(VALUE)) for before in node.all_input_nodes)
    shapes = [f"{name} {value.shape}" for name, value in values if isinstance(value, TensorValue)]
    kind = "" if module is None else f", {module}".partition("\n")[0]
    lines = explain(
        f"{MARK} {node.name}",
        module=f"{inside}{kind}" if inside else None,
        source=source_line(node),
        inputs=", ".join(shapes) or None,
    )
    return f"{lines}\n{excerpt(node)}"


def _submodule(graph_module: nn.Module, path: str) -> nn.Module | None:
    try:
        return graph_module.get_submodule(path)
    except AttributeError:
        return None


def note_node(error: BaseException, node: fx.Node, graph_module: nn.Module | None = None) -> None:
    """Attach :func:`describe_node` to an error, unless an inner node is named in it already."""
    if not any(note.startswith(MARK) for note in getattr(error, "__notes__", ())):
        error.add_note(describe_node(node, graph_module))


@contextmanager
def at_node(node: fx.Node, graph_module: nn.Module | None = None) -> Generator[None]:
    """Let errors of the body say that they happened at this node.

    >>> graph = fx.symbolic_trace(nn.Sequential(nn.Linear(4, 8), nn.ReLU())).graph
    >>> try:
    ...     with at_node(list(graph.nodes)[1]):
    ...         raise ValueError("no")
    ... except ValueError as error:
    ...     print(error.__notes__[0].splitlines()[0])
    while at node _0
    """
    try:
        yield
    except Exception as error:
        note_node(error, node, graph_module)
        raise


class Runner(fx.Interpreter):
    """An interpreter whose errors carry a note with the node, its module, the user's source line, and an excerpt."""

    def __init__(self, graph_module: fx.GraphModule) -> None:
        super().__init__(graph_module)
        self.extra_traceback = False  # would rewrite the error's message

    def run_node(self, n: fx.Node) -> Any:
        """Run one node."""
        with at_node(n, self.module):
            return super().run_node(n)


def node_at_hand(error: BaseException, graph: fx.Graph) -> fx.Node | None:
    """The node of a graph that the code was at which raised an error: found in the locals of the innermost frame.

    A pass walks over nodes, so what it holds in a variable ``node`` (or in the only variable with a node) when it fails
    is what the user wants to see.
    """
    found: fx.Node | None = None
    for frame_locals in _locals(error.__traceback__):
        nodes = {
            name: value for name, value in frame_locals.items() if isinstance(value, fx.Node) and value.graph is graph
        }
        if "node" in nodes or len(nodes) == 1:
            found = nodes.get("node") or next(iter(nodes.values()))
    return found


def _locals(traceback: TracebackType | None) -> Iterator[dict[str, Any]]:
    while traceback is not None:
        yield traceback.tb_frame.f_locals
        traceback = traceback.tb_next
