"""A pipeline runs passes in order, and sees that each keeps to what it declares."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import fx

from vfsurgery.errors import SurgeryError, explain
from vfsurgery.passes.base import Context, Pass
from vfsurgery.passes.contract import Behaviour, check_needs, check_order, check_preserved
from vfsurgery.tracing.excerpts import node_at_hand, note_node
from vfsurgery.tracing.shapes import renew_values
from vfsurgery.tracing.values import VALUE


@dataclass(frozen=True)
class Pipeline:
    """Passes in order; after each the graph is linted and recompiled, and ``observer`` sees what happened.

    The observer is called with (previous pass or ``None``, graph module, next pass or ``None``).

    Raises:
        OptionError: a pass must stand elsewhere in the order.
    """

    passes: tuple[Pass, ...]
    observer: Callable[[Pass | None, fx.GraphModule, Pass | None], None] = lambda previous, module, following: None

    def __post_init__(self) -> None:
        check_order(self.passes)

    def run(self, graph_module: fx.GraphModule, context: Context) -> fx.GraphModule:
        """Run all passes on ``graph_module``, which is edited.

        Whatever a pass raises comes with a note that says which pass it was, and at which node if that can be told.

        Raises:
            DataError: a pass needs data and there is none.
            OptionError: a pass needs sources and there are none.
            CertificateError: a pass declares that it preserves the function and does not.
            SurgeryError: a pass left an invalid graph behind, or returned no graph module.
        """
        previous: Pass | None = None
        for number, step in enumerate(self.passes):
            self.observer(previous, graph_module, step)
            with self._naming(number, graph_module), torch.no_grad():
                graph_module = run_checked(step, graph_module, context)
            previous = step
        self.observer(previous, graph_module, None)
        return graph_module

    @contextmanager
    def _naming(self, number: int, graph_module: fx.GraphModule) -> Generator[None]:
        try:
            yield
        except Exception as error:
            node = node_at_hand(error, graph_module.graph)
            if node is not None:
                note_node(error, node, graph_module)
            ran = ", ".join(step.name for step in self.passes[:number])
            error.add_note(f"in pass {self.passes[number].name!r}, " + (f"after {ran}" if ran else "the first one"))
            raise


def run_checked(step: Pass, graph_module: fx.GraphModule, context: Context) -> fx.GraphModule:
    """Run one pass and see that it kept to what it declares; :meth:`Pipeline.run` has the errors."""
    check_needs(step, context)
    proven = step.preserves_function and bool(context.inputs)
    before = Behaviour.of(graph_module, context.inputs) if proven else None
    result: object = step.run(graph_module, context)
    if not isinstance(result, fx.GraphModule):
        raise SurgeryError(
            explain(
                f"pass {step.name!r} returned {type(result).__name__} and no graph module",
                remedy="return graph_module, edited or another",
            )
        )
    try:
        result.graph.lint()
    except Exception as error:
        raise SurgeryError(
            explain(
                f"pass {step.name!r} left an invalid graph behind",
                because=error,
                remedy="edit it inside `with surgery.edit(graph_module)`, which keeps it in order",
            )
        ) from error
    result.recompile()
    if any(VALUE not in node.meta for node in result.graph.nodes if node.op.startswith("call_")):
        renew_values(result)  # later passes read shapes
    if before is not None:
        context.errors.append((step.name, check_preserved(step.name, before, result, context.inputs)))
    return result
