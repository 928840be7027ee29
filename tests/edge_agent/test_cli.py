"""The command line as people and systemd meet it: real processes, exit codes, messages."""

from __future__ import annotations

import configparser
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_agent.checkpoint_store import CheckpointStore
from tests.brokers import free_port, mosquitto, needs_mosquitto
from tests.edge_agent.artifacts import LABELS, Checkpoint
from tests.waiting import wait_until

UNIT = Path(__file__).parents[2] / "edge_agent" / "systemd" / "mobillm-edge-agent.service"


def edge_agent(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("MOBILLM_")}
    return subprocess.run(
        [sys.executable, "-m", "edge_agent.cli", *arguments], capture_output=True, text=True, timeout=120,
        env={**clean, "COLUMNS": "200", "NO_COLOR": "1", **environment},
    )


def write_config(folder: Path, backbone: Path, **values: Any) -> Path:
    port = values.get("port") or free_port()
    config = folder / "agent.toml"
    config.write_text(
        f'device = "kitchen"\nstate_directory = "state"\n'
        f'[broker]\nhost = "127.0.0.1"\nport = {port}\ntls = false\n'
        f'[backbone]\nfolder = "{backbone}"\n{values.get("more", "")}'
    )
    return config


def install_checkpoint(state: Path, checkpoint: Checkpoint) -> None:
    store = CheckpointStore(state)
    staged = store.stage(checkpoint.signed, checkpoint.manifest, checkpoint.files["ladder"], checkpoint.files["alignment"])
    store.activate(staged, checkpoint.manifest.generation)


IMPORTS = """
import sys
import {module}
from typer.testing import CliRunner
if {help}:
    from edge_agent.cli import app
    result = CliRunner().invoke(app, ["--help"])
    assert result.exit_code == 0, result.output
print([name for name in ("torch", "transformers", "numpy", "pydantic", "paho", "sqlalchemy", "rich.live") if name in sys.modules])
"""


def test_help_starts_without_anything_heavy() -> None:
    program = IMPORTS.format(module="edge_agent.cli", help=True)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("module", ["settings", "spool", "samples", "sample_topic", "health", "doctor", "config_check"])
def test_no_part_of_the_agent_loads_torch_by_being_imported(module: str) -> None:
    program = IMPORTS.format(module=f"edge_agent.{module}", help=False)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert not {"torch", "transformers", "sqlalchemy"} & set(json.loads(done.stdout.replace("'", '"')))


def test_version_and_help() -> None:
    assert edge_agent("version").stdout.strip()[0].isdigit()
    assert "check-config" in edge_agent("--help").stdout


@pytest.mark.parametrize("command", [["run"], ["doctor"], ["check-config"], ["infer", "hello"]])
def test_wrong_settings_end_with_78_and_one_message(tmp_path: Path, command: list[str]) -> None:
    config = tmp_path / "agent.toml"
    config.write_text('device = "a b"\n[broker]\nhost = "x"\n[spool]\nmax_bytes = 1\n')
    done = edge_agent(*command, "--config", str(config))
    assert done.returncode == 78
    assert done.stderr.startswith(f"edge-agent: the configuration file {config} cannot be used:")
    assert "device: device name 'a b'" in done.stderr
    assert "spool.max_bytes: 1" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_missing_backbone_ends_a_run_with_78(tmp_path: Path) -> None:
    done = edge_agent("run", "--config", str(write_config(tmp_path, tmp_path / "none")))
    assert done.returncode == 78
    assert "coordinator backbone prepare" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_spool_in_use_ends_with_1_so_that_it_is_tried_again(tmp_path: Path, minilm: Path) -> None:
    from edge_agent.spool import Spool

    config = write_config(tmp_path, minilm)
    with Spool.open(tmp_path / "state" / "spool.db", max_bytes=10**6, policy="pause", clock=lambda: 0.0):
        done = edge_agent("run", "--config", str(config))
    assert done.returncode == 1
    assert "in use by another edge-agent" in done.stderr
    assert "Traceback" not in done.stderr


def test_sigterm_ends_a_run_cleanly(tmp_path: Path, minilm: Path) -> None:
    config = write_config(tmp_path, minilm)
    agent = subprocess.Popen(
        [sys.executable, "-m", "edge_agent.cli", "run", "--config", str(config)], stderr=subprocess.PIPE, text=True,
    )
    assert agent.stderr is not None
    line = agent.stderr.readline()  # it is up once it logs, in this case that there is no broker
    agent.send_signal(signal.SIGTERM)
    rest = agent.stderr.read()
    assert agent.wait(60) == 0, line + rest
    assert "Traceback" not in line + rest


