"""One tiny model per family of ops: the groups that must be found, and a proof that permuting them changes nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from proofs import Apply, parameter
from torch import Tensor, nn

import vfsurgery as surgery
from vfsurgery.discovery.rules import registry
from vfsurgery.errors import OptionError, SurgeryError, UnknownOpError
from vfsurgery.groups.axes import Constraint, Fixed, Product, tie, tie_all
from vfsurgery.tracing.ops import Op, canonical_key
from vfsurgery.tracing.values import KEPT_WHOLE

MAP = (2, 3, 8, 8)
TOKENS = (2, 5, 4)
VECTOR = (2, 4)


@pytest.fixture(autouse=True)
def _one_thread(_repeatable: None) -> None:
    """Tensors of a few numbers: a second thread only waits."""
    torch.set_num_threads(1)


def then(function: Callable[[Tensor], Tensor]) -> Apply:
    return Apply(lambda _, x: function(x))


def head(channels: int) -> nn.Sequential:
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 3))


def conv(*between: nn.Module, out: int = 8, width: int | None = None) -> nn.Sequential:
    """A convolution of ``out`` channels, what is to be tested, and a convolution that reads ``width`` channels."""
    return nn.Sequential(nn.Conv2d(3, out, 3, padding=1), *between, nn.Conv2d(width or out, 6, 1), nn.ReLU(), head(6))


def dense(*between: nn.Module, out: int = 8, width: int | None = None) -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, out), *between, nn.Linear(width or out, 3))


def gate(channels: int) -> Apply:
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        return x * m.up(F.relu(m.down(x.mean((2, 3), keepdim=True)))).sigmoid()

    return Apply(forward, down=nn.Conv2d(channels, 5, 1), up=nn.Conv2d(5, channels, 1))


def twice(tied: bool) -> nn.Module:
    first, second = nn.Linear(8, 8), nn.Linear(8, 8)
    if tied:
        second.weight, second.bias = first.weight, first.bias
    else:
        second = first
    return dense(nn.ReLU(), first, nn.Tanh(), second)


def attention() -> nn.Module:
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        x = m.first(x)
        heads = x.view(x.shape[0], x.shape[1], 2, 3).permute(0, 2, 1, 3).softmax(-1)
        return m.last(heads.transpose(1, 2).flatten(2))

    return Apply(forward, first=nn.Linear(4, 6), last=nn.Linear(6, 3))


def shuffle(x: Tensor) -> Tensor:
    n, c, h, w = x.shape
    return x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)


def picked_heads() -> nn.Module:
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        qkv = m.first(x).reshape(x.shape[0], x.shape[1], 3, 2, 3).permute(2, 0, 3, 1, 4)
        q, k, v = qkv[0] * 3**-0.5, qkv[1], qkv[2]
        return m.last(((q @ k.transpose(-2, -1)).softmax(-1) @ v).transpose(1, 2).flatten(2))

    return Apply(forward, first=nn.Linear(4, 18), last=nn.Linear(6, 3))


def swap_halves(x: Tensor) -> Tensor:
    first, second = x.chunk(2, 1)
    return torch.cat([second, first.relu()], 1)


def swap_parts(x: Tensor) -> Tensor:
    first, second = x.split([3, 5], 1)
    return torch.cat((second.sigmoid(), first), dim=1)


def unbound(x: Tensor) -> Tensor:
    slow, fast = x.view(x.shape[0], 2, 4).unbind(1)
    return slow.sigmoid() * fast


def in_place(x: Tensor) -> Tensor:
    x = x.mul_(2)
    x += 1
    return F.relu(x, inplace=True)


def stacked() -> nn.Module:
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        return m.last(torch.stack([m.a(x), m.b(x)], 1).tanh().sum(1))

    return Apply(forward, a=nn.Linear(4, 8), b=nn.Linear(4, 8), last=nn.Linear(8, 3))


def branches() -> nn.Module:
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        return m.last(torch.cat([m.a(x), m.b(x), m.a(x).relu()], 1))

    last = nn.Sequential(nn.ReLU(), nn.Conv2d(14, 6, 1), head(6))
    return Apply(forward, a=nn.Conv2d(3, 4, 1), b=nn.Conv2d(3, 6, 1), last=last)


def residual() -> nn.Module:
    return Apply(lambda m, x: x + m.body(x), body=nn.Sequential(nn.Conv2d(8, 5, 1), nn.ReLU(), nn.Conv2d(5, 8, 1)))


def functional_convs() -> nn.Module:
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        x = F.batch_norm(F.conv2d(x, m.w1, m.b1, padding=1), m.running_mean, m.running_var, m.scale, m.shift)
        return m.last(F.conv_transpose2d(F.relu(x), m.w2, stride=2))

    return Apply(
        forward, w1=parameter(8, 3, 3, 3), b1=parameter(8), running_mean=torch.zeros(8),
        running_var=torch.ones(8),
        scale=parameter(8), shift=parameter(8), w2=parameter(8, 6, 2, 2), last=head(6),
    )  # fmt: skip


def functional_linears() -> nn.Module:
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        x = F.layer_norm(F.linear(x, m.w1, m.b1), (8,), m.scale, m.shift)
        return F.linear(F.gelu(x), weight=m.w2)

    return Apply(
        forward, w1=parameter(8, 4), b1=parameter(8), scale=parameter(8), shift=parameter(8), w2=parameter(3, 8)
    )


def flat(size: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.MaxPool2d(size), nn.Flatten(), nn.Linear(8 * (8 // size) ** 2, 3)
    )


def recurrent(layer: nn.Module, width: int, pick: Callable[[Tensor, Any], Tensor] = lambda y, state: y) -> nn.Module:
    """A layer that reads a sequence; ``pick`` chooses from its outputs and last states."""
    return Apply(
        lambda m, x: m.last(pick(*m.layer(m.first(x)))), first=nn.Linear(4, 6), layer=layer, last=nn.Linear(width, 3)
    )


def positions_by_grid(m: nn.Module, x: Tensor) -> Tensor:
    rows, columns = torch.meshgrid(torch.arange(x.shape[1]), torch.arange(2), indexing="ij")
    picked = F.one_hot(rows + columns, 8).to(x) @ m.table
    return x + picked.mean(1)


def spatial(*between: nn.Module) -> nn.Module:
    """Channels go last and come back."""
    return conv(then(lambda x: x.permute(0, 2, 3, 1)), *between, then(lambda x: x.permute(0, 3, 1, 2)))


def zero_part(x: Tensor) -> Tensor:
    x[:, 3:].zero_()
    return x.relu()


Case = tuple[Callable[[], nn.Module], tuple[int, ...], list[int]]

CASES: dict[str, Case] = {
    "conv": (lambda: conv(nn.ReLU()), MAP, [6, 8]),
    "conv without bias": (lambda: nn.Sequential(nn.Conv2d(3, 8, 1, bias=False), nn.ReLU(), head(8)), MAP, [8]),
    "conv circular padding": (
        lambda: conv(nn.Conv2d(8, 5, 3, padding=1, padding_mode="circular"), width=5),
        MAP,
        [5, 6, 8],
    ),
    "conv1d": (lambda: nn.Sequential(nn.Conv1d(5, 8, 1), nn.ReLU(), nn.Conv1d(8, 3, 3)), TOKENS, [8]),
    "conv3d": (lambda: nn.Sequential(nn.Conv3d(3, 8, 1), nn.ReLU(), nn.Conv3d(8, 3, 1)), (2, 3, 2, 4, 4), [8]),
    "conv grouped": (lambda: conv(nn.ReLU(), nn.Conv2d(8, 12, 3, groups=4), width=12), MAP, [2, 3, 4, 6]),
    "conv depthwise": (lambda: conv(nn.Conv2d(8, 8, 3, groups=8), nn.ReLU()), MAP, [6, 8]),
    "conv depthwise, two a channel": (lambda: conv(nn.Conv2d(8, 16, 3, groups=8), nn.ReLU(), width=16), MAP, [2, 6, 8]),
    "conv transposed": (lambda: conv(nn.ReLU(), nn.ConvTranspose2d(8, 5, 2, 2), nn.ReLU(), width=5), MAP, [5, 6, 8]),
    "conv transposed, grouped": (
        lambda: conv(nn.ReLU(), nn.ConvTranspose2d(8, 6, 2, 2, groups=2), width=6),
        MAP,
        [2, 3, 4, 6],
    ),
    "linear": (lambda: dense(nn.ReLU()), VECTOR, [8]),
    "linear on tokens": (lambda: dense(nn.ReLU()), TOKENS, [8]),
    "batch norm 1d": (lambda: dense(nn.BatchNorm1d(8), nn.ReLU()), VECTOR, [8]),
    "batch norm 2d": (lambda: conv(nn.BatchNorm2d(8), nn.ReLU()), MAP, [6, 8]),
    "instance norm": (lambda: conv(nn.InstanceNorm2d(8, affine=True, track_running_stats=True)), MAP, [6, 8]),
    "layer norm": (lambda: dense(nn.LayerNorm(8), nn.ReLU()), TOKENS, [8]),
    "layer norm on maps": (lambda: spatial(nn.LayerNorm(8)), MAP, [6, 8]),
    "layer norm over a map": (lambda: conv(nn.LayerNorm((8, 8, 8))), MAP, [6, 8]),
    "group norm": (lambda: conv(nn.GroupNorm(2, 8), nn.ReLU()), MAP, [2, 4, 6]),
    "group norm, one group": (lambda: conv(nn.GroupNorm(1, 8), nn.ReLU()), MAP, [6, 8]),
    "functional group norm": (
        lambda: conv(Apply(lambda m, x: F.group_norm(x, 2, m.w, m.b), w=parameter(8), b=parameter(8))),
        MAP,
        [2, 4, 6],
    ),
    "prelu": (lambda: conv(nn.PReLU(8)), MAP, [6, 8]),
    "prelu, one slope": (lambda: conv(nn.PReLU()), MAP, [6, 8]),
    "glu": (lambda: dense(nn.GLU(), out=16, width=8), VECTOR, [8]),
    "glu on channels": (lambda: conv(nn.GLU(1), out=16, width=8), MAP, [6, 8]),
    "cat": (branches, MAP, [4, 6, 6]),
    "chunk": (lambda: conv(then(swap_halves)), MAP, [4, 4, 6]),
    "chunk and gate": (lambda: conv(then(lambda x: torch.mul(*x.chunk(2, dim=1))), width=4), MAP, [4, 6]),
    "split": (lambda: conv(then(swap_parts)), MAP, [3, 5, 6]),
    "unbind": (lambda: dense(then(unbound), width=4), VECTOR, [4]),
    "stack": (stacked, VECTOR, [8]),
    "slices": (lambda: conv(then(lambda x: torch.cat([x[:, 3:].relu(), x[:, :3]], 1))), MAP, [3, 5, 6]),
    "strided slices": (lambda: conv(then(lambda x: torch.cat([x[:, ::2].relu(), x[:, 1::2]], 1))), MAP, [4, 4, 6]),
    "narrow": (
        lambda: conv(then(lambda x: torch.cat([x.narrow(1, 0, 3), x.narrow(1, 3, 5).relu()], 1))),
        MAP,
        [3, 5, 6],
    ),
    "ellipsis": (lambda: dense(then(lambda x: torch.cat([x[..., 3:].relu(), x[..., :3]], -1))), TOKENS, [3, 5]),
    "none": (lambda: dense(then(lambda x: x[:, None].relu()[..., None].sum((1, -1)))), VECTOR, [8]),
    "flatten": (lambda: flat(2), MAP, [8]),
    "flatten a single place": (lambda: flat(8), MAP, [8]),
    "flatten, then unflatten": (lambda: conv(nn.Flatten(), nn.Unflatten(1, (8, 8, 8))), MAP, [6, 8]),
    "permute chain": (lambda: spatial(nn.ReLU()), MAP, [6, 8]),
    "tokens of a map": (
        lambda: nn.Sequential(nn.Conv2d(3, 8, 4, 4), then(lambda x: x.flatten(2).transpose(1, 2)), nn.Linear(8, 3)),
        MAP,
        [8],
    ),
    "heads": (attention, TOKENS, [2, 3]),
    "positions cut into other grids": (
        lambda: conv(then(lambda x: x.view(*x.shape[:2], 2, 32).flatten(2).view(*x.shape[:2], 8, 8)), nn.ReLU()),
        MAP,
        [6, 8],
    ),
    "positions cut across": (
        lambda: conv(then(lambda x: x[..., :6].reshape(*x.shape[:2], 6, 8).permute(0, 1, 3, 2)), nn.ReLU()),
        MAP,
        [6, 8],
    ),
    "heads, picked one by one": (picked_heads, TOKENS, [2, 3, 3]),
    "channel shuffle": (lambda: conv(nn.ChannelShuffle(2), nn.ReLU()), MAP, [6, 8]),
    "channel shuffle by views": (lambda: conv(then(shuffle), nn.ReLU()), MAP, [6, 8]),
    "pixel shuffle": (lambda: conv(nn.PixelShuffle(2), out=16, width=4), MAP, [4, 6]),
    "pixel unshuffle": (lambda: conv(nn.PixelUnshuffle(2), out=4, width=16), MAP, [4, 6]),
    "pad channels": (lambda: conv(then(lambda x: F.pad(x, (1, 1, 0, 0, 1, 2), value=0.5)), width=11), MAP, [6, 8]),
    "pool and resize": (lambda: conv(nn.MaxPool2d(2), nn.Upsample(scale_factor=2), nn.ZeroPad2d(1)), MAP, [6, 8]),
    "mean over channels": (lambda: conv(then(lambda x: x * x.mean(1, keepdim=True))), MAP, [6, 8]),
    "mean over all": (lambda: conv(then(lambda x: x * x.mean())), MAP, [6, 8]),
    "norm of channels": (lambda: conv(then(lambda x: F.normalize(x, dim=1) + x.norm(2, 1, keepdim=True))), MAP, [6, 8]),
    "softmax over channels": (lambda: conv(then(lambda x: x.softmax(1))), MAP, [6, 8]),
    "expand": (lambda: conv(then(lambda x: x.relu() + x.mean((2, 3), keepdim=True).expand_as(x))), MAP, [6, 8]),
    "repeat": (lambda: conv(then(lambda x: x.repeat(1, 2, 1, 1)), width=16), MAP, [2, 6, 8]),
    "zeros written": (lambda: dense(then(lambda x: zero_part(x.clone())), out=8), VECTOR, [3, 5]),
    "gate": (lambda: conv(gate(8)), MAP, [5, 6, 8]),
    "residual": (lambda: conv(residual()), MAP, [5, 6, 8]),
    "scale per channel": (lambda: conv(Apply(lambda m, x: x * m.gamma, gamma=parameter(8, 1, 1))), MAP, [6, 8]),
    "in place": (lambda: conv(then(in_place)), MAP, [6, 8]),
    "shared module": (lambda: twice(tied=False), VECTOR, [8]),
    "tied parameters": (lambda: twice(tied=True), VECTOR, [8]),
    "functional convs": (functional_convs, MAP, [6, 8]),
    "functional linears": (functional_linears, VECTOR, [8]),
    "lstm": (lambda: recurrent(nn.LSTM(6, 8, 2, batch_first=True, bidirectional=True), 16), TOKENS, [6, 8, 8, 8, 8]),
    "lstm, projected": (lambda: recurrent(nn.LSTM(6, 8, batch_first=True, proj_size=5), 5), TOKENS, [5, 6, 8]),
    "gru": (lambda: recurrent(nn.GRU(6, 8, batch_first=True), 8), TOKENS, [6, 8]),
    "rnn": (lambda: recurrent(nn.RNN(6, 8, 2, bias=False), 8), TOKENS, [6, 8, 8]),
    "last state": (lambda: recurrent(nn.GRU(6, 8, 2, batch_first=True), 8, lambda y, state: state[-1]), TOKENS, [6, 8]),
    "last state and cell": (
        lambda: recurrent(nn.LSTM(6, 8, bidirectional=True), 8, lambda y, state: state[0][1] * state[1][0]),
        TOKENS,
        [6, 8],
    ),
    "positions by number": (lambda: dense(Apply(positions_by_grid, table=parameter(8, 8))), TOKENS, [8]),
    "conv along another dim": (
        lambda: dense(Apply(lambda m, x: m.mix(x), mix=nn.Conv1d(5, 5, 1)), nn.ReLU()),
        TOKENS,
        [8],
    ),
    "casts": (lambda: dense(then(lambda x: x * (x > 0).long() + (x.int() * 2).float())), VECTOR, [8]),
}


@pytest.fixture
def rules() -> Iterator[None]:
    """Give the rules back as they were."""
    before, whole = dict(registry._RULES), set(KEPT_WHOLE)
    yield
    registry._RULES.clear()
    registry._RULES.update(before)
    KEPT_WHOLE.clear()
    KEPT_WHOLE.update(whole)


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
@pytest.mark.parametrize("name", CASES)
def test_groups_are_found_and_proven(name: str) -> None:
    build, shape, expected = CASES[name]
    model, x = build(), torch.randn(shape)
    groups = surgery.find_groups(model, x, strict=True)
    assert sorted(group.size for group in groups) == expected, str(groups)
    verification = surgery.verify(model, groups, x)
    assert verification, str(verification)


class RunningMax(nn.Module):
    """Calls an op that has no coupling rule."""

    def forward(self, x: Tensor) -> Tensor:
        return x.cummax(1)[0]


Pinning = tuple[Callable[[], nn.Module], tuple[int, ...], str, bool]

MUST_PIN: dict[str, Pinning] = {
    "a constant per channel": (
        lambda: conv(then(lambda x: x * torch.linspace(0, 1, x.shape[1]).view(1, -1, 1, 1) * CONSTANT)),
        MAP,
        "constant tensor",
        False,
    ),
    "an unknown op": (lambda: conv(RunningMax()), MAP, "no coupling rule for cummax", True),
    "an unknown function": (
        lambda: dense(then(lambda x: torch.logcumsumexp(x, 1))),
        VECTOR,
        "no coupling rule for logcumsumexp",
        True,
    ),
    "roll": (lambda: conv(then(lambda x: x.roll(1, 1))), MAP, "positions differ in roll", False),
    "cumsum": (lambda: dense(then(lambda x: x.cumsum(1))), VECTOR, "positions differ in cumsum", False),
    "sort": (lambda: dense(then(lambda x: x.sort(-1)[0])), VECTOR, "positions differ in sort", False),
    "item assignment": (lambda: conv(then(lambda x: zero_first(x))), MAP, "positions differ in setitem", False),
    "residual around a shuffle": (
        lambda: conv(then(lambda x: x + shuffle(x))),
        MAP,
        "tied to a reordering of itself",
        False,
    ),
    "one channel": (
        lambda: conv(then(lambda x: x * x[:, 0:1] + x[:, 2].unsqueeze(1))),
        MAP,
        "positions differ in getitem",
        False,
    ),
    "chosen channels": (
        lambda: conv(then(lambda x: x[:, [0, 2, 1]]), width=3),
        MAP,
        "positions differ in getitem",
        False,
    ),
    "reflected channels": (
        lambda: dense(then(lambda x: F.pad(x[:, None], (1, 1), mode="reflect")[:, 0]), width=10),
        VECTOR,
        "positions differ in pad",
        False,
    ),
    "a convolution over units": (
        lambda: dense(Apply(lambda m, x: m.mix(x), mix=nn.Conv1d(5, 5, 3, padding=1))),
        TOKENS,
        "positions differ in torch.nn.modules.conv.Conv1d",
        False,
    ),
    "a strided convolution over units": (
        lambda: dense(Apply(lambda m, x: m.mix(x), mix=nn.Conv1d(5, 5, 1, stride=2)), width=4),
        TOKENS,
        "positions differ in torch.nn.modules.conv.Conv1d",
        False,
    ),
    "numbers as units": (
        lambda: dense(then(lambda x: F.one_hot(x.argmax(-1), 8).to(x))),
        VECTOR,
        "positions differ in argmax",
        False,
    ),
    "reshape across units": (
        lambda: dense(then(lambda x: x.view(-1, 4, 6).mean(1)), out=8, width=6),
        (3, 4),
        "cuts across units",
        False,
    ),
}


CONSTANT = torch.linspace(1, 2, 8).view(1, 8, 1, 1)


def zero_first(x: Tensor) -> Tensor:
    x = x.clone()
    x[:, :1] = 0
    return x


@pytest.mark.parametrize("name", MUST_PIN)
def test_what_may_not_move_is_pinned_with_its_reason(name: str) -> None:
    build, shape, reason, unknown = MUST_PIN[name]
    model, x = build(), torch.randn(shape)
    groups = surgery.find_groups(model, x)
    moved = {(member.parameter, member.dim) for group in groups for member in group.members}
    assert ("0.weight", 0) not in moved
    found = [pin.reason for pin in groups.pinned if (pin.parameter, pin.dim) == ("0.weight", 0)]
    assert any(reason in text for text in found), str(groups)
    assert bool(groups.unknown_ops) == unknown
    if unknown:
        op = reason.rpartition(" ")[2]
        assert any(op in entry and "node" in entry and str(shape[0]) in entry for entry in groups.unknown_ops)
        assert op in str(groups)
    assert surgery.verify(model, groups, x)


@pytest.mark.parametrize("name", [name for name, entry in MUST_PIN.items() if entry[-1]])
def test_strict_names_op_node_and_remedy(name: str) -> None:
    build, shape, reason, _ = MUST_PIN[name]
    op = reason.rpartition(" ")[2]
    where = rf"no coupling rule for {op}\n.*node +{op}\S* in .*inputs +\(2,"
    message = rf"(?s)^{where}.*remedy.*@surgery\.rule\(torch\.{op}\).*leaf=.*pins='1'"
    with pytest.raises(UnknownOpError, match=message):
        surgery.find_groups(build(), torch.randn(shape), strict=True)


def test_a_wrong_rule_is_caught_by_verify(rules: None) -> None:
    @surgery.rule("cummax")
    def wrong(op: Op) -> Iterator[Constraint]:
        yield from tie_all(op.input, op.output)

    model, x = conv(RunningMax()), torch.randn(MAP)
    groups = surgery.find_groups(model, x, strict=True)
    verification = surgery.verify(model, groups, x)
    assert not verification and verification.error > 1e-3
    assert "NOT proven" in str(verification)


def test_a_buffer_that_is_saved_moves_along_and_one_that_is_not_pins() -> None:
    def model(persistent: bool) -> nn.Module:
        scale = Apply(lambda m, x: x * m.scale)
        scale.register_buffer("scale", torch.rand(8, 1, 1), persistent=persistent)
        return conv(scale)

    x = torch.randn(MAP)
    saved, unsaved = (surgery.find_groups(model(persistent), x) for persistent in (True, False))
    assert [group.size for group in saved] == [8, 6] and "1.scale" in saved.by_parameter
    assert [group.size for group in unsaved] == [6]
    assert any(pin.reason == "constant tensor" for pin in unsaved.pinned)
    assert surgery.verify(model(True), saved, x)


class Twice(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return twice_of(x)


def twice_of(x: Tensor) -> Tensor:
    return torch.cat([x, x], 1).roll(1, 0)


torch.fx.wrap("twice_of")


def test_a_rule_of_ones_own(rules: None) -> None:
    model, x = conv(Twice(), width=16), torch.randn(MAP)
    assert "cat" in {node.target.__name__ for node in surgery.trace(model, x).graph.nodes if callable(node.target)}

    @surgery.rule(twice_of)
    def copies(op: Op) -> Iterator[Constraint]:
        yield tie(op.output.axis(1), Product((Fixed(2, "copies"), op.input.axis(1))))

    groups = surgery.find_groups(model, x, strict=True)
    assert twice_of in {node.target for node in surgery.trace(model, x).graph.nodes}
    assert [group.size for group in groups] == [8, 6]
    assert surgery.verify(model, groups, x)


class Named(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return named(x)["rest"][0]


def named(x: Tensor) -> dict[str, Any]:
    return {"first": x[:, 0], "rest": [torch.cat([x, x], 1).roll(1, 0)]}


torch.fx.wrap("named")


def test_a_rule_for_an_op_that_returns_tensors_by_name(rules: None) -> None:
    @surgery.rule(named)
    def copies(op: Op) -> Iterator[Constraint]:
        yield tie(op.outputs[1].axis(1), Product((Fixed(2, "copies"), op.input.axis(1))))

    model, x = conv(Named(), width=16), torch.randn(MAP)
    groups = surgery.find_groups(model, x)
    assert [group.size for group in groups] == [8, 6]
    assert surgery.verify(model, groups, x)


def test_a_second_rule_for_an_op_is_refused(rules: None) -> None:
    with pytest.raises(
        OptionError, match=r"(?s)has a coupling rule already\n.*first +\S+pointwise\.pointwise\n.*second.*mine"
    ):

        @surgery.rule(torch.relu)
        def mine(op: Op) -> Iterator[Constraint]:
            yield from tie_all(op.input, op.output)


def test_a_rule_that_fails_is_named(rules: None) -> None:
    @surgery.rule("cummax")
    def broken(op: Op) -> Iterator[Constraint]:
        yield tie(op.input.axis(1), op.output.axis(2))

    with pytest.raises(
        SurgeryError, match=r"(?s)coupling rule of cummax failed: cannot tie axes of 7 and 8.*\n +op +cummax at node"
    ):
        surgery.find_groups(conv(RunningMax(), out=7), torch.randn(MAP))


def test_subclasses_do_not_inherit_rules_but_batch_norms_do() -> None:
    class Louder(nn.ReLU):
        pass

    class Norm(nn.BatchNorm2d):
        pass

    x = torch.randn(MAP)
    assert surgery.find_groups(conv(Norm(8)), x).unknown_ops == ()
    assert surgery.find_groups(conv(nn.ReLU()), x).unknown_ops == ()
    found = surgery.find_groups(conv(Louder()), x)
    assert [group.size for group in found] == [8, 6], "a user's own class is traced through"


@pytest.mark.parametrize(
    ("spellings", "key"),
    [
        ((torch.relu, torch.relu_, F.relu, "relu", "relu_", torch.ops.aten.relu.default), "relu"),
        ((torch.add, "add_", torch.ops.aten.add.Tensor), "add"),
        ((torch.cat, torch.concat), None),
    ],
)
def test_all_spellings_of_an_op_share_one_rule(spellings: tuple[object, ...], key: str | None) -> None:
    found = [canonical_key(spelling) for spelling in spellings]
    if key is not None:
        assert set(found) == {key}
    assert len({registry._RULES[entry] for entry in found}) == 1


def test_an_op_without_a_rule_elsewhere_leaves_other_groups() -> None:
    model, x = conv(RunningMax()), torch.randn(MAP)
    groups = surgery.find_groups(model, x)
    assert [group.size for group in groups] == [6]
    assert surgery.verify(model, groups, x)


class Scaled(nn.Module):
    """A scale per unit, which the convolution holds that makes them, or the network itself."""

    def __init__(self, inside: bool) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8, 4)
        holder = self.conv if inside else self
        holder.scale = nn.Parameter(torch.randn(8))

    def forward(self, x: Tensor) -> Tensor:
        scale = self.scale if hasattr(self, "scale") else self.conv.scale
        return self.head((self.conv(x) * scale.view(1, -1, 1, 1)).relu().mean((2, 3)))


def test_a_parameter_that_a_layer_holds_for_others_shows_its_pin() -> None:
    x = torch.randn(2, 3, 8, 8)
    own, held = (surgery.find_groups(Scaled(inside), x) for inside in (False, True))
    assert [group.size for group in own] == [8] and not len(held)
    said = "held by a module, and not spoken of by the rule for Conv2d (conv)"
    assert {f"{pin.parameter}[{pin.dim}]" for pin in held.pinned if pin.reason == said} == {
        *("conv.scale[0]", "conv.weight[0]", "conv.bias[0]", "head.weight[1]")
    }
    assert not any(pin.reason == said for pin in own.pinned)
    assert f"conv.scale[0] x8: {said}" in str(held)
