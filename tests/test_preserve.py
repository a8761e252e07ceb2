"""Preserve-first merging: what a prefix of every source computes, and how it enters the merged rest."""

from __future__ import annotations

import copy
from itertools import pairwise

import pytest
import torch
from prefix_nets import EVERY, PLAIN, SAME, SHARES, Sweep, X, distance, made, merge, sources
from tiny_nets import NETS, Chain, groups_of, images, lively, net, permuted, planted, same_state, state_of
from torch import Tensor, fx, nn

import vfsurgery as surgery
from vfsurgery.discovery.verification import relative_error
from vfsurgery.errors import OptionError
from vfsurgery.groups import Permutation, random_permutations
from vfsurgery.matching import Given, Identity, WeightMatching
from vfsurgery.passes import Average, Context, Pass, Pipeline, Preserve
from vfsurgery.passes.cut import Boundaries, find_cut
from vfsurgery.passes.preserve import chosen_form
from vfsurgery.stats.collect import Observer, Watch
from vfsurgery.tracing.values import VALUE


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


def test_branches_run_one_after_the_other() -> None:
    """So that the activations of one source at a time are alive."""
    for name, boundary in (("residual", 4), ("vit", "blocks.1"), ("awkward", 2)):
        merged = Sweep(sources(name))(boundary, "branches")
        order = [node.name.split("_")[1] for node in merged.graph.nodes if node.name.startswith("source_")]
        assert order == sorted(order) and len(set(order)) == 3


def test_what_the_merged_rest_reads_has_the_shapes_of_one_source() -> None:
    sweep = Sweep(sources("dense"))
    shapes: list[tuple[int, ...]] = []

    def look(previous: Pass | None, graph_module: fx.GraphModule, following: Pass | None) -> None:
        shapes.extend(node.meta[VALUE].shape for node in graph_module.graph.nodes if node.target is torch.add)

    grouped = sweep.grouped
    with grouped.running():
        context = Context(grouped.groups, grouped.sources, SHARES, [{}, {}, {}], sweep.surveyed.moments)
        for form in ("grouped", "branches"):
            Pipeline((Average(), Preserve(boundary=3, form=form)), look).run(
                grouped.sources[0].clone().graph_module, context
            )
    assert set(shapes) == {(2, 11, 12, 12)}


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
    first = WeightMatching(scheme="reference")  # under others a source has a say in the orders, whatever its share
    two, three = Sweep([a, b], first)(4), Sweep([a, b, c], first)(4, shares=(0.5, 0.5, 0.0))
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
    assert "recorded through torch.export" in sweep.grouped.notes[0]
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

    graph_module = surgery.trace(Sorting(), torch.randn(2, 4))
    with pytest.raises(OptionError, match=r"(?s)the boundary cuts argsort, whose value cannot be averaged.*read_by"):
        find_cut(graph_module, "argsort")
    assert [cut.boundary for cut in Boundaries(graph_module).cuts()] == [0, 1, 2]


def test_orders_given_for_a_merge_serve_every_boundary() -> None:
    models = sources("chain", 2)
    orders = surgery.match(models, matching="weights", example_inputs=X[:2], progress=False)
    assert distance(merge(models, 3, matching=Given(orders)), merge(models, 3)) <= SAME
    turned = {name: Permutation(order.order[::-1]) for name, order in orders.items()}
    assert distance(merge(models, 3, matching=Given(turned)), merge(models, 3)) > 100 * SAME


@pytest.mark.parametrize("matcher", ["zipit", "cca"])
@pytest.mark.parametrize("name", ["chain", "residual", "dense"])
def test_maps_of_units_end_at_the_border_and_all_layers_are_still_the_mean_of_the_logits(name, matcher):
    models = [net(name, seed) for seed in (1, 2)]
    data, options = [images(96)], {"renormalize": None, "progress": False}
    find = {"zipit": surgery.ZipMatching(), "cca": surgery.CCAMatching()}[matcher]
    found = surgery.Given(surgery.match(models, data=data, matching=find, progress=False))
    depth = surgery.report_of(surgery.merge(models, preserve=1, matching=found, data=data, **options)).preserved.depth
    x = images(8, seed=3)
    with torch.no_grad():
        logits = torch.stack([model(x) for model in models]).mean(0)
        errors = [
            float((surgery.merge(models, preserve=k, matching=found, data=data, **options)(x) - logits).abs().max())
            for k in (1, depth)
        ]
        plain = surgery.merge(models, matching=found, data=data, **options)(x)
        once = surgery.merge(models, preserve=1, matching=found, data=data, **options)(x)
    assert errors[1] < 1e-4 < errors[0]
    assert torch.allclose(plain, once, atol=1e-4)


def test_a_source_zipped_with_a_copy_of_itself_comes_out_at_every_boundary():
    a = net("residual", 1)
    b = planted(a, groups_of(a))
    options = {"data": [images(400)], "matching": "zipit", "renormalize": None, "progress": False}
    x = images(8, seed=3)
    with torch.no_grad():
        for boundary in range(1, 7):
            merged = surgery.merge(a, b, preserve=boundary, **options)
            assert relative_error((merged(x),), (a(x),)) < 1e-2, boundary
