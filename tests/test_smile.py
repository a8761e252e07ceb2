"""SMILE: certificates, routers, every way in which a network may use a weight, and what runs elsewhere."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import pytest
import torch
from test_adamerging import family
from torch import Tensor, nn
from torch.nn import functional

import vfsurgery as surgery
from vfsurgery.errors import CertificateError, IncompatibleModelsError, OptionError
from vfsurgery.merging.multitask import smile as module
from vfsurgery.merging.multitask.attention import take_apart
from vfsurgery.merging.multitask.routed import Factors
from vfsurgery.merging.multitask.smile import Smile, certify, smile

EXACT = 1e-10


class Windowed(nn.Module):
    """Windows of tokens that are attended to by functional, packed projections with a bias put together, as Swin's."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 2, 2)
        self.qkv = nn.Linear(8, 24, bias=False)
        self.q_bias, self.v_bias = nn.Parameter(torch.zeros(8)), nn.Parameter(torch.zeros(8))
        self.proj = nn.Parameter(torch.empty(8, 8))
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).permute(0, 2, 3, 1)
        b, h, w, c = x.shape
        x = x.reshape(b, h // 2, 2, w // 2, 2, c).permute(0, 1, 3, 2, 4, 5).reshape(-1, 4, c)
        bias = torch.cat((self.q_bias, torch.zeros_like(self.v_bias), self.v_bias))
        q, k, v = functional.linear(x, self.qkv.weight, bias).chunk(3, -1)
        x = (q @ k.transpose(-2, -1)).softmax(-1) @ v
        x = x @ self.proj
        return self.head(x.reshape(b, -1, c).mean(1))


class Kernels(nn.Module):
    """Convolutions in groups, depthwise, strided, dilated, with reflected padding; one called on a computed kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, 2, 1, padding_mode="reflect")
        self.grouped = nn.Conv2d(8, 12, 3, padding="same", groups=2)
        self.depthwise = nn.Conv2d(12, 12, 3, padding=2, dilation=2, groups=12, bias=False)
        self.called = nn.Parameter(torch.empty(8, 12, 1, 1))
        self.line = nn.Conv1d(8, 8, 3, 2)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.depthwise(torch.relu(self.grouped(torch.relu(self.first(x))))))
        kernel = self.called - self.called.mean((1, 2, 3), keepdim=True)
        x = torch.relu(functional.conv2d(x, kernel)).flatten(2)
        return self.head(self.line(x).mean(2))


class Crossed(nn.Module):
    """Attention of other tokens, with the tokens first, and with keys and values of other widths."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(6, 8)
        self.across = nn.MultiheadAttention(8, 2)
        self.wide = nn.MultiheadAttention(8, 2, kdim=6, vdim=6, bias=False)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.permute(2, 0, 1)  # (tokens, batch, units)
        y = self.stem(tokens)
        y = y + self.across(y[:4], y, y, need_weights=False)[0].mean(0)
        y = y + self.wide(y, tokens, tokens)[0]
        return self.head(y.mean(0))


NETS: Mapping[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "windowed": (Windowed, (3, 8, 8)),
    "kernels": (Kernels, (3, 9, 9)),
    "crossed": (Crossed, (6, 5)),
}


@cache
def planted(name: str, count: int = 2) -> tuple[Mapping[str, Tensor], Mapping[str, nn.Module], tuple[str, ...], Tensor]:
    """A base, experts that differ from it in everything but the head's names, the trunk, and images; float64."""
    if name not in NETS:
        own = family(name)
        return own.base, own.experts, own.trunk, own.data["a"][:4]
    make, shape = NETS[name]
    generator = torch.Generator().manual_seed(3)

    def draw(net: nn.Module, size: float) -> nn.Module:
        with torch.no_grad():
            for parameter in net.parameters():
                drawn = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.copy_(parameter * (size != 1) + size * drawn / max(parameter[0].numel(), 1) ** 0.5)
        return net

    first = draw(make().double(), 1)
    experts = {f"task{number}": draw(copy.deepcopy(first), 0.3) for number in range(count)}
    trunk = tuple(name for name in first.state_dict() if not name.startswith("head."))
    images = torch.randn(4, *shape, generator=generator, dtype=torch.float64)
    return first.state_dict(), experts, trunk, images


def made(name: str, count: int = 2, **options: Any) -> Smile:
    base, experts, trunk, images = planted(name, count)
    return smile(base, experts, trunk, images, **options)


def logits(found: Smile, images: Tensor, task: int = -1) -> Tensor:
    with torch.no_grad():
        return found.network.eval()(images, task)


ALL = ("vit", "encoder", "resnet", *NETS)


@pytest.mark.parametrize("name", ALL)
def test_each_expert_comes_back_at_full_rank(name):
    base, experts, trunk, images = planted(name)
    errors = certify(base, experts, trunk, images, tolerance=EXACT)
    assert set(errors) == set(experts) and max(errors.values()) < EXACT


def test_a_direction_too_few_breaks_the_certificate(monkeypatch):
    base, experts, trunk, images = planted("crossed")
    other = {**base, "stem.weight": base["stem.weight"] + 1}  # differences from another base come out alike
    assert max(certify(other, experts, trunk, images).values()) < EXACT
    monkeypatch.setattr(module, "take_apart", lambda graph_module: {})
    assert max(certify(base, experts, trunk, images).values()) < EXACT  # whole attention is the rest: the expert's own
    whole = Factors.of

    def short(differences: Tensor, most: int | None = None) -> Factors:
        found = whole(differences, most)
        return Factors(found.left[..., :-1], found.right[..., :-1, :])

    monkeypatch.setattr(Factors, "of", staticmethod(short))  # of one direction
    with pytest.raises(CertificateError, match="task0"):
        certify(base, experts, trunk, images)


@pytest.mark.parametrize("name", ALL)
def test_every_tensor_that_differs_has_experts_or_is_named(name):
    base, experts, trunk, _ = planted(name)
    found = made(name)
    inside = {tensor for layer in found.layers for tensor in layer.tensors}
    floating = [n for n in trunk if base[n].is_floating_point()]
    differing = {n for n in floating if any(not torch.equal(e.state_dict()[n], base[n]) for e in experts.values())}
    assert differing == {n for n in inside | set(found.skipped) if n in differing}
    assert all(why for why in found.skipped.values())
    if name in NETS:
        assert not found.skipped and inside == set(trunk)


@pytest.mark.parametrize("name", ["vit", "windowed", "kernels", "crossed"])
def test_every_replaced_layer_changes_the_output(name):
    images = planted(name)[3]
    found = made(name)
    before = logits(found, images)
    ups = [n for n, _ in found.network.named_parameters() if n.startswith("experts_") and n.endswith(".up")]
    assert len(ups) == sum(layer.k > 0 for layer in found.layers)
    for up in ups:
        parameter = found.network.get_parameter(up)
        kept = parameter.detach().clone()
        with torch.no_grad():
            parameter.add_(torch.randn_like(parameter))  # no constant, which a norm may take out
            assert not torch.allclose(logits(found, images), before, rtol=1e-6), up
            parameter.copy_(kept)
    assert torch.equal(logits(found, images), before)


def test_one_expert_is_itself():
    base, experts, trunk, images = planted("windowed")
    alone = {"task0": experts["task0"]}
    found = smile(base, alone, trunk, images, k="full")
    torch.testing.assert_close(logits(found, images), experts["task0"](images), rtol=EXACT, atol=EXACT)
    less = smile(base, alone, trunk, images, k=1)
    assert not torch.allclose(logits(less, images), experts["task0"](images), rtol=1e-3)


@pytest.mark.parametrize("top_k", [1, 2, 3])
@pytest.mark.parametrize("gate", ["image", "token"])
def test_equal_experts_are_one_whatever_routers_say(gate, top_k):
    base, experts, trunk, images = planted("windowed")
    same = {f"copy{number}": experts["task1"] for number in range(3)}
    found = smile(base, same, trunk, images, k="full", gate=gate, top_k=top_k)
    torch.testing.assert_close(logits(found, images), experts["task1"](images), rtol=EXACT, atol=EXACT)


def test_each_token_gets_one_expert():
    """Of a single layer at full rank and top 1, each output is that of one expert: the one of most energy."""
    torch.manual_seed(0)
    base = nn.Linear(8, 5).double()
    experts = {str(number): copy.deepcopy(base) for number in range(3)}
    with torch.no_grad():
        for expert in experts.values():
            expert.weight += torch.randn(5, 8) / 3
            expert.bias += torch.randn(5)
    x = torch.randn(16, 7, 8).double()
    found = smile(base.state_dict(), experts, ["weight", "bias"], x, k="full", k_gate=2, gate="token")
    y = logits(found, x)
    each = torch.stack([expert(x) for expert in experts.values()], -2)
    right = [torch.linalg.svd((expert.weight - base.weight).detach())[2][:2] for expert in experts.values()]
    chosen = torch.stack([(x @ v.T).norm(dim=-1) for v in right], -1).argmax(-1)
    assert len(chosen.unique()) == 3
    expected = each.gather(-2, chosen[..., None, None].expand(*chosen.shape, 1, 5)).squeeze(-2)
    torch.testing.assert_close(y, expected, rtol=EXACT, atol=EXACT)
    by_image = logits(smile(base.state_dict(), experts, ["weight", "bias"], x, k="full", k_gate=2), x)
    most = torch.stack([(x @ v.T).norm(dim=-1).mean(1) for v in right], -1).argmax(-1)
    torch.testing.assert_close(by_image, each[torch.arange(16), :, most], rtol=EXACT, atol=EXACT)
    assert not torch.allclose(y, by_image)


@pytest.mark.parametrize("name", ALL)
def test_an_image_is_routed_by_itself(name):
    """Whatever lies beside it: windows of one image, tokens before the batch."""
    _, _, _, images = planted(name)
    found = made(name, rest="base")
    assert not found.notes
    together = logits(found, images)
    for number in range(len(images)):
        alone = logits(found, images[number : number + 1])
        torch.testing.assert_close(alone[0], together[number], rtol=1e-9, atol=1e-9)


def test_biases_alone_are_tuned():
    """The mean where routers choose, since there is nothing to look at; the task's own where that is known."""
    base = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Conv1d(1, 3, 2), nn.Flatten()).double()

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = copy.deepcopy(base)

        def forward(self, x: Tensor) -> Tensor:
            return self.body[3](self.body[2](self.body[1](self.body[0](x)).unsqueeze(1)))

    first = Net()
    experts = {"a": copy.deepcopy(first), "b": copy.deepcopy(first)}
    with torch.no_grad():
        for number, expert in enumerate(experts.values()):
            expert.body[0].bias += number + 1
            expert.body[2].bias += 2 * number - 3
    x = torch.randn(5, 6).double()
    trunk = tuple(first.state_dict())
    found = smile(first.state_dict(), experts, trunk, x)
    assert [(layer.k, layer.gate) for layer in found.layers] == [(0, "mean"), (0, "mean")]
    mean = copy.deepcopy(first)
    mean.load_state_dict({n: (experts["a"].state_dict()[n] + experts["b"].state_dict()[n]) / 2 for n in trunk})
    torch.testing.assert_close(logits(found, x), mean(x), rtol=EXACT, atol=EXACT)
    for number, expert in enumerate(experts.values()):
        torch.testing.assert_close(logits(found, x, number), expert(x), rtol=EXACT, atol=EXACT)


