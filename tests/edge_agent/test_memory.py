"""Memory that the agent gives back: nothing is lost by it, and what is not needed is not there."""

from __future__ import annotations

import mmap
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from edge_agent.backbone import Backbone
from edge_agent.memory import MappedFile, let_go_of_code
from side_tuning.backbone_manifest import WEIGHTS

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux gives pages back")

TEXTS = ["turn on the light", "what is the weather going to be like tomorrow afternoon in the city"]


def resident_bytes(path: Path) -> int:
    """Of the file, in this process."""
    total, ours = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if not line.split()[0].endswith(":"):
            ours = line.endswith(str(path.resolve()))
        elif ours and line.startswith("Rss:"):
            total += int(line.split()[1]) * 1024
    return total


def test_pages_let_go_come_back_as_they_were(tmp_path):
    content = np.random.default_rng(0).bytes(1 << 20)
    path = tmp_path / "file"
    path.write_bytes(content)
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        assert mapped[:] == content
        assert resident_bytes(path) == 1 << 20
        address = np.frombuffer(mapped, np.uint8).ctypes.data
        MappedFile(path, [address - 1]).let_go()
        assert resident_bytes(path) == 1 << 20  # not a place that is known to last
        MappedFile(path, [address]).let_go()
        assert resident_bytes(path) == 0
        assert mapped[:] == content


def test_what_was_written_to_is_kept(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(bytes(1 << 16))
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) as mapped:
        mapped[100] = 7
        MappedFile(path, [np.frombuffer(mapped, np.uint8).ctypes.data]).let_go()
        assert mapped[100] == 7


def test_after_a_pass_no_weights_are_resident_and_the_next_gives_the_same(minilm):
    backbone = Backbone.load(minilm)
    size = (minilm / WEIGHTS).stat().st_size
    first = backbone.hidden_states(TEXTS, [1, 2], 40).states
    assert resident_bytes(minilm / WEIGHTS) < size / 20
    let_go_of_code()
    backbone._weights._places = []  # as on a system that has no such thing
    second = backbone.hidden_states(TEXTS, [1, 2], 40).states
    assert resident_bytes(minilm / WEIGHTS) > size / 4
    assert all(torch.equal(first[layer], second[layer]) for layer in (1, 2))
