"""The record of a structured pruning."""

from __future__ import annotations

from dataclasses import dataclass, field

from vfsurgery.passes.costs import Cost
from vfsurgery.pruning.units.reference import CutCertificate
from vfsurgery.records.report import Report


@dataclass(frozen=True)
class GroupCut:
    """What one group lost: units before and after, and the numbers of those that were kept, in the original's order.

    Of a nested group units are counted over all blocks; of one that was rotated the numbers say nothing.
    """

    group: str
    label: str
    before: int
    after: int
    kept: tuple[int, ...] = field(repr=False)


@dataclass(frozen=True)
class LeftWhole:
    """A group that lost nothing, and why."""

    group: str
    label: str
    units: int
    reason: str


@dataclass(frozen=True)
class UnitPruneReport(Report):
    """All that happened in one structured pruning.

    ``certificate`` is of the cut itself, before renormalization. ``not_folded`` are groups that are read by something
    that nothing could be folded into. ``rotated`` are groups that lost principal directions and not single units, each
    with the share of the energy that is left, 0 to 1.
    """

    model: str
    fraction: float
    saliency: str
    scope: str
    removed: str
    renormalize: tuple[str, ...]
    groups: tuple[GroupCut, ...]
    left_whole: tuple[LeftWhole, ...]
    before: Cost
    after: Cost
    certificate: CutCertificate
    not_folded: tuple[str, ...] = ()
    rotated: tuple[tuple[str, float], ...] = ()
    created_biases: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    seconds: tuple[tuple[str, float], ...] = ()

    @property
    def units(self) -> tuple[int, int]:
        """Units of all groups before and after, those of groups left whole among them, nested groups once."""
        whole = sum(group.units for group in self.left_whole)
        return sum(g.before for g in self.groups) + whole, sum(g.after for g in self.groups) + whole

    def __str__(self) -> str:
        before, after = self.units
        steps = ", ".join(self.renormalize) or "none"
        lines = [
            f"{self.model} without {before - after:,} of {before:,} units (fraction {self.fraction:g}, {self.scope})",
            f"  saliency {self.saliency}; removed units: {self.removed}; renormalization {steps}",
            f"  parameters {self.before.parameters:,} -> {self.after.parameters:,}, "
            f"flops {self.before.flops:,} -> {self.after.flops:,} ({self.after / self.before})",
            f"  {self.certificate}",
        ]
        if self.certificate.norms:
            norms = ", ".join(self.certificate.norms[:4]) + (", …" if len(self.certificate.norms) > 4 else "")
            lines.append(
                f"  statistics of {len(self.certificate.norms)} norm layers are now of kept units only: {norms}"
            )
        if self.not_folded:
            lines.append(
                f"  read by other than plain layers, so dropped there and not folded: {', '.join(self.not_folded)}"
            )
        lines += [f"  {note}" for note in self.notes]
        lines += [
            f"  created {bias}: load the state with strict=False, or set bias=True on that layer"
            for bias in self.created_biases
        ]
        if self.groups:
            lines.append(f"  {'group':<40}{'units':>7}{'left':>7}")
        lines += [f"  {f'{g.group} {g.label}':<40}{g.before:>7}{g.after:>7}" for g in self.groups]
        lines += [f"  {f'{g.group} {g.label}':<40}{g.units:>7}  whole: {g.reason}" for g in self.left_whole]
        lines.append("  " + ", ".join(f"{name} {seconds:.2f} s" for name, seconds in self.seconds))
        return "\n".join(lines)