def test_the_rest_is_what_was_asked_for():
    base, experts, _, _ = planted("vit")
    name = "blocks.0.norm1.weight"
    own = [expert.state_dict()[name] for expert in experts.values()]
    expected = {"mean": (own[0] + own[1]) / 2, "base": base[name], "a": own[0]}
    for rest, tensor in expected.items():
        found = made("vit", rest=rest)
        assert torch.allclose(found.network.state_dict()[name], tensor), rest
        assert torch.equal(found.network.state_dict()["blocks.0.mlp.fc1.weight"], base["blocks.0.mlp.fc1.weight"])


def test_what_reads_the_same_of_all_images_is_the_mean():
    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("places", torch.randn(5, 6))
            self.tokens, self.table = nn.Linear(6, 4), nn.Linear(6, 4)

        def forward(self, x: Tensor) -> Tensor:
            return (self.tokens(x) + self.table(self.places)).mean(1)

    first = Table()
    experts = {"a": copy.deepcopy(first), "b": copy.deepcopy(first)}
    with torch.no_grad():
        for expert in experts.values():
            expert.table.weight.add_(torch.randn(4, 6))
            expert.tokens.weight.add_(torch.randn(4, 6))
    found = smile(first.state_dict(), experts, tuple(first.state_dict()), torch.randn(2, 5, 6))
    assert {layer.op: layer.gate for layer in found.layers} == {"tokens": "image", "table": "mean"}
    assert not found.notes


