"""Options of passes, matchers and other methods as data: names, types, defaults; read from a mapping, written as one.

A mapping is what a recipe or a command line has: text, numbers, lists. What is not of an option's type is refused and
never converted: a ``"3"`` is no number.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar, cast

from pydantic import TypeAdapter, ValidationError
from pydantic.errors import PydanticUserError

from vfsurgery.errors import OptionError, did_you_mean, explain, refuse_unknown
from vfsurgery.registry import Registry

T = TypeVar("T")


@dataclass(frozen=True)
class Option:
    """One option of a pass.

    >>> from vfsurgery.passes import Repair
    >>> print(*options_of(Repair), sep="\\n")
    include_output: bool = False
    average: bool = False
    factor: float = 1.0
    reference: int | None = None
    sequential: bool = False
    """

    name: str
    type: Any
    default: Any = dataclasses.MISSING

    @property
    def required(self) -> bool:
        """Whether it has no default."""
        return self.default is dataclasses.MISSING

    @property
    def type_name(self) -> str:
        """The type as one would write it."""
        return self.type.__name__ if isinstance(self.type, type) else str(self.type).replace("typing.", "")

    def schema(self) -> dict[str, Any]:
        """The option's JSON schema, with its default: what editors complete recipes by."""
        schema = _adapter(self).json_schema()
        return schema if self.required else {**schema, "default": _plain(self.default)}

    def read(self, value: object) -> Any:
        """A value as it stands in a recipe, checked; lists become tuples where the option is one.

        Raises:
            OptionError: it is not of the option's type.
        """
        try:
            return _adapter(self).validate_json(json.dumps(value), strict=True)
        except (ValidationError, TypeError, ValueError) as error:
            if isinstance(error, OptionError):
                raise
            reason = error.errors()[0]["msg"] if isinstance(error, ValidationError) else str(error)
            raise OptionError(
                explain(
                    f"{self.name} must be {self.type_name} but is {value!r}",
                    because=reason[:1].lower() + reason[1:],
                )
            ) from None

    def __str__(self) -> str:
        return f"{self.name}: {self.type_name}" + ("" if self.required else f" = {self.default!r}")


def options_of(target: type[Any]) -> tuple[Option, ...]:
    """The options of a pass or matcher in the order of its fields.

    Raises:
        OptionError: a type is written in a way that cannot be resolved.
    """
    if not dataclasses.is_dataclass(target):
        return ()
    chosen = [field for field in dataclasses.fields(target) if field.init]
    return tuple(Option(field.name, _type_of(target, field), _default(field)) for field in chosen)


def schema_of(target: type[Any]) -> dict[str, Any]:
    """The JSON schema of all options of a pass.

    >>> from vfsurgery.passes import RemoveBiases
    >>> schema_of(RemoveBiases)["properties"]
    {'layers': {'anyOf': [{'type': 'integer'}, {'type': 'null'}], 'default': None}}
    """
    options = options_of(target)
    return {
        "type": ["object", "null"],
        "description": (target.__doc__ or "").partition("\n")[0],
        "properties": {option.name: option.schema() for option in options},
        "required": [option.name for option in options if option.required],
        "additionalProperties": False,
    }


def build(target: type[T], options: Mapping[str, object], kind: str = "pass") -> T:
    """Make a pass, or what ``kind`` says, from a mapping of its options.

    Raises:
        OptionError: an option is unknown, missing, or of the wrong type; names the pass and the option.

    >>> from vfsurgery.passes import Repair
    >>> build(Repair, {"factor": 2}).factor
    2.0
    >>> build(Repair, {"factr": 2})
    Traceback (most recent call last):
    vfsurgery.errors.OptionError: pass 'repair' has no option 'factr'
      remedy  did you mean 'factor'? accepted: average, factor, include_output, reference, sequential
    """
    read = read_options(target, options, kind)
    missing = [str(option) for option in options_of(target) if option.required and option.name not in read]
    if missing:
        raise OptionError(explain(f"{kind} {_name(target)!r} needs {', '.join(missing)}"))
    return cast("Any", target)(**read)


