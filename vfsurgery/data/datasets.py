"""Data sets by written name, for recipes: what comes along, torchvision's, folders of images, and your own.

A name is one of :data:`DATA`, ``torchvision:NAME`` or ``import.path:factory``. Each stands for a function that returns
:class:`~vfsurgery.data.Splits`, or one ``Dataset`` that is then divided at random; its keywords are the options that a
recipe may give. One that has a keyword ``transform`` is handed the one from a PIL image to what the model expects.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping, Sized
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias, cast

import torch
from torch import nn
from torch.utils.data import Dataset, Subset

from vfsurgery.data.cifar import cifar
from vfsurgery.data.folders import Pictures, Transform, parts_of
from vfsurgery.data.images import Splits, digits, preprocessing, subset
from vfsurgery.errors import DataError, OptionError, did_you_mean, explain
from vfsurgery.networks.architectures import find_factory
from vfsurgery.registry import Registry

Factory: TypeAlias = Callable[..., Splits | Dataset[Any]]

DATA: Registry[Factory] = Registry("data set")
"""Data sets by name; add one with ``@DATA.register("mine")``."""

FORMS = "a registered name, torchvision:NAME or import.path:factory"
CALIBRATION = 5000
OPTIONS = ("size", "path", "train", "calibration", "test", "mean", "std")
"""Options that most data sets have; a recipe names them beside the data's name, all others below ``options``."""
TEST_SHARE = 0.2
"""Of a data set that is not divided already."""

DATA.register("digits")(digits)
DATA.register("cifar10")(partial(cifar, "cifar10"))
DATA.register("cifar100")(partial(cifar, "cifar100"))


def find_data(name: str) -> Factory:
    """The function that a name stands for.

    Raises:
        OptionError: there is none.

    >>> find_data("digits").__name__
    'digits'
    """
    if ":" not in name:
        return DATA[name]
    path, _, attribute = name.partition(":")
    if path == "torchvision":
        return partial(torchvision_data, attribute)
    return find_factory(path, attribute, "data", FORMS)


def takes(factory: Factory, option: str) -> bool:
    """Whether a function has a keyword of that name."""
    parameters = inspect.signature(factory).parameters
    return option in parameters or any(each.kind is each.VAR_KEYWORD for each in parameters.values())


def needs(factory: Factory, option: str) -> bool:
    """Whether a function cannot be called without that keyword."""
    parameter = inspect.signature(factory).parameters.get(option)
    return parameter is not None and parameter.default is parameter.empty


def options_of(factory: Factory) -> set[str]:
    """Which of :data:`OPTIONS` a function takes, with those that are met before it or after it for its sake."""
    own = {option for option in OPTIONS if takes(factory, option)}
    own |= {"size", "mean", "std"} if takes(factory, "transform") else set()
    return own | (set() if returns_splits(factory) else {"train", "calibration", "test"})


def check_options(name: str, given: Collection[str]) -> None:
    """Refuse those of :data:`OPTIONS` that a data set does not take, and to leave out the path that it needs.

    Of code of your own nothing is refused: it is imported when it is run, and not before.

    Raises:
        OptionError: see above; or there is no such data.

    >>> check_options("digits", ["size"])
    """
    if ":" in name and not name.startswith("torchvision:"):
        return
    factory = find_data(name)
    own = options_of(factory)
    if refused := next((option for option in given if option not in own), None):
        raise OptionError(f"{name} has no {refused}; accepted: {', '.join(sorted({'name', 'seed', *own}))}")
    if needs(factory, "path") and "path" not in given:
        raise OptionError(f"{name} needs path, the folder that holds it")


def image_of(name: str, size: int | None) -> tuple[int, int, int] | None:
    """The shape of an image, as far as it is known without reading one; else the model's configuration says it.

    >>> image_of("digits", None), image_of("imagefolder", 64)
    ((1, 8, 8), (3, 64, 64))
    """
    if name == "digits":
        return (1, size or 8, size or 8)
    if name in ("cifar10", "cifar100"):
        return (3, 32, 32)
    return None if size is None else (3, size, size)


