"""The device's certificate renews itself: with a real broker, through lost answers, crashes and refusals."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from cryptography import x509

from coordinator.authority import certificate_pem, make_authority
from edge_agent import agent as agent_module
from edge_agent import renewal as renewal_module
from edge_agent.backbone import Backbone
from edge_agent.first_steps import FirstSteps
from edge_agent.identity import IdentityStore
from edge_agent.identity_file import IdentityError
from edge_agent.renewal import Renewal
from edge_agent.settings import AgentSettings
from edge_agent.spool import Spool
from edge_agent.trusted_clock import TrustedClock
from side_tuning.broker_connection import BrokerConnection, Message
from side_tuning.wire import topics
from side_tuning.wire.certificates import CertificateAnswer
from side_tuning.wire.messages import Command, Health
from tests.brokers import needs_mosquitto
from tests.edge_agent.answering import DEVICE, Answer, Answering, identity_for, make_bundle, say
from tests.tls_broker import TlsBroker, tls_broker, utc_now
from tests.waiting import wait_until

pytestmark = [pytest.mark.broker, needs_mosquitto]

LONG = 120.0
FRESH, STALE = 30.0, 0.012  # days; all begin an hour ago, so that the second kind is due


@pytest.fixture(scope="module")
def broker(tmp_path_factory):
    with tls_broker(tmp_path_factory.mktemp("broker")) as running:
        yield running


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    for name, value in {"LOOK_SECONDS": 0.05, "REPEAT_MIN_SECONDS": 0.5, "REPEAT_MAX_SECONDS": 1.0}.items():
        monkeypatch.setattr(renewal_module, name, value)


class Device:
    """A device's connection and its renewal, as the agent runs them."""

    def __init__(self, state: Path, now: Callable[[], float] = time.time) -> None:
        settings = AgentSettings(state_directory=state, backbone={"folder": state})
        self.store = IdentityStore(state)
        broker = settings.broker.model_copy(update={"reconnect_max_seconds": 0.3})
        self.connection = BrokerConnection(
            broker, DEVICE, subscriptions=[topics.certificate_answer(DEVICE)], on_message=self._arrived, reconnect_min_seconds=0.1,
        )
        self.renewal = Renewal(self.connection, state, TrustedClock(state, now))
        self.ending = threading.Event()
        self.thread = threading.Thread(target=self.renewal.run, args=(self.ending,))

    def _arrived(self, message: Message) -> None:
        self.renewal.offer(message)


@contextmanager
def device(state: Path, **options) -> Iterator[Device]:
    running = Device(state, **options)
    running.connection.start()
    running.thread.start()
    try:
        yield running
    finally:
        running.ending.set()
        running.thread.join()
        running.connection.stop()


def settled(running: Device, certificate: x509.Certificate) -> bool:
    """Connected with this certificate and rid of the one before."""
    return running.renewal.identity.certificate == certificate and running.connection.epoch > 1 and not running.store.leftovers()


def test_a_certificate_that_is_due_is_replaced_and_the_connection_made_anew(tmp_path: Path, broker: TlsBroker):
    old = identity_for(broker, tmp_path, STALE)
    old_key = (tmp_path / "identity" / "client.key").read_bytes()
    with Answering(broker, days=FRESH) as answering, device(tmp_path) as running:
        wait_until(lambda: answering.issued and settled(running, answering.issued[-1]), LONG, "the new certificate is in use")
        assert running.renewal.identity.serial != old.serial
        assert (tmp_path / "identity" / "client.key").read_bytes() != old_key
        assert (tmp_path / "identity" / "checkpoint.pub").read_text() == "ab" * 32
        def kept() -> list[str]:
            return [path.name for path in (tmp_path / "identities").iterdir() if path.is_dir()]

        wait_until(lambda: kept() == [running.renewal.identity.serial], LONG, "the one before is gone")
        assert {who for who, _ in answering.requests} == {DEVICE}
        assert running.renewal.error == ""


def test_a_fresh_one_is_left_alone_until_the_command_comes(tmp_path: Path, broker: TlsBroker):
    identity = identity_for(broker, tmp_path, FRESH)
    assert identity.begins + 0.6 * (identity.ends - identity.begins) > time.time()
    with Answering(broker, days=FRESH) as answering, device(tmp_path) as running:
        wait_until(lambda: running.connection.connected, LONG, "connected")
        running.renewal.step()
        assert answering.requests == []
        running.renewal.ask_now()
        wait_until(lambda: answering.issued and settled(running, answering.issued[-1]), LONG, "renewed by command")


def test_it_is_due_at_two_thirds_of_its_life_by_the_trusted_clock(tmp_path: Path, broker: TlsBroker):
    identity = identity_for(broker, tmp_path, FRESH)
    life = identity.ends - identity.begins
    shares = {(Device(tmp_path).renewal.due_at - identity.begins) / life for _ in range(20)}
    assert len(shares) > 1
    assert all(0.63 < share < 0.70 for share in shares)


