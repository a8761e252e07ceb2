"""What each layer of a network makes of the input: feature, offset and spread of its outputs, in one pass.

A layer is a convolution, a linear layer or a normalization layer, read before any activation. It is found while the
network runs, not in a trace: hooks say which module is running, and a ``TorchFunctionMode`` shows the very call that
computes its output (``F.conv2d``, ``F.batch_norm``, ...). So every module will do, a pruned one, a graph module or one
that cannot be traced. Of a module that adds an activation to its norm, as timm's do, the norm's own output is read; a
call outside of such modules is named after the weight that it is given.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from vfsurgery.errors import DataError, explain
from vfsurgery.stats.moments import Moments
from vfsurgery.stats.precision import taken_by
from vfsurgery.tracing.ops import canonical_key, canonical_parameters

BATCH_NORM = "batch norm"
CLASSES: dict[type[nn.Module], str] = {
    nn.modules.conv._ConvTransposeNd: "transposed conv",
    nn.modules.conv._ConvNd: "conv",
    nn.Linear: "linear",
    nn.MultiheadAttention: "linear",  # gives its projection's weights away instead of calling the layer
    nn.modules.batchnorm._BatchNorm: BATCH_NORM,
    nn.modules.batchnorm._NormBase: "norm",
    nn.LayerNorm: "norm",
    nn.GroupNorm: "norm",
    nn.RMSNorm: "norm",
}
"""Kind of layer by class, subclasses first."""

FUNCTIONS = {
    **dict.fromkeys(("conv1d", "conv2d", "conv3d"), "conv"),
    **dict.fromkeys(("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"), "transposed conv"),
    **dict.fromkeys(("layer_norm", "group_norm", "rms_norm", "instance_norm"), "norm"),
    "linear": "linear",
    "batch_norm": BATCH_NORM,
}
"""Kind of layer by the call that computes its output."""

LAST_DIMS = ("layer_norm", "rms_norm")
"""Calls that take the shape of the dims they normalize, the last ones; units lie on the first of these."""

ROOT = "(model)"
"""Name of a network that is one layer itself."""


@dataclass(frozen=True)
class Output:
    """What one layer computed: ``(batch, ...)`` with its units on ``dim``."""

    name: str
    kind: str
    value: Tensor
    dim: int


See: TypeAlias = Callable[[Output], None]


@dataclass
class _Running:
    """A layer's module in the middle of its forward."""

    name: str
    kind: str
    seen: bool = False


class LayerCalls(TorchFunctionMode):
    """While active, shows the output of every layer of ``model`` to ``see`` the moment it is computed.

    >>> net, seen = nn.Sequential(nn.Linear(3, 4), nn.ReLU(inplace=True), nn.Linear(4, 2)), []
    >>> with LayerCalls(net, seen.append).hooked():
    ...     _ = net(torch.zeros(5, 3))
    >>> [(output.name, output.kind, tuple(output.value.shape)) for output in seen]
    [('0', 'linear', (5, 4)), ('2', 'linear', (5, 2))]
    """

    def __init__(self, model: nn.Module, see: See) -> None:
        super().__init__()
        self.model, self.see = model, see
        self.owners = {
            **{id(buffer): name for name, buffer in model.named_buffers()},
            **canonical_parameters(model),
        }
        self.running: list[_Running] = []
        self.calls: Counter[str] = Counter()

    @contextmanager
    def hooked(self) -> Generator[None]:
        """Hooks on all layers' modules, and this mode active."""
        handles: list[Any] = []
        try:
            for path, module in self.model.named_modules():
                kind = next((kind for known, kind in CLASSES.items() if isinstance(module, known)), None)
                if kind is not None:
                    enter, leave = self._hooks(path or ROOT, kind)
                    handles.append(module.register_forward_pre_hook(enter))
                    handles.append(module.register_forward_hook(leave, always_call=True))
            with self:
                yield
        finally:
            for handle in handles:
                handle.remove()

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run any torch function; note it if it is what a layer computes."""
        kwargs = kwargs or {}
        value = func(*args, **kwargs)
        key = _key(func)
        kind = FUNCTIONS.get(key)
        if kind is None or not isinstance(value, Tensor):
            return value
        layer = self.running[-1] if self.running else None
        name = self._owner([*args, *kwargs.values()]) if layer is None else layer.name
        if name is not None and (layer is None or layer.kind == kind):
            dims = len(kwargs.get("normalized_shape") or args[1]) if key in LAST_DIMS else 0
            self._show(name, kind, value, value.ndim - dims if dims else _unit_dim(kind, value))
            if layer is not None:
                layer.seen = True
        return value

    def _hooks(self, name: str, kind: str) -> tuple[Callable[..., None], Callable[..., None]]:
        def enter(module: nn.Module, args: object) -> None:
            self.running.append(_Running(name, kind))

        def leave(module: nn.Module, args: object, output: object) -> None:
            layer = self.running.pop()
            value = cast("Sequence[object]", output)[0] if isinstance(output, tuple) and output else output
            if not layer.seen and isinstance(value, Tensor):  # computed in a way of its own
                self._show(name, kind, value, _unit_dim_of(module, kind, value))

        return enter, leave

    def _show(self, name: str, kind: str, value: Tensor, dim: int) -> None:
        self.calls[name] += 1
        number = self.calls[name]
        self.see(Output(name if number == 1 else f"{name} (call {number})", kind, value, dim))

    def _owner(self, arguments: Sequence[object]) -> str | None:
        """The path of the module whose weight is among the arguments; a weight of another name stands for itself."""
        found = next((self.owners[id(x)] for x in arguments if isinstance(x, Tensor) and id(x) in self.owners), None)
        if found is None:
            return None
        path, _, name = found.rpartition(".")
        return path if path and name in ("weight", "bias", "running_mean") else found


@functools.cache
def _key(func: Any) -> str:
    key = canonical_key(func)
    return key if isinstance(key, str) else ""


def _unit_dim(kind: str, value: Tensor) -> int:
    return value.ndim - 1 if kind == "linear" else 1


def _unit_dim_of(module: nn.Module, kind: str, value: Tensor) -> int:
    """Where a module's units lie if it normalizes its last dims, or the same dims after the batch."""
    shape = getattr(module, "normalized_shape", None)
    if shape is None:
        return _unit_dim(kind, value)
    last = value.ndim - len(shape)
    return last if tuple(value.shape[last:]) == tuple(shape) else 1


