"""`coordinator doctor`: is this coordinator fit to serve its fleet? Every finding that is not fine says the cure.

Safe beside running programs: it reads, connects to the broker in its own name, and changes nothing.
"""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Literal

from cryptography import x509

from coordinator.authority import AuthorityError, general_name, load_certificate
from coordinator.identities import (
    CLAIMS_AUTHORITY,
    CLAIMS_REVOKED,
    FLEET_AUTHORITY,
    FLEET_REVOKED,
    PROGRAMS,
    broker_names,
    broker_settings_for,
    identity_directory,
)
from coordinator.settings import CoordinatorSettings
from coordinator.store.engine import open_store
from coordinator.store.errors import StoreError, StoreUnavailable
from coordinator.store.programs import ProgramState, program_states
from side_tuning.broker_connection import BrokerConnection
from side_tuning.broker_settings import BrokerFilesError
from side_tuning.signatures import SignatureError, load_signing_key, public_key_hex
from side_tuning.wire import topics

Level = Literal["ok", "warning", "failed"]

EARLIEST = datetime(2026, 8, 1, tzinfo=timezone.utc)  # this program is no older
LATEST = datetime(2100, 1, 1, tzinfo=timezone.utc)
CLOCK_TOLERANCE = timedelta(minutes=5)
BROKER_SECONDS = 15.0
SLOW_ROUND_TRIP_SECONDS = 1.0
CERTIFICATE_WARNING = timedelta(days=30)
AUTHORITY_WARNING = timedelta(days=365)
LIST_WARNING = timedelta(days=30)  # `coordinator enrolment` keeps it far longer than this
DISK_WARNING_BYTES, DISK_LEAST_BYTES = 2_000_000_000, 200_000_000
LOG_WARNING_BYTES = 512 * 1024 * 1024
BEAT_SECONDS = 30.0
UNCOMMITTED_WARNING_SECONDS, UNCOMMITTED_SECONDS = 10.0, 60.0


@dataclass(frozen=True)
class Finding:
    """What one check found; `cure` is empty where all is well."""

    check: str
    level: Level
    value: str
    cure: str = ""


Check = Callable[[CoordinatorSettings, datetime], Iterator[Finding]]


def examine(settings: CoordinatorSettings, now: datetime | None = None) -> list[Finding]:
    """Every check, in an order in which the first failure tends to explain the later ones."""
    now = now or datetime.now(timezone.utc)
    checks: tuple[tuple[str, Check], ...] = (
        ("clock", check_clock),
        ("disk", check_disk),
        ("database", check_database),
        ("signing key", check_signing_key),
        ("keys", check_key_permissions),
        ("certificates", check_certificates),
        ("broker", check_broker),
        ("programs", check_programs),
    )
    findings: list[Finding] = []
    for name, check in checks:
        try:
            findings.extend(check(settings, now))
        except (StoreError, StoreUnavailable) as error:
            if name == "database":  # the others cannot add to it
                findings.append(Finding(name, "failed", str(error), "see the text"))
        except Exception as error:  # one broken check must not hide the others
            findings.append(Finding(name, "failed", f"the check itself failed: {type(error).__name__}: {error}", "report this"))
    return findings


def lines(findings: list[Finding]) -> Iterator[str]:
    """One line for each finding, and one for its cure."""
    width = max(len(finding.check) for finding in findings)
    for finding in findings:
        yield f"{finding.level:<7}  {finding.check:<{width}}  {finding.value}"
        if finding.cure:
            yield f"{'':<7}  {'':<{width}}  -> {finding.cure}"


def check_clock(settings: CoordinatorSettings, now: datetime) -> Iterator[Finding]:
    """A believable date that did not go backwards: certificates, claims and arrivals are dated by it."""
    cure = "set the date, or let this machine reach a time server (`timedatectl set-ntp true`)"
    shown = f"{now:%Y-%m-%d %H:%M:%S} UTC"
    if not EARLIEST < now < LATEST:
        yield Finding("clock", "failed", shown, cure)
        return
    newest = max((state.at for state in _states(settings).values()), default=now)
    if newest > now + CLOCK_TOLERANCE:
        yield Finding("clock", "failed", f"{shown}, but a program wrote {newest:%Y-%m-%d %H:%M:%S}: it has gone backwards", cure)
        return
    yield Finding("clock", "ok", shown)


