"""Records of what was done.

That of a merge says what was matched, permuted, pinned and corrected, and has the numbers that prove it.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from vfsurgery.groups import GroupSet
from vfsurgery.shown import Shown


@dataclass(frozen=True)
class Certificate:
    """How far an aligned source's outputs are from its own: proof that the permutations preserve its function.

    ``error`` is the largest absolute difference over the largest absolute output; ``tolerance`` the bound for
    ``dtype``, the precision that was computed in. ``training`` says whether training computes another graph than eval
    mode, and was compared, too. Where ``mapped`` groups were mapped by matrices, which need not
    preserve the function, the error is that of the permutations alone, and ``drift`` that of all together: what has
    drifted is not certified.

    >>> print(Certificate(1, 0.0, 1e-4, "float32"))
    aligned source 1 == source 1: holds, relative error 0.0e+00 (tolerance 1e-04, float32)
    >>> print(Certificate(1, 0.0, 1e-4, "float32", mapped=3, drift=0.47))
    source 1: not certified: 3 groups are mapped by matrices, which do not preserve its function; mapped, its output
    differs from its own by 47.0% of the largest
    >>> print(str(Certificate(1, 0.0, 1e-4, "float32", mapped=3, drift=67065.93)).rpartition("mapped, ")[2])
    its output differs from its own by 67,066 times the largest
    """

    source: int
    error: float
    tolerance: float
    dtype: str
    mapped: int = 0
    drift: float = 0.0
    training: bool = False

    @property
    def drifted(self) -> bool:
        """Whether maps of units have changed the source."""
        return bool(self.mapped) and not self.drift <= self.tolerance

    def __bool__(self) -> bool:
        return self.error <= self.tolerance and not self.drifted

    @property
    def mark(self) -> str:
        """A tick where it holds, a cross where it fails, a dash where it says nothing."""
        return "✓" if self else "–" if self.drifted else "✗"

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, with the verdict; a drift that is not finite is ``None``."""
        drift = self.drift if math.isfinite(self.drift) else None
        return {**dataclasses.asdict(self), "drift": drift, "holds": bool(self)}

    def __str__(self) -> str:
        if self.drifted:
            times = f"{self.drift:,.0f}" if self.drift < 1e6 else f"{self.drift:.0e}"
            size = f"{self.drift:.1%} of" if self.drift < 10 else f"{times} times"
            changed = f"differs from its own by {size} the largest"
            return (
                f"source {self.source}: not certified: {self.mapped} groups are mapped by matrices, which do not "
                f"preserve its function; mapped, its output {changed if math.isfinite(self.drift) else 'is not finite'}"
            )
        verdict = ("holds, in training too" if self.training else "holds") if self else "FAILS"
        return (
            f"aligned source {self.source} == source {self.source}: {verdict}, "
            f"relative error {max(self.error, self.drift):.1e} (tolerance {self.tolerance:.0e}, {self.dtype})"
        )


@dataclass(frozen=True)
class GroupMatch:
    """What matching did to one group of one source: similarity to the reference before and after, units moved."""

    source: int
    group: str
    label: str
    size: int
    before: float
    after: float
    moved: int


@dataclass(frozen=True, slots=True)
class Candidate:
    """A boundary of preserve-first merging, and what the merged network costs with it, as ratios to one source.

    >>> print(Candidate(3, flops=1.187, parameters=1.008))
    3 layers: flops x1.187, parameters x1.008
    """

    boundary: int | str
    flops: float
    parameters: float

    def __str__(self) -> str:
        place = f"{self.boundary} layers" if isinstance(self.boundary, int) else self.boundary
        return f"{place}: flops x{self.flops:.3f}, parameters x{self.parameters:.3f}"


@dataclass(frozen=True)
class Preserved:
    """What was preserved of every source: ``layers`` of the ``depth`` weight layers on the longest path.

    ``form`` is how the prefixes run side by side, ``"grouped"`` or ``"branches"``, or ``"merged"`` if nothing is kept.
    Costs are ratios to one source. ``candidates`` are what a budget was compared with.
    """

    boundary: int | str
    layers: int
    depth: int
    form: str
    flops: float
    parameters: float
    candidates: tuple[Candidate, ...] = ()

    def __str__(self) -> str:
        named = f" ({self.boundary})" if isinstance(self.boundary, str) else ""
        costs = f"flops x{self.flops:.3f}, parameters x{self.parameters:.3f}"
        return f"preserved {self.layers} of {self.depth} layers{named}, {self.form}: {costs}"


