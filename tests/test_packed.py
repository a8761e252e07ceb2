"""Queries, keys and values in one matrix: told by the graph, and taken apart for methods of singular vectors."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import vfsurgery as surgery
from vfsurgery.checkpoints import load_state_dict, save_state_dict
from vfsurgery.combining import COMBINERS, Combiner, combine_states
from vfsurgery.combining.traits import traits_of_graph, traits_of_states
from vfsurgery.errors import OptionError

WIDTH, HEADS, SIZE = 12, 3, 4
METHODS = ("tsv-m", "iso-c", "iso-cts", "wudi", "knots")
FORMS = ("unbound", "chunked", "head by head", "by matmul", "turned", "functional")


class Attention(nn.Module):
    """One projection for all three, in several orders of rows and by several ops."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form, self.qkv, self.proj = form, nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        if self.form == "gated":
            a, b, c = self.qkv(x).chunk(3, -1)
            return self.proj(a * b.sigmoid() + c)
        n, tokens = x.shape[:2]
        packed = functional.linear(x, self.qkv.weight, self.qkv.bias) if self.form == "functional" else self.qkv(x)
        if self.form == "chunked":
            q, k, v = (each.reshape(n, tokens, HEADS, SIZE).transpose(1, 2) for each in packed.chunk(3, -1))
        elif self.form == "head by head":
            q, k, v = packed.reshape(n, tokens, HEADS, 3 * SIZE).transpose(1, 2).chunk(3, -1)
        else:
            q, k, v = packed.reshape(n, tokens, 3, HEADS, SIZE).permute(2, 0, 3, 1, 4).unbind(0)
        if self.form == "turned":  # halves of every head are mixed, as positions do
            q, k = (torch.cat([a - b, a + b], -1) for a, b in (each.chunk(2, -1) for each in (q, k)))
        if self.form == "by matmul":
            mixed = ((q @ k.transpose(-2, -1)) * 0.5).softmax(-1) @ v
        else:
            mixed = functional.scaled_dot_product_attention(q, k, v)
        return self.proj(mixed.transpose(1, 2).reshape(n, tokens, WIDTH))


def rows(form: str) -> list[Tensor]:
    """Those of queries, keys and values."""
    order = torch.arange(3 * WIDTH)
    order = order.reshape(HEADS, 3, SIZE).transpose(0, 1) if form == "head by head" else order.reshape(3, HEADS, SIZE)
    return [*order.reshape(3, WIDTH)]


def states(model: nn.Module, count: int = 2) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    base = {name: tensor.double() for name, tensor in model.state_dict().items()}
    drawn = torch.Generator().manual_seed(1)
    return base, [
        {name: x + 0.1 * torch.randn(x.shape, generator=drawn, dtype=x.dtype) for name, x in base.items()}
        for _ in range(count)
    ]


def split(method: str) -> Combiner:
    return COMBINERS[method](packed="split")


@pytest.mark.parametrize("form", FORMS)
def test_the_graph_tells_which_rows_are_queries_keys_and_values(form):
    traits = traits_of_graph(surgery.trace(Attention(form).eval(), torch.randn(2, 5, WIDTH)))
    assert traits["qkv.weight"].parts == tuple(tuple(sorted(own.tolist())) for own in rows(form))
    assert traits["proj.weight"].parts == ()


def test_three_maps_that_are_no_attention_are_one_matrix():
    traits = traits_of_graph(surgery.trace(Attention("gated").eval(), torch.randn(2, 5, WIDTH)))
    assert traits["qkv.weight"].parts == ()


@pytest.mark.parametrize("form", ["unbound", "head by head"])
@pytest.mark.parametrize("method", METHODS)
def test_taken_apart_they_are_combined_like_three_matrices(method, form):
    model = Attention(form).eval()
    base, tuned = states(model)
    traits = traits_of_graph(surgery.trace(model, torch.randn(2, 5, WIDTH)))
    notes: list[str] = []
    found = combine_states(tuned, split(method), base=base, traits=traits, notes=notes)
    whole = combine_states(tuned, COMBINERS[method](), base=base, traits=traits)

    def apart(state: dict[str, Tensor]) -> dict[str, Tensor]:
        three = {f"{name}.weight": state["qkv.weight"][own] for name, own in zip("qkv", rows(form), strict=True)}
        return {**three, "proj.weight": state["proj.weight"]}

    expected = combine_states([apart(each) for each in tuned], COMBINERS[method](), base=apart(base))
    for name, tensor in apart(found).items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=1e-10)
    assert "1 matrices were taken apart into queries, keys and values (first: qkv.weight)" in notes
    assert not torch.allclose(whole["qkv.weight"], found["qkv.weight"], atol=1e-4)
    assert torch.equal(whole["qkv.bias"], found["qkv.bias"])


@pytest.mark.parametrize("method", ["tsv-m", "knots"])
def test_a_merge_takes_them_apart_as_its_graph_tells(method):
    model = Attention("head by head").eval()
    base, tuned = states(model)
    sources = []
    for state in tuned:
        sources.append(Attention("head by head").eval().double())
        sources[-1].load_state_dict(state)
    traits = traits_of_graph(surgery.trace(model, torch.randn(2, 5, WIDTH)))
    options = {"example_inputs": torch.randn(2, 5, WIDTH).double(), "progress": False}
    merged = surgery.merge(sources, base=model.double(), combine=split(method), **options)
    expected = combine_states(tuned, split(method), base=base, traits=traits)
    for name, tensor in merged.state_dict().items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=1e-10)


def test_of_files_names_tell_it_of_one_module_alone_and_the_rest_is_refused(tmp_path):
    attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
    base, tuned = states(attention)
    assert traits_of_states([base])["in_proj_weight"].parts == tuple(tuple(own.tolist()) for own in rows("unbound"))
    found = combine_states(tuned, split("tsv-m"), base=base)
    assert not torch.allclose(
        found["in_proj_weight"], combine_states(tuned, COMBINERS["tsv-m"](), base=base)["in_proj_weight"]
    )
    model = Attention("head by head").eval()
    base, tuned = states(model)
    files = [tmp_path / f"net{number}.safetensors" for number in range(3)]
    for state, file in zip((base, *tuned), files, strict=True):
        save_state_dict(state, file)
    output, options = tmp_path / "out.safetensors", {"packed": "split", "progress": False}
    with pytest.raises(OptionError, match=r"names and shapes do not say[\s\S]*qkv\.weight[\s\S]*--model"):
        surgery.combine_files(files[0], files[1:], output, "tsv-m", **options)
    assert sorted(tmp_path.iterdir()) == sorted(files)
    example = torch.randn(2, 5, WIDTH)
    report = surgery.combine_files(files[0], files[1:], output, "tsv-m", model=model, example_inputs=example, **options)
    traits = traits_of_graph(surgery.trace(model, example))
    expected = combine_states(tuned, split("tsv-m"), base=base, traits=traits)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in load_state_dict(output).items())
    assert any("taken apart" in note for note in report.notes)


def test_another_word_is_refused():
    base, tuned = states(Attention("unbound"))
    for method in METHODS:
        with pytest.raises(OptionError, match=r"unknown packed 'halved'[\s\S]*split"):
            combine_states(tuned, COMBINERS[method](packed="halved"), base=base)
