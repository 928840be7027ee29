"""A real PostgreSQL server on loopback for the tests that ask for one, run by a user without rights."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import stat
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
    """Start a server with an empty cluster; gives the URL of its maintenance database without the name at the end.

    Raises:
        PostgresMissingError: not installed, or it cannot make a cluster on this machine; says why.

    """
    programs = find_programs()
    folder = Path(tempfile.mkdtemp(prefix="postgres-"))
    port = free_port()
    data = folder / "data"
    server = None
    try:
        as_user = _make_cluster(programs, folder)
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


def _make_cluster(programs: Path, folder: Path) -> dict[str, object]:
    """By the first user that can; gives what `subprocess` needs to be that user."""
    users: list[dict[str, object]] = [{"cwd": folder}]
    if os.geteuid() == 0:  # PostgreSQL refuses to run as root
        known = [user for user in pwd.getpwall() if user.pw_name in ("postgres", "nobody")]
        users = [{"cwd": folder, "user": user.pw_uid, "group": user.pw_gid, "extra_groups": []} for user in sorted(known, key=lambda user: user.pw_name, reverse=True)]
    said = ""
    for as_user in users:
        if "user" in as_user:
            os.chown(folder, as_user["user"], as_user["group"])
        made = subprocess.run(
            [programs / "initdb", "-D", folder / "data", "-U", "coordinator", "-A", "trust", "--no-sync", "-E", "UTF8", "--locale=C"],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False, **as_user,
        )  # fmt: skip
        if made.returncode == 0:
            return as_user
        said += f"{as_user}: {made.stdout}\n"
        shutil.rmtree(folder / "data", ignore_errors=True)
    place = os.stat("/dev/null")
    free = os.statvfs(folder)
    raise PostgresMissingError(
        f"initdb makes no cluster here; /dev/null is {stat.filemode(place.st_mode)}, {free.f_bavail * free.f_frsize >> 20} MiB are free for users:\n{said}"
    )
