"""Preserve-first merging: what a prefix of every source computes, and how it enters the merged rest."""

from __future__ import annotations

import copy
from itertools import pairwise
from typing import Any

import pytest
import torch
from tiny_nets import CLASSES, NETS, Chain, groups_of, images, lively, permuted, planted, same_state, state_of
from torch import Tensor, fx, nn

import vfsurgery as surgery
from vfsurgery.errors import OptionError
from vfsurgery.groups import Permutation, random_permutations
from vfsurgery.matching import Given, Identity, Matcher, WeightMatching
from vfsurgery.merging import Merging
from vfsurgery.passes import Preserve
from vfsurgery.passes.cut import Boundaries, find_cut
from vfsurgery.passes.preserve import chosen_form
from vfsurgery.stats.collect import Observer, Watch
from vfsurgery.verification import TOLERANCE

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
        self.work = Merging.prepare(models, None, X[:2], 0, False)
        self.cuts = Boundaries(self.work.sources[0].graph_module)
        with self.work.running():
            self.matchings = self.work.match(matcher or WeightMatching())

    def __call__(self, boundary: int | str, form: str = "auto", shares: tuple[float, ...] = ()) -> fx.GraphModule:
        with self.work.running():
            kept = Preserve(boundary=boundary, form=form)
            return self.work.combine(shares or self.shares, self.matchings, (), False, kept)[0]


def merge(models: list[nn.Module], boundary: int | str, form: str = "auto", **options: Any) -> nn.Module:
    kept = Preserve(boundary=boundary, form=form) if boundary else 0
    return surgery.merge(models, preserve=kept, **{**PLAIN, **options})


@torch.no_grad()
def distance(found: nn.Module, expected: nn.Module | Tensor) -> float:
    """Largest difference of the logits over the largest expected one."""
    logits = expected if isinstance(expected, Tensor) else expected(X)
    return float((found(X) - logits).abs().max() / logits.abs().max())


@pytest.mark.parametrize("name", ["chain", "residual"])
def test_preserving_one_layer_is_plain_merging(name: str) -> None:
    models = sources(name)
    plain, kept, more = (merge(models, boundary, weights=SHARES) for boundary in (0, 1, 2))
    assert same_state(kept.state_dict(), plain.state_dict())
    assert distance(kept, plain) == 0
    assert distance(more, plain) > 100 * SAME


@pytest.mark.parametrize("name", EVERY)
def test_preserving_all_layers_is_the_mean_of_the_logits(name: str) -> None:
    models = sources(name)
    sweep, depth = Sweep(models), Sweep(models).cuts.depth
    mean = sum(share * model(X) for share, model in zip(SHARES, models, strict=True))
    assert distance(sweep(depth), mean) <= SAME
    assert distance(sweep(depth - 1), mean) > 100 * SAME
    assert distance(sweep(depth, shares=(0.2, 0.3, 0.5)), mean) > 100 * SAME


@pytest.mark.parametrize("name", NETS)
def test_the_grouped_form_computes_what_branches_compute(name: str) -> None:
    sweep, found = Sweep(sources(name)), list[nn.Module]()
    for boundary in range(2, sweep.cuts.depth + (name != "chain")):  # a chain's second linear layer reads a first one
        grouped, branches = (sweep(boundary, form) for form in ("grouped", "branches"))
        assert distance(grouped, branches) <= SAME
        assert any(path.startswith("source_2") for path, _ in branches.named_modules())
        assert not any(path.startswith("source_") for path, _ in grouped.named_modules())
        assert sum(p.numel() for p in grouped.parameters()) == sum(p.numel() for p in branches.parameters())
        found.append(grouped)
    assert all(distance(one, other) > 100 * SAME for one, other in pairwise(found))


def test_a_wrong_order_of_sources_in_the_grouped_form_would_be_seen() -> None:
    sweep = Sweep(sources("chain"))
    grouped, branches = (sweep(3, form) for form in ("grouped", "branches"))
    weight = grouped.get_parameter("4.weight")
    with torch.no_grad():
        weight.copy_(weight.unflatten(1, (3, -1)).flip(1).flatten(1, 2))
    assert distance(grouped, branches) > 100 * SAME


