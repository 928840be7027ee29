"""Loads a labelled data set and deals it out to devices: equally, with skewed labels, or by user.

Rule: test rows go to the devices equally at random under `iid` and `dirichlet` alike, so every device is measured on
every class, whatever it was given to learn from. Under `user` a device is measured on its own users' rows.
"""

from __future__ import annotations

import gzip
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from coordinator.demonstration import corpus
from side_tuning.wire.messages import Task

Text = str | tuple[str, str]

# Public texts that run through every backbone; more than 500 brought nothing (docs/lab-notes.md).
MOST_ANCHORS = 500
ANCHOR_SHARE = 0.1

# A device with less than this has nothing to measure or to teach; Dirichlet draws are repeated until all have it.
MIN_ROWS_PER_DEVICE = 10
_DRAWS = 1_000
_FORM = '{"text": "...", "label": 3} (or "text_a" and "text_b"; the label may be a name; "user" is optional)'


class DataError(ValueError):
    """A data set that cannot be used; the text names the file, the line and the cure."""


@dataclass(frozen=True)
class Row:
    text: Text
    label: str | float  # of a regression the number; empty: there is none
    user: str | None = None

    def as_json(self, split: str) -> str:
        texts = {"text": self.text} if isinstance(self.text, str) else {"text_a": self.text[0], "text_b": self.text[1]}
        return json.dumps({**texts, **({} if self.label == "" else {"label": self.label}), "split": split}, ensure_ascii=False)


@dataclass(frozen=True)
class Dataset:
    name: str
    labels: tuple[str, ...]
    train: tuple[Row, ...]
    test: tuple[Row, ...]


@dataclass(frozen=True)
class Share:
    """What one device gets: rows to learn from and rows to be measured on."""

    train: tuple[Row, ...]
    test: tuple[Row, ...]


@dataclass(frozen=True)
class Partition:
    kind: Literal["iid", "dirichlet", "user"]
    alpha: float = 0.0

    @classmethod
    def parse(cls, text: str) -> Partition:
        """`iid`, `user` or `dirichlet:ALPHA`."""
        kind, _, value = text.partition(":")
        if kind == "dirichlet":
            try:
                alpha = float(value)
            except ValueError:
                alpha = 0.0
            if 0.0 < alpha <= 1e6:
                return cls("dirichlet", alpha)
        elif kind in ("iid", "user") and not value:
            return cls("iid" if kind == "iid" else "user")
        raise DataError(f"partition {text!r} is not known: use iid, user, or dirichlet:ALPHA such as dirichlet:0.1")


def load_dataset(folder: Path | None = None, task: Task = "classification") -> Dataset:
    """The data set in `folder`, or the shipped home commands; with numbers for labels where the task is regression."""
    if folder is None and task == "regression":
        raise DataError("the shipped home commands have classes, no numbers: give --data DIR; coordinator.demonstration.overlap_rows makes one of sentence pairs")
    if folder is None:
        raw = {"train": _read(corpus.TRAIN_FILE), "test": _read(corpus.TEST_FILE)}
        name = "home commands"
        classes: list[str] | None = list(corpus.INTENTS)
    else:
        if not folder.is_dir():
            raise DataError(f"{folder} is not a folder: give one that holds train.jsonl[.gz] and test.jsonl[.gz]")
        raw = {part: _read(_find(folder, part)) for part in ("train", "test")}
        name, classes = folder.resolve().name, _classes(folder)
    if task == "regression":
        return Dataset(name, (), *(tuple(Row(text, _number(label, name), user) for text, user, label in raw[part]) for part in ("train", "test")))
    labels, names = _labels([label for rows in raw.values() for *_, label in rows], classes, name)
    train, test = (
        tuple(Row(text, names[label], user) for text, user, label in raw[part]) for part in ("train", "test")
    )
    return Dataset(name, labels, train, test)


def _number(label: str | float, name: str) -> float:
    try:
        number = float(label)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise DataError(f"{name}: label {label!r:.80} is no number; a regression needs one in every row, or leave out --task regression")
    return number


def _find(folder: Path, part: str) -> Path:
    for suffix in (".jsonl.gz", ".jsonl"):
        if (path := folder / f"{part}{suffix}").is_file():
            return path
    raise DataError(f"{folder} holds neither {part}.jsonl nor {part}.jsonl.gz; rows look like {_FORM}")