@dataclass(frozen=True, slots=True)
class Trial:
    """One way to merge that ``"auto"`` tried, and how near it came to the sources' ensemble on held-out images.

    It was made without these images; the way that is kept is then made again with all.

    ``agreement`` is the share of ``images`` on which both find the same class, ``cross_entropy`` that of the merged
    model's probabilities to the ensemble's, in nats; ``kept`` says whether this way was chosen. ``combine`` is the
    method and its scale, where fine-tuned models were combined; with ``apart`` each source judges on its own images,
    and not their ensemble on all.

    >>> print(Trial("activations", ("reset",), agreement=0.8125, cross_entropy=0.5, images=400, seconds=2.5))
    activations + reset: agrees with the ensemble on 81.25% of 400 held-out images, cross-entropy 0.5000 (2.5 s)
    """

    matching: str
    renormalize: tuple[str, ...]
    agreement: float
    cross_entropy: float
    images: int
    seconds: float
    kept: bool = False
    combine: str = ""
    apart: bool = False

    @property
    def judge(self) -> str:
        """Whom agreement is with."""
        return "each source on its own images" if self.apart else "the ensemble"

    @property
    def way(self) -> str:
        """As in ``activations + reset``, or ``ties x1 + reset``."""
        matching = [] if self.combine and self.matching == "identity" else [self.matching]
        return " + ".join([*matching, *filter(None, [self.combine]), *self.renormalize])

    @property
    def cells(self) -> tuple[str, str, str, str, str]:
        """A row of a table: the way, agreement, cross-entropy, seconds, and whether it was kept."""
        numbers = f"{self.agreement:.2%}", f"{self.cross_entropy:.4f}", f"{self.seconds:.1f}"
        return (self.way, *numbers, "kept" if self.kept else "")

    def __str__(self) -> str:
        agreement = f"agrees with {self.judge} on {self.agreement:.2%} of {self.images} held-out images"
        kept = ", kept" if self.kept else ""
        return f"{self.way}: {agreement}, cross-entropy {self.cross_entropy:.4f} ({self.seconds:.1f} s){kept}"


@dataclass(frozen=True, slots=True)
class MergedMasks:
    """What became of the zero patterns of sparse sources; sparsities are shares of their prunable weights, 0 to 1.

    >>> print(MergedMasks("intersect", sources=(0.9, 0.9), result=0.95))
    masks intersect: sparsity 90.00%, 90.00% of the sources, 95.00% of the result
    """

    choice: str
    sources: tuple[float, ...]
    result: float

    def __str__(self) -> str:
        sparsity = ", ".join(f"{share:.2%}" for share in self.sources)
        denser = ": denser than each of them" if self.result < min(self.sources) - 5e-5 else ""
        return f"masks {self.choice}: sparsity {sparsity} of the sources, {self.result:.2%} of the result{denser}"


@dataclass(frozen=True)
class Unpaired:
    """A layer that has no partner in the other network, or none that it can be compared with, and why."""

    layer: str
    reason: str

    def __str__(self) -> str:
        return f"{self.layer}: {self.reason}"


