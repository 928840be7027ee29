"""Runs a program that ends when the process that asked for it ends: `python -m coordinator.tied_process PID COMMAND...`.

On Linux the kernel sends SIGTERM when the parent dies, however it dies; elsewhere the program just runs.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def tied_command(command: list[str]) -> list[str]:
    """`command`, tied to the life of this process."""
    return [sys.executable, "-m", "coordinator.tied_process", str(os.getpid()), *command]


def main() -> None:
    parent, command = int(sys.argv[1]), sys.argv[2:]
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:
            sys.exit(0)  # it died before the kernel knew of our wish
    os.execvp(command[0], command)  # noqa: S606 - replacing this process is the point; the wish survives it


if __name__ == "__main__":
    main()
