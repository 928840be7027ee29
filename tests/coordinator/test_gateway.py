"""The gateway with real mosquitto and a real database: nothing lost, nothing twice, nothing stalls."""

import sqlite3
import threading

import pytest
from sqlalchemy import text

from coordinator.device_table import device_lines
from coordinator.gateway import Gateway
from coordinator.retry import retry_rejections
from coordinator.store.identities import (
    add_certificate,
    add_claim,
    certificates_of,
    readmit_device,
    revoke_device,
)
from coordinator.store.registry import register_backbone
from coordinator.store.rejections import rejections
from side_tuning.broker_connection import BrokerConnection
from side_tuning.wire import topics
from side_tuning.wire.frame import split_frame
from side_tuning.wire.messages import BackboneInfo, Health, SpoolCount, TapPlan
from tests.brokers import mosquitto, needs_mosquitto
from tests.coordinator.fleet import (
    MANIFEST,
    ScriptedDevice,
    make_payload,
    make_store,
    now,
    settings_for,
    stored_frames,
)
from tests.waiting import wait_until

pytestmark = [pytest.mark.broker, needs_mosquitto]


@pytest.fixture
def broker(tmp_path):
    with mosquitto(tmp_path / "broker") as running:
        yield running


class RunningGateway:
    def __init__(self, settings, store):
        self.gateway = Gateway(settings, store)
        self.stop = threading.Event()
        self.error = None
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()
        wait_until(lambda: self.gateway.connection.connected or self.error, 10, "the gateway connects")

    def _run(self):
        try:
            self.gateway.run(self.stop)
        except BaseException as error:
            self.error = error

    def end(self):
        self.stop.set()
        self.thread.join(20)
        assert not self.thread.is_alive()
        if self.error:
            raise self.error


@pytest.fixture
def start(tmp_path, broker):
    """Start a gateway on a new store; everything is closed in the end."""
    opened = []

    def starter(*, registered=True, **more):
        settings = settings_for(tmp_path, broker.settings, **more)
        store = make_store(settings, registered=registered)
        running = RunningGateway(settings, store)
        opened.append((running, store))
        return running, store

    yield starter
    for running, store in opened:
        running.end()
        store.close()


@pytest.fixture
def device(broker):
    made = []

    def maker(name, payloads, **more):
        one = ScriptedDevice(name, broker.settings, payloads, **more)
        one.start()
        made.append(one)
        return one

    yield maker
    for one in made:
        one.stop()


@pytest.fixture
def sender(broker):
    connection = BrokerConnection(broker.settings, "raw-sender")
    connection.start()
    wait_until(lambda: connection.connected, 10, "the sender connects")
    yield connection
    connection.stop()


def test_frames_of_several_devices_are_stored_and_receipted(start, device):
    _, store = start()
    devices = [device(f"d{n}", {s: make_payload(f"d{n}", s) for s in range(1, 41)}) for n in range(3)]
    wait_until(lambda: all(one.done for one in devices), 20, "every frame is receipted")
    assert sorted(stored_frames(store)) == sorted(("5b001", s) for s in range(1, 41) for _ in range(3))
    assert {one.receipts[-1].stored_through for one in devices} == {40}


def test_duplicates_are_harmless(start, device, sender):
    running, store = start()
    for _ in range(3):
        for sequence in range(1, 11):
            sender.publish(topics.activations("d"), make_payload("d", sequence))
    wait_until(lambda: running.gateway.writer.counters.duplicates == 20, 10, "20 duplicates are counted")
    assert len(stored_frames(store)) == 10


def test_one_line_tells_why_frames_are_rejected(start, device, caplog):
    _, store = start(registered=False)
    one = device("d", {s: make_payload("d", s) for s in range(1, 11)})
    wait_until(lambda: one.done, 20, "every frame is receipted")

    def told() -> list[str]:
        return [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]

    wait_until(  # by the main thread, which the frames do not wait for
        lambda: [words for words in told() if "no backbone is registered" in words and "coordinator backbone register" in words], 20, "it says what is missing"
    )
    assert len([words for words in told() if words.startswith("rejected a message of d (kept;")]) == 1
    lines = device_lines(store)
    assert "10 rejected" in lines[0]
    assert "coordinator rejections list --device d" in lines[1]


@pytest.mark.parametrize("poison_count", [20, 1000])
def test_poison_does_not_stall_good_frames(start, device, sender, poison_count):
    """Each bad message is kept with its reason, receipted where its name is known, and acknowledged."""
    running, store = start()
    for n in range(poison_count):
        good = make_payload("bad", n + 1, spool="5bad")
        bad = (b"no frame at all %d" % n, good[:-3], good[:50] + bytes(len(good) - 50), good + b"more")[n % 4]
        sender.publish(topics.activations("bad"), bad, properties={"spool": "5bad", "sequence": str(n + 1)})
    one = device("d", {s: make_payload("d", s) for s in range(1, 101)})
    wait_until(lambda: one.done, 60, "100 good frames are receipted")
    wait_until(lambda: running.gateway.writer.counters.rejected >= poison_count, 30, "all poison is set aside")
    assert len(stored_frames(store)) == 100
    with store.read() as session:
        kept = rejections(session, "bad", 2000)
    assert len(kept) == poison_count
    assert all(row.reason for row in kept)


