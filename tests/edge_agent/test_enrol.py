"""Enrolment as a device does it, with a real broker and TLS: what goes right, what goes wrong, what is left on the disk."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
import tempfile
import threading
import time
from datetime import timedelta
from pathlib import Path

import pytest
from cryptography import x509

from coordinator.authority import make_authority
from edge_agent import enrol as enrolment
from edge_agent.enrol import EnrolmentFailed, Stopped, enrol, enrol_before_start, wipe
from edge_agent.identity import IdentityStore, key_digest
from edge_agent.identity_file import IdentityError
from edge_agent.settings import AgentSettings
from edge_agent.trusted_clock import TrustedClock
from side_tuning.wire.certificates import CertificateAnswer
from tests.brokers import free_port, needs_mosquitto
from tests.edge_agent.answering import CLAIM, Answering, make_bundle, private_keys_in, say
from tests.tls_broker import TlsBroker, odd_certificate, tls_broker, utc_now
from tests.waiting import wait_until

pytestmark = [pytest.mark.broker, needs_mosquitto]

LONG = 120.0  # seconds; nothing here takes them
BRIEF = 5.0


@pytest.fixture(scope="module")
def broker(tmp_path_factory):
    with tls_broker(tmp_path_factory.mktemp("broker")) as running:
        yield running


@pytest.fixture
def ask(tmp_path, broker, monkeypatch):
    """Enrol with this bundle, or one for this broker with these changes."""
    monkeypatch.setattr(enrolment, "REPEAT_SECONDS", 0.5)
    monkeypatch.setattr(enrolment, "REPEAT_WAITING_SECONDS", 0.5)

    def run(bundle: Path | None = None, timeout: float | None = LONG, *, now=time.time, said: list[str] | None = None, stop=None, **changes) -> str:
        path = bundle or make_bundle(broker, tmp_path, **changes)
        state = tmp_path / "state"
        return enrol(path, state, clock=TrustedClock(state, now), timeout_seconds=timeout, say=(said if said is not None else []).append, stop=stop)

    return run


def failure(ask, timeout: float = LONG, **changes) -> EnrolmentFailed:
    with pytest.raises(EnrolmentFailed) as caught:
        ask(timeout=timeout, **changes)
    return caught.value


def test_a_bundle_becomes_an_identity_and_nothing_of_its_secret_stays(tmp_path: Path, broker: TlsBroker, ask):
    path = make_bundle(broker, tmp_path)
    bundle = path.read_text()
    with Answering(broker) as answering:
        assert "enrolled as 'kitchen'" in ask(path)
    folder = tmp_path / "state" / "identity"
    assert {file.name for file in folder.iterdir()} == {"client.key", "client.pem", "authorities.pem", "checkpoint.pub", "identity.json"}
    assert stat.S_IMODE((folder / "client.key").stat().st_mode) == 0o600
    assert stat.S_IMODE((tmp_path / "state" / "identities").stat().st_mode) == 0o700
    identity = IdentityStore(tmp_path / "state").load()
    assert identity is not None
    assert identity.certificate == answering.issued[-1]
    assert {who for who, _ in answering.requests} == {CLAIM}
    assert not path.exists()
    assert private_keys_in(tmp_path, bundle) == []
    assert (folder / "checkpoint.pub").read_text() == "ab" * 32


def test_the_identity_serves_at_the_devices_port(tmp_path: Path, broker: TlsBroker, ask):
    from side_tuning.broker_connection import BrokerConnection

    with Answering(broker):
        ask()
    settings = AgentSettings(state_directory=tmp_path / "state", backbone={"folder": tmp_path})
    assert (settings.device, settings.broker.port, settings.uses_identity) == ("kitchen", broker.port, True)
    assert settings.checkpoint.public_key_file == tmp_path / "state" / "identity" / "checkpoint.pub"
    connection = BrokerConnection(settings.broker, "kitchen")
    connection.start()
    wait_until(lambda: connection.connected, 60, "connected with the new certificate")
    connection.stop()


def test_enrolling_again_says_so_and_asks_nobody(tmp_path: Path, broker: TlsBroker, ask):
    path = make_bundle(broker, tmp_path)
    bundle = path.read_text()
    with Answering(broker) as answering:
        ask(path)
        asked = len(answering.requests)
        assert "already enrolled" in ask(path)  # it is gone
        path.write_text(bundle)  # a copy turned up
        assert "already enrolled as 'kitchen'" in ask(path)
        assert not path.exists()
        assert len(answering.requests) == asked


def test_a_new_claim_for_the_same_device_replaces_the_identity(tmp_path: Path, broker: TlsBroker, ask):
    with Answering(broker) as answering:
        ask()
        ask(claim="claim-00000000000000aa")
        identity = IdentityStore(tmp_path / "state").load()
        assert identity is not None
        assert identity.certificate == answering.issued[-1]
        assert identity.facts.claim == "claim-00000000000000aa"


def test_a_bundle_for_another_device_is_not_mixed_in(tmp_path: Path, broker: TlsBroker, ask):
    with Answering(broker):
        ask()
        other = make_bundle(broker, tmp_path, device="garage", claim="claim-00000000000000bb")
        with pytest.raises(EnrolmentFailed, match="belongs to 'kitchen'"):
            ask(other)
        assert other.exists()


def test_a_lost_answer_is_asked_for_again_with_the_same_key(tmp_path: Path, broker: TlsBroker, ask):
    """A crash between request and answer must not need a second claim."""
    path = make_bundle(broker, tmp_path)
    stop = threading.Event()
    with Answering(broker, lambda _, __: stop.set()) as answering:
        with pytest.raises(Stopped):
            ask(path, stop=stop)
        answering.answer = Answering.issue
        ask(path)
        keys = {x509.load_pem_x509_csr(csr).public_key().public_numbers().x for _, csr in answering.requests}  # type: ignore[union-attr]
        assert len(keys) == 1
        assert len(answering.requests) >= 2


@pytest.mark.parametrize("lost", ["claim", "client.key"])
def test_a_crash_while_the_key_is_written_costs_nothing(tmp_path: Path, broker: TlsBroker, ask, lost: str):
    store = IdentityStore(tmp_path / "state")
    with store.held():
        store.next_key(CLAIM)
    (store.folder / "next" / lost).write_bytes(b"")
    with Answering(broker):
        assert "enrolled" in ask()


def test_a_crash_before_the_link_moves_is_made_good(tmp_path: Path, broker: TlsBroker, ask):
    with Answering(broker):
        ask()
    (tmp_path / "state" / "identity").unlink()
    assert IdentityStore(tmp_path / "state").load() is not None


def test_an_approval_is_waited_for_and_told_once(broker: TlsBroker, ask):
    said: list[str] = []
    with Answering(broker, say("waiting")) as answering:
        threading.Thread(
            target=lambda: (wait_until(lambda: len(answering.requests) > 2, 60, "asked again"), setattr(answering, "answer", Answering.issue)),
        ).start()
        assert "enrolled" in ask(timeout=None, said=said)
    assert len(said) == 1
    assert "devices approve kitchen" in said[0]
    key = x509.load_pem_x509_csr(answering.requests[0][1]).public_key()
    assert f"with the key {key_digest(key)[:16]}" in said[0]


def test_wrong_answers_are_ignored_with_a_word(broker: TlsBroker, ask, caplog):
    """Another key's, another name's, a foreign authority's, nonsense; then the right one."""
    foreign = make_authority("fleet authority of a test", now=utc_now(), days=3)
    wrong = [
        lambda a, r: CertificateAnswer("issued", "0" * 64, time.time(), certificate=a.issue(r).certificate),
        lambda a, r: a.issue(r, name="garage"),
        lambda a, r: a.issue(r, by=foreign),
        lambda a, r: CertificateAnswer("issued", a.issue(r).key_digest, time.time(), certificate=b"nonsense"),
        lambda a, r: CertificateAnswer("issued", a.issue(r).key_digest, time.time(), certificate=a.issue(r).certificate, authorities=a.issue(r).certificate),
    ]

    def answer(answering, request):
        return (wrong.pop(0) if wrong else Answering.issue)(answering, request)

    with Answering(broker, answer):
        assert "enrolled" in ask()
    assert not wrong
    for words in ("another key was ignored", "for the name 'garage', not 'kitchen'", "not come from this fleet's authority", "cannot be read", "are none"):
        assert sum(words in record.message for record in caplog.records) == 1, words