def check_disk(settings: CoordinatorSettings, _: datetime) -> Iterator[Finding]:
    """Room on the disk of data_directory."""
    folder = next(path for path in (settings.data_directory.absolute(), *settings.data_directory.absolute().parents) if path.exists())
    usage = shutil.disk_usage(folder)
    level: Level = "failed" if usage.free < DISK_LEAST_BYTES else "warning" if usage.free < DISK_WARNING_BYTES else "ok"
    cure = "" if level == "ok" else "free some space, or set retention.max_bytes; devices keep what cannot be stored"
    yield Finding("disk", level, f"{usage.free / 1e9:,.1f} GB of {usage.total / 1e9:,.1f} GB free at {folder}", cure)


def check_database(settings: CoordinatorSettings, _: datetime) -> Iterator[Finding]:
    """Reachable, of the right schema, and its write-ahead log not out of hand. Raises StoreError with the cure."""
    store = open_store(settings.database_url, read_only=True)
    try:
        log = store.log_bytes
        yield Finding("database", "ok", f"the schema fits: {store.url!r}")
        if log is not None and log > LOG_WARNING_BYTES:
            cure = "let the gateway run: it moves the log into the database; end readers that stay for hours"
            yield Finding("write-ahead log", "warning", f"{log / 1e6:,.0f} MB", cure)
    finally:
        store.close()


def check_signing_key(settings: CoordinatorSettings, _: datetime) -> Iterator[Finding]:
    """The key under every checkpoint, and its public half."""
    if not settings.signing_key_file.exists():
        cure = "run `coordinator init`; if devices know an older key, bring that one back from a backup instead"
        yield Finding("signing key", "failed", f"{settings.signing_key_file} does not exist", cure)
        return
    try:
        public = public_key_hex(load_signing_key(settings.signing_key_file))
    except (SignatureError, OSError) as error:
        yield Finding("signing key", "failed", str(error), "bring it back from a backup")
        return
    kept = settings.public_key_file.read_text().strip() if settings.public_key_file.exists() else ""
    if kept != public:
        yield Finding("signing key", "failed", f"{settings.public_key_file} is not its public half", "start the gateway, which writes it; give it to the devices")
    else:
        yield Finding("signing key", "ok", f"public half {public[:16]}...")


def check_key_permissions(settings: CoordinatorSettings, _: datetime) -> Iterator[Finding]:
    """Private keys that others can read; the broker's may be shared with the group that the broker runs as."""
    keys = [
        settings.signing_key_file,
        *settings.authority_directory.glob("*.key"),
        *(settings.data_directory / "identities").glob("*/*.key"),
        *settings.broker_directory.glob("*.key"),
    ]
    found = 0
    for key in keys:
        if not key.exists():
            continue
        found += 1
        mode = key.stat().st_mode & 0o777
        if mode & (0o007 if key.parent == settings.broker_directory else 0o077):
            cure = f"`chmod 600 {key}`, and think about who may have read it"
            yield Finding("keys", "failed", f"{key} can be read by others (mode {mode:04o})", cure)
    yield Finding("keys", "ok", f"{found} private keys looked at")