@dataclass(frozen=True)
class Report(Shown):
    """What was done to make a model: frozen, printable, and as JSON readable by machines."""

    def to_dict(self) -> dict[str, Any]:
        """Plain lists, dicts, strings and numbers."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    def to_json(self) -> str:
        """The record as indented JSON."""
        return json.dumps(self.to_dict(), indent=2)


@dataclass(frozen=True)
class MergeReport(Report):
    """All that happened in one merge.

    ``combine`` is the method and its scale where it was not the weighted average, and ``base`` says of what.
    """

    model: str
    sources: int
    weights: tuple[float, ...]
    matching: str
    renormalize: tuple[str, ...]
    groups: GroupSet = dataclasses.field(repr=False)  # it fills a screen by itself
    matches: tuple[GroupMatch, ...]
    certificates: tuple[Certificate, ...]
    created_biases: tuple[str, ...]
    notes: tuple[str, ...]
    guards: tuple[str, ...]
    seed: int
    versions: tuple[tuple[str, str], ...]
    seconds: tuple[tuple[str, float], ...]
    preserved: Preserved | None = None
    trials: tuple[Trial, ...] = ()
    masks: MergedMasks | None = None
    combine: str = ""
    base: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Plain lists, dicts, strings and numbers; groups without their activations."""
        plain = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        plain["groups"] = [
            {
                "name": group.name,
                "label": group.label,
                "size": group.size,
                "blocks": group.blocks,
                "outer": group.outer,
                "members": list(map(str, group.members)),
            }
            for group in self.groups
        ]
        plain["pinned"] = [dataclasses.asdict(pin) for pin in self.groups.pinned]
        plain["unknown_ops"] = list(self.groups.unknown_ops)
        plain["coverage"] = self.groups.coverage
        plain["certificates"] = [certificate.to_dict() for certificate in self.certificates]
        for name in ("matches", "trials"):
            plain[name] = [dataclasses.asdict(entry) for entry in getattr(self, name)]
        for name in ("preserved", "masks"):
            value = getattr(self, name)
            plain[name] = None if value is None else dataclasses.asdict(value)
        plain["versions"], plain["seconds"] = dict(self.versions), dict(self.seconds)
        return json.loads(json.dumps(plain))

    def __str__(self) -> str:
        steps = ", ".join(self.renormalize) or "none"
        lines = [
            f"merge of {self.sources} x {self.model}, weights {', '.join(f'{w:.3g}' for w in self.weights)}",
            *([f"  combined by {self.combine}, base {self.base}"] if self.combine else []),
            f"  matching {self.matching}; renormalization {steps}; seed {self.seed}",
            f"  {len(self.groups)} permutation groups over {self.groups.coverage:.1%} of the parameters",
            *(f"  {certificate}" for certificate in self.certificates),
        ]
        if self.preserved is not None:
            lines += [f"  {self.preserved}", *(f"    {candidate}" for candidate in self.preserved.candidates)]
        if self.masks is not None:
            lines.append(f"  {self.masks}")
        lines += [f"  {note}" for note in self.notes]
        lines += [
            f"  created {bias}: load the state with strict=False, or set bias=True on that layer"
            for bias in self.created_biases
        ]
        if self.matches:
            lines.append(f"  {'group':<34}{'units':>6}{'moved':>7}{'before':>11}{'after':>11}")
        for match in self.matches:
            name = f"{match.group} {match.label}"
            lines.append(
                f"  {name if self.sources == 2 else f'{match.source}: {name}':<34}{match.size:>6}{match.moved:>7}"
                f"{match.before:>11.4g}{match.after:>11.4g}"
            )
        lines += [f"  pinned {pin}" for pin in self.groups.pinned]
        lines += [f"  no coupling rule: {op}" for op in self.groups.unknown_ops]
        lines.append("  " + ", ".join(f"{name} {seconds:.2f} s" for name, seconds in self.seconds))
        lines.append("  " + ", ".join(f"{name} {version}" for name, version in self.versions))
        return "\n".join([*lines, *trial_table(self.trials)])


def trial_table(trials: Sequence[Trial]) -> list[str]:
    """Lines of text for what was tried; none where nothing was.

    >>> best = Trial("zipit", ("reset",), 0.95, 0.25, 200, 3.0, kept=True)
    >>> print("\\n".join(trial_table([Trial("cca", ("reset",), 0.9, 0.5, 200, 2.5), best])))
      tried; agreement with the ensemble, and cross-entropy to it, on 200 held-out images
                       agreement  cross-entropy  seconds
        cca + reset       90.00%         0.5000      2.5
        zipit + reset     95.00%         0.2500      3.0  kept
    """
    if not trials:
        return []
    width = max(len(trial.way) for trial in trials)
    lines = [
        f"  tried; agreement with {trials[0].judge}, and cross-entropy to it, on {trials[0].images} held-out images",
        f"    {'':<{width}}  {'agreement':>9}  {'cross-entropy':>13}  {'seconds':>7}",
    ]
    for way, agreement, cross_entropy, seconds, kept in (trial.cells for trial in trials):
        lines.append(f"    {way:<{width}}  {agreement:>9}  {cross_entropy:>13}  {seconds:>7}  {kept}".rstrip())
    return lines


def version_of(name: str) -> str:
    """The installed version of a package."""
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"
