"""A fleet file's cards, with all that can be checked checked before the first one is written, and every bad line named at once."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from edge_agent.flash.command import FlashOptions, needed_bytes, plan_card, read_backbone
from edge_agent.flash.disks import check_target
from edge_agent.flash.errors import FlashError
from edge_agent.flash.fat import FatPartition
from edge_agent.flash.first_boot import CardPlan, detect, put_files
from edge_agent.flash.ledger import Ledger
from edge_agent.flash.rehearsal import open_preview
from side_tuning.bundle import Bundle, BundleError, read_bundle
from side_tuning.fleet_file import FleetFileError, Problems, read_fleet_file


@dataclass(frozen=True)
class FleetRow:
    """One card to be made, from one line of the fleet file."""

    line: int
    device: str
    group: str
    claim: str
    hostname: str
    options: FlashOptions


def check_fleet(
    path: Path, common: FlashOptions, ledger: Ledger, bundles: Path, ask: Callable[[str], str]
) -> tuple[list[FleetRow], dict[str, str]]:
    """The cards to be made, and claim -> device of those that the ledger has already.

    Args:
        path: the fleet file.
        common: what goes for all lines; `target` may have `{device}` in it, for files.
        ledger: what was made before.
        bundles: folder with DEVICE.bundle.json, for lines that name no bundle.
        ask: for a Wi-Fi passphrase that no file has.

    Raises:
        FlashError: all that is wrong, line by line; nothing was written.

    """
    wrong, seen = Problems(), dict[tuple[str, str], int]()
    rows, finished, plans = list[FleetRow](), dict[str, str](), list[CardPlan]()
    load_backbone = functools.cache(read_backbone)  # the same folder in fifty lines is hashed once
    try:
        lines = read_fleet_file(path)
    except FleetFileError as error:
        raise FlashError(str(error)) from error
    for entry in lines:
        line, device, values = entry.number, entry.device, entry.values
        options = _options(common, values, path.parent, bundles)
        bundle = _bundle(options.bundle)
        problems = list(entry.problems)
        if not problems and (claim := _made(ledger, device, options.bundle, bundle)) is not None:
            finished[claim] = device
            continue
        if bundle is not None:
            problems += [*_bundle_problems(bundle, values, options.bundle, ledger), *_twice(seen, line, "claim", bundle.claim)]
        try:
            plan = plan_card(options, ask, load_backbone)
        except FlashError as error:
            problems += error.problems
        else:
            problems += _twice(seen, line, "host name", plan.hostname.lower())
            rows.append(FleetRow(line, device, plan.bundle.group, plan.bundle.claim, plan.hostname, options))
            plans.append(plan)
        for problem in problems:
            wrong.add(problem, line, device)
    _check_targets(rows, wrong)
    general = list(_image_problems(common.image, rows, plans)) if len(finished) < len(lines) else []
    if general or wrong:
        raise FlashError("\n  ".join([f"fleet file {path} cannot be used; nothing was written:", *wrong.words(), *general]))
    return rows, finished


def _options(common: FlashOptions, values: dict[str, str], folder: Path, bundles: Path) -> FlashOptions:
    device = values.get("device", "")
    changes: dict[str, object] = {name: values[name] for name in ("hostname", "wifi", "country", "timezone") if name in values}
    changes |= {name: folder / values[name] for name in ("wifi_secret_file", "backbone") if name in values}
    if common.wifi and "wifi" in values and "wifi_secret_file" not in values and values["wifi"] != common.wifi:
        changes["wifi_secret_file"] = None  # the common one is of another network
    changes["bundle"] = folder / values["bundle"] if "bundle" in values else bundles / f"{device}.bundle.json"
    changes["target"] = Path(str(common.target).replace("{device}", device)).absolute()
    return replace(common, **changes)  # type: ignore[arg-type]


def _twice(seen: dict[tuple[str, str], int], line: int, what: str, value: str) -> list[str]:
    """A value that an earlier line has too."""
    earlier = seen.setdefault((what, value), line)
    return [] if earlier == line else [f"{what} {value} is that of line {earlier} too; each device needs its own"]


def _bundle(path: Path) -> Bundle | None:
    try:
        return read_bundle(path)
    except BundleError:
        return None  # said when the card is planned


def _made(ledger: Ledger, device: str, path: Path, bundle: Bundle | None) -> str | None:
    """The claim of a finished card. The bundle's file may be gone, since it is spent; a new one asks for a new card."""
    if bundle is None:
        return None if path.exists() else ledger.claim_of(device)
    return bundle.claim if ledger.made(device, bundle.claim) else None


def _bundle_problems(bundle: Bundle, values: dict[str, str], path: Path, ledger: Ledger) -> Iterator[str]:
    device = values.get("device", "")
    if bundle.device != device:
        yield f"bundle {path} is for {bundle.device}, not for {device}; `coordinator enrol {device}` makes one"
    if (group := values.get("group")) and bundle.group != group:
        made_for = f"group {bundle.group}" if bundle.group else "no group"
        yield f"bundle {path} was made for {made_for}, not for group {group}; `coordinator enrol {device} --group {group}` makes one"
    if (other := ledger.device_of(bundle.claim)) not in (None, device):
        yield f"the claim {bundle.claim} is on the card of {other} already, and is good once; `coordinator enrol {device}` makes a new one"


def _check_targets(rows: list[FleetRow], wrong: Problems) -> None:
    for target, row in {row.options.target: row for row in reversed(rows)}.items():
        try:
            check_target(target, needed_bytes(row.options), largest_bytes=row.options.largest_bytes, unmount=row.options.unmount)
        except FlashError as error:
            wrong.add(str(error), row.line, row.device)


def _image_problems(image: Path, rows: list[FleetRow], plans: list[CardPlan]) -> Iterator[str]:
    """What the image cannot take, tried on the image itself; once for each backbone, since other values differ by a few bytes."""
    tried = set[Path | None]()
    try:
        with open_preview(image) as preview:
            preview.rehearse(_look)
            for row, plan in zip(rows, plans, strict=True):
                if row.options.backbone not in tried:
                    tried.add(row.options.backbone)
                    preview.rehearse(functools.partial(put_files, plan=plan))
    except FlashError as error:
        yield str(error)


def _look(boot: FatPartition) -> dict[str, bytes]:
    detect(boot)
    return {}
