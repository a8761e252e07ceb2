"""Traces that hold for one number of images alone.

A forward may make a number of Python's of the batch size, as in ``int(x.shape[0])`` or ``for image in x``. The graph
has the example's in its place: with another one it raises, or worse, takes parts of several images for one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, fx, nn

from vfsurgery.errors import OptionError, explain
from vfsurgery.tracing.values import tensors_of

BOUND = "vfsurgery_bound"
"""Key in a graph module's ``meta``: the number of images that it holds for, 0 for any."""


def bound_to(graph_module: fx.GraphModule) -> int:
    """The number of images that a trace holds for; 0 for any."""
    return int(graph_module.meta.get(BOUND, 0))


def refuse_bound(graph_module: fx.GraphModule) -> None:
    """Refuse to give a trace to the user that does not hold for any number of images.

    Raises:
        OptionError: names what binds it.
    """
    bound = bound_to(graph_module)
    if bound:
        raise OptionError(
            explain(
                f"the result would be a graph that holds for batches of {bound} images alone",
                because=", ".join(guard for guard in graph_module.meta["guards"] if guard.endswith(f"== {bound}")),
                remedy="in the forward take x.shape[0] as it is, without int() or a loop over images; or leave out "
                "what makes a graph of the model: preserve=, or passes that change it",
            )
        )


def find_bound(graph: fx.Graph, root: nn.Module, inputs: Sequence[Tensor]) -> int:
    """The number of images in the example if a graph holds for no other one, else 0.

    Graph and forward are run on one image more. Where the forward cannot, or the graph not even on the example, nothing
    can be said.

    Args:
        graph: What was recorded.
        root: The module whose forward it was.
        inputs: The example, on which both run; fake tensors, to compute no more than shapes.
    """
    counts = {len(x) for x in inputs if x.ndim}
    if len(counts) != 1 or any(not x.ndim for x in inputs):
        return 0
    (count,) = counts
    more = [x.new_zeros(count + 1, *x.shape[1:]) for x in inputs]
    interpreter = fx.Interpreter(root, graph=graph)
    with torch.no_grad():
        try:
            expected = _shapes(root(*more))
            _shapes(interpreter.run(*inputs))
        except Exception:  # whatever a forward may raise that folds frames into the batch, or looks at values
            return 0
        try:
            return 0 if _shapes(interpreter.run(*more)) == expected else count
        except Exception:
            return count


def _shapes(outputs: object) -> list[torch.Size]:
    return [x.shape for x in tensors_of(outputs)]
