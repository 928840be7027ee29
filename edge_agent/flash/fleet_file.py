"""The fleet file, with all that can be checked checked before the first card is written, and every bad line named at once.

CSV with a header: `device` and, where wanted, the columns below. `group` says which group the device's bundle must have been
made for, `backbone` is a prepared folder; paths are relative to the file.
"""

from __future__ import annotations

import csv
import functools
import io
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
from side_tuning.wire.bounded import FrameError
from side_tuning.wire.topics import check_device_name

MAX_FLEET_BYTES = 4 * 1024 * 1024
COLUMNS = ("device", "group", "bundle", "hostname", "wifi", "wifi_secret_file", "country", "timezone", "backbone")
MORE = "more values than columns"


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
    for line, values in (lines := list(_lines(path))):
        device = values.get("device", "")
        options = _options(common, values, path.parent, bundles)
        bundle = _bundle(options.bundle)
        problems = [*_name_problems(values), *_twice(seen, line, "device", device)]
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
    general = [] if lines else ["it names no device"]
    if len(finished) < len(lines):
        general += _image_problems(common.image, rows, plans)
    if general or wrong:
        raise FlashError("\n  ".join([f"fleet file {path} cannot be used; nothing was written:", *wrong.words(), *general]))
    return rows, finished


class Problems:
    """What is wrong, with the lines that it is wrong in: what all lines share is said once."""

    def __init__(self) -> None:
        self._where: dict[str, dict[int, str]] = {}

    def __bool__(self) -> bool:
        return bool(self._where)

    def add(self, problem: str, line: int, device: str) -> None:
        self._where.setdefault(problem, {})[line] = device

    def words(self) -> list[str]:
        return [
            f"line {next(iter(where))} ({next(iter(where.values())) or 'no device'}): {problem}" if len(where) == 1 else f"lines {', '.join(map(str, where))}: {problem}"
            for problem, where in self._where.items()
        ]


def _lines(path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """Line number and values, empty ones left out."""
    try:
        with path.open("rb") as file:
            content = file.read(MAX_FLEET_BYTES + 1)
        text = content.decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise FlashError(f"fleet file {path} cannot be read: {error}; save it as CSV in UTF-8") from error
    if len(content) > MAX_FLEET_BYTES:
        raise FlashError(f"fleet file {path} is larger than {MAX_FLEET_BYTES} bytes")
    first = text.partition("\n")[0]
    semicolons = ";" in first and "," not in first  # as spreadsheets save where the comma is the decimal point
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=";" if semicolons else ",", restkey=MORE)
    try:
        names = list(reader.fieldnames or ())
        unknown = set(names) - set(COLUMNS)
        if "device" not in names or unknown or len(set(names)) < len(names):
            twice = f"twice: {', '.join(sorted({name for name in names if names.count(name) > 1}))}"
            columns = f"unknown: {', '.join(sorted(unknown))}" if unknown else twice if "device" in names else "'device' is missing"
            raise FlashError(f"fleet file {path} needs a first line with the columns' names ({', '.join(COLUMNS)}); {columns}")
        for values in reader:
            values[MORE] = ", ".join(values.get(MORE) or ())
            given = {name: value.strip() for name, value in values.items() if value and value.strip()}
            if given:
                yield reader.line_num, given
    except csv.Error as error:
        raise FlashError(f"fleet file {path} is no CSV: line {reader.line_num}: {error}") from error


def _options(common: FlashOptions, values: dict[str, str], folder: Path, bundles: Path) -> FlashOptions:
    device = values.get("device", "")
    changes: dict[str, object] = {name: values[name] for name in ("hostname", "wifi", "country", "timezone") if name in values}
    changes |= {name: folder / values[name] for name in ("wifi_secret_file", "backbone") if name in values}
    if common.wifi and "wifi" in values and "wifi_secret_file" not in values and values["wifi"] != common.wifi:
        changes["wifi_secret_file"] = None  # the common one is of another network
    changes["bundle"] = folder / values["bundle"] if "bundle" in values else bundles / f"{device}.bundle.json"
    changes["target"] = Path(str(common.target).replace("{device}", device)).absolute()
    return replace(common, **changes)  # type: ignore[arg-type]


def _name_problems(values: dict[str, str]) -> Iterator[str]:
    try:
        check_device_name(values.get("device", ""))
    except FrameError as error:
        yield f"{error}; give another name"
    if MORE in values:
        yield f"{values[MORE]!r} stands under no column; quote values with a comma in them"


def _twice(seen: dict[tuple[str, str], int], line: int, what: str, value: str) -> list[str]:
    """A value that an earlier line has too."""
    earlier = seen.setdefault((what, value), line) if value else line
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
