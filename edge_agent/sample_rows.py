"""Rows of a source become samples, each with an identity that is the same whenever the source is read again.

A sample's id is the hash of the source's name, its content and how often that content came up before, so that
identical rows are distinct samples; or the hash of the row's own `id`. Memory grows by 8 to 16 bytes per row.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, Literal, get_args

from edge_agent.compact_set import CompactSet, digest_of
from edge_agent.settings import Column, FileSourceSettings, FolderSourceSettings, MqttSourceSettings, Split

AnySourceSettings = FileSourceSettings | FolderSourceSettings | MqttSourceSettings
Skipped = Literal["skipped"]
OTHER_NAMES: dict[Column, Column] = {"text_a": "prompt", "text_b": "response"}


@dataclass(frozen=True)
class Sample:
    id: str
    text: str | tuple[str, str]
    label: str | float | None  # a class's name or number, or the number that a regression is trained on
    split: Split
    where: str = ""  # file:line or topic, for people


@dataclass(frozen=True)
class Refusal:
    """A row that cannot become a sample, or (with an empty id) a file that cannot be read."""

    id: str
    reason: str  # short and from a small set, for counting
    detail: str  # where, what, and the cure


class RowError(ValueError):
    """What is wrong with one row: a reason for counting, and words with the cure."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


class RowReader:
    """Makes samples of the rows of one reading of one file (or of a topic); one object per pass, since it counts repeats."""

    def __init__(self, settings: AnySourceSettings, name: str, given: Given) -> None:
        self._settings = settings
        self._name = name
        self._given = given
        self._contents = CompactSet()
        self._repeats: dict[int, int] = {}  # only contents that came up more than once
        self._own_ids = CompactSet()

    def sample(self, fields: dict[str, Any], where: str, *, id_if_none: str | None = None) -> Sample | Refusal | Skipped:
        """The sample in `fields`; `where` (file:line) is for people. Rows that were taken before are skipped."""
        try:
            text, label, split, own_id = parse_fields(fields, self._settings)
            if own_id is not None:
                sample_id = _hash("id", own_id)
                self._check_unique(sample_id, own_id)
            else:
                content = json.dumps([text, fields.get(self._settings.columns.get("label", "label"))])
                sample_id = id_if_none or self._identity("sample", content)
        except RowError as error:
            raw = json.dumps(fields, sort_keys=True, default=str)
            return self.refusal(raw, error.reason, f"{where}: {error}", id_if_none=id_if_none)
        if not self._given.take(sample_id):
            return "skipped"
        return Sample(sample_id, text, label, split or self._split_of(sample_id), where)

    def refusal(self, raw: str, reason: str, detail: str, *, id_if_none: str | None = None) -> Refusal | Skipped:
        """Refuse the row `raw`, unless that was done when the source was read before."""
        refusal_id = id_if_none or self._identity("refused", raw)
        return Refusal(refusal_id, reason, detail) if self._given.take(refusal_id) else "skipped"

    def _check_unique(self, sample_id: str, own_id: str) -> None:
        if digest_of(sample_id) in self._own_ids:
            raise RowError("repeated id", f"the id {own_id!r:.80} stands on an earlier row too; give every row its own, or none")
        self._own_ids.add([digest_of(sample_id)])

    def _identity(self, kind: str, content: str) -> str:
        digest = digest_of(f"{kind}\0{content}")
        repeat = 0
        if digest in self._contents:
            repeat = self._repeats.get(digest, 0) + 1
            self._repeats[digest] = repeat
        else:
            self._contents.add([digest])
        return _hash(kind, self._name, content, str(repeat))

    def _split_of(self, sample_id: str) -> Split:
        if self._settings.split is not None:
            return self._settings.split
        place = int(_hash("split", sample_id)[:16], 16) / 2**64
        return "held-out" if place < self._settings.held_out_fraction else "train"


class Given:
    """What the spool has seen, and what a source has handed out that has not reached the spool yet."""

    def __init__(self, seen: Callable[[str], bool]) -> None:
        self._seen = seen
        self._handed_out = CompactSet()

    def take(self, sample_id: str) -> bool:
        """True the first time, and only if no earlier run took it."""
        digest = digest_of(sample_id)
        if digest in self._handed_out or self._seen(sample_id):
            return False
        self._handed_out.add([digest])
        return True


