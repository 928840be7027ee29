"""The running fleet of a demonstration: its processes, its phases, and the one power cut.

Everything is started, watched and ended from one thread: a child ends with the thread that started it.
"""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from coordinator.demonstration.errors import DemoError
from coordinator.demonstration.fleet import DemoDevice
from coordinator.demonstration.language import Writer
from coordinator.demonstration.observation import Observation, observe
from coordinator.demonstration.options import Options
from coordinator.demonstration.processes import Child, end_all
from coordinator.demonstration.view import View
from coordinator.settings import CoordinatorSettings
from coordinator.store.engine import Store
from coordinator.store.errors import StoreUnavailable
from side_tuning.broker_connection import BrokerConnection
from side_tuning.wire import topics
from side_tuning.wire.messages import Command

# Shares of --seconds; `fleet.make_devices` paces the devices to be done well before PRODUCING_ENDS.
PRODUCING_ENDS = 0.7  # then what is left stays on the devices
POWER_CUT_AFTER = 0.35  # of one device's samples
POWER_CUT_LASTS = 0.07

LOOK_SECONDS = 0.5
STARTING_SECONDS = 120.0
CONNECTING_SECONDS = 10.0
DRAINING_SECONDS = 60.0
DELIVERING_SECONDS = 30.0
GOODBYE_SECONDS = 8.0
STALLED_SECONDS = 10.0  # the trainer has neither stepped nor saved for so long: it is done