def check_certificates(settings: CoordinatorSettings, now: datetime) -> Iterator[Finding]:
    """Until when the authorities, the broker's certificate, our programs' and the revocation lists hold."""
    broker = settings.broker_directory
    if not (broker / f"{FLEET_AUTHORITY}.pem").exists():
        if settings.broker.tls and settings.broker.certificate_file is None:
            yield Finding("certificates", "failed", f"there are none in {broker}", "run `coordinator init`")
        elif not settings.broker.tls:
            cure = "fine on a closed bench; for anything else set broker.tls = true and run `coordinator init`"
            yield Finding("certificates", "warning", "broker.tls is false: anybody on the network can read and write everything", cure)
        return
    for name in (FLEET_AUTHORITY, CLAIMS_AUTHORITY):
        cure = "every device must be enrolled anew under a new authority: plan it (docs/operating.md)"
        yield from _dated(name.replace("-", " "), broker / f"{name}.pem", now, AUTHORITY_WARNING, cure)
    renew = "run `coordinator init`, which renews it, then restart the program (the broker: SIGHUP)"
    yield from _dated("broker certificate", broker / "broker.pem", now, CERTIFICATE_WARNING, renew)
    for program in PROGRAMS:
        file = identity_directory(settings, program) / "client.pem"
        if file.exists() or program == "doctor":
            yield from _dated(f"certificate of {program}", file, now, CERTIFICATE_WARNING, renew)
    for name in (FLEET_REVOKED, CLAIMS_REVOKED):
        yield from _list_dated(broker / name, now)
    yield from _check_broker_names(settings)


def _dated(check: str, file: Path, now: datetime, warning: timedelta, cure: str) -> Iterator[Finding]:
    try:
        certificate = load_certificate(file)
    except AuthorityError as error:
        yield Finding(check, "failed", str(error), "run `coordinator init`, or bring it back from a backup")
        return
    begins, ends = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    if now < begins:
        yield Finding(check, "failed", f"valid only from {begins:%Y-%m-%d %H:%M}", "set this machine's clock, or run `coordinator init`")
    else:
        yield _ends(check, ends, now, warning, cure)


def _list_dated(file: Path, now: datetime) -> Iterator[Finding]:
    check, cure = f"revocations ({file.name})", "start `coordinator enrolment`, which renews it; a broker with an old list lets nobody in"
    try:
        found = x509.load_pem_x509_crl(file.read_bytes())
        begins, ends = found.last_update_utc, found.next_update_utc
    except (OSError, ValueError) as error:
        yield Finding(check, "failed", f"{file} cannot be read: {error}", "run `coordinator init`; without it the broker does not start")
        return
    if ends is None:
        yield Finding(check, "failed", f"{file} says no end", cure)
    elif now < begins:  # a clock that was ahead
        yield Finding(check, "failed", f"valid only from {begins:%Y-%m-%d %H:%M}", cure)
    else:
        yield _ends(check, ends, now, LIST_WARNING, cure)


def _ends(check: str, ends: datetime, now: datetime, warning: timedelta, cure: str) -> Finding:
    left = ends - now
    if left <= timedelta(0):
        return Finding(check, "failed", f"ended on {ends:%Y-%m-%d %H:%M}", cure)
    value = f"until {ends:%Y-%m-%d} ({left.days} days)"
    return Finding(check, "warning", value, cure) if left < warning else Finding(check, "ok", value)


def _check_broker_names(settings: CoordinatorSettings) -> Iterator[Finding]:
    try:
        names = load_certificate(settings.broker_directory / "broker.pem").extensions.get_extension_for_class(x509.SubjectAlternativeName)
    except (AuthorityError, x509.ExtensionNotFound):
        return  # said already
    missing = [name for name in broker_names(settings) if general_name(name) not in names.value]
    if missing:
        cure = "run `coordinator init`, which adds it, then let the broker read it (SIGHUP)"
        yield Finding("broker certificate", "failed", f"the broker is to be reached as {missing[0]!r}, which is not in it", cure)