def read_name(written: str) -> tuple[str, str | None]:
    """Name and path from ``NAME`` or ``NAME:PATH``, as the command line has them.

    Raises:
        OptionError: no data set is registered by that name, or it needs a path, or takes none.

    >>> read_name("imagefolder:photos/train")
    ('imagefolder', 'photos/train')
    """
    name, _, path = written.partition(":")
    accepted = [f"{known}:PATH" if needs(DATA[known], "path") else known for known in DATA]
    if name not in DATA or (f"{name}:PATH" in accepted) != (path != ""):
        folder = Path(written).is_dir()
        remedy = f"imagefolder:{written}, for the images in that folder" if folder else did_you_mean(written, accepted)
        raise OptionError(explain(f"unknown data {written!r}", remedy=remedy))
    return name, path or None


def returns_splits(factory: Factory) -> bool:
    """Whether a function is known to divide the data itself, by its annotation."""
    return inspect.signature(factory).return_annotation in (Splits, Splits.__name__)


def load_data(name: str, options: Mapping[str, Any], transform: Transform | None = None) -> Splits:
    """Call the function that a name stands for.

    Args:
        name: See the module's docstring.
        options: Keywords; ``seed``, ``train``, ``calibration`` and ``test`` divide a data set whose function does not.
        transform: For data that holds PIL images.

    Raises:
        OptionError: the name or an option is unknown.
        DataError: there are no such images.

    >>> splits = load_data("digits", {"seed": 3})
    >>> len(splits.test)
    500
    """
    factory = find_data(name)
    divides = {"seed", "train", "calibration", "test"} - set(inspect.signature(factory).parameters)
    given = {option: value for option, value in options.items() if option not in divides}
    if transform is not None and takes(factory, "transform"):
        given["transform"] = transform
    try:
        inspect.signature(factory).bind(**given)
    except TypeError as error:
        known = [key for key in inspect.signature(factory).parameters if key != "transform"]
        raise OptionError(
            explain(f"data {name} cannot be loaded so", cause=error, accepted=", ".join(known))
        ) from error
    found = factory(**given)
    if isinstance(found, Splits):
        return found
    if not hasattr(found, "__getitem__") or not hasattr(found, "__len__"):
        raise DataError(
            explain(f"data {name} is a {type(found).__name__}", accepted="Splits, or a Dataset that has a length")
        )
    return divided(found, **{option: value for option, value in options.items() if option in divides})


def load_for(name: str, options: Mapping[str, Any], spec: str, build: Callable[[], nn.Module], seed: int = 0) -> Splits:
    """Load data for a model: what recipes and the command line read alike.

    Args:
        name: See the module's docstring.
        options: Keywords; ``size``, ``mean`` and ``std`` take the place of what the model's source says of pictures.
        spec: The name of the model that the images are for.
        build: Makes that model; it is asked where the data holds pictures.
        seed: Decides which images are drawn.

    Raises:
        OptionError: the name or an option is unknown.
        DataError: there are no such images, or nobody knows what the model expects of pictures.
    """
    given: dict[str, Any] = {**options, "seed": seed}
    transform = None
    if takes(find_data(name), "transform"):
        resolved = {option: given.pop(option, None) for option in ("size", "mean", "std")}
        transform = preprocessing(spec, build(), **resolved)
    return load_data(name, given, transform)


def divided(
    dataset: Dataset[Any],
    *,
    seed: int = 0,
    train: int | None = None,
    calibration: int = CALIBRATION,
    test: int | None = None,
) -> Splits:
    """Divide one data set at random: a fifth, or ``test`` entries, for the test, ``train`` of the others for training.

    Raises:
        DataError: nothing is left to train on.

    >>> splits = divided(torch.utils.data.TensorDataset(torch.arange(10)), calibration=3)
    >>> len(splits.train), len(splits.calibration), len(splits.test)
    (8, 3, 2)
    """
    size = len(cast("Sized", dataset))
    tested = max(1, round(TEST_SHARE * size)) if test is None else test
    if not 0 < tested < size:
        raise DataError(explain(f"{tested} of {size} images cannot be for the test", remedy="set test= to fewer"))
    order = torch.randperm(size, generator=torch.Generator().manual_seed(seed)).tolist()
    return joined(Subset(dataset, order[tested:]), Subset(dataset, order[:tested]), seed, train, calibration, None)


