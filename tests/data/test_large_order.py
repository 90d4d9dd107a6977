"""The order of very many samples: each once, without a trace of their order, computed from any place on."""

import time

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from accel_trainer.data import order
from accel_trainer.data.large_order import LargeOrder
from accel_trainer.data.order import index_batches


@pytest.mark.parametrize("length", [2, 3, 4, 5, 17, 255, 256, 257, 1000, 2**16, 2**16 + 1, 200_003])
def test_each_sample_comes_once(length):
    for seed in range(3):
        whole = LargeOrder(length, seed)[0:length]
        assert whole.dtype == torch.int64 and torch.equal(whole.sort().values, torch.arange(length))


def test_parts_are_those_of_the_whole_from_any_place():
    whole = LargeOrder(300_000, 1)[0:300_000]
    for start, stop in [(0, 7), (65_530, 65_540), (131_071, 262_147), (299_990, 300_000), (5, 5)]:
        assert torch.equal(LargeOrder(300_000, 1)[start:stop], whole[start:stop])
    walked = LargeOrder(300_000, 1)
    assert torch.equal(torch.cat([walked[start : start + 971] for start in range(0, 300_000, 971)]), whole)


def test_the_order_is_the_same_for_ever():
    assert LargeOrder(10**9, 5)[10**9 - 4 : 10**9].tolist() == [193034974, 741665661, 272509955, 210519539]


def test_orders_look_drawn():
    """Expectations of random permutations, with six standard deviations of room."""
    length, places = 100_003, torch.arange(100_003, dtype=torch.float64)
    orders = [LargeOrder(length, seed)[0:length] for seed in range(8)]
    for number, drawn in enumerate(orders):
        values = drawn.double()
        for other in (places, values.roll(1), *(one.double() for one in orders[:number])):
            assert abs(torch.corrcoef(torch.stack([values, other]))[0, 1]) < 6 / length**0.5
        assert (drawn == torch.arange(length)).sum() < 10  # fixed points: 1 is expected
        steps = (drawn[1:] - drawn[:-1]).abs()
        assert (steps == 1).sum() < 20  # neighbours that stay so: 2 are expected
        cells = torch.bincount((drawn[:50_000] // 1000), minlength=101)[:100].double()
        assert ((cells - 500) ** 2 / 250).sum() < 100 + 6 * 200**0.5
        parity = (drawn[:50_000] % 2).sum()
        assert abs(parity - 25_000) < 6 * 112


class Endless(Dataset):
    def __init__(self, length):
        self.length = length

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        return index


@pytest.mark.parametrize("shuffle", [False, True])
def test_ten_billion_samples_take_no_memory_and_no_time(shuffle):
    loader = DataLoader(Endless(10**10), 64, shuffle=shuffle)
    started = time.perf_counter()
    for number in (0, 10**7, 10**10 // 64 - 1):
        first = next(index_batches(loader, 0, 1, number))
        assert len(first) == 64 and 0 <= int(first.min()) and int(first.max()) < 10**10
    assert time.perf_counter() - started < 1.0
    assert torch.equal(first, next(index_batches(loader, 0, 1, number)))
    if shuffle:
        assert not torch.equal(first, next(index_batches(loader, 0, 2, number)))
        assert not torch.equal(first, next(index_batches(loader, 1, 1, number)))
    else:
        assert first.tolist() == list(range(number * 64, number * 64 + 64))


def test_smaller_data_keep_torchs_order():
    assert order._LARGE == 10**8
    loader = DataLoader(Endless(1000), 1000, shuffle=True)
    seed = order.derive_seed(0, order.ORDER, 1)
    expected = torch.randperm(1000, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(next(index_batches(loader, 0, 1)), expected)
