"""RegMean: each weight the least-squares answer to what all sources compute with it on what they read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vfsurgery.combining.base import Combined, Combiner, Entry, Kind, Problem, register_combiner
from vfsurgery.combining.grams import Collected, Gram, collect, weights_of
from vfsurgery.combining.images import first_images, positive_weights, weighted_mean
from vfsurgery.errors import OptionError, explain
from vfsurgery.stats.inputs import Layout, WeightCalls
from vfsurgery.stats.lockstep import Lockstep
from vfsurgery.stats.threads import threads
from vfsurgery.tracing.ops import OpReader
from vfsurgery.tracing.sources import Source, eval_mode

RIDGE = 1e-6
"""Of the mean of the diagonal: it decides nothing but what no image shows."""


@register_combiner
@dataclass(frozen=True)
class RegMean(Combiner):
    """The ``W`` with the least ``sum_i w_i |X_i W^T - X_i W_i^T|^2 / places_i`` (Jin et al., ICLR 2023).

    ``W = (sum_i w_i W_i G_i) (sum_i w_i G_i)^-1`` with ``G_i = X_i^T X_i / places_i``, whose off-diagonals are
    multiplied by ``damping``, and ``X_i`` what the weight reads in source ``i`` itself on ``images`` of its images. It
    acts on weights that a linear layer, a convolution (unfolded; in groups, one matrix for each), a product or
    ``nn.MultiheadAttention`` uses as they are; the rest is the weighted mean. A ridge of 1e-6 times the mean of the
    diagonal pulls to the weighted mean, too, so that what no image shows is averaged. Solved in float64 by Cholesky.
    Of convolutions some pixels of each image are looked at, at random places. Memory: two sets of matrices,
    ``columns^2`` float64 numbers for each weight.

    Published codes differ: they act on ``nn.Linear`` modules alone and miss those that are not called (packed queries,
    keys and values of many transformers, the output projection of ``nn.MultiheadAttention``); they invert in float32,
    without a ridge; FusionBench damps by 0.95, the authors by 0.9 and, for T5, by 0.1.
    """

    images: int = 256
    damping: float = 0.9
    scale: float = 1.0
    name: ClassVar[str] = "regmean"
    needs_base: ClassVar[bool] = False
    needs_data: ClassVar[bool] = True
    decomposes: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.images < 1 or not 0 <= self.damping <= 1:
            raise OptionError(
                explain(
                    f"{self.name} needs images >= 1 and damping from 0 to 1, not {self.images} and {self.damping}",
                    remedy="damping=0.9 keeps nine tenths of each correlation; 0 looks at variances alone",
                )
            )

    def plan(self, problem: Problem) -> Combined:
        """See :class:`Combiner`."""
        positive_weights(self.name, next(iter(problem.entries()), None))
        solved = self.solved(problem)
        _note(self.name, problem, set(solved), self.images)
        return lambda entry: solved[entry.name].clone() if entry.name in solved else weighted_mean(entry)

    def solved(self, problem: Problem) -> Mapping[str, Tensor]:
        """The task vectors of all weights that calls show, by name."""
        names = [entry.name for entry in problem.entries() if len(entry.shape) > 1]
        fits: dict[str, Normal] = {}
        for number, source in enumerate(problem.traced):
            grams = collect(source, names, first_images(problem, number, self.images), problem.seed)
            for entry in problem.entries():
                if entry.name in grams:
                    fit = fits.setdefault(entry.name, Normal(grams[entry.name].layout))
                    fit.add(entry, number, grams[entry.name], self.damping)
        return {
            entry.name: fits[entry.name].solve(weighted_mean(entry)).to(entry.dtype)
            for entry in problem.entries()
            if entry.name in fits and fits[entry.name].sources == problem.sources
        }


@register_combiner
@dataclass(frozen=True)
class RegMeanPlusPlus(RegMean):
    """RegMean, layer by layer: ``X_i`` is what the *merged* layers before it give on the images of task ``i``.

    See :class:`RegMean` for the formula and the tensors. The rest (biases, norms, embeddings) is averaged first,
    running statistics too; then each weight is solved in the order in which the graph uses them, and what comes after
    reads what it gives. A weight that is used several times is solved when it is used first. Memory: the values that
    the network still needs, for all images of all tasks.

    FusionBench goes from block to block, this one from op to op.
    """

    name: ClassVar[str] = "regmean++"

    def solved(self, problem: Problem) -> Mapping[str, Tensor]:
        """See :class:`RegMean`."""
        entries = {entry.name: entry for entry in problem.entries()}
        merged = _averaged_model(problem, entries, self.scale)
        weights = weights_of(merged, [name for name, entry in entries.items() if len(entry.shape) > 1])
        found: dict[str, Tensor] = {}
        with eval_mode(merged.graph_module):
            tasks = [
                Lockstep(merged.graph_module, first_images(problem, number, self.images))
                for number in range(problem.sources)
            ]
            for node, names in _uses(merged, weights):
                for task in tasks:
                    task.run_before(node)
                while open_ := {name: weights[name] for name in names if name not in found}:
                    grams = [_peeked(task, open_, problem.seed) for task in tasks]
                    name = next(iter(grams[0]), None)
                    if name is None:  # no call uses the others as they are
                        break
                    fit = Normal(grams[0][name].layout)
                    for number, own in enumerate(grams):
                        fit.add(entries[name], number, own[name], self.damping)
                    found[name] = fit.solve(weighted_mean(entries[name])).to(entries[name].dtype)
                    weights[name].copy_(_placed(entries[name], found[name], self.scale))
        return found


class Normal:
    """The normal equations of one weight, source by source, about the mean of the sources.

    ``sources`` were added.
    """

    def __init__(self, layout: Layout) -> None:
        self.layout, self.sources = layout, 0
        self._left: Tensor | None = None
        self._right: Tensor | None = None

    def add(self, entry: Entry, source: int, gram: Gram, damping: float) -> None:
        """Add a source's weight and what it reads."""
        moments = gram.mean(damping).mul_(entry.weights[source])
        rows = self.layout.rows(entry.task_vector(source).to(moments))  # (groups, units, columns)
        pulled = rows @ moments
        self._left = moments if self._left is None else self._left.add_(moments)
        self._right = pulled if self._right is None else self._right.add_(pulled)
        self.sources += 1

    def solve(self, mean: Tensor) -> Tensor:
        """The task vector that solves them, in its own shape, float64; where they leave it open, the mean."""
        assert self._left is not None and self._right is not None
        left, start = self._left, self.layout.rows(mean.to(self._left))
        missing = self._right - start @ left
        ridge = RIDGE * left.diagonal(dim1=-2, dim2=-1).mean(-1, keepdim=True)
        ridge = torch.where(ridge > 0, ridge, 1.0)  # what no image reaches stays the mean
        matrix = left + torch.diag_embed(ridge.expand(left.shape[:-1]))
        with threads(1):
            rows = start + torch.cholesky_solve(missing.mT, torch.linalg.cholesky(matrix)).mT
        return self.layout.weight(rows, mean.shape).to(mean.device)


