"""Children are started, told once to end, killed when they do not, and never left behind."""

from __future__ import annotations

import signal
import sys
from pathlib import Path

import psutil
import pytest

from coordinator.demonstration.errors import DemoError
from coordinator.demonstration.processes import Child, end_all, run_program
from tests.waiting import wait_until

OBEDIENT = "import signal, sys; signal.signal(signal.SIGTERM, lambda *_: (print('told'), sys.exit(0))); print('ready', flush=True); signal.pause()"
DEAF = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('ready', flush=True); signal.pause()\nwhile True: signal.pause()"
COUNTING = (
    "import signal\nsignal.signal(signal.SIGTERM, lambda *_: print('told', flush=True))\nprint('ready', flush=True)\nsignal.pause()\n"
    "signal.sigtimedwait([signal.SIGUSR1], 1)"
)


def child(tmp_path: Path, code: str) -> Child:
    return Child("child", [sys.executable, "-c", code], tmp_path / "logs" / "child.log")


def started(tmp_path: Path, code: str) -> Child:
    one = child(tmp_path, code)
    one.start()
    wait_until(lambda: "ready" in one.log.read_text(), 20, "the child is ready")
    return one


def test_a_child_ends_when_asked(tmp_path):
    one = started(tmp_path, OBEDIENT)
    one.check()
    end_all([one])
    assert not one.running
    assert "told" in one.log.read_text()


def test_a_deaf_child_is_killed(tmp_path):
    one = started(tmp_path, DEAF)
    pid = one.process_id
    one.end(timeout_seconds=0.5)
    assert not one.running
    assert not psutil.pid_exists(pid)


def test_a_child_is_asked_only_once(tmp_path):
    """A second request means "at once" to our programs, and they would leave without a goodbye."""
    one = started(tmp_path, COUNTING)
    one.request_end()
    wait_until(lambda: "told" in one.log.read_text(), 10, "the child was told")
    one.request_end()
    one.end()
    assert one.log.read_text().count("told") == 1


def test_a_child_can_be_killed_and_started_again(tmp_path):
    one = started(tmp_path, OBEDIENT)
    one.kill()
    assert not one.running
    one.check()  # killed on purpose: nothing to complain of
    one.start()
    wait_until(lambda: one.log.read_text().count("ready") == 2, 20, "the child is ready again")
    one.end()


def test_a_child_that_dies_by_itself_is_told_with_its_last_words(tmp_path):
    one = child(tmp_path, "print('the disk is on fire'); raise SystemExit(3)")
    one.start()

    wait_until(lambda: not one.running, 20, "it has ended")
    with pytest.raises(DemoError) as told:
        one.check()
    for words in ("exit code 3", "the disk is on fire", str(one.log)):
        assert words in str(told.value)


def test_children_end_with_their_parent(tmp_path):
    """However the demonstration dies, nothing that it started goes on."""
    code = (
        "import signal, sys\nfrom pathlib import Path\nfrom coordinator.demonstration.processes import Child\n"
        f"one = Child('inner', [sys.executable, '-c', {OBEDIENT!r}], Path({str(tmp_path / 'inner.log')!r}))\n"
        "one.start()\nprint('ready', one.process_id, flush=True)\nsignal.pause()\n"
    )
    outer = started(tmp_path, code)
    wait_until(lambda: "ready" in (tmp_path / "inner.log").read_text(), 20, "the inner child is ready")
    inner = int(outer.log.read_text().split()[1])
    psutil.Process(outer.process_id).send_signal(signal.SIGKILL)
    wait_until(lambda: not psutil.pid_exists(inner) or psutil.Process(inner).status() == psutil.STATUS_ZOMBIE, 10, "the inner child ended")


def test_run_program_gives_what_was_printed():
    assert run_program("a sum", [sys.executable, "-c", "print(1 + 1)"], 20) == "2\n"


def test_a_program_that_fails_is_told_with_what_it_said():
    with pytest.raises(DemoError, match=r"a failure failed with exit code 7(.|\n)*no such bean"):
        run_program("a failure", [sys.executable, "-c", "import sys; print('no such bean', file=sys.stderr); sys.exit(7)"], 20)


def test_a_program_that_takes_too_long_is_stopped():
    with pytest.raises(DemoError, match="took longer than 1 s"):
        run_program("a wait", [sys.executable, "-c", "import signal; signal.pause()"], 1)
