"""`coordinator doctor`: all well where all is well; each thing that breaks is found and its cure told."""

import json
import subprocess
import sys
from datetime import timedelta

import pytest

from coordinator.authority import load_authority
from coordinator.doctor import Finding, examine, lines
from coordinator.files import write_atomically
from coordinator.identities import make_identities
from coordinator.outbox import ensure_signing_key
from coordinator.store.engine import open_store
from coordinator.store.programs import record_program
from coordinator.store.schema import downgrade
from side_tuning.broker_settings import BrokerSettings
from tests.brokers import free_port, mosquitto, needs_mosquitto
from tests.coordinator.fleet import make_store, now, settings_file, settings_for
from tests.tls_broker import tls_broker


def say(settings, name, at=None, **status):
    store = open_store(settings.database_url)
    at = at or now()
    with store.write() as session:
        record_program(session, name, started_at=at, at=at, status={"looping": True, "connected": True, **status})
    store.close()


@pytest.fixture
def settings(tmp_path):
    """A coordinator with TLS that has everything but a broker."""
    made = settings_for(tmp_path, BrokerSettings(host="localhost", port=free_port()))
    make_store(made).close()
    make_identities(made, now())
    ensure_signing_key(made)
    for name in ("gateway", "trainer", "enrolment"):
        say(made, name)
    return made


def found(settings, check, at=None):
    """The worst finding of a check."""
    order = ["ok", "warning", "failed"]
    return max((finding for finding in examine(settings, at) if finding.check == check), key=lambda finding: order.index(finding.level))


@pytest.mark.broker
@needs_mosquitto
def test_all_is_well_with_a_real_broker_and_its_rules(settings, tmp_path):
    with tls_broker(tmp_path / "m", broker_directory=settings.broker_directory, port=settings.broker.port):
        findings = examine(settings)
    assert [finding for finding in findings if finding.level != "ok" and finding.check != "disk"] == []
    (broker,) = [finding for finding in findings if finding.check == "broker"]
    assert "round trip" in broker.value
    assert "TLS" in broker.value


@pytest.mark.broker
@needs_mosquitto
def test_without_tls_it_warns_and_still_measures(tmp_path):
    with mosquitto(tmp_path / "m") as broker:
        made = settings_for(tmp_path, broker.settings)
        make_store(made).close()
        assert found(made, "broker").level == "ok"
        assert (found(made, "certificates").level, found(made, "gateway").level) == ("warning", "failed")


BREAKAGES = {
    "no broker": (lambda _: None, "broker", "is it running?"),
    "key for all": (lambda s: (s.authority_directory / "fleet-authority.key").chmod(0o644), "keys", "mode 0644"),
    "broker's key for all": (lambda s: (s.broker_directory / "broker.key").chmod(0o644), "keys", "mode 0644"),
    "no database": (lambda s: (s.data_directory / "coordinator.db").unlink(), "database", "coordinator database upgrade"),
    "old schema": (lambda s: downgrade(s.database_url, "0001"), "database", "coordinator database upgrade"),
    "no signing key": (lambda s: s.signing_key_file.unlink(), "signing key", "does not exist"),
    "damaged signing key": (lambda s: s.signing_key_file.write_bytes(b"x"), "signing key", "checkpoint-signing.key"),
    "other public half": (lambda s: s.public_key_file.write_text("00" * 32), "signing key", "not its public half"),
    "damaged certificate": (lambda s: (s.broker_directory / "broker.pem").write_text("x"), "broker certificate", "no PEM certificate"),
    "no revocation list": (
        lambda s: (s.broker_directory / "fleet-revoked.pem").unlink(), "revocations (fleet-revoked.pem)", "cannot be read",
    ),
    "no certificate of the doctor": (
        lambda s: (s.data_directory / "identities" / "doctor" / "client.pem").unlink(), "certificate of doctor", "cannot be read",
    ),
    "silent gateway": (lambda s: say(s, "gateway", now() - timedelta(seconds=90)), "gateway", "last heard of 9"),
    "gateway without broker": (lambda s: say(s, "gateway", connected=False, broker_error="refused"), "gateway", "refused"),
    "hanging trainer": (lambda s: say(s, "trainer", looping=False), "trainer", "do not go round"),
    "stuck commits": (lambda s: say(s, "gateway", oldest_uncommitted_seconds=61.0), "gateway", "61 s"),
    "clock gone back": (lambda s: say(s, "gateway", now() + timedelta(hours=2)), "clock", "gone backwards"),
}  # fmt: skip


