"""The demonstration's children: real programs, each with its own log, none of which outlives the demonstration."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

from coordinator.demonstration.errors import DemoError
from coordinator.tied_process import tied_command

# Devices share this machine's cores: without these, each would start a thread per core and they would only wait for each other.
_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"}
_LAST_LINES = 12


class Child:
    """One program that can be ended, killed and started again; what it says goes to `log`."""

    def __init__(self, name: str, command: list[str], log: Path) -> None:
        self.name = name
        self.log = log
        self._command = command
        self._process: subprocess.Popen[bytes] | None = None
        self._asked_to_end = False

    def start(self) -> None:
        self._asked_to_end = False
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                tied_command(self._command),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C reaches the demonstration alone, which then ends all in order
                env={**os.environ, **_ENVIRONMENT},
            )

    @property
    def process_id(self) -> int | None:
        return None if self._process is None else self._process.pid

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def check(self) -> None:
        """Raise `DemoError` with its last words if it was started and has ended by itself."""
        if self._process is not None and (code := self._process.poll()) is not None:
            raise DemoError(f"{self.name} ended with exit code {code}. It last said:\n{self.last_words()}\nThe whole log: {self.log}")

    def kill(self) -> None:
        """As a power cut would: no goodbye, nothing flushed."""
        if self.running:
            self._signal(signal.SIGKILL)
            self._wait(10)
        self._process = None

    def request_end(self) -> None:
        """Once: to most programs a second request means at once."""
        if self.running and not self._asked_to_end:
            self._asked_to_end = True
            self._signal(signal.SIGTERM)

    def end(self, timeout_seconds: float = 20.0) -> None:
        """Ask it to end and wait; kill it if it does not."""
        self.request_end()
        if not self._wait(timeout_seconds):
            self.kill()
        self._process = None

    def last_words(self) -> str:
        try:
            lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError:
            lines = []
        return "\n".join(f"  {line}" for line in lines[-_LAST_LINES:]) or "  (nothing)"

    def _signal(self, number: signal.Signals) -> None:
        assert self._process is not None
        try:
            os.killpg(self._process.pid, number)
        except ProcessLookupError:
            return

    def _wait(self, timeout_seconds: float) -> bool:
        if self._process is None:
            return True
        try:
            self._process.wait(timeout_seconds)
        except subprocess.TimeoutExpired:
            return False
        return True


def end_all(children: list[Child], timeout_seconds: float = 20.0) -> None:
    """End them together."""
    for child in children:
        child.request_end()
    deadline = time.monotonic() + timeout_seconds
    for child in children:
        child.end(max(0.1, deadline - time.monotonic()))


def run_program(name: str, command: list[str], timeout_seconds: float) -> str:
    """Run a program to its end and return what it printed.

    Raises:
        DemoError: it failed, or took longer.

    """
    try:
        result = subprocess.run(
            tied_command(command),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            start_new_session=True,
            timeout=timeout_seconds,
            check=False,
            env={**os.environ, **_ENVIRONMENT},
        )
    except subprocess.TimeoutExpired as error:
        raise DemoError(f"{name} took longer than {timeout_seconds:.0f} s and was stopped") from error
    if result.returncode != 0:
        said = "\n".join(f"  {line}" for line in result.stderr.strip().splitlines()[-_LAST_LINES:])
        raise DemoError(f"{name} failed with exit code {result.returncode}:\n{said}")
    return result.stdout
