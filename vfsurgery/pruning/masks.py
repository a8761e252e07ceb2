"""Masks as values: which entries of which weights are kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from vfsurgery.checkpoints import load_state_dict, save_state_dict
from vfsurgery.errors import IncompatibleModelsError, OptionError, explain
from vfsurgery.groups import GroupSet, Permutations, permute_tensor
from vfsurgery.pruning.layers import prunable, stored_weight


@dataclass(frozen=True, eq=False)
class Masks(Mapping[str, Tensor]):
    """For each weight by name a boolean tensor of its shape, true where an entry is kept.

    ``a & b`` keeps what both keep, ``a | b`` what either keeps. Two are equal if they keep the same entries.

    >>> net = nn.Linear(2, 2)
    >>> _ = net.weight.data.copy_(torch.tensor([[1.0, 0.0], [0.0, 2.0]]))
    >>> masks = Masks.of(net)
    >>> masks.sparsity, (masks | Masks.of(nn.Linear(2, 2))).sparsity
    (0.5, 0.0)
    """

    by_name: Mapping[str, Tensor]

    def __post_init__(self) -> None:
        for name, mask in self.by_name.items():
            if mask.dtype != torch.bool:
                raise OptionError(explain(f"the mask of {name} is {mask.dtype}", remedy="masks are torch.bool"))

    @staticmethod
    def of(model: nn.Module, exclude: str | Sequence[str] = ()) -> Masks:
        """The zero pattern that the convolutions and linear layers of a model have now, pruning hooks included."""
        return Masks({name: weight != 0 for name, weight in prunable(model, exclude).items()})

    @staticmethod
    def load(path: str | Path) -> Masks:
        """Read what :meth:`save` wrote.

        Raises:
            CheckpointError: the file is missing or damaged.
            OptionError: it holds something else than masks.
        """
        return Masks(load_state_dict(path))

    def save(self, path: str | Path) -> None:
        """Write a ``.safetensors`` file, whole or not at all.

        Raises:
            CheckpointError: ``path`` has another ending, or cannot be written.
        """
        save_state_dict(self.by_name, path, {"kind": "masks"})

    @property
    def sparsity(self) -> float:
        """Share of all entries that are not kept, 0 to 1."""
        kept, total = (sum(int(x) for x in counts) for counts in zip(*self._counts(), strict=True))
        return 1 - kept / total if total else 0.0

    @property
    def by_layer(self) -> dict[str, float]:
        """The sparsity of each weight."""
        return {name: 1 - kept / total for (name, _), (kept, total) in zip(self.items(), self._counts(), strict=True)}

    def check(self, model: nn.Module) -> None:
        """Refuse a model that these masks do not fit.

        Raises:
            IncompatibleModelsError: names the first mask that has no weight of its name and shape.
        """
        weights = prunable(model)
        for name, mask in self.items():
            shape = tuple(weights[name].shape) if name in weights else "absent"
            if shape != tuple(mask.shape):
                raise IncompatibleModelsError(
                    explain(
                        f"the masks do not fit this {type(model).__name__}",
                        weight=name,
                        shapes=f"mask {tuple(mask.shape)}, weight {shape}",
                        remedy="masks fit the architecture that they were made from",
                    )
                )

    def apply(self, model: nn.Module) -> None:
        """Set to zero, in place, what is not kept; kept entries and weights without a mask stay bit for bit.

        Raises:
            IncompatibleModelsError: see :meth:`check`.
            OptionError: a weight is computed by pruning hooks or a parametrization.
        """
        self.holder(model)()

    def holder(self, model: nn.Module) -> Callable[[], None]:
        """A function that does the same as :meth:`apply` each time it is called, checked once: for after every step.

        Raises:
            IncompatibleModelsError: see :meth:`check`.
            OptionError: see :meth:`apply`.
        """
        self.check(model)
        weights = {name: stored_weight(model, name) for name in self}
        dropped = [(weights[name], ~mask.to(weights[name].device)) for name, mask in self.items()]

        def hold() -> None:
            with torch.no_grad():
                for weight, places in dropped:
                    weight.masked_fill_(places, 0)

        return hold

    def permuted(self, groups: GroupSet, orders: Permutations) -> Masks:
        """The masks of a model whose units have been reordered: ``new[r] = old[order[r]]``."""
        return Masks({name: permute_tensor(name, mask, groups, orders) for name, mask in self.items()})

    def __and__(self, other: Masks) -> Masks:
        return Masks({name: mask & other[name].to(mask.device) for name, mask in self._beside(other)})

    def __or__(self, other: Masks) -> Masks:
        return Masks({name: mask | other[name].to(mask.device) for name, mask in self._beside(other)})

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Masks) or self.keys() != other.keys():
            return NotImplemented if not isinstance(other, Masks) else False
        return all(torch.equal(mask, other[name].to(mask.device)) for name, mask in self.items())

    __hash__ = None  # type: ignore[assignment]

    def __getitem__(self, name: str) -> Tensor:
        return self.by_name[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.by_name)

    def __len__(self) -> int:
        return len(self.by_name)

    def __str__(self) -> str:
        width = max(map(len, self), default=0)
        rows = [f"  {name:<{width}}  {share:7.2%}" for name, share in self.by_layer.items()]
        return "\n".join([f"masks of {len(self)} weights, {self.sparsity:.2%} pruned", *rows])

    def _counts(self) -> list[tuple[int, int]]:
        return [(int(mask.sum()), mask.numel()) for mask in self.values()]

    def _beside(self, other: Masks) -> Iterator[tuple[str, Tensor]]:
        if self.keys() != other.keys():
            odd = sorted(self.keys() ^ other.keys())
            raise IncompatibleModelsError(explain("the masks are of different architectures", weight=odd[0]))
        return iter(self.items())
