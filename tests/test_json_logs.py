"""Logs as JSON: one object a line, whatever the message holds, from every program and its supervisor."""

import json
import logging
import os
import re
import signal
import subprocess
import sys

import pytest

from side_tuning.json_logs import JsonFormatter
from tests.brokers import free_port
from tests.coordinator.fleet import settings_file
from tests.waiting import wait_until

FIELDS = ["time", "level", "program", "logger", "message"]


def line_of(message, *arguments, exc_info=None):
    record = logging.LogRecord("coordinator.gateway", logging.WARNING, __file__, 1, message, arguments, exc_info)
    return JsonFormatter("gateway").format(record)


def test_a_line_holds_the_promised_fields():
    content = json.loads(line_of("%d frames of %s", 3, "kitchen"))
    assert list(content) == FIELDS
    assert (content["level"], content["program"], content["logger"]) == ("warning", "gateway", "coordinator.gateway")
    assert content["message"] == "3 frames of kitchen"
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", content["time"])


@pytest.mark.parametrize("message", ['two\nlines and a "quote"', "\x1b[31mred\x00", "Gerät №1 ü"])
def test_a_message_cannot_break_out_of_its_line(message):
    line = line_of("%s", message)
    assert "\n" not in line
    assert json.loads(line)["message"] == message


def test_an_exception_comes_with_its_traceback():
    try:
        os.stat("/no/such/file")
    except OSError:
        content = json.loads(line_of("it failed", exc_info=sys.exc_info()))
    assert content["exception"].startswith("Traceback")
    assert "no/such/file" in content["exception"]


def test_the_supervisor_and_its_programs_write_json_and_nothing_else(tmp_path):
    config = settings_file(tmp_path, free_port(), 'log_format = "json"')
    log = tmp_path / "log"
    with log.open("w") as file:
        process = subprocess.Popen([sys.executable, "-m", "coordinator.cli", "run", "--config", str(config)], stderr=file)
    try:
        wait_until(lambda: "cannot be reached" in log.read_text() and "waiting for" in log.read_text() and "http://" in log.read_text(), 120, "all programs log")
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    finally:
        process.kill()
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert {"run", "gateway", "train", "dashboards"} <= {line["program"] for line in lines}
    assert all(set(FIELDS) <= set(line) for line in lines)


def test_what_ends_a_program_is_json_too(tmp_path):
    config = settings_file(tmp_path, free_port(), 'log_format = "json"')
    command = [sys.executable, "-m", "coordinator.cli", "gateway", "--config", str(config)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=os.environ)
    assert done.returncode == 78
    assert "coordinator database upgrade" in json.loads(done.stderr.splitlines()[-1])["message"]
