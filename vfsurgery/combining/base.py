"""What a combining method is given and what it returns.

Models that were fine-tuned from one checkpoint, the *base*, have their units in one order. What training added to it is
a *task vector*, ``tau_i = theta_i - theta_0``, tensor by tensor. A :class:`Combiner` makes one task vector of several,
and the result is ``theta_0 + scale * combined``. Without a base ``theta_0`` is zero, and weights themselves are
combined.

A method sees one tensor at a time, so that models are never held whole: :meth:`Combiner.plan` may go through all
tensors as often as it needs for what concerns all of them (a threshold, a norm), and returns what is then done to each.
The same code runs on models in memory and on files, and gives the same bits.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any, ClassVar, Protocol, Self, TypeAlias, TypeVar, cast

import torch
from torch import Tensor

from vfsurgery.errors import OptionError, did_you_mean, explain
from vfsurgery.registry import Registry
from vfsurgery.tracing.sources import Source

PART = 2**18
"""Numbers of a tensor that methods which work number by number are given at a time: a few stay in a CPU's cache. Draws
depend on it, so it never changes."""


class Kind(Enum):
    """What becomes of a tensor, decided once, before any method."""

    MATRIX = "matrix"
    """The weight of a linear map or convolution: methods for matrices act on it."""
    REST = "rest"
    """All other trained numbers: biases, norms, embeddings, tables, grouped convolutions."""
    HEAD = "head"
    """Trained numbers that the base has in another shape or lacks: the mean of the sources."""
    STATISTICS = "statistics"
    """Running statistics, which are no part of task vectors: the mean of the sources."""
    FIXED = "fixed"
    """Integers, masks and tables that nothing trains: those of the base."""


@dataclass(frozen=True)
class Trait:
    """What is known of a tensor: its kind, the dim along which a matrix reads units, and its depth from 0 to 1.

    ``depth`` is ``None`` where no graph tells. ``parts`` are the rows of each projection that lies in a matrix, where
    there are several; ``None`` if there may be, and nothing tells which.
    """

    kind: Kind
    reads: int = 1
    depth: float | None = None
    parts: tuple[tuple[int, ...], ...] | None = field(default=(), repr=False)


class Store(Protocol):
    """The tensors of one model, in memory or in a file."""

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Numbers ``start`` to ``stop`` of a tensor laid out flat, of the tensor's own dtype."""
        ...


@dataclass(frozen=True)
class InMemory:
    """A state dict as a :class:`Store`."""

    state: Mapping[str, Tensor]

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """See :class:`Store`."""
        return self.state[name].detach().reshape(-1)[start:stop]


@dataclass(frozen=True)
class Entry:
    """One tensor of all sources, or the part of it from ``start`` to ``stop`` where it is laid out flat.

    Attributes:
        name: Its key.
        shape: Of the whole tensor.
        trait: What it is.
        weights: A number for each source.
        dtype: What is computed in, and what the results are of: float32, or float64 for weights of that.
    """

    name: str
    shape: tuple[int, ...]
    trait: Trait
    weights: tuple[float, ...]
    dtype: torch.dtype
    stores: Sequence[Store] = field(repr=False)
    base: Store | None = field(default=None, repr=False)
    start: int = 0
    stop: int = 0

    @property
    def count(self) -> int:
        """Numbers in it."""
        return self.stop - self.start

    @property
    def is_whole(self) -> bool:
        """Whether it is the whole tensor."""
        return (self.start, self.stop) == (0, math.prod(self.shape))

    def origin(self) -> Tensor:
        """The base's numbers, in the tensor's shape if it is whole, else flat; zeros where there is no base."""
        if self.base is None:
            return torch.zeros(self.laid_out, dtype=self.dtype)
        return self._read(self.base)

    def task_vector(self, source: int) -> Tensor:
        """A source's numbers less those of the base, laid out as :meth:`origin`; a tensor of its own."""
        own = self._read(self.stores[source])
        if self.base is None:
            return own.clone()
        return own - self._read(self.base)

    def task_vectors(self) -> Tensor:
        """Those of all sources, along a first dim."""
        origin = None if self.base is None else self._read(self.base)
        first = self._read(self.stores[0])
        found = first.new_empty((len(self.stores), *first.shape))
        for source, own in enumerate(found):
            read = self._read(self.stores[source]) if source else first
            own.copy_(read) if origin is None else torch.sub(read, origin, out=own)
        return found

    def weighted(self) -> Tensor:
        """Task vectors of all sources, each times its weight."""
        return self.weighed(self.task_vectors())

    def weighed(self, vectors: Tensor) -> Tensor:
        """What lies along a first dim of sources, each times its weight: the same tensor, written to."""
        return vectors.mul_(self.coefficients(vectors)) if any(weight != 1 for weight in self.weights) else vectors

    def coefficients(self, like: Tensor) -> Tensor:
        """The weights, shaped to multiply what :meth:`task_vectors` returns."""
        shape = (-1, *[1] * (like.ndim - 1))
        return torch.tensor(self.weights, dtype=like.dtype, device=like.device).reshape(shape)

    def parts(self) -> Iterator[Entry]:
        """The tensor in parts of :data:`PART` numbers; one part for an empty tensor."""
        for start in range(self.start, max(self.stop, self.start + 1), PART):
            yield replace(self, start=start, stop=min(start + PART, self.stop))

    def generator(self, seed: int, source: int) -> torch.Generator:
        """Random numbers of its own, whatever the order in which tensors and sources come."""
        key = f"{seed}/{source}/{self.start}/{self.name}".encode()
        return torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(key).digest()[:8], "little") >> 1)

    @property
    def laid_out(self) -> tuple[int, ...]:
        """The shape of :meth:`origin`: the tensor's if it is whole, else flat."""
        return self.shape if self.is_whole else (self.count,)

    def _read(self, store: Store) -> Tensor:
        return store.read(self.name, self.start, self.stop).to(self.dtype).reshape(self.laid_out)


