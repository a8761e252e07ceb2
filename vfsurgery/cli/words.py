"""Messages in the words of the command line: errors name arguments as Python has them, ``data=`` or ``alpha=0.3``."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

import click

KEYS = {"example_inputs": "input_size"}
"""Arguments of functions that recipes call otherwise."""

RECIPE_KEYS = (
    "data",
    "matching",
    "renormalize",
    "preserve",
    "masks",
    "alpha",
    "weights",
    "example_inputs",
    "leaf",
    "pins",
)
"""Arguments of functions that are keys of a recipe."""

VALUE = r"""(?P<value>'[^']*'|"[^"]*"|torch\.randn\([^()]*\)|[\w.+-]*[\w+-])?"""


def in_options(message: str, command: click.Command) -> str:
    """A message with the options of a command in the place of the arguments that they become.

    >>> @click.command("merge")
    ... @click.option("--input-size")
    ... @click.option("--matching")
    ... def merge(): ...
    >>> in_options("pass example_inputs=torch.randn(2, 3, 32, 32), or matching='weights', or leaf=", merge)
    'pass --input-size 3x32x32, or --matching weights, or leaf='
    >>> in_options("pass example_inputs=torch.randn(2, 3, 32, 32); or data=", merge)
    'pass --input-size 3x32x32'
    """
    renderers: dict[str, Callable[[str | None], str]] = {}
    if any(isinstance(each, click.Argument) and each.name == "recipe" for each in command.params):
        renderers = {name: _key(name) for name in RECIPE_KEYS}
    for option in command.params:
        if isinstance(option, click.Option):
            for name in (str(option.name), *(opt.removeprefix("--").replace("-", "_") for opt in option.opts)):
                renderers[name] = _option(option)
    if "input_size" in renderers:
        renderers["example_inputs"] = renderers["input_size"]
        if "data" not in renderers:  # what takes no images is told of no such way out
            message = message.replace("; or data=", "")
    return _rendered(message, renderers)


def _rendered(message: str, renderers: Mapping[str, Callable[[str | None], str]]) -> str:
    if not renderers:
        return message

    def render(found: re.Match[str]) -> str:
        before = message[: found.start()]
        in_a_call = re.search(r"\w\([^()]*$", before) is not None  # which is Python, and stays so
        return found[0] if in_a_call else renderers[found["name"]](found["value"])

    names = "|".join(sorted(renderers, key=len, reverse=True))
    return re.sub(rf"(?<![\w.'\"-])(?P<name>{names})=(?![=\[({{]){VALUE}", render, message)


def _option(option: click.Option) -> Callable[[str | None], str]:
    flag = max(option.opts, key=len)

    def render(value: str | None) -> str:
        if option.is_flag:
            off = max(option.secondary_opts, key=len, default=f"no {flag}")
            return off if value == "False" else flag
        return flag if value is None else f"{flag} {_plain(value)}"

    return render


def _key(name: str) -> Callable[[str | None], str]:
    return lambda value: f"{KEYS.get(name, name)}:" + ("" if value is None else f" {_plain(value)}")


def _plain(value: str) -> str:
    """As it is typed: without quotes, images by their shape, nothing as ``none``."""
    shape = re.fullmatch(r"torch\.randn\(\d+, (.*)\)", value)
    if shape is not None:
        return shape[1].replace(", ", "x")
    return "none" if value == "None" else value.strip("'\"")
