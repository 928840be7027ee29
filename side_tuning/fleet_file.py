"""The fleet file: a line per device, from which `coordinator enrol --fleet` makes bundles and `edge-agent flash --fleet` cards.

CSV with a header: `device` and, where wanted, the columns below. `backbone` is a prepared folder; paths are relative to the file.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from side_tuning.bundle import GROUP
from side_tuning.wire.bounded import FrameError
from side_tuning.wire.topics import check_device_name

MAX_FLEET_BYTES = 4 * 1024 * 1024
COLUMNS = ("device", "group", "bundle", "hostname", "wifi", "wifi_secret_file", "country", "timezone", "backbone")
_MORE = "more values than columns"


class FleetFileError(ValueError):
    """A fleet file that cannot be used; the text says what is wrong and what to do."""


@dataclass(frozen=True)
class FleetLine:
    """One device. `values` has no empty ones; `problems` are those of the line by itself and of names that stand there twice."""

    number: int
    device: str
    values: dict[str, str]
    problems: tuple[str, ...]


class Problems:
    """What is wrong, with the lines that it is wrong in: what many lines share is said once."""

    def __init__(self) -> None:
        self._where: dict[str, dict[int, str]] = {}

    def __bool__(self) -> bool:
        return bool(self._where)

    def add(self, problem: str, line: int, device: str) -> None:
        self._where.setdefault(problem, {})[line] = device

    def words(self) -> list[str]:
        said = []
        for problem, where in self._where.items():
            (line, device), *more = where.items()
            said.append(f"lines {', '.join(map(str, where))}: {problem}" if more else f"line {line} ({device or 'no device'}): {problem}")
        return said


def read_fleet_file(path: Path) -> list[FleetLine]:
    """Every line that is not empty.

    Raises:
        FleetFileError: it cannot be read, is no CSV, has other columns, or names no device.

    """
    try:
        with path.open("rb") as file:
            content = file.read(MAX_FLEET_BYTES + 1)
        text = content.decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise FleetFileError(f"fleet file {path} cannot be read: {error}; give the right path, or save it as CSV in UTF-8") from error
    if len(content) > MAX_FLEET_BYTES:
        raise FleetFileError(f"fleet file {path} is larger than {MAX_FLEET_BYTES} bytes")
    first = text.partition("\n")[0]
    semicolons = ";" in first and "," not in first  # as spreadsheets save where the comma is the decimal point
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=";" if semicolons else ",", restkey=_MORE)
    try:
        names = list(reader.fieldnames or ())
        _check_columns(path, names)
        lines, seen = list[FleetLine](), dict[str, int]()
        for row in reader:
            row[_MORE] = ", ".join(row.get(_MORE) or ())
            values = {name: value.strip() for name, value in row.items() if value and value.strip()}
            if values:
                device = values.get("device", "")
                lines.append(FleetLine(reader.line_num, device, values, tuple(_problems(values, seen, reader.line_num))))
    except csv.Error as error:
        raise FleetFileError(f"fleet file {path} is no CSV: line {reader.line_num}: {error}") from error
    if not lines:
        raise FleetFileError(f"fleet file {path} names no device")
    return lines


def _check_columns(path: Path, names: list[str]) -> None:
    if unknown := set(names) - set(COLUMNS):
        wrong = f"unknown: {', '.join(sorted(unknown))}"
    elif "device" not in names:
        wrong = "'device' is missing"
    elif twice := {name for name in names if names.count(name) > 1}:
        wrong = f"twice: {', '.join(sorted(twice))}"
    else:
        return
    raise FleetFileError(f"fleet file {path} needs a first line with the columns' names ({', '.join(COLUMNS)}); {wrong}")


def _problems(values: dict[str, str], seen: dict[str, int], number: int) -> Iterator[str]:
    device = values.get("device", "")
    try:
        check_device_name(device)
    except FrameError as error:
        yield f"{error}; give another name"
    if device and (earlier := seen.setdefault(device, number)) != number:
        yield f"device {device} is that of line {earlier} too; each device needs its own"
    if _MORE in values:
        yield f"{values[_MORE]!r} stands under no column; quote values with a comma in them"
    if "group" in values and not GROUP.fullmatch(values["group"]):
        yield f"group {values['group']!r} is not allowed: use up to 64 letters, digits, '_', '.', '-'"
