"""First steps on the device: noted once, kept, dated once the clock is right, whatever the clock did before."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from edge_agent.doctor import check_first_steps
from edge_agent.first_steps import FILE, FirstSteps
from edge_agent.settings import AgentSettings

TRUE_START = 1_790_000_000.0  # when the board was switched on, in truth


@dataclass
class Board:
    """A board without a clock of its own: what it shows is `wrong_by` off until something sets it."""

    state: Path
    uptime: float = 0.0
    wrong_by: float = TRUE_START  # it shows seconds since the start of 1970
    booted_at: float = TRUE_START
    boots: int = 1
    steps: FirstSteps = field(init=False)

    def __post_init__(self) -> None:
        self.start()

    def now(self) -> float:
        return self.booted_at + self.uptime - self.wrong_by

    def start(self) -> None:
        """The agent begins (again)."""
        self.steps = FirstSteps(self.state, now=self.now, boot=f"boot-{self.boots}", uptime=lambda: self.uptime)

    def reboot(self, *, off_seconds: float, wrong_by: float) -> None:
        self.booted_at += self.uptime + off_seconds
        self.uptime, self.boots, self.wrong_by = 0.0, self.boots + 1, wrong_by
        self.start()


@pytest.fixture
def board(tmp_path: Path) -> Board:
    return Board(tmp_path)


def flashed(state: Path, applied: str | None = "boot-1 12.50", at: float = TRUE_START - 600) -> None:
    (state / "flashed.json").write_text(json.dumps({"device": "kitchen", "flashed_at": at, "files": {}}))
    if applied is not None:
        (state / "first-boot").write_text(applied + "\n")


def test_steps_of_1970_get_their_dates_once_the_clock_is_set(tmp_path: Path):
    flashed(tmp_path)
    board = Board(tmp_path, uptime=20)
    assert board.steps.note("network")
    board.steps.settle(clock_right=False)
    assert board.steps.times() == {"flashed": TRUE_START - 600, "booted": 0.0, "configured": 12.5, "network": 20.0}, "by the clock as it is"
    board.uptime, board.wrong_by = 50, 0.0  # a time server answered
    board.steps.note("clock")
    board.steps.settle(clock_right=True)
    right = {
        "flashed": TRUE_START - 600, "booted": TRUE_START, "configured": TRUE_START + 12.5, "network": TRUE_START + 20, "clock": TRUE_START + 50,
    }
    assert board.steps.times() == right
    board.reboot(off_seconds=100, wrong_by=TRUE_START)  # in 1970 again; what has a date keeps it
    assert board.steps.times() == right
    assert not board.steps.note("network"), "only the first time counts"
    assert board.steps.times() == right


def test_what_came_in_an_earlier_boot_without_a_clock_has_no_date(tmp_path: Path):
    """Raspberry Pi OS Bookworm applies its configuration in a boot of its own, before there is a network."""
    flashed(tmp_path)
    board = Board(tmp_path, uptime=15)
    board.steps.settle(clock_right=False)
    board.reboot(off_seconds=5, wrong_by=0.0)
    board.uptime = 30
    board.steps.note("network", "clock")
    board.steps.settle(clock_right=True)
    times = board.steps.times()
    assert times is not None
    assert times["booted"] is times["configured"] is None
    assert times["network"] == times["clock"] == TRUE_START + 15 + 5 + 30


def test_a_restart_of_the_agent_before_the_clock_is_set_loses_nothing(board: Board):
    board.uptime = 20
    board.steps.note("network")
    board.steps.settle(clock_right=False)
    board.uptime = 60
    board.start()
    board.wrong_by = 0.0
    board.steps.settle(clock_right=True)
    assert board.steps.times() == {"network": TRUE_START + 20}


def test_a_clock_that_was_believed_and_then_set_again_moves_the_dates(board: Board):
    board.uptime, board.wrong_by = 20, 30 * 86_400.0
    board.steps.note("network")
    board.steps.settle(clock_right=True)
    board.wrong_by = 0.0
    board.steps.settle(clock_right=True)
    assert json.loads((board.state / FILE).read_text())["steps"]["network"] == ["boot-1", 20, TRUE_START + 20]


def test_a_board_that_was_not_flashed_has_no_boot_in_its_first_steps(board: Board):
    board.uptime = 40 * 86_400
    board.steps.note("network")
    assert set(board.steps.times() or ()) == {"network"}


def test_a_device_that_was_in_use_before_tells_nothing(tmp_path: Path):
    """Or an update would show a device of last year as one that stored its first sample today."""
    (tmp_path / "spool.db").touch()
    board = Board(tmp_path)
    assert not board.steps.note("network", "stored")
    board.steps.settle(clock_right=True)
    assert board.steps.times() is None
    assert board.steps.news("a") is None
    assert not (tmp_path / FILE).exists()


def test_a_spool_made_after_the_first_start_is_no_device_in_use(board: Board):
    board.steps.settle(clock_right=False)  # what the agent does before it opens its spool
    (board.state / "spool.db").touch()
    board.start()
    assert board.steps.note("network")


def test_a_report_says_them_once_for_each_connection_and_each_change(board: Board):
    board.wrong_by = 0.0
    board.steps.note("network")
    assert board.steps.news("a") == {"network": TRUE_START}
    assert board.steps.news("a") is None
    board.steps.note("backbone")
    assert set(board.steps.news("a") or ()) == {"network", "backbone"}
    board.steps.settle(clock_right=True)
    assert board.steps.news("a") is not None, "they have dates now"
    assert board.steps.news("a") is None
    assert board.steps.news("b") is not None


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"steps": 7}', '{"steps": {"network": [1]}}', '{"steps": {"network": ["b", "x", null]}}', "x" * 70_000])
def test_a_damaged_file_is_begun_anew_on_a_new_device_and_left_on_one_in_use(tmp_path: Path, damage: str):
    (tmp_path / FILE).write_text(damage)
    board = Board(tmp_path)
    assert board.steps.note("network")
    board.steps.settle(clock_right=False)
    assert json.loads((tmp_path / FILE).read_text())["steps"] == {"network": ["boot-1", 0.0, None]}
    (tmp_path / FILE).write_text(damage)
    (tmp_path / "spool.db").touch()
    board.start()
    assert board.steps.times() is None


@pytest.mark.parametrize("text", ["", "boot-1", "boot-1 soon", "boot-1 1 2"])
def test_a_damaged_record_of_the_first_boot_is_left_out(tmp_path: Path, text: str):
    flashed(tmp_path, applied=text)
    assert set(Board(tmp_path).steps.times() or ()) == {"flashed", "booted"}


@pytest.mark.parametrize("text", ["", "{}", '{"flashed_at": "today"}', '{"flashed_at": -1}', '{"flashed_at": 1e300}', '{"flashed_at": null}'])
def test_a_damaged_manifest_is_left_out(tmp_path: Path, text: str):
    (tmp_path / "flashed.json").write_text(text)
    assert Board(tmp_path).steps.times() == {}


def test_a_folder_that_cannot_be_written_ends_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    (tmp_path / "file").touch()
    steps = FirstSteps(tmp_path / "file" / "state")
    steps.note("network")
    steps.settle(clock_right=True)
    steps.settle(clock_right=True)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert steps.news("a") is not None


def test_the_doctor_says_how_far_the_first_boot_came_and_what_is_overdue(tmp_path: Path):
    settings = AgentSettings(device="kitchen", state_directory=tmp_path, broker={"host": "127.0.0.1", "tls": False}, backbone={"folder": tmp_path})
    flashed(tmp_path)
    now = time.time()
    board = Board(tmp_path, uptime=60, wrong_by=0.0, booted_at=now - 60)
    board.steps.settle(clock_right=True)

    def looked(later: float) -> list[tuple[str, str]]:
        return [(finding.level, finding.detail) for finding in check_first_steps(settings, now + later)]

    assert looked(0) == [("ok", "card flashed, booted, configuration applied")]
    assert looked(300) == [("warning", "“broker reached” did not come within 5 minutes after “booted”")]
    board.steps.note("network")
    board.steps.settle(clock_right=True)
    assert looked(300)[0][0] == "ok"
    assert [words.split("”")[0] for _, words in looked(700)] == ["“clock right"]


def test_the_doctor_says_nothing_where_nothing_is_known(tmp_path: Path):
    settings = AgentSettings(device="kitchen", state_directory=tmp_path, broker={"host": "127.0.0.1", "tls": False}, backbone={"folder": tmp_path})
    assert list(check_first_steps(settings, time.time())) == []