REFUSED = {"claim-spent": "already used", "claim-expired": "expired", "claim-withdrawn": "withdrawn", "wrong-name": "another device", "revoked": "revoked", "new": "new"}


@pytest.mark.parametrize("reason", REFUSED)
def test_a_refusal_is_told_with_its_cure_and_the_bundle_stays(tmp_path: Path, broker: TlsBroker, ask, reason: str):
    with Answering(broker, say("refused", reason, "in words")):
        failed = failure(ask)
    assert failed.exit_code == 78
    assert all(words in str(failed) for words in (REFUSED[reason], "in words", "coordinator enrol kitchen"))
    assert (tmp_path / "kitchen.bundle").exists()


def test_a_claim_that_expired_or_was_spent_is_told(tmp_path: Path, broker: TlsBroker, ask):
    expired = odd_certificate(broker.authorities["claims"], tmp_path, "expired", name=CLAIM, not_after=utc_now() - timedelta(minutes=1))
    failed = failure(ask, claim_certificate=expired.certificate_file.read_text(), claim_key=expired.key_file.read_text())
    assert (failed.exit_code, "claim in the bundle has expired" in str(failed)) == (78, True), failed
    spent = "claim-00000000000000cc"
    bundle = make_bundle(broker, tmp_path, claim=spent)
    broker.revoke(spent, claims=True)
    broker.reload()
    failed = failure(ask, bundle=bundle)
    assert (failed.exit_code, "already used, or withdrawn" in str(failed)) == (78, True), failed


