"""The publisher through real brokers: every frame reaches the receiver and leaves the spool, whatever dies on the way."""

from __future__ import annotations

import itertools
import logging
import threading
import time

import numpy as np
import pytest

from edge_agent.publisher import Publisher
from edge_agent.spool import Spool
from side_tuning.broker_connection import BrokerConnection
from side_tuning.wire import topics
from side_tuning.wire.codecs import encode_vectors
from side_tuning.wire.frame import Frame, SampleInfo, Tap, encode_frame, split_frame
from side_tuning.wire.messages import Receipt
from tests.brokers import amqtt, mosquitto, needs_mosquitto
from tests.receiving import Receiver
from tests.slow_link import slow_uplink
from tests.waiting import wait_until

pytestmark = pytest.mark.broker

DEVICE = "kitchen"
sample_numbers = itertools.count()


@pytest.fixture
def broker(tmp_path):
    with mosquitto(tmp_path) as running:
        yield running


class Device:
    """A spool with a publisher, and nothing else of the agent."""

    def __init__(self, folder, settings, *, device=DEVICE, max_bytes=1 << 30, **options):
        self.spool = Spool.open(folder / "spool.db", max_bytes=max_bytes, policy="pause", clock=time.time)
        self.connection = BrokerConnection(
            settings,
            device,
            subscriptions=[topics.receipt(device)],
            on_message=lambda message: self.publisher.offer_receipt(message.payload),
            on_connected=lambda connected: self.publisher.connected(connected),  # noqa: PLW0108 - made below
            reconnect_min_seconds=0.05,
        )
        self.device = device
        self.publisher = Publisher(self.connection, self.spool, device, **options)
        self.stop = threading.Event()
        self.thread = threading.Thread(target=self.publisher.run, args=(self.stop,))

    def __enter__(self):
        self.connection.start()
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.stop.set()
        self.publisher.wake()
        self.thread.join()
        self.connection.stop()
        self.spool.close()

    def append(self, count, width=64, part_bytes=1 << 20):
        for _ in range(count):
            samples = [f"{next(sample_numbers):016x}"]
            self.spool.append(samples, lambda n, produced, ids=samples: split_frame(self.frame(n, produced, ids, width), part_bytes))
            self.publisher.wake()

    def frame(self, sequence, produced, ids, width):
        values = np.random.default_rng(sequence).standard_normal((1, width), dtype=np.float32)
        tap = Tap(2, 1, width, "fp16", 0, None, encode_vectors(values, "fp16", 0))
        infos = tuple(SampleInfo(sample, 0, "train", 3) for sample in ids)
        return encode_frame(Frame(self.device, self.spool.id, sequence, time.time(), "ab" * 16, 1, "pooled", "mean", produced, infos, (tap,)))

    def empty(self):
        return self.spool.count().spooled_frames == 0


@needs_mosquitto
def test_frames_leave_the_spool_on_receipts_and_carry_their_identity(broker, tmp_path):
    with Receiver(broker.settings, DEVICE) as receiver, Device(tmp_path, broker.settings) as device:
        device.append(50)
        wait_until(device.empty, 20, "all receipted")
        assert receiver.order == list(range(1, 51)), "each once, in order"
        assert receiver.properties[6] == {"spool": device.spool.id, "sequence": "7"}
        count = device.spool.count()
        assert (count.produced, count.receipted, count.spooled) == (50, 50, 0)
        assert device.spool.bytes_sent > 50 * 128


@needs_mosquitto
def test_a_puback_frees_nothing_and_the_window_is_bounded(broker, tmp_path):
    with Receiver(broker.settings, DEVICE) as receiver, Device(tmp_path, broker.settings, window_frames=16) as device:
        receiver.silent = True
        device.append(60)
        wait_until(lambda: len(receiver.order) >= 16, 10, "the window is sent")
        assert device.spool.count().spooled_frames == 60
        assert len(receiver.order) == 16, "no more than the window without a receipt"
        receiver.silent = False
        receiver.send_receipts()
        wait_until(device.empty, 20, "receipts move the window on")
        assert len(receiver.frames) == 60