def test_a_damaged_frame_is_receipted_with_its_reason(start, device):
    _, _store = start()
    payloads = {s: make_payload("d", s) for s in (1, 2, 3)}
    payloads[2] = payloads[2][:-1] + bytes([payloads[2][-1] ^ 0xFF])
    one = device("d", payloads)
    wait_until(lambda: one.done, 10, "all three are receipted")
    receipt = one.receipts[-1]
    assert receipt.stored_through == 3
    assert receipt.rejected[0][0] == 2
    assert receipt.rejected[0][1]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"labels": (0, 3)}, "3 labels"),
        ({"layers": (2, 3)}, "layers 2, 3"),
        ({"width": 16}, "width 16"),
        ({"plan": TapPlan(version=1, labels=("a", "b", "c"), blocks=2, codec="int8")}, "codec int8"),
        ({"plan": TapPlan(version=9, labels=("a", "b", "c"), blocks=2)}, "tap plan 9"),
    ],
)
def test_frames_that_no_plan_allows_are_rejected(start, device, options, reason):
    _, store = start()
    one = device("d", {1: make_payload("d", 1, **options)})
    wait_until(lambda: one.done, 10, "it is receipted")
    assert reason in one.receipts[-1].rejected[0][1]
    assert stored_frames(store) == []


def test_messages_on_topics_that_are_no_devices_are_acknowledged_and_counted(start, device, sender):
    running, store = start()
    for owner in ("fleet", "not a name", "%"):
        sender.publish(f"mobillm/v1/{owner}/up/activations", make_payload("d", 1))
        sender.publish(f"mobillm/v1/{owner}/up/health", b"x")
    one = device("d", {1: make_payload("d", 1)})
    wait_until(lambda: one.done, 10, "a good frame behind them is receipted")
    wait_until(lambda: running.gateway.writer.counters.unattributable == 6, 10, "they are counted")
    assert stored_frames(store) == [("5b001", 1)]


def test_a_frame_under_another_devices_topic_is_rejected(start, device):
    _, store = start()
    one = device("liar", {1: make_payload("honest", 1)})
    wait_until(lambda: one.done, 10, "it is receipted")
    assert "honest" in one.receipts[-1].rejected[0][1]
    assert stored_frames(store) == []


def test_frames_of_an_unregistered_backbone_can_be_retried_after_registration(start, device):
    _, store = start(registered=False)
    one = device("d", {s: make_payload("d", s) for s in range(1, 6)})
    wait_until(lambda: one.done, 10, "all are receipted")
    assert "coordinator backbone register" in one.receipts[-1].rejected[0][1]
    with store.write() as session:
        register_backbone(session, MANIFEST)
    result = retry_rejections(store, max_body_bytes=1_000_000)
    assert (result.stored, result.samples, result.still_rejected) == (5, 10, 0)
    assert len(stored_frames(store)) == 5
    later = device("e", {1: make_payload("e", 1)})
    wait_until(lambda: later.done, 10, "the gateway knows the backbone without a restart")
    assert later.receipts[-1].rejected == ()


def test_parts_are_joined_and_receipted(start, device):
    _, store = start()
    whole = make_payload("d", 1, samples=200)
    parts = split_frame(whole, 2048)
    assert len(parts) > 3
    one = device("d", dict(enumerate(parts, start=1)))
    wait_until(lambda: one.done, 10, "all parts are receipted")
    assert stored_frames(store) == [("5b001", 1)]


def test_health_is_recorded_and_brings_a_receipt(start, device, sender):
    _, store = start()
    info = BackboneInfo(MANIFEST.fingerprint, "bert", 4, 32, "float")
    count = SpoolCount("5b001", 10, 0, 0, 10, 0, 0, 0.0, floor=6, next_sequence=6)
    sender.publish(topics.health("d"), Health("online", "s1", 1e9, backbone=info, spool=count).to_bytes(), retain=True)
    one = device("d", {6: make_payload("d", 6)})
    wait_until(lambda: one.done, 10, "the frame is receipted")
    wait_until(lambda: one.receipts[-1].stored_through == 6, 10, "the floor closes the gap")
    sender.publish(topics.health("d"), b"broken")
    wait_until(lambda: _reasons(store), 10, "a broken report is set aside")


def _reasons(store):
    with store.read() as session:
        return [row.reason for row in rejections(session)]


def test_while_the_store_is_locked_nothing_is_acknowledged_and_then_all_is_stored(start, device, monkeypatch):
    _, store = start()
    monkeypatch.setattr("coordinator.store.engine._BUSY_TIMEOUT_SECONDS", 0.2)
    path = store.url.database
    blocker = sqlite3.connect(path, isolation_level=None)
    store._writer.dispose()  # the shorter patience applies to new connections
    blocker.execute("BEGIN IMMEDIATE")
    one = device("d", {s: make_payload("d", s) for s in range(1, 101)})
    wait_until(lambda: one.sent >= 16, 10, "frames are sent")
    wait_until(lambda: one.sent > 16, 10, "and sent again")
    assert one.receipts == []
    blocker.execute("COMMIT")
    blocker.close()
    wait_until(lambda: one.done, 30, "all are receipted")
    assert sorted(stored_frames(store)) == [("5b001", s) for s in range(1, 101)]


