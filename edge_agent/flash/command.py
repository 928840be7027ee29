"""`edge-agent flash`: what is asked, what is checked, what is shown."""

from __future__ import annotations

import getpass
import secrets
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from typing_extensions import ParamSpec, Self

from edge_agent.flash.block_map import block_map_beside, read_block_map
from edge_agent.flash.card import Written, write_card
from edge_agent.flash.disks import Disk, check_target, list_disks, refusals, this_system
from edge_agent.flash.errors import FlashError
from edge_agent.flash.first_boot import BACKBONE, CardPlan, Wifi, put_files
from edge_agent.flash.values import wrong_values
from side_tuning.backbone_manifest import FINGERPRINTED, MANIFEST, BackboneError, check_artifact
from side_tuning.bundle import Bundle, BundleError, read_bundle

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True)
class FlashOptions:
    """The command line, read."""

    image: Path
    target: Path
    bundle: Path
    sha256: str | None = None
    size: int | None = None
    hostname: str | None = None
    user: str | None = None
    password_hash_file: Path | None = None
    ssh_key_files: tuple[Path, ...] = ()
    wifi: str | None = None
    wifi_secret_file: Path | None = None
    country: str | None = None
    timezone: str | None = None
    agent_config: Path | None = None
    backbone: Path | None = None
    largest_bytes: int = 256 * 10**9
    yes: bool = False
    unmount: bool = False


def plan_card(options: FlashOptions, ask: Callable[[str], str], load_backbone: Callable[[Path], dict[str, bytes]] | None = None) -> CardPlan:
    """Read and check everything that the options name; nothing is written.

    Raises:
        FlashError: all that is wrong.

    """
    wrong = list[str]()
    bundle = _noting(wrong, usable_bundle, options.bundle)
    hostname = options.hostname or (bundle.device.replace("_", "-").replace(".", "-") if bundle else "unknown")
    password_hash = _noting(wrong, _text_of, options.password_hash_file, "password hash") if options.password_hash_file else None
    ssh_keys = tuple(key for path in options.ssh_key_files if (key := _noting(wrong, _text_of, path, "SSH key")))
    agent_config = _noting(wrong, _text_of, options.agent_config, "agent's settings") if options.agent_config else None
    backbone = _noting(wrong, load_backbone or read_backbone, options.backbone) if options.backbone else None
    wifi = _noting(wrong, _wifi, options, ask)
    wrong += wrong_values(
        hostname=hostname, user=options.user, password=password_hash is not None, ssh_keys=ssh_keys, wifi=options.wifi is not None,
        country=options.country, timezone=options.timezone,
    )
    if wrong or bundle is None:
        raise FlashError(*wrong)
    return CardPlan(
        bundle=bundle,
        hostname=hostname,
        instance_id=f"mobillm-{secrets.token_hex(8)}",
        flashed_at=datetime.now(timezone.utc),
        user=options.user,
        password_hash=password_hash,
        ssh_keys=ssh_keys,
        wifi=wifi,
        country=options.country,
        timezone=options.timezone,
        image_name=options.image.name,
        agent_config=agent_config.encode() + b"\n" if agent_config is not None else None,
        backbone=backbone or {},
    )


def usable_bundle(path: Path) -> Bundle:
    """A bundle that can still let a device in.

    Raises:
        FlashError: it cannot be read, is no bundle, or has expired.

    """
    try:
        bundle = read_bundle(path)
    except BundleError as error:
        raise FlashError(str(error)) from error
    if bundle.expires_at < time.time():
        when = datetime.fromtimestamp(bundle.expires_at, timezone.utc)
        raise FlashError(f"bundle {path} expired at {when:%Y-%m-%d %H:%M} UTC; make a new one with `coordinator enrol {bundle.device}`")
    return bundle


def needed_bytes(options: FlashOptions) -> int:
    """What the image takes on the card, where that is known before it is unpacked; else 0."""
    map_path = block_map_beside(options.image)
    return read_block_map(map_path).image_size if map_path else options.size or 0


