"""MAIN FLOW of the device: samples -> backbone -> taps -> codec -> spool -> publisher -> receipt.

Read `run`, then `Agent.run`, then `Agent._take_samples`; everything else is detail. Rules: the network thread only leaves
messages where a loop picks them up; each loop is a named thread, started and joined in `Agent.run`, and one that dies takes
the program down with its reason; a sample's mark and its frame reach the disk in one transaction, so nothing is sent twice
(a crash costs at most the forward pass of the frame that was open).
"""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import replace

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from edge_agent import exit_codes
from edge_agent.backbone import Backbone
from edge_agent.backbone_wait import load_or_fetch
from edge_agent.checkpoint_store import CheckpointStore
from edge_agent.checkpoints import CheckpointReceiver
from edge_agent.first_steps import FirstSteps
from edge_agent.forward import tap_samples
from edge_agent.health import agent_version, read_readings
from edge_agent.identity import certificate_in
from edge_agent.memory import return_memory_early
from edge_agent.open_frame import OpenFrame, TappedSample
from edge_agent.publisher import Publisher
from edge_agent.renewal import Renewal
from edge_agent.samples import Refusal, Sample, SampleSource, open_sources
from edge_agent.sd_notify import notify, watchdog_seconds
from edge_agent.settings import AgentSettings
from edge_agent.spool import Spool, SpoolFull
from edge_agent.tap_plans import TapPlans
from edge_agent.trusted_clock import TrustedClock
from side_tuning.alive import touch_alive
from side_tuning.broker_connection import BrokerConnection, Connected, Message
from side_tuning.signatures import load_public_key
from side_tuning.wire import topics
from side_tuning.wire.bounded import FrameError
from side_tuning.wire.messages import Command, DeviceStep, Health, Presence, TapPlan

logger = logging.getLogger(__name__)

IDLE_SECONDS = 0.2  # between two looks at sources that had nothing
HUNG_SECONDS = 300.0  # a loop silent for longer counts as hung; one forward pass on a slow device takes far less
SETTLE_SECONDS = 0.2
TOUCH_SECONDS = 10.0  # between two touches of the alive file: a memory card should not notice
SPOOL_FULL = "the spool is full"
SESSION_SECONDS = 24 * 3600  # commands wait at the broker for this long


def run(settings: AgentSettings, stop: threading.Event) -> int:
    """Run the agent until `stop` is set or, if so configured, everything is delivered; returns the exit code.

    Raises:
        BackboneError, SpoolError, SignatureError, BrokerFilesError: it cannot start; the text says the cure.

    """
    return_memory_early()
    with ExitStack() as cleanup:
        key_file = settings.checkpoint.public_key_file
        public_key = load_public_key(key_file) if key_file else None
        first_steps = FirstSteps(settings.state_directory)  # before the spool, whose file tells that a device is in use
        first_steps.settle(clock_right=False)
        backbone = load_or_fetch(settings, public_key, first_steps, stop)
        if backbone is None:
            return exit_codes.OK
        first_steps.note("backbone")
        spool = Spool.open(settings.spool_path, max_bytes=settings.spool.max_bytes, policy=settings.spool.policy, clock=time.time)
        cleanup.callback(spool.close)
        sources = open_sources(settings.sources, spool.seen, state_directory=settings.state_directory)
        for source in sources:
            cleanup.callback(source.close)
        return Agent(settings, backbone, spool, sources, public_key, first_steps=first_steps).run(stop)


