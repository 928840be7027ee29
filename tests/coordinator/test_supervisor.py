"""`coordinator run`: real processes start, crash, come back, and end with the supervisor."""

import os
import signal
import subprocess
import sys
import threading

import pytest

from coordinator.supervisor import Program, supervise
from tests.waiting import wait_until

SLEEPER = [sys.executable, "-c", "import signal, sys; signal.signal(signal.SIGTERM, lambda *_: sys.exit(0)); print('up', file=sys.stderr, flush=True); signal.pause()"]


class Running:
    def __init__(self, programs):
        self.lines = []
        self.stop = threading.Event()
        self.code = None
        self.thread = threading.Thread(target=self._run, args=(programs,), daemon=True)
        self.thread.start()

    def _run(self, programs):
        self.code = supervise(programs, self.stop, self.lines.append)

    def pids(self, name):
        return [int(line.split()[-1]) for line in list(self.lines) if line.startswith(f"{name}: started")]

    def end(self):
        self.stop.set()
        self.thread.join(30)
        assert not self.thread.is_alive()


@pytest.fixture
def start():
    made = []

    def starter(*programs):
        made.append(Running(programs))
        return made[-1]

    yield starter
    for one in made:
        one.end()


def gone(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    with open(f"/proc/{pid}/stat") as stat:
        return stat.read().rsplit(")", 1)[1].split()[0] == "Z"


def test_a_killed_program_is_started_again_and_the_reason_is_shown(start):
    running = start(Program("gateway", SLEEPER), Program("train", SLEEPER))
    wait_until(lambda: running.lines.count("up") == 2, 20, "both are up")
    (first,), (other,) = running.pids("gateway"), running.pids("train")
    os.kill(first, signal.SIGKILL)
    wait_until(lambda: len(running.pids("gateway")) == 2, 20, "it is started again")
    assert any("gateway: ended, killed by SIGKILL; it last said: up; starting it again in 0.5 s" in line for line in running.lines)
    assert not gone(other)


def test_a_program_that_keeps_crashing_is_given_longer_pauses(start):
    running = start(Program("train", [sys.executable, "-c", "raise SystemExit('no memory left')"]))
    wait_until(lambda: any("again in 2 s" in line for line in running.lines), 30, "the third pause is 2 s")
    pauses = [line.rsplit("again in ", 1)[1] for line in running.lines if "ended" in line]
    assert pauses[:3] == ["0.5 s", "1 s", "2 s"]
    assert "exit code 1; it last said: no memory left" in next(line for line in running.lines if "ended" in line)


def test_a_configuration_error_ends_the_whole(start):
    running = start(Program("train", SLEEPER), Program("gateway", [sys.executable, "-c", "raise SystemExit(78)"]))
    wait_until(lambda: running.code == 78, 30, "the supervisor ends with 78")
    wait_until(lambda: gone(running.pids("train")[0]), 5, "the other program has ended")


def test_a_program_that_the_others_can_do_without_ends_nothing(start):
    running = start(Program("gateway", SLEEPER), Program("dashboard", [sys.executable, "-c", "raise SystemExit(78)"], essential=False))
    wait_until(lambda: any("dashboard: ended, exit code 78; it will not be started again" in line for line in running.lines), 30, "it ended")
    wait_until(lambda: "up" in running.lines, 30, "the other is up")
    running.end()
    assert running.code == 0
    assert len(running.pids("dashboard")) == 1


def test_stopping_ends_every_program(start):
    running = start(Program("a", SLEEPER), Program("b", SLEEPER))
    wait_until(lambda: running.lines.count("up") == 2, 20, "both are up")
    running.end()
    assert running.code == 0
    assert all(gone(pid) for pid in running.pids("a") + running.pids("b"))


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a child that its parent died")
def test_programs_end_when_the_supervisor_is_killed():
    program = (
        "import sys, threading; from coordinator.supervisor import *;"
        f"supervise([Program('a', {SLEEPER!r})], threading.Event())"
    )
    supervisor = subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.PIPE, text=True)
    started = supervisor.stderr.readline()
    assert supervisor.stderr.readline() == "up\n"
    pid = int(started.split()[-1])
    supervisor.kill()
    supervisor.wait()
    wait_until(lambda: gone(pid), 10, "the program has ended too")
