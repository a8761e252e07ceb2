"""Registries name both sides of a clash, and what there is on a miss."""

from __future__ import annotations

import pytest

from vfsurgery.errors import OptionError, SurgeryError, did_you_mean, explain
from vfsurgery.registry import Registry


def first() -> None: ...


def second() -> None: ...


@pytest.fixture
def colours() -> Registry[object]:
    registry: Registry[object] = Registry("colour")
    registry.register("red")(first)
    return registry


def test_an_entry_comes_back_as_it_is_and_is_listed_in_order(colours: Registry[object]) -> None:
    assert colours.register("blue")(second) is second
    assert colours["blue"] is second and colours["red"] is first
    assert list(colours) == ["blue", "red"]
    assert "red" in colours and "green" not in colours


def test_a_clash_names_the_kind_and_both_entries(colours: Registry[object]) -> None:
    message = r"(?s)two entries claim the colour name 'red'.*first +\S+\.first.*second +\S+\.second.*another name"
    with pytest.raises(OptionError, match=message):
        colours.register("red")(second)
    assert colours["red"] is first


def test_the_same_entry_may_register_twice(colours: Registry[object]) -> None:
    assert colours.register("red")(first) is first


def test_a_clash_of_instances_shows_them() -> None:
    registry: Registry[object] = Registry("size")
    registry.register("one")(1)
    with pytest.raises(OptionError, match=r"(?s)first +\S+1\n.*second +\S+2\n"):
        registry.register("one")(2)


@pytest.mark.parametrize(
    ("name", "remedy"), [("rad", r"did you mean 'red'\? accepted: red"), ("xyz", r"remedy +accepted: red")]
)
def test_a_miss_lists_what_there_is(colours: Registry[object], name: str, remedy: str) -> None:
    with pytest.raises(OptionError, match=rf"(?s)unknown colour '{name}'.*{remedy}"):
        colours[name]


def test_a_miss_in_an_empty_registry() -> None:
    with pytest.raises(OptionError, match="nothing is accepted here"):
        Registry[int]("number")["one"]


def test_a_miss_is_a_surgery_error_and_a_value_error(colours: Registry[object]) -> None:
    with pytest.raises(SurgeryError):
        colours["green"]
    with pytest.raises(ValueError, match="green"):
        colours["green"]


def test_explain_aligns_its_labels_and_drops_what_is_none() -> None:
    assert explain("fact", a=1, remedy="try", left_out=None) == "fact\n  a       1\n  remedy  try"
    assert explain("fact") == "fact"


def test_did_you_mean_offers_only_near_spellings() -> None:
    assert did_you_mean("wieghts", ["weights", "identity"]).startswith("did you mean 'weights'?")
    assert "did you mean" not in did_you_mean("zzz", ["weights", "identity"])
