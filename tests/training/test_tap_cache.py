"""The cache gives back what the frames held, counts what it cannot use, and survives crashes and damage."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from coordinator.store.engine import Store
from coordinator.store.registry import insert_plan
from coordinator.training.take_in import take_in
from coordinator.training.tap_cache import TapCache
from side_tuning.network.side_network import block_inputs
from side_tuning.wire.codecs import decode_vectors
from side_tuning.wire.frame import Frame
from side_tuning.wire.messages import TapPlan
from tests.training import small_fleet
from tests.training.small_fleet import DEEP, DEPTHS, SHALLOW, arrive, frame, mixed_fleet, plan, prepare

KEY = {"run": "one"}


def fill(store: Store, folder: Path, tap_plan: TapPlan | None = None, limit: int = 2048) -> TapCache:
    tap_plan = tap_plan or plan()
    cache = TapCache(folder, KEY, tap_plan.mode)
    while take_in(store, cache, tap_plan, limit):
        pass
    return cache


def decoded(sent: Frame, position: int, tap_plan: TapPlan) -> np.ndarray:
    """(B, d) or (T, B, d) of one sample, straight from its frame."""
    counts = [s.tokens + sent.summary_rows if tap_plan.mode == "sequence" else 1 for s in sent.samples]
    start = sum(counts[:position])
    taps = {t.layer: decode_vectors(t.data, t.rows, t.width, t.codec, t.group)[start : start + counts[position]] for t in sent.taps}
    stacked = block_inputs(taps, tap_plan.layers(DEPTHS[sent.backbone]))
    return stacked[0] if tap_plan.mode == "pooled" else stacked


@pytest.mark.parametrize("blocks", [2, 3])  # with 3, a layer of the two-layer backbone stands for two blocks
def test_pooled_samples_come_back_as_sent(store: Store, tmp_path: Path, blocks: int) -> None:
    tap_plan = plan(blocks=blocks)
    prepare(store, tap_plan)
    frames = mixed_fleet(80, tap_plan)
    arrive(store, frames)
    cache = fill(store, tmp_path / "cache", tap_plan, limit=7)
    sent = [(f, position) for f in frames for position in range(len(f.samples))]
    assert len(cache) == len(sent) == 80
    for number, (f, position) in enumerate(sent):
        (rows,) = cache.gather(np.array([number]))
        assert rows.fingerprint == f.backbone
        assert np.allclose(rows.inputs[0], decoded(f, position, tap_plan), rtol=1e-3, atol=1e-3)
        record = cache.records[number]
        assert cache.devices[record["device"]] == f.device
        assert record["label"] == rows.labels[0] == f.samples[position].label
        assert bool(record["held_out"]) == (f.samples[position].split == "held-out")


@pytest.mark.parametrize(("rank", "summary"), [(8, False), (8, True), (16, True)])
def test_sequences_come_back_padded_with_their_mask(store: Store, tmp_path: Path, rank: int, summary: bool) -> None:
    tap_plan = plan(mode="sequence", rank=rank, summary=summary)  # of summaries of 12 and 20 values: two and three rows, or one and two
    prepare(store, tap_plan)
    frames = mixed_fleet(80, tap_plan)
    arrive(store, frames)
    cache = fill(store, tmp_path / "cache", tap_plan)
    groups = cache.gather(np.arange(len(cache)))
    assert {group.fingerprint for group in groups} == {SHALLOW, DEEP}
    for group in groups:
        sent = [(f, n) for f in frames if f.backbone == group.fingerprint for n in range(len(f.samples))]
        assert len(sent) == len(group.labels)
        for row, (f, position) in enumerate(sent):
            real = group.inputs[row][:, group.mask[row]]  # (B, T, d)
            assert np.allclose(real.transpose(1, 0, 2), decoded(f, position, tap_plan), rtol=1e-3, atol=1e-3)
            assert not group.inputs[row][:, ~group.mask[row]].any()


def test_a_smaller_rank_is_cut_from_a_larger_one(store: Store, tmp_path: Path) -> None:
    large = plan(mode="sequence", rank=6)
    prepare(store, large)
    sent = frame("attic", 1, [0, 1], tap_plan=large)
    arrive(store, [sent])
    small = plan(2, mode="sequence", rank=4)
    with store.write() as session:
        insert_plan(session, small, at=small_fleet.AT)
    cache = fill(store, tmp_path / "cache", small)
    (rows,) = cache.gather(np.array([1]))
    assert np.allclose(rows.inputs[0].transpose(1, 0, 2), decoded(sent, 1, large)[..., :4], rtol=1e-3, atol=1e-3)
    cache = fill(store, tmp_path / "other", plan(mode="sequence", rank=7))
    assert not len(cache)
    assert cache.skipped == {"rank below the plan's": 2}


def test_a_summary_serves_its_own_plans_alone(store: Store, tmp_path: Path) -> None:
    tap_plan = plan(mode="sequence", rank=6, summary=True)
    prepare(store, tap_plan)
    arrive(store, [frame("attic", 1, [0, 1], tap_plan=tap_plan), frame("barn", 1, [0, 1], fingerprint=DEEP, tap_plan=tap_plan)])
    cache = fill(store, tmp_path / "cache", tap_plan)
    assert [(shard.width, shard.summary_width) for shard in cache.shards] == [(6, 12), (6, 20)]
    again = TapCache(tmp_path / "cache", KEY, "sequence")
    assert [shard.summary_width for shard in again.shards] == [12, 20]
    other = fill(store, tmp_path / "pooled", plan())
    assert other.skipped == {"other mode or pooling": 4}
    larger = fill(store, tmp_path / "larger", plan(mode="sequence", rank=7, summary=True))
    assert larger.skipped == {"rank below the plan's": 4}


def test_samples_without_a_summary_are_of_no_use_where_one_is_wanted(store: Store, tmp_path: Path) -> None:
    tap_plan = plan(mode="sequence", rank=6)
    prepare(store, tap_plan)
    arrive(store, [frame("attic", 1, [0, 1], tap_plan=tap_plan)])
    assert fill(store, tmp_path / "cache", plan(mode="sequence", rank=6, summary=True)).skipped == {"no summary": 2}
    # As an old gateway would take it: the version is that of a plan with summaries, the frame has none.
    changed = plan(2, mode="sequence", rank=6, summary=True)
    with store.write() as session:
        insert_plan(session, changed, at=small_fleet.AT)
    arrive(store, [replace(frame("attic", 2, [0, 1], tap_plan=tap_plan), plan_version=2)])
    assert fill(store, tmp_path / "again", changed).skipped == {"no summary": 4}


@pytest.mark.parametrize(("rank", "summary"), [(4, True), (6, False), (4, False)])
def test_a_summary_is_folded_anew_for_a_smaller_rank_or_left_out(store: Store, tmp_path: Path, rank: int, summary: bool) -> None:
    sent_plan, wanted = plan(mode="sequence", rank=6, summary=True), plan(mode="sequence", rank=rank, summary=summary)
    prepare(store, sent_plan)
    frames = [frame("attic", 1, [0, 1], tap_plan=sent_plan), frame("barn", 1, [0, 1], fingerprint=DEEP, tap_plan=sent_plan)]
    arrive(store, frames)
    cache = fill(store, tmp_path / "cache", wanted)
    assert not cache.skipped
    for number in range(4):
        (rows,) = cache.gather(np.array([number]))
        sent, width = frames[number // 2], (12, 20)[number // 2]
        whole = decoded(sent, number % 2, sent_plan)  # (rows, B, 6)
        k = -(-width // 6)
        vector = whole[:k].swapaxes(0, 1).reshape(2, -1)[:, :width]
        found = rows.inputs[0]  # (B, rows, rank)
        now = -(-width // rank) if summary else 0
        assert found.shape == (2, now + len(whole) - k, rank)
        assert np.allclose(found[:, now:].swapaxes(0, 1), whole[k:, :, :rank], rtol=1e-3, atol=1e-3)
        if summary:
            assert np.allclose(found[:, :now].reshape(2, -1)[:, :width], vector, rtol=1e-3, atol=1e-3)


def test_samples_of_no_use_are_skipped_and_counted(store: Store, tmp_path: Path) -> None:
    prepare(store)
    arrive(store, [frame("attic", 1, [0, None, 2]), frame("attic", 2, [1, 1], fingerprint=DEEP, layers=[1, 4])])
    renamed = plan(2, labels=("light", "door", "music"))
    with store.write() as session:
        insert_plan(session, renamed, at=small_fleet.AT)
    arrive(store, [frame("attic", 3, [0], tap_plan=renamed)])
    cache = fill(store, tmp_path / "cache")
    assert cache.records["label"].tolist() == [0, 2]
    assert cache.skipped == {"no label": 1, "taps do not cover the plan's layers": 2, "other labels": 1}


def test_a_reopened_cache_reads_nothing_twice(store: Store, tmp_path: Path) -> None:
    prepare(store)
    arrive(store, mixed_fleet(80))
    first = fill(store, tmp_path / "cache")
    expected = first.gather(np.arange(80))
    first.close()
    second = TapCache(tmp_path / "cache", KEY, "pooled")
    assert take_in(store, second, plan()) == 0
    for a, b in zip(expected, second.gather(np.arange(80)), strict=True):
        assert np.array_equal(a.inputs, b.inputs)
        assert np.array_equal(a.labels, b.labels)
    assert second.devices == first.devices


def test_what_a_crash_left_behind_the_last_commit_is_cut_off(store: Store, tmp_path: Path) -> None:
    prepare(store)
    frames = mixed_fleet(80)
    arrive(store, frames[:4])
    cache = fill(store, tmp_path / "cache")
    cache.close()
    for name in ("index", "shard-0"):
        with (tmp_path / "cache" / name).open("ab") as file:
            file.write(b"half a record")
    arrive(store, frames[4:])
    cache = fill(store, tmp_path / "cache")
    fresh = fill(store, tmp_path / "fresh")
    assert len(cache) == 80
    for a, b in zip(cache.gather(np.arange(80)), fresh.gather(np.arange(80)), strict=True):
        assert np.array_equal(a.inputs, b.inputs)


@pytest.mark.parametrize("damage", ["shard-0", "index", "cache.json", "key", "order"])
def test_a_damaged_cache_is_made_anew(store: Store, tmp_path: Path, damage: str) -> None:
    prepare(store)
    arrive(store, mixed_fleet(80))
    folder = tmp_path / "cache"
    fill(store, folder).close()
    if damage == "key":
        description = json.loads((folder / "cache.json").read_text())
        (folder / "cache.json").write_text(json.dumps({**description, "key": {"run": "two"}}))
    elif damage == "order":
        content = (folder / "index").read_bytes()
        half = len(content) // 2
        (folder / "index").write_bytes(content[half:] + content[:half])
    else:
        content = (folder / damage).read_bytes()
        (folder / damage).write_bytes(content[: len(content) // 2])
    assert not len(TapCache(folder, KEY, "pooled"))
    assert len(fill(store, folder)) == 80


def test_large_values_are_clipped_not_infinite(store: Store, tmp_path: Path) -> None:
    prepare(store)
    cache = TapCache(tmp_path / "cache", KEY, "pooled")
    shard = cache.open_shard(SHALLOW, (1, 2), 3)
    from coordinator.training.tap_cache import Entry

    cache.commit(cache.append(shard, [Entry(1, "attic", 0, held_out=False, vectors=np.full((1, 6), 1e6, np.float32))]), 1)
    assert np.isfinite(cache.gather(np.array([0]))[0].inputs).all()