def test_nothing_given_changes():
    base, experts, trunk, images = planted("resnet")
    before = copy.deepcopy((base, {task: expert.state_dict() for task, expert in experts.items()}))
    modes = {task: [part.training for part in expert.modules()] for task, expert in experts.items()}
    smile(base, experts, trunk, images)
    assert all(torch.equal(base[n], before[0][n]) for n in base)
    for task, expert in experts.items():
        assert all(torch.equal(tensor, before[1][task][n]) for n, tensor in expert.state_dict().items())
        assert [part.training for part in expert.modules()] == modes[task]


@pytest.mark.parametrize("name", ["vit", "windowed", "kernels", "crossed"])
def test_it_exports_for_any_number_of_images(name):
    found, (_, _, _, images) = made(name), planted(name)
    network = found.network.eval()
    batch = torch.export.Dim("images", min=2, max=64)
    (argument,) = (node.target for node in network.graph.nodes if node.op == "placeholder" and node.target != "task")
    exported = torch.export.export(network, (images,), dynamic_shapes={argument: {0: batch}})
    other = torch.cat([images, images.flip(0)])[:7]
    with torch.no_grad():
        torch.testing.assert_close(exported.module()(other), network(other), rtol=EXACT, atol=EXACT)


def test_it_runs_in_onnxruntime(tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    for name in ("vit", "kernels"):
        found, images = made(name), planted(name)[3].float()
        network = found.network.float().eval()
        path = tmp_path / f"{name}.onnx"
        torch.onnx.export(network, (images,), str(path), dynamo=True, verbose=False)
        session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        (given,) = session.get_inputs()
        (result,) = session.run(None, {given.name: images.numpy()})
        torch.testing.assert_close(torch.from_numpy(result), logits(found, images), rtol=1e-4, atol=1e-4)


def test_it_is_saved_without_the_library():
    found, images = made("windowed"), planted("windowed")[3]
    file = io.BytesIO()
    torch.save(found.network, file)
    assert b"vfsurgery" not in file.getvalue()
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert torch.equal(loaded.eval()(images, 1), logits(found, images, 1))


def test_a_budget_chooses_ranks_that_fit():
    small, large = made("vit", budget=1.6), made("vit", budget=3.0)
    assert (small.after / small.before).parameters <= 1.6 < (large.after / large.before).parameters <= 3.0
    assert max(layer.k for layer in small.layers) < max(layer.k for layer in large.layers)
    with pytest.raises(OptionError, match="no rank fits"):
        made("vit", budget=1.01)


def test_costs_are_those_of_the_formula():
    found = made("vit", k=4, k_gate=3)
    added = sum(
        2 * (each.k * (each.units + each.inputs) + each.k_gate * each.inputs + each.units) for each in found.layers
    )
    assert found.after.parameters - found.before.parameters == added
    assert found.after.flops > found.before.flops
    assert str(found).startswith("SMILE of 2 tasks: experts beside 9 ops, flops x")


BAD = {
    "dead gate": ({"k_gate": 16}, "no less than the 16 inputs"),
    "k": ({"k": 0}, "1 or more"),
    "word": ({"k": "half"}, "full"),
    "both": ({"k": 2, "budget": 2.0}, "one of both"),
    "top_k": ({"top_k": 3}, "of 2 experts"),
    "gate": ({"gate": "pixel"}, "unknown gate"),
    "rest": ({"rest": "c"}, "unknown rest"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_options_are_refused(case):
    options, text = BAD[case]
    with pytest.raises(OptionError, match=text):
        made("vit", **options)


def test_a_trunk_that_differs_is_refused():
    base, experts, trunk, images = planted("vit")
    with pytest.raises(IncompatibleModelsError, match="not the same everywhere"):
        smile(base, experts, (*trunk, "head.weight"), images)


def test_experts_of_low_rank_have_no_more_directions():
    """Whose routers look at as many as there are, however many were asked for."""
    torch.manual_seed(0)
    base = nn.Linear(24, 20).double()
    experts = {"a": copy.deepcopy(base), "b": copy.deepcopy(base)}
    with torch.no_grad():
        for rank, expert in enumerate(experts.values(), start=2):
            expert.weight.add_((torch.randn(20, rank).double() @ torch.randn(rank, 24).double()) / 10)
    x = torch.randn(6, 24).double()
    found = smile(base.state_dict(), experts, ["weight", "bias"], x, k=16, k_gate=16)
    assert [(layer.k, layer.k_gate) for layer in found.layers] == [(3, 3)]
    for number, expert in enumerate(experts.values()):
        torch.testing.assert_close(logits(found, x, number), expert(x), rtol=EXACT, atol=EXACT)


def test_the_router_is_dead_where_it_sees_all_inputs():
    """Why ``k_gate`` at the layer's inputs is refused: energies are those of the input itself."""
    x, v = torch.randn(5, 6).double(), torch.linalg.qr(torch.randn(6, 6).double())[0]
    torch.testing.assert_close((x @ v).norm(dim=1), x.norm(dim=1))
    assert not torch.allclose((x @ v[:, :5]).norm(dim=1), x.norm(dim=1), rtol=1e-3)


def test_attention_that_cannot_be_taken_apart_is_named():
    class Read(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            values, weights = self.attention(x, x, x)
            return values.mean(1) + weights.mean((1, 2))[:, None]

    first = Read()
    experts = {"a": copy.deepcopy(first), "b": copy.deepcopy(first)}
    with torch.no_grad():
        experts["a"].attention.out_proj.weight.add_(1)
    x = torch.randn(2, 5, 8)
    found = smile(first.state_dict(), experts, tuple(first.state_dict()), x)
    assert list(found.skipped) == ["attention.out_proj.weight"]
    assert "attention whose weights are read" in found.skipped["attention.out_proj.weight"]


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_taken_apart_attention_computes_the_same(batch_first, bias):
    torch.manual_seed(0)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, bias=bias, batch_first=batch_first)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.attention(x, y, y, need_weights=False)[0] + self.attention(x, x, x)[0]

    net = Net().double().eval()
    if bias:
        nn.init.normal_(net.attention.in_proj_bias)
    x, y = torch.randn(3, 5, 8).double(), torch.randn(3, 7 if batch_first else 5, 8).double()
    graph_module = surgery.trace(net, (x, y))
    assert take_apart(graph_module) == {}
    graph_module.recompile()
    assert not any(node.op == "call_module" for node in graph_module.graph.nodes)
    torch.testing.assert_close(graph_module(x, y), net(x, y), rtol=EXACT, atol=EXACT)
    with torch.no_grad():
        net.attention.out_proj.weight.mul_(2)
    assert torch.allclose(graph_module(x, y), net(x, y))  # over the same parameters
