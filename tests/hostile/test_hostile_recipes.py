"""Recipes that would run code, fill memory or leave their folder; and junk, which is a recipe or a RecipeError."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vfsurgery.cli import main
from vfsurgery.errors import RecipeError
from vfsurgery.recipes.recipe import Recipe
from vfsurgery.recipes.sections import Source
from vfsurgery.recipes.stage import STAGES

STAGED = "name: staged\ndata: {name: digits}\nsources: ['vfsurgery.networks.demo:TinyConvNet', {}]\nstages: [merge]\n"
TINY = "name: tiny\nruns:\n- {name: conv, sources: ['vfsurgery.networks.demo:TinyConvNet', {}], stages: [merge]}\n"


def refused(text: str) -> str:
    """The message, which is short and can be printed whatever the recipe holds."""
    with pytest.raises(RecipeError, match=r"^the recipe") as caught:
        Recipe.from_yaml(text)
    message = str(caught.value)
    assert len(message) < 2500 and message.replace("\n", "").isprintable()
    return message


TAGS = [
    "!!python/object/apply:os.system ['touch {canary}']",
    "!!python/object/apply:builtins.eval [\"open('{canary}', 'w')\"]",
    "!!python/object/new:os.system ['touch {canary}']",
    "!!python/object/apply:subprocess.check_call [[touch, {canary}]]",
    "!!python/object/apply:pathlib.Path.touch [!!python/object/apply:pathlib.Path ['{canary}']]",
    "!!python/object:vfsurgery.recipes.recipe.Recipe {{}}",
    "!!python/name:os.system",
    "!!python/module:antigravity",
    "!!python/tuple [1, 2]",
    "!!python/bytes aGVsbG8=",
    "!!python/object/new:type {{args: [z, !!python/tuple [], {{}}]}}",
    "!<tag:yaml.org,2002:python/object/apply:os.system> ['touch {canary}']",
    "!include /etc/passwd",
    "!env HOME",
    "!!js/function 'return 1'",
    "!ruby/object:Gem::Installer {{i: x}}",
]


@pytest.mark.parametrize("tag", TAGS)
@pytest.mark.parametrize(
    "place", ["name: {}\nruns: []\n", "name: tiny\nsources:\n  - {{name: a, model: {} }}\n", "{}\n "]
)
def test_tags_make_nothing(tmp_path: Path, tag: str, place: str) -> None:
    message = refused(place.format(tag.format(canary=tmp_path / "canary")))
    assert "not valid YAML\n  cause  could not determine a constructor for the tag" in message
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("text", ["!include x.yaml", "$HOME", "${HOME}", "{{ name }}", "~/x", "`id`", "$(id)"])
def test_text_stays_text(text: str) -> None:
    recipe = Recipe.from_yaml(f"source: {text!r}\n{TINY}")
    assert recipe.source == text


def laughs(levels: int, width: int = 10, kind: str = "list") -> str:
    lines = ["a0: &a0 [lol]" if kind == "list" else "a0: &a0 {k0: lol}"]
    for level in range(1, levels):
        parts = [f"*a{level - 1}"] * width
        body = (
            f"[{', '.join(parts)}]" if kind == "list" else f"{{{', '.join(f'k{n}: {p}' for n, p in enumerate(parts))}}}"
        )
        lines.append(f"a{level}: &a{level} {body}")
    return "\n".join(lines) + "\n"


BOMBS = {
    "a billion laughs": laughs(10),
    "two to the hundred": laughs(19, 2) + "b: &b [*a18, *a18]\n",
    "maps": laughs(10, kind="map"),
    "merged": laughs(9) + "c: {<<: [*a8, *a8]}\n",
    "in a run": TINY + laughs(10),
    "an alias of itself": "a: &a [*a]\n",
    "a mapping in itself": "a: &a {b: *a}\n",
    "itself merged": "a: &a {<<: *a}\n",
    "the whole in itself": "&a\na: *a\n",
    "lists in lists": "a: " + "[" * 900 + "]" * 900 + "\n",
    "lists without end": "a: " + "[" * 3000 + "\n",
    "maps in maps": "a: " + "{a: " * 2000 + "1" + "}" * 2000 + "\n",
    "a little too deep": "a: " + "[" * 22 + "]" * 22 + "\n",
    "indented": "\n".join(" " * level + "a:" for level in range(300)) + "\n",
    "large": "a: " + "x" * 300_000 + "\n",
    "an alias of nothing": "a: *b\n",
}


@pytest.mark.parametrize("text", BOMBS.values(), ids=BOMBS.keys())
def test_bombs_do_not_go_off(text: str) -> None:
    assert "is not valid YAML" in refused(text)


def test_aliases_that_stay_small_are_fine() -> None:
    text = STAGED.replace("[merge]", "[{train: &t {epochs: 3}}, {train: *t}, merge]")
    assert [stage.epochs for stage in Recipe.from_yaml(text).stages[:2]] == [3, 3]


VALUES = [
    *("seed: 9" + "9" * 5000, "seed: 9" + "9" * 40, "seed: 0x" + "f" * 6000, "seed: -1", "seed: 1.5", "seed: true"),
    *("seed: 18446744073709551616", "threads: 0", "threads: 1000000000", "threads: -1", "seed: .nan", "seed: .inf"),
    *("seed: -.inf", "seed: 1e999", "seed: '5'", "seed: 2001-99-99", "seed: 2001-01-01", "seed: 1.2:3"),
    *("seed: !!float x", "seed: !!int ''", "seed: !!int x", "seed: !!timestamp x", "seed: !!binary '%%%'"),
    *("seed: !!bool x", "seed: 0b", "seed: 0x", "seed: !!float ''", "seed: !!int '0x'"),
    *("device: cuda:9999999999999999999999", "device: /dev/sda", "device: 'cpu\\n'", "resume: [a]", "source: {a: 1}"),
    *("? [a, b]\n: 1", "? {a: b}\n: 1", "1: 2", "null: 2", "~: 2", "2001-01-01: x", ".nan: x", "true: x", "'': x"),
    *("seed: 0\nseed: 1", "'seed': 0\nseed: 1", "data: {seed: 1, seed: 2}", "? &k seed\n: 1\n? *k\n: 2"),
    *("data: {name: digits, seed: 9" + "9" * 5000 + "}", "data: {size: -1}", "data: {name: cifar10, path: 3}"),
    *("data: !!set {a, b}", "data: !!omap [a: 1]", "data: !!pairs [a: 1]", "data: [", "data: ]", "data: '", "\t"),
    *("\"\\x1b[2J\": 1", "\"\\u202e\": 1", '"a\\nb": 1', "k" * 100_000 + ": 1", "source: \"\\ud800\"", "reduced: 3"),
    *("--- \na: 1\n--- \nb: 2", "%YAML 9.9\n---\na: 1", "@: 1", "`: 1", "&: 1", "*: 1", "! a: 1", "<<: 3", "<<: [1]"),
]  # fmt: skip


@pytest.mark.parametrize("line", VALUES, ids=lambda line: line[:24])
def test_values_that_are_none_here(line: str) -> None:
    refused(f"{TINY}{line}\n")


def test_a_recipe_without_those_lines_is_read() -> None:
    assert Recipe.from_yaml(TINY + "seed: 3\nthreads: 2\n").seed == 3


NAMES = [
    *("../up", "..", ".", "/etc/cron.d/x", "a/b", "a\\b", "C:x", "~", "~root", "$HOME", "", " ", "a b", "-rf", ".a"),
    *("a\x00b", "a\nb", "a\n", "a\x1b[2J", "a\u202eb", "é", "a;b", "a|b", "a>b", "a*", "a?", "a:b", 'a"b', "a'b"),
    *("a" * 200, "con/x", "file:///x", "%2e%2e%2f", "a\u2215b", "a\uff0fb", "a\tb", "#a", "!a", "@a", "a,b", "{a}"),
    "a&b",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES, ids=ascii)
@pytest.mark.parametrize("of", ["recipe", "run", "source"])
def test_names_become_files_and_nothing_else(name: str, of: str) -> None:
    content = yaml.safe_load(STAGED if of == "source" else TINY)
    named = {"recipe": lambda: content, "run": lambda: content["runs"][0], "source": lambda: content["sources"][1]}
    named[of]()["name"] = name
    assert "name" in refused(yaml.safe_dump(content))


@pytest.mark.parametrize("name", ["x.onnx", "x.safetensors", "X-1.pt2"])
def test_names_of_outputs_that_are_fine(name: str) -> None:
    recipe = Recipe.from_yaml(STAGED, {"stages": [{"merge": None}, {"export": [name]}]})
    assert [*recipe.follow()][-1][-1].files == (name,)


@pytest.mark.parametrize("name", NAMES, ids=ascii)
@pytest.mark.parametrize("of", ["export", "page"])
def test_files_of_stages_lie_in_their_folder(name: str, of: str) -> None:
    ending = ".html" if of == "page" else ".onnx"
    if not name.strip("a") and name:
        return  # together with the ending those are names
    stage = {"diagnose": {"page": name + ending}} if of == "page" else {"export": [name + ending]}
    refused(yaml.safe_dump({**yaml.safe_load(STAGED), "stages": ["merge", stage]}))


def test_many_stages_and_many_sources_are_read_in_moments() -> None:
    content = yaml.safe_load(STAGED)
    began = time.process_time()
    many = {"sources": [content["sources"][0]] * 30, "stages": [{"train": {"epochs": 1}}] * 1000 + ["merge"]}
    recipe = Recipe.from_yaml(yaml.safe_dump(content | many))
    assert time.process_time() - began < 30
    assert len(recipe.steps) == 1002 and [source.name for source in recipe.sources][25:] == [
        "z",
        *(f"s{n}" for n in range(26, 30)),
    ]
    message = refused(yaml.safe_dump(content | {"sources": many["sources"], "stages": ["merge"] * 1000}))
    assert "there is one network left, and nothing to merge it with" in message


ENCODINGS = {
    "latin": TINY.replace("tiny", "tinÿ").encode("latin-1"),
    "utf-16": TINY.encode("utf-16"),
    "utf-32": TINY.encode("utf-32"),
    "zeros": TINY.encode() + b"\x00",
    "controls": TINY.encode() + b"\x07\x1b",
    "surrogates": TINY.encode() + b"\xed\xa0\x80",
    "overlong": TINY.encode() + b"\xc0\xaf",
    "cut off": "source: é".encode()[:-1],
    "an image": b"\x89PNG\r\n\x1a\n" + bytes(range(256)),
    "empty": b"",
    "large": TINY.encode() + b"#" * 300_000,
}


@pytest.mark.parametrize("content", ENCODINGS.values(), ids=ENCODINGS.keys())
def test_files_that_are_no_text(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "r.yaml").write_bytes(content)
    result = CliRunner().invoke(main, ["run", str(tmp_path / "r.yaml"), "-o", str(tmp_path / "out")])
    assert result.exit_code == 2
    assert result.stderr.startswith("error: ") and "r.yaml" in result.stderr
    assert not (tmp_path / "out").exists()


def test_a_mark_of_byte_order_and_other_line_ends_are_fine(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_bytes(b"\xef\xbb\xbf" + TINY.replace("\n", "\r\n").encode())
    assert Recipe.from_yaml(tmp_path / "r.yaml") == Recipe.from_yaml(TINY)


@pytest.mark.skipif(os.name != "posix", reason="files of POSIX")
@pytest.mark.parametrize("path", ["/dev/zero", "/dev/full", "/proc/self/mem", "a\x00b.yaml", "n" * 400, "/", "nowhere"])
def test_paths_that_are_no_files(path: str) -> None:
    with pytest.raises(RecipeError, match=r"^cannot read the recipe") as caught:
        Recipe.from_yaml(Path(path))
    assert str(caught.value).count("cannot read the recipe") == 1


words = st.sampled_from([*Recipe.model_fields, *Source.model_fields]) | st.text(max_size=8)
scalars = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=12) | st.dates() | st.binary(max_size=4)
)
junk = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=4), max_leaves=12
)
quick = settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@quick
@given(st.dictionaries(words, junk, max_size=5), st.booleans())
def test_any_mapping_is_a_recipe_or_a_recipe_error(content: dict[str, Any], beside: bool) -> None:
    text = yaml.safe_dump({**yaml.safe_load(TINY), **content} if beside else content) + "\n"
    try:
        recipe = Recipe.from_yaml(text)
    except RecipeError:
        return
    assert Recipe.from_yaml(recipe.to_yaml()) == recipe


@quick
@given(st.text(max_size=60))
def test_any_text_is_a_recipe_error(text: str) -> None:
    with pytest.raises(RecipeError):
        Recipe.from_yaml(text + "\n")


@quick
@given(
    st.fixed_dictionaries(
        {},
        optional={
            "source": st.text(max_size=30),
            "seed": st.integers(0, 2**32 - 1),
            "resume": st.text(max_size=10),
            "device": st.sampled_from(["auto", "cpu", "cuda:3"]),
            "threads": st.integers(1, 64),
        },
    ),
    st.dictionaries(
        st.text(max_size=6),
        st.booleans() | st.integers(-(2**64) + 1, 2**64 - 1) | st.floats(allow_nan=False) | st.text(),
        max_size=3,
    ),
    st.floats(0, exclude_min=True, allow_infinity=False),
)  # fmt: skip
def test_every_recipe_is_written_and_read_again(outer: dict[str, Any], options: dict[str, Any], lr: float) -> None:
    content = {**yaml.safe_load(TINY), **outer}
    source = {"model": "vfsurgery.networks.demo:TinyConvNet", "options": options}
    content["data"], content["runs"][0]["sources"] = {}, [source, {}]
    content["runs"][0]["stages"] = [{"train": {"lr": lr}}, "merge"]
    try:
        recipe = Recipe.from_yaml(yaml.safe_dump(content))
    except RecipeError:
        assert any(value in (float("inf"), float("-inf")) for value in options.values())
        return
    assert Recipe.from_yaml(recipe.to_yaml()) == recipe
    assert hash(Recipe.from_yaml(recipe.to_yaml())) == hash(recipe)


own = [name for part in (Source, *(STAGES[name] for name in STAGES)) for name in part.model_fields]
inside = st.sampled_from([*STAGES, *own, "flops", "repair", "fold", "merge.alpha", "x {alpha}"])
shallow = (
    scalars | st.floats(0, 1) | st.sampled_from(["auto", "none", "a", "merged", "x.onnx", "weights", "a < merged"])
)
loose = st.recursive(
    shallow, lambda more: st.lists(more, max_size=3) | st.dictionaries(inside, more, max_size=2), max_leaves=6
)


@quick
@given(
    st.lists(st.dictionaries(inside, loose, max_size=3) | loose, max_size=3),
    st.lists(st.dictionaries(inside | st.integers(), loose, min_size=1, max_size=1) | loose, min_size=1, max_size=4),
)
def test_any_sources_and_stages_are_a_recipe_or_a_recipe_error(sources: list[Any], stages: list[Any]) -> None:
    staged = yaml.safe_load(STAGED)
    for changes in ({"stages": stages}, {"sources": [*staged["sources"], *sources]}):
        try:
            recipe = Recipe.from_yaml(yaml.safe_dump(staged | changes))
        except RecipeError as error:
            assert len(str(error)) < 4000
            continue
        assert Recipe.from_yaml(recipe.to_yaml()) == recipe


shares = st.floats(0, 1) | st.lists(st.floats(0, 1), min_size=1, max_size=3)
patterns = st.text(min_size=1, max_size=6)
before = st.one_of(
    st.fixed_dictionaries({"train": st.fixed_dictionaries({"lr": st.floats(1e-9, 10), "augment": st.booleans()})}),
    st.fixed_dictionaries(
        {
            "prune": st.fixed_dictionaries(
                {
                    "sparsity": st.floats(0, 1, exclude_max=True)
                    | st.dictionaries(patterns, st.floats(0, 0.9), min_size=1, max_size=3)
                },
                optional={"scope": st.sampled_from(["global", "layer", "row"]), "exclude": st.lists(patterns)},
            )
        }
    ),
    st.sampled_from(["train", "evaluate", {"evaluate": {"data": "train"}}, {"apply": ["fold"]}, {"reset": {}}]),
)
options = {
    "alpha": shares | st.dictionaries(patterns, shares, min_size=1),
    "matching": st.sampled_from(["weights", "auto", {"cca": {"gamma": 0.25}}]),
    "preserve": st.integers(0, 99) | patterns | st.fixed_dictionaries({"flops": st.floats(1, 9)}),
    "renormalize": st.sampled_from([["reset", {"repair": {"factor": 0.5}}], None, "none", "auto"]),
}
merge = st.fixed_dictionaries({"merge": st.fixed_dictionaries({}, optional=options)})
ways = st.lists(
    st.tuples(st.text("xyz %", min_size=1, max_size=5), merge), min_size=1, max_size=3, unique_by=lambda w: w[0]
)
merging = merge | ways.map(lambda ways: {"compare": {"ways": [{f"w{label}": [way]} for label, way in ways]}})


@quick
@given(st.lists(before, max_size=3), merging, st.lists(st.text("abz019-_.", min_size=1, max_size=9), max_size=3))
def test_every_recipe_with_stages_is_written_and_read_again(first: list[Any], merge: Any, files: list[str]) -> None:
    names = [f"x{file}.pt2" for file in dict.fromkeys(files)]
    export = [{"export": names}] if names else []
    content = {**yaml.safe_load(STAGED), "stages": [*first, merge, "diagnose", *export]}
    recipe = Recipe.from_yaml(yaml.safe_dump(content))
    again = Recipe.from_yaml(recipe.to_yaml())
    assert again == recipe and hash(again) == hash(recipe) and again.to_yaml() == recipe.to_yaml()
    assert len(recipe.steps) == len(first) + 3