def check_broker(settings: CoordinatorSettings, _: datetime) -> Iterator[Finding]:
    """A message there and back, in the doctor's own name."""
    broker = broker_settings_for(settings, "doctor")
    answered = threading.Event()
    topic = topics.doctor_probe()
    try:
        connection = BrokerConnection(broker, "doctor", subscriptions=[topic], on_message=lambda _: answered.set())
    except BrokerFilesError as error:
        yield Finding("broker", "failed", str(error), "see the text")
        return
    deadline = time.monotonic() + BROKER_SECONDS
    connection.start()
    try:
        while not connection.connected and not connection.last_error and time.monotonic() < deadline:
            time.sleep(0.02)
        if not connection.connected:
            why = connection.last_error or f"{connection.address} does not answer within {BROKER_SECONDS:.0f} s"
            yield Finding("broker", "failed", why, "start the broker, or correct broker.host and broker.port; `coordinator run` goes on trying")
            return
        if broker.certificate_file == settings.broker.certificate_file is not None:
            # Not the doctor's name: the broker's rules do not let it listen to its own message.
            yield Finding("broker", "ok", f"{connection.address} accepts us")
            return
        began = time.monotonic()
        connection.publish(topic, b"probe")
        if not answered.wait(max(1.0, deadline - time.monotonic())):
            cure = "look at the broker's log and access rules (broker_config/): doctor may write and read its own probe"
            yield Finding("broker", "failed", f"{connection.address} accepts us, but our message does not come back", cure)
            return
        seconds = time.monotonic() - began
        level: Level = "warning" if seconds > SLOW_ROUND_TRIP_SECONDS else "ok"
        value = f"{connection.address} (MQTT {connection.protocol}{', TLS' if broker.tls else ''}), round trip {seconds * 1000:.0f} ms"
        yield Finding("broker", level, value, "look at the load of the broker's machine and the network" if level != "ok" else "")
    finally:
        connection.stop()


def check_programs(settings: CoordinatorSettings, now: datetime) -> Iterator[Finding]:
    """What the programs last said of themselves."""
    states = _states(settings)
    expected = ["gateway", "trainer", *(["enrolment"] if (settings.broker_directory / f"{FLEET_AUTHORITY}.pem").exists() else [])]
    for name in dict.fromkeys([*expected, *states]):
        state = states.get(name)
        if state is None:
            yield Finding(name, "failed" if name == "gateway" else "warning", "has never run with this database", "start it: `coordinator run`")
        else:
            yield from _check_program(state, now)


def _check_program(state: ProgramState, now: datetime) -> Iterator[Finding]:
    name, status, age = state.name, state.status, (now - state.at).total_seconds()
    if age > BEAT_SECONDS:
        value = f"last heard of {age:,.0f} s ago ({state.at:%Y-%m-%d %H:%M:%S} UTC)"
        yield Finding(name, "failed" if name == "gateway" else "warning", value, "start it (`coordinator run`), or look at its log")
        return
    if status.get("looping") is False:
        yield Finding(name, "failed", "its loops do not go round", "restart it, and report its log")
        return
    if status.get("connected") is False:
        yield Finding(name, "failed", f"not connected to the broker: {status.get('broker_error') or 'no reason known'}", "see the line on the broker")
        return
    if status.get("error"):
        yield Finding(name, "warning", str(status["error"]), "see its log")
        return
    waiting = status.get("oldest_uncommitted_seconds") or 0.0
    if waiting > UNCOMMITTED_WARNING_SECONDS:
        level: Level = "failed" if waiting > UNCOMMITTED_SECONDS else "warning"
        yield Finding(name, level, f"the oldest message waits for its commit since {waiting:,.0f} s", "look at the disk: full, slow, or the database locked")
        return
    details = ", ".join(f"{words} {status[key]:,.0f}" for key, words in _SHOWN if isinstance(status.get(key), int | float))
    yield Finding(name, "ok", f"alive since {state.started_at:%Y-%m-%d %H:%M} UTC" + (f": {details}" if details else ""))


_SHOWN = (("frames", "frames"), ("samples", "samples"), ("rejected", "rejected"), ("queue_messages", "waiting"), ("step", "step"))


def _states(settings: CoordinatorSettings) -> dict[str, ProgramState]:
    """Empty where there is no database yet; the check of the database says so."""
    try:
        store = open_store(settings.database_url, read_only=True)
    except (StoreError, StoreUnavailable):
        return {}
    try:
        with store.read() as session:
            return program_states(session)
    finally:
        store.close()