@pytest.mark.parametrize("breakage", BREAKAGES)
def test_what_breaks_is_found_with_its_cure(settings, breakage):
    do, check, words = BREAKAGES[breakage]
    do(settings)
    finding = found(settings, check)
    assert finding.level == "failed"
    assert words in finding.value + finding.cure
    assert finding.cure


def test_trainers_troubles_are_warnings(settings):
    say(settings, "trainer", error="checkpoints cannot be saved: no space")
    assert (found(settings, "trainer").level, "no space" in found(settings, "trainer").value) == ("warning", True)


@pytest.mark.parametrize(
    ("days", "check", "level"),
    [
        (340, "broker certificate", "warning"),
        (340, "certificate of gateway", "warning"),
        (340, "revocations (fleet-revoked.pem)", "warning"),
        (340, "fleet authority", "ok"),
        (366, "broker certificate", "failed"),
        (366, "revocations (claims-revoked.pem)", "failed"),
        (3400, "claims authority", "warning"),
        (3700, "fleet authority", "failed"),
        (-1, "fleet authority", "failed"),
        (-3000, "clock", "failed"),
        (30_000, "clock", "failed"),
    ],
)
def test_dates_are_watched(settings, days, check, level):
    assert found(settings, check, now() + timedelta(days=days)).level == level


def test_a_revocation_list_that_ends_soon_is_a_warning(settings):
    fleet = load_authority(settings.authority_directory, "fleet-authority")
    write_atomically(settings.broker_directory / "fleet-revoked.pem", fleet.revocation_list([], now=now(), days=5))
    finding = found(settings, "revocations (fleet-revoked.pem)")
    assert (finding.level, "coordinator enrolment" in finding.cure) == ("warning", True)
    write_atomically(settings.broker_directory / "fleet-revoked.pem", fleet.revocation_list([], now=now() + timedelta(days=1), days=5))
    assert found(settings, "revocations (fleet-revoked.pem)").level == "failed", "from a clock ahead: the broker takes it for no list"


def test_a_new_public_host_asks_for_a_new_certificate(settings):
    moved = settings.model_copy(update={"enrolment": settings.enrolment.model_copy(update={"public_host": "fleet.example"})})
    finding = found(moved, "broker certificate")
    assert (finding.level, "'fleet.example'" in finding.value, "coordinator init" in finding.cure) == ("failed", True, True)


def test_tls_without_certificates_asks_for_init(tmp_path):
    made = settings_for(tmp_path, BrokerSettings(host="localhost", port=free_port()))
    finding = found(made, "certificates")
    assert (finding.level, finding.cure) == ("failed", "run `coordinator init`")


def test_nothing_is_made_or_changed(settings):
    def tree():
        return {path: path.stat().st_mtime_ns for path in settings.data_directory.rglob("*") if not path.name.startswith("coordinator.db-")}

    before = tree()
    examine(settings)
    assert tree() == before


def test_lines_are_aligned_and_cures_stand_below():
    said = list(lines([Finding("disk", "ok", "much"), Finding("database", "failed", "none", "make one")]))
    assert said == ["ok       disk      much", "failed   database  none", "                   -> make one"]


def test_on_the_command_line(tmp_path):
    config = settings_file(tmp_path, free_port())
    command = [sys.executable, "-m", "coordinator.cli", "doctor", "--config", str(config)]
    done = subprocess.run([*command, "--json"], capture_output=True, text=True, timeout=120)
    findings = json.loads(done.stdout)
    assert done.returncode == 1
    assert {"clock", "disk", "database", "broker"} <= {finding["check"] for finding in findings}
    plain = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (plain.returncode, "-> " in plain.stdout, plain.stderr) == (1, True, "")
