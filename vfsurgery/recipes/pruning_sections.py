"""Sections of a recipe that prune one trained network: in several ways to several sparsities, or in phases as soups."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from itertools import pairwise
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import AfterValidator, Field, field_validator, model_validator

from vfsurgery.checkpoints import WEIGHTS
from vfsurgery.pruning import PRUNERS
from vfsurgery.recipes.expectations import is_number
from vfsurgery.recipes.sections import (
    AsTuple,
    Count,
    Experiment,
    Frozen,
    FrozenDict,
    Name,
    Options,
    Section,
    Steps,
    Training,
    given,
    refuse_repeated,
    refuse_unknown,
)
from vfsurgery.scoring.sweeps import DENSE, row

Sparsity = Annotated[float, Field(gt=0, lt=1)]
Curve = Annotated[tuple[float | None, ...], AsTuple]


def _known_pruner(method: str) -> str:
    refuse_unknown("pruner", (method,), PRUNERS)
    return method


PrunerName = Annotated[str, AfterValidator(_known_pruner)]


def check_pruner_options(method: str, options: Mapping[str, object]) -> None:
    """Refuse options that a pruner does not have."""
    known = list(inspect.signature(PRUNERS[method]).parameters)
    refuse_unknown(f"option of {method}", tuple(options), known)


class Method(Section):
    """One curve: options of :func:`vfsurgery.prune`, under ``label`` or a name made from them."""

    method: PrunerName = "magnitude"
    scope: Literal["global", "layer", "row"] | None = None
    exclude: Annotated[tuple[str, ...], AsTuple] = ()
    options: Options = FrozenDict()
    label: str | None = None

    @model_validator(mode="after")
    def _options_fit(self) -> Self:
        check_pruner_options(self.method, self.options)
        return self

    @property
    def name(self) -> str:
        """The label, or as in ``magnitude, layer``."""
        return self.label or ", ".join([self.method, *([self.scope] if self.scope else [])])

    def arguments(self) -> dict[str, Any]:
        """Arguments of :func:`vfsurgery.prune`; the pruner is made anew each time."""
        options: dict[str, Any] = self.options
        return {"method": PRUNERS[self.method](**options), "scope": self.scope, "exclude": self.exclude}


class OneNetwork(Experiment):
    """An experiment on one network, trained from a seed or loaded."""

    seed: int = 0
    checkpoint: str | None = None

    @property
    def files(self) -> tuple[str, ...]:
        """The network's checkpoint."""
        return () if self.checkpoint is None else (self.checkpoint,)


class PruningSweep(OneNetwork):
    """One trained network, pruned by every method to every sparsity, before and after renormalization."""

    methods: Annotated[tuple[Method, ...], AsTuple, Field(min_length=1)] = (Method(),)
    sparsities: Annotated[tuple[Sparsity, ...], AsTuple, Field(min_length=1)] = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
    renormalize: Annotated[Steps, AsTuple] = "auto"
    published: Annotated[dict[str, Curve], Frozen] = FrozenDict()

    ENDINGS: ClassVar[tuple[str, ...]] = (WEIGHTS, "_sweep.png", ".html")

    @field_validator("sparsities")
    @classmethod
    def _sparsities_rise(cls, sparsities: tuple[float, ...]) -> tuple[float, ...]:
        if not all(low < high for low, high in pairwise(sparsities)):
            raise ValueError("sparsities rise from one to the next")
        return sparsities

    @model_validator(mode="after")
    def _rows_are_there(self) -> Self:
        names = [method.name for method in self.methods]
        refuse_repeated("method", names)
        refuse_unknown("curve", tuple(self.published), [*names, *(f"{name} renormalized" for name in names)])
        for label, curve in self.published.items():
            if len(curve) != len(self.sparsities):
                raise ValueError(f"published {label!r} has {len(curve)} values for {len(self.sparsities)} sparsities")
        for expectation in self.expectations:
            refuse_unknown("row", [label for label in expectation.rows if not is_number(label)], self.rows)
        self.check_bands(self.published_rows)
        return self

    @property
    def rows(self) -> tuple[str, ...]:
        """Labels of all networks, as in ``magnitude 80% renormalized``."""
        cells = [(method.name, sparsity) for method in self.methods for sparsity in self.sparsities]
        return (DENSE, *(row(*cell, renormalized) for cell in cells for renormalized in (False, True)))

    @property
    def published_rows(self) -> dict[str, float]:
        """Published accuracies (%) by label of network."""
        found: dict[str, float] = {}
        for label, curve in self.published.items():
            method = label.removesuffix(" renormalized")
            for sparsity, accuracy in zip(self.sparsities, curve, strict=True):
                if accuracy is not None:
                    found[row(method, sparsity, renormalized=label != method)] = accuracy
        return found


class ReducedSweep(Section):
    """What the reduced form changes in the sweep of this name; a key that is given replaces the whole section."""

    name: Name
    options: Options | None = None
    training: Training | None = None
    methods: Annotated[Annotated[tuple[Method, ...], Field(min_length=1)] | None, AsTuple] = None
    sparsities: Annotated[Annotated[tuple[Sparsity, ...], Field(min_length=1)] | None, AsTuple] = None
    expect: Annotated[tuple[str, ...] | None, AsTuple] = None

    def changed(self, sweep: PruningSweep) -> dict[str, Any]:
        """The sweep as it is in the reduced form: without what is published, which is of the full one."""
        full = sweep.model_dump(mode="json", exclude={"checkpoint", "published"})
        full["expect"] = [expected.text for expected in sweep.expectations if expected.points is None]
        return full | given(self)


class Retrain(Section):
    """Options of :class:`vfsurgery.soups.phases.Retraining`."""

    epochs: Count = 10
    lr: Annotated[float, Field(gt=0)] = 0.05
    batch_size: Count = 64
    momentum: Annotated[float, Field(gt=0, lt=1)] = 0.9
    nesterov: bool = True
    weight_decay: Annotated[float | tuple[float, ...], AsTuple] = 5e-4
    shape: Literal["cycle", "linear"] = "linear"
    augment: bool = False


class Soup(OneNetwork):
    """One trained network, made sparse in phases: prune, retrain copies with the mask fixed, average them."""

    sparsity: Sparsity = 0.9
    phases: Count = 3
    copies: Count = 3
    method: PrunerName = "magnitude"
    scope: Literal["global", "layer"] = "global"
    exclude: Annotated[tuple[str, ...], AsTuple] = ()
    greedy: bool = False
    retraining: Retrain = Retrain()

    ENDINGS: ClassVar[tuple[str, ...]] = (WEIGHTS, f"_masks{WEIGHTS}")

    @model_validator(mode="after")
    def _rows_are_there(self) -> Self:
        for expectation in self.expectations:
            refuse_unknown("row", [label for label in expectation.rows if not is_number(label)], self.rows)
        self.check_bands(())
        return self

    @property
    def rows(self) -> tuple[str, ...]:
        """Labels of all networks, as in ``phase 2 soup``."""
        phases = range(1, self.phases + 1)
        each = ("pruned", *(f"copy {number}" for number in range(self.copies)), "soup", "one copy")
        return (DENSE, *(f"phase {phase} {name}" for phase in phases for name in each))
