"""Rules of scalar products, distances and other comparisons, of order statistics, and of what is read by number."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision
from proofs import Apply, parameter, proven, sizes
from torch import Tensor, nn

import vfsurgery as surgery

VECTOR, TOKENS, MAP = torch.randn(6, 4), torch.randn(2, 5, 4), torch.randn(2, 3, 8, 8)
NUMBERS = torch.randint(0, 10, (4, 5))

Case = tuple[nn.Module, tuple[Tensor, ...], list[int]]


def dense(between: Callable[..., Tensor], width: int = 8, **members: Any) -> nn.Module:
    """Eight units, what is tested, and a linear layer that reads the result."""
    return Apply(
        lambda m, x: m.last(between(m, m.first(x))), first=nn.Linear(4, 8), last=nn.Linear(width, 3), **members
    )


def both(between: Callable[..., Tensor], other: int = 8, **members: Any) -> nn.Module:
    """Two linear layers side by side, and what is made of both."""
    return Apply(lambda m, x: between(m, m.a(x), m.b(x)).tanh(), a=nn.Linear(4, 8), b=nn.Linear(4, other), **members)


def maps(between: Callable[..., Tensor], width: int = 8, **members: Any) -> nn.Module:
    return Apply(
        lambda m, x: m.last(between(m, m.first(x)).relu()).mean((2, 3)),
        first=nn.Conv2d(3, 8, 3, padding=1),
        last=nn.Conv2d(width, 4, 1),
        **members,
    )


def deformable(groups: int, parts: int) -> nn.Module:
    conv = torchvision.ops.DeformConv2d(8, 6, 3, padding=1, groups=groups)
    return maps(lambda m, x: m.conv(x, m.offset(x)), 6, conv=conv, offset=nn.Conv2d(8, 18 * parts, 3, padding=1))


def deformable_with_mask(m: Any, x: Tensor) -> Tensor:
    mask = m.mask(x).sigmoid()
    return torchvision.ops.deform_conv2d(x, m.offset(x), m.w, m.b, padding=1, mask=mask)


def bag(mode: str) -> nn.EmbeddingBag:
    return nn.EmbeddingBag(10, 8, mode=mode)


def spatial_attention(m: Any, x: Tensor) -> Tensor:
    summary = torch.cat([x.mean(1, keepdim=True), torch.max(x, dim=1, keepdim=True)[0]], 1)
    return x * m.look(summary).sigmoid()


CASES: dict[str, Case] = {
    "cosine": (both(lambda m, a, b: F.cosine_similarity(a, b)), (VECTOR,), [8]),
    "cosine of all pairs": (both(lambda m, a, b: F.cosine_similarity(a[:, :, None], b[:, None], -1)), (TOKENS,), [8]),
    "cosine to prototypes": (
        dense(lambda m, x: F.cosine_similarity(x[:, None], m.p[None], dim=2), 5, p=parameter(5, 8)),
        (VECTOR,),
        [5, 8],
    ),
    "cosine along another dim": (
        both(lambda m, a, b: m.o(F.cosine_similarity(a, b, dim=1)), o=nn.Linear(8, 3)),
        (TOKENS,),
        [8],
    ),
    "cosine module": (both(lambda m, a, b: m.c(a, b), c=nn.CosineSimilarity(dim=-1)), (TOKENS,), [8]),
    "pairwise distance": (both(lambda m, a, b: F.pairwise_distance(a, b, keepdim=True)), (VECTOR,), [8]),
    "pairwise distance module": (both(lambda m, a, b: m.d(a, b), d=nn.PairwiseDistance(1)), (VECTOR,), [8]),
    "cdist": (both(lambda m, a, b: torch.cdist(a, b)), (TOKENS,), [8]),
    "cdist to prototypes": (dense(lambda m, x: torch.cdist(x, m.p), 5, p=parameter(5, 8)), (VECTOR,), [5, 8]),
    "vecdot": (both(lambda m, a, b: torch.linalg.vecdot(a, b)), (VECTOR,), [8]),
    "inner": (dense(lambda m, x: torch.inner(x, m.p), 5, p=parameter(5, 8)), (VECTOR,), [5, 8]),
    "outer": (
        both(lambda m, a, b: m.o(torch.outer(a[0], b[1]).tanh()).sum(0), 7, o=nn.Linear(7, 3)),
        (VECTOR,),
        [7, 8],
    ),
    "tensordot": (dense(lambda m, x: torch.tensordot(x, m.w, ([2], [1])), 5, w=parameter(5, 8)), (TOKENS,), [5, 8]),
    "tensordot by number": (dense(lambda m, x: torch.tensordot(x, m.w, 1), 5, w=parameter(8, 5)), (TOKENS,), [5, 8]),
    "multi_dot": (
        dense(lambda m, x: torch.linalg.multi_dot([x, m.p, m.q]), 6, p=parameter(8, 5), q=parameter(5, 6)),
        (VECTOR,),
        [5, 6, 8],
    ),
    "bilinear": (
        both(lambda m, a, b: m.o(m.c(a, b).relu()), 7, c=nn.Bilinear(8, 7, 6), o=nn.Linear(6, 3)),
        (VECTOR,),
        [6, 7, 8],
    ),
    "functional bilinear": (
        both(lambda m, a, b: m.o(F.bilinear(a, b, m.w)), 7, w=parameter(6, 8, 7), o=nn.Linear(6, 3)),
        (TOKENS,),
        [6, 7, 8],
    ),
    "diagonal": (
        both(lambda m, a, b: m.o(torch.diagonal(a[:, :, None] * b[:, None], dim1=1, dim2=2)), o=nn.Linear(8, 3)),
        (VECTOR,),
        [8],
    ),
    "diag_embed": (both(lambda m, a, b: m.o((torch.diag_embed(a) @ b[..., None])[..., 0]), o=nn.Linear(8, 3)),
                   (VECTOR,), [8]),
    "bag of embeddings": (Apply(lambda m, x: m.o(m.e(x)), e=bag("max"), o=nn.Linear(8, 3)), (NUMBERS,), [8]),
    "bag with offsets": (
        Apply(lambda m, x, at: m.o(m.e(x, at)), e=bag("mean"), o=nn.Linear(8, 3)),
        (NUMBERS[0], torch.tensor([0, 2])),
        [8],
    ),
    "weighted bag": (
        Apply(lambda m, x, w: m.o(m.e(x, per_sample_weights=w)), e=bag("sum"), o=nn.Linear(8, 3)),
        (NUMBERS, torch.rand(4, 5)),
        [8],
    ),
    "functional bag": (
        Apply(lambda m, x: m.o(F.embedding_bag(x, m.w)), w=parameter(10, 8), o=nn.Linear(8, 3)),
        (NUMBERS,),
        [8],
    ),
    "deformable": (deformable(1, 1), (MAP,), [6, 8]),
    "deformable, offsets for each part": (deformable(1, 4), (MAP,), [2, 2, 2, 2, 6]),
    "deformable, grouped": (deformable(2, 1), (MAP,), [2, 3, 4]),
    "deformable with a mask": (
        maps(
            deformable_with_mask,
            6,
            offset=nn.Conv2d(8, 18, 3, padding=1),
            mask=nn.Conv2d(8, 9, 1),
            w=parameter(6, 8, 3, 3),
            b=parameter(6),
        ),
        (MAP,),
        [6, 8],
    ),
    "spatial attention": (maps(spatial_attention, look=nn.Conv2d(2, 1, 3, padding=1)), (MAP,), [8]),
    "named values": (dense(lambda m, x: x - x.max(-1, keepdim=True).values), (VECTOR,), [8]),
    "median": (dense(lambda m, x: x - x.median(-1, keepdim=True)[0]), (VECTOR,), [8]),
    "kthvalue": (dense(lambda m, x: x - x.kthvalue(3, dim=-1, keepdim=True)[0]), (VECTOR,), [8]),
    "maximum of all": (dense(lambda m, x: x / x.max()), (VECTOR,), [8]),
    "places along another dim": (dense(lambda m, x: x.max(1)[0] * x.argmax(1)), (TOKENS,), [8]),
    "unpooling": (
        maps(lambda m, x: m.up(*m.down(x)), down=nn.MaxPool2d(2, return_indices=True), up=nn.MaxUnpool2d(2)),
        (MAP,),
        [8],
    ),
    "places of maxima as numbers": (
        maps(lambda m, x: torch.mul(*F.max_pool2d(x, 2, return_indices=True))),
        (MAP,),
        [8],
    ),
    "picked and compared": (dense(lambda m, x: x.select(1, 2) + x.diff(dim=1).sum(1)), (TOKENS,), [8]),
    "spectrum along tokens": (dense(lambda m, x: torch.fft.fft(x, dim=1).real), (TOKENS,), [8]),
    "triangle of tokens": (
        dense(lambda m, x: torch.tril(x @ x.transpose(1, 2)) @ x),
        (TOKENS,),
        [8],
    ),
    "element by element": (
        both(lambda m, a, b: m.o(torch.hypot(torch.logaddexp(a, b), torch.sinc(b))), o=nn.Linear(8, 3)),
        (VECTOR,),
        [8],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_groups_are_found_and_proven(name: str) -> None:
    model, x, expected = CASES[name]
    assert sizes(groups := proven(model, *x)) == expected, str(groups)


MUST_PIN: dict[str, tuple[nn.Module, Tensor, str]] = {
    "argmax": (dense(lambda m, x: x + x.argmax(-1, keepdim=True)), VECTOR, "argmax"),
    "the place of a maximum": (dense(lambda m, x: x + x.max(-1, keepdim=True)[1]), VECTOR, "max"),
    "the place of a maximum by name": (dense(lambda m, x: x + x.max(-1, keepdim=True).indices), VECTOR, "max"),
    "the place of a median": (dense(lambda m, x: x + x.median(-1, keepdim=True)[1]), VECTOR, "median"),
    "differences of units": (dense(lambda m, x: x.diff(), 7), VECTOR, "diff"),
    "units by number": (dense(lambda m, x: x.take_along_dim(x.argsort(-1), -1)), VECTOR, "argsort"),
    "a triangle of units": (dense(lambda m, x: torch.tril(x.transpose(1, 2) @ x)), TOKENS, "tril"),
    "both cut channels": (deformable(2, 2), MAP, "groups of channels with offsets of their own"),
}


@pytest.mark.parametrize("name", MUST_PIN)
def test_what_depends_on_the_order_is_pinned(name: str) -> None:
    model, x, reason = MUST_PIN[name]
    groups = proven(model, x)
    assert ("first.weight", 0) not in {(m.parameter, m.dim) for group in groups for m in group.members}
    pins = [pin.reason for pin in groups.pinned if (pin.parameter, pin.dim) == ("first.weight", 0)]
    assert any(reason in text for text in pins), str(groups)


def test_einsum_by_numbers_is_pinned_and_no_error() -> None:
    model = dense(lambda m, x: torch.einsum(x, [0, 1], m.w, [1, 2], [0, 2]), w=parameter(8, 8))
    groups = surgery.find_groups(model, VECTOR, strict=True)
    assert len(groups) == 0 and any("einsum" in pin.reason for pin in groups.pinned)


def test_smaller_tables_and_products_know_their_sizes() -> None:
    model = both(lambda m, a, b: m.o(m.c(a, b).relu()), 7, c=nn.Bilinear(8, 7, 6), o=nn.Linear(6, 3))
    smaller = surgery.prune_units(model, 0.5, example_inputs=VECTOR, renormalize=None, progress=False)
    assert str(smaller.c) == "Bilinear(in1_features=4, in2_features=3, out_features=3, bias=True)"
    model, x, _ = CASES["bag of embeddings"]
    smaller = surgery.prune_units(model, 0.5, example_inputs=x, renormalize=None, progress=False)
    assert str(smaller.e).startswith("EmbeddingBag(10, 4")
