"""The whole agent with a real backbone, a real broker and a receiver that issues real receipts."""

from __future__ import annotations

import gzip
import json
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from edge_agent import agent as agent_module
from edge_agent.settings import AgentSettings
from side_tuning.wire import topics
from side_tuning.wire.frame import Frame
from side_tuning.wire.messages import Command, Receipt
from tests.brokers import free_port, mosquitto, needs_mosquitto
from tests.edge_agent.artifacts import LABELS, Checkpoint, plan
from tests.receiving import Receiver
from tests.waiting import wait_until

pytestmark = [pytest.mark.broker, needs_mosquitto]

DEVICE = "kitchen"


@pytest.fixture
def broker(tmp_path):
    with mosquitto(tmp_path / "broker") as running:
        yield running


@pytest.fixture
def receiver(broker):
    with Receiver(broker.settings, DEVICE) as running:
        wait_until(lambda: running.connection.connected, 10, "the receiver is there")
        yield running


def write_rows(path: Path, count: int, start: int = 0) -> Path:
    with path.open("a") as file:
        for n in range(start, start + count):
            file.write(json.dumps({"text": f"turn lamp number {n} on in the kitchen", "label": LABELS[n % 3]}) + "\n")
    return path


class RunningAgent:
    """The agent's `run` in a thread of the test."""

    def __init__(self, settings: AgentSettings) -> None:
        self.stop = threading.Event()
        self.code: int | None = None
        self.error: BaseException | None = None
        self.thread = threading.Thread(target=self._run, args=(settings,))

    def _run(self, settings: AgentSettings) -> None:
        try:
            self.code = agent_module.run(settings, self.stop)
        except BaseException as error:
            self.error = error

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.stop.set()
        self.thread.join(30)
        assert not self.thread.is_alive()

    def ended(self) -> bool:
        return not self.thread.is_alive()


@pytest.fixture
def settings(tmp_path, minilm, broker, public_key_file):
    def make(**changes) -> AgentSettings:
        values = {
            "device": DEVICE,
            "state_directory": tmp_path / "state",
            "broker": broker.settings.model_dump(),
            "backbone": {"folder": minilm, "batch_size": 8},
            "sources": [{"kind": "file", "path": tmp_path / "rows.jsonl"}],
            "publisher": {"resend_seconds": 1.0},
            "health": {"every_seconds": 0.3},
            "checkpoint": {"public_key_file": public_key_file},
        }
        return AgentSettings(**{**values, **changes})

    return make


DONE = {"run": {"exit_when_done": True}}


def test_every_sample_of_a_file_arrives_once_and_the_agent_ends_cleanly(receiver, settings, tmp_path):
    write_rows(tmp_path / "rows.jsonl", 100)
    receiver.publish_plan(plan(frame_samples=10))
    with RunningAgent(settings(**DONE)) as agent:
        wait_until(agent.ended, 60, "done")
    assert agent.error is None
    assert agent.code == 0
    frames = receiver.whole_frames()
    assert sum(len(f.samples) for f in frames) == 100 == len(set(receiver.sample_ids()))
    assert all(isinstance(f, Frame) and len(f.samples) <= 10 and f.plan_version == 1 for f in frames)
    assert [f.produced for f in frames] == [sum(len(f.samples) for f in frames[: n + 1]) for n in range(len(frames))]
    assert [s.label for f in frames for s in f.samples] == [n % 3 for n in range(100)]
    assert {t.layer for f in frames for t in f.taps} == {1, 2}
    health = receiver.newest_health
    assert (health.presence, health.reason) == ("offline", "stopped")
    assert (health.spool.produced, health.spool.receipted, health.spool.spooled) == (100, 100, 0)
    assert health.backbone.layers == 2
    assert health.bytes_sent > 100 * 300


def test_a_sample_is_never_sent_twice_across_restarts(receiver, settings, tmp_path):
    receiver.publish_plan(plan())
    for turn in range(3):
        write_rows(tmp_path / "rows.jsonl", 20, start=20 * turn)
        with RunningAgent(settings(**DONE)) as agent:
            wait_until(agent.ended, 60, "done")
    assert len(receiver.sample_ids()) == 60
    assert len(set(receiver.sample_ids())) == 60
    assert receiver.newest_health.spool.produced == 60


