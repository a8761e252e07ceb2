"""All passes by name, and how users add their own: a class, or a function whose keywords become options."""

from __future__ import annotations

import dataclasses
import inspect
import keyword
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar, TypeAlias, TypeVar, cast, overload

from torch import fx

from vfsurgery.errors import OptionError, explain
from vfsurgery.passes.base import Context, Pass
from vfsurgery.records.options import Option, build, build_entry, options_of, resolve, written
from vfsurgery.registry import Registry, Selection

PassClass = TypeVar("PassClass", bound=type[Pass])
PassFunction: TypeAlias = Callable[..., fx.GraphModule | None]
"""``(graph_module, context, *, options...)``; ``None`` means that ``graph_module`` was edited in place."""

PASSES: Registry[type[Pass]] = Registry("pass")
"""All passes by name."""

NORMALIZATIONS: Selection[type[Pass]] = Selection(PASSES, "renormalization", lambda step: step.after_merge)
"""The passes that ``merge(renormalize=...)`` takes by name: all but those that a merge itself consists of."""

DECLARATIONS = "preserves_function needs_data needs_sources after_merge after before"
"""What passes declare by class attributes, and decorators by arguments."""


@overload
def register_pass(target: PassClass, /) -> PassClass: ...
@overload
def register_pass(target: PassFunction, /) -> Callable[..., Pass]: ...
@overload
def register_pass(*, name: str | None = None, **declared: bool | tuple[str, ...]) -> Callable[[Any], Any]: ...
def register_pass(target: Any = None, /, *, name: str | None = None, **declared: bool | tuple[str, ...]) -> Any:
    """Register a pass, so that it can be called by name: in ``run_passes``, ``merge(renormalize=...)`` and recipes.

    What is decorated is either a frozen dataclass derived from :class:`~vfsurgery.passes.Pass`, or a function
    ``(graph_module, context, *, factor: float = 1.0)`` whose annotated keywords become its options. Of a function
    a class is made, so ``my_pass(factor=2.0)`` is a pass; ``my_pass.function`` is the function itself. It returns the
    graph module, or nothing if it edited the one that it was given.

    Args:
        target: The class or function, where the decorator is used without arguments.
        name: What users call it by; by default the class's ``name``, or the function's name with dashes.
        declared: ``preserves_function``, ``needs_data``, ``needs_sources``, ``after_merge``, ``after``, ``before``: see
            :class:`~vfsurgery.passes.Pass`.

    Raises:
        OptionError: the name is taken, the dataclass is not frozen, or an option has no annotation.

    >>> import torch, vfsurgery as surgery
    >>> @surgery.register_pass(name="docs-dim", after=("repair",))
    ... def dim(graph_module, context, *, factor: float = 0.5):
    ...     for parameter in graph_module.parameters():
    ...         parameter.mul_(factor)
    >>> dim(factor=0.1), PASSES["docs-dim"] is dim
    (dim(factor=0.1), True)
    >>> model = surgery.run_passes(torch.nn.Linear(4, 2), ["docs-dim"], example_inputs=torch.randn(2, 4))
    """

    def enter(given: Any) -> Any:
        chosen = name or getattr(given, "name", None) or getattr(given, "__name__", "").replace("_", "-")
        pass_class = _checked_class(given) if isinstance(given, type) else _class_of(given)
        if not re.fullmatch(r"[\w.-]+", str(chosen)):
            raise OptionError(
                explain(f"{chosen!r} cannot be the name of a pass", remedy="pass name=, of letters, digits and dashes")
            )
        pass_class.name = str(chosen)
        for attribute, value in declared.items():
            if attribute not in DECLARATIONS.split():
                raise OptionError(
                    explain(f"a pass declares no {attribute!r}", accepted=", ".join(["name", *DECLARATIONS.split()]))
                )
            setattr(pass_class, attribute, value)
        for attribute in ("after", "before"):
            names = getattr(pass_class, attribute)
            if not isinstance(names, tuple) or not all(isinstance(each, str) for each in cast("tuple[Any]", names)):
                raise OptionError(
                    explain(f"{attribute}= of pass {chosen!r} is {names!r}", accepted="a tuple of names of passes")
                )
        return PASSES.register(pass_class.name)(pass_class)

    return enter if target is None else enter(target)