class RunningFleet:
    """The running fleet: its processes, and what has been seen of it."""

    def __init__(self, options: Options, settings: CoordinatorSettings, config: Path, devices: Sequence[DemoDevice], *, store: Store, view: View) -> None:
        self.options = options
        self.folder = config.parent
        self.settings = settings
        self.devices = devices
        self.store = store
        self.view = view
        self.seen: Observation | None = None
        self.seconds = 0.0
        self.first_sample_seconds: float | None = None
        self.start_up_seconds: dict[str, float] = {}
        self.peak_rss_bytes: dict[str, int] = {}
        program = [sys.executable, "-m", "coordinator.cli", "run", "--config", str(config), "--broker", options.broker]
        program.append("--no-dashboard" if options.dashboard is None else "--dashboard")
        self._coordinator = Child("coordinator", program, self.folder / "coordinator.log")
        self._agents = {device.name: device.agent() for device in devices}
        self.writer = Writer(devices[0], options.prompt, self.folder) if options.task == "causal-lm" else None
        self._began = time.monotonic()
        self._began_at = time.time()
        self._arriving_since = self._began  # the clock of --seconds starts with the first sample
        # The power of one device is cut: which, and when it is to come back.
        self._victim = devices[min(1, len(devices) - 1)]
        self._victim_returns_at: float | None = None
        self._power_was_cut = False
        self._trainer_state: tuple[int, int, float] = (0, 0, 0.0)

    def run(self) -> bool:
        """All phases up to the end of the processes; False if it was interrupted."""
        try:
            self._start()
            self._produce()
            self._drain()
            self._train()
            self._deliver()
            complete = True
        except KeyboardInterrupt:
            self.view.say("interrupted: ending every process")
            complete = False
        finally:
            self.seconds = time.monotonic() - self._began
            previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
            try:
                self._stop()
            finally:
                signal.signal(signal.SIGINT, previous)
        return complete

    def _start(self) -> None:
        self.view.phase(f"starting {self.options.broker} broker, gateway, trainer and {len(self.devices)} devices (logs: {self.folder})")
        if self.options.dashboard is not None:
            self.view.say(f"the dashboard: http://127.0.0.1:{self.options.dashboard}/")
        self._began, self._began_at = time.monotonic(), time.time()
        self._coordinator.start()
        for agent in self._agents.values():
            agent.start()
        if not self._watch(lambda seen: seen.totals.samples_stored > 0, self._began + STARTING_SECONDS):
            raise DemoError(
                f"no sample arrived within {STARTING_SECONDS:.0f} s. The coordinator last said:\n{self._coordinator.last_words()}\n"
                f"{self._victim.name} last said:\n{self._agents[self._victim.name].last_words()}"
            )
        self._arriving_since = time.monotonic()
        self.first_sample_seconds = self._arriving_since - self._began

    def _produce(self) -> None:
        self.view.phase("devices run their samples forward, once each; the trainer learns as they arrive")
        ended = self._watch(self._all_produced, self._arriving_since + PRODUCING_ENDS * self.options.seconds)
        if self._victim_returns_at is not None:  # so short a run that it is still away
            self._bring_back()
        if not ended:
            self.view.say("time for producing is over: the devices pause with the rest of their data unread")
            self._pause_all()

    def _drain(self) -> None:
        self.view.phase("devices empty their spools")
        if not self._watch(self._all_drained, time.monotonic() + DRAINING_SECONDS):
            self.view.say("some samples are still in the spools; the ledger says where")

    def _train(self) -> None:
        self.view.phase("the trainer uses what it has not used enough")
        self._trainer_state = (0, 0, time.monotonic())
        if not self._watch(self._trained, self._arriving_since + self.options.seconds):
            self.view.say("time is over: the newest checkpoint counts (more --seconds give it more training)")

    def _deliver(self) -> None:
        self.view.phase("every device fetches and verifies the checkpoint")
        if not self._watch(self._delivered, time.monotonic() + DELIVERING_SECONDS):
            self.view.say("not every device has the newest checkpoint; each is measured with the one that it has")

    def _stop(self) -> None:
        if self.writer is not None:
            self.writer.end()
        end_all(list(self._agents.values()))
        deadline = time.monotonic() + GOODBYE_SECONDS
        while self._coordinator.running and time.monotonic() < deadline:
            seen = self._look(check=False)
            if seen is not None and all(self._said_goodbye(seen, device) for device in self.devices):
                break
            time.sleep(LOOK_SECONDS / 2)
        self._coordinator.end(30.0)
        self._look(check=False)

    # Watching.

    def _watch(self, until: Callable[[Observation], bool], deadline: float) -> bool:
        """Show what happens until it is `until` (True) or the deadline has passed."""
        while True:
            seen = self._look()
            if seen is not None and until(seen):
                return True
            if time.monotonic() >= deadline:
                return False
            time.sleep(LOOK_SECONDS)

    def _look(self, *, check: bool = True) -> Observation | None:
        if check:
            self._coordinator.check()
            for agent in self._agents.values():
                agent.check()
        try:
            self.seen = observe(self.store)
        except StoreUnavailable:
            return None  # in a moment
        self._note_health(self.seen)
        self.view.show(self.seen)
        if check:
            self._cut_power_once(self.seen)
            if self.writer is not None and (written := self.writer.look(self.seen)):
                self.view.say(written)
        return self.seen

    def _note_health(self, seen: Observation) -> None:
        for name, one in seen.devices.items():
            if one.health is None:
                continue
            if one.health.started_at:
                self.start_up_seconds.setdefault(name, one.health.started_at - self._began_at)
            self.peak_rss_bytes[name] = max(self.peak_rss_bytes.get(name, 0), one.health.peak_rss_bytes or 0)

    def _all_produced(self, seen: Observation) -> bool:
        return all(seen.produced(device.name) + seen.refused(device.name) >= device.samples for device in self.devices)

    def _all_drained(self, seen: Observation) -> bool:
        return seen.totals.ledger.settled and not any(seen.spooled(device.name) for device in self.devices)

    def _trained(self, seen: Observation) -> bool:
        newest, knobs = seen.newest, self.settings.training.of_task(self.settings.task.kind)
        step = 0 if newest is None else newest.step
        if self._trainer_state[:2] != (step, seen.step):
            self._trainer_state = (step, seen.step, time.monotonic())
        if newest is None:
            return False
        known = newest.metrics.get("train_samples", 0) + newest.metrics.get("held_out_samples", 0)
        spent = (step + 1) * knobs.batch_size > knobs.replay_ratio * newest.metrics.get("train_samples", 0)
        stalled = step == seen.step and time.monotonic() - self._trainer_state[2] > STALLED_SECONDS
        return (known >= seen.totals.samples_stored and spent) or stalled

    def _delivered(self, seen: Observation) -> bool:
        if seen.newest is None or seen.published is None or seen.published.generation != seen.newest.generation:
            return False
        healths = [seen.devices[device.name].health for device in self.devices if device.name in seen.devices]
        return all(health is not None and health.checkpoint == seen.newest.generation for health in healths)

    def _said_goodbye(self, seen: Observation, device: DemoDevice) -> bool:
        health = seen.devices[device.name].health if device.name in seen.devices else None
        return health is None or health.presence == "offline"

    # What happens to the devices.

    def _cut_power_once(self, seen: Observation) -> None:
        if not self._power_was_cut and seen.produced(self._victim.name) >= POWER_CUT_AFTER * self._victim.samples:
            self._power_was_cut = True
            self._agents[self._victim.name].kill()
            self._victim_returns_at = time.monotonic() + max(5.0, POWER_CUT_LASTS * self.options.seconds)
            self.view.say(f"{self._victim.name} loses its power (kill -9)")
        elif self._victim_returns_at is not None and time.monotonic() >= self._victim_returns_at:
            self._bring_back()

    def _bring_back(self) -> None:
        self._victim_returns_at = None
        self._agents[self._victim.name].start()
        self.view.say(f"{self._victim.name} comes back and goes on where it was")

    def _pause_all(self) -> None:
        connection = BrokerConnection(self.settings.broker, "demonstration")
        connection.start()
        deadline = time.monotonic() + CONNECTING_SECONDS
        try:
            while not connection.connected and time.monotonic() < deadline:
                time.sleep(0.05)
            for device in self.devices:
                command = Command(f"pause-{device.name}", "pause", time.time() + 600)
                if not connection.publish(topics.command(device.name), command.to_bytes()).wait(10):
                    self.view.say(f"{device.name} could not be told to pause: {connection.last_error or 'no acknowledgement'}")
        finally:
            connection.stop()