def test_the_wrong_broker_and_the_wrong_fleet_are_told(tmp_path: Path, broker: TlsBroker, ask):
    with tls_broker(tmp_path / "other") as other:
        stranger = failure(ask, authorities=(other.broker_directory / "fleet-authority.pem").read_text())
        assert (stranger.exit_code, "not the broker that the bundle was made for" in str(stranger)) == (78, True), stranger
        foreign = other.issue(CLAIM, claims=True)
        fleet = failure(ask, claim_certificate=foreign.certificate_file.read_text(), claim_key=foreign.key_file.read_text())
        assert (fleet.exit_code, "not from its fleet" in str(fleet)) == (78, True), fleet


def test_silence_is_told_by_its_cause(ask):
    unreachable = failure(ask, timeout=BRIEF, claims_port=free_port())
    assert (unreachable.exit_code, "cannot be reached" in str(unreachable)) == (75, True)
    nobody = failure(ask, timeout=BRIEF)
    assert (nobody.exit_code, "nobody answered" in str(nobody)) == (75, True)


def test_a_device_in_1970_enrols_and_knows_better_afterwards(tmp_path: Path, broker: TlsBroker, ask):
    later = time.time() + 2 * 86_400
    with Answering(broker, lambda a, r: a.issue(r, at=later)):
        assert "enrolled" in ask(now=lambda: 60.0)
    clock = TrustedClock(tmp_path / "state", lambda: 60.0)
    assert clock.passed == pytest.approx(later, abs=1)
    assert "1970-01-01" in clock.trouble


