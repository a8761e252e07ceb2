"""Coverage over whole model libraries: trace, group and verify every model, each in a process of its own.

Weights are random and nothing is downloaded. A process per model keeps one model's memory, time and crashes from the
next; it is forked from a server that has the libraries loaded. Its result is appended to a CSV file at once, so that a
survey that was cut off goes on where it stopped. What a proof ran on (the model itself, smaller images, a twin) is a
column of the table; see :mod:`vfsurgery.testing.zoo.twins`.
"""

from __future__ import annotations

import csv
import dataclasses
import fnmatch
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from vfsurgery.discovery import discover
from vfsurgery.discovery.partial import find_partly
from vfsurgery.discovery.recording import record_or_export
from vfsurgery.discovery.verification import Verification, prove
from vfsurgery.errors import OptionError, TraceError, explain
from vfsurgery.groups import GroupSet, PermutationGroup
from vfsurgery.testing.zoo.processes import GIB, MEMORY, in_processes
from vfsurgery.testing.zoo.twins import (
    BYTES,
    Subject,
    TooLargeError,
    build_hollow,
    build_quickly,
    image_inputs,
    part_subjects,
    shallow_twins,
    subjects,
)

SOURCES = ("timm", "torchvision")
CONTROLS = 3
"""Groups that are broken on purpose in the proof of one model."""
DRAWINGS = 8
"""How often the weights of one model are drawn, at most, for a proof that rounding does not drown."""


@dataclass(frozen=True)
class Survey:
    """What one model's survey found; ``failure`` says what went wrong, and where, if anything did.

    ``seconds`` is the time to trace and to find groups, ``verify_seconds`` that of the proof, ``build_seconds`` that
    of building the model. ``nodes`` are those of the traced graph. ``subject`` is what the proof ran on.
    ``unknown_ops`` and ``reasons`` say why axes are pinned, most frequent reasons first. ``continuous`` is the share of
    parameters in groups that may be mapped by more than orders, empty where nobody has looked; ``symmetries`` counts
    those groups, and ``mapped`` says how many of the subject's the proof mapped by random matrices.
    """

    model: str
    groups: int = 0
    coverage: float = 0.0
    nodes: int = 0
    parameters: int = 0
    build_seconds: float = 0.0
    seconds: float = 0.0
    error: float = float("nan")
    control_error: float = float("nan")
    verified: bool = False
    subject: str = ""
    verify_seconds: float = 0.0
    unknown_ops: str = ""
    reasons: str = ""
    failure: str = ""
    continuous: float | None = None
    symmetries: str = ""
    mapped: int = 0

    @staticmethod
    def of_row(row: Mapping[str, str]) -> Survey:
        """Read a row of the CSV file."""
        read: dict[str, Callable[[str], Any]] = {"bool": lambda text: text == "True", "int": int, "float": float}
        read["float | None"] = float
        types = {field.name: str(field.type) for field in dataclasses.fields(Survey)}
        given = {name: text for name, text in row.items() if text or types[name] == "str"}
        return Survey(**{name: read.get(types[name], str)(text) for name, text in given.items()})


def survey_model(spec: str, memory: float = MEMORY) -> Survey:
    """Build one model with random weights, find its groups at its own input size and verify them, here and now.

    All groups are permuted together, with negative controls; see :func:`vfsurgery.discovery.verification.prove`. A
    model too large for that in ``memory`` GiB is traced without weights, and a smaller twin is verified.
    """
    started = time.perf_counter()
    most = memory * GIB / BYTES
    hollow = False
    try:
        model = build_quickly(spec, most=most)
    except TooLargeError:
        model, hollow = build_hollow(spec), True
    inputs = image_inputs(model)
    built = time.perf_counter()
    graph_module = None
    try:
        graph_module = record_or_export(model, inputs)
        groups = discover(graph_module)
    except TraceError as error:
        groups = find_partly(model, inputs, error)
    found = time.perf_counter()
    if graph_module is None:
        proven = _prove_all(part_subjects(model, inputs))
    else:
        proven = _prove_one(shallow_twins(spec, most) if hollow else subjects(spec, model, groups))
    proof = proven.worst
    return Survey(
        model=spec,
        groups=len(groups),
        coverage=round(groups.coverage, 6),
        nodes=len(graph_module.graph.nodes) if graph_module else 0,
        parameters=groups.parameter_count,
        build_seconds=round(built - started, 3),
        seconds=round(found - built, 3),
        error=proof.error if proof is not None else float("nan"),
        control_error=proof.control_error if proof is not None else float("nan"),
        verified=bool(proof) and proven.mapped == proven.claimed,
        subject=proven.subject,
        verify_seconds=round(time.perf_counter() - found, 3),
        unknown_ops=" ".join(sorted({op.partition(" at node")[0] for op in groups.unknown_ops})),
        reasons=_reasons(groups),
        failure=_failure(proven),
        continuous=round(_continuous(model, groups), 6),
        symmetries=_symmetries(groups),
        mapped=proven.mapped,
    )


@dataclass(frozen=True)
class Proven:
    """The proof of a subject, or the worst of several; ``claimed`` groups are said to be mappable, ``mapped`` were."""

    subject: str = ""
    worst: Verification | None = None
    claimed: int = 0
    mapped: int = 0


