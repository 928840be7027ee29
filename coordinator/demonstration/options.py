"""The demonstration's command line."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from coordinator.demonstration.data import DataError, Partition
from side_tuning.wire.messages import Task

LEAST_SECONDS = 30.0
MOST_DEVICES = 64
PROMPT = "My lord,"


@dataclass(frozen=True)
class Options:
    data: Path | None
    devices: int
    partition: Partition | None  # none: by user where there are users and the task is causal-lm, else iid
    broker: str
    seconds: float
    json: Path | None
    seed: int
    state: Path | None
    compare: bool
    dashboard: int | None = None  # its port
    task: Task = "classification"
    prompt: str = PROMPT


def parse_options(arguments: Sequence[str]) -> Options:
    """Parse, or end the program with a message as argparse does."""
    parser = argparse.ArgumentParser(
        prog="scripts/demo",
        description="Devices with unlike backbones teach one side network through a real broker and a real database, "
        "on this machine, and get it back.",
    )
    parser.add_argument(
        "--data",
        type=Path,
        metavar="DIR",
        help='folder with train.jsonl[.gz] and test.jsonl[.gz]; rows have "text" or "text_a" and "text_b", "label", and '
        'perhaps "user"; class names may stand in meta.json as "classes". Default: spoken smart-home commands that ship with the package',
    )
    parser.add_argument(
        "--task", choices=("classification", "regression", "causal-lm"), default="classification",
        help="regression learns numbers, which every label of --data is then; causal-lm tunes small language models on the texts of --data, "
        "which need no labels; what one of them writes is shown with every checkpoint",
    )
    parser.add_argument("--prompt", default=PROMPT, metavar="TEXT", help="causal-lm: what it goes on with (default %(default)r)")
    parser.add_argument("--devices", type=_whole(1, MOST_DEVICES), default=4, metavar="N", help="devices; four kinds of backbone in turn (default 4)")
    parser.add_argument(
        "--partition",
        type=_partition,
        metavar="P",
        help="who gets which rows: iid (default), dirichlet:ALPHA (labels skewed; the smaller the more), or user. Test rows are "
        "dealt equally, under user with their users. causal-lm: user where the rows name users",
    )
    parser.add_argument("--broker", choices=("embedded", "mosquitto"), default="embedded", help="pure Python (default), or mosquitto")
    parser.add_argument(
        "--seconds", type=_seconds, default=180.0, metavar="S", help="about how long the fleet runs (default 180); measuring comes on top"
    )
    parser.add_argument("--json", type=_writable, metavar="FILE", help="write the closing figures to FILE")
    parser.add_argument("--seed", type=_whole(0, 2**31 - 1), default=0, metavar="N", help="of partition, data order and training (default 0)")
    parser.add_argument("--state", type=Path, metavar="DIR", help="keep databases, configuration and logs in a new folder under DIR")
    parser.add_argument(
        "--dashboard", type=_whole(1, 65_535), nargs="?", const=8080, metavar="PORT", help="show the fleet in the browser, too (port 8080)"
    )
    parser.add_argument("--no-compare", dest="compare", action="store_false", help="leave out the closing comparisons and measurements of speed")
    return Options(**vars(parser.parse_args(arguments)))


def _whole(low: int, high: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not text.isdecimal() or not low <= int(text) <= high:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {low} to {high}")
        return int(text)

    return parse


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not LEAST_SECONDS <= seconds <= 86_400:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds from {LEAST_SECONDS:.0f} to 86400")
    return seconds


def _partition(text: str) -> Partition:
    try:
        return Partition.parse(text)
    except DataError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _writable(text: str) -> Path:
    path = Path(text)
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} cannot be written: name a file in a folder that exists")
    return path
