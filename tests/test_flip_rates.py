"""Flips are counted image by image, in one pass, and their rates are the published ones."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

import vfsurgery as surgery
from vfsurgery.errors import DataError, OptionError
from vfsurgery.scoring.flip_rates import FlipRates, relative_negative_rate

CLASSES = 4
LABELS = torch.tensor([0, 1, 2, 3, 0, 1, 2, 3])


class Answers(nn.Module):
    """Gives fixed answers: the images are their numbers."""

    def __init__(self, answers: list[int]) -> None:
        super().__init__()
        self.register_buffer("answers", torch.tensor(answers))

    def forward(self, images: Tensor) -> Tensor:
        return nn.functional.one_hot(self.answers[images[:, 0].long()], CLASSES).float()


IMAGES = torch.arange(8.0)[:, None]
OLD = Answers([0, 1, 2, 3, 0, 1, 0, 0])  # right on the first six
OTHER = Answers([0, 0, 2, 3, 0, 1, 2, 3])  # wrong on the second alone
NEW = Answers([0, 1, 0, 3, 0, 2, 2, 2])  # wrong on 2, 5 and 7


def test_flips_are_counted_image_by_image():
    found = surgery.flips(OLD, NEW, (IMAGES, LABELS))
    assert found.rates == (FlipRates("old", count=8, old_wrong=2, new_wrong=3, positive=1, negative=2),)
    assert found.rates[0].negative_impact == pytest.approx(2 / 3)
    assert found.rates[0].relative_negative_rate == pytest.approx((2 / 8) / ((6 / 8) * (3 / 8)))


def test_several_old_models_have_a_row_each_and_one_for_where_all_were_right():
    found = surgery.flips({"a": OLD, "b": OTHER}, NEW, (IMAGES, LABELS))
    assert [rates.old for rates in found.rows] == ["a", "b", "where all were right"]
    assert (found.rates[1].negative, found.rates[1].positive) == (3, 1)
    # images 0, 2, 3, 4 and 5 were right in both, and 2 and 5 of them are wrong now
    assert found.all_right == FlipRates("where all were right", 5, old_wrong=0, new_wrong=2, positive=0, negative=2)


@pytest.mark.parametrize("seed", range(5))
def test_accuracy_changes_by_positive_less_negative_flips(seed):
    generator = torch.Generator().manual_seed(seed)
    old, new = (Answers(torch.randint(CLASSES, (8,), generator=generator).tolist()) for _ in range(2))
    rates = surgery.flips(old, new, (IMAGES, LABELS)).rates[0]
    gain = surgery.evaluate(new, (IMAGES, LABELS)).accuracy - surgery.evaluate(old, (IMAGES, LABELS)).accuracy
    assert rates.positive_rate - rates.negative_rate == pytest.approx(gain, abs=1e-12)
    assert rates.negative_rate <= min(rates.new_error, 1 - rates.old_error)


def test_a_model_never_flips_against_itself_and_always_against_its_opposite():
    own = OLD.answers[:, None].expand(8, CLASSES)[:, 0]
    same = surgery.flips(OLD, OLD, (IMAGES, own))
    assert (same.rates[0].negative_rate, same.rates[0].positive_rate) == (0, 0)
    assert math.isnan(same.rates[0].negative_impact)
    opposite = surgery.flips(OLD, Answers(((own + 1) % CLASSES).tolist()), (IMAGES, own))
    assert opposite.rates[0].negative_rate == 1


def test_the_relative_rate_is_the_published_one():
    # Yan et al., 2021, Table 2a: error rates 30.24 % and 30.29 %, NFR 6.44 %, relative NFR 30.48 %
    assert relative_negative_rate(0.0644, 0.3024, 0.3029) == pytest.approx(0.3048, abs=5e-5)
    assert relative_negative_rate(0.0644, 0.3029, 0.3024) != pytest.approx(0.3048, abs=5e-5)
    assert relative_negative_rate(0.7 * 0.3, 0.3, 0.3) == pytest.approx(1)


def test_a_rate_without_denominator_is_nan():
    assert math.isnan(relative_negative_rate(0.0, 0.3, 0.0))
    assert math.isnan(relative_negative_rate(0.0, 1.0, 0.3))
    empty = FlipRates("none", 0, 0, 0, 0, 0)
    assert math.isnan(empty.negative_rate)
    assert empty.to_dict()["negative_rate"] is None


def test_all_models_are_read_in_one_pass():
    class Counted:
        passes = 0

        def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
            Counted.passes += 1
            return zip(IMAGES.split(3), LABELS.split(3), strict=True)

    found = surgery.flips([OLD, OTHER], NEW, Counted())
    assert Counted.passes == 1
    assert [rates.old for rates in found.rates] == ["source 0", "source 1"]
    assert found.all_right == surgery.flips([OLD, OTHER], NEW, (IMAGES, LABELS)).all_right


def test_training_modes_come_back():
    old = OLD.train()
    surgery.flips(old, NEW, (IMAGES, LABELS))
    assert old.training


def test_flips_print_a_table_and_are_plain_json():
    found = surgery.flips([OLD, OTHER], NEW, (IMAGES, LABELS))
    assert str(found).splitlines()[1].split() == ["source", "0", "8", "25.00%", "12.50%", "0.889", "66.67%"]
    assert json.loads(json.dumps(found.to_dict()))["rates"][1]["negative"] == 3


def test_there_must_be_an_old_model_and_labels_that_it_can_give():
    with pytest.raises(OptionError, match=r"there is no old model to compare with\n  remedy  pass a model"):
        surgery.flips([], NEW, (IMAGES, LABELS))
    with pytest.raises(DataError, match=r"2 labels are outside the classes of Answers\n  remedy"):
        surgery.flips(OLD, NEW, (IMAGES, LABELS + 1))
    with pytest.raises(DataError, match="batch 0 has no labels"):
        surgery.flips(OLD, NEW, IMAGES)
