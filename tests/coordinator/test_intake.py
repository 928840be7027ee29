"""The queue between network and writer: bounded, in order, and full without stalling."""

import threading

from coordinator.intake import Intake
from side_tuning.broker_connection import Message
from tests.coordinator.fleet import now


def message(n, size=10):
    return Message(f"t/{n}", bytes(size), retain=False, epoch=1, mid=n, qos=1)


def fill(intake, count, size=10):
    for n in range(count):
        intake.put(message(n, size), now())


def take(intake, most=100, gather=0.0):
    return intake.take(most, wait_seconds=0, gather_seconds=gather)


def test_messages_come_out_in_order_and_in_batches():
    intake = Intake(100, 1000)
    fill(intake, 10)
    assert [a.message.mid for a in take(intake, 4)] == [0, 1, 2, 3]
    assert [a.message.mid for a in take(intake)] == [4, 5, 6, 7, 8, 9]
    assert take(intake) == []


def test_a_full_queue_keeps_the_place_of_a_message_but_not_its_payload():
    """So that it is acknowledged in its turn; by count and by bytes."""
    for intake in (Intake(3, 1000), Intake(100, 30)):
        fill(intake, 5)
        taken = take(intake)
        assert [a.dropped for a in taken] == [False, False, False, True, True]
        assert [len(a.message.payload) for a in taken] == [10, 10, 10, 0, 0]
        assert intake.dropped == 2
        fill(intake, 3)
        assert not any(a.dropped for a in take(intake))


def test_one_message_larger_than_the_limit_passes_an_empty_queue():
    intake = Intake(10, 100)
    intake.put(message(1, 500), now())
    assert not take(intake)[0].dropped


def test_a_closed_queue_takes_nothing_in_and_gives_out_the_rest():
    intake = Intake(10, 100)
    fill(intake, 2)
    intake.close()
    fill(intake, 2)
    assert len(take(intake)) == 2
    assert take(intake) == []
    assert intake.dropped == 0


def test_a_waiting_taker_is_woken():
    intake = Intake(10, 100)
    got = []
    taker = threading.Thread(target=lambda: got.extend(intake.take(5, wait_seconds=30, gather_seconds=0)))
    taker.start()
    intake.put(message(7), now())
    taker.join(10)
    assert [a.message.mid for a in got] == [7]
