"""Where the images of a batch lie in what ops read, found by changing one of them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, fx

from vfsurgery.data.batches import are_tokens
from vfsurgery.merging.multitask.routed import Layout
from vfsurgery.tracing.sources import eval_mode

IMAGES, CHANGED = 3, 1
"""Images in the batch, and which is changed."""


def image_layouts(
    graph_module: fx.GraphModule, inputs: Tensor, nodes: Iterable[fx.Node]
) -> dict[fx.Node, Layout | None]:
    """The layout of each node's value, ``None`` if it is the same for all images; what does not tell is left out.

    Two runs in eval mode on three images, of which the second differs. Values that differ in one place of a dim of
    size three have their images there; in the second third of the first dim, windows of images in a row.

    >>> import vfsurgery as surgery
    >>> turned = surgery.trace(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 2)), torch.randn(2, 3, 4))
    >>> image_layouts(turned, torch.randn(2, 3, 4), list(turned.graph.nodes)[:2])
    {input_1: Layout(dim=0, windows=False), _0: Layout(dim=0, windows=False)}
    """
    wanted = set(nodes)
    places = torch.arange(IMAGES, device=inputs.device) % len(inputs)
    before = inputs[places].clone()
    generator = torch.Generator().manual_seed(0)
    if before.is_floating_point():
        noise = torch.randn(before.shape, generator=generator, dtype=torch.float32).to(before)
        before += before.std() * noise
    after = before.clone()
    after[CHANGED] = after[CHANGED].flip(-1) if are_tokens(before) else -after[CHANGED]
    try:
        with eval_mode(graph_module), torch.random.fork_rng([]):
            first, second = (_Values(graph_module, wanted).of(images) for images in (before, after))
    except RuntimeError:  # a graph that holds for another number of images
        return {}
    found: dict[fx.Node, Layout | None] = {}
    for node in graph_module.graph.nodes:
        if node in first and node in second:
            layout = _layout(first[node], second[node])
            if layout is not None or torch.equal(first[node], second[node]):
                found[node] = layout
    return found


def _layout(first: Tensor, second: Tensor) -> Layout | None:
    if first.shape != second.shape or first.ndim < 2:
        return None
    differs = first != second
    for dim, size in enumerate(first.shape):
        if size == IMAGES and _only_within(differs, dim, CHANGED, CHANGED + 1):
            return Layout(dim)
    share, left = divmod(len(first), IMAGES)
    if not left and share > 1 and _only_within(differs, 0, CHANGED * share, (CHANGED + 1) * share):
        return Layout(0, windows=True)
    return None


def _only_within(differs: Tensor, dim: int, start: int, stop: int) -> bool:
    places = differs.movedim(dim, 0).flatten(1).any(1)
    inside = places[start:stop]
    return bool(inside.any()) and int(places.sum()) == int(inside.sum())


class _Values(fx.Interpreter):
    """Keeps the values of some nodes, as they are when the next node comes."""

    def __init__(self, graph_module: fx.GraphModule, wanted: set[fx.Node]) -> None:
        super().__init__(graph_module)
        self.wanted, self.kept = wanted, dict[fx.Node, Tensor]()

    def of(self, images: Tensor) -> dict[fx.Node, Tensor]:
        self.run(images)
        return self.kept

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n in self.wanted and isinstance(value, Tensor):
            self.kept[n] = value.clone()
        return value
