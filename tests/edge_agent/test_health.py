"""Readings of the machine: right where it offers them, None where it does not, never an exception."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from edge_agent import health
from edge_agent.health import read_readings
from side_tuning.wire.messages import Health


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_this_machine_gives_what_every_linux_has(tmp_path: Path) -> None:
    readings = read_readings(tmp_path)
    assert readings.peak_rss_bytes is not None
    assert 5_000_000 < readings.peak_rss_bytes < 2**40
    assert readings.disk_free_bytes is not None
    assert readings.disk_free_bytes > 0
    assert readings.memory_available_bytes is not None
    assert readings.load_1m is not None
    assert Health.from_bytes(readings.to_bytes()) == readings


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere there is only getrusage")
def test_the_peak_is_this_programs_and_not_that_of_the_one_which_started_it() -> None:
    ballast = bytearray(300_000_000)
    program = "from edge_agent.health import peak_rss_bytes; print(peak_rss_bytes())"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert int(done.stdout) < len(ballast) / 2


def test_an_empty_machine_gives_none(tmp_path: Path) -> None:
    readings = read_readings(tmp_path / "not" / "made" / "yet", tmp_path)
    assert readings.temperature_celsius is None
    assert readings.throttled is None
    assert readings.memory_available_bytes is None
    assert readings.disk_free_bytes is not None


def test_the_hottest_believable_zone_counts(tmp_path: Path) -> None:
    for zone, text in enumerate(["42000\n", "61234\n", "-40000", "126000", "0", "garbage", ""]):
        write(tmp_path / f"sys/class/thermal/thermal_zone{zone}/temp", text)
    assert health.temperature_celsius(tmp_path) == pytest.approx(61.234)


@pytest.mark.parametrize(("text", "expected"), [("0\n", False), ("50005", True), ("50000", False), ("8", True), ("", None), ("?", None)])
def test_throttling_means_now_and_not_once(tmp_path: Path, text: str, expected: bool | None) -> None:
    write(tmp_path / "sys/devices/platform/soc/soc:firmware/get_throttled", text)
    assert health.throttled(tmp_path) is expected


@pytest.mark.parametrize(("script", "expected"), [
    ("echo throttled=0x50005", True), ("echo throttled=0x0", False), ("echo VCHI initialization failed; exit 255", None), ("echo nonsense", None),
])
def test_vcgencmd_is_asked_where_there_is_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, expected: bool | None) -> None:
    program = tmp_path / "vcgencmd"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    if Path("/sys/devices/platform/soc/soc:firmware/get_throttled").exists():
        pytest.skip("this is a Raspberry Pi: its file goes first")
    assert health.throttled() is expected


def test_memory_is_read_as_the_kernel_states_it(tmp_path: Path) -> None:
    write(tmp_path / "proc/meminfo", "MemTotal: 1000 kB\nMemAvailable:     512 kB\n")
    assert health.memory_available_bytes(tmp_path) == 512 * 1024
    write(tmp_path / "proc/meminfo", "MemAvailable:\n")
    assert health.memory_available_bytes(tmp_path) is None
