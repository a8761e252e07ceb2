"""Moving images until BatchNorm layers are given what they remember from training.

As in DeepInversion (Yin et al., "Dreaming to distill", CVPR 2020) the pixels are changed by gradients, and as in ZeroQ
(Cai et al., CVPR 2020) the aim is the statistics that BatchNorm layers keep, here those of all sources. The start is
not noise but dead leaves, which early layers can hardly tell from photographs: a few steps then do for the late ones.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from vfsurgery.data.procedural import Pixels
from vfsurgery.stats.imagined.aims import Watched

RATE = 0.1
"""Of Adam, in deviations of a pixel; it falls along half a cosine to a tenth."""
SMOOTH = 0.01
"""Weight of the mean difference of neighbours, in deviations: without it, noise is the easiest way to any statistic."""
CLASSES = 0.1
"""Weight of the cross-entropy to classes that take turns, as many as there are images: so all of them are there."""
SHIFT = 16
"""Images are rolled by up to this part of their sides at each step, so that no pixel is tuned to a stride."""


@dataclass(frozen=True)
class Steering:
    """How ``images`` images are moved: ``steps`` times, ``batch`` of them together, within the range of ``pixels``."""

    images: int
    steps: int
    batch: int
    pixels: Pixels
    generator: torch.Generator

    def steer(self, sources: Sequence[Watched], images: Tensor, tell: Callable[[str], None]) -> Tensor:
        """Images ``(N, channels, height, width)`` moved towards the statistics that the sources keep.

        Args:
            sources: Graphs in eval mode; nothing of them changes.
            images: Where to begin.
            tell: Is told after every step how far it is.
        """
        count = -(-self.images // self.batch)
        parts = images.tensor_split(count)
        places = torch.arange(len(images)).tensor_split(count)
        started, done = time.perf_counter(), 0
        moved = torch.empty_like(images)

        def tick(step: int, distance: float) -> None:
            nonlocal done
            done += 1
            left = (time.perf_counter() - started) * (len(parts) * self.steps / done - 1)
            place = f"batch {(done - 1) // self.steps + 1} of {len(parts)}, step {step + 1} of {self.steps}"
            tell(f"{place}, distance {distance:.3f}, {left:.0f} s left")

        for part, own in zip(parts, places, strict=True):
            moved[own] = self._move(sources, part, own, tick)
        return moved

    def _move(
        self, sources: Sequence[Watched], images: Tensor, turns: Tensor, tick: Callable[[int, float], None]
    ) -> Tensor:
        """One batch, whose statistics are looked at together; ``turns`` are the places of its images in all."""
        middle, spread = (Pixels.column(values, images) for values in (self.pixels.mean, self.pixels.std))
        deviations = ((images - middle) / spread).requires_grad_()
        optimizer = torch.optim.Adam([deviations], lr=RATE)
        for step in range(self.steps):
            optimizer.param_groups[0]["lr"] = RATE * (0.1 + 0.45 * (1 + math.cos(math.pi * step / self.steps)))
            rolled = self._rolled(deviations)
            seen = rolled * spread + middle
            distance, towards = self._pull(sources, seen.detach(), turns)
            (deviations.grad,) = torch.autograd.grad(
                (seen, _roughness(rolled)), deviations, (towards, seen.new_tensor(SMOOTH))
            )
            optimizer.step()
            with torch.no_grad():
                deviations.copy_((self.pixels.clip(deviations * spread + middle) - middle) / spread)
            tick(step, distance)
        return deviations.detach() * spread + middle

    def _rolled(self, images: Tensor) -> Tensor:
        """Images shifted, what leaves them coming in on the other side."""
        most = [side // SHIFT for side in images.shape[2:]]
        shifts = [int(torch.randint(-far, far + 1, (), generator=self.generator)) for far in most]
        return images.roll(shifts, (2, 3))

    def _pull(self, sources: Sequence[Watched], images: Tensor, turns: Tensor) -> tuple[float, Tensor]:
        """The mean distance of all sources' layers, and the gradient of what is to be small; one source at a time."""
        total, gradient = 0.0, torch.zeros_like(images)
        for source in sources:
            own = images.to(source.device).requires_grad_()
            distances, logits = source.look(own)
            distance = torch.stack(distances).mean() if distances else own.new_zeros(())
            total += float(distance.detach()) / len(sources)
            if logits is not None:
                wanted = turns * max(logits.shape[1] // self.images, 1) % logits.shape[1]
                distance = distance + CLASSES * functional.cross_entropy(logits, wanted.to(logits.device))
            if distance.requires_grad:
                (found,) = torch.autograd.grad(distance, own)
                gradient += found.to(gradient) / len(sources)
        return total, gradient


def _roughness(images: Tensor) -> Tensor:
    """Mean difference of neighbours; an image of one pixel has none."""
    pairs = [images.diff(dim=dim).abs() for dim in (2, 3) if images.shape[dim] > 1]
    return sum((each.mean() for each in pairs), 0 * images.sum())
