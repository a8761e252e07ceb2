"""AdaMerging: its gradient, its identities, what it leaves alone, and what it refuses to take."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping
from functools import cache

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.profiler import ProfilerActivity, profile

from vfsurgery.combining import TaskArithmetic, Ties, combine_states
from vfsurgery.discovery.verification import randomize
from vfsurgery.errors import DataError, IncompatibleModelsError, OptionError
from vfsurgery.merging.multitask.adamerging import adapt
from vfsurgery.merging.multitask.adapted import Adapted, Look
from vfsurgery.merging.multitask.vectors import added, agreeing, entries_of, plain, rows_of, slopes

CLASSES = {"a": 3, "b": 4}


class Encoder(nn.Module):
    """Patches, torch's own transformer with its packed projections, a head."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 16, 4, 4)
        layer = nn.TransformerEncoderLayer(16, 2, 24, dropout=0.5, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(16, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(self.patches(x).flatten(2).mT).mean(1))


def vit(num_classes: int) -> nn.Module:
    options = {"img_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2}
    return timm.create_model("vit_tiny_patch16_224", num_classes=num_classes, drop_rate=0.3, **options)


def resnet(num_classes: int) -> nn.Module:
    return timm.create_model("test_resnet", num_classes=num_classes)


NETS: Mapping[str, tuple[Callable[[int], nn.Module], str]] = {
    "vit": (vit, "head."),
    "resnet": (resnet, "fc."),
    "encoder": (Encoder, "head."),
}


@dataclasses.dataclass(frozen=True)
class Family:
    """A base, its experts with heads of their own, in float64, and images for each."""

    base: Mapping[str, Tensor]
    experts: Mapping[str, nn.Module]
    trunk: tuple[str, ...]
    data: Mapping[str, Tensor]

    @property
    def states(self) -> list[Mapping[str, Tensor]]:
        return [{name: expert.state_dict()[name] for name in self.trunk} for expert in self.experts.values()]

    @property
    def parameters(self) -> list[str]:
        known = {name for name, _ in next(iter(self.experts.values())).named_parameters()}
        return [name for name in self.trunk if name in known]

    def adapt(self, **options: object) -> Adapted:
        options = {"progress": False, "batch_size": 8, "steps": 6, **options}
        return adapt(self.base, self.experts, self.trunk, self.data, **options)


@cache
def family(name: str, count: int = 60) -> Family:
    make, head = NETS[name]
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    first = make(CLASSES["a"])
    randomize(first, generator)
    first.double()
    base = {key: tensor.clone() for key, tensor in first.state_dict().items()}
    experts: dict[str, nn.Module] = {}
    for task, classes in CLASSES.items():
        expert = make(classes)
        randomize(expert, generator)
        expert.double().train()  # as after fine-tuning
        own = expert.state_dict()
        for key, tensor in base.items():
            if not key.startswith(head) and tensor.is_floating_point():
                size = 0.2 * tensor.abs().mean()
                own[key] = tensor + size * torch.randn(tensor.shape, generator=generator).double()
        expert.load_state_dict(own)
        experts[task] = expert
    trunk = tuple(key for key in base if not key.startswith(head))
    side = 16 if name != "resnet" else 32
    data = {task: torch.randn(count, 3, side, side, generator=generator).double() + i for i, task in enumerate(CLASSES)}
    for task, expert in experts.items():
        norms = [module for module in expert.modules() if isinstance(module, nn.BatchNorm2d)]
        for norm in norms:
            norm.momentum = None
            norm.reset_running_stats()
        if norms:  # as training would leave them
            expert(data[task])
    return Family(base, experts, trunk, data)


@pytest.mark.parametrize("net", NETS)
def test_no_steps_are_task_arithmetic_to_the_last_bit(net):
    own = family(net)
    arithmetic = combine_states(own.states, TaskArithmetic(0.3), base={n: own.base[n] for n in own.trunk})
    for by in ("task", "block", "module", "tensor"):
        found = own.adapt(steps=0, by=by)
        assert found.start_kept and found.step == 0
        assert all(torch.equal(found.tensors[name], arithmetic[name]) for name in own.parameters)
    moved = own.adapt(steps=0, start=0.31)
    assert not torch.equal(moved.tensors[own.parameters[0]], arithmetic[own.parameters[0]])


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("plus", [False, True], ids=["plain", "plus"])
def test_the_gradient_is_that_of_the_stateless_merge(net, plus):
    own = family(net)
    entries = entries_of(own.parameters, own.base, own.states)
    vectors = agreeing([*entries.values()]) if plus else plain
    taus = {name: torch.stack([*vectors(entry)]) for name, entry in entries.items()}
    lambdas = torch.full((len(entries), 2), 0.3, dtype=torch.float64, requires_grad=True)

    expert = copy.deepcopy(own.experts["b"]).eval()
    merged = {
        name: own.base[name] + torch.tensordot(row, taus[name], 1) for name, row in zip(entries, lambdas, strict=True)
    }
    images = own.data["b"][:8]
    functional_call(expert, merged, (images,)).log_softmax(1)[:, 0].sum().backward()

    with torch.no_grad():
        for name, entry in entries.items():
            expert.get_parameter(name).copy_(added(entry, vectors, [0.3, 0.3]))
    expert(images).log_softmax(1)[:, 0].sum().backward()
    found = [slopes(entry, vectors, expert.get_parameter(name).grad) for name, entry in entries.items()]
    assert lambdas.grad is not None and lambdas.grad.abs().max() > 1e-3
    torch.testing.assert_close(torch.tensor(found, dtype=torch.float64), lambdas.grad, rtol=1e-10, atol=1e-10)
    with torch.no_grad():  # at other weights it is another one
        expert.get_parameter(own.parameters[0]).mul_(1.5)
    expert.zero_grad()
    expert(images).log_softmax(1)[:, 0].sum().backward()
    other = [slopes(entry, vectors, expert.get_parameter(name).grad) for name, entry in entries.items()]
    assert not torch.allclose(torch.tensor(other, dtype=torch.float64), lambdas.grad, rtol=1e-3)


@pytest.mark.parametrize("net", NETS)
def test_nothing_of_the_base_or_the_experts_changes(net):
    own = family(net)
    before = copy.deepcopy((own.base, {task: expert.state_dict() for task, expert in own.experts.items()}))
    modes = {task: [module.training for module in expert.modules()] for task, expert in own.experts.items()}
    rng = torch.get_rng_state()
    found = own.adapt(steps=4)
    assert all(torch.equal(tensor, before[0][name]) for name, tensor in own.base.items())
    for task, expert in own.experts.items():
        assert all(torch.equal(tensor, before[1][task][name]) for name, tensor in expert.state_dict().items())
        assert [module.training for module in expert.modules()] == modes[task]
        assert all(parameter.grad is None and parameter.requires_grad for parameter in expert.parameters())
    assert torch.equal(rng, torch.get_rng_state())
    pointers = {tensor.data_ptr() for expert in own.experts.values() for tensor in expert.state_dict().values()}
    assert pointers.isdisjoint(tensor.data_ptr() for tensor in found.tensors.values())


@pytest.mark.parametrize("options", [{}, {"plus": True}, {"objective": "entropy"}, {"by": "block"}], ids=str)
def test_seeds_repeat_and_matter(options):
    own = family("vit")
    first, again, other = (own.adapt(seed=seed, **options) for seed in (0, 0, 1))
    assert first.looks == again.looks and first.coefficients == again.coefficients
    assert all(torch.equal(first.tensors[name], again.tensors[name]) for name in own.parameters)
    assert first.looks != other.looks


def test_one_row_moves_as_the_sum_of_all_rows_does():
    """Task-wise gradients are the sums of those of tensors."""
    own = family("vit")
    entries = entries_of(own.parameters, own.base, own.states)
    expert = copy.deepcopy(own.experts["a"]).eval()
    expert(own.data["a"][:4]).square().sum().backward()
    gradients = {name: expert.get_parameter(name).grad for name in entries}
    by_tensor = torch.tensor([slopes(e, plain, gradients[n]) for n, e in entries.items()], dtype=torch.float64).sum(0)
    flat = torch.cat([gradients[name].flatten() for name in entries])
    whole = [torch.cat([state[name].sub(own.base[name]).flatten() for name in entries]) @ flat for state in own.states]
    torch.testing.assert_close(by_tensor, torch.stack(whole), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("net", NETS)
def test_one_expert_is_found_again(net):
    """From the base it learns to go all the way."""
    own = family(net)
    alone = Family(own.base, {"b": own.experts["b"]}, own.trunk, {"b": own.data["b"]})
    found = alone.adapt(start=0.0, steps=50, lr=0.05, by="task", patience=99)
    assert found.coefficients[0][0] == pytest.approx(1, abs=0.25)
    assert found.chosen.loss < found.looks[0].loss and found.chosen.mean >= found.looks[0].mean


def test_it_is_never_worse_than_its_start():
    own = family("vit")
    found = own.adapt(lr=50.0, steps=10)
    assert found.start_kept and "start was kept" in found.why
    assert all(value == 0.3 for row in found.coefficients for value in row)
    arithmetic = combine_states(own.states, TaskArithmetic(0.3), base={n: own.base[n] for n in own.trunk})
    assert all(torch.equal(found.tensors[name], arithmetic[name]) for name in own.parameters)
    assert len(found.looks) == 6  # the start, and as many as patience allows


def test_a_collapse_to_one_class_is_noticed_and_not_taken():
    net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2)).double()
    nn.init.zeros_(net[0].bias), nn.init.zeros_(net[2].bias)
    expert = copy.deepcopy(net)
    with torch.no_grad():
        for model in (net, expert):
            model[2].weight.mul_(3)
        expert[0].bias.add_(0.1 * (net[2].weight[1] - net[2].weight[0]))  # whose multiples drown all images
    images = torch.randn(100, 4).double() * 2
    data = {"a": images}
    found = adapt(net.state_dict(), {"a": expert}, ["0.bias"], data, objective="entropy", start=0.0, steps=60, lr=1.0,
                  progress=False, patience=99)  # fmt: skip
    collapsed = [look for look in found.looks if look.collapsed]
    assert collapsed and found.chosen not in collapsed
    assert any("collapsed to one class" in note for note in found.notes)
    guided = adapt(net.state_dict(), {"a": expert}, ["0.bias"], data, start=0.0, steps=60, lr=0.05, progress=False)
    assert not any(look.collapsed for look in guided.looks)


def test_clamped_coefficients_come_back_from_the_border():
    own = family("vit")
    alone = Family(own.base, {"b": own.experts["b"]}, own.trunk, {"b": own.data["b"]})
    found = alone.adapt(start=-0.5, clamp=(0.0, 1.0), steps=40, lr=0.05, by="task", patience=99)
    assert 0 < found.coefficients[0][0] <= 1
    free = alone.adapt(start=-0.5, steps=2, lr=0.05, by="task")
    assert free.coefficients[0][0] < 0


def test_batch_norms_run_on_statistics_of_their_task():
    own = family("resnet")
    found = own.adapt(steps=2)
    assert set(found.statistics) == {"a", "b"}
    names = [name for name in own.trunk if name.endswith(("running_mean", "running_var"))]
    first, second = found.statistics.values()
    assert sorted(first) == sorted(names)
    assert all(not torch.allclose(first[name], second[name]) for name in names)
    assert all(torch.allclose(found.tensors[name], (first[name] + second[name]) / 2) for name in names)
    model = copy.deepcopy(own.experts["b"])
    model.load_state_dict({**found.tensors, **second}, strict=False)
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
    every = torch.arange(60) % 5 != 4
    model.train()(own.data["b"][every])
    for name in names[:2]:  # those of the first layer read images, and no other layer
        torch.testing.assert_close(model.state_dict()[name], second[name])


def test_plus_keeps_what_ties_keeps():
    own = family("vit")
    entries = entries_of(own.parameters, own.base, own.states)
    vectors = agreeing([*entries.values()])
    kept = {name: torch.stack([*vectors(entry)]) for name, entry in entries.items()}
    ties = combine_states(
        [{n: s[n] for n in own.parameters} for s in own.states],
        Ties(density=0.2, aggregate="sum"),
        base={n: own.base[n] for n in own.parameters},
    )
    for name in own.parameters:
        torch.testing.assert_close(own.base[name] + kept[name].sum(0), ties[name])
    share = sum(float((each != 0).double().mean(0).mean() * each[0].numel()) for each in kept.values())
    total = sum(each[0].numel() for each in kept.values())
    assert 0.1 < share / total < 0.2


def test_blocks_are_the_innermost_that_are_repeated():
    swin = timm.create_model("swin_tiny_patch4_window7_224", img_size=56, depths=(1, 1, 2, 1), embed_dim=12)
    rows = rows_of([name for name, _ in swin.named_parameters()], swin, "block")
    assert rows["layers.2.blocks.1.mlp.fc1.weight"] == "layers.2.blocks.1"
    assert rows["layers.1.downsample.norm.weight"] == "layers.1"
    assert rows["patch_embed.proj.bias"] == "patch_embed.proj"
    net = resnet(2)
    rows = rows_of([name for name, _ in net.named_parameters()], net, "block")
    assert {row for name, row in rows.items() if name.startswith("layer2.0.")} == {"layer2.0"}


def test_memory_is_two_models_beyond_the_experts():
    """A trunk of twelve equal layers, and next to no activations; the graph of a merge would hold all task vectors."""
    net = nn.Sequential(*(nn.Linear(256, 256, bias=False) for _ in range(12)), nn.Linear(256, 3))
    experts = {name: copy.deepcopy(net) for name in "abcd"}
    for expert in experts.values():
        nn.init.normal_(expert[0].weight)
    base, trunk = net.state_dict(), [name for name in net.state_dict() if not name.startswith("12")]
    data = {name: torch.randn(20, 256) for name in experts}
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        adapt(base, experts, trunk, data, steps=2, batch_size=4, progress=False)
    assert record.profiler is not None
    live = peak = 0
    events = [event for event in record.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    one = sum(tensor.numel() * tensor.element_size() for tensor in base.values())
    assert one < peak <= 2.2 * one


BAD = {
    "no images": (DataError, {"data": {"a": torch.zeros(9, 3, 16, 16)}}, "no images for task 'b'"),
    "few images": (DataError, {"data": dict.fromkeys("ab", torch.zeros(3, 3, 16, 16))}, "too few images"),
    "foreign": (DataError, {"data": dict.fromkeys("abc", torch.zeros(9, 3, 16, 16))}, "no expert for 'c'"),
    "objective": (OptionError, {"objective": "labels"}, "unknown objective"),
    "by": (OptionError, {"by": "layer"}, "unknown by"),
    "clamp": (OptionError, {"clamp": (1.0, 0.0)}, "leaves no coefficient"),
    "steps": (OptionError, {"steps": -1}, "steps >= 0"),
    "trunk": (IncompatibleModelsError, {"trunk": ["head.weight"]}, "not the same everywhere"),
    "unknown": (IncompatibleModelsError, {"trunk": ["blocks.9.bias"]}, "absent"),
    "buffers": (IncompatibleModelsError, {"trunk": []}, "no parameters"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused(case):
    error, options, text = BAD[case]
    own = family("vit")
    with pytest.raises(error, match=text):
        dataclasses.replace(own, **{k: options[k] for k in ("data", "trunk") if k in options}).adapt(
            **{k: value for k, value in options.items() if k not in ("data", "trunk")}
        )


def test_it_reads_as_a_table():
    found = family("vit").adapt(by="block")
    text = str(found)
    assert text.startswith("AdaMerging of 2 tasks by what experts say: ")
    assert all(row in text for row in found.rows) and found.why in text
    assert Look(1, (0.5, 0.7), 0.1).mean == pytest.approx(0.6)


def test_it_is_drawn_and_shown_in_notebooks(tmp_path):
    found = family("vit").adapt(by="block")
    path = found.plot(tmp_path / "coefficients.png")
    assert path.stat().st_size > 10_000
    html = found._repr_html_()
    assert found.why in html and all(row in html for row in found.rows) and html.count("<svg") == 2
