"""Stages that make other networks: training, pruning, merging, renormalization, passes, soups."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal, Self, cast

from pydantic import Field, model_validator
from torch import nn

from vfsurgery.checkpoints import WEIGHTS
from vfsurgery.checkpoints.kept import digest
from vfsurgery.errors import OptionError
from vfsurgery.merging.merge import merge
from vfsurgery.merging.shares import plan_shares
from vfsurgery.passes.running import run_passes
from vfsurgery.pruning import Masks, prune
from vfsurgery.pruning.renormalizing import renormalize
from vfsurgery.pruning.schedule import check_scope, read_pattern, read_sparsity
from vfsurgery.recipes import sections
from vfsurgery.recipes.bench import Bench, Net, Told, Write
from vfsurgery.recipes.sections import AsTuple, Count, Options, Patterns, Section
from vfsurgery.recipes.stage import MERGED, Misplaced, Place, Stage, Table, stage
from vfsurgery.records.results import report_of
from vfsurgery.scoring.measured import Measured
from vfsurgery.scoring.soups.phases import Retraining, rows_of, sparse_soup
from vfsurgery.tracing.copies import copied
from vfsurgery.training import OptimizerName, train


class Each(Stage):
    """What makes another network of each, with a report of it."""

    @abstractmethod
    def one(self, net: Net, bench: Bench) -> nn.Module:
        """Make it."""

    def says(self, made: nn.Module) -> list[str]:
        """Lines about it."""
        return str(report_of(made)).splitlines()[:1]

    def work(self, bench: Bench) -> tuple[dict[str, nn.Module], Told]:
        made = {name: self.one(net, bench) for name, net in bench.networks.items()}
        lines = [f"{name}: {line.strip()}" for name, model in made.items() for line in self.says(model)]
        return made, Told(lines=lines, values={name: report_of(model).to_dict() for name, model in made.items()})


class Joining(Stage):
    """What makes one network of all, by :func:`vfsurgery.merge`, and says all that its report says."""

    @abstractmethod
    def joined(self, bench: Bench) -> nn.Module:
        """Make it."""

    @abstractmethod
    def known_of(self, bench: Bench) -> dict[str, Any]:
        """What is known of it by what went in: its origins, and whether it is sparse."""

    def follow(self, at: Place) -> Place:
        if at.merged:
            raise ValueError(f"there is one network left, and nothing to {self.name} it with")
        return replace(at, networks=(MERGED,), pruned=False)

    def work(self, bench: Bench) -> tuple[dict[str, nn.Module], Told]:
        merged = self.joined(bench)
        report = report_of(merged)
        return {MERGED: merged}, Told(lines=str(report).splitlines(), values=report.to_dict())

    def after(self, bench: Bench, models: Mapping[str, nn.Module], told: Told) -> Bench:
        merged = Net(models[MERGED], **self.known_of(bench))
        return replace(bench, networks={MERGED: merged}, ends=bench.networks)


@stage("train", changes=True, reports=False)
class Train(Stage):
    """Options of :func:`vfsurgery.training.train`. Zeros that a pruner made stay."""

    epochs: Count = 20
    lr: Annotated[float, Field(gt=0)] = 0.05
    batch_size: Count = 64
    optimizer: OptimizerName = "sgd"
    momentum: Annotated[float, Field(gt=0, lt=1)] = 0.9
    weight_decay: Annotated[float, Field(ge=0)] = 5e-4
    nesterov: bool = True
    milestones: Annotated[tuple[Count, ...] | None, AsTuple] = None
    warmup: Annotated[int, Field(ge=0)] = 0
    augment: bool = False

    @model_validator(mode="after")
    def _warmup_has_steps(self) -> Self:
        if self.warmup and self.milestones is None:
            raise ValueError("warmup comes with milestones: a learning-rate cycle rises by itself")
        return self

    def work(self, bench: Bench) -> tuple[dict[str, nn.Module], Told]:
        lab, made = bench.lab, dict[str, nn.Module]()
        for name, net in bench.networks.items():
            made[name] = train(
                copied(net.model),
                lab.part("train"),
                seed=lab.sections[name].seed if name in lab.sections else lab.seed,
                masks=Masks.of(net.model) if net.sparse else None,
                checkpoint=self._file(bench, name, net),
                label=f"training {name}",
                progress=lab.progress,
                **self.model_dump(),
            )
        return made, Told(lines=[f"{self.epochs} epochs of {', '.join(made)}"])

    def known(self, before: Net) -> dict[str, Any]:
        return {"summary": before.summary and before.summary.before_training(self.epochs)}

    def _file(self, bench: Bench, name: str, net: Net) -> Path | None:
        """Of a source, it is named after all that decides the weights: recipes that train the same network share it."""
        lab = bench.lab
        if net.source is None or lab.trainings is None or lab.data is None:
            return bench.keep and bench.keep(name)
        images = lab.data.model_dump(mode="json", exclude={"calibration", "test"})
        file = lab.files[name].sha256 if name in lab.files else None
        own = net.source.model_dump(mode="json", exclude={"name", "input_size", "checkpoint"})
        decides = digest(images, own, file, self.dump(), str(lab.dtype))[:12]
        return lab.trainings / f"{net.source.model.rpartition(':')[2]}_seed{net.source.seed}_{decides}.pt"


@stage("prune", changes=True, needs_images=False)
class Prune(Each):
    """Options of :func:`vfsurgery.prune`."""

    sparsity: float | dict[str, float] | None = None
    method: sections.PrunerName = "magnitude"
    scope: Literal["global", "layer", "row"] | None = None
    pattern: str | None = None
    exclude: Patterns = ()
    options: Options = {}

    @model_validator(mode="after")
    def _options_fit(self) -> Self:
        self.built()
        if self.sparsity is None and self.pattern is None:
            raise ValueError("write sparsity, as in 0.9, or pattern, as in 2:4 within quotes")
        check_scope(self.scope, self.pattern)
        read_pattern(self.pattern)
        if self.sparsity is not None:
            read_sparsity(self.sparsity)
        return self

    def built(self) -> dict[str, Any]:
        return {"method": sections.build_pruner(self.method, self.options)}

    def follow(self, at: Place) -> Place:
        return replace(at, pruned=True)

    def arguments(self) -> dict[str, Any]:
        """Those of :func:`vfsurgery.prune` but the sparsity and the pattern."""
        return {**self.built(), "scope": self.scope, "exclude": self.exclude}

    def one(self, net: Net, bench: Bench) -> nn.Module:
        pruned = bench.shared and bench.shared.pruned(self, net.model, bench.lab)
        if pruned is None:
            return prune(net.model, self.sparsity, pattern=self.pattern, **self.arguments(), **bench.lab.common)
        return pruned

    def says(self, made: nn.Module) -> list[str]:
        return [f"{Masks.of(made).sparsity:.2%} of its prunable weights are zero"]

    def known(self, before: Net) -> dict[str, Any]:  # pruned twice, it still comes from what it was at first
        return {"sparse": True, "origins": before.origins if len(before.origins) == 1 else (before.model,)}


@stage("merge", changes=True, joins=True, needs_images=False)
class Merge(Joining):
    """Options of :func:`vfsurgery.merge`, by the same names; ``preserve`` may be a budget.

    >>> found = Merge(matching="weights", preserve={"flops": 1.2}).arguments()
    >>> found["matching"].name, found["max_flops"]
    ('weights', 1.2)
    """

    matching: sections.MatcherEntry = "auto"
    alpha: sections.Alpha = 0.5
    weights: sections.Weights = None
    renormalize: sections.Normalizations = "auto"
    preserve: sections.Boundary = 0
    masks: sections.Masks | None = None
    symmetries: sections.Symmetries = "auto"
    imagine: bool = True
    pins: Patterns = ()
    leaf: Patterns = ()

    def follow(self, at: Place) -> Place:
        behind = super().follow(at)
        if len(at.networks) < 2:
            raise ValueError("a merge needs two sources, and there is one")
        try:
            plan_shares(len(at.networks), self.alpha, self.weights)
        except OptionError as error:
            raise Misplaced(error, "alpha" if self.weights is None else "weights") from None
        return replace(behind, preserved=bool(self.preserve))

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of :func:`vfsurgery.merge`."""
        given = super().arguments()
        if isinstance(self.preserve, Mapping):
            limits = cast("Mapping[str, float]", given.pop("preserve"))
            given |= {f"max_{name}": limit for name, limit in limits.items()}
        return given

    def imagines(self) -> bool:
        return self.imagine

    def notes(self, at: Place, cost: Callable[..., list[str]]) -> list[str]:
        return cost(self.arguments(), len(at.networks))

    def joined(self, bench: Bench) -> nn.Module:
        models = [*bench.models.values()]
        shared = bench.shared and bench.shared.matching(self, models, bench.lab)
        given = self.arguments() | ({"matching": shared} if shared else {})
        return merge(models, **bench.lab.given(models[0]), **given)

    def known_of(self, bench: Bench) -> dict[str, Any]:
        sparse = any(net.sparse for net in bench.networks.values())
        return {"origins": tuple(bench.models.values()), "sparse": sparse}


