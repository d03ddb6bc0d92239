import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from wn21k_zoo.training.order import SampleOrder, permutation

LENGTHS = st.lists(st.integers(1, 9), min_size=1, max_size=8).map(tuple)


def whole(order, epoch):
    shard, number, _ = order.samples(epoch, 0, len(order))
    return list(zip(shard.tolist(), number.tolist(), strict=True))


@settings(deadline=None, max_examples=60)
@given(LENGTHS, st.integers(0, 4), st.integers(0, 3), st.integers(0, 3), st.data())
def test_each_epoch_has_each_sample_once_however_it_is_cut(lengths, window, seed, epoch, data):
    order = SampleOrder(lengths, window, seed)
    samples = whole(order, epoch)
    assert sorted(samples) == [(shard, number) for shard, length in enumerate(lengths) for number in range(length)]
    begin = data.draw(st.integers(0, len(samples) - 1))
    end = data.draw(st.integers(begin + 1, len(samples)))
    shard, number, last = order.samples(epoch, begin, end)
    assert list(zip(shard.tolist(), number.tolist(), strict=True)) == samples[begin:end]
    assert shard[-1] in order.windows(epoch)[last]


def test_epochs_and_seeds_differ_and_repeat():
    lengths = (50, 60, 70)
    assert whole(SampleOrder(lengths, 2, 0), 0) == whole(SampleOrder(lengths, 2, 0), 0)
    assert whole(SampleOrder(lengths, 2, 0), 0) != whole(SampleOrder(lengths, 2, 0), 1)
    assert whole(SampleOrder(lengths, 2, 0), 0) != whole(SampleOrder(lengths, 2, 1), 0)
    assert (
        whole(SampleOrder(lengths, 0, 0), 0)
        == whole(SampleOrder(lengths, 0, 1), 3)
        == sorted(whole(SampleOrder(lengths, 0, 0), 0))
    )


@given(LENGTHS, st.integers(1, 60))
def test_some_samples_are_spread_evenly_over_all(lengths, limit):
    every, some = (whole(SampleOrder(lengths, 0, 0, bound), 0) for bound in (None, limit))
    assert len(some) == len(set(some)) == min(limit, len(every))
    places = [*(every.index(sample) for sample in some), len(every)]
    gaps = np.diff(places)
    assert places[0] == 0
    assert gaps.max() - gaps.min() <= 1


def test_a_window_mixes_its_shards_only():
    order = SampleOrder((100,) * 9, 3, 5)
    shard, _, _ = order.samples(1, 0, 300)
    assert set(shard.tolist()) == set(order.windows(1)[0].tolist())
    assert np.abs(np.diff(np.flatnonzero(shard == shard[0]))).max() < 30


def test_the_permutation_is_the_one_it_has_always_been():
    assert permutation(10, 1, 2, 3).tolist() == [1, 9, 0, 5, 6, 8, 3, 7, 2, 4]


def test_the_order_of_samples_is_the_one_it_has_always_been():
    shard, number, window = SampleOrder((3, 2, 4), 2, 1).samples(1, 0, 9)
    assert (shard.tolist(), number.tolist(), window) == ([0, 0, 0, 1, 1, 2, 2, 2, 2], [1, 0, 2, 0, 1, 1, 2, 0, 3], 1)


def test_shards_and_what_is_within_them_are_shuffled_anew_by_epoch_seed_and_window():
    def order(seed, epoch, lengths=(1,) * 40):
        return np.concatenate(SampleOrder(lengths, 2, seed).windows(epoch)).tolist()

    assert len({tuple(order(seed, epoch)) for seed in range(3) for epoch in range(3)}) == 9
    one = {tuple(whole(SampleOrder((40,), 1, seed), epoch)) for seed in range(3) for epoch in range(3)}
    assert len(one) == 9
    _, number, _ = SampleOrder((40, 40), 1, 0).samples(0, 0, 80)
    assert number[:40].tolist() != number[40:].tolist()
