"""LoRA adapters among the sources of a merge: folded into copies of their base."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import cast

from torch import Tensor, nn

from vfsurgery.combining.adapters import check_same_base, fold_adapter, read_adapter
from vfsurgery.errors import IncompatibleModelsError, OptionError, explain
from vfsurgery.tracing.wrappers import network


def with_adapters(
    given: Sequence[nn.Module | str | Path], base: nn.Module | Mapping[str, Tensor] | str | None
) -> list[nn.Module]:
    """The same sources, folders of adapters being networks of their own: what peft's ``merge_and_unload`` gives.

    What is neither is left to who checks networks.

    Folding comes before anything else looks at a source, since the fast path of ``nn.TransformerEncoderLayer`` leaves
    out what is attached to a layer and not part of its weights.

    Raises:
        CheckpointError: a folder cannot be read, is no adapter, or its base is neither given nor named.
        OptionError: the base is not given as a model.
        IncompatibleModelsError: an adapter does not fit the base, or is of another one than others.

    Warns:
        SurgeryWarning: as :func:`~vfsurgery.combining.fold_adapter`.
    """
    paths = [Path(each) for each in given if isinstance(each, str | Path)]
    folders = [path for path in paths if base is not None or path.is_dir()]  # any other text is refused as no model
    if not folders:
        return cast("list[nn.Module]", [*given])
    adapters = [read_adapter(folder) for folder in folders]
    if not isinstance(base, nn.Module):
        named = adapters[0].named_base() if base is None else adapters[0].base_name
        raise OptionError(
            explain(
                f"{folders[0]} is an adapter, and there is no network to fold it into",
                base=named,
                remedy="base= that network, as a module",
            )
        )
    check_same_base(adapters)
    inner = network(base, "the base")
    return [_folded(inner, Path(each)) if isinstance(each, str | Path) else each for each in given]


def _folded(base: nn.Module, folder: Path) -> nn.Module:
    state, own = fold_adapter(base, folder), base.state_dict()
    unlike = next((name for name, tensor in state.items() if tensor.shape != own[name].shape), None)
    if unlike is not None:
        raise IncompatibleModelsError(
            explain(
                f"{folder} brings a tensor of another shape than its base has",
                tensor=unlike,
                shapes=f"{tuple(state[unlike].shape)} in the adapter, {tuple(own[unlike].shape)} in the base",
                remedy="build the base with as many classes",
            )
        )
    found = copy.deepcopy(base)
    found.load_state_dict(state)
    return found
