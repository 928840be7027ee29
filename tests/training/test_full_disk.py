"""A disk that is really full: the trainer says so once, waits, and goes on when there is room."""

from __future__ import annotations

import errno
import logging
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from coordinator.store.engine import Store
from coordinator.store.training import checkpoints
from coordinator.training import trainer
from coordinator.training.checkpoints import saved_steps
from coordinator.training.take_in import take_in
from coordinator.training.trainer import open_training, take_step, take_up
from tests.training.small_fleet import arrive, frame, mixed_fleet, plan, prepare, settings
from tests.training.test_trainer import save
from tests.waiting import wait_until


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """The data directory on a disk of its own, 4 MiB."""
    folder = tmp_path / "data"
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"no right to mount a small disk here: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(disk: Path) -> Path:
    """Take all the room there is."""
    ballast = disk / "ballast"
    with ballast.open("ab", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
    return ballast


def test_a_checkpoint_without_room_leaves_nothing_and_the_one_before(store: Store, tmp_path: Path, disk: Path) -> None:
    chosen = settings(tmp_path)
    prepare(store)
    arrive(store, mixed_fleet())
    training = open_training(store, chosen, plan())
    take_in(store, training.cache, training.plan)
    take_up(training)
    take_step(training, chosen)
    first = save(training, chosen)
    take_step(training, chosen)
    ballast = fill(disk)
    with pytest.raises(OSError, match="No space left"):
        save(training, chosen)
    assert [*first.parent.iterdir()] == saved_steps(first.parent) == [first]
    ballast.unlink()
    assert saved_steps(first.parent) == [first]
    assert save(training, chosen).name == "00000002"
    training.cache.close()


def test_the_cache_goes_on_from_its_last_commit(store: Store, tmp_path: Path, disk: Path) -> None:
    chosen = settings(tmp_path)
    prepare(store)
    arrive(store, [frame("attic", 1, [0, 1, 2] * 5)])
    training = open_training(store, chosen, plan())
    take_in(store, training.cache, training.plan)
    before = training.cache.gather(np.arange(15))
    arrive(store, [frame("attic", n, [0, 1, 2] * 30) for n in range(2, 6)])
    ballast = fill(disk)
    with pytest.raises(OSError, match="No space left"):
        take_in(store, training.cache, training.plan)
    training.cache.roll_back()
    assert len(training.cache) == 15
    assert np.array_equal(training.cache.gather(np.arange(15))[0].inputs, before[0].inputs)
    with pytest.raises(OSError, match="No space left"):
        take_in(store, training.cache, training.plan)
    training.cache.close()  # says nothing more
    training.cache.roll_back()
    ballast.unlink()
    while take_in(store, training.cache, training.plan):
        pass
    fresh = open_training(store, settings(tmp_path / "elsewhere"), plan())
    while take_in(store, fresh.cache, fresh.plan):
        pass
    assert len(training.cache) == len(fresh.cache) == 375
    assert np.array_equal(training.cache.gather(np.arange(375))[0].inputs, fresh.cache.gather(np.arange(375))[0].inputs)


@pytest.mark.parametrize("full_from", ["the start", "the first checkpoint"])
def test_the_trainer_waits_for_room_and_says_so_once(
    store: Store, tmp_path: Path, disk: Path, caplog: pytest.LogCaptureFixture, full_from: str
) -> None:
    chosen = settings(tmp_path, checkpoint_every_seconds=0.2, evaluate_every_seconds=0.2)
    prepare(store)
    caplog.set_level(logging.DEBUG, "coordinator.training")
    stop = threading.Event()
    thread = threading.Thread(target=trainer.run, args=(chosen, stop))
    if full_from == "the start":
        arrive(store, mixed_fleet())
        ballast = fill(disk)
        trouble = "no run can begin or go on"
        thread.start()
    else:
        thread.start()
        wait_until(lambda: "waiting for samples" in caplog.text, 60, "the trainer to be up")
        ballast = fill(disk)
        arrive(store, mixed_fleet())
        trouble = "samples cannot be taken into the tap cache"
    wait_until(lambda: sum(trouble in r.getMessage() for r in caplog.records) > 2, 60, "three failures in a row")
    aloud = [r for r in caplog.records if trouble in r.getMessage() and r.levelno >= logging.WARNING]
    assert len(aloud) == 1
    assert "free some space on the disk of data_directory" in aloud[0].getMessage()
    assert thread.is_alive()
    ballast.unlink()

    def offered() -> bool:
        with store.read() as session:
            return bool(checkpoints(session))

    wait_until(offered, 60, "a checkpoint once there is room")
    stop.set()
    thread.join(30)
    assert not thread.is_alive()
