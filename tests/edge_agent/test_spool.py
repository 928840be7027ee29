"""The spool: what it acknowledged it keeps, through kill -9, damage and full disks; its counters always add up."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from edge_agent.spool import Spool, SpoolError, SpoolFull
from side_tuning.wire.messages import Receipt, SpoolCount

NOW = 1_700_000_000.0


def open_spool(path: Path, *, max_bytes: int = 1_000_000, policy: Any = "pause") -> Spool:
    return Spool.open(path, max_bytes=max_bytes, policy=policy, clock=lambda: NOW)


def payload(sequence: int, size: int = 1000) -> bytes:
    return random.Random(sequence).randbytes(size)


def one_frame(size: int = 1000) -> Callable[[int, int], list[bytes]]:
    return lambda sequence, _: [payload(sequence, size)]


def balanced(count: SpoolCount) -> bool:
    return count.produced == count.receipted + count.spooled + count.dropped


def test_frames_come_back_as_they_went_in_until_receipted(tmp_path: Path) -> None:
    produced: list[int] = []

    def build(sequence: int, so_far: int) -> list[bytes]:
        produced.append(so_far)
        return [payload(sequence)]

    with open_spool(tmp_path / "spool.db") as spool:
        assert [spool.append([f"s{n}a", f"s{n}b"], build) for n in range(5)] == [[1], [2], [3], [4], [5]]
        assert produced == [2, 4, 6, 8, 10]
        frames = spool.pending(1, 3)
        assert [(f.sequence, f.payload, f.samples, f.created_at) for f in frames] == [(n, payload(n), 2, NOW) for n in (2, 3, 4)]
        assert spool.acknowledge(Receipt(spool.id, 2, (4, 5))) == 4
        assert spool.acknowledge(Receipt(spool.id, 2, (4, 5))) == 0
        assert spool.acknowledge(Receipt("another spool", 5)) == 0
        count = spool.count()
    assert (count.produced, count.receipted, count.spooled, count.spooled_frames, count.spooled_bytes) == (10, 8, 2, 1, 1000)
    assert (count.floor, count.next_sequence) == (3, 6)


def test_everything_survives_closing_and_opening(tmp_path: Path) -> None:
    with open_spool(tmp_path / "spool.db") as spool:
        first_id = spool.id
        spool.append(["a", "b"], one_frame())
        spool.append(["c"], one_frame())
        spool.acknowledge(Receipt(spool.id, 1))
        spool.refuse("d", "no text")
        spool.refuse(None, "file missing")
        spool.set_setting("paused", "yes")
        spool.add_bytes_sent(4321)
        before = spool.count()
    with open_spool(tmp_path / "spool.db") as spool:
        assert spool.id == first_id
        assert spool.count() == before
        assert before.refused == {"no text": 1, "file missing": 1}
        assert [spool.seen(s) for s in ("a", "b", "c", "d", "e")] == [True, True, True, True, False]
        assert spool.get_setting("paused") == "yes"
        assert spool.get_setting("never set") is None
        assert spool.bytes_sent == 4321
        assert spool.append(["e"], one_frame()) == [3]


def test_parts_count_their_samples_once_and_go_together(tmp_path: Path) -> None:
    with open_spool(tmp_path / "spool.db", max_bytes=100_000, policy="drop-oldest") as spool:
        assert spool.append(["big"], lambda s, _: [payload(s + n, 30_000) for n in range(3)]) == [1, 2, 3]
        assert [f.samples for f in spool.pending(0, 9)] == [1, 0, 0]
        spool.append(["x"], one_frame(30_000))
        assert [f.sequence for f in spool.pending(0, 9)] == [4]
        count = spool.count()
        assert (count.produced, count.dropped, count.spooled, count.floor) == (2, 1, 1, 4)


def test_pause_refuses_frames_until_there_is_room(tmp_path: Path) -> None:
    with open_spool(tmp_path / "spool.db", max_bytes=100_000) as spool:
        for n in range(100):
            spool.append([f"s{n}"], one_frame())
        with pytest.raises(SpoolFull, match=r"raise spool\.max_bytes"):
            spool.append(["one more"], one_frame())
        assert not spool.seen("one more")
        assert spool.count().next_sequence == 101
        spool.acknowledge(Receipt(spool.id, 1))
        assert spool.append(["one more"], one_frame()) == [101]
        assert balanced(spool.count())


def test_drop_oldest_counts_and_spares_frames_that_may_be_on_their_way(tmp_path: Path) -> None:
    with open_spool(tmp_path / "spool.db", max_bytes=100_000, policy="drop-oldest") as spool:
        for n in range(100):
            spool.append([f"s{n}"], one_frame())
        assert len(spool.pending(0, 10)) == 10  # a window of ten is being published
        for n in range(100, 150):
            spool.append([f"s{n}"], one_frame())
        count = spool.count()
        assert (count.dropped, count.spooled, count.floor) == (50, 100, 1)
        assert [f.sequence for f in spool.pending(0, 200)] == [*range(1, 11), *range(61, 151)]
        spool.acknowledge(Receipt(spool.id, 10))
        assert spool.count().floor == 61
        assert spool.seen("s20")
        assert balanced(spool.count())


def test_a_frame_larger_than_the_spool_names_the_setting(tmp_path: Path) -> None:
    with open_spool(tmp_path / "spool.db", max_bytes=70_000, policy="drop-oldest") as spool:
        spool.append(["kept"], one_frame())
        with pytest.raises(SpoolError, match=r"raise spool\.max_bytes"):
            spool.append(["huge"], one_frame(80_000))
        assert spool.count().spooled == 1


def test_a_failing_build_changes_nothing(tmp_path: Path) -> None:
    def broken(_sequence: int, _produced: int) -> list[bytes]:
        raise ZeroDivisionError

    with open_spool(tmp_path / "spool.db") as spool:
        with pytest.raises(ZeroDivisionError):
            spool.append(["a"], broken)
        assert not spool.seen("a")
        assert spool.append(["a"], one_frame()) == [1]


def test_a_second_agent_is_kept_out(tmp_path: Path) -> None:
    with open_spool(tmp_path / "spool.db"), pytest.raises(SpoolError, match="in use by another edge-agent"):
        open_spool(tmp_path / "spool.db")
    open_spool(tmp_path / "spool.db").close()


def test_waiting_ends_when_a_frame_comes_even_if_it_came_before(tmp_path: Path) -> None:
    with open_spool(tmp_path / "spool.db") as spool:
        assert not spool.wait_for_new(0)
        spool.append(["a"], one_frame())
        assert spool.wait_for_new(0)
        assert not spool.wait_for_new(0)
        writer = threading.Thread(target=lambda: spool.append(["b"], one_frame()))
        writer.start()
        assert spool.wait_for_new(20)
        writer.join()


def test_threads_take_turns(tmp_path: Path) -> None:
    with open_spool(tmp_path / "spool.db", max_bytes=10_000_000) as spool:
        threads = [
            threading.Thread(target=lambda t=t: [spool.append([f"{t}-{n}"], one_frame()) for n in range(50)]) for t in range(4)  # type: ignore[misc]
        ]
        for thread in threads:
            thread.start()
        receipted = 0
        while any(thread.is_alive() for thread in threads) or receipted < 200:
            frames = spool.pending(receipted, 16)
            if frames:
                receipted += spool.acknowledge(Receipt(spool.id, frames[-1].sequence))
        count = spool.count()
        assert (count.produced, count.receipted, count.spooled) == (200, 200, 0)


def test_ages_and_bad_clocks(tmp_path: Path) -> None:
    now = [0.0]  # a device that starts in 1970 and gets the time later, then jumps back
    with Spool.open(tmp_path / "spool.db", max_bytes=100_000, policy="pause", clock=lambda: now[0]) as spool:
        spool.append(["a"], one_frame())
        now[0] = 1e9
        assert spool.count().oldest_age_seconds == 1e9
        now[0] = -5.0
        assert spool.count().oldest_age_seconds == 0.0


def test_refusal_reasons_are_bounded(tmp_path: Path) -> None:
    with open_spool(tmp_path / "spool.db") as spool:
        for n in range(500):
            spool.refuse(None, f"reason {n} " + "x" * 100)
        refused = spool.count().refused
    assert len(refused) <= 64
    assert sum(refused.values()) == 500
    with open_spool(tmp_path / "spool.db") as spool:
        assert spool.count().refused == refused


def test_space_is_given_back_after_a_backlog(tmp_path: Path) -> None:
    path = tmp_path / "spool.db"
    with open_spool(path, max_bytes=100_000_000) as spool:
        for n in range(30):
            spool.append([f"s{n}"], one_frame(1_000_000))
        spool.acknowledge(Receipt(spool.id, 30))
    assert path.stat().st_size < 1_000_000


# kill -9


WRITER = """
import random, sys, time
from pathlib import Path
from edge_agent.spool import Spool
from side_tuning.wire.messages import Receipt