def test_a_running_agent_counts_as_alive_until_it_ends_and_logs_json_if_asked(tmp_path: Path, minilm: Path) -> None:
    config = write_config(tmp_path, minilm)
    assert edge_agent("alive", "--config", str(config)).returncode == 1
    agent = subprocess.Popen(
        [sys.executable, "-m", "edge_agent.cli", "run", "--config", str(config)],
        stderr=subprocess.PIPE, text=True, env={**os.environ, "MOBILLM_LOG_FORMAT": "json"},
    )
    assert agent.stderr is not None
    line = json.loads(agent.stderr.readline())
    assert (line["program"], line["logger"]) == ("edge-agent", "side_tuning.broker_connection")
    wait_until((tmp_path / "state" / "alive").exists, 60, "it says that it is alive")
    alive = edge_agent("alive", "--config", str(config))
    assert (alive.returncode, alive.stdout) == (0, "edge-agent: alive\n")
    agent.send_signal(signal.SIGTERM)
    rest = agent.stderr.read()
    assert agent.wait(60) == 0, rest
    assert all(json.loads(one) for one in rest.splitlines())
    gone = edge_agent("alive", "--config", str(config))
    assert (gone.returncode, "does not exist" in gone.stdout) == (1, True)


def test_check_config_shows_what_is_in_effect_and_no_secret(tmp_path: Path, minilm: Path) -> None:
    (tmp_path / "password").write_text("correct horse\n")
    more = '[[sources]]\nkind = "file"\npath = "rows.jsonl"\nlabels = ["a", "b"]\n'
    config = write_config(tmp_path, minilm, more=more)
    config.write_text(config.read_text().replace("tls = false", 'tls = false\nusername = "kitchen"\npassword_file = "password"'))
    done = edge_agent("check-config", "--config", str(config), MOBILLM_LOG_LEVEL="debug")
    assert done.returncode == 0, done.stderr
    assert 'device = "kitchen"' in done.stdout
    assert 'log_level = "debug"' in done.stdout
    assert f'sources[0].path = "{tmp_path}/rows.jsonl"' in done.stdout
    assert f'broker.password_file = "{tmp_path}/password"' in done.stdout
    assert "correct horse" not in done.stdout + done.stderr
    (tmp_path / "password").unlink()
    done = edge_agent("check-config", "--config", str(config))
    assert done.returncode == 78
    assert "problem: password_file" in done.stderr


def test_secrets_by_name_are_masked() -> None:
    from edge_agent.config_check import _lines

    shown = list(_lines("", {"broker": {"password": "pw", "password_file": "/p", "api_token": "t"}, "private_key": "k"}))
    assert shown == ["broker.password = ********", 'broker.password_file = "/p"', "broker.api_token = ********", "private_key = ********"]


# infer


def test_infer_before_the_first_checkpoint_says_so(tmp_path: Path, minilm: Path) -> None:
    done = edge_agent("infer", "turn on the light", "--config", str(write_config(tmp_path, minilm)))
    assert done.returncode == 1
    assert "no checkpoint" in done.stderr


def test_infer_labels_a_text_and_a_file(tmp_path: Path, minilm: Path, signing_key: Any) -> None:
    config = write_config(tmp_path, minilm)
    install_checkpoint(tmp_path / "state", Checkpoint(minilm, signing_key, 3))
    done = edge_agent("infer", "turn on the light", "--json", "--config", str(config))
    assert done.returncode == 0, done.stderr
    one = json.loads(done.stdout)
    assert one["label"] in LABELS
    assert one["checkpoint"] == 3
    assert one["label"] in edge_agent("infer", "turn on the light", "--config", str(config)).stdout

    rows = [{"text": f"sentence number {n}", "label": LABELS[n % 3]} for n in range(90)]
    texts = tmp_path / "test.jsonl"
    bad = ['{"text": ""}', "not json", '{"text": "x", "label": "unheard of"}', '{"text": "no label"}']
    texts.write_text("\n".join([*(json.dumps(row) for row in rows), *bad]))
    done = edge_agent("infer", "--file", str(texts), "--json", "--predictions", "--config", str(config))
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert (report["samples"], report["labelled"], report["refused"], report["checkpoint"]) == (91, 90, 3, 3)
    right = sum(p["label"] == p["expected"] for p in report["predictions"])
    assert report["correct"] == right
    assert report["score"] == pytest.approx(right / 90)
    assert report["peak_rss_mb"] > 50
    assert f"{texts}:91" in done.stderr
    assert "unheard of" in done.stderr
    assert "91 samples" in edge_agent("infer", "--file", str(texts), "--config", str(config)).stdout