@stage("renormalize", changes=True, whole="passes", needs_images=False)
class Renormalize(Each):
    """Statistics of what was pruned, restored from what it was: :func:`vfsurgery.renormalize`."""

    passes: sections.Normalizations = "auto"

    def follow(self, at: Place) -> Place:
        if at.merged and not at.pruned:
            raise ValueError("behind a merge, it is an option of the merge now: write merge: {renormalize: ...}")
        if not at.pruned:
            raise ValueError("renormalize stands behind prune: else nothing says to what")
        if not self.passes:
            raise ValueError("renormalize none changes nothing: leave it out")
        return at

    def one(self, net: Net, bench: Bench) -> nn.Module:
        (dense,), lab = net.origins, bench.lab
        return renormalize(
            net.model,
            reference=dense,
            data=lab.calibration,
            renormalize=self.built()["passes"],
            example_inputs=lab.example(dense) if lab.calibration is None else None,
            progress=lab.progress,
        )

    def imagines(self) -> bool:
        return True

    def known(self, before: Net) -> dict[str, Any]:
        return {"before": before.model}


@stage("apply", changes=True, whole="passes", needs_images=False)
class Apply(Each):
    """Passes, run one after another on every network; a pass alone is a stage by its own name."""

    passes: sections.Passes

    def one(self, net: Net, bench: Bench) -> nn.Module:
        return run_passes(net.model, self.built()["passes"], **bench.lab.common)

    def says(self, made: nn.Module) -> list[str]:
        return str(report_of(made)).splitlines()[1:]


