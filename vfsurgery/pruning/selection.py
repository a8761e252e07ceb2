"""From saliencies to masks: exactly how many entries are kept, over which entries they compete, in what pattern.

Of ``n`` entries that compete, the ``ceil(n (1 - s))`` most salient ones are kept at sparsity ``s``; of equal ones those
that come first. Entries that were zero already are never kept.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

from vfsurgery.errors import OptionError, explain
from vfsurgery.pruning.base import Pattern, Pruning
from vfsurgery.pruning.masks import Masks
from vfsurgery.stats.inputs import Layout

CHUNK = 1 << 22
"""Entries looked at together: the scratch memory of a selection is some tens of bytes for each, whatever the layer."""

DIGIT = 16
"""Bits of a saliency that one pass of :func:`keep_most_salient` decides about."""


@dataclass(frozen=True)
class Goal:
    """The sparsity of one weight, and the pool of weights that it competes with where the scope is global."""

    sparsity: float
    pool: str = ""


def kept_count(entries: int, sparsity: float) -> int:
    """``ceil(entries (1 - sparsity))``, of the sparsity as it is written and not as a binary fraction.

    >>> kept_count(10, 0.7), kept_count(9, 0.5), kept_count(3, 0.99)
    (3, 5, 1)
    """
    return entries - math.floor(entries * Fraction(repr(float(sparsity))))


def select(scores: Iterable[tuple[str, Tensor]], work: Pruning, goals: Mapping[str, Goal]) -> Masks:
    """The masks of all weights that are scored, in the order of ``work.weights``.

    Unless the scope is global, one weight's saliencies are held at a time.

    Raises:
        OptionError: a saliency is NaN, has another shape than its weight, or belongs to no weight of ``work``.
    """
    masks: dict[str, Tensor] = {}
    pools: defaultdict[str, dict[str, Tensor]] = defaultdict(dict)
    for name, scored in scores:
        _check(name, scored, work)
        weight, sparsity = work.weights[name].detach(), goals[name].sparsity
        saliency = scored.to(torch.promote_types(scored.dtype, torch.float32)).masked_fill(weight == 0, -math.inf)
        if work.pattern is not None:
            masks[name] = in_pattern(saliency, work.layouts[name], work.pattern)
        elif work.scope == "global":
            pools[goals[name].pool][name] = saliency
        elif work.scope == "row":
            masks[name] = by_row(saliency, work.layouts[name], sparsity)
        else:
            (masks[name],) = keep_most_salient([saliency], kept_count(saliency.numel(), sparsity))
    for pool in pools.values():
        count = kept_count(sum(saliency.numel() for saliency in pool.values()), goals[next(iter(pool))].sparsity)
        masks |= zip(pool, keep_most_salient(list(pool.values()), count), strict=True)
    return Masks(
        {name: masks[name].logical_and_(weight != 0) for name, weight in work.weights.items() if name in masks}
    )


def by_row(saliency: Tensor, layout: Layout, sparsity: float) -> Tensor:
    """The mask that keeps equally many entries of each output unit."""
    rows = layout.rows(saliency)
    return layout.weight(largest(rows, kept_count(rows.shape[-1], sparsity)), saliency.shape)


def in_pattern(saliency: Tensor, layout: Layout, pattern: Pattern) -> Tensor:
    """The mask that keeps N of every M consecutive inputs of a unit, at each kernel position by itself."""
    kept, width = pattern
    rows = layout.rows(saliency)
    return layout.weight(largest(rows.unflatten(-1, (-1, width)), kept).flatten(-2), saliency.shape)


def largest(scores: Tensor, counts: int | Tensor) -> Tensor:
    """Mask of the largest entries along the last dim, of equal ones the first.

    Args:
        scores: ``(..., n)``, without NaN.
        counts: How many to keep: one number for all, or one for each row, ``(...)``.

    >>> largest(torch.tensor([[3.0, 1.0, 3.0], [2.0, 2.0, 2.0]]), 1).int()
    tensor([[1, 0, 0],
            [1, 0, 0]], dtype=torch.int32)
    """
    rows = scores.reshape(-1, scores.shape[-1])
    wanted = torch.as_tensor(counts, device=scores.device).expand(scores.shape[:-1]).reshape(-1, 1)
    places = torch.arange(rows.shape[1], device=scores.device)
    mask = torch.empty_like(rows, dtype=torch.bool)
    step = max(1, CHUNK // rows.shape[1])
    for part, some, count in zip(mask.split(step), rows.split(step), wanted.split(step), strict=True):
        part.scatter_(1, some.argsort(dim=1, descending=True, stable=True), places < count)
    return mask.view(scores.shape)


def keep_most_salient(saliencies: Sequence[Tensor], count: int) -> list[Tensor]:
    """Masks of the ``count`` largest entries of several tensors together, exactly so many.

    Among equal ones those are kept that come first, by tensor and then by position. The smallest kept value is found
    digit by digit in histograms, so that nothing of the size of a layer is made beside the masks.

    Args:
        saliencies: Of any shapes, one floating dtype per tensor, all on one device, without NaN.
        count: At most as many as there are entries.

    >>> [mask.tolist() for mask in keep_most_salient([torch.tensor([1.0, 5.0]), torch.tensor([5.0, 0.5])], 2)]
    [[False, True], [True, False]]
    """
    if len({tensor.dtype for tensor in saliencies}) > 1:
        saliencies = [tensor.double() for tensor in saliencies]
    masks = [torch.zeros(tensor.shape, dtype=torch.bool, device=tensor.device) for tensor in saliencies]
    if count == 0:
        return masks
    smallest, ties = _smallest_kept(saliencies, count)
    for mask, tensor in zip(masks, saliencies, strict=True):
        for part, keys in zip(mask.view(-1).split(CHUNK), _keys(tensor), strict=True):
            equal = keys == smallest
            part.copy_((keys > smallest) | (equal & (equal.cumsum(0) <= ties)))
            ties = max(0, ties - int(equal.sum())) if ties else 0
    return masks


def _smallest_kept(saliencies: Sequence[Tensor], count: int) -> tuple[int, int]:
    """The key of the smallest entry among the ``count`` largest ones, and how many entries with this key are kept."""
    prefix, wanted = 0, count
    bits = saliencies[0].dtype.itemsize * 8
    for shift in range(bits - DIGIT, -1, -DIGIT):
        histogram = torch.zeros(1 << DIGIT, dtype=torch.int64, device=saliencies[0].device)
        for tensor in saliencies:
            for keys in _keys(tensor):
                if shift == bits - DIGIT:  # the sign is in the first digit
                    digits = (keys >> shift) + (1 << (DIGIT - 1))
                else:
                    digits = keys[(keys >> (shift + DIGIT)) == prefix] >> shift & ((1 << DIGIT) - 1)
                histogram += digits.bincount(minlength=1 << DIGIT)
        above = histogram.flip(0).cumsum(0).flip(0)  # entries with this digit or a higher one
        digit = int((above >= wanted).sum()) - 1
        wanted -= int(above[digit] - histogram[digit])
        prefix = digit - (1 << (DIGIT - 1)) if shift == bits - DIGIT else (prefix << DIGIT) | digit
    return prefix, wanted


def _keys(tensor: Tensor) -> Iterator[Tensor]:
    """Chunk by chunk, integers in the order of the floats: their bits, where negative all but the sign inverted."""
    integer = torch.int64 if tensor.dtype == torch.float64 else torch.int32
    for part in tensor.reshape(-1).split(CHUNK):
        bits = (part + 0.0).view(integer)  # -0.0 becomes 0.0
        yield bits ^ ((bits >> (8 * bits.itemsize - 1)) & torch.iinfo(integer).max)


def _check(name: str, saliency: Tensor, work: Pruning) -> None:
    weight = work.weights.get(name)
    if weight is None:
        raise OptionError(
            explain(f"the pruner scored {name!r}, which it was not asked for", remedy="score work.weights, no more")
        )
    if saliency.shape != weight.shape:
        raise OptionError(
            explain(f"the saliencies of {name} are {tuple(saliency.shape)}", expected=tuple(weight.shape))
        )
    if saliency.numel() and bool(torch.stack(torch.aminmax(saliency)).isnan().any()):  # NaN spreads into both ends
        raise OptionError(
            explain(
                f"a saliency of {name} is NaN",
                remedy="check the data: the network's activations may overflow in its dtype",
            )
        )
