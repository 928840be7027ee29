"""The agent as a service on a board that already runs an operating system, or in the tree of one that will (`--root`).

Every file is the same on each run, so that running it again changes nothing and repairs what was changed. With a root other
than `/` nothing is run: the user comes from sysusers.d, folders and owners from tmpfiles.d, the service from its link, all at
the board's first boot. That is how NVIDIA's `Linux_for_Tegra/rootfs` is prepared before it is flashed.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from edge_agent.jetson_tree import is_jetson_root, not_ready, waits_for_a_person
from edge_agent.spool_file import sync_folder
from side_tuning.bundle import read_bundle

USER = "mobillm-fleet"
UNIT = "mobillm-edge-agent.service"
CONFIGURATION = Path("etc/mobillm-fleet")
STATE = Path("var/lib/mobillm-fleet")
DEFAULT_PROGRAM = Path("/opt/mobillm-fleet/bin/edge-agent")

_UNIT_PLACE = Path("etc/systemd/system") / UNIT
_UPDATED = Path("etc/.updated")
_WANTS = Path("etc/systemd/system/multi-user.target.wants") / UNIT
_SYSUSERS = Path("etc/sysusers.d/mobillm-fleet.conf")
_TMPFILES = Path("etc/tmpfiles.d/mobillm-fleet.conf")
_JOURNAL = Path("etc/systemd/journald.conf.d/mobillm-fleet.conf")


class InstallError(RuntimeError):
    """The board cannot be set up; the text says why and what to do."""


@dataclass(frozen=True)
class Plan:
    """What is to be put where."""

    root: Path
    program: Path  # as the board will see it
    config: Path | None = None
    bundle: Path | None = None

    @property
    def live(self) -> bool:
        return self.root == Path("/")


def install(plan: Plan, run: Callable[[Sequence[str]], None] | None = None) -> list[str]:
    """Put everything in place; returns what changed, in words (nothing: all was there already).

    Raises:
        InstallError: no root rights, no systemd, a tree that is none of an operating system, or NVIDIA's before its time.
        BundleError: the bundle cannot be used.

    """
    if is_jetson_root(plan.root) and (problem := not_ready(plan.root)):
        raise InstallError(problem)
    _check_root(plan)
    bundle = None if plan.bundle is None else read_bundle(plan.bundle).to_text().encode()
    changes: list[str] = []
    for place, content, mode in _files(plan):
        if _write(plan.root / place, content, mode):
            changes.append(f"wrote {place}")
    (plan.root / STATE).mkdir(mode=0o700, parents=True, exist_ok=True)
    if plan.config is not None:
        place = CONFIGURATION / "agent.toml"
        if not (plan.root / place).exists():
            _write(plan.root / place, plan.config.read_bytes(), 0o640)
            changes.append(f"wrote {place}")
        elif (plan.root / place).read_bytes() != plan.config.read_bytes():
            changes.append(f"left {place} as it is: it differs from {plan.config}; remove it to have it replaced")
    if bundle is not None and _write(plan.root / STATE / "device.bundle", bundle, 0o600):
        changes.append(f"wrote {STATE / 'device.bundle'}: wiped once the device is enrolled")
    wants = plan.root / _WANTS
    if not wants.is_symlink():
        wants.parent.mkdir(parents=True, exist_ok=True)
        wants.symlink_to(Path("/") / _UNIT_PLACE)
        changes.append(f"enabled {UNIT}")
    if plan.live:
        execute = run or _run
        execute(["systemd-sysusers", str(Path("/") / _SYSUSERS)])
        execute(["systemd-tmpfiles", "--create", str(Path("/") / _TMPFILES)])
        execute(["systemctl", "daemon-reload"])
        execute(["systemctl", "restart", UNIT])
    elif changes and (plan.root / _UPDATED).exists():
        # With this stamp in the tree, systemd-sysusers skips the first boot and the agent would have no user.
        (plan.root / _UPDATED).unlink()
        changes.append(f"removed {_UPDATED}: the first boot makes the agent's user")
    return changes


def still_to_do(plan: Plan) -> list[str]:
    """What keeps the agent from starting at a tree's first boot, and is not for this program to do."""
    notes = []
    if not plan.live and not (plan.root / plan.program.relative_to("/")).exists():
        notes.append(f"{plan.program} is not in {plan.root} yet: put the agent there before the board is flashed")
    if waits_for_a_person(plan.root):
        notes.append("the board will ask on its screen who uses it, and the agent waits for the answer; tools/l4t_create_default_user.sh spares it that")
    return notes