@needs_mosquitto
def test_frames_without_a_receipt_are_sent_again_with_back_off(broker, tmp_path):
    with Receiver(broker.settings, DEVICE) as receiver, Device(tmp_path, broker.settings, resend_seconds=0.2) as device:
        receiver.silent = True
        device.append(1)
        wait_until(lambda: len(receiver.order) == 4, 20, "three more sends")
        receiver.silent = False
        wait_until(device.empty, 20, "the next copy is receipted")
        assert receiver.arrivals[device.spool.id, 1] <= 6


@needs_mosquitto
def test_nothing_is_lost_or_left_over_when_the_broker_is_killed_again_and_again(broker, tmp_path):
    with Receiver(broker.settings, DEVICE) as receiver, Device(tmp_path, broker.settings, resend_seconds=1) as device:
        for _ in range(5):
            device.append(40)
            wait_until(lambda: receiver.order, 10, "something arrives")
            broker.kill()
            device.append(20)
            broker.start()
        wait_until(device.empty, 60, "all receipted")
        assert sorted(sequence for _, sequence in receiver.frames) == list(range(1, 301))
        assert len(receiver.sample_ids()) == len(set(receiver.sample_ids())) == 300


@needs_mosquitto
def test_a_broker_that_drops_behind_success_loses_nothing(tmp_path):
    """FIELD fact 2: the receiver away, max_queued_messages 5, and every PUBACK says success."""
    config = "max_queued_messages 5\nmax_inflight_messages 5"
    with mosquitto(tmp_path, config) as broker:
        with Receiver(broker.settings, DEVICE) as receiver:
            wait_until(lambda: receiver.connection.connected, 5, "the session exists")
        with Device(tmp_path, broker.settings, window_frames=32, resend_seconds=1) as device:
            device.append(300)
            wait_until(lambda: device.publisher._turn >= 32, 10, "the whole window went into the void")
            with Receiver(broker.settings, DEVICE) as receiver:
                wait_until(device.empty, 60, "all receipted")
                assert sorted(sequence for _, sequence in receiver.frames) == list(range(1, 301))


@needs_mosquitto
def test_the_retained_receipt_spares_the_resending(broker, tmp_path):
    """The device was away while its frames were receipted: the receipt waits for it at the broker."""
    with Receiver(broker.settings, DEVICE) as receiver:
        with Device(tmp_path, broker.settings) as device:
            receiver.silent = True
            device.append(10)
            wait_until(lambda: len(receiver.order) == 10, 10, "arrived, not receipted")
        receiver.send_receipts()
        with Device(tmp_path, broker.settings) as device:
            wait_until(device.empty, 10, "receipted without another send")
            assert len(receiver.order) == 10


@needs_mosquitto
def test_receipts_of_another_spool_and_broken_ones_change_nothing(broker, tmp_path):
    with Receiver(broker.settings, DEVICE) as receiver, Device(tmp_path, broker.settings) as device:
        receiver.silent = True
        device.append(3)
        device.publisher.offer_receipt(b"\xc1 not msgpack")
        device.publisher.offer_receipt(Receipt("another", 1000).to_bytes())
        wait_until(lambda: len(receiver.order) == 3, 10, "still sending")
        assert device.spool.count().spooled_frames == 3


@needs_mosquitto
def test_rejections_for_one_reason_are_told_once(broker, tmp_path, caplog):
    caplog.set_level(logging.DEBUG, "edge_agent.publisher")
    with Receiver(broker.settings, DEVICE) as receiver, Device(tmp_path, broker.settings) as device:
        receiver.silent = True
        device.append(3)
        wait_until(lambda: len(receiver.order) == 3, 10, "all sent")
        reason = "backbone {} is not registered; run `coordinator backbone register FOLDER`"
        device.publisher.offer_receipt(Receipt(device.spool.id, 3, rejected=tuple((n, reason.format("ab" * 16)) for n in (1, 2, 3))).to_bytes())
        wait_until(device.empty, 10, "the spool is empty")
    told = [record.levelname for record in caplog.records if "not registered" in record.message]
    assert told == ["ERROR", "DEBUG", "DEBUG"]


