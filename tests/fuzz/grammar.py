"""What random networks are made of: one function a kind of step, each with the chance to be drawn.

A step takes a value that is there and makes a new one. :func:`draw` makes a whole network from a seed.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field

from program import Program, Statement, Value

WIDTHS = (4, 6, 8, 12)
MOST_NUMBERS = 600  # of a map's numbers that a linear layer reads


@dataclass
class Draft:
    """A network in the making."""

    rng: random.Random
    spelling: random.Random  # a stream of its own: how a step is written does not change which steps are drawn
    input: Value
    statements: list[Statement] = field(default_factory=list)
    wiring: list[str] = field(default_factory=list)
    convs: list[tuple[str, Value, Value]] = field(default_factory=list)  # module, what it read, what it made
    count: int = 0

    def name(self, stem: str) -> str:
        """A name that is not taken."""
        self.count += 1
        return f"{stem}{self.count}"

    def batch_size(self) -> str:
        """How many inputs ``{x}`` holds, in one of the ways that people write it."""
        return self.spelling.choice(["{x}.shape[0]", "{x}.size(0)", "len({x})"])

    def add(
        self,
        x: Value,
        shape: tuple[int, ...],
        code: str | list[str],
        setup: list[str] | None = None,
        *,
        kind: str | None = None,
        reads: tuple[str, ...] = (),
        has: str = "",
    ) -> Value:
        """Append a step; ``{y}`` in its code is what it makes, ``{x}`` what it reads."""
        made = Value(self.name("v"), shape, kind or x.kind)
        lines = [code] if isinstance(code, str) else code
        self.statements.append(
            Statement(
                made,
                (x.name, *reads),
                tuple(line.replace("{y}", made.name).replace("{x}", x.name) for line in lines),
                tuple(setup or ()),
                has=frozenset(has.split()),
            )
        )
        return made


Step = Callable[[Draft, Value], Value | None]
STEPS: dict[str, list[tuple[Step, int]]] = {"map": [], "tokens": [], "vector": []}


def step(*kinds: str, weight: int = 2) -> Callable[[Step], Step]:
    """Enter a step for values of some kinds."""

    def enter(function: Step) -> Step:
        for kind in kinds:
            STEPS[kind].append((function, weight))
        return function

    return enter


def channels_dim(x: Value) -> int:
    return 1 if x.kind == "map" else -1


def per_channel(x: Value) -> str:
    """Index that brings a vector of channels in front of the dims behind them."""
    return "[:" + ", None" * x.spatial + "]" if x.kind == "map" else ""


# -- maps --------------------------------------------------------------------------------------------------------------


@step("map", weight=8)
def convolution(d: Draft, x: Value) -> Value:
    width, kernel = d.rng.choice(WIDTHS), d.rng.choice((1, 3))
    stride = 2 if min(x.shape[1:]) >= 6 and d.rng.random() < 0.3 else 1
    groups = d.rng.choice([1, 1, 1, *(g for g in (2, x.units) if x.units % g == 0 and width % g == 0)])
    mode = d.rng.choice(["zeros", "zeros", "circular", "replicate"]) if min(x.shape[1:]) >= 2 else "zeros"
    options = f"stride={stride}, padding={kernel // 2}, groups={groups}, bias={d.rng.random() < 0.5}"
    if kernel == 3 and mode != "zeros":
        options += f", padding_mode={mode!r}"
    module = d.name("conv")
    shape = (width, *((size - 1) // stride + 1 for size in x.shape[1:]))
    made = d.add(
        x,
        shape,
        f"{{y}} = self.{module}({{x}})",
        [f"self.{module} = nn.Conv{x.spatial}d({x.units}, {width}, {kernel}, {options})"],
    )
    if stride == 1:
        d.convs.append((module, x, made))
    return made


@step("map", weight=1)
def transposed_convolution(d: Draft, x: Value) -> Value | None:
    if max(x.shape[1:]) > 6:
        return None
    width, module = d.rng.choice(WIDTHS), d.name("up")
    return d.add(
        x,
        (width, *(2 * size for size in x.shape[1:])),
        f"{{y}} = self.{module}({{x}})",
        [f"self.{module} = nn.ConvTranspose{x.spatial}d({x.units}, {width}, 2, 2)"],
    )


@step("map", weight=6)
def norm_of_map(d: Draft, x: Value) -> Value:
    choices = [f"nn.BatchNorm{x.spatial}d({x.units})"] * 4
    choices += [f"nn.GroupNorm({g}, {x.units})" for g in (1, 2, x.units) if x.units % g == 0]
    if min(x.shape[1:]) > 1:
        choices += [f"nn.InstanceNorm{x.spatial}d({x.units}, affine=True)"]
    module = d.name("norm")
    return d.add(x, x.shape, f"{{y}} = self.{module}({{x}})", [f"self.{module} = {d.rng.choice(choices)}"])


@step("map", weight=1)
def norm_over_channels_last(d: Draft, x: Value) -> Value:
    module = d.name("norm")
    return d.add(
        x,
        x.shape,
        f"{{y}} = self.{module}({{x}}.movedim(1, -1)).movedim(-1, 1)",
        [f"self.{module} = nn.LayerNorm({x.units})"],
    )


@step("map", weight=2)
def pooling(d: Draft, x: Value) -> Value | None:
    if min(x.shape[1:]) < 4:
        return None
    kind = d.rng.choice(["max", "avg"])
    return d.add(x, (x.units, *(s // 2 for s in x.shape[1:])), f"{{y}} = F.{kind}_pool{x.spatial}d({{x}}, 2)")


@step("map", weight=1)
def shuffle_channels(d: Draft, x: Value) -> Value | None:
    if x.units % 2:
        return None
    sizes = "*{x}.shape[2:]"
    return d.add(
        x,
        x.shape,
        f"{{y}} = {{x}}.view({d.batch_size()}, 2, {x.units // 2}, {sizes}).transpose(1, 2).reshape({{x}}.shape)",
    )


@step("map", weight=1)
def squeeze_and_excite(d: Draft, x: Value) -> Value:
    module, dims = d.name("gate"), tuple(range(2, 2 + x.spatial))
    index = "[:, :" + ", None" * x.spatial + "]"
    return d.add(
        x,
        x.shape,
        f"{{y}} = {{x}} * self.{module}({{x}}.mean({dims})).sigmoid(){index}",
        [f"self.{module} = nn.Sequential(nn.Linear({x.units}, 4), nn.ReLU(), nn.Linear(4, {x.units}))"],
    )


@step("map", weight=2)
def conv_again(d: Draft, x: Value) -> Value | None:
    """A module called once more, on another value."""
    fitting = [(name, made) for name, read, made in d.convs if read.shape == x.shape]
    if not fitting:
        return None
    module, made = d.rng.choice(fitting)
    return d.add(x, made.shape, f"{{y}} = self.{module}({{x}})")


@step("map", weight=2)
def shared_head(d: Draft, x: Value) -> Value:
    """One convolution and norm for a map and for its half, as heads over pyramids are."""
    conv, norm = d.name("conv"), d.name("norm")
    small = f"F.adaptive_avg_pool{x.spatial}d({{x}}, 2)"
    back = f"F.adaptive_avg_pool{x.spatial}d(v, {tuple(x.shape[1:])})"
    return d.add(
        x,
        x.shape,
        [
            f"v = self.{norm}(self.{conv}({small} + 0.5))",
            f"{{y}} = F.relu(self.{norm}(self.{conv}({{x}}))) + {back}",
        ],
        [
            f"self.{conv} = nn.Conv{x.spatial}d({x.units}, {x.units}, 3, padding=1)",
            f"self.{norm} = nn.BatchNorm{x.spatial}d({x.units})",
        ],
        has="repeated_norm",
    )


@step("map", weight=2)
def residual_block(d: Draft, x: Value) -> Value:
    module = d.name("block")
    conv, norm = f"nn.Conv{x.spatial}d", f"nn.BatchNorm{x.spatial}d"
    width = d.rng.choice(WIDTHS)
    inside = f"{conv}({x.units}, {width}, 3, padding=1, bias=False), {norm}({width}), nn.ReLU(inplace=True), "
    inside += f"{conv}({width}, {x.units}, 1), {norm}({x.units})"
    return d.add(
        x, x.shape, f"{{y}} = F.relu({{x}} + self.{module}({{x}}))", [f"self.{module} = nn.Sequential({inside})"]
    )


@step("map", weight=2)
def to_tokens(d: Draft, x: Value) -> Value | None:
    places = 1
    for size in x.shape[1:]:
        places *= size
    if places > 36:
        return None
    flat = d.spelling.choice(["flatten(2)", f"reshape({d.batch_size()}, {x.units}, -1)"])
    return d.add(x, (places, x.units), f"{{y}} = {{x}}.{flat}.transpose(1, 2)", kind="tokens")


@step("map", weight=1)
def to_vector(d: Draft, x: Value) -> Value:
    numbers = x.units
    for size in x.shape[1:]:
        numbers *= size
    if numbers <= MOST_NUMBERS and d.rng.random() < 0.5:
        flat = d.spelling.choice(["flatten(1)", f"reshape({d.batch_size()}, -1)"])
        return d.add(x, (numbers,), f"{{y}} = {{x}}.{flat}", kind="vector")
    return d.add(x, (x.units,), f"{{y}} = {{x}}.mean({tuple(range(2, 2 + x.spatial))})", kind="vector")


# -- tokens ------------------------------------------------------------------------------------------------------------


@step("tokens", "vector", weight=6)
def linear(d: Draft, x: Value) -> Value:
    module, width = d.name("fc"), d.rng.choice(WIDTHS)
    made = d.add(
        x,
        (*x.shape[:-1], width),
        f"{{y}} = self.{module}({{x}})",
        [f"self.{module} = nn.Linear({x.units}, {width}, bias={d.rng.random() < 0.7})"],
    )
    return made


@step("tokens", weight=3)
def norm_of_tokens(d: Draft, x: Value) -> Value:
    module = d.name("norm")
    kind = d.rng.choice([f"nn.LayerNorm({x.units})", f"nn.RMSNorm({x.units})", f"nn.LayerNorm({x.units}, bias=False)"])
    return d.add(x, x.shape, f"{{y}} = self.{module}({{x}})", [f"self.{module} = {kind}"])


@step("vector", weight=3)
def norm_of_vector(d: Draft, x: Value) -> Value:
    module = d.name("norm")
    kind = d.rng.choice(
        [f"nn.BatchNorm1d({x.units})", f"nn.LayerNorm({x.units})", f"nn.BatchNorm1d({x.units}, affine=False)"]
    )
    return d.add(x, x.shape, f"{{y}} = self.{module}({{x}})", [f"self.{module} = {kind}"])


@step("tokens", weight=3)
def multihead_attention(d: Draft, x: Value) -> Value | None:
    if x.units % 2:
        return None
    module = d.name("attn")
    options = f"bias={d.rng.random() < 0.6}, add_bias_kv={d.rng.random() < 0.2}, batch_first=True"
    residual = "{x} + " if d.rng.random() < 0.7 else ""
    weights = ", need_weights=False" if d.rng.random() < 0.5 else ""
    return d.add(
        x,
        x.shape,
        f"{{y}} = {residual}self.{module}({{x}}, {{x}}, {{x}}{weights})[0]",
        [f"self.{module} = nn.MultiheadAttention({x.units}, 2, {options})"],
    )


@step("tokens", weight=3)
def packed_attention(d: Draft, x: Value) -> Value:
    """Queries, keys and values from one linear layer, as timm writes it."""
    qkv, proj, head = d.name("qkv"), d.name("proj"), d.rng.choice((2, 3))
    inner = 2 * head
    spelled = d.rng.choice(
        [
            "F.scaled_dot_product_attention(q, k, v)",
            f"((q @ k.transpose(-2, -1)) * {head**-0.5!r}).softmax(-1) @ v",
        ]
    )
    return d.add(
        x,
        x.shape,
        [
            f"q, k, v = self.{qkv}({{x}}).reshape({d.batch_size()}, -1, 3, 2, {head}).permute(2, 0, 3, 1, 4).unbind(0)",
            f"v = {spelled}",
            f"{{y}} = {{x}} + self.{proj}(v.transpose(1, 2).reshape({d.batch_size()}, -1, {inner}))",
        ],
        [
            f"self.{qkv} = nn.Linear({x.units}, {3 * inner}, bias={d.rng.random() < 0.5})",
            f"self.{proj} = nn.Linear({inner}, {x.units})",
        ],
    )


@step("tokens", weight=2)
def mlp(d: Draft, x: Value) -> Value:
    one, two = d.name("fc"), d.name("fc")
    width = d.rng.choice(WIDTHS)
    gated = d.rng.random() < 0.4
    code = [f"a, b = self.{one}({{x}}).chunk(2, -1)", f"{{y}} = {{x}} + self.{two}(F.silu(a) * b)"]
    if not gated:
        code = [f"{{y}} = {{x}} + self.{two}(F.gelu(self.{one}({{x}})))"]
    first = 2 * width if gated else width
    return d.add(
        x,
        x.shape,
        code,
        [f"self.{one} = nn.Linear({x.units}, {first})", f"self.{two} = nn.Linear({width}, {x.units})"],
    )


@step("tokens", weight=1)
def positions(d: Draft, x: Value) -> Value:
    name = d.name("pos")
    return d.add(
        x, x.shape, f"{{y}} = {{x}} + self.{name}", [f"self.{name} = nn.Parameter(torch.randn{(1, *x.shape)})"]
    )


@step("tokens", weight=1)
def class_token(d: Draft, x: Value) -> Value | None:
    if x.shape[0] > 36:
        return None
    name = d.name("cls")
    return d.add(
        x,
        (x.shape[0] + 1, x.units),
        f"{{y}} = torch.cat([self.{name}.expand({d.batch_size()}, -1, -1), {{x}}], 1)",
        [f"self.{name} = nn.Parameter(torch.randn(1, 1, {x.units}))"],
    )


@step("tokens", weight=2)
def recurrent(d: Draft, x: Value) -> Value:
    module, width, cell = d.name("rnn"), d.rng.choice((4, 6)), d.rng.choice(("LSTM", "GRU", "RNN"))
    layers, both = d.rng.choice((1, 1, 2)), d.rng.random() < 0.3
    options = f"num_layers={layers}, bidirectional={both}, batch_first=True, bias={d.rng.random() < 0.8}"
    return d.add(
        x,
        (x.shape[0], width * (2 if both else 1)),
        f"{{y}} = self.{module}({{x}})[0]",
        [f"self.{module} = nn.{cell}({x.units}, {width}, {options})"],
    )


@step("tokens", weight=1)
def low_rank(d: Draft, x: Value) -> Value:
    """A linear layer with a low-rank term beside it."""
    base, a, b, width = d.name("fc"), d.name("A"), d.name("B"), d.rng.choice(WIDTHS)
    code = d.rng.choice(
        [
            f"{{y}} = self.{base}({{x}}) + {{x}} @ self.{a}.T @ self.{b}.T",
            f"{{y}} = F.linear({{x}}, self.{base}.weight + self.{b} @ self.{a}, self.{base}.bias)",
        ]
    )
    return d.add(
        x,
        (*x.shape[:-1], width),
        code,
        [
            f"self.{base} = nn.Linear({x.units}, {width})",
            f"self.{a} = nn.Parameter(torch.randn(3, {x.units}) * 0.3)",
            f"self.{b} = nn.Parameter(torch.randn({width}, 3) * 0.3)",
        ],
    )


@step("tokens", weight=2)
def tokens_to_vector(d: Draft, x: Value) -> Value:
    code = d.rng.choice(["{y} = {x}.mean(1)", "{y} = {x}[:, 0]", "{y} = {x}.amax(1)"])
    return d.add(x, (x.units,), code, kind="vector")


# -- everything --------------------------------------------------------------------------------------------------------

ACTIVATIONS = (
    "F.relu({x})", "F.gelu({x})", "F.silu({x})", "F.leaky_relu({x}, 0.1)", "torch.tanh({x})", "{x}.sigmoid() * {x}",
    "torch.where({x} > 0, {x}, 0.1 * {x})", "{x}.masked_fill({x} < -0.5, -0.5)", "{x}.clamp(-1, 2)",
    "{x} * ({x} > 0)", "F.elu({x})", "torch.maximum({x}, 0.2 * {x})",
)  # fmt: skip


@step("map", "tokens", "vector", weight=7)
def activation(d: Draft, x: Value) -> Value:
    return d.add(x, x.shape, "{y} = " + d.rng.choice(ACTIVATIONS))


@step("map", "tokens", "vector", weight=2)
def activation_in_place(d: Draft, x: Value) -> Value:
    """The value that it overwrites may be read again."""
    return d.add(
        x, x.shape, "{y} = " + d.rng.choice(["{x}.relu_()", "F.hardswish({x}, inplace=True)", "{x}.mul_(0.7)"])
    )


@step("map", weight=1)
def prelu(d: Draft, x: Value) -> Value:
    module = d.name("act")
    return d.add(x, x.shape, f"{{y}} = self.{module}({{x}})", [f"self.{module} = nn.PReLU({x.units})"])


@step("map", "tokens", "vector", weight=1)
def dropout(d: Draft, x: Value) -> Value:
    if d.rng.random() < 0.5:
        return d.add(x, x.shape, "{y} = F.dropout({x}, 0.3, self.training)", has="dropout")
    module = d.name("drop")
    return d.add(x, x.shape, f"{{y}} = self.{module}({{x}})", [f"self.{module} = nn.Dropout(0.3)"], has="dropout")


@step("map", "tokens", "vector", weight=5)
def add_earlier(d: Draft, x: Value) -> Value | None:
    others = [s.made for s in d.statements if s.made.shape == x.shape and s.made.kind == x.kind and s.made != x]
    if not others:
        return None
    other = d.rng.choice(others)
    code = d.rng.choice(
        ["{x} + {o}", "{x} + {o}", "{x} * {o}.sigmoid()", "torch.add({x}, {o}, alpha=0.5)", "{x} - {o}"]
    )
    return d.add(x, x.shape, "{y} = " + code.replace("{o}", other.name), reads=(other.name,))


@step("map", "tokens", "vector", weight=2)
def cat_earlier(d: Draft, x: Value) -> Value | None:
    def fits(v: Value) -> bool:
        rest = v.shape[1:] == x.shape[1:] if x.kind == "map" else v.shape[:-1] == x.shape[:-1]
        return v.kind == x.kind and v != x and rest and v.units + x.units <= 24

    others = [s.made for s in d.statements if fits(s.made)]
    if not others:
        return None
    other = d.rng.choice(others)
    shape = (x.units + other.units, *x.shape[1:]) if x.kind == "map" else (*x.shape[:-1], x.units + other.units)
    return d.add(x, shape, f"{{y}} = torch.cat([{{x}}, {other.name}], {channels_dim(x)})", reads=(other.name,))


@step("map", "tokens", "vector", weight=2)
def take_apart(d: Draft, x: Value) -> Value:
    """Halves that are gated, swapped or weighted apart."""
    dim, half = channels_dim(x), x.units // 2
    split = d.rng.choice([f"{{x}}.chunk(2, {dim})", f"torch.split({{x}}, [{half}, {x.units - half}], {dim})"])
    way = d.rng.choice(["gate", "swap", "half"])
    if way == "swap":
        return d.add(x, x.shape, [f"a, b = {split}", f"{{y}} = torch.cat([b, a * 2], {dim})"])
    shape = (half, *x.shape[1:]) if x.kind == "map" else (*x.shape[:-1], half)
    if x.units % 2 or half < 2:
        return d.add(x, x.shape, "{y} = {x} * 0.5")
    return d.add(x, shape, [f"a, b = {split}", "{y} = a * b.sigmoid()" if way == "gate" else "{y} = a"])


@step("map", "tokens", "vector", weight=2)
def scale_by_tensor(d: Draft, x: Value) -> Value:
    """Per-unit numbers in a parameter, in a buffer that is saved, or in one that is not."""
    name = d.name("scale")
    how = d.rng.choice(["parameter", "buffer", "unsaved", "mask", "index", "attribute"])
    index = per_channel(x)
    numbers = f"torch.linspace(0.5, 1.5, {x.units})"
    setup = {
        "parameter": f"self.{name} = nn.Parameter({numbers})",
        "buffer": f"self.register_buffer({name!r}, {numbers})",
        "unsaved": f"self.register_buffer({name!r}, {numbers}, persistent=False)",
        "mask": f"self.register_buffer({name!r}, torch.arange({x.units}) % 3 > 0)",
        "index": f"self.register_buffer({name!r}, torch.arange({x.units}).roll(1))",
        "attribute": f"self.{name} = {numbers}.double()",
    }[how]
    code = f"{{y}} = {{x}} * self.{name}{index}"
    if how == "index":
        code = f"{{y}} = {{x}}.index_select({channels_dim(x)}, self.{name})"
    return d.add(x, x.shape, code, [setup])


@step("map", "tokens", "vector", weight=1)
def cast(d: Draft, x: Value) -> Value:
    code = d.rng.choice(
        ["{x}.float().to({x}.dtype)", "{x}.to(torch.float32).double()", "{x}.type_as({x})", "{x}.double()"]
    )
    return d.add(x, x.shape, "{y} = " + code, has="cast")


@step("map", "tokens", "vector", weight=1)
def dead_branch(d: Draft, x: Value) -> Value:
    """A layer that never runs, and one whose result nobody reads."""
    never, unread = d.name("never"), d.name("unread")
    layer = f"nn.Conv{x.spatial}d({x.units}, 4, 1)" if x.kind == "map" else f"nn.Linear({x.units}, 4)"
    return d.add(
        x,
        x.shape,
        [f"self.{unread}({{x}})", "{y} = {x} * 1.5"],
        [f"self.{never} = nn.Linear(3, 3)", f"self.{unread} = {layer}"],
    )


@step("map", "tokens", "vector", weight=1)
def counter(d: Draft, x: Value) -> Value:
    """A forward that writes into a buffer."""
    name = d.name("calls")
    return d.add(
        x,
        x.shape,
        [f"self.{name} += 1", "{y} = {x} + 0"],
        [f"self.register_buffer({name!r}, torch.zeros((), dtype=torch.int64))"],
        has="counter",
    )


@step("map", "tokens", "vector", weight=1)
def two_dtypes(d: Draft, x: Value) -> Value:
    name = d.name("steps")
    return d.add(
        x,
        x.shape,
        f"{{y}} = {{x}} * (1 + 0.1 * self.{name})",
        [f"self.register_buffer({name!r}, torch.tensor(3, dtype=torch.int32))"],
    )


def draw(seed: int) -> Program:
    """The network of a seed."""
    rng = random.Random(seed)
    spatial = rng.choice((1, 2, 2, 2, 2, 3, 0, 0))
    side = {1: 12, 2: 8, 3: 4}.get(spatial, 0)
    x = Value(
        "x",
        (3, *(side for _ in range(spatial))) if spatial else rng.choice([(5, 6), (6, 8)]),
        "map" if spatial else "tokens",
    )
    d = Draft(rng, random.Random(f"spelling {seed}"), x)
    value = convolution(d, x) if spatial else linear(d, x)
    for _ in range(rng.randint(3, 10)):
        choices = STEPS[value.kind]
        chosen = rng.choices([s for s, _ in choices], [w for _, w in choices])[0]
        value = chosen(d, value) or value
    aux = _training_head(d, value) if rng.random() < 0.15 else None
    while value.kind != "vector":
        value = to_vector(d, value) if value.kind == "map" else tokens_to_vector(d, value)
    hidden = value
    logits = d.add(value, (4,), "{y} = self.head({x})", [f"self.head = nn.Linear({value.units}, 4)"])
    _wire(d)
    return Program(seed, x, tuple(d.statements), _returned(rng, logits, hidden, aux), tuple(d.wiring))


def _training_head(d: Draft, value: Value) -> Value:
    """A head that only training uses; in eval mode it gives nothing."""
    module, pooled = d.name("aux"), "{x}"
    if value.kind != "vector":
        pooled = f"{{x}}.mean({tuple(range(2, 2 + value.spatial)) if value.kind == 'map' else 1})"
    return d.add(
        value,
        (4,),
        f"{{y}} = self.{module}({pooled}) if self.training else None",
        [f"self.{module} = nn.Linear({value.units}, 4)"],
        kind="aux",
        has="training_head",
    )


def _returned(rng: random.Random, logits: Value, hidden: Value, aux: Value | None) -> str:
    if aux is not None:
        return f"({logits.name}, {aux.name}) if self.training else {logits.name}"
    ways = [logits.name] * 4 + [
        f"({logits.name}, {hidden.name} * 2)",
        f"{{'logits': {logits.name}}}",
        f"Result(logits={logits.name}, hidden={logits.name} * 2)",
        f"({logits.name}, {logits.name} > 0)",
    ]
    return rng.choice(ways)


def _wire(d: Draft) -> None:
    """Modules under a second path, tied weights, and hooks that leave values alone."""
    rng, lines = d.rng, [line for s in d.statements for line in s.setup]
    calls = [line.split(" = ")[0] for line in lines if " = nn." in line and "nn.Parameter" not in line]
    calls = [module for module in calls if "never" not in module]
    if calls and rng.random() < 0.25:
        chosen = rng.sample(calls, min(len(calls), 2))
        d.wiring.append(
            rng.choice([f"self.alias = {chosen[0]}", f"self.encoder = nn.ModuleList([{', '.join(chosen)}])"])
        )
    if rng.random() < 0.15:
        weights: dict[str, list[str]] = {}
        for line in lines:
            if " = nn.Linear(" in line and "never" not in line:
                sizes = line.split("nn.Linear(")[1].split(")")[0].split(", bias")[0]
                weights.setdefault(sizes, []).append(line.split(" = ")[0])
        pairs = [names for names in weights.values() if len(names) > 1]
        if pairs:
            one, two = rng.sample(rng.choice(pairs), 2)
            d.wiring.append(f"{two}.weight = {one}.weight")
    if calls and rng.random() < 0.15:
        place = rng.choice([*calls, "self"])
        ways = ["forward_hook(lambda module, args, result: None)", "forward_pre_hook(lambda module, args: None)"]
        if place != "self":  # torch warns of one on a module that returns a dict
            ways.append("full_backward_hook(lambda module, grads, outputs: None)")
        d.wiring.append(f"{place}.register_{rng.choice(ways)}")
