"""Networks that begin with an embedding take numbers of tokens as data, which stay integers."""

from __future__ import annotations

import pytest
import torch
from tiny_nets import planted
from torch import Tensor, nn

import vfsurgery as surgery
from vfsurgery.discovery.verification import randomize
from vfsurgery.errors import DataError
from vfsurgery.passes.agreement import Known, judge

TOKENS = torch.randint(20, (300, 7), generator=torch.Generator().manual_seed(0))


class Reader(nn.Module):
    """The mean over tokens of what two layers make of each."""

    def __init__(self, words: int = 20) -> None:
        super().__init__()
        self.words, self.a, self.b, self.head = (
            nn.Embedding(words, 8),
            nn.Linear(8, 12),
            nn.Linear(12, 10),
            nn.Linear(10, 4),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.b(self.a(self.words(x)).relu()).relu().mean(1))


def reader(seed: int, words: int = 20) -> Reader:
    model = Reader(words).double().eval()
    randomize(model, torch.Generator().manual_seed(seed))
    return model


@pytest.mark.parametrize("data", [TOKENS, TOKENS.int(), [TOKENS[:200], TOKENS[200:, :5]], (TOKENS, TOKENS[:, 0] % 4)])
def test_a_permuted_copy_is_found_and_merges_to_the_network(data: object) -> None:
    model = reader(0)
    copy = planted(model, surgery.find_groups(model, TOKENS[:2]))
    merged = surgery.merge(model, copy, data=data, matching="activations", renormalize=None, progress=False)
    plain = surgery.merge(model, copy, data=data, matching="identity", renormalize=None, progress=False)
    with torch.no_grad():
        assert torch.allclose(merged(TOKENS), model(TOKENS), rtol=1e-9)
        assert not torch.allclose(plain(TOKENS), model(TOKENS), rtol=1e-2)


def test_all_ways_are_tried_and_the_result_is_evaluated_on_tokens() -> None:
    a, b = reader(0), reader(1)
    merged = surgery.merge(a, b, data=TOKENS, progress=False)
    assert len(surgery.report_of(merged).trials) == 7
    labels = merged(TOKENS).argmax(1)
    assert surgery.evaluate(merged, (TOKENS, labels), progress=False).accuracy == 1.0
    assert surgery.evaluate(merged, (TOKENS, (labels + 1) % 4), progress=False).accuracy == 0.0
    pruned = surgery.prune(a, 0.5)
    assert surgery.renormalize(pruned, reference=a, data=TOKENS, progress=False) is not None


def test_batches_of_the_same_sum_are_told_apart() -> None:
    a, b, known = reader(0), reader(1), Known()
    batches = [torch.tensor([[1, 5, 0, 0, 0, 0, 0]]), torch.tensor([[2, 4, 0, 0, 0, 0, 0]])]
    together = judge(a, [b], (1.0,), batches, known)
    alone = [judge(a, [b], (1.0,), [batch]) for batch in batches]
    assert together is not None and len(known) == 2
    assert together.crossed.tolist() == [found.cross_entropy for found in alone if found is not None]


def test_what_takes_no_tokens_says_so() -> None:
    torch.manual_seed(0)
    models = [nn.Sequential(nn.Linear(7, 6), nn.ReLU(), nn.Linear(6, 3)).eval() for _ in range(2)]
    with pytest.raises(DataError, match=r"(?s)does not run on the integers.*\(N, 7\).*cause .*dtype.*floating-point"):
        surgery.merge(models, data=TOKENS, progress=False)
    with pytest.raises(DataError, match=r"(?s)holds torch.int64 values.*\(2, 3, 8, 8\).*tokens.*images.float"):
        surgery.merge(models, data=torch.zeros(2, 3, 8, 8, dtype=torch.int64), progress=False)
    with pytest.raises(DataError, match=r"(?s)does not run.*cause +index out of range.*numbers below its size"):
        surgery.merge(reader(0, words=9), reader(1, words=9), data=TOKENS, progress=False)