def parse_fields(
    fields: dict[str, Any], settings: AnySourceSettings,
) -> tuple[str | tuple[str, str], str | float | None, Split | None, str | None]:
    """Text, label, split and own id of a row; raises `RowError`."""

    def name_of(column: Column) -> str:
        """What the rows call it: as the settings say, or its own name, or in a row without text its other name."""
        other = OTHER_NAMES.get(column, column)
        named = settings.columns.get(column) or settings.columns.get(other)
        has_other = fields.get(column) is None and fields.get(other) is not None and fields.get("text") is None
        return named or (other if has_other else column)

    def value(column: Column) -> Any:
        return fields.get(name_of(column))

    def column_text(column: Column) -> str:
        name, found = name_of(column), value(column)
        if not isinstance(found, str):
            raise RowError("wrong field", f"{name} is {found!r:.80}, not text; write it in quotation marks")
        if not found.strip():
            raise RowError("no text", f"{name} is empty; give it text or delete the row")
        try:
            found.encode()
        except UnicodeEncodeError as error:
            raise RowError("wrong field", f"{name} holds half a surrogate pair; write the character itself, in UTF-8") from error
        return found

    single, pair = value("text") is not None, value("text_a") is not None or value("text_b") is not None
    if single and pair:
        raise RowError("wrong field", "it has both text and text_a/text_b (or prompt/response); give one text, or the pair")
    if not single and not pair:
        names = ", ".join(repr(name) for name in list(fields)[:8])
        raise RowError("no text", f"it has no field 'text' (nor 'text_a' and 'text_b', nor 'prompt' and 'response'), only {names or 'none'}; name the field in the source's columns")
    text = column_text("text") if single else (column_text("text_a"), column_text("text_b"))
    split = value("split")
    if split in ("", None):
        split = None
    elif split not in get_args(Split):
        raise RowError("wrong field", f"split is {split!r:.80}, not 'train' or 'held-out'")
    own_id = value("id")
    if own_id in ("", None):
        own_id = None
    elif isinstance(own_id, bool) or not isinstance(own_id, str | int):
        raise RowError("wrong field", f"id is {own_id!r:.80}, not text or a whole number")
    return text, _label(value("label"), settings), split, None if own_id is None else str(own_id)


def _label(label: Any, settings: AnySourceSettings) -> str | float | None:
    if label in ("", None) or not settings.send_labels:
        return None
    if isinstance(label, bool) or not isinstance(label, str | int | float):
        raise RowError("wrong field", f"label is {label!r:.80}, not a name or a number")
    if settings.labels is None or label in settings.labels:
        return label
    index = int(label) if _is_whole(label) else -1
    if not 0 <= index < len(settings.labels):
        raise RowError("unknown label", f"label {label!r:.80} is none of the {len(settings.labels)} labels that this source states")
    return settings.labels[index]


def label_index(label: str | float | None, labels: tuple[str, ...]) -> int | None:
    """The place of a sample's label in the plan's labels; None without a label.

    Raises:
        RowError: the plan has no such label.

    """
    if label is None:
        return None
    if label in labels:
        return labels.index(str(label))
    if _is_whole(label) and 0 <= int(label) < len(labels):
        return int(label)
    raise RowError("unknown label", f"label {label!r:.80} is not among the plan's {len(labels)} labels ({_some(labels)}); correct it, or add the label to the coordinator's task.labels")


def target_of(label: str | float | None) -> float | None:
    """The number that a regression is trained on; None without a label.

    Raises:
        RowError: it is no finite number.

    """
    from side_tuning.wire.frame import LARGEST_TARGET

    if label is None:
        return None
    try:
        target = float(label)
    except (ValueError, OverflowError):
        target = math.nan
    if not abs(target) <= LARGEST_TARGET:  # not a number neither
        raise RowError(
            "no number",
            f"label {label!r:.80} is no number from {-LARGEST_TARGET:g} to {LARGEST_TARGET:g}, and the tap plan's task is regression; "
            'write a number, or name the column that has it in the source\'s columns: columns = {label = "score"}',
        )
    return target


def _is_whole(label: str | float) -> bool:
    return isinstance(label, int) or (isinstance(label, str) and label.isascii() and label.isdigit() and len(label) < 10)


def _some(labels: tuple[str, ...]) -> str:
    return ", ".join(labels[:5]) + (" …" if len(labels) > 5 else "")


def _hash(*parts: str) -> str:
    """32 hexadecimal digits; half a surrogate pair in a broken row must not break the hash."""
    return blake2b("\0".join(parts).encode(errors="surrogatepass"), digest_size=16).hexdigest()