def _prove(subject: Subject) -> Verification:
    """A proof; with weights drawn anew where rounding has grown so much that the first ones decide nothing."""
    proof = None
    for seed in range(DRAWINGS):
        proof = prove(subject.model, subject.groups, subject.inputs, seed=seed, controls=CONTROLS)
        if not proof.undecided:
            break
    assert proof is not None
    return proof


def _prove_one(subjects: Iterable[Subject]) -> Proven:
    """The first proof that succeeds, else the last one.

    Where rounding has grown past the tolerance other images may show that it was no more than that; an error stays.
    """
    found = Proven()
    for subject in subjects:
        proof = _prove(subject)
        found = Proven(subject.name, proof, len(_mappable(subject.groups)), proof.continuous)
        if proof:
            break
    return found


def _prove_all(parts: Iterable[Subject]) -> Proven:
    """The worst of the proofs of all parts."""
    proofs = {part.name: (_prove(part), len(_mappable(part.groups))) for part in parts}
    found = [proof for proof, _ in proofs.values()]
    return Proven(
        f"each of its parts: {', '.join(proofs)}",
        min(found, key=lambda proof: (bool(proof), -proof.error), default=None),
        sum(claimed for _, claimed in proofs.values()),
        sum(proof.continuous for proof in found),
    )


def _mappable(groups: GroupSet) -> list[PermutationGroup]:
    """Those whose symmetry is more than orders."""
    return [group for group in groups if group.symmetry.is_continuous]


def _continuous(model: nn.Module, groups: GroupSet) -> float:
    """The share of parameters that lie in such groups; as in coverage, whole tensors count."""
    names = {member.parameter for group in _mappable(groups) for member in group.members}
    sizes = [parameter.numel() for name, parameter in model.named_parameters() if name in names]
    return sum(sizes) / max(groups.parameter_count, 1)


def _symmetries(groups: GroupSet) -> str:
    counts = Counter(group.symmetry for group in _mappable(groups))
    return ", ".join(f"{count} {symmetry}" for symmetry, count in sorted(counts.items()))


def _reasons(groups: GroupSet) -> str:
    counts = Counter[str]()
    for pin in groups.pinned:
        counts[pin.reason.partition(" (")[0]] += pin.count
    return "; ".join(f"{reason} ({count})" for reason, count in counts.most_common(4))


def _failure(proven: Proven) -> str:
    proof = proven.worst
    if proof is None:
        return "too large to verify, and its library makes no smaller twin"
    if proof and proven.mapped < proven.claimed:
        return f"not proven: {proven.claimed - proven.mapped} groups were not mapped by members of their symmetry"
    if proof:
        return ""
    if proof.undecided:
        return (
            f"undecided: error {proof.error:.0e}, and a change of the weights in their last place makes "
            f"{proof.rounding:.0e}"
        )
    wrong = proof.error > proof.tolerance
    return f"not verified: {proof.worst_group}" if wrong else "not proven: a group broken on purpose changes nothing"


def model_names(sources: Sequence[str], pattern: str = "*") -> list[str]:
    """All names of the given libraries that match a shell pattern, as ``timm:NAME`` or ``torchvision:NAME``."""
    names: list[str] = []
    if "timm" in sources:
        import timm

        names += [f"timm:{name}" for name in timm.list_models()]
    if "torchvision" in sources:
        from torchvision import models

        names += [f"torchvision:{name}" for name in models.list_models()]
    found = [name for name in names if fnmatch.fnmatch(name.partition(":")[2], pattern)]
    if not found:
        raise OptionError(explain(f"no model of {', '.join(sources)} matches {pattern!r}", remedy="try '*resnet*'"))
    return found


def survey_zoo(
    names: Sequence[str],
    table: Path,
    *,
    memory: float = MEMORY,
    limit: float = 300.0,
    jobs: int = 1,
    done: Callable[[Survey], None] = lambda survey: None,
) -> list[Survey]:
    """Survey many models, each in a process of its own; models that the table lists already are not run again.

    Args:
        names: Models as :func:`model_names` gives them.
        table: The CSV file, appended to after each model.
        memory: GiB that a model's process may allocate.
        limit: Seconds that it may take.
        jobs: Processes at a time.
        done: Called with every new result.

    Returns:
        The surveys of all ``names``, old and new, in their order.
    """
    known = {survey.model: survey for survey in read_table(table)} if table.exists() else {}
    columns = [field.name for field in dataclasses.fields(Survey)]
    table.parent.mkdir(parents=True, exist_ok=True)
    header = ",".join(columns)
    goes_on = table.exists() and table.read_text().partition("\n")[0] == header
    with table.open("a" if goes_on else "w", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        if not goes_on:  # there is none, or one of fewer columns
            writer.writeheader()
            writer.writerows(dataclasses.asdict(survey) for survey in known.values())
        missing = [name for name in names if name not in known]
        for name, found in in_processes(survey_model, missing, memory, limit, jobs):
            survey = Survey(name, failure=found) if isinstance(found, str) else found
            known[survey.model] = survey
            writer.writerow(dataclasses.asdict(survey))
            file.flush()
            done(survey)
    return [known[name] for name in names]


def read_table(path: Path) -> list[Survey]:
    """The surveys in a CSV file."""
    with path.open(newline="") as file:
        return [Survey.of_row(row) for row in csv.DictReader(file)]