class Agent:
    """The running device program: its loops and what they share."""

    def __init__(
        self,
        settings: AgentSettings,
        backbone: Backbone,
        spool: Spool,
        sources: list[SampleSource],
        public_key: Ed25519PublicKey | None,
        *,
        first_steps: FirstSteps,
        now: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self.settings = settings
        self.spool = spool
        self._backbone = backbone
        self._sources = sources
        self._first_steps = first_steps
        self._now = now
        self._monotonic = monotonic
        device = settings.device
        self.clock = TrustedClock(settings.state_directory, now)
        self.plans = TapPlans(spool, backbone.manifest, device)
        self.connection = BrokerConnection(
            settings.broker,
            device,
            will=self._last_will,
            subscriptions=[
                topics.receipt(device), topics.command(device), *self.plans.topics, topics.checkpoint(backbone.manifest.fingerprint),
                topics.certificate_answer(device),
            ],
            on_message=self._dispatch,
            on_connected=self._connected,
            clean_start=False,
            session_expiry_seconds=SESSION_SECONDS,
            trusted_time=self.clock.instead_of_system,
        )
        self.renewal = (
            Renewal(self.connection, settings.state_directory, self.clock, on_change=self.report_soon) if settings.uses_identity else None
        )
        self.publisher = Publisher(
            self.connection,
            spool,
            device,
            window_frames=settings.publisher.window_frames,
            resend_seconds=settings.publisher.resend_seconds,
        )
        self.checkpoints = CheckpointReceiver(
            self.connection, CheckpointStore(settings.state_directory), backbone.manifest, public_key, on_change=self.report_soon,
        )
        self._session = ""
        self._certificate: tuple[str, float | None] = ("", None)  # serial and end of the one that this connection shows
        self._started_at = now()
        self._paused = spool.get_setting("paused") == "1"
        self._commands: deque[bytes] = deque(maxlen=64)
        self._ready: deque[TappedSample] = deque()  # forwarded, not yet in a frame
        self._frame: OpenFrame | None = None
        self._waiting_for = ""  # what keeps the intake from taking samples, in words
        self._ready_plan: TapPlan | None = None  # the one they were forwarded under
        self._forwarded_samples = 0
        self._forward_seconds = 0.0
        self._forwards_reported = (0, 0.0)
        self._refusals_logged: dict[str, int] = {}
        self._done = threading.Event()
        self._report = threading.Event()
        self._failure: BaseException | None = None
        self._failed_thread = ""
        self._intake_ticked_at = monotonic()

    # The life of the program.

    def run(self, stop: threading.Event) -> int:
        """Start the loops, watch them, end them in order."""
        ending = threading.Event()
        loops: dict[str, Callable[[threading.Event], None]] = {
            "intake": self._take_samples,
            "publisher": self.publisher.run,
            "checkpoints": self.checkpoints.run,
            "health": self._report_health,
        }
        if self.renewal is not None:
            loops["renewal"] = self.renewal.run
        threads = [threading.Thread(target=self._guarded, args=(name, loop, ending), name=name) for name, loop in loops.items()]
        self.connection.start()
        for thread in threads:
            thread.start()
        notify("READY=1")
        self._watch(stop)

        notify("STOPPING=1")
        with suppress(OSError):
            self.settings.alive_file.unlink(missing_ok=True)
        ending.set()
        self.publisher.wake()
        self.report_soon()
        for thread in threads:
            thread.join()
        reason = f"{self._failed_thread} died: {self._failure!r}" if self._failure else "stopped"
        self._keep_time(at_once=True)
        self.connection.stop((topics.health(self.settings.device), self._health("offline", reason).to_bytes()))
        if self._failure is not None:
            logger.critical("the agent ends because its %s died", self._failed_thread, exc_info=self._failure)
            return exit_codes.CRASH
        logger.info("the agent has ended cleanly")
        return exit_codes.OK

    def _guarded(self, name: str, loop: Callable[[threading.Event], None], ending: threading.Event) -> None:
        try:
            loop(ending)
        except BaseException as error:  # whatever it was: the program must not go on without this loop
            if self._failure is None:
                self._failure, self._failed_thread = error, name
            self._done.set()

    def _watch(self, stop: threading.Event) -> None:
        """Wait for the end; keep systemd's watchdog and health checks content only while every loop goes round."""
        every = min(0.5, (watchdog_seconds() or 60.0) / 4)
        touch_at = 0.0
        while not stop.wait(every):
            if self._done.is_set():
                return
            if not self.connection.thread_alive:
                self._failure, self._failed_thread = RuntimeError("the network loop ended by itself"), "broker connection"
                return
            self._note_first_steps()
            if self.alive():
                notify("WATCHDOG=1")
                if self._monotonic() >= touch_at:
                    touch_at = self._monotonic() + TOUCH_SECONDS
                    with suppress(OSError):  # a full disk is no reason to end
                        touch_alive(self.settings.alive_file)

    def _note_first_steps(self) -> None:
        clock_right = self.connection.connected and not self.clock.is_behind
        come: dict[DeviceStep, bool] = {"network": self.connection.connected, "clock": clock_right, "stored": self.publisher.receipted_frames > 0}
        if self._first_steps.note(*(step for step, yes in come.items() if yes)):
            self.report_soon()
        self._first_steps.settle(clock_right=clock_right)

    def alive(self) -> bool:
        """Whether every loop went round lately, and the broker answers or is known not to.

        While connected, the network loop itself guarantees a broker round trip within two keepalives.
        """
        now = self._monotonic()
        newest_ticks = [self._intake_ticked_at, self.publisher.ticked_at, self.checkpoints.ticked_at]
        if self.renewal is not None:
            newest_ticks.append(self.renewal.ticked_at)
        network = self.connection.tick_age_seconds < HUNG_SECONDS and (self.connection.connected or bool(self.connection.last_error))
        return network and all(now - tick < HUNG_SECONDS for tick in newest_ticks)

    # Samples in: the loop that the device exists for.

    def _take_samples(self, ending: threading.Event) -> None:
        while not ending.is_set():
            self._intake_ticked_at = self._monotonic()
            self._obey_commands()

            # 1. What was forwarded goes to the spool first; while that is full, nothing more is forwarded.
            if not self._fill_frames():
                self._wait_for_room()
                continue

            # 2. Between batches: a new plan begins with a new frame.
            if self.plans.settle():
                self.report_soon()
            plan = self.plans.current
            if self._frame is not None and (self._frame.plan != plan or self._frame.is_due(self._monotonic())) and not self._close_frame():
                self._wait_for_room()
                continue
            if plan is None or self._paused:
                self._say_waiting_for("paused by command" if self._paused else "no tap plan yet")
                ending.wait(IDLE_SECONDS)
                continue
            self._say_waiting_for("")

            # 3. One batch: forward, once, to the last tap.
            samples = self._poll()
            if samples:
                started = self._monotonic()
                self._ready.extend(tap_samples(self._backbone, samples, plan, self._refuse))
                self._ready_plan = plan
                self._forward_seconds += self._monotonic() - started
                self._forwarded_samples += len(samples)
            elif self._nothing_more_comes() and self._frame is not None:
                if not self._close_frame():
                    self._wait_for_room()
            else:
                self._check_done()
                ending.wait(IDLE_SECONDS)
        self._fill_frames()
        self._close_frame()

    def _poll(self) -> list[Sample]:
        """At most one batch, each source in its turn; rows that are none are counted and told."""
        samples: list[Sample] = []
        for source in list(self._sources):
            room = self.settings.backbone.batch_size - len(samples)
            if room == 0:
                break
            for item in source.poll(room):
                if isinstance(item, Refusal):
                    self._refuse(item.id, item.reason, item.detail)
                else:
                    samples.append(item)
            self._sources.append(self._sources.pop(0))
        return samples

    def _fill_frames(self) -> bool:
        """Move forwarded samples into frames; False if the spool has no room for a full one."""
        while self._ready:
            sample = self._ready[0]
            if self._frame is None:
                assert self._ready_plan is not None, "samples are forwarded under a plan"
                self._frame = OpenFrame(self._ready_plan, self._now(), self._monotonic())
            if self._frame.has_room_for(sample, self.publisher.frame_bytes(self._frame.plan.frame_bytes)):
                self._frame.add(self._ready.popleft())
            elif not self._close_frame():
                return False
        return True

    def _close_frame(self) -> bool:
        """Append the open frame to the spool; False (and the frame stays open) if there is no room."""
        frame = self._frame
        if frame is None or not frame.samples:
            return True
        frame_bytes = self.publisher.frame_bytes(frame.plan.frame_bytes)
        fingerprint = self._backbone.manifest.fingerprint

        def build(sequence: int, produced: int) -> list[bytes]:
            return frame.payloads((self.settings.device, self.spool.id, sequence), produced, fingerprint, frame_bytes)

        self.publisher.freed.clear()
        try:
            sequences = self.spool.append([sample.info.id for sample in frame.samples], build)
        except SpoolFull as full:
            if not self._waiting_for:
                logger.warning("%s", full)
            return False
        logger.debug("spooled frame %s with %d samples", sequences, len(frame.samples))
        self._frame = None
        self.publisher.wake()
        return True

    def _refuse(self, sample_id: str, reason: str, detail: str) -> None:
        self.spool.refuse(sample_id or None, reason)
        count = self._refusals_logged[reason] = self._refusals_logged.get(reason, 0) + 1
        if count == 1:
            logger.error("sample refused (%s): %s", reason, detail)
            self.report_soon()
        else:
            logger.debug("sample refused (%s, %d so far): %s", reason, count, detail)

    def _wait_for_room(self) -> None:
        self._say_waiting_for(SPOOL_FULL)
        self.publisher.freed.wait(IDLE_SECONDS)

    def _say_waiting_for(self, reason: str) -> None:
        if reason != self._waiting_for:
            if self._waiting_for == SPOOL_FULL:
                logger.info("the spool has room again")
            self._waiting_for = reason
            self.report_soon()

    def _nothing_more_comes(self) -> bool:
        return self.settings.run.exit_when_done and all(source.exhausted for source in self._sources)

    def _check_done(self) -> None:
        if self._frame is not None or not self._nothing_more_comes():
            return
        if not self._done.is_set() and not self.spool.pending(0, 1):
            logger.info("every source is read and every frame is receipted")
            self._done.set()

    # What comes in from the coordinator. These run in the network thread.

    def _connected(self, connected: Connected) -> None:
        self._certificate = certificate_in(self.settings.broker.certificate_file)
        self.publisher.connected(connected)
        self.report_soon()

    def _dispatch(self, message: Message) -> None:
        if message.topic == topics.receipt(self.settings.device):
            self.publisher.offer_receipt(message.payload)
        elif message.topic == topics.command(self.settings.device):
            self._commands.append(message.payload)
        elif self.renewal is not None and self.renewal.offer(message):
            pass
        elif not self.plans.offer(message.topic, message.payload) and not self.checkpoints.offer(message):
            logger.debug("nothing waits for a message on %s", message.topic)

    # Commands.

    def _obey_commands(self) -> None:
        while self._commands:
            try:
                command = Command.from_bytes(self._commands.popleft())
            except FrameError as error:
                logger.error("a command was not understood: %s", error)
                continue
            if command.expires_at < self._now():
                logger.info("command %s (%s) came too late", command.id, command.name)
                continue
            logger.info("command %s: %s", command.id, command.name)
            if command.name == "renew-certificate":
                self._renew()
            else:
                self._paused = command.name == "pause"
                self.spool.set_setting("paused", "1" if self._paused else "0")
            self.report_soon()

    def _renew(self) -> None:
        if self.renewal is not None:
            self.renewal.ask_now()
        else:
            logger.error("this device's certificate is one that the settings name under [broker]; it is not renewed from here")

    # Health.

    def report_soon(self) -> None:
        """Something changed that the coordinator should see before the next regular report."""
        self._report.set()

    def _report_health(self, ending: threading.Event) -> None:
        while not ending.is_set():
            self._report.clear()
            if self.connection.connected:
                self._keep_time()
                self.connection.publish(topics.health(self.settings.device), self._health("online").to_bytes(), retain=True)
            if self._report.wait(self.settings.health.every_seconds):
                ending.wait(SETTLE_SECONDS)  # several changes at once make one message

    def _keep_time(self, *, at_once: bool = False) -> None:
        """While a connection stands whose certificate was found valid under this clock, the clock is believed."""
        if self.connection.connected and self.settings.broker.tls:
            self.clock.note(at_once=at_once)

    def _last_will(self) -> tuple[str, bytes]:
        self._session = secrets.token_hex(8)
        will = Health("online", self._session, self._now()).as_last_will()
        return topics.health(self.settings.device), will.to_bytes()

    def _health(self, presence: Presence, reason: str = "") -> Health:
        samples, seconds = (
            now - before for now, before in zip((self._forwarded_samples, self._forward_seconds), self._forwards_reported, strict=True)
        )
        self._forwards_reported = (self._forwarded_samples, self._forward_seconds)
        plan = self.plans.current
        return replace(
            read_readings(self.settings.state_directory),
            presence=presence,
            session=self._session,
            at=self._now(),
            agent_version=agent_version(),
            started_at=self._started_at,
            reason="; ".join(filter(None, (reason or self._trouble, self.clock.trouble)))[:1000],
            backbone=self._backbone.manifest.info(),
            plan_version=plan.version if plan else 0,
            plan_error=self.plans.error,
            checkpoint=self.checkpoints.generation,
            checkpoint_error=self.checkpoints.error,
            spool=self.spool.count(),
            paused=self._paused,
            forward_seconds=seconds / samples if samples else None,
            bytes_sent=self.spool.bytes_sent,
            certificate_serial=self._certificate[0],
            certificate_expires_at=self._certificate[1],
            first_steps=self._first_steps.news(self._session),
        )

    @property
    def _trouble(self) -> str:
        renewal = self.renewal.error if self.renewal is not None else ""
        return self._waiting_for or self.publisher.error or renewal or self.spool.moved_aside