def test_a_lost_answer_is_asked_for_again_with_the_same_key_even_after_a_restart(tmp_path: Path, broker: TlsBroker):
    identity_for(broker, tmp_path, STALE)
    with Answering(broker, lambda _, __: None, days=FRESH) as answering:
        with device(tmp_path):
            wait_until(lambda: len(answering.requests) > 1, LONG, "asked twice")
        answering.answer = Answering.issue
        with device(tmp_path) as running:
            wait_until(lambda: answering.issued and settled(running, answering.issued[-1]), LONG, "renewed")
        keys = {x509.load_pem_x509_csr(csr).public_key().public_numbers() for _, csr in answering.requests}  # type: ignore[union-attr]
        assert len(keys) == 1


def test_wrong_answers_are_ignored_with_a_word(tmp_path: Path, broker: TlsBroker, caplog: pytest.LogCaptureFixture):
    identity_for(broker, tmp_path, STALE)
    foreign = make_authority("fleet authority of a test", now=utc_now(), days=3)
    wrong: list[Answer] = [
        lambda a, r: CertificateAnswer("issued", "0" * 64, time.time(), certificate=a.issue(r).certificate),
        lambda a, r: a.issue(r, name="garage"),
        lambda a, r: a.issue(r, by=foreign),
        lambda a, r: CertificateAnswer("issued", a.issue(r).key_digest, time.time(), certificate=b"nonsense"),
    ]

    def answer(answering: Answering, request: x509.CertificateSigningRequest) -> CertificateAnswer | None:
        return (wrong.pop(0) if wrong else Answering.issue)(answering, request)

    with Answering(broker, answer, days=FRESH) as answering, device(tmp_path) as running:
        wait_until(lambda: not wrong and answering.issued and settled(running, answering.issued[-1]), LONG, "the right one is taken")
    for words in ("another key's certificate was ignored", "for the name 'garage'", "not come from this fleet's authority", "cannot be read"):
        assert sum(words in record.message for record in caplog.records) == 1, words


def test_a_refusal_is_told_and_the_old_one_stays_in_use(tmp_path: Path, broker: TlsBroker):
    old = identity_for(broker, tmp_path, STALE)
    with Answering(broker, say("refused", "revoked", "this device was revoked")) as answering, device(tmp_path) as running:
        wait_until(lambda: running.renewal.error, LONG, "told")
        assert "refused a new certificate (revoked): this device was revoked" in running.renewal.error
        asked = len(answering.requests)
        running.renewal.step()
        assert len(answering.requests) == asked  # not for hours, but by command:
        running.renewal.ask_now()
        wait_until(lambda: len(answering.requests) > asked, LONG, "asked again")
        assert running.connection.connected
        assert running.renewal.identity == old


def test_a_new_certificate_that_does_not_work_is_given_up_for_the_old(tmp_path: Path, broker: TlsBroker):
    """Here the answer names another authority for the broker, so that the next connection would fail for ever."""
    old = identity_for(broker, tmp_path, STALE)
    foreign = certificate_pem(make_authority("another", now=utc_now(), days=3).certificate)

    def answer(answering: Answering, request: x509.CertificateSigningRequest) -> CertificateAnswer:
        good = answering.issue(request)
        return CertificateAnswer("issued", good.key_digest, good.at, certificate=good.certificate, authorities=foreign)

    with Answering(broker, answer, days=FRESH), device(tmp_path) as running:
        wait_until(lambda: "does not take the new certificate" in running.renewal.error, LONG, "told")
        wait_until(lambda: running.connection.connected, LONG, "back with the old one")
        assert running.renewal.identity.serial == old.serial
        assert running.store.others() == []


def test_a_crash_right_after_the_switch_is_judged_at_the_next_start(tmp_path: Path, broker: TlsBroker):
    old = identity_for(broker, tmp_path, FRESH)
    new = identity_for(broker, tmp_path, FRESH)
    assert [path.name for path in IdentityStore(tmp_path).others()] == [old.serial]
    with device(tmp_path) as running:
        wait_until(lambda: not running.store.others(), LONG, "the new one proved itself")
        assert running.renewal.identity.serial == new.serial


def test_a_revoked_new_one_after_a_crash_falls_back_too(tmp_path: Path, broker: TlsBroker):
    old = identity_for(broker, tmp_path, FRESH)
    new = identity_for(broker, tmp_path, FRESH)
    broker.revoked["fleet"].append((new.serial, utc_now()))
    broker.write_revocations("fleet")
    broker.reload()
    with device(tmp_path) as running:
        wait_until(lambda: running.connection.connected, LONG, "connected with the old one")
        wait_until(lambda: running.renewal.identity.serial == old.serial, LONG, "and knows it")
        assert "it was revoked" in running.renewal.error


def test_after_its_end_it_says_that_only_a_bundle_helps(tmp_path: Path, broker: TlsBroker):
    identity = identity_for(broker, tmp_path, FRESH)
    renewal = Device(tmp_path, now=lambda: identity.ends + 1).renewal
    renewal.step()
    assert "enrol anew" in renewal.error
    assert f"coordinator enrol {DEVICE}" in renewal.error


