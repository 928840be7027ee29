"""JSON lines and CSV, plain or .gz, row by row in bounded memory. A bad row is refused with file:line and the cure."""

from __future__ import annotations

import csv
import gzip
import json
import zlib
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Literal

from edge_agent.sample_rows import AnySourceSettings, Refusal, RowError, RowReader, Sample, Skipped
from edge_agent.settings import Column

MAX_ROW_BYTES = 1024 * 1024
MAX_ROW_LINES = 100  # a CSV row may span lines inside quotes; a forgotten quote must not swallow the file
UNCLOSED = "a quotation mark is never closed; close it or double it"

NothingYet = Literal["nothing yet"]
Item = Sample | Refusal | Skipped | NothingYet
Line = tuple[int, bytes | None]  # number and content; None for one that is too long


def unavailable(path: Path, error: OSError) -> Refusal:
    if isinstance(error, FileNotFoundError):
        return Refusal("", "file missing", f"{path}: there is no such file or folder; put it there or correct the source's path. It is looked for again")
    return Refusal("", "file unreadable", f"{path}: cannot be read: {error.strerror or error}; make it readable for this user. It is tried again")


def read_items(file: IO[bytes], path: Path, settings: AnySourceSettings, rows: RowReader, *, follow: bool) -> Iterator[Item]:
    """Every row of an open file as a sample or refusal; ends at its end, or with `follow` says "nothing yet" there."""
    name = path.name.lower()
    stream: IO[bytes] = gzip.GzipFile(fileobj=file) if name.endswith(".gz") else file  # type: ignore[assignment]
    lines = _lines(stream, follow=follow)
    is_csv = name.removesuffix(".gz").endswith(".csv")
    try:
        yield from _csv_items(lines, path, settings, rows) if is_csv else _json_items(lines, path, rows)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        yield Refusal("", "file damaged", f"{path}: the compressed data is damaged or cut short ({error}); copy the file again. The rows before are used")
    except OSError as error:
        yield unavailable(path, error)


def _lines(stream: IO[bytes], *, follow: bool) -> Iterator[Line | NothingYet]:
    """Complete lines with their numbers; the last one may lack its end unless the file is followed."""
    number, part, too_long = 1, b"", False
    while True:
        piece = stream.readline(MAX_ROW_BYTES + 1 - len(part))
        part += piece
        if part.endswith(b"\n") or (not piece and not follow):
            if part or too_long:
                yield (number, None if too_long else part)
            if not piece:
                return
            number, part, too_long = number + 1, b"", False
        elif len(part) > MAX_ROW_BYTES:
            part, too_long = b"", True
        elif not piece:
            yield "nothing yet"


def _decode(line: Line, path: Path) -> str:
    number, content = line
    if content is None:
        raise RowError("row too long", f"{path}:{number}: the row is longer than {MAX_ROW_BYTES} bytes; cut it into several")
    if number == 1:
        content = content.removeprefix(b"\xef\xbb\xbf")  # the mark that Windows programs put first
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        wide = number == 1 and content[:2] in (b"\xff\xfe", b"\xfe\xff")
        cure = "it looks like UTF-16: `iconv -f UTF-16 -t UTF-8`" if wide else "convert it, for instance `iconv -f LATIN1 -t UTF-8`"
        raise RowError("not UTF-8", f"{path}:{number}: the row is not UTF-8; {cure}") from error


def _undecodable(line: Line, error: RowError, rows: RowReader) -> Refusal | Skipped:
    return rows.refusal((line[1] or b"").hex(), error.reason, str(error))


def _json_items(lines: Iterator[Line | NothingYet], path: Path, rows: RowReader) -> Iterator[Item]:
    for line in lines:
        if line == "nothing yet":
            yield "nothing yet"
            continue
        try:
            text = _decode(line, path)
        except RowError as error:
            yield _undecodable(line, error, rows)
            continue
        if not text.strip():
            continue
        where = f"{path}:{line[0]}"
        try:
            yield rows.sample(parse_json_row(text), where)
        except RowError as error:
            yield rows.refusal(text, error.reason, f"{where}: {error}")


def parse_json_row(text: str) -> dict[str, object]:
    """The fields of one JSON row; raises `RowError`."""
    shape = 'each row must be one object such as {"text": "…", "label": "…"}'
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError) as error:
        why = error.msg if isinstance(error, json.JSONDecodeError) else type(error).__name__
        raise RowError("broken row", f"not valid JSON ({why}); {shape}") from error
    if not isinstance(fields, dict):
        raise RowError("broken row", f"a JSON {type(fields).__name__}; {shape}")
    return fields


def _csv_items(lines: Iterator[Line | NothingYet], path: Path, settings: AnySourceSettings, rows: RowReader) -> Iterator[Item]:
    header: list[str] | None = None
    delimiter = ","
    record: list[tuple[int, str]] = []  # lines of the row so far
    again: deque[tuple[int, str]] = deque()  # lines behind an unclosed quote, to be read anew
    while True:
        if again:
            record.append(again.popleft())
        else:
            line = next(lines, None)
            if line == "nothing yet":
                yield "nothing yet"
                continue
            if line is None:
                if not record:
                    return
                yield _refuse_first_line(record, again, rows, f"{path}:{record[0][0]}: {UNCLOSED}")
                continue
            try:
                record.append((line[0], _decode(line, path)))
            except RowError as error:
                yield _undecodable(line, error, rows)
                if header is None and not record:
                    return  # without its header the rest means nothing
                continue
        if header is None:
            delimiter = max(",;\t", key=record[0][1].count)
        number = record[0][0]
        try:
            parsed = list(csv.reader([content for _, content in record], delimiter=delimiter, strict=True))
        except csv.Error as error:
            if "unexpected end" not in str(error):
                why = f"not valid CSV ({error}); double the quotes inside a quoted field"
                yield _refuse_first_line(record, again, rows, f"{path}:{number}: {why}")
            elif len(record) >= MAX_ROW_LINES:
                yield _refuse_first_line(record, again, rows, f"{path}:{number}: {UNCLOSED}")
            continue
        cells = parsed[0] if parsed else []
        if not any(cell.strip() for cell in cells):
            record = []
        elif header is None:
            header = [cell.strip() for cell in cells]
            columns: tuple[Column, ...] = ("text", "text_a", "prompt")
            if not {settings.columns.get(column, column) for column in columns} & set(header):
                why = f"the first row {header!r:.120} names no column 'text' (or 'text_a' and 'text_b', or 'prompt' and 'response'); add a header line, or name the column in the source's columns"
                yield rows.refusal(record[0][1], "no header", f"{path}:{number}: {why}")
                return
            record = []
        elif len(cells) != len(header):
            why = f"{len(cells)} fields where the header has {len(header)}; quote fields that hold {delimiter!r}"
            yield _refuse_first_line(record, again, rows, f"{path}:{number}: {why}")
        else:
            yield rows.sample(dict(zip(header, cells, strict=True)), f"{path}:{number}")
            record = []


def _refuse_first_line(
    record: list[tuple[int, str]], again: deque[tuple[int, str]], rows: RowReader, detail: str,
) -> Refusal | Skipped:
    """Refuse the line that a broken row begins with; lines that its quotes drew in are read anew, as rows of their own."""
    first = record[0][1]
    again.extendleft(reversed(record[1:]))
    record.clear()
    return rows.refusal(first, "broken row", detail)