def test_a_full_disk_is_said_once_and_nothing_is_lost(start, device, caplog):
    """SQLite's own page limit stands in for the disk: the same error, on the same path."""
    _, store = start()

    def limit(pages):
        with store.write() as session:
            session.execute(text(f"PRAGMA max_page_count = {pages}"))

    caplog.set_level("INFO")
    limit(1)  # SQLite makes this the present size: not one page more
    one = device("d", {s: make_payload("d", s, samples=40) for s in range(1, 201)})
    wait_until(lambda: "nothing is stored or acknowledged for now" in caplog.text, 20, "the gateway says so")
    wait_until(lambda: one.sent > 20, 10, "the device sends again")
    assert caplog.text.count("nothing is stored or acknowledged for now") == 1
    assert len(stored_frames(store)) < 200
    limit(1_000_000_000)
    wait_until(lambda: one.done, 60, "all are receipted")
    assert sorted(stored_frames(store)) == [("5b001", s) for s in range(1, 201)]
    assert "the store works again" in caplog.text


def test_a_broker_that_lost_everything_gets_receipts_and_plans_again(start, device, broker):
    start()
    one = device("d", {s: make_payload("d", s) for s in range(1, 11)})
    wait_until(lambda: one.done, 10, "all are receipted")
    broker.kill()
    broker.start()
    seen = {}
    late = BrokerConnection(
        broker.settings,
        "late",
        subscriptions=[topics.receipt("d"), topics.fleet_plan()],
        on_message=lambda message: seen.setdefault(message.topic, message.payload),
    )
    late.start()
    wait_until(lambda: len(seen) == 2, 20, "the receipt and the plan are back")
    late.stop()
    assert TapPlan.from_bytes(seen[topics.fleet_plan()]).blocks == 2


def test_a_dead_writer_ends_the_gateway_with_its_reason(start, monkeypatch):
    running, _ = start()
    def die() -> float:
        raise RuntimeError("the disk sings")

    monkeypatch.setattr(running.gateway._receipts, "due_in", die)
    wait_until(lambda: running.error, 10, "the gateway ends")
    error, running.error = running.error, None
    assert "the disk sings" in str(error)


def test_a_certificate_counts_as_seen_once_its_device_reports_with_it(start, device):
    running, store = start()
    with store.write() as session:
        for name in ("kitchen", "attic"):
            add_claim(session, f"claim-{name}", name, serial="1", at=now(), expires_at=now(), actor="operator")
        for serial in ("2a", "2b"):
            add_certificate(
                session, serial=serial, device="kitchen", key_digest=serial, pem=b"", issued_at=now(), expires_at=now(), claim=None
            )
    connection = BrokerConnection(running.gateway.connection.settings, "kitchen")
    connection.start()
    wait_until(lambda: connection.connected, 30)
    for name, serial in (("attic", "2a"), ("kitchen", "no such"), ("kitchen", "2B")):
        connection.publish(topics.health(name), Health("online", "s1", 1.0, certificate_serial=serial).to_bytes(), retain=True)

    def seen():
        with store.read() as session:
            return {row.serial for row in certificates_of(session, "kitchen") if row.seen_at is not None}

    wait_until(seen, 30, "the certificate is seen")
    assert seen() == {"2b"}, "another device's word does not count"
    connection.stop()


def test_frames_of_a_revoked_device_are_kept_apart_until_it_is_let_in_again(start, device):
    running, store = start()
    with store.write() as session:
        add_claim(session, "claim-1", "kitchen", serial="1", at=now(), expires_at=now(), actor="operator")
    early = device("kitchen", {1: make_payload("kitchen", 1)})
    wait_until(lambda: stored_frames(store) == [("5b001", 1)], 30, "the first frame is stored")
    early.stop()
    with store.write() as session:
        revoke_device(session, "kitchen", at=now(), actor="operator")
    threading.Event().wait(1.1)  # what the gateway knows is at most a second old
    late = device("kitchen", {2: make_payload("kitchen", 2)})
    wait_until(lambda: late.done, 30, "it is receipted as rejected")
    assert late.receipts[-1].rejected[0][0] == 2
    assert "revoked" in late.receipts[-1].rejected[0][1]
    max_bytes = running.gateway._settings.gateway.max_body_bytes
    assert retry_rejections(store, max_body_bytes=max_bytes).still_rejected == 1
    with store.write() as session:
        readmit_device(session, "kitchen", at=now(), actor="operator")
    assert retry_rejections(store, max_body_bytes=max_bytes).stored == 1
    assert stored_frames(store) == [("5b001", 1), ("5b001", 2)]
