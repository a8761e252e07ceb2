"""Copies of experts that have one trunk in common, whose gradients add up, each with its own head and statistics."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor, nn

from vfsurgery.data.batches import row_major
from vfsurgery.errors import DataError, IncompatibleModelsError, explain
from vfsurgery.passes.agreement import first_output
from vfsurgery.stats.batch_norms import BatchNorm, is_batch_norm, set_running
from vfsurgery.stats.moments import Moments
from vfsurgery.tracing.borrowed import set_mode
from vfsurgery.tracing.copies import copied
from vfsurgery.tracing.ops import canonical_parameters


def check_trunk(names: Sequence[str], base: Mapping[str, Tensor], experts: Mapping[str, nn.Module]) -> None:
    """Refuse a trunk that is not everywhere the same.

    Raises:
        IncompatibleModelsError: a tensor is missing in the base or an expert, or has another shape there.
    """
    states = {"the base": base, **{name: expert.state_dict(keep_vars=True) for name, expert in experts.items()}}
    for name in names:
        shapes = {who: tuple(state[name].shape) if name in state else "absent" for who, state in states.items()}
        if len(set(shapes.values())) > 1 or "absent" in shapes.values():
            raise IncompatibleModelsError(
                explain(
                    f"{name} is in the trunk, and is not the same everywhere",
                    shapes=", ".join(f"{who} {shape}" for who, shape in shapes.items()),
                    remedy="leave what differs between tasks to their heads; give experts of one architecture",
                )
            )


@dataclass
class Trunk:
    """What experts have in common: ``leaves``, parameters that all twins read, and names of other tensors of theirs."""

    names: tuple[str, ...]
    leaves: dict[str, nn.Parameter] = field(default_factory=dict[str, nn.Parameter])
    others: tuple[str, ...] = ()

    @staticmethod
    def of(names: Sequence[str], base: Mapping[str, Tensor], experts: Mapping[str, nn.Module]) -> Trunk:
        """Leaves of the first expert's dtype and device, without values yet; tied parameters are one.

        Raises:
            IncompatibleModelsError: as :func:`check_trunk`; or it has no parameters.
        """
        check_trunk(names, base, experts)
        first = next(iter(experts.values()))
        own, canonical = first.state_dict(keep_vars=True), canonical_parameters(first)
        names = tuple(dict.fromkeys(canonical[id(own[name])] for name in names))
        trained = [name for name in names if isinstance(own[name], nn.Parameter) and own[name].is_floating_point()]
        if not trained:
            raise IncompatibleModelsError(explain("the trunk has no parameters", remedy="trunk= names of parameters"))
        leaves = {name: nn.Parameter(torch.empty_like(own[name], requires_grad=False)) for name in trained}
        return Trunk(names, leaves, tuple(name for name in names if name not in leaves))


class Twin:
    """A copy of an expert over a trunk's leaves: head and buffers are its own, and only the leaves have gradients."""

    def __init__(self, task: str, expert: nn.Module, trunk: Trunk, base: Mapping[str, Tensor]) -> None:
        state = expert.state_dict(keep_vars=True)
        memo = {id(state[name]): leaf for name, leaf in trunk.leaves.items()}
        self.task, self.model = task, copied(expert, memo)
        set_mode(self.model, False)
        leaves = {id(leaf) for leaf in trunk.leaves.values()}
        for parameter in self.model.parameters():
            parameter.requires_grad_(id(parameter) in leaves)
        self.norms = {
            path: module
            for path, module in self.model.named_modules()
            if is_batch_norm(module) and module.running_var is not None and f"{path}.running_var" in trunk.others
        }
        statistics = {f"{path}.{name}" for path in self.norms for name in ("running_mean", "running_var")}
        own = self.model.state_dict(keep_vars=True)
        for name in trunk.others:
            if name not in statistics and own[name].is_floating_point():  # a table that nothing trains
                with torch.no_grad():
                    own[name].copy_(base[name])

    def logits(self, images: Tensor) -> Tensor:
        """What the network says of a batch, ``(batch, classes, ...)``, in float32 at least.

        Raises:
            DataError: it does not tell classes apart.
        """
        found = first_output(self.model, row_major(images))
        if found is None or found.ndim < 2 or found.shape[1] < 2:
            shape = None if found is None else tuple(found.shape)
            raise DataError(
                explain(
                    f"task {self.task!r} has no logits of two classes or more",
                    output=shape,
                    remedy="give an expert that returns logits (batch, classes), the trunk's own class tokens apart",
                )
            )
        return found.to(torch.promote_types(found.dtype, torch.float32))

    @contextmanager
    def on_batches(self) -> Generator[None]:
        """Have BatchNorm layers of the trunk take the statistics of each batch, and leave their own as they are.

        So gradients go through the statistics: with fixed ones, what a coefficient does to the scale of a layer, which
        its statistics take out again, drowns all else.
        """
        kept = [(norm, norm.training, norm.momentum) for norm in self.norms.values()]
        try:
            for norm, _, _ in kept:
                if not isinstance(norm, nn.SyncBatchNorm):  # which would look for other processes
                    norm.training, norm.momentum = True, 0.0
            yield
        finally:
            for norm, training, momentum in kept:
                norm.training, norm.momentum = training, momentum

    def estimate(self, batches: Iterable[Tensor]) -> None:
        """Set running statistics to those of batches, the layers before running on those of each batch.

        A layer that is called several times gets those of all its calls together.
        """
        if not self.norms:
            return
        moments: dict[str, Moments] = {}
        with torch.no_grad(), ExitStack() as stack:
            for path, norm in self.norms.items():

                def see(module: nn.Module, args: tuple[Tensor, ...], path: str = path) -> None:
                    batch = Moments.of(args[0], dim=1)
                    moments[path] = moments[path].merge(batch) if path in moments else batch
                    set_running(cast(BatchNorm, module), [batch])

                stack.callback(norm.register_forward_pre_hook(see).remove)
            for images in batches:
                self.model(images)
        with torch.no_grad():
            for path, found in moments.items():
                set_running(self.norms[path], [found])

    def statistics(self) -> dict[str, Tensor]:
        """Running statistics of the trunk's layers, by name; copies."""
        return {
            f"{path}.{name}": cast(Tensor, getattr(norm, name)).detach().clone()
            for path, norm in self.norms.items()
            for name in ("running_mean", "running_var")
        }
