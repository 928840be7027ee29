"""The commands that look after a coordinator: doctor, backup, restore, alive. Registered by coordinator/cli.py."""

from __future__ import annotations

import json
import logging
import sys
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Annotated

import typer

from coordinator.command_line import Config, open_settings


def register_upkeep_commands(app: typer.Typer) -> None:
    app.command()(doctor)
    app.command()(backup)
    app.command()(restore)
    app.command()(alive)


def doctor(config: Config = None, as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False) -> None:
    """Look at clock, disk, database, keys, certificates, broker and programs; exit code 1 if something failed."""
    from coordinator.doctor import examine, lines

    settings = open_settings(config, "doctor")
    logging.disable(logging.CRITICAL)  # what goes wrong stands in the findings
    findings = examine(settings)
    print(json.dumps([asdict(finding) for finding in findings], indent=2) if as_json else "\n".join(lines(findings)))
    sys.exit(1 if any(finding.level == "failed" for finding in findings) else 0)


def backup(
    file: Annotated[str, typer.Argument(help="The file to write, outside data_directory, best on another disk; - for a pipe.")],
    config: Config = None,
    without_keys: Annotated[bool, typer.Option("--without-keys", help="Leave every private key out.")] = False,
) -> None:
    """Write everything that this coordinator needs into one file, while its programs run."""
    from coordinator.backup import BackupError, create_backup, stream_backup

    settings = open_settings(config, "backup")
    if file == "-":
        if sys.stdout.isatty():
            raise BackupError("a backup is no text for a terminal: name a file, or lead it into one with >")
        manifest = stream_backup(settings, sys.stdout.buffer, _now(), with_keys=not without_keys, settings_file=config, say=_tell)
    else:
        manifest = create_backup(settings, Path(file), _now(), with_keys=not without_keys, settings_file=config, say=_tell)
    megabytes = sum(size for _, size, _ in manifest.files.values()) / 1e6
    keys = "no private keys" if without_keys else "it holds private keys: guard it"
    _tell(f"{file}: {len(manifest.files)} files, {megabytes:,.1f} MB; {keys}")


def restore(
    file: Annotated[str, typer.Argument(help="A backup; - for a pipe.")],
    config: Config = None,
    force: Annotated[bool, typer.Option("--force", help="Where something is there already, move it aside.")] = False,
) -> None:
    """Put a backup in place: every file checked, the database brought up to date. Stop all programs first."""
    from coordinator.restore import restore_backup

    settings = open_settings(config, "restore")
    manifest = restore_backup(settings, sys.stdin.buffer if file == "-" else Path(file), _now(), force=force, say=_tell)
    print(f"restored {len(manifest.files)} files of {manifest.made_at} into {settings.data_directory}")


def alive(
    name: Annotated[str, typer.Argument(help="gateway, trainer or enrolment.")],
    max_age: Annotated[float, typer.Option(min=1, help="Seconds since its last sign of life.")] = 30.0,
    config: Config = None,
) -> None:
    """Whether a program on this machine is alive: exit code 0 or 1 and a line why. For health checks."""
    from coordinator.settings import load_settings
    from side_tuning.alive import alive_trouble

    trouble = alive_trouble(load_settings(config).alive_file(name), max_age)
    print(f"{name}: {trouble or 'alive'}")
    sys.exit(1 if trouble else 0)


def _tell(line: str) -> None:
    print(line, file=sys.stderr)


def _now() -> datetime:
    return datetime.now(timezone.utc)
