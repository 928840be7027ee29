"""The clock that is not believed below what has certainly passed."""

from __future__ import annotations

import logging
import time
from pathlib import Path

import pytest

from edge_agent.trusted_clock import RELEASED_AT, SAVE_SECONDS, TrustedClock


class Clock:
    def __init__(self, at: float) -> None:
        self.at = at

    def __call__(self) -> float:
        return self.at


def test_a_right_clock_is_left_alone(tmp_path: Path):
    clock = TrustedClock(tmp_path)
    assert time.time() > RELEASED_AT, "the release lies in the past"
    assert clock.instead_of_system() is None
    assert clock.trouble == ""
    assert abs(clock.now() - time.time()) < 60


def test_1970_is_replaced_by_the_release_and_told_once(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    clock = TrustedClock(tmp_path, Clock(12.0))
    with caplog.at_level(logging.WARNING):
        assert [clock.instead_of_system() for _ in range(3)] == [RELEASED_AT] * 3
    assert [record.message for record in caplog.records] == [clock.trouble]
    assert "1970-01-01 00:00 UTC" in clock.trouble
    assert clock.now() == RELEASED_AT


def test_the_last_time_under_a_verified_connection_is_kept_over_a_power_cut(tmp_path: Path):
    system = Clock(RELEASED_AT + 10 * SAVE_SECONDS)
    TrustedClock(tmp_path, system).note()
    after = TrustedClock(tmp_path, Clock(0.0))
    assert after.instead_of_system() == system.at


def test_the_card_is_written_once_a_day_and_at_the_end(tmp_path: Path):
    system = Clock(RELEASED_AT + 10 * SAVE_SECONDS)
    clock = TrustedClock(tmp_path, system)
    clock.note()
    written = (tmp_path / "trusted-time").read_text()
    system.at += SAVE_SECONDS / 2
    clock.note()
    assert (tmp_path / "trusted-time").read_text() == written
    clock.note(at_once=True)
    assert float((tmp_path / "trusted-time").read_text()) == system.at


def test_what_the_coordinator_says_is_believed_within_reason(tmp_path: Path):
    clock = TrustedClock(tmp_path, Clock(0.0))
    clock.told(RELEASED_AT + 1000.0, no_later_than=RELEASED_AT + 5000.0)
    assert clock.passed == RELEASED_AT + 1000.0
    clock.told(4e9, no_later_than=RELEASED_AT + 5000.0)
    assert clock.passed == RELEASED_AT + 5000.0
    clock.told(1.0, no_later_than=RELEASED_AT + 5000.0)
    assert clock.passed == TrustedClock(tmp_path, Clock(0.0)).passed == RELEASED_AT + 5000.0


def test_a_clock_that_is_set_right_later_is_believed_again(tmp_path: Path):
    system = Clock(0.0)
    clock = TrustedClock(tmp_path, system)
    assert clock.instead_of_system() is not None
    system.at = RELEASED_AT + 1.0
    assert clock.instead_of_system() is None


@pytest.mark.parametrize("content", [b"", b"nonsense", b"\xff\xfe", b"-5", b"1" * 400])
def test_a_damaged_file_is_no_time(tmp_path: Path, content: bytes):
    (tmp_path / "trusted-time").write_bytes(content)
    clock = TrustedClock(tmp_path, Clock(0.0))
    assert RELEASED_AT <= clock.passed < 1e12


def test_a_folder_that_cannot_be_written_is_no_reason_to_fail(tmp_path: Path):
    (tmp_path / "state").write_text("a file")
    TrustedClock(tmp_path / "state", Clock(RELEASED_AT + 1e6)).note()
