"""`edge-agent doctor`: is this device fit to run the agent? Every finding that is not fine says the cure.

Safe beside a running agent: it takes another client id (or, where the certificate is the name, only tries TLS), opens the
spool read-only and changes nothing.
"""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path

from edge_agent import health
from edge_agent.backbone_files import IncomingBackbone
from edge_agent.doctor_identity import agent_runs, check_identity, tls_trouble
from edge_agent.findings import Finding
from edge_agent.first_steps import FirstSteps
from edge_agent.settings import AgentSettings, MqttSourceSettings
from edge_agent.spool_file import SpoolError, connect, find_damage
from edge_agent.trusted_clock import TrustedClock
from side_tuning.backbone_manifest import MANIFEST
from side_tuning.broker_connection import BrokerConnection, Message
from side_tuning.broker_settings import BrokerFilesError
from side_tuning.first_steps import ORDER, WORDS, Step, overdue
from side_tuning.wire import topics
from side_tuning.wire.bounded import FrameError
from side_tuning.wire.messages import TapPlan

LATEST = datetime(2100, 1, 1, tzinfo=timezone.utc)
BROKER_SECONDS = 15.0
PLAN_SECONDS = 2.0
ROUND_TRIPS = 5
SLOW_ROUND_TRIP_SECONDS = 2.0
DISK_FREE_NEEDED = 64 * 1024 * 1024
WRITE_TEST_BYTES = 4 * 1024 * 1024
SLOW_COMMIT_SECONDS = 0.25
MEMORY_NEEDED = 64 * 1024 * 1024
HOT_CELSIUS = 80.0
PROBE_TEXT = "the quick brown fox jumps over the lazy dog"


Check = Callable[[AgentSettings], Iterator[Finding]]


def examine(settings: AgentSettings, now: Callable[[], float] = time.time) -> list[Finding]:
    """Every check, in an order in which the first failure tends to explain the later ones."""
    clock = TrustedClock(settings.state_directory, now)
    checks: tuple[tuple[str, Check], ...] = (
        ("clock", lambda _: check_clock(now(), clock)),
        ("memory", lambda _: check_machine()),
        ("disk", check_disk),
        ("spool", check_spool),
        ("sources", check_sources),
        ("backbone", check_backbone),
        ("identity", lambda settings: check_identity(settings, clock)),
        ("broker", lambda settings: check_broker(settings, clock)),
        ("first boot", lambda settings: check_first_steps(settings, now())),
    )
    findings: list[Finding] = []
    for name, check in checks:
        try:
            findings.extend(check(settings))
        except Exception as error:  # one broken check must not hide the others
            findings.append(Finding(name, "failed", f"the check itself failed: {type(error).__name__}: {error}", "report this"))
    return findings


def show(findings: list[Finding], *, as_json: bool) -> None:
    if as_json:
        print(json.dumps([asdict(finding) for finding in findings], indent=2))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("check", "", "found", show_edge=False)
    style = {"ok": "green", "warning": "yellow", "failed": "bold red"}
    for finding in findings:
        cure = f"\n-> {finding.cure}" if finding.cure else ""
        table.add_row(finding.check, f"[{style[finding.level]}]{finding.level}[/]", f"{finding.detail}{cure}".replace("[", r"\["))
    Console(highlight=False).print(table)


def check_clock(now: float, clock: TrustedClock) -> Iterator[Finding]:
    """A believable date, and whether something keeps it right; certificates are refused under a wrong one."""
    try:
        date = datetime.fromtimestamp(now, tz=timezone.utc)
    except (OverflowError, ValueError, OSError):
        date = None
    if date is None or date > LATEST or clock.trouble:
        shown = f"{date:%Y-%m-%d %H:%M} UTC" if date else f"{now:.0f} s"
        yield Finding("clock", "failed", clock.trouble or f"it says {shown}", "set the date (`date -s`) or let this device reach a time server (`timedatectl set-ntp true`)")
        return
    synchronised = Path("/run/systemd/timesync/synchronized").exists()
    kept = "a time server keeps it" if synchronised else "whether a time server keeps it is unknown"
    yield Finding("clock", "ok", f"{date:%Y-%m-%d %H:%M:%S} UTC; {kept}")