folder, seed = Path(sys.argv[1]), int(sys.argv[2])
dice = random.Random(seed)
spool = Spool.open(folder / "spool.db", max_bytes=400_000, policy="drop-oldest", clock=time.time)
print("open", spool.id, flush=True)
n = 0
while True:
    n += 1
    ids = [f"{seed}-{n}-{k}" for k in range(dice.randint(1, 8))]
    parts = dice.choice([1, 1, 1, 3])
    sequences = spool.append(ids, lambda s, p: [random.Random(s + k).randbytes(dice.randint(1, 20_000)) for k in range(parts)])
    print("stored", sequences[0], parts, *ids, flush=True)
    if dice.random() < 0.3:
        frames = spool.pending(0, 4)
        spool.acknowledge(Receipt(spool.id, frames[-1].sequence))
        print("receipted", frames[-1].sequence, flush=True)
    if dice.random() < 0.2:
        spool.refuse(f"bad-{seed}-{n}", "no text")
"""


@pytest.mark.slow
def test_killed_at_random_moments_nothing_acknowledged_is_lost(tmp_path: Path) -> None:
    """Thirty kill -9 in a row: no acknowledged append is lost, no sample is marked without its frame, counters add up."""
    dice = random.Random(20)
    stored: dict[int, list[str]] = {}
    receipted_through = 0
    spool_id = None
    for life in range(30):
        writer = subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path), str(life)], stdout=subprocess.PIPE, text=True)
        assert writer.stdout is not None
        lines_wanted = dice.randint(1, 60)
        killer = threading.Timer(30.0, writer.kill)
        killer.start()
        lines: list[str] = []
        for line in writer.stdout:
            if line.endswith("\n"):
                lines.append(line)
            if len(lines) == lines_wanted:
                threading.Timer(dice.random() * 0.01, writer.send_signal, (signal.SIGKILL,)).start()
        writer.wait()
        killer.cancel()
        for line in lines:
            kind, *rest = line.split()
            if kind == "open":
                spool_id = spool_id or rest[0]
                assert rest[0] == spool_id, "the spool was replaced"
            elif kind == "stored":
                stored[int(rest[0])] = rest[2:]
            else:
                receipted_through = max(receipted_through, int(rest[0]))
        with open_spool(tmp_path / "spool.db", max_bytes=400_000, policy="drop-oldest") as spool:
            assert not spool.moved_aside
            count = spool.count()
            assert balanced(count)
            acknowledged = sum(len(ids) for ids in stored.values())
            # At most the one append that was under way when the process died is there without its acknowledgement.
            assert acknowledged <= count.produced <= acknowledged + 8 * (life + 1)
            for sequence, ids in stored.items():
                assert sequence < count.next_sequence
                assert all(spool.seen(sample_id) for sample_id in ids)
            rows = {f.sequence: f for f in spool.pending(0, 10_000)}
            assert sum(f.samples for f in rows.values()) == count.spooled
            marks = sum(len(row[0]) // 8 for row in sqlite3.connect(tmp_path / "spool.db").execute("SELECT digests FROM seen"))
            assert marks == count.produced + sum(count.refused.values())
            assert count.dropped or set(range(count.floor, count.next_sequence)) == set(rows)
            assert min(rows, default=count.next_sequence) == count.floor
    assert len(stored) > 200


# Damage


def filled(path: Path, frames: int = 60) -> str:
    with open_spool(path) as spool:
        for n in range(frames):
            spool.append([f"s{n}"], one_frame(5000))
        return spool.id


def aside(path: Path) -> list[Path]:
    return sorted(p for p in path.parent.glob(f"{path.name}.aside-*") if not p.name.endswith(("-wal", "-shm")))


@pytest.mark.parametrize("kept", [1, 50, 100, 512, 4095, 4096, 10_000, 100_000, 250_000])
def test_a_truncated_file_is_moved_aside_and_a_new_spool_begins(tmp_path: Path, kept: int, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "spool.db"
    old_id = filled(path)
    with path.open("r+b") as file:
        file.truncate(kept)
    with open_spool(path) as spool:
        assert spool.id != old_id
        assert "damaged" in spool.moved_aside
        assert spool.count().refused == {"spool moved aside": 1}
        assert not spool.seen("s1")
        assert spool.append(["s1"], one_frame()) == [1]
    assert len(aside(path)) == 1
    assert aside(path)[0].stat().st_size == kept
    assert str(aside(path)[0].name) in caplog.text


def test_bytes_flipped_anywhere_never_pass_as_sound(tmp_path: Path) -> None:
    """Whatever is overwritten, a frame that comes out is the one that went in, and the agent gets back to work."""
    path = tmp_path / "spool.db"
    filled(path)
    sound = path.read_bytes()
    dice = random.Random(3)
    seen_outcomes: set[str] = set()
    for _ in range(60):
        damaged = bytearray(sound)
        start = dice.randrange(len(damaged)) if dice.random() < 0.6 else dice.randrange(8192)
        damaged[start : start + 64] = dice.randbytes(64)
        path.write_bytes(damaged[: len(sound)])
        for _restart in range(3):
            try:
                with open_spool(path) as spool:
                    for frame in spool.pending(0, 1000):
                        assert frame.payload == payload(frame.sequence, 5000)
                    assert balanced(spool.count())
                    seen_outcomes.add("moved aside" if spool.moved_aside else "dropped" if spool.count().dropped else "untouched")
                    spool.append([f"new {_restart}"], one_frame())
                break
            except SpoolError as error:
                outcome = next(word for word in ("damaged", "newer", "failed") if word in str(error))
                seen_outcomes.add(outcome)
                if outcome == "newer":
                    break
        else:
            pytest.fail("three starts did not get the agent going")
        for old in [*aside(path), path.with_name("spool.db-wal"), path.with_name("spool.db-shm"), path.with_name("spool.db.suspect")]:
            old.unlink(missing_ok=True)
    assert {"moved aside", "dropped"} <= seen_outcomes


def test_something_else_in_its_place_is_moved_aside(tmp_path: Path) -> None:
    path = tmp_path / "spool.db"
    path.write_text("this is no database at all, but a text that somebody put here\n" * 30)
    with open_spool(path) as spool:
        assert "not a database" in spool.moved_aside
    other = sqlite3.connect(path)
    other.execute("UPDATE counters SET produced = produced + 1")
    other.commit()
    other.close()
    with open_spool(path) as spool:
        assert "counters disagree" in spool.moved_aside


def test_only_a_few_old_files_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "spool.db"
    for _ in range(6):
        path.write_text("damaged " * 100)
        open_spool(path).close()
    assert len(aside(path)) == 3


def test_a_newer_file_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "spool.db"
    filled(path, 1)
    newer = sqlite3.connect(path)
    newer.execute("PRAGMA user_version = 99")
    newer.close()
    with pytest.raises(SpoolError, match=r"99.*install that version"):
        open_spool(path)
    assert aside(path) == []


def test_an_old_copy_is_recognised_by_the_receipt_and_replaced(tmp_path: Path) -> None:
    path = tmp_path / "spool.db"
    old_id = filled(path, 5)
    with open_spool(path) as spool, pytest.raises(SpoolError, match="old copy"):
        spool.acknowledge(Receipt(spool.id, 6))
    with open_spool(path) as spool:
        assert spool.id != old_id
        assert "old copy" in spool.moved_aside
        assert not spool.seen("s0")


# No room


def test_a_full_file_changes_nothing_and_goes_on_when_there_is_room(tmp_path: Path) -> None:
    """SQLite's own page limit stands for the disk: the same error at the same place."""
    with open_spool(tmp_path / "spool.db", max_bytes=10_000_000) as spool:
        spool._database.execute("PRAGMA max_page_count = 40")
        stored = 0
        message = ""
        while not message:
            try:
                spool.append([f"s{stored}"], one_frame(5000))
                stored += 1
            except SpoolFull as full:
                message = str(full)
        assert "free some space" in message
        assert stored > 3
        assert not spool.seen(f"s{stored}")
        count = spool.count()
        assert (count.produced, count.spooled, count.next_sequence) == (stored, stored, stored + 1)
        spool.acknowledge(Receipt(spool.id, 3))
        assert spool.append([f"s{stored}"], one_frame(5000)) == [stored + 1]
        assert balanced(spool.count())