def uninstall(root: Path, *, purge: bool, run: Callable[[Sequence[str]], None] | None = None) -> list[str]:
    """Take the service away. Settings, spool and identity stay unless `purge`; unsent samples would go with them.

    Raises:
        InstallError: no root rights.

    """
    plan = Plan(root, DEFAULT_PROGRAM)
    _check_root(plan)
    changes: list[str] = []
    if plan.live and (root / _UNIT_PLACE).exists():
        (run or _run)(["systemctl", "disable", "--now", UNIT])
    for place in (_WANTS, _UNIT_PLACE, _SYSUSERS, _TMPFILES, _JOURNAL):
        if (root / place).exists() or (root / place).is_symlink():
            (root / place).unlink()
            changes.append(f"removed {place}")
    for place in (CONFIGURATION, STATE) if purge else ():
        if (root / place).exists():
            shutil.rmtree(root / place)
            changes.append(f"removed {place} with all that was in it")
    if plan.live:
        (run or _run)(["systemctl", "daemon-reload"])
    return changes


def _files(plan: Plan) -> list[tuple[Path, bytes, int]]:
    unit = resources.files("edge_agent").joinpath("systemd", UNIT).read_text(encoding="utf-8")
    return [
        (_UNIT_PLACE, unit.replace(str(DEFAULT_PROGRAM), str(plan.program)).encode(), 0o644),
        (_SYSUSERS, f'u {USER} - "edge agent of mobillm-fleet" /{STATE}\nm {USER} video\n'.encode(), 0o644),
        (_TMPFILES, f"d /{STATE} 0700 {USER} {USER}\nZ /{STATE} - {USER} {USER}\nz /{CONFIGURATION} 0750 root {USER}\nz /{CONFIGURATION}/agent.toml 0640 root {USER}\n".encode(), 0o644),
        # A card lives longer, and never fills, when the journal is bounded.
        (_JOURNAL, b"[Journal]\nSystemMaxUse=50M\nSystemMaxFileSize=10M\n", 0o644),
    ]


def _check_root(plan: Plan) -> None:
    if not (plan.root / "etc").is_dir() or not ((plan.root / "usr/lib/systemd").is_dir() or (plan.root / "lib/systemd").is_dir()):
        raise InstallError(f"{plan.root} is no root of an operating system with systemd: it has no etc and usr/lib/systemd; give the right --root")
    if plan.live and os.geteuid() != 0:
        raise InstallError("installing a service needs root; run this with sudo")
    if not os.access(plan.root / "etc", os.W_OK):
        raise InstallError(f"{plan.root / 'etc'} cannot be written; run this with sudo")


def _write(path: Path, content: bytes, mode: int) -> bool:
    """Whether the file had to be changed. Never follows a link out of a tree that is not ours."""
    if path.is_symlink():
        raise InstallError(f"{path} is a link; remove it, so that a file can take its place")
    if path.exists() and path.read_bytes() == content and path.stat().st_mode & 0o777 == mode:
        return False
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.new")
    aside.unlink(missing_ok=True)
    with os.fdopen(os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    aside.chmod(mode)  # whatever the umask
    aside.replace(path)
    sync_folder(path.parent)
    return True


def _run(command: Sequence[str]) -> None:
    try:
        result = subprocess.run(list(command), capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise InstallError(f"{command[0]} is not installed: this board has no systemd; start `edge-agent run` in your own way") from error
    if result.returncode:
        raise InstallError(f"{' '.join(command)} failed: {result.stderr.strip()}")


def this_program() -> Path:
    """`edge-agent` of the environment that runs now."""
    return Path(sys.executable).with_name("edge-agent")