def test_a_full_disk_is_told_and_tried_again(tmp_path: Path, broker: TlsBroker, monkeypatch: pytest.MonkeyPatch):
    identity_for(broker, tmp_path, STALE)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with Answering(broker, days=FRESH), device(tmp_path) as running:
        monkeypatch.setattr(running.store, "next_key", full)
        monkeypatch.setattr(running.renewal, "_store", running.store)
        running.renewal._key, running.renewal._put_off_until = None, 0.0
        wait_until(lambda: "No space left" in running.renewal.error, LONG, "told")
        monkeypatch.undo()
        assert running.thread.is_alive()


@pytest.mark.parametrize("damage", ["client.pem", "client.key", "authorities.pem", "identity.json"])
def test_a_damaged_identity_is_told(tmp_path: Path, broker: TlsBroker, damage: str):
    identity_for(broker, tmp_path, FRESH)
    (tmp_path / "identity" / damage).write_bytes(b"nonsense" if damage != "authorities.pem" else b"")
    if damage == "authorities.pem":
        (tmp_path / "identity" / damage).unlink()
    with pytest.raises(IdentityError, match="damaged"):
        IdentityStore(tmp_path).load()


def test_an_identity_that_was_copied_as_a_plain_folder_renews_too(tmp_path: Path, broker: TlsBroker):
    identity_for(broker, tmp_path / "first", STALE)
    shutil.copytree(tmp_path / "first" / "identity", tmp_path / "second" / "identity")
    with Answering(broker, days=FRESH) as answering, device(tmp_path / "second") as running:
        wait_until(lambda: answering.issued and settled(running, answering.issued[-1]), LONG, "renewed")
    assert (tmp_path / "second" / "identity").is_symlink()


# The whole agent.


def test_the_agent_enrols_reports_its_certificate_and_renews_on_command(tmp_path: Path, broker: TlsBroker, minilm: Path):
    from edge_agent.enrol import enrol_before_start

    healths: list[Health] = []
    bundle = make_bundle(broker, tmp_path, device="hall", claim="claim-00000000000000ee", checkpoint_public_key="")
    settings = AgentSettings(
        bundle_file=bundle, state_directory=tmp_path / "state", backbone={"folder": minilm}, health={"every_seconds": 0.5}, device="hall",
    )
    gateway = BrokerConnection(
        broker.client("gateway"), "gateway", subscriptions=[topics.all_devices_up("health")],
        on_message=lambda m: healths.append(Health.from_bytes(m.payload)),
    )
    stop = threading.Event()
    code: list[int] = []
    with Answering(broker, days=FRESH) as answering:
        assert enrol_before_start(settings, stop)
        assert not bundle.exists()
        first = f"{answering.issued[-1].serial_number:x}"
        agent = threading.Thread(target=lambda: code.append(agent_module.run(settings, stop)))
        gateway.start()
        agent.start()
        try:
            wait_until(lambda: any(health.certificate_serial == first for health in healths), LONG, "health names the certificate")
            assert healths[-1].certificate_expires_at == answering.issued[-1].not_valid_after_utc.timestamp()
            gateway.publish(topics.command("hall"), Command("1", "renew-certificate", time.time() + 600).to_bytes())
            wait_until(lambda: any(health.certificate_serial not in ("", first) for health in healths), LONG, "health names the new one")
            assert not healths[-1].paused
            assert healths[-1].certificate_serial == f"{answering.issued[-1].serial_number:x}"
        finally:
            stop.set()
            agent.join(60)
            gateway.stop()
    assert code == [0]
    assert TrustedClock(tmp_path / "state").passed > time.time() - LONG


def test_an_agent_in_1970_works_and_says_that_its_clock_is_wrong(tmp_path: Path, broker: TlsBroker, minilm: Path):
    identity_for(broker, tmp_path, FRESH)
    healths: list[Health] = []
    settings = AgentSettings(state_directory=tmp_path, backbone={"folder": minilm}, checkpoint={"public_key_file": None})
    gateway = BrokerConnection(
        broker.client("gateway"), "gateway", subscriptions=[topics.all_devices_up("health")],
        on_message=lambda m: healths.append(Health.from_bytes(m.payload)) if m.topic == topics.health(DEVICE) else None,
    )
    stop = threading.Event()
    spool = Spool.open(settings.spool_path, max_bytes=10**6, policy="pause", clock=time.time)
    agent = agent_module.Agent(settings, Backbone.load(minilm, threads=1), spool, [], None, first_steps=FirstSteps(tmp_path), now=lambda: 60.0)
    running = threading.Thread(target=agent.run, args=(stop,))
    gateway.start()
    running.start()
    try:
        wait_until(lambda: any("clock shows 1970-01-01" in health.reason for health in healths), LONG, "the clock is told")
        assert healths[-1].at == 60.0
    finally:
        stop.set()
        running.join(60)
        gateway.stop()
        spool.close()