def test_a_coordinators_clock_that_is_years_ahead_locks_no_device_out(tmp_path: Path, broker: TlsBroker, ask):
    """Every later broker's certificate would seem to have expired, also to a device whose own clock is right."""
    ahead = time.time() + 9 * 365 * 86_400
    with Answering(broker, lambda a, r: a.issue(r, at=ahead)):
        assert "enrolled" in ask(issued_at=ahead, expires_at=ahead + 3600)
    assert TrustedClock(tmp_path / "state").instead_of_system() is None
    with Answering(broker):
        assert "enrolled" in ask(claim="claim-00000000000000aa")
    assert TrustedClock(tmp_path / "state").instead_of_system() is None


def test_only_one_at_a_time(tmp_path: Path, ask):
    with IdentityStore(tmp_path / "state").held(), pytest.raises(IdentityError, match="another edge-agent is enrolling"):
        ask()


def test_without_files_in_memory_a_private_folder_is_used_and_wiped(tmp_path: Path, broker: TlsBroker, ask, monkeypatch):
    def forbidden(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "memfd_create", forbidden)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    path = make_bundle(broker, tmp_path)
    bundle = path.read_text()
    with Answering(broker):
        assert "enrolled as 'kitchen'" in ask(path)
    assert private_keys_in(tmp_path, bundle) == []


def test_it_can_be_stopped(tmp_path: Path, broker: TlsBroker):
    stop = threading.Event()
    stop.set()
    with pytest.raises(Stopped):
        enrol(make_bundle(broker, tmp_path), tmp_path / "state", clock=TrustedClock(tmp_path / "state"), stop=stop)


def test_a_bundle_that_cannot_be_wiped_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    bundle = tmp_path / "bundle"
    bundle.write_bytes(b"secret")
    (tmp_path / "link").symlink_to(bundle)
    assert wipe(tmp_path / "link") == ""
    assert not bundle.exists()
    assert wipe(bundle) == ""
    bundle.write_bytes(b"secret")

    def refuse(*_args: object, **_named: object) -> None:
        raise PermissionError(1, "Read-only file system")

    monkeypatch.setattr(Path, "open", refuse)
    monkeypatch.setattr(Path, "unlink", refuse)
    assert wipe(bundle) == "Read-only file system"


# The command and the agent.


def edge_agent(*arguments: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("MOBILLM_")}
    return subprocess.run([sys.executable, "-m", "edge_agent.cli", *arguments], capture_output=True, text=True, timeout=LONG, env={**clean, "COLUMNS": "200"})


def test_the_command_enrols_by_configuration_or_state_folder(tmp_path: Path, broker: TlsBroker):
    config = tmp_path / "agent.toml"
    config.write_text('bundle_file = "kitchen.bundle"\nstate_directory = "state"\n[backbone]\nfolder = "none"\n')
    with Answering(broker):
        make_bundle(broker, tmp_path)
        done = edge_agent("enrol", "--config", str(config))
        assert (done.returncode, done.stderr) == (0, ""), done
        assert "enrolled as 'kitchen'" in done.stdout
        garage = make_bundle(broker, tmp_path, "garage", "claim-00000000000000dd")
        done = edge_agent("enrol", "--bundle", str(garage), "--state", str(tmp_path / "garage"))
        assert (done.returncode, done.stderr) == (0, ""), done
        assert (tmp_path / "garage" / "identity" / "client.pem").exists()
    config.write_text(config.read_text() + '[broker]\nhost = "elsewhere"\n')
    done = edge_agent("enrol", "--config", str(config))
    assert done.returncode == 0
    assert "already enrolled" in done.stdout
    assert "remove host and files there" in done.stdout
    failed = edge_agent("enrol", "--bundle", str(tmp_path / "none"), "--state", str(tmp_path / "new"))
    assert failed.returncode == 78
    assert failed.stderr.count("\n") == 1
    assert "cannot be read" in failed.stderr
    silent = edge_agent("enrol", "--bundle", str(make_bundle(broker, tmp_path)), "--state", str(tmp_path / "new"), "--timeout", str(BRIEF))
    assert (silent.returncode, silent.stderr.count("\n")) == (75, 1), silent
    assert "coordinator enrolment" in silent.stderr