def flash(options: FlashOptions, console: Console, ask: Callable[[str], str] | None = None) -> Written:
    """Make one card.

    Raises:
        FlashError: it was not made; the text says why.

    """
    plan = plan_card(options, ask or ask_secret)
    map_path = block_map_beside(options.image)
    needed = needed_bytes(options)
    disk = check_target(options.target, needed, largest_bytes=options.largest_bytes, unmount=options.unmount)
    if not options.yes:
        confirm(disk, options.target, console)
    if disk is not None and disk.mounts:
        this_system().unmount(disk)
    with _Bars(console) as bars:
        written = write_card(
            options.image,
            options.target,
            customise=lambda boot: put_files(boot, plan),
            block_map=read_block_map(map_path) if map_path else None,
            expected_sha256=options.sha256,
            expected_size=options.size,
            progress=bars.show,
        )
    device = plan.bundle.device
    console.print(f"[bold]{device}[/] is on {options.target}: {written.image_size:,} bytes written and read back, {len(written.files)} files of its own.")
    if plan.backbone:
        here = any(path.startswith(BACKBONE) for path in written.files)
        size = sum(map(len, plan.backbone.values()))
        said = "is on it too" if here else "does not fit on its boot partition: the device fetches it, once `coordinator backbone assign` says so"
        console.print(f"The backbone in {options.backbone} ({size:,} bytes) {said}.")
    if not written.read_past_cache:
        console.print("The target's file system has no uncached reading, so the reading back proves less than on a card.")
    if disk is not None:
        console.print(this_system().eject(disk.path))
    console.print(f"sha256 of the image: {written.image_sha256}")
    return written


def print_disks(console: Console, largest_bytes: int) -> None:
    """Which disks there are and which may be written, with the reason where not."""
    disks = list_disks()
    for disk in disks:
        reasons = refusals(disk, 0, largest_bytes)
        console.print(disk.describe() + (f"  [red]refused[/]: {'; '.join(reasons)}" if reasons else "  [green]can be written[/]"), soft_wrap=True)
    if not disks:
        console.print("no disks were found; plug in the card")


def confirm(disk: Disk | None, target: Path, console: Console) -> None:
    """A USB drive with somebody's data looks just like a card, and a file may be somebody's image, so the path is typed once more.

    Raises:
        FlashError: not confirmed.

    """
    if disk is not None:
        path, what = disk.path, disk.describe()
    elif target.exists() and (size := target.stat().st_size):
        path, what = str(target), f"{target}  {size:,} bytes, a file"
    else:
        return
    if not sys.stdin.isatty():
        raise FlashError(f"{what}: nobody is there to confirm that it may be overwritten; add --yes if you are sure")
    console.print(f"Everything on [bold]{what}[/] will be lost.", soft_wrap=True)
    if console.input(f"Type {path} to go on: ").strip() != path:
        raise FlashError("not confirmed; nothing was written")


def ask_secret(prompt: str) -> str:
    """Asked for in the terminal, not shown.

    Raises:
        FlashError: nobody is there.

    """
    if sys.stdin.isatty():
        with suppress(EOFError):
            return getpass.getpass(prompt)
    raise FlashError(f"nobody is there to answer {prompt.strip()!r}; name a file with it (--wifi-secret-file)")


def _wifi(options: FlashOptions, ask: Callable[[str], str]) -> Wifi | None:
    if options.wifi is None:
        if options.wifi_secret_file:
            raise FlashError("--wifi-secret-file needs --wifi with the network's name")
        return None
    if options.wifi_secret_file:
        secret = _text_of(options.wifi_secret_file, "Wi-Fi passphrase")
    else:
        secret = ask(f"Passphrase of {options.wifi} (empty: open network): ")
    return Wifi.with_passphrase(options.wifi, secret)


def read_backbone(folder: Path) -> dict[str, bytes]:
    """A prepared backbone's files, checked against its fingerprint.

    Raises:
        FlashError: there is none in `folder`, or it is damaged.

    """
    try:
        check_artifact(folder)
        return {name: (folder / name).read_bytes() for name in (*FINGERPRINTED, MANIFEST)}
    except (BackboneError, OSError) as error:
        raise FlashError(f"the backbone cannot go on the card: {error}") from error


def _text_of(path: Path, what: str) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise FlashError(f"the file with the {what}, {path}, cannot be read: {error}") from error


def _noting(wrong: list[str], read: Callable[P, T], *arguments: P.args, **named: P.kwargs) -> T | None:
    """What `read` gives; None where it cannot, with its problems added to `wrong`."""
    try:
        return read(*arguments, **named)
    except FlashError as error:
        wrong.extend(error.problems)
        return None


class _Bars:
    """A bar for writing and one for reading back, with rate and time left."""

    def __init__(self, console: Console) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
        self._progress = Progress(*columns, console=console, transient=True)
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def show(self, stage: str, done: int, total: int | None) -> None:
        if stage not in self._tasks:
            self._tasks[stage] = self._progress.add_task({"write": "writing", "verify": "reading back"}[stage])
        self._progress.update(self._tasks[stage], completed=done, total=total)
