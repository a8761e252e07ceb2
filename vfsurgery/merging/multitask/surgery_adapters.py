"""Representation surgery: a small correction for each task between a merged trunk and the task's head.

Published (Yang et al., ICML 2024): ``f' = f - U relu(D f)``, with ``D`` of 16 rows and ``U`` zero at first, fitted to
the features of the task's expert by their mean absolute difference, on images without labels. The trunk is fixed, so
features of all images are computed once, and fitting reads these alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx, nn

from vfsurgery.errors import DataError, OptionError, explain


@dataclass(frozen=True)
class Correction:
    """The correction of one task, and how far features were from the expert's on held-out images.

    Attributes:
        module: Takes features ``(..., units)`` and returns the corrected ones; runs where this library is not
            installed.
        before: Mean absolute difference of a feature without it.
        after: The same with it; as before where nothing better than none was found.
        step: After how many steps it was as it is.
    """

    module: fx.GraphModule = field(repr=False)
    before: float
    after: float
    step: int

    def __str__(self) -> str:
        if not self.step:
            return f"features are {self.before:.3g} from the expert's; no correction came nearer on held-out images"
        return f"features come from {self.before:.3g} to {self.after:.3g} near the expert's ({self.step} steps)"


class _Adapter(nn.Module):
    def __init__(self, units: int, rank: int, generator: torch.Generator, like: Tensor) -> None:
        super().__init__()
        bound = (6 / units) ** 0.5  # Kaiming's for what a relu follows
        drawn = torch.rand(rank, units, generator=generator) * 2 - 1
        self.down = nn.Parameter((drawn * bound).to(like))
        self.up = nn.Parameter(torch.zeros(units, rank).to(like))

    def forward(self, features: Tensor) -> Tensor:
        return features - nn.functional.linear(nn.functional.linear(features, self.down).relu(), self.up)


def fit_corrections(
    merged: Mapping[str, Tensor],
    experts: Mapping[str, Tensor],
    *,
    rank: int = 16,
    steps: int = 500,
    lr: float = 1e-3,
    batch_size: int = 16,
    held_out: float = 0.2,
    seed: int = 0,
) -> dict[str, Correction]:
    """Fit a correction for each task.

    Args:
        merged: By task, what the merged trunk gives to the head for images of the task, ``(images, ..., units)``.
        experts: The same of each task's own network, for the same images.
        rank: Rows of ``D``.
        steps: Of Adam, each on ``batch_size`` images.
        lr: Learning rate.
        batch_size: Images in a step.
        held_out: Share of images that it is not fitted to; of ten looks at these, the nearest is taken, the start
            included.
        seed: Of the first ``D`` and the order of images.

    Raises:
        DataError: features of a task are missing, of other shapes, or too few to hold some out.
        OptionError: an option is out of its range.

    >>> features = torch.randn(200, 8)
    >>> found = fit_corrections({"a": features}, {"a": features - 0.5 * features.relu()}, lr=1e-2)["a"]
    >>> found.after < 0.5 * found.before
    True
    """
    if rank < 1 or steps < 0 or batch_size < 1 or not 0 < held_out <= 0.5:
        raise OptionError(
            explain(
                "corrections need rank >= 1, steps >= 0, batch_size >= 1 and held_out in (0, 0.5]",
                given=f"rank={rank}, steps={steps}, batch_size={batch_size}, held_out={held_out}",
            )
        )
    found: dict[str, Correction] = {}
    for number, (task, own) in enumerate(merged.items()):
        goals, every = experts.get(task), max(2, round(1 / held_out))
        if goals is None or goals.shape != own.shape or own.ndim < 2 or len(own) < every:
            raise DataError(
                explain(
                    f"the features of task {task!r} do not fit",
                    merged=tuple(own.shape),
                    expert="absent" if goals is None else tuple(goals.shape),
                    expected=f"equal shapes (images, ..., units), of {every} images or more, one of which is held out",
                )
            )
        generator = torch.Generator().manual_seed(seed + number)
        found[task] = _fitted(own.detach(), goals.detach(), rank, steps, lr, batch_size, every, generator)
    return found


def _fitted(
    own: Tensor,
    goals: Tensor,
    rank: int,
    steps: int,
    lr: float,
    batch_size: int,
    every: int,
    generator: torch.Generator,
) -> Correction:
    held = torch.arange(len(own), device=own.device) % every == every - 1
    adapter = _Adapter(own.shape[-1], rank, generator, own)
    optimizer = torch.optim.Adam(adapter.parameters(), lr=lr)
    fitted, wanted = own[~held], goals[~held]

    @torch.no_grad()
    def distance() -> float:
        return float((adapter(own[held]) - goals[held]).abs().mean())

    best = before = distance()
    kept, step = {name: tensor.clone() for name, tensor in adapter.state_dict().items()}, 0
    look, order = max(1, steps // 10), torch.empty(0, dtype=torch.int64)
    with torch.enable_grad():
        for number in range(1, steps + 1):
            if len(order) < min(batch_size, len(fitted)):
                order = torch.randperm(len(fitted), generator=generator)
            chosen, order = order[:batch_size].to(own.device), order[batch_size:]
            optimizer.zero_grad()
            (adapter(fitted[chosen]) - wanted[chosen]).abs().mean().backward()
            optimizer.step()
            if (number % look == 0 or number == steps) and (now := distance()) < best:
                best, step = now, number
                kept = {name: tensor.clone() for name, tensor in adapter.state_dict().items()}
    adapter.load_state_dict(kept)
    adapter.requires_grad_(False)
    return Correction(fx.GraphModule(adapter, fx.Tracer().trace(adapter), "Correction"), before, best, step)