@pytest.mark.parametrize("name", [*NETS, "vit"])
def test_the_same_network_in_another_order_of_units_comes_out_at_every_boundary(name: str) -> None:
    a = made(name, 1)
    groups = surgery.find_groups(a, X[:2])
    orders = random_permutations(groups, torch.Generator().manual_seed(5))
    models = [a, permuted(a, groups, orders)]
    back = {group: order.inverse() for group, order in orders.items()}
    right = WeightMatching() if any(group.outer for group in groups) else Given(back)
    aligned, as_it_is = Sweep(models, right), Sweep(models, Identity())
    depth = aligned.cuts.depth
    assert max(distance(aligned(boundary), a) for boundary in range(1, depth + 1)) <= SAME
    assert min(distance(as_it_is(boundary), a) for boundary in (1, depth // 2)) > 100 * SAME


def test_sizes_writes_in_place_and_shared_modules_cross_the_boundary() -> None:
    a = made("awkward", 1)
    sweep = Sweep([a, copy.deepcopy(a)], Identity())
    assert max(distance(sweep(boundary), a) for boundary in range(1, sweep.cuts.depth + 1)) <= SAME
    given = X.clone()
    sweep(3)(given)
    assert torch.equal(given, X)


@pytest.mark.parametrize(
    ("name", "count", "node", "module"),
    [("chain", 2, "_2", "2"), ("residual", 2, "block1_conv1", "block1.conv1"), ("residual", 6, "fc", "fc")],
)
def test_a_boundary_by_number_by_node_and_by_module_is_the_same(name: str, count: int, node: str, module: str) -> None:
    sweep = Sweep(sources(name, 2))
    expected = sweep(count)
    for boundary in (node, module):
        assert distance(sweep(boundary), expected) <= SAME
    assert distance(sweep(count - 1), expected) > 100 * SAME


def test_a_module_is_preserved_with_its_last_node() -> None:
    merged = Sweep(sources("residual", 2))("block1", "branches")
    inside = {path for path, _ in merged.named_parameters() if "block1" in path}
    assert all(path.startswith("source_") for path in inside) and len(inside) == 12
    assert not any(path.startswith("source_") for path, _ in merged.named_parameters() if "block2" in path)


def test_blocks_of_a_transformer_are_preserved_by_name() -> None:
    models = sources("vit", 2)
    mean, sweep = (models[0](X) + models[1](X)) / 2, Sweep(models)
    steps = [sweep(boundary) for boundary in ("patches", "blocks.0", "blocks.2", "head")]
    assert distance(steps[-1], mean) <= SAME
    for step, following in pairwise(steps):
        assert distance(step, following) > 100 * SAME
    assert sweep.cuts.cut("blocks.2").layers == 13  # patches, and qkv, proj, up and down of three blocks
    assert {path.split(".")[0] for path, _ in steps[2].named_parameters()} == {"source_0", "source_1", "norm", "head"}


def test_several_values_cross_where_a_stream_runs_beside_the_boundary() -> None:
    sweep = Sweep(sources("dense", 2))
    cut = sweep.cuts.cut(3)
    assert list(cut.joined) == ["conv2"] and cut.averaged == {"cat"}
    merged = sweep(3)
    assert merged.get_parameter("conv2.weight").shape == (7, 22, 3, 3)


@pytest.mark.parametrize("form", ["grouped", "branches"])
def test_a_depthwise_layer_at_the_boundary_is_averaged(form: str) -> None:
    models = sources("grouped", 2)
    merged = merge(models, "depthwise", form)
    seen: list[Tensor] = []
    name = next(node.name for node in merged.graph.nodes if node.target is torch.add)
    Observer(merged, Watch({name: seen.append})).run(X)
    expected: list[Tensor] = []
    orders = Given(surgery.match(models, matching="weights", example_inputs=X[:2], progress=False))
    aligned = permuted(models[1], groups_of(models[1].float()), orders.permutations).double()
    for model in (models[0].double(), aligned):
        Observer(surgery.trace(model, X[:2]), Watch({"depthwise": expected.append})).run(X)
    assert torch.allclose(seen[0], (expected[0] + expected[1]) / 2, rtol=SAME, atol=SAME)
    assert not torch.allclose(seen[0], expected[0], rtol=SAME, atol=SAME)


def test_preserved_features_lose_nothing_and_merged_ones_do() -> None:
    models = sources("residual", 2)
    merged = merge(models, 5, "branches")
    graph_modules = [surgery.trace(model, X[:2]) for model in models]

    def spread(graph_module: fx.GraphModule, node: str) -> Tensor:
        seen: list[Tensor] = []
        Observer(graph_module, Watch({node: seen.append})).run(X)
        return seen[0].std((0, 2, 3)).sort().values  # whatever the order of units

    for number, graph_module in enumerate(graph_modules):
        ratio = spread(merged, f"source_{number}_relu_2") / spread(graph_module, "relu_2")
        assert torch.allclose(ratio, torch.ones_like(ratio), rtol=SAME)
    sums = [spread(graph_module, "relu_4").mean() for graph_module in graph_modules]
    assert spread(merged, "relu_4").mean() < 0.95 * sum(sums) / 2


def test_a_source_without_a_share_costs_nothing() -> None:
    a, b, c = sources("residual")
    two, three = Sweep([a, b])(4), Sweep([a, b, c])(4, shares=(0.5, 0.5, 0.0))
    assert same_state(three.state_dict(), two.state_dict())
    alone = surgery.merge(a, b, preserve=4, alpha=0.0, **PLAIN)
    assert distance(alone, a) <= SAME
    assert surgery.report_of(alone).preserved.form == "merged"


def test_sources_come_back_as_they_were() -> None:
    models = [model.train() for model in sources("residual", 2)]
    models[0].block1.bn1.eval()
    before = [state_of(model) for model in models]
    merge(models, 4, renormalize="reset", data=images(16, dtype=torch.float64))
    assert all(same_state(model.state_dict(), state) for model, state in zip(models, before, strict=True))
    assert models[1].training and models[0].block1.bn2.training and not models[0].block1.bn1.training


def test_what_is_tied_in_a_source_stays_tied_in_its_prefix() -> None:
    class Tied(Chain):
        def __init__(self) -> None:
            super().__init__()
            self.insert(2, nn.Conv2d(8, 8, 3, padding=1))
            self.insert(3, nn.Conv2d(8, 8, 3, padding=1))
            self[3].weight = self[2].weight

    models = [lively(Tied(), seed).double() for seed in (1, 2)]
    merged = merge(models, 5, pins=["2", "3"])
    assert merged.get_submodule("source_1.2").weight is merged.get_submodule("source_1.3").weight
    assert distance(merge(models, 7, pins=["2", "3"]), (models[0](X) + models[1](X)) / 2) <= SAME


@pytest.mark.parametrize("boundary", [2, 4, "block1"])
def test_reset_leaves_the_statistics_of_preserved_norms_alone(boundary: int | str) -> None:
    models = sources("residual", 2)
    data = images(32, 4, dtype=torch.float64)
    options = {"matching": "identity", "data": data}
    raw = merge(models, boundary, "branches", **options)
    reset = merge(models, boundary, "branches", renormalize="reset", **options)
    for path, module in reset.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            same = torch.equal(module.running_var, raw.get_submodule(path).running_var)
            assert same == path.startswith("source_")
    own = reset.get_submodule("source_1.norm")
    assert torch.equal(own.running_mean, models[1].norm.running_mean)


def test_reset_gives_merged_norms_the_statistics_of_the_composite() -> None:
    data = images(64, 4, dtype=torch.float64)
    merged = merge(sources("residual", 2), 3, renormalize="reset", data=data)
    seen: list[Tensor] = []
    name = next(node.args[0].name for node in merged.graph.nodes if node.target == "block1.bn2")
    Observer(merged, Watch({name: seen.append})).run(data)
    norm = merged.get_submodule("block1.bn2")
    assert torch.allclose(norm.running_mean, seen[0].mean((0, 2, 3)), rtol=1e-6)
    assert torch.allclose(norm.running_var, seen[0].var((0, 2, 3)), rtol=1e-6)


@pytest.mark.parametrize("form", ["grouped", "branches"])
def test_repair_corrects_the_boundary_layer_and_what_follows_but_no_prefix(form: str) -> None:
    models, data = sources("chain", 2), images(64, 4, dtype=torch.float64)
    given = Given(surgery.match(models, matching="weights", example_inputs=X[:2], progress=False))
    raw, repaired = (merge(models, 3, form, renormalize=step, data=data, matching=given) for step in (None, "repair"))
    untouched = {name for name, tensor in raw.named_parameters() if torch.equal(tensor, repaired.get_parameter(name))}
    assert {name.removeprefix("source_0.").removeprefix("source_1.").split(".")[0] for name in untouched} == {
        *("0", "2"),  # the preserved prefix
        "10",  # the output layer
    }
    found: list[Tensor] = []
    node = next(node.name for node in repaired.graph.nodes if node.target == "4")
    Observer(repaired, Watch({node: lambda value: found.append(value.clone())})).run(data)
    goals: list[Tensor] = []
    for model in (models[0], permuted(models[1], groups_of(copy.deepcopy(models[1]).float()), given.permutations)):
        with torch.no_grad():
            goals.append(nn.Sequential(*list(model)[:5])(data.clone()).std((0, 2, 3), correction=0))
    assert torch.allclose(found[0].std((0, 2, 3), correction=0), (goals[0] + goals[1]) / 2, rtol=1e-6)


@pytest.mark.parametrize(("name", "step"), [("chain", "rescale"), ("residual", "reset"), ("vit", "auto")])
def test_where_all_is_preserved_nothing_is_corrected(name: str, step: str) -> None:
    models, depth = sources(name, 2), {"chain": 5, "residual": 6, "vit": 14}[name]
    merged = merge(models, depth, renormalize=step, data=images(32, dtype=torch.float64))
    assert distance(merged, (models[0](X) + models[1](X)) / 2) <= SAME
    assert any(": every" in note for note in surgery.report_of(merged).notes)


def test_bias_calibration_counts_preserved_layers() -> None:
    models = [lively(Chain(), seed).double() for seed in (1, 2)]
    merged = merge(models, 3, renormalize="bias-calibration", matching="identity")
    for path, depth in (("4", 3), ("8", 4), ("10", 5)):
        expected = sum(0.5**depth * model.get_parameter(f"{path}.bias") for model in models)
        assert torch.allclose(merged.get_parameter(f"{path}.bias"), expected)


def test_pinned_units_cross_in_the_order_they_have_and_the_report_says_so() -> None:
    a = made("chain", 1)
    merged = merge([a, planted(a, groups_of(copy.deepcopy(a).float()))], 3, pins="4")
    assert any("units at the boundary _4 are pinned" in note for note in surgery.report_of(merged).notes)
    free = merge([a, made("chain", 2)], 3)
    assert not any("pinned" in note for note in surgery.report_of(free).notes)


BAD = {
    "too many layers": (9, r"(?s)preserve=9 is no boundary of this network.*accepted +0 \(plain merging\) to 5"),
    "negative": (-1, r"preserve=-1 is no boundary"),
    "a truth value": (True, r"preserve=True is no boundary"),
    "a misspelt module": ("cnv", r"(?s)preserve='cnv' names no node or module.*remedy +did you mean 'conv"),
    "an unknown name": ("zzzzzz", r"(?s)preserve='zzzzzz' names no node.*surgery.trace\(...\).graph lists them"),
    "the input": ("x", r"preserve='x' names no node or module that the network computes with"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_boundary_that_is_none_is_refused_before_any_work(case: str) -> None:
    boundary, message = BAD[case]
    models = [lively(NETS["dense"](), seed) for seed in (1, 2)]
    message = message.replace("to 5", "to 4")
    with pytest.raises(OptionError, match=message):
        surgery.merge(*models, preserve=boundary, example_inputs=images(2), progress=False)


class Mapped(Chain):
    """What fx cannot record: it goes through torch.export."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(torch.vmap(lambda image: 2 * image)(x))


def test_what_only_export_records_is_preserved_too() -> None:
    models = [lively(Mapped(), seed).double() for seed in (1, 2)]
    sweep = Sweep(models)
    assert "recorded through torch.export" in sweep.work.notes[0]
    assert distance(sweep(5), (models[0](X) + models[1](X)) / 2) <= SAME
    assert distance(sweep(4), (models[0](X) + models[1](X)) / 2) > 100 * SAME
    assert distance(Sweep([models[0], copy.deepcopy(models[0])])(3), models[0]) <= SAME


def test_what_export_cannot_return_is_refused() -> None:
    class Named(Mapped):
        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"out": super().forward(x)}

    with pytest.raises(OptionError, match=r"(?s)preserved prefixes cannot return a dict.*remedy +leave preserve out"):
        Sweep([lively(Named(), seed).double() for seed in (1, 2)])(3)


def test_a_form_that_cannot_be_is_refused() -> None:
    graph_module = surgery.trace(made("vit", 1), X[:2])
    cut = find_cut(graph_module, "blocks.0")
    with pytest.raises(OptionError, match=r"(?s)the prefix has no grouped form.*because.*remedy +form='auto'"):
        chosen_form("grouped", graph_module, cut)
    with pytest.raises(OptionError, match=r"(?s)form='stacked' is unknown.*accepted +auto, grouped, branches"):
        chosen_form("stacked", graph_module, cut)  # type: ignore[arg-type]


def test_a_boundary_that_cuts_numbers_which_cannot_be_averaged_is_refused() -> None:
    class Sorting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            return self.last(x.gather(1, x.argsort(1)))

    with pytest.raises(OptionError, match=r"(?s)the boundary cuts argsort, whose value cannot be averaged.*read_by"):
        find_cut(surgery.trace(Sorting(), torch.randn(2, 4)), "argsort")


def test_orders_given_for_a_merge_serve_every_boundary() -> None:
    models = sources("chain", 2)
    orders = surgery.match(models, matching="weights", example_inputs=X[:2], progress=False)
    assert distance(merge(models, 3, matching=Given(orders)), merge(models, 3)) <= SAME
    turned = {name: Permutation(order.order[::-1]) for name, order in orders.items()}
    assert distance(merge(models, 3, matching=Given(turned)), merge(models, 3)) > 100 * SAME
