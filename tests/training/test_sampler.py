"""The sampler keeps METHOD.md's shares and the replay cap, and is replayable."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.training.sampler import Cells, GrowingArray, Sampler


def make(tau: float = 0.5, class_tau: float = 0.5, replay_cap: int = 10_000, seed: int = 0) -> Sampler:
    return Sampler(seed=seed, tau=tau, class_tau=class_tau, replay_cap=replay_cap)


def fill(sampler: Sampler, sizes: dict[int, int], classes: int = 1) -> np.ndarray:
    devices = np.concatenate([np.full(size, device) for device, size in sizes.items()])
    sampler.add(devices, np.arange(len(devices)) % classes)
    return devices


@pytest.mark.parametrize("tau", [0.0, 0.5, 1.0])
def test_shares_go_by_stored_samples_to_the_power_of_tau(tau: float) -> None:
    sampler = make(tau=tau)
    sizes = {0: 1000, 1: 250, 2: 40}
    devices = fill(sampler, sizes)
    drawn = np.concatenate([sampler.draw(step, 64) for step in range(200)])
    found = np.bincount(devices[drawn], minlength=3) / len(drawn)
    expected = np.array([size**tau for size in sizes.values()])
    assert np.allclose(found, expected / expected.sum(), atol=0.005)
    assert np.allclose(list(sampler.shares().values()), expected / expected.sum())


def test_each_batch_has_the_shares_not_only_the_mean() -> None:
    sampler = make(tau=0.0)
    devices = fill(sampler, {0: 900, 1: 90, 2: 9, 3: 1})
    for step in range(20):
        assert (np.bincount(devices[sampler.draw(step, 64)], minlength=4) == 16).all()


@pytest.mark.parametrize(("class_tau", "share"), [(1.0, 0.9), (0.5, 0.75), (0.0, 0.5)])
def test_rare_classes_of_a_skewed_device_are_raised(class_tau: float, share: float) -> None:
    sampler = make(class_tau=class_tau)
    labels = np.array([0] * 900 + [1] * 100)
    sampler.add(np.zeros(1000, int), labels)
    drawn = np.concatenate([sampler.draw(step, 64) for step in range(200)])
    assert np.isclose((labels[drawn] == 0).mean(), share, atol=0.015)


def test_no_sample_is_drawn_above_the_replay_cap() -> None:
    sampler = make(tau=0.0, replay_cap=3)
    devices = fill(sampler, {0: 50, 1: 5}, classes=4)
    drawn = [sampler.draw(step, 16) for step in range(30)]
    counts = np.bincount(np.concatenate(drawn), minlength=55)
    assert (counts == 3).all()  # everything was wanted, and no more than allowed
    assert np.array_equal(counts, sampler.counts)
    assert sampler.drawn == 165
    assert not len(drawn[-1])
    assert sampler.exhausted
    sampler.add(np.array([1]), np.array([0]))
    assert sampler.draw(30, 16).tolist() == [55] * 3
    assert devices[54] == 1


def test_an_exhausted_device_leaves_its_share_to_the_others() -> None:
    sampler = make(tau=0.0, replay_cap=2)
    devices = fill(sampler, {0: 1000, 1: 2})
    for step in range(10):
        batch = sampler.draw(step, 32)
        assert len(batch) == 32
    assert (devices[batch] == 0).all()


def test_draws_spread_evenly_within_a_class() -> None:
    sampler = make()
    fill(sampler, {0: 200})
    for step in range(100):
        sampler.draw(step, 40)
    assert sampler.counts.mean() == 20
    assert sampler.counts.std() < 2.0  # 4.5 if drawn blindly


def test_batches_depend_on_nothing_but_seed_step_samples_and_counts() -> None:
    straight = make(replay_cap=30)
    fill(straight, {0: 60, 1: 20}, classes=3)
    whole = [straight.draw(step, 16) for step in range(100)]
    first = make(replay_cap=30)
    devices = fill(first, {0: 60, 1: 20}, classes=3)
    for step in range(40):
        first.draw(step, 16)
    second = make(replay_cap=30)
    half = len(devices) // 2  # the order of arrival counts, not how it was cut into calls
    labels = np.arange(len(devices)) % 3
    second.add(devices[:half], labels[:half], first.counts[:half].copy())
    second.add(devices[half:], labels[half:], first.counts[half:].copy())
    for step in range(40, 100):
        assert np.array_equal(second.draw(step, 16), whole[step])
    other = make(seed=1)
    fill(other, {0: 60, 1: 20}, classes=3)
    assert not np.array_equal(other.draw(0, 16), whole[0])


def test_nothing_stored_gives_an_empty_batch() -> None:
    assert not len(make().draw(0, 16))


def test_growing_array_keeps_what_was_put_in() -> None:
    array = GrowingArray(np.int64)
    for start in range(0, 1000, 7):
        array.append(np.arange(start, min(start + 7, 1000)))
    assert array.values.tolist() == list(range(1000))


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(-3, 30)), max_size=60))
def test_cells_hold_what_was_put_in_and_not_taken_out(steps: list[tuple[int, int]]) -> None:
    cells = Cells()
    held: list[list[int]] = [[] for _ in range(5)]
    assert [cells.new() for _ in held] == list(range(5))
    following = 0
    for cell, count in steps:
        if count >= 0:
            numbers = list(range(following, following + count))
            cells.append(cell, np.array(numbers, np.int64))
            held[cell] += numbers
            following += count
        elif held[cell]:
            cells.remove(cell, held[cell].pop(count % len(held[cell])))
    for cell, wanted in enumerate(held):
        assert cells.length(cell) == len(wanted)
        chances = (np.arange(len(wanted)) + 0.5) / max(1, len(wanted))
        assert cells.pick(np.full(len(wanted), cell), chances).tolist() == wanted
