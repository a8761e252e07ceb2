"""What methods for matrices have in common: which tensors they act on, and what they say of the others."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from vfsurgery.combining.arithmetic import mean_of_rest
from vfsurgery.combining.base import Combined, Combiner, Entry, Kind, Problem, as_matrix, from_matrix
from vfsurgery.combining.packing import Packed, check_packed, pieces, together, told_split


@dataclass
class Remark:
    """A sentence on some of the tensors, which is in the report as soon as there is one, and counts on.

    >>> notes = []
    >>> remark = Remark(notes, "{count} tensors are odd (first: {first})")
    >>> remark.add("a"), remark.add("b"), notes
    (None, None, ['2 tensors are odd (first: a)'])
    """

    notes: list[str] = field(repr=False)
    sentence: str
    names: list[str] = field(default_factory=list[str])
    place: int = 0

    def add(self, name: str) -> None:
        """Count one more."""
        if not self.names:
            self.place = len(self.notes)
            self.notes.append("")
        self.names.append(name)
        self.notes[self.place] = self.sentence.format(count=len(self.names), first=self.names[0])


class ForMatrices(Combiner):
    """A method that combines ``(outputs, inputs * kernel)`` matrices in float64; the rest gets its mean."""

    decomposes: ClassVar[bool] = True
    doubt: str = ""
    """What is to be said of matrices that the method does not suit, of ``count`` and ``first``."""
    packed: Packed = "whole"
    """Whether queries, keys and values that lie in one matrix are taken for one, or each for its own."""

    def plan(self, problem: Problem) -> Combined:
        """See :class:`Combiner`."""
        check_packed(self.packed)
        single = (piece.entry for entry in problem.entries() for piece in pieces(entry, self.packed))
        taken = [(entry.count, self.takes(entry)) for entry in single]
        numbers, matrices = sum(count for count, yes in taken if yes), sum(yes for _, yes in taken)
        share = numbers / max(sum(count for count, _ in taken), 1)
        problem.notes.append(
            f"{self.name} acts on {matrices} matrices, {share:.1%} of the trained numbers; the other "
            f"{len(taken) - matrices} tensors get the mean of their task vectors"
        )
        problem.notes.extend(told_split(problem.entries(), self.packed))
        remark = Remark(problem.notes, self.doubt)

        def single_one(entry: Entry) -> Tensor:
            if not self.takes(entry):
                return mean_of_rest(entry)
            matrix = self.of_matrix(entry, remark).to(entry.dtype)
            return from_matrix(matrix, entry.shape, entry.trait)

        return lambda entry: together(entry, pieces(entry, self.packed), single_one)

    def takes(self, entry: Entry) -> bool:
        """Whether the method acts on a tensor."""
        return is_matrix(entry)

    def of_matrix(self, entry: Entry, remark: Remark) -> Tensor:
        """The combined task vector as a matrix, float64.

        Args:
            entry: A tensor, whole; :func:`deltas` gives its matrices.
            remark: To be added to where the method does not suit.
        """
        raise NotImplementedError


def is_matrix(entry: Entry) -> bool:
    """Whether methods for matrices act on a tensor."""
    return entry.trait.kind is Kind.MATRIX and entry.count > 0


def deltas(entry: Entry) -> Iterator[Tensor]:
    """The weighted task vectors of all sources as matrices, float64, one at a time."""
    for source, weight in enumerate(entry.weights):
        yield as_matrix(entry.task_vector(source), entry.trait).double().mul_(weight)


def sizes(entry: Entry) -> tuple[int, int]:
    """Rows and columns of a tensor's matrix."""
    rows = entry.shape[1 - entry.trait.reads]
    return rows, entry.count // max(rows, 1)
