"""The steps of one structured pruning: scores, what can be cut, the cut, its proof, its repair."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor, nn

from vfsurgery.data.batches import Batches, Data
from vfsurgery.discovery import discover
from vfsurgery.discovery.recording import record
from vfsurgery.discovery.verification import TOLERANCE, keep_signals_alive, precision_of, randomize, relative_error
from vfsurgery.errors import CertificateError, TraceError, explain
from vfsurgery.groups import GroupSet
from vfsurgery.passes import Context, Pass
from vfsurgery.passes.base import calibration_images
from vfsurgery.pruning.layers import prunable, stored_weight
from vfsurgery.pruning.units.candidates import first_and_instead
from vfsurgery.pruning.units.cut import Cut
from vfsurgery.pruning.units.fold import Reader, folded, readers_of, self_correlations, unfolded
from vfsurgery.pruning.units.quota import Quota
from vfsurgery.pruning.units.reference import CutCertificate, certify_cut, run_in
from vfsurgery.pruning.units.rehearsal import Rehearsal, largest_working
from vfsurgery.pruning.units.resize import Resizer
from vfsurgery.pruning.units.restore import restore
from vfsurgery.pruning.units.rotation import Rotation
from vfsurgery.pruning.units.saliency import Saliency, activities, by_user, magnitudes
from vfsurgery.pruning.units.teams import Teams
from vfsurgery.stats.correlation import CrossMoments
from vfsurgery.stats.imagined import stand_in
from vfsurgery.stats.precision import batches_for
from vfsurgery.stats.together import examples_of, in_bound_runs
from vfsurgery.tracing.compatibility import check_weights
from vfsurgery.tracing.copies import copied, fresh
from vfsurgery.tracing.examples import ExampleInputs
from vfsurgery.tracing.graph_modules import put_over
from vfsurgery.tracing.precision import Precise, in_precision, raised, raised_dtype
from vfsurgery.tracing.sources import Source

TOO_SMALL = "too few units to lose one"


@dataclass
class Shrinking:
    """One structured pruning in progress.

    ``in_both`` are the same groups, with their places in the graph of training too. ``whole`` says of groups why
    they stay as they are. ``rotation`` has streams whose principal directions are removed, if that is wanted; once they
    are rotated, so is ``source``, and ``rotated`` names them.
    """

    source: Source
    groups: GroupSet
    in_both: GroupSet
    inputs: tuple[Tensor, ...]
    data: Batches | None
    progress: bool
    whole: dict[str, str] = field(default_factory=dict[str, str])
    seconds: list[tuple[str, float]] = field(default_factory=list[tuple[str, float]])
    rotation: Rotation | None = None
    rotated: tuple[str, ...] = ()
    _teams: Teams = field(default_factory=lambda: Teams({}, {}))
    _scores: dict[str, np.ndarray] = field(default_factory=dict[str, np.ndarray])
    _readers: list[Reader] = field(default_factory=list[Reader])
    _moments: dict[str, CrossMoments] = field(default_factory=dict[str, CrossMoments])
    _lively: tuple[Source, tuple[Tensor, ...]] | None = None

    @staticmethod
    def prepare(model: nn.Module, data: Data | str | None, given: ExampleInputs | None, progress: bool) -> Shrinking:
        """Check, trace and group the model."""
        started = time.perf_counter()
        for name in prunable(model):
            stored_weight(model, name, excludable=False)  # refuses what hooks or parametrizations compute
        check_weights([model])
        device = next(model.parameters()).device
        data = stand_in([model], data, given, progress=progress)
        batches = None if data is None else batches_for(model, data, device)
        inputs, batches = examples_of(model, batches, given)
        try:
            model = fresh(model, inputs)
            graph_module = record(model, inputs)
            batches = in_bound_runs(batches, graph_module)
        except TraceError as error:
            raise TraceError(f"units can be removed only from what fx can record\n{error}") from error
        groups = discover(graph_module)
        in_both = discover(graph_module, training=True) if groups.in_training else groups
        work = Shrinking(Source.of(model, graph_module), groups, in_both, inputs, batches, progress)
        work.seconds.append(("trace and groups", time.perf_counter() - started))
        return work

    @contextmanager
    def clock(self, name: str) -> Generator[None]:
        """Note how long a step takes."""
        started = time.perf_counter()
        yield
        self.seconds.append((name, time.perf_counter() - started))

    def score(self, saliency: str | Saliency) -> None:
        """Find out how much every unit matters."""
        with self.clock("saliency"):
            graph_module, state = self.source.graph_module, self.source.state
            if not isinstance(saliency, str):
                self._scores = by_user(saliency, self.groups, state)
            elif saliency == "magnitude":
                self._scores = magnitudes(self.groups, state)
            else:
                self._scores = activities(graph_module, self.groups, self._images("activations"))
                self.whole |= {
                    group.name: "its activations are seen nowhere"
                    for group in self.groups
                    if group.name not in self._scores
                }

    def find_directions(self, saliency: str | Saliency, fold: bool) -> None:
        """Find the principal directions of streams; their energies take the place of what their units score."""
        with self.clock("principal directions"):
            images = None if self.data is None else self._images
            self.rotation = Rotation.find(self.source, self.groups, images, fold)
            for name, stream in self.rotation.streams.items():
                energies = stream.scores()  # mean squares, as of "activation"
                self._scores[name] = energies if saliency == "activation" else np.sqrt(energies)

    def rotate(self, cut: Cut) -> None:
        """Rotate the streams that are cut; nothing else changes.

        Raises:
            CertificateError: the network computes something else.
        """
        if self.rotation is None:
            return
        self.rotated = tuple(name for name in cut.kept if name in self.rotation.streams)
        if not self.rotated:
            return
        with self.clock("rotation"):
            turned, dtype = self.rotation.turned(cut.kept), precision_of(self.source)
            found, expected = (run_in(each.model, self.inputs, False, dtype) for each in (turned, self.source))
            error = relative_error(tuple(found), tuple(expected))
            if not error <= TOLERANCE[dtype]:
                raise CertificateError(
                    explain(
                        "the rotated network computes something else; nothing was removed",
                        rotated=", ".join(str(self.groups[name]) for name in self.rotated),
                        error=f"{error:.2e} relative, tolerance {TOLERANCE[dtype]:.0e}",
                        remedy="leave rotate= out",
                    )
                )
            self.source = turned

    def correlate(self) -> None:
        """Take what folding needs: how units go together, where layers read them."""
        with self.clock("correlations"):
            found = readers_of(self.source.graph_module, self.groups)
            self._readers = [reader for reader in found if reader.group.name not in self.rotated]
            self._moments = self_correlations(self.source.graph_module, self._readers, self._images("correlations"))

    def choose(self, quota: Quota, excluded: Mapping[str, str]) -> Cut:
        """The largest cut that the forward survives."""
        teams = self._teams = Teams.find(self.source.model, self.groups)
        self.whole = teams.shared({**teams.stuck, **self.whole, **excluded})
        first, instead = first_and_instead(self.groups)

        def cut(leaders: Sequence[str]) -> Cut:
            chosen = [self.groups[name] for name in teams.members(leaders)]
            return Cut(self.in_both, quota.masks(chosen, self._scores, teams.of))

        with self.clock("rehearsal"):
            rehearsal = Rehearsal(self.source.model, self.source.graph_module, self.inputs)
            works, failed = largest_working(
                teams.leaders(name for name in first if name not in self.whole),
                lambda names: rehearsal.failure(cut(names)),
            )
            others = dict.fromkeys(other for name in failed for other in instead.get(name, ()))
            also, _ = largest_working(
                teams.leaders(name for name in others if name not in self.whole),
                lambda names: rehearsal.failure(cut([*works, *names])),
            )
        replaced = {name for name in failed if any(other in also for other in instead.get(name, ()))}
        self.whole |= teams.shared({name: reason for name, reason in failed.items() if name not in replaced})
        found = cut([*works, *also])
        self.whole |= {name: TOO_SMALL for name in teams.members((*works, *also)) if name not in found.kept}
        return found

    def make(self, cut: Cut) -> tuple[Cut, nn.Module, CutCertificate]:
        """Cut the units out and prove it; groups that fail are left whole.

        Raises:
            CertificateError: the model differs from itself.
        """
        with self.clock("cut and certificate"):
            certificate = self._certificate(cut)
            if not certificate:
                if not (of_itself := self._certificate(Cut(self.groups, {}))):
                    raise CertificateError(
                        explain(
                            "the model gives different outputs each time it runs; nothing was removed",
                            error=f"{of_itself.error:.2e} relative, tolerance {of_itself.tolerance:.0e}",
                            remedy="its forward draws random numbers even in eval mode, or its train() writes into its "
                            "weights: make it repeatable",
                        )
                    )
                teams = self._teams
                works, failed = largest_working(
                    teams.leaders(cut.kept), lambda names: self._difference(_only(cut, teams.members(names)))
                )
                self.whole |= teams.shared(failed)
                cut = _only(cut, teams.members(works))
                certificate = self._certificate(cut)
            self._lively = None  # a second model in double precision
            state = self._written(self.source, cut)
            return cut, Resizer.of(self.source.model, self.source.graph_module).shrink(cut, state), certificate

    def restore(self, cut: Cut, smaller: nn.Module, passes: Sequence[Pass]) -> Context | None:
        """Give the units that are left their statistics back."""
        if not passes or self.data is None or not cut.kept:
            return None
        with self.clock("renormalization"):
            return restore(
                self.source, Cut(self.groups, cut.kept), smaller, passes, self.inputs, self.data, self.progress
            )

    def energies(self, cut: Cut) -> tuple[tuple[str, float], ...]:
        """Rotated groups that lost units, each with the share of the energy that is left."""
        if self.rotation is None:
            return ()
        streams = self.rotation.streams
        return tuple((name, streams[name].share(cut.kept[name])) for name in self.rotated if name in cut.kept)

    def said_of_rotation(self, cut: Cut) -> Iterator[str]:
        """For the report: what was rotated, and the streams whose single units are removed all the same, and why."""
        for name, share in self.energies(cut):
            yield f"{self.groups[name]}: rotated, so that principal directions went; {share:.1%} of the energy is left"
        for name, reason in (self.rotation.left if self.rotation is not None else {}).items():
            yield f"{self.groups[name]} is not rotated: {reason}"

    def not_folded(self, cut: Cut) -> tuple[str, ...]:
        """Groups whose removed units are dropped, by some of their readers at least."""
        single = [group for group in self.groups if group.name in cut.kept and group.name not in self.rotated]
        lost = unfolded(single, self._readers)
        if self.rotation is not None:
            lost += self.rotation.not_folded([name for name in self.rotated if name in cut.kept])
        return tuple(f"{group.name} {group.label}" for group in lost)

    def _certificate(self, cut: Cut) -> CutCertificate:
        """On the weights at hand, in float32 at least.

        Where the outputs do not tell whether the units are there (an untrained network's may be all but constant), on a
        copy in double precision with random weights.
        """
        source, inputs, dtype = self.source, self.inputs, precision_of(self.source)
        if any(raised_dtype(tensor.dtype, dtype) != tensor.dtype for tensor in source.state.values()):
            source, inputs = _in_dtype(source, inputs, dtype)
        certificate = self._compare(source, inputs, cut, dtype)
        if not certificate and certificate.training and not certificate.failure:  # BatchNorm multiplies rounding there
            certificate = self._compare(*_in_dtype(source, inputs, torch.float64), cut, torch.float64)
        if not certificate or certificate.effect > certificate.tolerance or not cut.kept:
            return certificate
        if self._lively is None:
            self._lively = _lively(source, inputs)
        return replace(self._compare(*self._lively, cut, torch.float64), random_weights=True)

    def _compare(self, source: Source, inputs: tuple[Tensor, ...], cut: Cut, dtype: torch.dtype) -> CutCertificate:
        state = self._written(source, cut)
        smaller = Resizer.of(source.model, source.graph_module).shrink(cut, state)
        return certify_cut(source.model, source.graph_module, cut, state, smaller, inputs, dtype)

    def _written(self, source: Source, cut: Cut) -> dict[str, Tensor]:
        """The weights that units are cut from."""
        state = folded(source.state, cut, self._readers, self._moments)
        return state if self.rotation is None else self.rotation.narrowed(state, cut)

    def _difference(self, cut: Cut) -> str | None:
        certificate = self._certificate(cut)
        if certificate:
            return None
        return certificate.failure or f"the rest would compute something else, relative error {certificate.error:.1e}"

    def _images(self, label: str) -> Iterator[Tensor]:
        return calibration_images(self.data, label, self.progress)


def _only(cut: Cut, names: Sequence[str]) -> Cut:
    return Cut(cut.groups, {name: cut.kept[name] for name in names})


def _lively(source: Source, inputs: tuple[Tensor, ...]) -> tuple[Source, tuple[Tensor, ...]]:
    """A copy of a source in double precision with random weights, whose outputs depend on all units."""
    lively, inputs = _in_dtype(source, inputs, torch.float64)
    generator = torch.Generator().manual_seed(0)
    with Precise(torch.float64):
        randomize(lively.model, generator)
        keep_signals_alive(lively.model, inputs, generator)
    return lively, inputs


def _in_dtype(source: Source, inputs: tuple[Tensor, ...], dtype: torch.dtype) -> tuple[Source, tuple[Tensor, ...]]:
    """A copy of a source, and inputs for it, in another precision."""
    model = in_precision(copied(source.model), dtype)
    cast = tuple(raised(x, dtype) for x in inputs)
    graph_module = in_precision(put_over(model, source.graph_module), dtype)  # it has constants of its own
    return Source.of(model, graph_module), cast
