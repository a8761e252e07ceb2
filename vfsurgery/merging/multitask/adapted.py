"""What AdaMerging found, and how it reads."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from vfsurgery.shown import Drawn


@dataclass(frozen=True, slots=True)
class Look:
    """How near the merged network was to the experts on the held-out images of each task, after so many steps.

    ``agreement`` is the share of images of a task for which both find the same class, in the order of tasks; ``loss``
    the mean over tasks of the cross-entropy to the expert, divided by the logarithm of the number of classes.
    ``collapsed`` are tasks for which the merged network finds one class for all images, and the expert that one for
    less than three quarters.
    """

    step: int
    agreement: tuple[float, ...]
    loss: float
    collapsed: tuple[str, ...] = ()

    @property
    def mean(self) -> float:
        """The mean agreement of all tasks."""
        return sum(self.agreement) / len(self.agreement)

    def better_than(self, other: Look) -> bool:
        """Whether it agrees more often, or as often with a lower loss."""
        return (self.mean, -self.loss) > (other.mean, -other.loss)


@dataclass(frozen=True)
class Adapted(Drawn):
    """Coefficients that AdaMerging found, and the trunk that they make; print it for a table.

    Attributes:
        tasks: Names, the columns of ``coefficients``.
        rows: What each row of coefficients is for: a tensor, a module, a block, or ``"all"``.
        coefficients: ``theta = theta_0 + sum_k coefficients[row][k] tau_k``.
        members: Names of the tensors of each row.
        tensors: The merged trunk: parameters, and of running statistics the mean over tasks.
        statistics: By task, its own running statistics of the trunk's BatchNorm layers, by name.
        looks: What was seen on held-out images, the first of them at the start.
        step: After how many steps the coefficients were as they are; 0 if those of the start were kept.
        why: A sentence on that.
        objective: What was descended.
        held_out: Numbers of held-out images, in the order of tasks.
        notes: What else there is to say.
    """

    tasks: tuple[str, ...]
    rows: tuple[str, ...]
    coefficients: tuple[tuple[float, ...], ...] = field(repr=False)
    members: Mapping[str, Sequence[str]] = field(repr=False)
    tensors: Mapping[str, Tensor] = field(repr=False)
    statistics: Mapping[str, Mapping[str, Tensor]] = field(repr=False)
    looks: tuple[Look, ...] = field(repr=False)
    step: int
    why: str
    objective: str
    held_out: tuple[int, ...]
    notes: tuple[str, ...] = ()

    @property
    def start_kept(self) -> bool:
        """Whether nothing better than the coefficients of the start was found."""
        return self.step == 0

    @property
    def chosen(self) -> Look:
        """What was seen where the coefficients were as they are."""
        return next(look for look in self.looks if look.step == self.step)

    def to_dict(self) -> dict[str, object]:
        """Coefficients by row and task, and how near each look came, as plain numbers; tensors are left out."""
        rows = zip(self.rows, self.coefficients, strict=True)
        return {
            "objective": self.objective,
            "coefficients": {row: dict(zip(self.tasks, values, strict=True)) for row, values in rows},
            "agreement": {str(look.step): dict(zip(self.tasks, look.agreement, strict=True)) for look in self.looks},
            "step": self.step,
            "why": self.why,
            "notes": [*self.notes],
        }

    def lines(self) -> Iterator[str]:
        """A row for each task and each row of coefficients, and what there is to say."""
        yield f"AdaMerging of {len(self.tasks)} tasks by {self.objective}: {len(self.rows)} coefficients each"
        yield f"  {self.why}"
        wide = max(map(len, self.tasks))
        yield f"  {'task':<{wide}}  agreement  at the start  held out"
        for place, task in enumerate(self.tasks):
            now, before = self.chosen.agreement[place], self.looks[0].agreement[place]
            yield f"  {task:<{wide}}  {now:>9.1%}  {before:>12.1%}  {self.held_out[place]:>8}"
        wide = max(map(len, (*self.rows, "coefficients")))
        widths = [max(len(task), 7) for task in self.tasks]
        yield "  ".join([f"  {'coefficients':<{wide}}", *map(str.rjust, self.tasks, widths)])
        for row, values in zip(self.rows, self.coefficients, strict=True):
            cells = (f"{value:>{width}.3f}" for value, width in zip(values, widths, strict=True))
            yield "  ".join([f"  {row:<{wide}}", *cells])
        yield from (f"  {note}" for note in self.notes)

    def __str__(self) -> str:
        return "\n".join(self.lines())