WATCHED = """
import sys
sys.argv = ["edge-agent", "enrol", "--bundle", sys.argv[1], "--state", sys.argv[2]]
from edge_agent.cli import main
try:
    main()
finally:
    heavy = [name for name in ("torch", "transformers", "sqlalchemy", "edge_agent.agent") if name in sys.modules]
    # Not getrusage: its peak includes that of the process which started this one.
    print("LOADED", heavy, "KB", next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


def test_enrolling_loads_neither_torch_nor_a_server_and_stays_small(tmp_path: Path, broker: TlsBroker):
    with Answering(broker):
        bundle = make_bundle(broker, tmp_path)
        done = subprocess.run([sys.executable, "-c", WATCHED, str(bundle), str(tmp_path / "state")], capture_output=True, text=True, timeout=LONG)
    assert done.returncode == 0, done.stderr
    loaded, _, kilobytes = done.stdout.strip().rpartition(" KB ")
    assert loaded.endswith("LOADED []")
    assert int(kilobytes) < 120_000


def test_a_useless_bundle_does_not_keep_an_enrolled_device_from_starting(tmp_path: Path, broker: TlsBroker, ask, caplog):
    """A spent one of an earlier claim, or rubbish: the identity that works stays."""
    with Answering(broker) as answering:
        ask()
        settings = AgentSettings(
            state_directory=tmp_path / "state", backbone={"folder": tmp_path}, bundle_file=make_bundle(broker, tmp_path, claim="claim-00000000000000ff"),
        )
        answering.answer = say("refused", "claim-spent")
        assert enrol_before_start(settings, threading.Event())
        assert "the identity from before stays" in caplog.text
        (tmp_path / "kitchen.bundle").write_text("rubbish")
        assert enrol_before_start(settings, threading.Event())
        (tmp_path / "kitchen.bundle").write_bytes(b"\0" * 300)
        assert enrol_before_start(settings, threading.Event())
        assert not (tmp_path / "kitchen.bundle").exists()


def test_run_waits_for_a_bundle_that_works(tmp_path: Path, broker: TlsBroker, monkeypatch: pytest.MonkeyPatch, caplog):
    monkeypatch.setattr(enrolment, "RETRY_MIN_SECONDS", 0.5)
    bundle = make_bundle(broker, tmp_path)
    settings = AgentSettings(state_directory=tmp_path / "state", backbone={"folder": tmp_path}, bundle_file=bundle)
    with Answering(broker, say("refused", "claim-withdrawn")) as answering:
        done: list[bool] = []
        waiting = threading.Thread(target=lambda: done.append(enrol_before_start(settings, threading.Event())))
        waiting.start()
        wait_until(lambda: "was withdrawn" in caplog.text, LONG, "told")
        answering.answer = Answering.issue
        waiting.join(LONG)
    assert done == [True]
    assert (tmp_path / "state" / "alive").exists(), "health checks see a program that lives"


def test_run_enrols_first_and_says_why_it_waits(tmp_path: Path, broker: TlsBroker):
    """The agent's own start fails here for want of a backbone: after it has enrolled."""
    config = tmp_path / "agent.toml"
    config.write_text('bundle_file = "kitchen.bundle"\nstate_directory = "state"\n[backbone]\nfolder = "none"\n')
    make_bundle(broker, tmp_path)
    with Answering(broker):
        done = edge_agent("run", "--config", str(config))
    assert done.returncode == 78
    assert "enrolled as 'kitchen'" in done.stderr
    assert "none" in done.stderr.splitlines()[-1]
    facts = json.loads((tmp_path / "state" / "identity" / "identity.json").read_text())
    assert (facts["device"], facts["port"]) == ("kitchen", broker.port)
