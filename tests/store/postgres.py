"""A real PostgreSQL server on loopback for the tests that ask for one, run by a user without rights."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.brokers import free_port
from tests.waiting import wait_until


class PostgresMissingError(RuntimeError):
    """There is no server to run; says what is missing."""


def find_programs() -> Path:
    """The folder with initdb and postgres; Debian keeps it off the path."""
    on_path = shutil.which("initdb")
    found = [Path(on_path).resolve().parent] if on_path else sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    if not found or not (found[-1] / "postgres").exists():
        raise PostgresMissingError("PostgreSQL is not installed: apt-get install postgresql")
    return found[-1]


@contextmanager
def running_postgres() -> Iterator[str]:
    """Start a server with an empty cluster; gives the URL of its maintenance database without the name at the end."""
    programs = find_programs()
    folder = Path(tempfile.mkdtemp(prefix="postgres-"))
    port = free_port()
    as_user: dict[str, object] = {"cwd": folder}
    if os.geteuid() == 0:  # PostgreSQL refuses to run as root
        try:
            user = pwd.getpwnam("postgres")
        except KeyError:
            user = pwd.getpwnam("nobody")
        os.chown(folder, user.pw_uid, user.pw_gid)
        as_user |= {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}
    data = folder / "data"
    server = None
    try:
        made = subprocess.run(
            [programs / "initdb", "-D", data, "-U", "coordinator", "-A", "trust", "--no-sync", "-E", "UTF8"],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            **as_user,
        )
        if made.returncode != 0:
            raise RuntimeError(f"initdb ended with {made.returncode} and said:\n{made.stdout}")
        with (folder / "log").open("wb") as log:
            server = subprocess.Popen(
                [programs / "postgres", "-D", data, "-p", str(port), "-h", "127.0.0.1", "-k", "", "-c", "fsync=off"],
                stdout=log,
                stderr=log,
                **as_user,
            )
        ready = [programs / "pg_isready", "-q", "-h", "127.0.0.1", "-p", str(port)]
        wait_until(lambda: subprocess.run(ready, check=False).returncode == 0, 30, "PostgreSQL accepts connections")
        yield f"postgresql://coordinator@127.0.0.1:{port}"
    finally:
        if server is not None:
            server.send_signal(signal.SIGQUIT)  # at once: nothing in it is worth a checkpoint
            server.wait(30)
        shutil.rmtree(folder, ignore_errors=True)
