"""What is no network is told how to become one, also where it is only run."""

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.parallel import DataParallel

import vfsurgery as surgery
from vfsurgery.errors import OptionError
from vfsurgery.scoring.evaluation import evaluate_ensemble

DATA = [(torch.eye(2), torch.tensor([0, 1]))]


@pytest.mark.parametrize("given", ["net.pt", Path("net.pt")])
def test_a_path_is_no_network_to_evaluate(given):
    with pytest.raises(
        OptionError, match=r"is no torch.nn.Module but .*(str|Path)\n  remedy  build the network, and checkpoints"
    ):
        surgery.evaluate(given, DATA)


def test_a_state_dict_is_no_network_to_evaluate():
    layer = nn.Linear(2, 2)
    with pytest.raises(OptionError, match="build the network of these weights"):
        evaluate_ensemble([layer, layer.state_dict()], DATA, progress=False)
    assert surgery.evaluate(DataParallel(layer), DATA, progress=False) == surgery.evaluate(layer, DATA, progress=False)
