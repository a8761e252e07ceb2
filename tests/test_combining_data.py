"""Methods that look at data: Fisher averaging, RegMean and RegMean++, in float64 unless said otherwise."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from tiny_nets import Grouped, Residual, images, lively
from torch import Tensor, nn

import vfsurgery as surgery
from vfsurgery.combining import COMBINERS, Combiner, Fisher, RegMean, RegMeanPlusPlus, combine_states
from vfsurgery.combining.base import Entry, InMemory, Kind, Trait
from vfsurgery.combining.fisher import fisher_diagonal
from vfsurgery.combining.grams import Gram, collect
from vfsurgery.combining.regmean import Normal
from vfsurgery.combining.traits import traits_of_graph
from vfsurgery.errors import DataError, OptionError
from vfsurgery.stats.inputs import Layout
from vfsurgery.tracing.sources import Source

METHODS = ("fisher", "regmean", "regmean++")


class Softmax(nn.Linear):
    """Logits, and nothing else."""


class Functional(nn.Module):
    """Packed queries, keys and values by ``F.linear``, torch's attention, a product, and a head."""

    def __init__(self, dim: int = 8, classes: int = 4) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, dim, 4, 4)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.attention = nn.MultiheadAttention(dim, 2, batch_first=True)
        self.table = nn.Parameter(torch.randn(1, 9, dim))
        self.mix = nn.Parameter(torch.randn(dim, dim))  # (inputs, units)
        self.head = nn.Linear(dim, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).flatten(2).transpose(1, 2) + self.table
        q, k, v = F.linear(x, self.qkv.weight, self.qkv.bias).chunk(3, -1)
        x = x + F.scaled_dot_product_attention(q, k, v)
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return self.head((x @ self.mix).mean(1))


NETS = {"residual": Residual, "grouped": Grouped, "functional": Functional}


def source(model: nn.Module, x: Tensor) -> Source:
    model = model.double().eval()
    return Source.of(model, surgery.trace(model, x[:2]))


def family(name: str, count: int = 2) -> tuple[Source, list[Source], Tensor]:
    """A base, sources near it, and images."""
    torch.manual_seed(5)
    x = images(24, dtype=torch.float64)
    base = lively(NETS[name]()).double()
    tuned: list[Source] = []
    for seed in range(count):
        model, generator = copy.deepcopy(base), torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
        tuned.append(source(model, x))
    return source(base, x), tuned, x


def combined(
    method: Combiner, base: Source | None, sources: list[Source], data: list[Tensor], **options: object
) -> dict[str, Tensor]:
    def of(number: int) -> Iterator[Tensor]:
        return iter(data[number].split(10))

    traits = traits_of_graph(sources[0].graph_module)
    states = [each.state for each in sources]
    start = None if base is None else base.state
    return combine_states(states, method, base=start, traits=traits, traced=sources, images=of, **options)  # type: ignore[arg-type]


def trained(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    names = {name for name, _ in model.named_parameters()}
    return {name: value for name, value in state.items() if name in names}


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor], tolerance: float = 1e-9) -> None:
    for name, value in a.items():
        torch.testing.assert_close(
            value, b[name], rtol=0, atol=tolerance, msg=lambda text, name=name: f"{name}: {text}"
        )