def test_drop_oldest_makes_room_when_the_disk_is_smaller_than_the_limit(tmp_path: Path) -> None:
    with open_spool(tmp_path / "spool.db", max_bytes=10_000_000, policy="drop-oldest") as spool:
        spool._database.execute("PRAGMA max_page_count = 60")
        for n in range(100):
            spool.append([f"s{n}"], one_frame(5000))
        count = spool.count()
        assert count.produced == 100
        assert count.dropped > 50
        assert [f.sequence for f in spool.pending(0, 1000)] == list(range(count.floor, 101))
        assert balanced(count)


@pytest.fixture
def small_disk(tmp_path: Path) -> Any:
    """A real file system of 8 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if os.geteuid() != 0 or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)], capture_output=True).returncode:
        pytest.skip("mounting a small tmpfs needs root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def fill(disk: Path) -> None:
    """Leave not a byte."""
    with (disk / "filler").open("wb", buffering=0) as filler, contextlib.suppress(OSError):
        while filler.write(b"x" * 4096):
            pass


@pytest.mark.parametrize("policy", ["pause", "drop-oldest"])
def test_a_disk_that_others_fill_delays_and_loses_nothing(small_disk: Path, policy: str) -> None:
    """Receipts are applied on a completely full disk, for many rounds; then it goes on by itself."""
    with open_spool(small_disk / "spool.db", max_bytes=50_000_000, policy=policy) as spool:
        for n in range(100):
            spool.append([f"s{n}"], one_frame(12_000))
        fill(small_disk)
        stored = 100
        for n in range(100, 1500):
            try:
                spool.append([f"s{n}"], one_frame(12_000))
                stored += 1
            except SpoolFull:
                assert not spool.seen(f"s{n}")
                spool.acknowledge(Receipt(spool.id, spool.pending(0, 5)[-1].sequence))
        count = spool.count()
        assert count.produced == stored > 1000
        assert balanced(count)
        assert all(f.payload == payload(f.sequence, 12_000) for f in spool.pending(0, 1000))
        (small_disk / "filler").unlink()
        spool.acknowledge(Receipt(spool.id, count.next_sequence - 1))
        for n in range(200):
            spool.append([f"t{n}"], one_frame(12_000))
        assert spool.count().spooled == 200
    with open_spool(small_disk / "spool.db", max_bytes=50_000_000, policy=policy) as spool:
        assert not spool.moved_aside
        assert spool.count().produced == stored + 200


@pytest.mark.parametrize("policy", ["pause", "drop-oldest"])
def test_a_really_full_disk(small_disk: Path, policy: str) -> None:
    with open_spool(small_disk / "spool.db", max_bytes=50_000_000, policy=policy) as spool:
        stored = refused = 0
        for n in range(1000):
            try:
                spool.append([f"s{n}"], one_frame(12_000))
                stored += 1
            except SpoolFull:
                refused += 1
                assert not spool.seen(f"s{n}")
        count = spool.count()
        assert count.produced == stored
        assert balanced(count)
        assert stored > 20
        assert refused > 0 if policy == "pause" else stored > 990
        frames = spool.pending(0, 1000)
        assert all(f.payload == payload(f.sequence, 12_000) for f in frames)
        spool.acknowledge(Receipt(spool.id, frames[-1].sequence))
        spool.append(["after"], one_frame(12_000))
    with open_spool(small_disk / "spool.db", max_bytes=50_000_000, policy=policy) as spool:
        assert not spool.moved_aside
        assert spool.count().produced == stored + 1
        assert spool.seen("after")


def test_a_disk_that_is_full_from_the_start_says_so(small_disk: Path) -> None:
    fill(small_disk)
    with pytest.raises(SpoolError, match=r"full|room"):
        open_spool(small_disk / "spool.db")
    (small_disk / "filler").unlink()
    open_spool(small_disk / "spool.db").close()


def test_a_folder_that_cannot_be_made_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(SpoolError, match="state_directory"):
        open_spool(tmp_path / "file" / "spool.db")


# Any sequence of calls


class SpoolAgainstModel(RuleBasedStateMachine):
    """The spool against a dictionary, with reopening in between."""

    def __init__(self) -> None:
        super().__init__()
        import tempfile

        self.folder = Path(tempfile.mkdtemp())
        self.spool = open_spool(self.folder / "spool.db", max_bytes=70_000)
        self.frames: dict[int, tuple[bytes, int]] = {}
        self.next, self.produced, self.receipted, self.samples = 1, 0, 0, 0

    def teardown(self) -> None:
        self.spool.close()
        shutil.rmtree(self.folder)

    @rule(samples=st.integers(0, 4), parts=st.integers(1, 3), size=st.integers(1, 9000))
    def append(self, samples: int, parts: int, size: int) -> None:
        ids = [f"s{self.samples + k}" for k in range(samples)]
        payloads = [payload(self.next + k, size) for k in range(parts)]
        held = sum(len(p) for p, _ in self.frames.values())
        if held + parts * size > 70_000:
            with pytest.raises(SpoolFull):
                self.spool.append(ids, lambda _s, _p: payloads)
            return
        assert self.spool.append(ids, lambda _s, _p: payloads) == list(range(self.next, self.next + parts))
        for k, part in enumerate(payloads):
            self.frames[self.next + k] = (part, samples if k == 0 else 0)
        self.next += parts
        self.produced += samples
        self.samples += samples

    @precondition(lambda self: self.next > 1)
    @rule(data=st.data())
    def receipt(self, data: st.DataObject) -> None:
        through = data.draw(st.integers(0, self.next - 1))
        ahead = tuple(data.draw(st.lists(st.integers(1, self.next - 1), max_size=4)))
        gone = [s for s in self.frames if s <= through or s in ahead]
        assert self.spool.acknowledge(Receipt(self.spool.id, through, ahead)) == len(gone)
        self.receipted += sum(self.frames.pop(s)[1] for s in gone)

    @rule()
    def reopen(self) -> None:
        spool_id = self.spool.id
        self.spool.close()
        self.spool = open_spool(self.folder / "spool.db", max_bytes=70_000)
        assert self.spool.id == spool_id

    @invariant()
    def agrees(self) -> None:
        count = self.spool.count()
        assert balanced(count)
        assert (count.produced, count.receipted, count.spooled_frames) == (self.produced, self.receipted, len(self.frames))
        assert count.floor == min(self.frames, default=self.next)
        assert {f.sequence: (f.payload, f.samples) for f in self.spool.pending(0, 1000)} == self.frames
        assert json.dumps(count.refused) == "{}"


TestSpoolAgainstModel = SpoolAgainstModel.TestCase
TestSpoolAgainstModel.settings = hypothesis_settings(max_examples=25, stateful_step_count=25, deadline=None)
