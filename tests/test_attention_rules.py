"""Attention of torch in all its forms, and its transformers: groups that are right in training and in eval mode."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from proofs import EXACT, Apply, double, outputs, parameter, proven, sizes, vivid
from torch import Tensor, nn

import vfsurgery as surgery
from vfsurgery.discovery import unification
from vfsurgery.discovery.rules import rule_for
from vfsurgery.discovery.verification import relative_error
from vfsurgery.groups.axes import Mixes
from vfsurgery.tracing.transformers import PADDED, one_by_one

TOKENS = torch.randn(4, 5, 6)
OTHERS = torch.randn(4, 7, 6)
PADDING = torch.arange(5)[None] >= torch.tensor([3, 4, 5, 2])[:, None]
INSIDE = [2, 4, 4]
"""Sizes of the groups inside attention: heads, and the units of queries and keys, and of values, in each."""


def net(attend: Callable[..., Tensor], width: int = 8, **options: Any) -> nn.Module:
    """Tokens to embeddings, attention of two heads, and what is made of it."""
    attention = nn.MultiheadAttention(width, 2, **{"batch_first": True, **options})
    keys, values = nn.Linear(6, options.get("kdim") or width), nn.Linear(6, options.get("vdim") or width)
    members = {"embed": nn.Linear(6, width), "attention": attention, "head": nn.Linear(width, 3)}
    return Apply(attend, **members, keys=keys, values=values, weights=nn.Linear(5, 3))


def residual(m: Any, x: Tensor, **options: Any) -> Tensor:
    q = m.embed(x)
    return m.head((q + m.attention(q, q, q, need_weights=False, **options)[0]).mean(1))


def in_a_row(m: Any, x: Tensor) -> Tensor:
    q = m.embed(x)
    return m.head(m.attention(q, q, q)[0])


def cross(m: Any, x: Tensor, z: Tensor) -> Tensor:
    return m.head(m.attention(m.embed(x), m.keys(z), m.values(z))[0])


def with_mean_weights(m: Any, x: Tensor) -> Tensor:
    q = m.embed(x)
    y, weights = m.attention(q, q, q)
    return m.head(y).mean(1) + m.weights(weights[..., :5]).mean(1)


def with_weights_of_heads(m: Any, x: Tensor) -> Tensor:
    q = m.embed(x)
    y, weights = m.attention(q, q, q, average_attn_weights=False)
    return m.head(y).mean(1) + m.weights(weights)[:, 0].mean(1)


@pytest.mark.parametrize("options", [{"bias": False}, {"bias": True}], ids=str)
@pytest.mark.parametrize("added", [{}, {"add_bias_kv": True}, {"add_zero_attn": True}], ids=str)
def test_every_group_of_attention_is_proven(options: dict[str, Any], added: dict[str, Any]) -> None:
    for forward in (residual, with_mean_weights):
        groups = proven(net(forward, **options, **added), TOKENS)
        assert set(INSIDE) < set(sizes(groups)), str(groups)
        moved = {member.parameter for group in groups for member in group.members}
        assert {"attention.bias_k", "attention.bias_v"} <= moved or "add_bias_kv" not in added


@pytest.mark.parametrize("bias", [False, True])
def test_attention_reads_others_and_comes_in_other_layouts(bias: bool) -> None:
    assert sizes(proven(net(in_a_row, bias=bias, batch_first=False), TOKENS)) == [*INSIDE, 8, 8]
    assert sizes(proven(net(cross, bias=bias, kdim=7, vdim=9), TOKENS, OTHERS)) == [*INSIDE, 7, 8, 8, 9]
    assert sizes(proven(net(cross, bias=bias, vdim=9, add_bias_kv=True), TOKENS, OTHERS)) == [*INSIDE, 8, 8, 8, 9]
    alone = net(lambda m, x: residual(m, x)[:1] * 0 + m.head(m.attention(*[m.embed(x[0])] * 3)[0]), bias=bias)
    assert set(INSIDE) < set(sizes(proven(alone, TOKENS)))


def test_masks_leave_units_free_but_not_heads_that_have_masks_of_their_own() -> None:
    causal = torch.ones(5, 5, dtype=torch.bool).triu(1)
    for options in ({"attn_mask": causal}, {"attn_mask": causal, "is_causal": True}, {"key_padding_mask": PADDING}):
        assert sizes(proven(net(lambda m, x, o=options: residual(m, x, **o)), TOKENS)) == [*INSIDE, 8]
    masked = net(lambda m, x, mask: residual(m, x, attn_mask=mask))
    assert sizes(proven(masked, TOKENS, torch.rand(8, 5, 5))) == [4, 4, 8]


def test_weights_that_are_returned_for_each_head_hold_the_heads() -> None:
    assert 2 not in sizes(proven(net(with_weights_of_heads), TOKENS))


def test_tokens_are_units_unless_a_mask_orders_them() -> None:
    def mixed(m: Any, x: Tensor, **options: Any) -> Tensor:
        tokens = m.mix(m.embed(x).transpose(1, 2)).transpose(1, 2)
        return m.out(m.attention(tokens, tokens, tokens, **options)[1]).mean(1)

    free = net(mixed)
    free.mix, free.out = nn.Linear(5, 11), nn.Linear(11, 3)
    assert 11 in sizes(proven(free, TOKENS))
    causal = torch.ones(11, 11, dtype=torch.bool).triu(1)
    held = net(lambda m, x: mixed(m, x, attn_mask=causal))
    held.mix, held.out = free.mix, free.out
    assert 11 not in sizes(proven(held, TOKENS))

    def kernel(m: Any, x: Tensor) -> Tensor:
        tokens = m.mix(m.embed(x).transpose(1, 2)).transpose(1, 2)
        return m.out(F.scaled_dot_product_attention(tokens, tokens, tokens, is_causal=m.causal).transpose(1, 2))

    for causal in (False, True):
        model = Apply(kernel, embed=nn.Linear(6, 8), mix=nn.Linear(5, 11), out=nn.Linear(11, 3))
        model.causal = causal
        assert (11 in sizes(proven(model, TOKENS))) == (not causal)


def test_the_function_is_described_as_the_module() -> None:
    def pooled(m: Any, x: Tensor) -> Tensor:
        q = m.embed(x).transpose(0, 1)
        y, _ = F.multi_head_attention_forward(
            *(q[:1], q, q, 8, 2, None, torch.cat([m.q.bias, m.k.bias, m.v.bias]), None, None, False, 0.0),
            *(m.out.weight, m.out.bias),
            need_weights=False,
            use_separate_proj_weight=True,
            q_proj_weight=m.q.weight,
            k_proj_weight=m.k.weight,
            v_proj_weight=m.v.weight,
        )
        return m.head(y[0])

    members = {name: nn.Linear(8, 8) for name in ("q", "k", "v", "out")}
    groups = proven(Apply(pooled, embed=nn.Linear(6, 8), head=nn.Linear(8, 3), **members), TOKENS)
    assert sizes(groups) == [*INSIDE, 8, 8]


def test_without_what_attention_sums_over_its_groups_would_be_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    def forgetful(op: Any) -> Any:
        rule = rule_for(op)
        return rule and (lambda op: [constraint for constraint in rule(op) if not isinstance(constraint, Mixes)])

    monkeypatch.setattr(unification, "rule_for", forgetful)
    with pytest.raises(AssertionError, match="NOT proven"):
        proven(net(residual, bias=False), TOKENS)


LAYER = {"dropout": 0.0, "batch_first": True}


def encoder(count: int = 2, **options: Any) -> nn.Module:
    layer = nn.TransformerEncoderLayer(8, 2, 16, **LAYER, **options)
    return nn.TransformerEncoder(layer, count, enable_nested_tensor=not options)


def decoder() -> nn.Module:
    return nn.TransformerDecoder(nn.TransformerDecoderLayer(8, 2, 16, **LAYER), 1, norm=nn.LayerNorm(8))


def around(transformer: nn.Module, forward: Callable[..., Tensor]) -> nn.Module:
    return Apply(forward, embed=nn.Linear(6, 8), t=transformer, head=nn.Linear(8, 3))


def mask_of(x: Tensor) -> Tensor:
    return nn.Transformer.generate_square_subsequent_mask(x.shape[1]).to(x)


TRANSFORMERS: dict[str, tuple[nn.Module, tuple[Tensor, ...], list[int]]] = {
    "encoder": (around(encoder(), lambda m, x: m.head(m.t(m.embed(x)).mean(1))), (TOKENS,), [*INSIDE, 16] * 2),
    "norm first, gelu": (
        around(encoder(1, norm_first=True, activation="gelu"), lambda m, x: m.head(m.t(m.embed(x)).mean(1))),
        (TOKENS,),
        [*INSIDE, 16],
    ),
    "without bias": (
        around(encoder(1, bias=False), lambda m, x: m.head(m.t(m.embed(x)).mean(1))),
        (TOKENS,),
        [*INSIDE, 16],
    ),
    "layer alone": (
        around(encoder(1).layers[0], lambda m, x: m.head(m.t(m.embed(x)).mean(1))),
        (TOKENS,),
        [*INSIDE, 16],
    ),
    "any mask": (
        around(encoder(1), lambda m, x: m.head(m.t(m.embed(x), torch.ones(5, 5).triu(1).bool()).mean(1))),
        (TOKENS,),
        [*INSIDE, 16],
    ),
    "causal": (
        around(encoder(1), lambda m, x: m.head(m.t(m.embed(x), mask_of(x), is_causal=True).mean(1))),
        (TOKENS,),
        [*INSIDE, 16],
    ),
    "decoder": (
        around(decoder(), lambda m, x, z: m.head(m.t(m.embed(x), m.embed(z), tgt_mask=mask_of(x)))),
        (TOKENS, OTHERS),
        [*INSIDE, *INSIDE, 16],
    ),
    "both": (
        around(
            nn.Transformer(8, 2, 1, 1, 16, **LAYER),
            lambda m, x, z: m.head(m.t(m.embed(x), m.embed(z), tgt_mask=mask_of(z))),
        ),
        (TOKENS, OTHERS),
        [*INSIDE, 16, *INSIDE, *INSIDE, 16],
    ),
}


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_transformers_are_traced_through(name: str) -> None:
    model, x, inside = TRANSFORMERS[name]
    assert sizes(proven(model, *x)) == sorted([*inside, 8])
    model, x = vivid(model), double(x)
    graph_module = surgery.trace(model, x)
    assert list(graph_module.state_dict()) == list(model.state_dict())
    twice = tuple(torch.cat([tensor, 2 * tensor]) for tensor in x)
    for given, training in ((x, False), (x, True), (twice, False)):
        assert relative_error(outputs(graph_module, given, training), outputs(model, given, training)) < EXACT


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_padded_positions_are_the_one_difference_and_are_named() -> None:
    def forward(m: Any, x: Tensor, padding: Tensor) -> Tensor:
        y = m.t(m.embed(x), src_key_padding_mask=padding)
        return m.head(y.masked_fill(padding.unsqueeze(-1), 0.0).sum(1))

    model, x = vivid(around(encoder(1), forward)), double((TOKENS, PADDING))
    assert sizes(proven(model, *x)) == sorted([*INSIDE, 8, 16])
    graph_module = surgery.trace(model, x)
    assert relative_error(outputs(graph_module, x), outputs(model, x)) < EXACT
    assert PADDED in graph_module.meta["guards"]
    smaller = surgery.prune_units(model, 0.5, example_inputs=x, renormalize=None, progress=False)
    assert smaller.t.layers[0].linear1.out_features == 8


def test_torch_is_left_as_it_was() -> None:
    before = nn.TransformerEncoder.forward, F._none_or_dtype, torch.backends.mha.get_fastpath_enabled()
    with pytest.raises(ZeroDivisionError), one_by_one():
        assert not torch.backends.mha.get_fastpath_enabled()
        _ = 1 / 0
    assert (nn.TransformerEncoder.forward, F._none_or_dtype, torch.backends.mha.get_fastpath_enabled()) == before


def test_transformers_merge_and_lose_hidden_units() -> None:
    model, x = (part for part in (TRANSFORMERS["encoder"][0], TRANSFORMERS["encoder"][1][0]))
    merged = surgery.merge(model, vivid(model).float(), data=torch.cat([x] * 16), progress=False)
    assert type(merged) is type(model)
    smaller = surgery.prune_units(model, 0.25, example_inputs=x, renormalize=None, progress=False)
    assert [layer.linear1.out_features for layer in smaller.t.layers] == [12, 12]


def test_a_table_of_heads_is_a_group_of_heads() -> None:
    def biased(m: Any, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (2, 4)).transpose(1, 2) for f in (m.q, m.k, m.v))
        return m.head(F.scaled_dot_product_attention(q, k, v, attn_mask=m.table).transpose(1, 2).flatten(2))

    members = {name: nn.Linear(6, 8) for name in ("q", "k", "v")}
    groups = proven(Apply(biased, table=parameter(2, 5, 5), head=nn.Linear(8, 3), **members), TOKENS)
    assert sizes(groups) == INSIDE