def check_machine() -> Iterator[Finding]:
    """Memory, heat and throttling."""
    available = health.memory_available_bytes()
    if available is None:
        yield Finding("memory", "warning", "this system does not say how much is free", "look with the system's own tools")
    elif available < MEMORY_NEEDED:
        yield Finding("memory", "failed", f"{_megabytes(available)} available", f"free some: at least {_megabytes(MEMORY_NEEDED)} beside the backbone; stop other programs or add swap")
    else:
        yield Finding("memory", "ok", f"{_megabytes(available)} available")
    if health.throttled():
        yield Finding("power", "warning", "the processor is being slowed down", "use a stronger power supply and a better cable, or cool it")
    celsius = health.temperature_celsius()
    if celsius is not None:
        hot = celsius > HOT_CELSIUS
        yield Finding("heat", "warning" if hot else "ok", f"{celsius:.0f} °C", "cool it: it slows itself down" if hot else "")


def check_disk(settings: AgentSettings) -> Iterator[Finding]:
    """Free space and the speed of what the spool does all the time: write a little, wait until it is on the disk."""
    folder = settings.state_directory
    free = health.disk_free_bytes(folder)
    if free is not None and free < DISK_FREE_NEEDED:
        yield Finding("disk", "failed", f"{_megabytes(free)} free for {folder}", "delete something, or put state_directory on a larger disk")
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        bulk, commit = _write_speed(folder)
    except OSError as error:
        yield Finding("disk", "failed", f"{folder} cannot be written: {error.strerror}", "make it writable for this user, or remount the disk for writing")
        return
    speed = f"{WRITE_TEST_BYTES / bulk / 1e6:.0f} MB/s, {commit * 1000:.1f} ms for a durable frame"
    space = f"{_megabytes(free)} free, " if free is not None else ""
    if free is not None and free < settings.spool.max_bytes:
        yield Finding("disk", "warning", f"{space}{speed}", f"less than spool.max_bytes ({_megabytes(settings.spool.max_bytes)}): free some, or lower it; a long outage would fill the disk")
    elif commit > SLOW_COMMIT_SECONDS:
        yield Finding("disk", "warning", f"{space}{speed}", "a slow or worn card: use a better one, or raise the plan's linger so that frames are fewer")
    else:
        yield Finding("disk", "ok", space + speed)


