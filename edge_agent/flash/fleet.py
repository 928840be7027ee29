"""Card after card for a fleet file: one bundle, one card, one label each; an interruption loses nothing that was finished.

The fleet file is CSV with a header: `device` and, where wanted, `bundle`, `hostname`, `wifi`, `wifi_secret_file`, `country`,
`timezone`, `backbone` (a prepared folder). The ledger beside it is a file of JSON lines that only grows; a card counts as made when its "made" line is on the
disk, and a device whose bundle is the one of that line is not made again.
"""

from __future__ import annotations

import csv
import functools
import getpass
import io
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path

from rich.console import Console

from edge_agent.flash.card import read_file
from edge_agent.flash.command import FlashOptions, flash
from edge_agent.flash.disks import list_disks
from edge_agent.flash.errors import FlashError
from edge_agent.flash.first_boot import MANIFEST as MANIFEST_ON_CARD
from side_tuning.backbone_manifest import MANIFEST
from side_tuning.bundle import BundleError, read_bundle
from side_tuning.wire.bounded import FrameError
from side_tuning.wire.topics import check_device_name

MAX_FLEET_BYTES = 4 * 1024 * 1024
COLUMNS = ("device", "bundle", "hostname", "wifi", "wifi_secret_file", "country", "timezone", "backbone")


@dataclass(frozen=True)
class FleetRow:
    """One card to be made, from one line of the fleet file."""

    device: str
    bundle: Path
    claim: str
    values: dict[str, str]


def read_fleet(path: Path, bundles: Path) -> list[FleetRow]:
    """Read and check the whole file before the first card; bundles that no column names are `bundles`/DEVICE.bundle.json.

    Raises:
        FlashError: all that is wrong, line by line.

    """
    try:
        with path.open("rb") as file:
            content = file.read(MAX_FLEET_BYTES + 1)
        text = content.decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise FlashError(f"fleet file {path} cannot be read: {error}") from error
    if len(content) > MAX_FLEET_BYTES:
        raise FlashError(f"fleet file {path} is larger than {MAX_FLEET_BYTES} bytes")
    reader = csv.DictReader(io.StringIO(text))
    unknown = set(reader.fieldnames or ()) - set(COLUMNS)
    if "device" not in (reader.fieldnames or ()) or unknown:
        columns = f"unknown: {', '.join(sorted(map(str, unknown)))}" if unknown else "'device' is missing"
        raise FlashError(f"fleet file {path} needs a first line with the columns' names ({', '.join(COLUMNS)}); {columns}")
    rows, wrong, seen = list[FleetRow](), list[str](), set[str]()
    for number, values in enumerate(reader, 2):
        device = (values.get("device") or "").strip()
        try:
            check_device_name(device)
        except FrameError as error:
            wrong.append(f"line {number}: {error}")
            continue
        if device in seen:
            wrong.append(f"line {number}: {device} stands there twice")
        seen.add(device)
        given = {name: value.strip() for name, value in values.items() if name in COLUMNS and value and value.strip()}
        bundle = path.parent / given["bundle"] if "bundle" in given else bundles / f"{device}.bundle.json"
        try:
            read = read_bundle(bundle)
        except BundleError as error:
            wrong.append(f"line {number}: {error}")
            continue
        if read.device != device:
            wrong.append(f"line {number}: bundle {bundle} is for {read.device}, not for {device}")
        if "backbone" in given and not (path.parent / given["backbone"] / MANIFEST).is_file():
            wrong.append(f"line {number}: there is no backbone in {path.parent / given['backbone']}")
        rows.append(FleetRow(device, bundle, read.claim, given))
    if wrong or not rows:
        raise FlashError("\n  ".join([f"fleet file {path} cannot be used:", *(wrong or ["it names no device"])]))
    return rows