def _classes(folder: Path) -> list[str] | None:
    path = folder / "meta.json"
    if not path.is_file():
        return None
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path} is not JSON: {error}; correct it or remove it") from error
    classes = meta.get("classes") if isinstance(meta, dict) else None
    # Some sets say in words that they have none.
    return [str(entry) for entry in classes] if isinstance(classes, list) else None


def _read(path: Path) -> list[tuple[Text, str | None, str | float]]:
    opened: Any = gzip.open if path.suffix == ".gz" else open
    rows: list[tuple[Text, str | None, str | float]] = []
    number = 0
    try:
        with opened(path, "rt", encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    rows.append(_row(json.loads(line), path, number))
    except json.JSONDecodeError as error:
        raise DataError(f"{path}, line {number}: not JSON ({error.msg}); a row looks like {_FORM}") from error
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read after line {number}: {error}") from error
    if not rows:
        raise DataError(f"{path} holds no rows; a row looks like {_FORM}")
    return rows


def _row(row: Any, path: Path, number: int) -> tuple[Text, str | None, str | float]:
    where = f"{path}, line {number}"
    if not isinstance(row, dict):
        raise DataError(f"{where}: a row must be an object, {_FORM}")
    text: Any = row.get("text")
    if text is None:
        text = (row.get("text_a"), row.get("text_b"))
    parts = (text,) if not isinstance(text, tuple) else text
    if not all(isinstance(part, str) and part.strip() for part in parts):
        raise DataError(f"{where}: no text; a row looks like {_FORM}")
    label = row.get("label")
    if isinstance(label, bool) or not isinstance(label, int | float | str):
        raise DataError(f"{where}: label is {label!r}; the demonstration needs a class for every row, or with --task regression a number, {_FORM}")
    user = row.get("user")
    return text, None if user is None else str(user), label


def _labels(
    used: Sequence[str | float], classes: list[str] | None, name: str
) -> tuple[tuple[str, ...], dict[str | float, str]]:
    """The class names in order, and what each label found in the rows is called."""
    found = set(used)
    if fractions := [label for label in found if isinstance(label, float)]:
        raise DataError(f"{name}: label {fractions[0]} is no class; --task regression learns numbers")
    numbers = sorted(label for label in found if isinstance(label, int))
    if numbers and len(numbers) != len(found):
        raise DataError(f"{name}: some labels are numbers and some are names; use one or the other throughout")
    if classes is not None and len(set(classes)) != len(classes):
        raise DataError(f"{name}: classes in meta.json repeat; name each class once")
    if classes is None:
        ordered: list[str | float] = [*numbers] if numbers else sorted(found, key=str)
        names = {label: str(label) for label in ordered}
        return tuple(names.values()), names
    if numbers:
        if numbers[0] < 0 or numbers[-1] >= len(classes):
            raise DataError(f"{name}: labels reach from {numbers[0]} to {numbers[-1]}, meta.json names {len(classes)} classes")
        return tuple(classes), {label: classes[label] for label in numbers}
    unknown = sorted(str(label) for label in found - set(classes))
    if unknown:
        raise DataError(f"{name}: label {unknown[0]!r} is not among the classes of meta.json; add it there")
    return tuple(classes), {label: str(label) for label in found}


def set_anchors_aside(dataset: Dataset, seed: int) -> tuple[Dataset, list[Text]]:
    """Take a few texts out of the train rows, without their labels: they are public, no device holds them."""
    count = min(MOST_ANCHORS, int(ANCHOR_SHARE * len(dataset.train)))
    chosen = set(np.random.default_rng((seed, count)).choice(len(dataset.train), count, replace=False).tolist())
    rest = tuple(row for index, row in enumerate(dataset.train) if index not in chosen)
    return replace(dataset, train=rest), [dataset.train[index].text for index in sorted(chosen)]


def write_anchors(texts: Sequence[Text], path: Path) -> None:
    """As `training.anchors_file` reads them."""
    rows = [{"text": text} if isinstance(text, str) else {"text_a": text[0], "text_b": text[1]} for text in texts]
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def deal(dataset: Dataset, partition: Partition, devices: int, seed: int) -> list[Share]:
    """One share per device; every row goes to exactly one device. The same seed deals the same shares."""
    if devices < 1:
        raise DataError(f"{devices} devices: at least one is needed")
    if partition.kind == "dirichlet" and not dataset.labels:
        raise DataError(f"{dataset.name} has no labels that could be skewed: use --partition user or iid")
    random = np.random.default_rng(seed)
    if partition.kind == "user":
        train, test = _by_user(dataset, devices, random)
    else:
        test = _equally(len(dataset.test), devices, random)
        if partition.kind == "iid":
            train = _equally(len(dataset.train), devices, random)
        else:
            train = _by_label(dataset, partition.alpha, devices, random)
    for kind, parts in (("train", train), ("test", test)):
        smallest = min(len(part) for part in parts)
        if smallest < (MIN_ROWS_PER_DEVICE if kind == "train" else 1):
            raise DataError(f"a device would get only {smallest} {kind} rows of {dataset.name}; use fewer than {devices} devices")
    return [
        Share(tuple(dataset.train[i] for i in mine), tuple(dataset.test[i] for i in measured))
        for mine, measured in zip(train, test, strict=True)
    ]


def _equally(rows: int, devices: int, random: np.random.Generator) -> list[list[int]]:
    return [part.tolist() for part in np.array_split(random.permutation(rows), devices)]


def _by_label(dataset: Dataset, alpha: float, devices: int, random: np.random.Generator) -> list[list[int]]:
    """Each class is split over the devices in proportions drawn from Dirichlet(alpha)."""
    by_label: dict[str | float, list[int]] = {label: [] for label in dataset.labels}
    for index, row in enumerate(dataset.train):
        by_label[row.label].append(index)
    for _ in range(_DRAWS):
        parts: list[list[int]] = [[] for _ in range(devices)]
        for members in by_label.values():
            shares = random.dirichlet([alpha] * devices)
            cuts = (np.cumsum(shares)[:-1] * len(members)).round().astype(int)
            for part, piece in zip(parts, np.split(random.permutation(members), cuts), strict=True):
                part.extend(int(index) for index in piece)
        if min(map(len, parts)) >= MIN_ROWS_PER_DEVICE:
            return [random.permutation(part).tolist() for part in parts]
    raise DataError(
        f"no Dirichlet({alpha}) draw in {_DRAWS} gave all {devices} devices {MIN_ROWS_PER_DEVICE} of the "
        f"{len(dataset.train)} rows; use a larger alpha or fewer devices"
    )


def _by_user(
    dataset: Dataset, devices: int, random: np.random.Generator
) -> tuple[list[list[int]], list[list[int]]]:
    """Whole users go to devices, the largest first, each to the device with the fewest rows so far."""
    rows: dict[str, int] = {}
    for row in dataset.train:
        if row.user is None:
            raise DataError(f"{dataset.name} has rows without a user; use --partition iid or dirichlet:ALPHA")
        rows[row.user] = rows.get(row.user, 0) + 1
    if len(rows) < devices:
        raise DataError(f"{dataset.name} has {len(rows)} users for {devices} devices; use at most {len(rows)} devices")
    order = [sorted(rows)[i] for i in random.permutation(len(rows))]
    load = [0] * devices
    owner: dict[str, int] = {}
    for user in sorted(order, key=lambda user: -rows[user]):
        owner[user] = load.index(min(load))
        load[owner[user]] += rows[user]
    train: list[list[int]] = [[] for _ in range(devices)]
    test: list[list[int]] = [[] for _ in range(devices)]
    for parts, members in ((train, dataset.train), (test, dataset.test)):
        for index in random.permutation(len(members)):
            user = members[index].user
            # A user that only the test rows know goes anywhere.
            parts[owner[user] if user in owner else int(random.integers(devices))].append(int(index))
    return train, test


def write_share(share: Share, folder: Path, random: np.random.Generator) -> tuple[Path, Path]:
    """Write what the device's source reads (both splits, in the order they come up) and its test rows alone.

    The test rows come up within the first quarter, so that a run cut short has still measured every one of them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    train = [row.as_json("train") for row in share.train]
    early = train[: len(train) // 4] + [row.as_json("held-out") for row in share.test]
    lines = [early[i] for i in random.permutation(len(early))] + train[len(train) // 4 :]
    samples, held_out = folder / "samples.jsonl", folder / "held-out.jsonl"
    samples.write_text("\n".join(lines) + "\n", encoding="utf-8")
    held_out.write_text("".join(row.as_json("held-out") + "\n" for row in share.test), encoding="utf-8")
    return samples, held_out


def held_out_among(samples: Path, rows_read: int, out: Path) -> int:
    """Write the held-out rows among the first `rows_read` of `samples` to `out`; returns how many."""
    with samples.open(encoding="utf-8") as lines:
        read = [line for line, _ in zip(lines, range(rows_read), strict=False)]
    kept = [line for line in read if json.loads(line)["split"] == "held-out"]
    out.write_text("".join(kept), encoding="utf-8")
    return len(kept)