class Retrain(Section):
    """Options of :class:`vfsurgery.scoring.soups.phases.Retraining`."""

    epochs: Count = 10
    lr: Annotated[float, Field(gt=0)] = 0.05
    batch_size: Count = 64
    momentum: Annotated[float, Field(gt=0, lt=1)] = 0.9
    nesterov: bool = True
    weight_decay: Annotated[float | tuple[float, ...], AsTuple] = 5e-4
    shape: Literal["cycle", "linear"] = "linear"
    augment: bool = False


@stage("soup", changes=True)
class Soup(Table):
    """One network made sparse in phases: pruned, retrained in copies with the mask fixed, averaged, pruned on."""

    sparsity: Annotated[float, Field(gt=0, lt=1)] = 0.9
    phases: Count = 3
    copies: Count = 3
    method: sections.PrunerName = "magnitude"
    scope: Literal["global", "layer"] = "global"
    exclude: Patterns = ()
    greedy: bool = False
    retraining: Retrain = Retrain()

    def follow(self, at: Place) -> Place:
        if len(at.networks) > 1:
            raise ValueError(f"soup begins with one network, and there are {len(at.networks)}")
        self.check_rows((*at.networks, *rows_of(self.phases, self.copies)))
        return replace(at, pruned=True).writing([f"{at.run}_masks{WEIGHTS}"])

    def work(self, bench: Bench) -> tuple[dict[str, nn.Module], Told]:
        lab = bench.lab
        ((name, model),) = bench.models.items()
        found = sparse_soup(
            model,
            lab.part("train"),
            lab.part("test"),
            retraining=Retraining(**self.retraining.model_dump()),
            calibration=lab.part("calibration"),
            seed=lab.seed,
            progress=lab.progress,
            **self.model_dump(exclude={"published", "expect", "retraining"}),
        )
        percent = {row: 100 * accuracy for row, accuracy in {name: found.dense, **found.rows}.items()}
        return {name: found.model}, Told(lines=str(found).splitlines(), values=found.to_dict(), rows=percent)

    def after(self, bench: Bench, models: Mapping[str, nn.Module], told: Told) -> Bench:
        ((name, model),) = models.items()
        own = {name: f"phase {self.phases} soup"}
        shown = Measured(told.rows, published=self.published, own=own)
        return replace(super().after(bench, models, told), shown=shown).wrote(
            Write(f"{bench.lab.run}_masks{WEIGHTS}", Masks.of(model, self.exclude).save)
        )

    def known(self, before: Net) -> dict[str, Any]:
        return {"sparse": True, "origins": (before.model,)}