Combined: TypeAlias = Callable[[Entry], Tensor]
"""From a tensor of all sources to one task vector, in the shape of :meth:`Entry.origin`."""


Images: TypeAlias = Callable[[int], Iterator[Tensor]]
"""Batches of images by number of the source; all of them may have the same."""


@dataclass(frozen=True)
class Problem:
    """All that a method may look at.

    ``entries()`` goes through all trained tensors, in a fixed order, each whole; ``notes`` are sentences for the
    report. A method that :attr:`~Combiner.needs_data` gets the sources with their graphs, by canonical names of
    tensors, and ``images(i)``, batches of images ``(batch, channels, height, width)`` of what source ``i`` is for.
    """

    entries: Callable[[], Iterator[Entry]]
    sources: int
    seed: int = 0
    notes: list[str] = field(default_factory=list[str])
    traced: Sequence[Source] = ()
    images: Images | None = None

    def images_of(self, source: int) -> Iterator[Tensor]:
        """Batches of images of what a source is for."""
        assert self.images is not None  # Combination refuses methods that need them
        return self.images(source)

    def parts(self) -> Iterator[Entry]:
        """The same in parts."""
        for entry in self.entries():
            yield from entry.parts()


class Combiner:
    """A method that makes one task vector of several: subclass it as a frozen dataclass whose fields are its options.

    What a subclass declares:

    - ``name``: what users call it by;
    - ``elementwise``: every number of the result depends on the numbers at the same place alone (and on what ``plan``
      found out beforehand), so tensors come in parts;
    - ``needs_base``: task vectors mean something, whole weights do not;
    - ``needs_data``: it runs the sources on images;
    - ``ordered``: with equal weights it matters still which source comes first, as where each has draws of its own;
    - ``decomposes``: it takes the singular vectors of matrices, which is dear for large ones;
    - ``scale``: what the combined task vector is multiplied by.
    """

    name: ClassVar[str]
    elementwise: ClassVar[bool] = False
    needs_base: ClassVar[bool] = True
    needs_data: ClassVar[bool] = False
    ordered: ClassVar[bool] = False
    decomposes: ClassVar[bool] = False
    scale: float = 1.0

    def plan(self, problem: Problem) -> Combined:
        """What is done to each tensor.

        Raises:
            OptionError: the method cannot combine these sources.
        """
        return self.combine

    def combine(self, entry: Entry) -> Tensor:
        """One task vector of one tensor, for methods that need not look at others before."""
        raise TypeError(f"{type(self).__name__} has neither plan nor combine")

    def scaled(self, scale: float) -> Self:
        """The same with another scale."""
        return cast(Self, replace(cast(Any, self), scale=float(scale)))

    def __str__(self) -> str:
        return f"{self.name} x{self.scale:g}"


C = TypeVar("C", bound=Combiner)
COMBINERS: Registry[type[Combiner]] = Registry("combining method")
"""All methods by name."""


def register_combiner(combiner: type[C]) -> type[C]:
    """Register a method, so that ``merge(combine=...)``, recipes and the command line know it by its ``name``."""
    return COMBINERS.register(combiner.name)(combiner)


def check_share(name: str, value: float, *, zero: bool = False) -> None:
    """Refuse what is no share of the whole.

    Raises:
        OptionError: it lies outside of (0, 1], or of [0, 1] where zero may be.
    """
    if not (0 <= value <= 1 if zero else 0 < value <= 1):
        raise OptionError(
            explain(f"{name} must lie in {'[' if zero else '('}0, 1] but is {value}", remedy="0.2 keeps a fifth")
        )


def check_choice(name: str, value: str, accepted: Sequence[str]) -> None:
    """Refuse what is none of the values that an option has.

    Raises:
        OptionError: lists them.
    """
    if value not in accepted:
        raise OptionError(explain(f"unknown {name} {value!r}", remedy=did_you_mean(str(value), accepted)))


def as_matrix(tensor: Tensor, trait: Trait) -> Tensor:
    """A weight as ``(outputs, inputs)``, kernels among the inputs.

    >>> as_matrix(torch.zeros(8, 4, 3, 3), Trait(Kind.MATRIX)).shape
    torch.Size([8, 36])
    """
    return tensor.movedim(1 - trait.reads, 0).flatten(1)


def from_matrix(matrix: Tensor, shape: Sequence[int], trait: Trait) -> Tensor:
    """The inverse of :func:`as_matrix`.

    >>> x = torch.randn(4, 8, 3)
    >>> turned = Trait(Kind.MATRIX, reads=0)
    >>> bool((from_matrix(as_matrix(x, turned), x.shape, turned) == x).all())
    True
    """
    rows = 1 - trait.reads
    rest = [size for dim, size in enumerate(shape) if dim != rows]
    return matrix.reshape(shape[rows], *rest).movedim(0, rows)
