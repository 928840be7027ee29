"""Card after card for a fleet file: one bundle, one card, one label each; an interruption loses nothing that was finished.

A device whose bundle is the one of its "made" line in the ledger is not made again.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from edge_agent.flash.card import read_file
from edge_agent.flash.command import FlashOptions, ask_secret, confirm, flash
from edge_agent.flash.disks import is_disk, list_disks, this_system
from edge_agent.flash.errors import FlashError
from edge_agent.flash.first_boot import MANIFEST as MANIFEST_ON_CARD
from edge_agent.flash.fleet_file import FleetRow, check_fleet
from edge_agent.flash.ledger import Ledger, hold


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
        fleet: the CSV file (fleet_file.py); its ledger is beside it.
        common: what goes for all; `target` may have `{device}` in it, for files.
        console: where progress is shown.
        bundles: folder with DEVICE.bundle.json.
        labels: folder for DEVICE.txt, .svg and .png.
        wait_for_card: called before each card but the first with (device, target, console) where the target is one and the same disk.

    Raises:
        FlashError: something is wrong that can be seen beforehand (nothing was written), or a card failed (those before it are made).

    """
    if not fleet.is_file():
        raise FlashError(f"there is no fleet file {fleet}; give the right path with --fleet")
    with hold(fleet.with_name(f"{fleet.name}.ledger.jsonl")) as ledger:
        ask = functools.cache(ask_secret)  # one network's passphrase is asked for once, not per card
        rows, finished = check_fleet(fleet, common, ledger, bundles, ask)
        if finished:
            console.print(f"{len(finished)} of {len(rows) + len(finished)} cards are made already ({ledger.path})")
        _confirm_files(rows, common, ledger, console)
        one_reader = "{device}" not in str(common.target)
        return _make(rows, finished, ledger, console, one_reader=one_reader, labels=labels, wait_for_card=wait_for_card, ask=ask)


def _make(
    rows: Sequence[FleetRow],
    finished: dict[str, str],
    ledger: Ledger,
    console: Console,
    *,
    one_reader: bool,
    labels: Path,
    wait_for_card: Callable[[str, Path, Console], None],
    ask: Callable[[str], str],
) -> int:
    """Every row's card; `finished` says whose card each claim is on."""
    for number, row in enumerate(rows):
        target = row.options.target
        console.print(f"card {number + 1} of {len(rows)}: [bold]{row.device}[/]")
        if number and one_reader:
            wait_for_card(row.device, target, console)
        while one_reader and (whose := finished.get(_claim_on(target) or "")):
            console.print(f"the card in {target} is still that of [bold]{whose}[/], which is finished; it is not overwritten")
            wait_for_card(row.device, target, console)
        ledger.note("begun", row.device, claim=row.claim, target=str(target))
        try:
            written = flash(row.options if is_disk(target) else replace(row.options, yes=True), console, ask)  # files were asked about
        except FlashError as error:
            ledger.note("failed", row.device, claim=row.claim, target=str(target), reason=str(error))
            raise FlashError(f"{row.device}: {error}\n{number} cards were made; run the same command again to go on with this one") from error
        ledger.note("made", row.device, claim=row.claim, target=str(target), image_sha256=written.image_sha256)
        write_label(labels, row)
        finished[row.claim] = row.device
    return len(rows)


def _confirm_files(rows: Sequence[FleetRow], common: FlashOptions, ledger: Ledger, console: Console) -> None:
    """Files with something in them are asked about before the first card, except those that this batch itself left unfinished."""
    wrong = list[str]()
    first_on = {row.options.target: row for row in reversed(rows)}
    for row in first_on.values() if not common.yes else ():
        if is_disk(row.options.target) or ledger.left_unfinished(row.device, row.options.target):
            continue
        try:
            confirm(None, row.options.target, console)
        except FlashError as error:
            wrong.append(f"line {row.line} ({row.device}): {error}")
    if wrong:
        raise FlashError("\n  ".join(["nothing was written:", *wrong]))


def _claim_on(target: Path) -> str | None:
    """Whose card is in there: the claim in the manifest that a finished card carries."""
    if (content := read_file(target, MANIFEST_ON_CARD)) is None:
        return None
    try:
        found = json.loads(content)
    except ValueError:
        return None
    return str(found.get("claim")) if isinstance(found, dict) else None


def write_label(folder: Path, row: FleetRow) -> None:
    """A label for the board: as text, and as a QR code with the same words (nothing secret) where segno is installed."""
    folder.mkdir(parents=True, exist_ok=True)
    device = row.device
    group = f"group: {row.group}\n" if row.group else ""
    words = f"device: {device}\n{group}host: {row.hostname}\nclaim: {row.claim}\n"
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
        FlashError: nobody is there to ask, or the target is a file, which nobody can take out.

    """
    if not is_disk(target):
        raise FlashError(f"{target} is a file; put {{device}} into --target, so that each card has a file of its own")
    while True:
        try:
            console.input(f"Take the card out, put in the one for [bold]{device}[/], then press Enter ")
        except EOFError as error:
            raise FlashError("nobody is there to change cards; use a target with {device} in it, or run this in a terminal") from error
        if any(disk.path == this_system().disk_name(target) and disk.size for disk in list_disks()):
            return
        console.print(f"there is no card in {target}")