def joined(
    train: Dataset[Any],
    test: Dataset[Any],
    seed: int,
    trained: int | None,
    calibration: int,
    tested: int | None,
) -> Splits:
    """Splits from two parts that were made apart; images for calibration are some of those for training."""
    train = subset(train, trained, seed=seed)
    return Splits(train, subset(train, calibration, seed=seed + 1), subset(test, tested, seed=seed))


@DATA.register("imagefolder")
def folder_data(
    path: str | Path,
    transform: Transform,
    *,
    seed: int = 0,
    train: int | None = None,
    calibration: int = CALIBRATION,
    test: int | None = None,
) -> Splits:
    """Images in a folder per class, below ``train`` and ``val`` (or ``test``), or divided at random.

    Args:
        path: Holds ``train`` and ``val`` or ``test`` (see :func:`~vfsurgery.data.folders.parts_of`) with a folder per
            class each, or the folders of the classes.
        transform: From a PIL image to what the model expects.
        seed: Decides which images are drawn.
        train: So many training images; all by default.
        calibration: So many of *those* are for calibration, too, which looks at no labels.
        test: So many test images; all by default, or a fifth where the folder is not divided.

    Raises:
        DataError: there is no such folder, no image in it, or a class that training has not.
    """
    trained, tested = parts_of(path)
    images = Pictures(trained, transform)
    if tested is None:
        return divided(images, seed=seed, train=train, calibration=calibration, test=test)
    return joined(images, Pictures(tested, transform, images.classes), seed, train, calibration, test)


def torchvision_data(
    name: str,
    path: str | Path,
    transform: Transform,
    *,
    seed: int = 0,
    train: int | None = None,
    calibration: int = CALIBRATION,
    test: int | None = None,
    download: bool = False,
    **options: Any,
) -> Splits:
    """Any classification data set of torchvision, in the parts that it has.

    Args:
        name: The class in ``torchvision.datasets``, as in ``"FashionMNIST"``.
        path: Where it lies.
        transform: From a PIL image to what the model expects.
        seed: Decides which images are drawn.
        train: So many training images; all by default.
        calibration: So many of *those* are for calibration, too.
        test: So many test images; all by default, or a fifth of a data set that comes in one part.
        download: Whether to fetch it where it is not there.
        options: Passed on to the class.

    Raises:
        OptionError: torchvision has no such data set, or it takes no such option.
        DataError: it is not there, or damaged.
    """
    from torchvision import datasets

    kind = getattr(datasets, name, None)
    if name not in datasets.__all__ or not isinstance(kind, type):
        raise OptionError(explain(f"torchvision has no data set {name!r}", remedy=did_you_mean(name, datasets.__all__)))
    parameters = inspect.signature(kind).parameters
    if unknown := next((option for option in options if option not in parameters), None):
        remedy = did_you_mean(unknown, parameters)
        raise OptionError(explain(f"torchvision's {name} has no option {unknown!r}", remedy=remedy))
    needed = [
        each.name
        for each in parameters.values()
        if each.default is each.empty and each.kind is each.POSITIONAL_OR_KEYWORD and each.name != "root"
    ]
    if missing := next((option for option in needed if option not in options), None):
        raise OptionError(explain(f"torchvision's {name} needs the option {missing!r}", remedy="write it in options"))
    places = {"root": str(path), "download": download}
    made = {**options, "transform": transform, **{key: places[key] for key in places if key in parameters}}
    build = partial(_built, kind, made)
    if "train" in parameters:
        parts = build(train=True), build(train=False)
    elif "split" in parameters and "split" not in options:
        parts = build(split="train"), _test_part(build)
    else:
        return divided(build(), seed=seed, train=train, calibration=calibration, test=test)
    return joined(*parts, seed, train, calibration, test)


def _built(kind: type, options: Mapping[str, Any], **part: Any) -> Dataset[Any]:
    try:
        return kind(**options, **part)
    except (RuntimeError, OSError, ImportError) as error:  # not there, damaged, or read by another library
        cause = str(error).strip().partition("\n")[0] or type(error).__name__
        remedy = "put it there, or write download: true among the options of data"
        raise DataError(
            explain(f"cannot read {kind.__name__} from {options.get('root')}", cause=cause, remedy=remedy)
        ) from error


def _test_part(build: Callable[..., Dataset[Any]]) -> Dataset[Any]:
    """Most call it ``test``, some ``val``."""
    try:
        return build(split="test")
    except ValueError:
        return build(split="val")
