"""`coordinator run`: the programs of one machine, started together, restarted one by one, ended together.

Each program is a process group of its own. One that ends is started again after a pause that grows from half a second
to half a minute, and the reason is shown: its exit code and the last line it wrote. One that says its configuration
is wrong (exit code 78) ends the whole, since a restart cannot help it; one that the others can do without just stays
away.
"""

from __future__ import annotations

import logging
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from coordinator.settings import EXIT_CONFIG
from coordinator.tied_process import tied_command
from side_tuning.json_logs import logs_are_json

logger = logging.getLogger(__name__)

FIRST_PAUSE_SECONDS = 0.5
LONGEST_PAUSE_SECONDS = 30.0
STEADY_SECONDS = 60.0  # after running this long a program's next pause is short again
END_SECONDS = 20.0  # then SIGKILL
POLL_SECONDS = 0.1


@dataclass(frozen=True)
class Program:
    """What to run, and what to call it."""

    name: str
    command: list[str]
    environment: dict[str, str] = field(default_factory=dict)
    essential: bool = True  # a configuration error of it ends the whole


def _say(line: str) -> None:
    """Pass a program's line on; our own, and what a program did not write as JSON, become JSON where the log is."""
    if logs_are_json() and not line.startswith("{"):
        logger.info("%s", line)
    else:
        print(line, file=sys.stderr, flush=True)


class _Running:
    """One program: its process now, and its luck so far."""

    def __init__(self, program: Program, say: Callable[[str], None]) -> None:
        self.program = program
        self._say = say
        self._process: subprocess.Popen[str] | None = None
        self._reader: threading.Thread | None = None
        self._last_line = ""
        self._pause = FIRST_PAUSE_SECONDS
        self._started_at = 0.0
        self._start_at = 0.0
        self.restarts = -1

    def start_if_due(self) -> None:
        if self._process is not None or time.monotonic() < self._start_at:
            return
        self.restarts += 1
        self._last_line = ""
        self._started_at = time.monotonic()
        self._process = subprocess.Popen(
            tied_command(self.program.command),
            stdin=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            start_new_session=True,  # Ctrl-C in the terminal reaches the supervisor alone, which then ends all in order
            env={**os.environ, **self.program.environment},
        )
        self._say(f"{self.program.name}: started, process {self._process.pid}")
        self._reader = threading.Thread(target=self._forward, args=(self._process,), name=f"log-{self.program.name}", daemon=True)
        self._reader.start()

    def _forward(self, process: subprocess.Popen[str]) -> None:
        assert process.stderr is not None
        for line in process.stderr:
            if line.strip():
                self._last_line = line.strip()
            self._say(line.rstrip("\n"))

    def look(self) -> int | None:
        """The exit code if the program has just ended."""
        if self._process is None or (code := self._process.poll()) is None:
            return None
        if self._reader is not None:
            self._reader.join(2)
        self._process = None
        if time.monotonic() - self._started_at > STEADY_SECONDS:
            self._pause = FIRST_PAUSE_SECONDS
        self._start_at = time.monotonic() + self._pause
        last = f"; it last said: {self._last_line}" if self._last_line else ""
        next_step = "it will not be started again" if code == EXIT_CONFIG else f"starting it again in {self._pause:g} s"
        self._say(f"{self.program.name}: ended, {_exit_words(code)}{last}; {next_step}")
        self._pause = min(self._pause * 2, LONGEST_PAUSE_SECONDS)
        if code == EXIT_CONFIG:
            self._start_at = math.inf
        return code

    def signal(self, number: signal.Signals) -> None:
        if self._process is not None and self._process.poll() is None:
            try:
                os.killpg(self._process.pid, number)
            except ProcessLookupError:
                return

    def reap(self) -> None:
        """Wait for the end of a process that has been told to end."""
        if self._process is not None:
            self._process.wait()

    @property
    def alive(self) -> bool:
        return self._process is not None and self._process.poll() is None


def supervise(programs: Sequence[Program], stop: threading.Event, say: Callable[[str], None] = _say) -> int:
    """Keep `programs` running until `stop`; then end them, last first. Returns the exit code for the whole."""
    running = [_Running(program, say) for program in programs]
    code = 0
    try:
        while not stop.is_set():
            for one in running:
                one.start_if_due()
                if one.look() == EXIT_CONFIG and one.program.essential:
                    code = EXIT_CONFIG
            if code:
                break
            stop.wait(POLL_SECONDS)
    finally:
        _end(running, say)
    return code


def _end(running: Sequence[_Running], say: Callable[[str], None]) -> None:
    """SIGTERM to each, the last started first, so that the broker outlives those that say goodbye through it."""
    deadline = time.monotonic() + END_SECONDS
    for one in reversed(running):
        one.signal(signal.SIGTERM)
        while one.alive and time.monotonic() < deadline:
            time.sleep(0.02)
    for one in running:
        if one.alive:
            say(f"{one.program.name}: did not end within {END_SECONDS:g} s, killing it")
            one.signal(signal.SIGKILL)
        one.reap()


def _exit_words(code: int) -> str:
    if code >= 0:
        return f"exit code {code}"
    try:
        return f"killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"killed by signal {-code}"