class Ledger:
    """What became of each card, on the disk as soon as it is so."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._entries = list(self._read())

    def _read(self) -> Iterator[dict[str, object]]:
        if not self.path.exists():
            return
        for line in self.path.read_text(encoding="utf-8").splitlines():
            try:
                entry = json.loads(line)
            except ValueError:
                continue  # the power went while it was written; that card is not made
            if isinstance(entry, dict):
                yield entry

    def note(self, step: str, device: str, **more: object) -> None:
        entry = {"step": step, "device": device, "at": datetime.now(timezone.utc).isoformat(timespec="seconds"), **more}
        self._entries.append(entry)
        with self.path.open("ab") as file:
            if file.tell() and not self.path.read_bytes().endswith(b"\n"):
                file.write(b"\n")  # after a line that the power cut short
            file.write(json.dumps(entry).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())

    def made(self, device: str, claim: str) -> bool:
        return any(entry["step"] == "made" and entry["device"] == device and entry.get("claim") == claim for entry in self._entries if "step" in entry)


def flash_fleet(
    fleet: Path,
    common: FlashOptions,
    console: Console,
    *,
    bundles: Path,
    labels: Path,
    wait_for_card: Callable[[str, Path, Console], None],
) -> int:
    """Make every card of `fleet` that the ledger does not have yet; returns how many were made now.

    Args:
        fleet: the CSV file; its ledger is beside it.
        common: what goes for all; `target` may have `{device}` in it, for files.
        console: where progress is shown.
        bundles: folder with DEVICE.bundle.json.
        labels: folder for DEVICE.txt, .svg and .png.
        wait_for_card: called before each card but the first with (device, target, console) where the target is one and the same disk.

    Raises:
        FlashError: the file is wrong (nothing was written), or a card failed (those before it are made).

    """
    rows = read_fleet(fleet, bundles)
    ledger = Ledger(fleet.with_name(f"{fleet.name}.ledger.jsonl"))
    made = 0
    waiting = [row for row in rows if not ledger.made(row.device, row.claim)]
    if skipped := len(rows) - len(waiting):
        console.print(f"{skipped} of {len(rows)} cards are made already ({ledger.path})")
    per_device = "{device}" in str(common.target)
    made_claims = {row.claim: row.device for row in rows if row not in waiting}
    ask = functools.cache(getpass.getpass)  # one network's passphrase is asked for once, not per card
    for number, row in enumerate(waiting, 1):
        target = Path(str(common.target).replace("{device}", row.device))
        console.print(f"card {number} of {len(waiting)}: [bold]{row.device}[/]")
        if number > 1 and not per_device:
            wait_for_card(row.device, target, console)
        while not per_device and (finished := made_claims.get(_claim_on(target) or "")):
            console.print(f"the card in {target} is still that of [bold]{finished}[/], which is finished; it is not overwritten")
            wait_for_card(row.device, target, console)
        ledger.note("begun", row.device, claim=row.claim, target=str(target))
        try:
            written = flash(_options(common, row, target, fleet.parent), console, ask)
        except FlashError as error:
            ledger.note("failed", row.device, claim=row.claim, reason=str(error))
            raise FlashError(f"{row.device}: {error}\n{made} cards were made; run the same command again to go on with this one") from error
        ledger.note("made", row.device, claim=row.claim, target=str(target), image_sha256=written.image_sha256)
        write_label(labels, row.device, row.claim, row.values.get("hostname", row.device))
        made_claims[row.claim] = row.device
        made += 1
    return made


def _claim_on(target: Path) -> str | None:
    """Whose card is in there: the claim in the manifest that a finished card carries."""
    if not target.exists() or (content := read_file(target, MANIFEST_ON_CARD)) is None:
        return None
    try:
        found = json.loads(content)
    except ValueError:
        return None
    return str(found.get("claim")) if isinstance(found, dict) else None


def _options(common: FlashOptions, row: FleetRow, target: Path, folder: Path) -> FlashOptions:
    values = row.values
    changes: dict[str, object] = {name: values[name] for name in ("hostname", "wifi", "country", "timezone") if name in values}
    changes |= {name: folder / values[name] for name in ("wifi_secret_file", "backbone") if name in values}
    return replace(common, bundle=row.bundle, target=target, **changes)  # type: ignore[arg-type]


def write_label(folder: Path, device: str, claim: str, hostname: str) -> None:
    """A label for the board: as text, and as a QR code with the same words (nothing secret) where segno is installed."""
    folder.mkdir(parents=True, exist_ok=True)
    words = f"device: {device}\nhost: {hostname}\nclaim: {claim}\n"
    (folder / f"{device}.txt").write_text(words, encoding="utf-8")
    try:
        import segno
    except ImportError:
        return
    code = segno.make(words, error="m", micro=False)
    code.save(str(folder / f"{device}.svg"), scale=4)
    code.save(str(folder / f"{device}.png"), scale=4)


def ask_for_card(device: str, target: Path, console: Console) -> None:
    """Wait until a person has put in the next card.

    Raises:
        FlashError: nobody is there to ask.

    """
    while True:
        try:
            console.input(f"Take the card out, put in the one for [bold]{device}[/], then press Enter ")
        except EOFError as error:
            raise FlashError("nobody is there to change cards; use a target with {device} in it, or run this in a terminal") from error
        if any(disk.path == str(target.resolve()) and disk.size for disk in list_disks()):
            return
        console.print(f"there is no card in {target}")