def read_options(target: type[Any], options: Mapping[str, object], kind: str = "pass") -> dict[str, Any]:
    """Options as they stand in a mapping, checked: keyword arguments of a pass, or of what ``kind`` says.

    Raises:
        OptionError: an option is unknown, or of the wrong type.
    """
    known = {option.name: option for option in options_of(target)}
    for option in options:
        if option not in known:
            remedy = did_you_mean(str(option), known)
            raise OptionError(explain(f"{kind} {_name(target)!r} has no option {option!r}", remedy=remedy))
    try:
        return {option: known[option].read(value) for option, value in options.items()}
    except OptionError as error:
        raise OptionError(f"{kind} {_name(target)!r}: {error}") from None


def _name(target: type[Any]) -> str:
    return getattr(target, "name", target.__name__)


def build_entry(entry: object, known: Registry[Any], kind: str, *others: str) -> Any:
    """What a registry has under a name, from the name alone or from ``{name: {option: value}}``.

    Args:
        entry: The name, or a mapping of it to its options.
        known: The registry.
        kind: What it holds, in words.
        others: What else is accepted in the place of a name, for the message.

    Raises:
        OptionError: it is written otherwise, there is nothing of that name, or an option is wrong.

    >>> from vfsurgery.passes import PASSES
    >>> build_entry({"repair": {"factor": 2}}, PASSES, "pass").factor
    2.0
    """
    name, options = read_entry(entry, kind)
    refuse_unknown(kind, (name,), (*others, *known))
    return build(known[name], options, kind)


def read_entry(entry: object, kind: str) -> tuple[str, dict[str, Any]]:
    """The name and the options of what :func:`build_entry` builds.

    Raises:
        OptionError: it is written otherwise.
    """
    pair: tuple[object, object] = (entry, None)
    if isinstance(entry, Mapping) and len(cast("Mapping[Any, Any]", entry)) == 1:
        (pair,) = cast("Mapping[Any, Any]", entry).items()
    name, options = pair
    if not isinstance(name, str) or not (options is None or isinstance(options, Mapping)):
        raise OptionError(f"a {kind} is written as its name, or as {{name: {{option: value}}}}")
    return name, dict(cast("Mapping[str, Any]", options or {}))


def written(step: object) -> dict[str, Any]:
    """All options of a pass as plain data: ``build(type(step), written(step)) == step``.

    >>> from vfsurgery.passes import RemoveBiases
    >>> written(RemoveBiases(layers=2))
    {'layers': 2}
    """
    if not dataclasses.is_dataclass(step):
        return {}
    return {field.name: _plain(getattr(step, field.name)) for field in dataclasses.fields(step) if field.init}


def _plain(value: Any) -> Any:
    """Tuples as lists and sets as sorted ones, at any depth."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in cast("Mapping[Any, Any]", value).items()}
    if isinstance(value, tuple | list):
        return [_plain(item) for item in cast("tuple[Any, ...]", value)]
    if isinstance(value, frozenset | set):
        return sorted(_plain(item) for item in cast("set[Any]", value))
    return value


def _default(field: dataclasses.Field[Any]) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def _type_of(pass_class: type, field: dataclasses.Field[Any]) -> Any:
    """The field's type as an object; annotations may be text, to be read where the class that has them was written."""
    written_type: Any = field.type
    if not isinstance(written_type, str):
        return written_type
    owner = next(base for base in pass_class.__mro__ if field.name in inspect.get_annotations(base))
    return resolve(written_type, vars(sys.modules[owner.__module__]), f"{owner.__qualname__}.{field.name}")


def resolve(annotation: str, namespace: Mapping[str, Any], where: str) -> Any:
    """The type that an annotation in text means.

    Raises:
        OptionError: it names something that is not there when the program runs.
    """
    try:
        return eval(annotation, dict(namespace))
    except Exception as error:
        raise OptionError(
            explain(
                f"the type of option {where} cannot be resolved: {annotation}",
                because=error,
                remedy="import its names at the top of the module, not under TYPE_CHECKING or inside a function",
            )
        ) from error


def _adapter(option: Option) -> TypeAdapter[Any]:
    try:
        return TypeAdapter(option.type)
    except PydanticUserError as error:
        raise OptionError(
            explain(
                f"option {option.name} has a type that cannot be written in a recipe: {option.type_name}",
                accepted="numbers, text, booleans, None, Literal, and tuples, lists or mappings of those",
            )
        ) from error