def test_infer_estimates_a_number_and_scores_a_file_by_correlation(tmp_path: Path, minilm: Path, signing_key: Any) -> None:
    config = write_config(tmp_path, minilm)
    install_checkpoint(tmp_path / "state", Checkpoint(minilm, signing_key, 3, labels=(), task="regression"))
    one = json.loads(edge_agent("infer", "turn on the light", "--json", "--config", str(config)).stdout)
    assert set(one) == {"value", "checkpoint"}
    rows = [{"text": f"sentence number {n}", "label": n / 10} for n in range(40)]
    texts = tmp_path / "test.jsonl"
    texts.write_text("\n".join([*(json.dumps(row) for row in rows), '{"text": "x", "label": "high"}', '{"text": "no number"}']))
    done = edge_agent("infer", "--file", str(texts), "--json", "--predictions", "--config", str(config))
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert (report["samples"], report["labelled"], report["refused"], report["metric"]) == (41, 40, 1, "correlation")
    known = [(p["value"], p["expected"]) for p in report["predictions"] if p["expected"] is not None]
    assert report["score"] == pytest.approx(np.corrcoef(*zip(*known, strict=True))[0, 1])
    assert report["mean_squared_error"] == pytest.approx(np.mean([(value - wanted) ** 2 for value, wanted in known]))
    assert "correlation" in edge_agent("infer", "--file", str(texts), "--config", str(config)).stdout


def test_infer_wants_one_thing(tmp_path: Path, minilm: Path) -> None:
    config = str(write_config(tmp_path, minilm))
    assert edge_agent("infer", "--config", config).returncode == 2
    missing = edge_agent("infer", "--file", str(tmp_path / "none.jsonl"), "--config", config)
    assert missing.returncode == 1
    assert edge_agent("infer", "--file", str(tmp_path / "a.txt"), "--config", config).returncode == 78


# doctor


@needs_mosquitto
@pytest.mark.broker
def test_doctor_finds_a_healthy_device_healthy(tmp_path: Path, minilm: Path) -> None:
    with mosquitto(tmp_path / "broker") as broker:
        (tmp_path / "rows.jsonl").write_text('{"text": "x"}\n')
        config = write_config(tmp_path, minilm, port=broker.port, more='[[sources]]\nkind = "file"\npath = "rows.jsonl"\n[spool]\nmax_bytes = 1000000\n')
        done = edge_agent("doctor", "--json", "--config", str(config))
        assert done.returncode == 0, done.stdout
        findings = {f["check"]: f for f in json.loads(done.stdout)}
        assert {"clock", "memory", "disk", "spool", "sources", "backbone", "broker", "plan"} <= set(findings)
        assert "round trip" in findings["broker"]["detail"]
        assert " ms" in findings["backbone"]["detail"]
        assert findings["plan"]["level"] == "warning"
        table = edge_agent("doctor", "--config", str(config))
        assert "round trip" in table.stdout
        assert "start the coordinator" in table.stdout


def test_doctor_says_what_is_wrong_and_the_cure(tmp_path: Path, minilm: Path) -> None:
    broken = tmp_path / "backbone"
    shutil.copytree(minilm, broken)
    (broken / "config.json").write_text("{}")
    more = '[[sources]]\nkind = "file"\npath = "none.jsonl"\n'
    done = edge_agent("doctor", "--json", "--config", str(write_config(tmp_path, broken, more=more)))
    assert done.returncode == 1
    failed = {f["check"]: f for f in json.loads(done.stdout) if f["level"] == "failed"}
    assert set(failed) == {"sources", "backbone", "broker"}
    assert all(f["cure"] for f in failed.values())
    assert "is it running" in failed["broker"]["detail"]
    assert "hash" in failed["backbone"]["detail"]
    assert "none.jsonl" in failed["sources"]["detail"]


# systemd


def test_the_unit_keeps_its_promises() -> None:
    unit = configparser.RawConfigParser(strict=False)
    unit.optionxform = str  # type: ignore[assignment,method-assign]
    unit.read(UNIT)
    service = unit["Service"]
    wanted = {
        "Type": "notify", "Restart": "always", "RestartPreventExitStatus": "0 78", "User": "mobillm-fleet", "ProtectSystem": "strict",
        "NoNewPrivileges": "yes", "StateDirectory": "mobillm-fleet", "WatchdogSec": "120s",
    }
    assert {name: service.get(name) for name in wanted} == wanted
    assert service["MemoryMax"].endswith("%")
    assert unit["Unit"]["StartLimitIntervalSec"] == "0"
    assert "MemoryDenyWriteExecute" not in service


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not installed")
def test_systemd_accepts_the_unit(tmp_path: Path) -> None:
    copy = tmp_path / UNIT.name
    copy.write_text(UNIT.read_text().replace("/opt/mobillm-fleet/bin/edge-agent", "/bin/true"))
    done = subprocess.run(["systemd-analyze", "verify", "--man=no", str(copy)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    about_us = [line for line in done.stderr.splitlines() if UNIT.name in line]
    assert about_us == []


def test_the_printed_unit_starts_this_installation() -> None:
    done = edge_agent("systemd-unit", "--config", "/srv/agent.toml")
    assert f"ExecStart={Path(sys.executable).with_name('edge-agent')} run --config /srv/agent.toml" in done.stdout