def _placed(entry: Entry, vector: Tensor, scale: float) -> Tensor:
    """The merged weight itself."""
    return entry.origin() + scale * vector.to(entry.dtype)


def _averaged_model(problem: Problem, entries: Mapping[str, Entry], scale: float) -> Source:
    """A copy of the first source with the mean of all in place of what is trained, and of running statistics."""
    merged = problem.traced[0].clone()
    weights = next(iter(entries.values())).weights if entries else (1.0,) * problem.sources
    for name, tensor in merged.state.items():
        if name in entries:
            tensor.copy_(_placed(entries[name], weighted_mean(entries[name]), scale))
        elif tensor.is_floating_point() and all(name in source.state for source in problem.traced):
            others = [source.state[name] for source in problem.traced]
            if all(other.shape == tensor.shape for other in others):
                total = torch.stack([weight * x.double() for weight, x in zip(weights, others, strict=True)]).sum(0)
                tensor.copy_(total / sum(weights))
    return merged


def _uses(merged: Source, weights: Mapping[str, Tensor]) -> Iterator[tuple[str, Sequence[str]]]:
    """Nodes of the graph that use weights, in order, and which."""
    for op in OpReader(merged.graph_module):
        used = [tensor.name for tensor in (*op.inputs, *op.parameters.values()) if tensor.name in weights]
        if used:
            yield op.node.name, used


def _peeked(task: Lockstep, weights: Mapping[str, Tensor], seed: int) -> Collected:
    """What weights read at the node that comes next, on all batches, without going there."""
    found = Collected(sum(map(len, task.batches)), seed)
    with threads(1), WeightCalls(weights, found.see, attention=True):
        task.peek()
    return found


def _note(method: str, problem: Problem, solved: set[str], images: int) -> None:
    entries = [*problem.entries()]
    inside = sum(entry.count for entry in entries if entry.name in solved)
    share = inside / max(sum(entry.count for entry in entries), 1)
    missed = [e.name for e in entries if e.trait.kind is Kind.MATRIX and e.name not in solved]
    problem.notes.append(
        f"{method}: {len(solved)} weights, {share:.0%} of the numbers, fitted on at most {images} images of each "
        f"source; the mean for the other {len(entries) - len(solved)} tensors"
    )
    if missed:
        problem.notes.append(f"{method}: no call shows what {len(missed)} matrices read, as {missed[0]}: the mean")