def test_a_broker_killed_again_and_again_loses_and_doubles_nothing(broker, receiver, settings, tmp_path):
    write_rows(tmp_path / "rows.jsonl", 600)
    receiver.publish_plan(plan(frame_samples=4))
    with RunningAgent(settings(**DONE)) as agent:
        for arrived in (5, 30, 60):
            wait_until(lambda wanted=arrived: len(receiver.frames) >= wanted or agent.ended(), 60, f"{arrived} frames")
            broker.kill()
            broker.start()
        wait_until(agent.ended, 120, "done")
    assert agent.code == 0
    assert [frame.sequence for frame in receiver.whole_frames()] == list(range(1, len(receiver.frames) + 1))
    assert len(receiver.sample_ids()) == len(set(receiver.sample_ids())) == 600


def test_a_new_plan_is_applied_live_and_a_wrong_one_is_shown(receiver, settings, tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl", 10)
    source = {"kind": "file", "path": rows, "follow": True}
    with RunningAgent(settings(sources=[source])):
        wait_until(lambda: receiver.newest_health and receiver.newest_health.reason == "no tap plan yet", 30, "it waits")
        receiver.publish_plan(plan(version=1))
        wait_until(lambda: len(receiver.sample_ids()) == 10, 30, "first plan")
        receiver.publish_plan(plan(version=2, codec="int8", mode="sequence"))
        wait_until(lambda: receiver.newest_health.plan_version == 2, 30, "second plan")
        write_rows(rows, 10, start=10)
        wait_until(lambda: len(receiver.sample_ids()) == 20, 30, "under the second plan")
        receiver.publish_plan(plan(version=3, mode="sequence", rank=200), device=DEVICE)
        wait_until(lambda: "rank 200" in receiver.newest_health.plan_error, 30, "refused and shown")
        write_rows(rows, 10, start=20)
        wait_until(lambda: len(receiver.sample_ids()) == 30, 30, "goes on under the one before")
    by_plan = {}
    for frame in receiver.whole_frames():
        by_plan.setdefault((frame.plan_version, frame.mode, frame.taps[0].codec), []).extend(frame.samples)
    assert {key: len(samples) for key, samples in by_plan.items()} == {(1, "pooled", "int4"): 10, (2, "sequence", "int8"): 20}


def test_a_restart_without_a_broker_goes_on_sampling(broker, receiver, settings, tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl", 10)
    receiver.publish_plan(plan())
    with RunningAgent(settings(**DONE)) as agent:
        wait_until(agent.ended, 60, "done")
    broker.kill()
    write_rows(rows, 10, start=10)
    with RunningAgent(settings(**DONE)) as agent:
        # Seen from outside: the spool's write-ahead log grows by the new frames while nothing listens on the port.
        database = tmp_path / "state" / "spool.db"
        wait_until(lambda: _spooled(database) > 0, 60, "frames are spooled without a broker")
        assert not agent.ended()
        broker.start()
        wait_until(agent.ended, 60, "delivered once the broker is back")
    assert len(set(receiver.sample_ids())) == 20


def _spooled(database: Path) -> int:
    with sqlite3.connect(f"file:{database}?mode=ro", uri=True) as connection:
        return connection.execute("SELECT count(*) FROM frames").fetchone()[0]


def test_a_full_spool_pauses_the_intake_and_says_so(receiver, settings, tmp_path):
    write_rows(tmp_path / "rows.jsonl", 2500)
    receiver.silent = True
    receiver.publish_plan(plan(frame_samples=16, codec="fp16"))
    with RunningAgent(settings(spool={"max_bytes": 64 * 1024}, **DONE)) as agent:
        wait_until(lambda: receiver.newest_health and receiver.newest_health.reason == "the spool is full", 60, "it says so")
        spooled = receiver.newest_health.spool.spooled
        assert 0 < spooled < 100, "a few frames of 16 samples fill 64 KiB"
        receiver.silent = False
        receiver.send_receipts()
        wait_until(lambda: len(receiver.sample_ids()) > 300, 60, "receipts make room")
        agent.stop.set()
    assert agent.code == 0


def test_a_stop_brings_the_open_frame_into_the_spool(receiver, settings, tmp_path):
    """Five samples in a frame that would stay open for an hour: after the stop they are spooled, and sent at the next start."""
    write_rows(tmp_path / "rows.jsonl", 5)
    receiver.publish_plan(plan(linger_seconds=3600.0))
    with RunningAgent(settings()) as agent:
        wait_until(lambda: receiver.newest_health and receiver.newest_health.forward_seconds, 30, "forwarded")
        assert not receiver.frames
        agent.stop.set()
    assert receiver.newest_health.spool.spooled == 5
    with RunningAgent(settings(**DONE)) as agent:
        wait_until(agent.ended, 60, "done")
    assert len(receiver.sample_ids()) == 5


def test_a_frame_waits_for_nothing_that_will_not_come(receiver, settings, tmp_path):
    """Whole batches fill whole frames, and the last, half-full one is sent once every source is read, though it might stay open for an hour."""
    write_rows(tmp_path / "rows.jsonl", 5)
    receiver.publish_plan(plan(linger_seconds=3600.0, frame_samples=2))
    rows = {"sources": [{"kind": "file", "path": str(tmp_path / "rows.jsonl"), "follow": True}]}
    with RunningAgent(settings(**rows)):
        wait_until(lambda: len(receiver.sample_ids()) == 4, 30, "two full frames")
    with RunningAgent(settings(**DONE)) as agent:
        wait_until(agent.ended, 60, "done")
    assert len(receiver.sample_ids()) == 5
    write_rows(tmp_path / "rows.jsonl", 1, start=5)
    with RunningAgent(settings(**DONE)) as agent:
        wait_until(agent.ended, 60, "done")
    assert len(receiver.sample_ids()) == 6


def test_pause_and_resume_by_command_and_the_pause_outlives_a_restart(receiver, settings, tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl", 5)
    options = {"sources": [{"kind": "file", "path": rows, "follow": True}]}
    receiver.publish_plan(plan())
    with RunningAgent(settings(**options)):
        wait_until(lambda: len(receiver.sample_ids()) == 5, 30, "before the pause")
        receiver.command(Command("0", "pause", time.time() - 60))
        receiver.command(Command("1", "pause", time.time() + 60))
        wait_until(lambda: receiver.newest_health.paused and receiver.newest_health.reason == "paused by command", 10, "paused, and why")
    write_rows(rows, 5, start=5)
    with RunningAgent(settings(**options)):
        wait_until(lambda: receiver.newest_health.presence == "online" and receiver.newest_health.paused, 30, "still paused")
        receiver.command(Command("2", "resume", time.time() + 60))
        wait_until(lambda: len(receiver.sample_ids()) == 10, 30, "after the pause")
    assert not receiver.newest_health.paused


def test_bad_rows_are_counted_by_reason_and_hold_nobody_up(receiver, settings, tmp_path):
    rows = tmp_path / "rows.jsonl"
    write_rows(rows, 3)
    with rows.open("a") as file:
        file.write('{"text": "what", "label": "elephant"}\n{"text": "  ", "label": "light"}\n{"text": broken\n')
    write_rows(rows, 3, start=3)
    receiver.publish_plan(plan())
    with RunningAgent(settings(**DONE)) as agent:
        wait_until(agent.ended, 60, "done")
    count = receiver.newest_health.spool
    assert (count.produced, count.receipted) == (6, 6)
    assert sum(count.refused.values()) == 3
    assert count.refused["unknown label"] == 1


def test_a_checkpoint_is_fetched_while_it_runs_and_reported(receiver, settings, minilm, signing_key, tmp_path):
    write_rows(tmp_path / "rows.jsonl", 5)
    receiver.publish_plan(plan())
    with RunningAgent(settings()):
        Checkpoint(minilm, signing_key, 3).publish(receiver.connection)
        wait_until(lambda: receiver.newest_health and receiver.newest_health.checkpoint == 3, 30, "reported")


@pytest.fixture
def process(tmp_path, minilm, broker, public_key_file):
    """Starts the agent as a process of its own, so that it can be killed."""
    config = tmp_path / "agent.toml"
    config.write_text(
        f'device = "{DEVICE}"\nstate_directory = "{tmp_path}/state"\n'
        f'[broker]\nhost = "127.0.0.1"\nport = {broker.port}\ntls = false\nreconnect_max_seconds = 0.5\n'
        f'[backbone]\nfolder = "{minilm}"\nbatch_size = 8\n'
        f'[[sources]]\nkind = "file"\npath = "{tmp_path}/rows.jsonl.gz"\n'
        "[publisher]\nresend_seconds = 1\n[health]\nevery_seconds = 0.3\n[run]\nexit_when_done = true\n"
    )
    started = []

    def start(**environment):
        child = subprocess.Popen([sys.executable, "-m", "edge_agent.cli", "run", "--config", str(config)], env={**os.environ, **environment})
        started.append(child)
        return child

    yield start
    for child in started:
        if child.poll() is None:
            child.kill()
            child.wait()


def write_packed_rows(path: Path, count: int) -> None:
    plain = write_rows(path.with_suffix(""), count)
    path.write_bytes(gzip.compress(plain.read_bytes()))


@pytest.mark.slow
def test_kill_minus_9_of_the_agent_and_the_broker_loses_and_doubles_nothing(process, broker, receiver, tmp_path):
    write_packed_rows(tmp_path / "rows.jsonl.gz", 1500)
    receiver.publish_plan(plan(frame_samples=8))
    child = process()
    for arrived in (3, 20, 45, 80):
        wait_until(lambda wanted=arrived: len(receiver.frames) >= wanted, 60, f"{arrived} frames")
        child.kill()
        child.wait()
        broker.kill()
        child = process()
        broker.start()
    assert child.wait(120) == 0
    assert len(receiver.sample_ids()) == len(set(receiver.sample_ids())) == 1500
    assert {spool for spool, _ in receiver.frames} == {receiver.newest_health.spool.spool}
    assert [frame.sequence for frame in receiver.whole_frames()] == list(range(1, len(receiver.frames) + 1))
    count = receiver.newest_health.spool
    assert (count.produced, count.receipted, count.spooled, count.dropped) == (1500, 1500, 0, 0)


@pytest.mark.slow
def test_a_killed_agent_is_lost_and_a_stopped_one_is_offline_each_with_its_session(process, receiver, tmp_path):
    write_packed_rows(tmp_path / "rows.jsonl.gz", 4000)
    receiver.publish_plan(plan(frame_samples=8))
    child = process()
    wait_until(lambda: receiver.frames, 60, "it works")
    wait_until(lambda: receiver.newest_health, 60, "it reports")
    session = receiver.newest_health.session
    child.kill()
    wait_until(lambda: receiver.newest_health.presence == "lost", 20, "the will")
    assert receiver.newest_health.session == session
    child = process()
    wait_until(lambda: receiver.newest_health.presence == "online", 60, "it is back")
    assert receiver.newest_health.session != session
    child.send_signal(signal.SIGTERM)
    assert child.wait(20) == 0, "a clean end on SIGTERM"
    wait_until(lambda: receiver.newest_health.presence == "offline", 10, "a goodbye, no will")
    count = receiver.newest_health.spool
    assert count.produced == count.receipted + count.spooled


@pytest.mark.slow
def test_systemd_hears_ready_and_the_watchdogs_heartbeat(process, receiver, tmp_path):
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        path = tmp_path / "notify"
        systemd.bind(str(path))
        systemd.settimeout(60)
        write_packed_rows(tmp_path / "rows.jsonl.gz", 1)
        child = process(NOTIFY_SOCKET=str(path), WATCHDOG_USEC="2000000")
        assert systemd.recv(100) == b"READY=1"
        assert systemd.recv(100) == b"WATCHDOG=1"
        child.send_signal(signal.SIGTERM)
        while (said := systemd.recv(100)) != b"STOPPING=1":
            assert said == b"WATCHDOG=1"
        assert child.wait(20) == 0


def test_a_loop_that_dies_takes_the_program_down_with_its_reason(broker, receiver, settings, tmp_path):
    """A spool file replaced by an older copy: the coordinator's receipt proves it, and going on would lose samples."""
    write_rows(tmp_path / "rows.jsonl", 5)
    receiver.publish_plan(plan())
    with RunningAgent(settings()) as agent:
        wait_until(lambda: receiver.frames, 30, "it works")
        spool = next(iter(receiver.frames))[0]
        receiver.connection.publish(topics.receipt(DEVICE), Receipt(spool, 1000).to_bytes(), retain=True)
        wait_until(agent.ended, 20, "it ends")
    assert agent.code == 1
    assert receiver.newest_health.presence == "offline"
    assert "publisher died" in receiver.newest_health.reason


def test_an_unreachable_broker_is_said_and_stops_nothing(settings, tmp_path, caplog):
    write_rows(tmp_path / "rows.jsonl", 5)
    port = free_port()
    changed = settings(broker={"host": "127.0.0.1", "port": port, "tls": False})
    with RunningAgent(changed) as agent:
        wait_until(lambda: f"127.0.0.1:{port} cannot be reached" in caplog.text, 30, "said")
    assert agent.code == 0
