"""A signal sets the event wherever the main thread is just then, also within the event's own lock."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import os, signal
from side_tuning.stop_signals import stop_event
stop = stop_event()
with stop._cond:  # where `stop.wait` is for a moment, each time
    os.kill(os.getpid(), signal.SIGTERM)
assert stop.wait(60)
print("stopped in order")
"""


def test_a_signal_that_comes_while_the_events_lock_is_held_does_not_hang():
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=120)
    assert done.stdout == "stopped in order\n", done.stderr
