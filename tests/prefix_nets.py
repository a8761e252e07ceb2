"""Networks that are awkward to cut, and merges of them at many boundaries."""

from __future__ import annotations

from typing import Any

import torch
from tiny_nets import CLASSES, NETS, images, lively
from torch import Tensor, fx, nn

import vfsurgery as surgery
from vfsurgery.discovery.verification import TOLERANCE
from vfsurgery.matching import Matcher, WeightMatching
from vfsurgery.merging.aligned import match_sources
from vfsurgery.merging.combined import Terms, combine
from vfsurgery.merging.finished import finish
from vfsurgery.merging.prepared import group_units, trace_sources
from vfsurgery.merging.shares import Shares
from vfsurgery.merging.surveyed import Way, plan_survey
from vfsurgery.passes import Preserve
from vfsurgery.passes.cut import Boundaries

SAME = TOLERANCE[torch.float64]
X = images(8, 9, dtype=torch.float64)
PLAIN = {"renormalize": None, "progress": False, "example_inputs": X[:2], "matching": "weights"}
SHARES = [0.5, 0.3, 0.2]


class Attention(nn.Module):
    """A transformer block before whose sums a LayerNorm stands."""

    def __init__(self, width: int = 8, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 12), nn.Linear(12, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        qkv = self.qkv(self.norm1(x)).reshape(batch, tokens, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, tokens, width)
        x = x + self.proj(mixed)
        return x + self.down(nn.functional.gelu(self.up(self.norm2(x))))


class VisionTransformer(nn.Module):
    """Three blocks over nine patches and a class token."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 4, 4)
        self.token, self.places = nn.Parameter(torch.randn(1, 1, 8)), nn.Parameter(torch.randn(1, 10, 8))
        self.blocks = nn.Sequential(*(Attention() for _ in range(3)))
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.places
        return self.head(self.norm(self.blocks(x))[:, 0])


class Awkward(nn.Module):
    """A scale on the input in place, item assignment, a view by sizes, pieces of a chunk, one module called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(3, 1, 1))
        self.one, self.two = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(3, 4, 3, padding=1)
        self.again = nn.Linear(6, 6)
        self.head = nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = x.clone().mul_(self.gain)
        x = self.one(x)
        y = torch.zeros_like(x[:, :3])
        y[:, :2] = torch.relu(x[:, :2])
        left, right = x.chunk(2, 1)
        x = torch.relu(self.two(left.sigmoid() + right * y))
        x = nn.functional.adaptive_avg_pool2d(x, 3)
        x = x.view(x.size(0), -1)[:, :6]
        return self.head(torch.relu(self.again(torch.relu(self.again(x)))))


EVERY = {**NETS, "vit": VisionTransformer, "awkward": Awkward}


def made(name: str, seed: int) -> nn.Module:
    return lively(EVERY[name](), seed).double()


def sources(name: str, count: int = 3) -> list[nn.Module]:
    return [made(name, seed) for seed in range(1, count + 1)]


class Sweep:
    """One matching of some sources, merged at many boundaries without any normalization."""

    def __init__(self, models: list[nn.Module], matcher: Matcher | None = None) -> None:
        self.shares = tuple(SHARES) if len(models) == 3 else (0.5, 0.5)
        self.grouped = group_units(trace_sources(models, None, X[:2], progress=False))
        self.cuts = Boundaries(self.grouped.graph_module)
        matcher = matcher or WeightMatching()
        self.surveyed = plan_survey(self.grouped, [Way(matcher, ())])
        with self.grouped.running():
            self.matched = match_sources(self.surveyed, matcher)

    def __call__(self, boundary: int | str, form: str = "auto", shares: tuple[float, ...] = ()) -> fx.GraphModule:
        with self.grouped.running():
            terms = Terms(Shares(shares or self.shares, {}), Preserve(boundary=boundary, form=form))
            merged = combine(self.surveyed, self.matched, (), terms)
            found = finish(self.grouped, merged, inplace=False, preserved=True)
            assert isinstance(found, fx.GraphModule)
            return found


def merge(models: list[nn.Module], boundary: int | str, form: str = "auto", **options: Any) -> nn.Module:
    kept = Preserve(boundary=boundary, form=form) if boundary else 0
    return surgery.merge(models, preserve=kept, **{**PLAIN, **options})


@torch.no_grad()
def distance(found: nn.Module, expected: nn.Module | Tensor) -> float:
    """Largest difference of the logits over the largest expected one."""
    logits = expected if isinstance(expected, Tensor) else expected(X)
    return float((found(X) - logits).abs().max() / logits.abs().max())