@needs_mosquitto
def test_a_frame_over_the_brokers_limit_does_not_block_those_behind_it(tmp_path):
    with (
        mosquitto(tmp_path, "max_packet_size 20000") as broker,
        Receiver(broker.settings, DEVICE) as receiver,
        Device(tmp_path, broker.settings) as device,
    ):
        device.append(1, width=20_000)
        device.append(5)
        wait_until(lambda: len(receiver.frames) == 5, 10, "the small ones arrive")
        wait_until(lambda: device.spool.count().spooled_frames == 1, 10, "only the large one waits")
        assert device.connection.epoch == 1, "no reconnect loop"
        assert "limit of 20000" in device.publisher.error
        assert device.publisher.frame_bytes(131_072) < 20_000
        broker.stop()
        config = broker.log.with_suffix(".conf")
        config.write_text(config.read_text().replace("max_packet_size 20000", ""))
        broker.start()
        wait_until(device.empty, 20, "the broker's limit is gone, the large one goes through")


@needs_mosquitto
def test_a_refused_topic_is_told_and_nothing_is_lost(tmp_path):
    rules = tmp_path / "acl"
    rules.write_text("topic read #\n")
    with mosquitto(tmp_path, f"acl_file {rules}") as broker, Device(tmp_path, broker.settings) as device:
        device.append(2)
        wait_until(lambda: "Not authorized" in device.publisher.error, 10, "the refusal is told")
        assert device.spool.count().spooled_frames == 2


def test_works_through_a_broker_that_knows_only_3_1_1(tmp_path):
    with amqtt(tmp_path) as broker, Receiver(broker.settings, DEVICE, persistent=False) as receiver:
        wait_until(lambda: receiver.connection.connected, 20, "receiver")
        with Device(tmp_path, broker.settings) as device:
            device.append(30)
            wait_until(device.empty, 30, "all receipted")
            assert len(receiver.frames) == 30


@needs_mosquitto
def test_large_frames_travel_in_parts_and_join(broker, tmp_path):
    with Receiver(broker.settings, DEVICE) as receiver, Device(tmp_path, broker.settings) as device:
        device.append(2, width=30_000, part_bytes=10_000)
        wait_until(device.empty, 20, "all receipted")
        assert len(receiver.frames) > 10
        assert len(receiver.whole_frames()) == 2


def link_settings(broker, port):
    return broker.settings.model_copy(update={"port": port, "keepalive_seconds": 5})


@pytest.mark.slow
@needs_mosquitto
def test_a_frame_that_takes_longer_than_two_keepalives_is_delivered(broker, tmp_path):
    """FIELD fact 4: paho alone would reconnect and start it again for ever. 128 KiB at 10 kB/s take 13 s, the keepalive is 5 s."""
    with (
        slow_uplink(broker.port, 10_000) as port,
        Receiver(broker.settings, DEVICE) as receiver,
        Device(tmp_path, link_settings(broker, port)) as device,
    ):
        device.append(1, width=65_000)
        wait_until(device.empty, 60, "delivered")
        assert device.connection.keepalive_seconds > 13
        assert receiver.arrivals[device.spool.id, 1] == 1
        assert device.publisher.frame_bytes(131_072) < 131_072, "frames closed from now on are smaller"


@pytest.mark.slow
@needs_mosquitto
def test_a_slow_link_is_used_fully_without_a_disconnect(broker, tmp_path):
    """1 MB at 100 kB/s with a keepalive of 5 s: ideally 10 s; at most 1.3 times that, and the connection holds."""
    with (
        slow_uplink(broker.port, 100_000) as port,
        Receiver(broker.settings, DEVICE) as receiver,
        Device(tmp_path, link_settings(broker, port)) as device,
    ):
        wait_until(lambda: device.connection.connected, 10, "connected")
        started = time.monotonic()
        device.append(16, width=32_000)
        wait_until(device.empty, 60, "delivered")
        seconds = time.monotonic() - started
        assert device.connection.epoch == 1
        assert max(receiver.arrivals.values()) == 1
        assert seconds < 1.3 * 16 * 64_500 / 100_000 + 1.5, f"took {seconds:.1f} s"
        assert device.publisher.link.goodput == pytest.approx(100_000, rel=0.3)