def _write_speed(folder: Path) -> tuple[float, float]:
    """Seconds for the large write, and for one small durable one (median)."""
    with tempfile.TemporaryFile(dir=folder) as file:
        block = os.urandom(WRITE_TEST_BYTES)
        start = time.perf_counter()
        file.write(block)
        file.flush()
        os.fsync(file.fileno())
        bulk = time.perf_counter() - start
        commits = []
        for _ in range(ROUND_TRIPS):
            start = time.perf_counter()
            file.write(block[:12_000])
            file.flush()
            os.fsync(file.fileno())
            commits.append(time.perf_counter() - start)
    return bulk, sorted(commits)[len(commits) // 2]


def check_spool(settings: AgentSettings) -> Iterator[Finding]:
    """The whole spool file, payloads included."""
    path = settings.spool_path
    cure = "stop the agent and start it again: it moves the file aside and begins a new one; then check the card"
    if not path.exists():
        yield Finding("spool", "ok", f"{path} is made at the first start")
    else:
        try:
            with contextlib.closing(connect(path, read_only=True)) as database:
                damage = find_damage(database, thorough=True)
                frames = broken = size = 0
                for payload, crc in [] if damage else database.execute("SELECT payload, crc FROM frames JOIN payloads USING (sequence)"):
                    frames, size, broken = frames + 1, size + len(payload), broken + (zlib.crc32(payload) != crc)
        except SpoolError as error:
            yield Finding("spool", "failed", str(error), "install the newer version again")
        except sqlite3.Error as error:
            yield Finding("spool", "failed", f"{path} cannot be read: {error}", cure)
        else:
            if damage:
                yield Finding("spool", "failed", f"{path} is damaged: {damage}", cure)
            elif broken:
                yield Finding("spool", "warning", f"{broken} of {frames} frames are damaged; they are dropped when their turn comes", "check the card; replace it if this goes on")
            else:
                yield Finding("spool", "ok", f"sound; {frames} frames, {_megabytes(size)} wait for their receipt")
    aside = [old for old in path.parent.glob(f"{path.name}.aside-*") if not old.name.endswith(("-wal", "-shm"))]
    if aside:
        yield Finding("spool", "warning", f"{len(aside)} spools were moved aside, the latest {max(aside).name}", "check the card; delete the files when they are no longer of interest")


def check_sources(settings: AgentSettings) -> Iterator[Finding]:
    """Whether the files and folders are there."""
    if not settings.sources:
        yield Finding("sources", "warning", "none is set, so this device sends nothing", "add a [[sources]] table")
    for source in settings.sources:
        if isinstance(source, MqttSourceSettings):
            connection = _connect(BrokerConnection(source.broker(), f"doctor-{os.getpid()}"))
            place = f"local topic {source.topic} at {source.host}:{source.port}"
            try:
                if connection.connected:
                    yield Finding("sources", "ok", f"{place}: reachable")
                else:
                    yield Finding("sources", "failed", f"{place}: {connection.last_error or 'no answer'}", "start the local broker, or correct host and port")
            finally:
                connection.stop()
        elif not os.access(source.path, os.R_OK):
            there = source.path.exists()
            cure = "make it readable for this user" if there else "put it there, or correct the source's path"
            yield Finding("sources", "failed", f"{source.kind} {source.path}: {'not readable' if there else 'missing'}", cure)
        else:
            yield Finding("sources", "ok", f"{source.kind} {source.path}")


def check_backbone(settings: AgentSettings) -> Iterator[Finding]:
    """The files hash to their fingerprint, the model loads, and one text goes through; or how far one is that is being fetched."""
    from edge_agent.backbone import Backbone, BackboneError

    folder = settings.backbone.folder
    if settings.fetches_backbone and not (folder / MANIFEST).exists():
        progress = IncomingBackbone(folder).progress()
        here = f"{progress[0]} of {progress[1]} parts are here" if progress else "nothing of one has come yet"
        yield Finding(
            "backbone", "warning", f"none in {folder}; {here}",
            "let `edge-agent run` fetch the one that `coordinator backbone assign` sends, or put a prepared folder there",
        )
        return
    start = time.perf_counter()
    try:
        backbone = Backbone.load(settings.backbone.folder, threads=settings.backbone.threads)
    except BackboneError as error:
        yield Finding("backbone", "failed", str(error), "copy the prepared folder again")
        return
    loaded = time.perf_counter() - start
    manifest = backbone.manifest
    seconds = []
    for _ in range(ROUND_TRIPS):
        start = time.perf_counter()
        backbone.hidden_states([PROBE_TEXT], [manifest.layers], manifest.max_tokens)
        seconds.append(time.perf_counter() - start)
    yield Finding(
        "backbone", "ok",
        f"{manifest.family}, {manifest.layers} layers, {manifest.weights}, {manifest.fingerprint[:12]}…; loaded in {loaded:.1f} s, "
        f"{sorted(seconds)[len(seconds) // 2] * 1000:.1f} ms for a short text, peak memory {_megabytes(health.peak_rss_bytes())}",
    )


def check_broker(settings: AgentSettings, clock: TrustedClock) -> Iterator[Finding]:
    """Connect as this device, time publishes to the broker, and see whether the coordinator's plan is there."""
    device = settings.device
    certificate = settings.broker.certificate_file
    if settings.uses_identity and certificate is not None and not certificate.exists():
        return  # the identity's finding says it
    if certificate is not None and agent_runs(settings):
        # The broker knows a device by its certificate: a second connection would throw out the agent's.
        trouble = tls_trouble(settings.broker, clock, BROKER_SECONDS)
        if trouble:
            yield Finding("broker", "failed", trouble, "see the agent's log, which says more")
        else:
            yield Finding("broker", "ok", f"{settings.broker.host}:{settings.broker.port}, TLS stands; nothing more was tried beside the running agent")
        return
    down = (topics.receipt(device), topics.device_plan(device), topics.fleet_plan())
    plans: list[int] = []

    def on_message(message: Message) -> None:
        if message.topic != topics.receipt(device):
            with contextlib.suppress(FrameError):
                plans.append(TapPlan.from_bytes(message.payload).version)

    try:
        connection = _connect(
            BrokerConnection(
                settings.broker, f"{device}-doctor-{os.getpid()}", subscriptions=down, on_message=on_message, trusted_time=clock.instead_of_system,
            )
        )
    except BrokerFilesError as error:
        yield Finding("broker", "failed", str(error), "correct the files that [broker] names")
        return
    try:
        if not connection.connected:
            trouble = connection.last_error or f"the broker at {connection.address} does not answer within {BROKER_SECONDS:.0f} s"
            yield Finding("broker", "failed", trouble, "check [broker], the network, and that the broker runs")
            return
        seconds = []
        for _ in range(ROUND_TRIPS):
            handle = connection.publish(topics.probe(device), b"")
            if not handle.wait(BROKER_SECONDS):
                yield Finding("broker", "failed", f"the broker at {connection.address} does not take what this device publishes: {handle.rc}", f"allow {device!r} to write its own topics in the broker's access rules")
                return
            assert handle.done_at is not None
            seconds.append(handle.done_at - handle.sent_at)
        median = sorted(seconds)[len(seconds) // 2]
        slow = median > SLOW_ROUND_TRIP_SECONDS
        yield Finding(
            "broker", "warning" if slow else "ok",
            f"{connection.address}, MQTT {connection.protocol}, {'TLS' if settings.broker.tls else 'no TLS'}; round trip {median * 1000:.1f} ms",
            "a slow link: fewer, smaller frames help (the plan's codec and blocks)" if slow else "",
        )
        _wait(lambda: plans or connection.refused_subscriptions, PLAN_SECONDS)
        refused = dict(connection.refused_subscriptions)
    finally:
        connection.stop()
    if refused:
        words = "; ".join(f"{topic}: {why}" for topic, why in refused.items())
        yield Finding("broker", "failed", f"subscriptions refused: {words}", f"allow {device!r} to read its own and the fleet's down topics in the broker's access rules")
    elif plans:
        yield Finding("plan", "ok", f"the coordinator's tap plan is there, version {max(plans)}")
    else:
        yield Finding("plan", "warning", "the broker holds no tap plan, so nothing is captured yet", "start the coordinator (`coordinator run`); it publishes the plan")


def check_first_steps(settings: AgentSettings, now: float) -> Iterator[Finding]:
    """How far the first boot came, and what of it did not come in time; nothing on a device that was in use before."""
    reported = FirstSteps(settings.state_directory, now=lambda: now).times()
    if not reported:
        return
    times: dict[Step, float | None] = {step: at for step, at in reported.items()}  # noqa: C416 - the keys' type is a wider one
    expected: set[Step] = {"network", "clock", "backbone", "stored"}
    if settings.uses_identity:
        expected.add("enrolled")
    late = overdue(times, expected, now, settings.device)
    for one in late:
        yield Finding("first boot", "warning", one.what, one.hint)
    if not late:
        yield Finding("first boot", "ok", ", ".join(WORDS[step] for step in ORDER if step in times))


def _connect(connection: BrokerConnection) -> BrokerConnection:
    connection.start()
    _wait(lambda: connection.connected or connection.last_error, BROKER_SECONDS)
    return connection


def _wait(predicate: Callable[[], object], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not predicate() and time.monotonic() < deadline:
        time.sleep(0.02)


def _megabytes(value: int) -> str:
    return f"{value / 1e6:,.1f} MB" if value < 1e9 else f"{value / 1e9:,.1f} GB"