def pass_options(name: str) -> tuple[Option, ...]:
    """The options of a registered pass: names, types, and defaults.

    Raises:
        OptionError: there is no such pass.

    >>> print(*pass_options("bias-removal"), sep="\\n")
    layers: int | None = None
    """
    return options_of(PASSES[name])


def build_pass(name: str, options: Mapping[str, object] | None = None) -> Pass:
    """A registered pass with options from a mapping, as a recipe has them.

    Raises:
        OptionError: there is no such pass; an option is unknown, missing, or of the wrong type.

    >>> build_pass("repair", {"factor": 2})
    Repair(include_output=False, average=False, factor=2.0, reference=None, sequential=False)
    >>> build_pass("repair", {"factor": "2"})
    Traceback (most recent call last):
    vfsurgery.errors.OptionError: pass 'repair': factor must be float but is '2'
      because  input should be a valid number
    """
    return build(PASSES[name], options or {})


def build_passes(entries: Iterable[object]) -> list[Pass]:
    """Registered passes, each from its name alone or from ``{name: {option: value}}``.

    Raises:
        OptionError: as for :func:`build_pass`; or an entry is written otherwise.

    >>> build_passes(("reset", {"repair": {"factor": 0.9}}))[1].factor
    0.9
    """
    return [build_entry(entry, PASSES, "pass") for entry in entries]


def pass_as_mapping(step: Pass) -> dict[str, Any]:
    """The options of a pass as plain data: ``build_pass(step.name, pass_as_mapping(step)) == step``."""
    return written(step)


class FunctionPass(Pass):
    """A pass whose work is a function; the fields of its subclasses are the function's keywords."""

    function: ClassVar[PassFunction]

    def run(self, graph_module: fx.GraphModule, context: Context) -> fx.GraphModule:
        """Call the function with the options."""
        function = type(self).function
        options = {field.name: getattr(self, field.name) for field in dataclasses.fields(cast("Any", self))}
        result = function(graph_module, context, **options)
        return graph_module if result is None else result


def _checked_class(given: type) -> type[Pass]:
    if not issubclass(given, Pass):
        raise OptionError(
            explain(f"{given.__name__} is no pass", remedy="derive it from vfsurgery.Pass, or register a function")
        )
    parameters = getattr(given, "__dataclass_params__", None)
    if "__dataclass_fields__" not in vars(given) or parameters is None or not parameters.frozen:
        raise OptionError(
            explain(
                f"pass {given.__name__} is no frozen dataclass",
                remedy="put @dataclass(frozen=True, kw_only=True) under @register_pass",
            )
        )
    return given


def _class_of(function: PassFunction) -> type[Pass]:
    """A pass class with the function's keywords as fields, in the function's place: so it pickles."""
    name = function.__name__
    parameters = list(inspect.signature(function).parameters.values())
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    options = [p for p in parameters if p.kind is p.KEYWORD_ONLY]
    if len(positional) != 2 or len(positional) + len(options) != len(parameters):
        raise OptionError(
            explain(
                f"pass {name} has the wrong signature: {inspect.signature(function)}",
                accepted="(graph_module, context, *, option: type = default, ...)",
            )
        )
    fields = [_field(function, option) for option in options]
    made = dataclasses.make_dataclass(
        name,
        fields,
        bases=(FunctionPass,),
        namespace={"function": staticmethod(function), "__doc__": function.__doc__, "__module__": function.__module__},
        frozen=True,
        kw_only=True,
    )
    made.__module__, made.__qualname__ = function.__module__, function.__qualname__
    return cast("type[Pass]", made)


def _field(function: PassFunction, option: inspect.Parameter) -> tuple[str, Any, dataclasses.Field[Any]]:
    where = f"{function.__name__}.{option.name}"
    if option.annotation is option.empty:
        raise OptionError(
            explain(f"option {where} has no type", remedy="annotate it: its values are checked by its type")
        )
    if hasattr(Pass, option.name) or option.name in ("name", "function") or keyword.iskeyword(option.name):
        raise OptionError(explain(f"option {where} has a name that passes use themselves", remedy="rename it"))
    kind = option.annotation
    if isinstance(kind, str):
        kind = resolve(kind, cast("Any", function).__globals__, where)
    if option.default is option.empty:
        return option.name, kind, dataclasses.field()
    try:
        hash(option.default)
    except TypeError:
        raise OptionError(
            explain(f"the default of option {where} can be changed: {option.default!r}", remedy="make it a tuple")
        ) from None
    return option.name, kind, dataclasses.field(default=option.default)