@dataclass(frozen=True)
class LayerStatistics:
    """One layer of one network over all images: mean feature norm, offset norm, mean variance of a unit.

    Both norms are root mean squares, ``||.||_2 / sqrt(number of values)``.
    """

    kind: str
    feature: float
    offset: float
    variance: float


@dataclass
class _Totals:
    """Sums over the images so far, on the network's device."""

    kind: str
    count: int
    feature: Tensor  # () float64
    offset: Tensor  # () float64
    moments: Moments


@dataclass
class Reading:
    """Gathers the statistics of all layers of one network, in eval mode, batch by batch.

    ``misfits`` are layers whose outputs are not one block per image, so that no norm per image can be told.
    """

    model: nn.Module
    misfits: dict[str, None] = field(default_factory=dict[str, None])
    _totals: dict[str, _Totals] = field(default_factory=dict[str, _Totals])
    _zeros: dict[tuple[int, ...], dict[str, Tensor]] = field(default_factory=dict[tuple[int, ...], dict[str, Tensor]])

    def update(self, images: Tensor) -> None:
        """Add a batch of images, ``(batch, channels, height, width)``.

        Raises:
            DataError: the network cannot take these images.
        """
        like = next(iter(self.model.parameters()), images)
        images = taken_by(self.model, images.to(like.device))
        offsets, empty = self._offsets(images)
        self._run(images, lambda output: self._add(output, offsets.get(output.name), len(images), empty))

    def _offsets(self, images: Tensor) -> tuple[dict[str, Tensor], int]:
        """What layers make of an empty image, or of as many as there are where the network does not take one alone."""
        one, whole = tuple(images.shape[1:]), tuple(images.shape)
        if one not in self._zeros and whole not in self._zeros:
            try:
                self._zeros[one] = self._of_nothing(images[:1])
            except DataError:
                self._zeros[whole] = self._of_nothing(images)
        return (self._zeros[one], 1) if one in self._zeros else (self._zeros[whole], len(images))

    def _of_nothing(self, images: Tensor) -> dict[str, Tensor]:
        zeros: dict[str, Tensor] = {}
        # cloned, since an activation may overwrite it
        self._run(torch.zeros_like(images), lambda output: zeros.update({output.name: output.value.clone()}))
        return zeros

    def finalize(self) -> dict[str, LayerStatistics]:
        """Statistics by name of layer, in order of execution."""
        fitting = {name: total for name, total in self._totals.items() if name not in self.misfits}
        return {
            name: LayerStatistics(
                total.kind,
                total.feature.item() / total.count,
                total.offset.item() / total.count,
                total.moments.var.mean().item(),
            )
            for name, total in fitting.items()
        }

    def _run(self, images: Tensor, see: See) -> None:
        try:
            with LayerCalls(self.model, see).hooked():
                self.model(images)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            cause = str(error).split("\n")[0]
            raise DataError(
                explain(
                    f"{type(self.model).__name__} cannot take these images", images=tuple(images.shape), cause=cause
                )
            ) from error

    def _add(self, output: Output, zero: Tensor | None, batch: int, empty: int) -> None:
        value = output.value
        if zero is None or value.shape[:1] != (batch * len(zero) // empty,) or value.shape[1:] != zero.shape[1:]:
            self.misfits[output.name] = None
            return
        values, offsets = (x.reshape(count, -1) for x, count in ((value, batch), (zero, empty)))  # (images, values)
        feature, offset = _rms(values - offsets).sum(), batch * _rms(offsets).mean()
        moments = Moments.of(value, dim=output.dim)
        total = self._totals.get(output.name)
        if total is None:
            self._totals[output.name] = _Totals(output.kind, batch, feature, offset, moments)
            return
        total.count += batch
        total.feature += feature
        total.offset += offset
        total.moments = total.moments.merge(moments)


def _rms(rows: Tensor) -> Tensor:
    """Root mean square of each row, ``(rows,)`` float64."""
    rows = rows.float() if rows.dtype.itemsize < 4 else rows
    return torch.linalg.vector_norm(rows, dim=1).double() / math.sqrt(max(rows.shape[1], 1))
