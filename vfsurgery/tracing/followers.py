"""The mode of a model: seeing whether a forward asks for it, and nodes whose arguments depend on it.

An argument that differs between the modes, such as ``dropout_p`` of a functional attention, cannot be a number of the
graph. It becomes a value that is looked up whenever the graph runs: by modules of torch's own base class that return
one of their attributes when they are called, so that the graph is saved, loaded, copied, compiled and exported like any
other, and runs where this library is not installed.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

from torch import fx, nn
from torch.fx.node import map_arg

from vfsurgery.tracing.values import VALUE

FLAG = "in_training"
"""Name of the module, below the one whose forward asks, that says whether it is in training."""
FOLLOWS_MODE = "vfsurgery_follows_mode"
"""Key in ``node.meta``: the node's value depends on the mode alone; the one in eval mode is its abstract value."""
EITHER = "either"
"""End of the name of a module that returns the value for eval mode and the one for training."""


@contextmanager
def reads_of_mode(ignored: Callable[[], bool]) -> Generator[list[nn.Module]]:
    """Collect the modules whose ``training`` is read, by whatever code, but where ``ignored()``."""
    asked: list[nn.Module] = []

    def read(module: nn.Module) -> bool:
        if "training" not in vars(module):  # as of a scripted module, which keeps it elsewhere
            raise AttributeError("training")
        if not ignored():
            asked.append(module)
        return vars(module)["training"]

    def write(module: nn.Module, mode: bool) -> None:
        vars(module)["training"] = mode

    before = vars(nn.Module).get("training")
    nn.Module.training = property(read, write)  # type: ignore[assignment]
    try:
        yield asked
    finally:
        if before is None:
            del nn.Module.training
        else:
            nn.Module.training = before


def telling(attribute: str, **attributes: Any) -> nn.Module:
    """A plain module that returns one of its attributes when it is called.

    >>> telling("training")(), telling("training").eval()(), telling("either", either=(0.0, 0.1))()
    (True, False, (0.0, 0.1))
    """
    module = nn.Module()
    for name, value in attributes.items():
        setattr(module, name, value)
    module.forward = functools.partial(getattr, module, attribute)
    return module


class Followers:
    """Puts what follows the mode into a graph, and its modules into the skeleton that the graph was recorded on."""

    def __init__(self, graph: fx.Graph, skeleton: nn.Module) -> None:
        self.graph, self.skeleton = graph, skeleton
        self._flags: dict[str, fx.Node] = {}

    def either(self, node: fx.Node, in_eval: Any, in_training: Any) -> fx.Node:
        """A value for an argument of ``node``: one in eval mode, another in training."""
        flag = self._flag(node)
        if in_eval is False and in_training is True:
            return flag
        both = self._call(node, EITHER, telling(EITHER, either=(in_eval, in_training)), (in_eval, in_training))
        with self.graph.inserting_before(node):
            return self._noted(self.graph.call_function(operator.getitem, (both, flag)), node, in_eval)

    def module(self, node: fx.Node, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        """Put a call of a new module in the place of ``node``."""
        name = self._free(owner_of(node), f"{node.name}_module", module)
        with self.graph.inserting_before(node):
            made = self.graph.call_module(name, inputs)
        made.meta = dict(node.meta)
        node.replace_all_uses_with(made)
        self.graph.erase_node(node)

    def _flag(self, node: fx.Node) -> fx.Node:
        owner = owner_of(node)
        if owner not in self._flags:  # nodes come in order: the first that asks stands before all others
            self._flags[owner] = self._call(node, FLAG, telling("training"), False)
        return self._flags[owner]

    def _call(self, node: fx.Node, name: str, module: nn.Module, value: Any) -> fx.Node:
        target = self._free(owner_of(node), name if name == FLAG else f"{node.name}_{name}", module)
        with self.graph.inserting_before(node):
            return self._noted(self.graph.create_node("call_module", target), node, value)

    def _noted(self, made: fx.Node, node: fx.Node, value: Any) -> fx.Node:
        made.meta = {key: entry for key, entry in node.meta.items() if key in ("nn_module_stack", "stack_trace")}
        made.meta |= {VALUE: value, FOLLOWS_MODE: True}
        return made

    def _free(self, owner: str, name: str, module: nn.Module) -> str:
        """The path of ``module``, below ``owner`` under a name that nothing there has."""
        place = self.skeleton.get_submodule(owner)
        while hasattr(place, name):
            name += "_"
        place.add_module(name, module)
        return f"{owner}.{name}" if owner else name


def in_eval_mode(arguments: Any) -> Any:
    """Arguments of a node with what depends on the mode replaced by what it is in eval mode."""
    return map_arg(arguments, lambda node: node.meta[VALUE] if FOLLOWS_MODE in node.meta else node)


def owner_of(node: fx.Node) -> str:
    """Path of the module whose forward made a node; empty at the top."""
    stack: dict[str, tuple[str, Any]] = node.meta.get("nn_module_stack") or {}
    return next(reversed(stack.values()))[0] if stack else ""