def apart(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    return max(float((value - b[name]).abs().max()) for name, value in a.items())


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("name", METHODS)
def test_one_source_alone_is_itself(name: str, net: str) -> None:
    base, (one, _), x = family(net)
    found = combined(COMBINERS[name](), base, [one], [x])
    assert_same(trained(found, one.model), one.state, 1e-8)
    assert apart(trained(found, one.model), base.state) > 0.01


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("name", METHODS)
def test_equal_sources_stay_and_order_does_not_matter(name: str, net: str) -> None:
    base, (a, b), x = family(net)
    other = images(24, seed=9, dtype=torch.float64)
    assert_same(combined(COMBINERS[name](), base, [a, a], [x, other]), a.state, 1e-8)
    there, back = (
        combined(COMBINERS[name](), base, [a, b], [x, other]),
        combined(COMBINERS[name](), base, [b, a], [other, x]),
    )
    assert_same(trained(there, a.model), back, 1e-8)
    crossed = combined(COMBINERS[name](), base, [a, b], [other, x])  # images of the wrong tasks
    assert apart(trained(there, a.model), crossed) > 1e-6


@pytest.mark.parametrize("name", METHODS)
def test_a_base_changes_nothing(name: str) -> None:
    """Methods that average say the same of weights as of task vectors."""
    base, sources, x = family("functional")
    with_base = combined(COMBINERS[name](), base, sources, [x, x])
    assert_same(with_base, combined(COMBINERS[name](), None, sources, [x, x]), 1e-9)


@pytest.mark.parametrize("name", METHODS)
def test_refusals(name: str) -> None:
    base, sources, x = family("functional")
    states = [each.state for each in sources]
    with pytest.raises(OptionError, match="tensors alone"):
        combine_states(states, COMBINERS[name](), base=base.state)
    with pytest.raises(OptionError, match="must not be negative"):
        combined(COMBINERS[name](), base, sources, [x, x], weights=(1, -1))
    with pytest.raises(DataError, match="no image for source 1"):
        combined(COMBINERS[name](), base, sources, [x, x[:0]])
    with pytest.raises(OptionError, match="images >= 1"):
        COMBINERS[name](images=0)  # type: ignore[call-arg]


# --- Fisher ---------------------------------------------------------------------------------------------------------


def by_hand(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """One image and one class after the other."""
    total = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for image in x:
        log_odds = model(image[None])[0].log_softmax(0)
        for c, value in enumerate(log_odds):
            grads = torch.autograd.grad(value, list(model.parameters()), retain_graph=True)
            for (name, _), g in zip(model.named_parameters(), grads, strict=True):
                total[name] += log_odds[c].exp().detach() * g.square() / len(x)
    return total


@pytest.mark.parametrize("net", NETS)
def test_the_diagonal_is_exact(net: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _, (one, _), x = family(net)
    names = [name for name, _ in one.model.named_parameters()]
    expected = by_hand(one.model, x[:6])
    found = fisher_diagonal(one, names, [x[:4], x[4:6]])
    assert_same(expected, found, 1e-10)
    monkeypatch.setattr("vfsurgery.combining.fisher.AT_ONCE", 0)  # one gradient at a time
    assert_same(expected, fisher_diagonal(one, names, [x[:4], x[4:6]]), 1e-10)
    assert apart(expected, fisher_diagonal(one, names, [x[:5]])) > 1e-9


def test_the_diagonal_of_a_linear_softmax() -> None:
    torch.manual_seed(0)
    x = torch.randn(50, 6, dtype=torch.float64)
    one = source(Softmax(6, 3), x)
    p = one.model(x).softmax(1).detach()
    expected = torch.einsum("nc,nj->cj", p * (1 - p), x.square()) / len(x)
    found = fisher_diagonal(one, ["weight"], [x])["weight"]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
    batch = torch.autograd.grad((p.sqrt() * one.model(x).log_softmax(1)).sum(), one.model.weight)[0].square() / len(x)
    assert not torch.allclose(found, batch, rtol=0.05)  # what some codes compute: cross terms stay
    drawn = [
        fisher_diagonal(one, ["weight"], [x], torch.Generator().manual_seed(seed))["weight"] for seed in range(300)
    ]
    torch.testing.assert_close(torch.stack(drawn).mean(0), expected, rtol=0.05, atol=0)


def test_fisher_weighs_by_the_diagonals(monkeypatch: pytest.MonkeyPatch) -> None:
    base, (a, b), x = family("functional")
    given: dict[int, float] = {}
    monkeypatch.setattr(
        "vfsurgery.combining.fisher.fisher_diagonal",
        lambda own, names, *_: {name: torch.full_like(own.state[name], given[id(own)]) for name in names},
    )

    def run(f: float, g: float, **options: object) -> dict[str, Tensor]:
        given.update({id(a): f, id(b): g})
        method = Fisher(floor=options.pop("floor", 1e-13), normalize=options.pop("normalize", False))  # type: ignore[arg-type]
        return trained(combined(method, base, [a, b], [x, x], **options), a.model)

    mean = {name: (a.state[name] + b.state[name]) / 2 for name in a.state}
    uneven = {name: (3 * a.state[name] + b.state[name]) / 4 for name in a.state}
    assert_same(run(1, 1), mean, 1e-10)
    assert_same(run(1, 1, weights=(3, 1)), uneven, 1e-10)
    assert_same(run(3, 1), uneven, 1e-10)
    assert_same(run(1, 0), a.state, 1e-10)
    assert_same(run(0, 1), b.state, 1e-10)  # the floor favours neither
    assert_same(run(0, 0), mean, 1e-10)
    assert_same(run(3e8, 1e8, floor=1e-3), run(3, 1, floor=1e-3), 1e-10)
    assert_same(run(3, 1, normalize=True), mean, 1e-10)
    assert apart(run(3, 1), mean) > 0.01


def test_what_vmap_refuses_is_done_image_by_image() -> None:
    class Looks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            y = self.first(x)
            buffer = torch.zeros(1, 6, dtype=x.dtype)
            buffer += y  # in place into what has no images: vmap refuses
            return self.last(buffer.tanh())

    x = torch.randn(5, 4, dtype=torch.float64)
    model = Looks().double().eval()
    one = Source.of(model, torch.fx.symbolic_trace(model))
    names = [name for name, _ in model.named_parameters()]
    assert_same(by_hand(model, x), fisher_diagonal(one, names, [x[:1], x[1:2], x[2:3], x[3:4], x[4:5]]), 1e-10)


# --- RegMean --------------------------------------------------------------------------------------------------------


def entry_of(weights: list[Tensor], shares: tuple[float, ...] | None = None) -> Entry:
    states = [InMemory({"w": weight}) for weight in weights]
    shape = tuple(weights[0].shape)
    return Entry(
        "w",
        shape,
        Trait(Kind.MATRIX),
        shares or (1.0,) * len(weights),
        torch.float64,
        states,
        None,
        0,
        weights[0].numel(),
    )


def solved(weights: list[Tensor], inputs: list[Tensor], damping: float = 1.0) -> Tensor:
    entry, fit = entry_of(weights), Normal(Layout())
    for number, x in enumerate(inputs):
        fit.add(entry, number, Gram(Layout(), (x.T @ x)[None], len(x)), damping)
    return fit.solve(torch.stack(weights).mean(0))


def test_the_formula() -> None:
    torch.manual_seed(1)
    weights = [torch.randn(4, 6, dtype=torch.float64) for _ in range(3)]
    inputs = [
        torch.randn(40 + 10 * i, 6, dtype=torch.float64) @ torch.randn(6, 6, dtype=torch.float64) for i in range(3)
    ]
    found = solved(weights, inputs)
    grams = [x.T @ x / len(x) for x in inputs]
    gradient = sum((found - w) @ g for w, g in zip(weights, grams, strict=True))
    assert float(gradient.abs().max()) < 1e-4  # a ridge of 1e-6
    assert float(sum((weights[0] - w) @ g for w, g in zip(weights, grams, strict=True)).abs().max()) > 0.1
    mean = torch.stack(weights).mean(0)
    torch.testing.assert_close(solved(weights, [inputs[0]] * 3), mean, rtol=0, atol=1e-9)
    torch.testing.assert_close(solved([weights[0]] * 3, inputs), weights[0], rtol=0, atol=1e-9)
    diagonal = [g.diagonal() for g in grams]
    columnwise = sum(w * d for w, d in zip(weights, diagonal, strict=True)) / sum(diagonal)
    torch.testing.assert_close(solved(weights, inputs, damping=0.0), columnwise, rtol=0, atol=1e-5)
    assert not torch.allclose(found, columnwise, atol=1e-2)


def test_fewer_rows_than_columns_are_solved_and_unseen_columns_are_averaged() -> None:
    torch.manual_seed(1)
    weights = [torch.randn(4, 12, dtype=torch.float64) for _ in range(2)]
    inputs = [torch.randn(5, 12, dtype=torch.float64) for _ in range(2)]
    for x in inputs:
        x[:, 3] = 0
    found = solved(weights, inputs)
    assert found.isfinite().all()
    torch.testing.assert_close(found[:, 3], (weights[0] + weights[1])[:, 3] / 2, rtol=0, atol=1e-9)


def test_the_closed_form_of_wudi_is_regmean() -> None:
    torch.manual_seed(2)
    deltas = [torch.randn(5, 4, dtype=torch.float64) for _ in range(3)]
    entry, fit = entry_of(deltas), Normal(Layout())
    for number, d in enumerate(deltas):
        fit.add(entry, number, Gram(Layout(), (d.T @ d / d.square().sum())[None], 1), 1.0)
    found = fit.solve(torch.stack(deltas).mean(0))
    gradient = sum((found - d) @ d.T @ d / d.square().sum() for d in deltas)
    assert float(gradient.abs().max()) < 1e-5


def test_calls_that_no_hook_sees_have_gram_matrices() -> None:
    _, (one, _), x = family("functional")
    names = [name for name, _ in one.model.named_parameters()]
    found = collect(one, names, [x])
    assert set(found) == {
        *("embed.weight", "qkv.weight", "mix", "head.weight"),
        *("attention.in_proj_weight", "attention.out_proj.weight"),
    }
    assert all(float(gram.total.abs().max()) > 0 for gram in found.values())
    model = one.model
    tokens = model.embed(x).flatten(2).transpose(1, 2) + model.table
    rows = tokens.reshape(-1, 8)
    torch.testing.assert_close(found["qkv.weight"].mean(1.0)[0], rows.T @ rows / len(rows), rtol=0, atol=1e-9)
    q, k, v = F.linear(tokens, model.qkv.weight, model.qkv.bias).chunk(3, -1)
    tokens = tokens + F.scaled_dot_product_attention(q, k, v)
    wq, wk, wv = F.linear(tokens, model.attention.in_proj_weight, model.attention.in_proj_bias).chunk(3, -1)
    heads = [y.unflatten(-1, (2, 4)).transpose(1, 2) for y in (wq, wk, wv)]
    values = F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2).reshape(-1, 8)
    expected = values.T @ values / len(values)
    torch.testing.assert_close(found["attention.out_proj.weight"].mean(1.0)[0], expected, rtol=0, atol=1e-9)


def test_attention_between_two_things_is_fitted_part_by_part() -> None:
    """Packed projections of queries, keys and values read three things."""

    class Across(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.attention(x[:, :3], x[:, 1:], 2 * x[:, 1:].abs(), need_weights=False)[0].mean(1)

    torch.manual_seed(4)
    data = [torch.randn(30, 4, 4, dtype=torch.float64), 3 * torch.randn(30, 4, 4, dtype=torch.float64) + 1]
    sources = [source(Across(), data[0]) for _ in range(2)]
    found = combined(RegMean(), None, sources, data)["attention.in_proj_weight"]
    keys = [x[:, 1:].reshape(-1, 4) for x in data]
    parts = [s.state["attention.in_proj_weight"].chunk(3) for s in sources]
    values = [2 * k.abs() for k in keys]
    for place, read in enumerate(([x[:, :3].reshape(-1, 4) for x in data], keys, values)):
        expected = solved([part[place] for part in parts], read, 0.9)
        torch.testing.assert_close(found[4 * place : 4 * place + 4], expected, rtol=0, atol=1e-9)
    assert not torch.allclose(found[:4], sum(part[0] for part in parts) / 2, atol=1e-3)


def test_a_convolution_is_a_linear_layer_on_unfolded_images() -> None:
    _, (a, b), x = family("residual")
    other = images(24, seed=3, dtype=torch.float64)
    found = combined(RegMean(damping=0.9), None, [a, b], [x, other])["stem.weight"]
    unfolded = [F.unfold(y, 3, padding=1).mT.reshape(-1, 27) for y in (x, other)]
    linear = solved([s.state["stem.weight"].flatten(1) for s in (a, b)], unfolded, 0.9)
    torch.testing.assert_close(found.flatten(1), linear, rtol=0, atol=1e-9)
    assert not torch.allclose(found, (a.state["stem.weight"] + b.state["stem.weight"]) / 2, atol=1e-3)


def test_groups_have_a_matrix_each_and_some_pixels_say_what_all_say(monkeypatch: pytest.MonkeyPatch) -> None:
    _, (one, _), x = family("grouped")
    whole = collect(one, ["grouped.weight", "depthwise.weight", "conv.weight"], [x])
    assert whole["grouped.weight"].total.shape == (2, 36, 36)
    assert whole["depthwise.weight"].total.shape == (8, 9, 9)
    monkeypatch.setattr("vfsurgery.combining.grams.LEAST_PLACES", 24 * 70)
    some = collect(one, ["conv.weight"], [x])["conv.weight"]
    assert some.places == 24 * 70 < whole["conv.weight"].places
    exact, drawn = whole["conv.weight"].mean(1.0), some.mean(1.0)
    assert float((exact - drawn).norm() / exact.norm()) < 0.2


def test_the_fitted_model_computes_more_of_what_its_sources_do() -> None:
    base, (a, b), x = family("functional")
    other = 2 * images(24, seed=9, dtype=torch.float64).flip(1)
    notes: list[str] = []
    fitted = combined(RegMean(), base, [a, b], [x, other], notes=notes)
    assert any("6 weights" in note for note in notes)
    mean = combined(COMBINERS["mean"](), base, [a, b], [x, other])
    plus = combined(RegMeanPlusPlus(), base, [a, b], [x, other])

    def error(state: dict[str, Tensor]) -> float:
        model = copy.deepcopy(a.model)
        model.load_state_dict(state)
        with torch.no_grad():
            return sum(float((model(y) - s.model(y)).square().mean()) for s, y in ((a, x), (b, other)))

    assert error(fitted) < error(mean)
    assert error(plus) < error(mean)
    assert_same({"embed.weight": fitted["embed.weight"]}, plus)  # the first layer reads the images themselves
    assert apart({"head.weight": fitted["head.weight"]}, plus) > 1e-6
    assert apart(a.state, dict(a.model.state_dict())) == 0  # sources are left alone


def test_regmean_plus_plus_reads_what_merged_layers_give() -> None:
    class Two(nn.Sequential):
        def __init__(self) -> None:
            super().__init__(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3))

    torch.manual_seed(3)
    data = [torch.randn(60, 5, dtype=torch.float64), 2 * torch.randn(60, 5, dtype=torch.float64) + 1]
    sources = [source(Two(), data[0]) for _ in range(2)]
    found = combined(RegMeanPlusPlus(damping=1.0), None, sources, data)
    first = solved([s.state["0.weight"] for s in sources], data)
    torch.testing.assert_close(found["0.weight"], first, rtol=0, atol=1e-9)
    bias = sum(s.state["0.bias"] for s in sources) / 2
    hidden = [torch.tanh(F.linear(x, first, bias)) for x in data]
    last = solved([s.state["2.weight"] for s in sources], hidden)
    torch.testing.assert_close(found["2.weight"], last, rtol=0, atol=1e-9)
    plain = combined(RegMean(damping=1.0), None, sources, data)["2.weight"]
    assert not torch.allclose(plain, last, atol=1e-4)
