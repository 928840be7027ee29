"""What `edge-agent doctor` says of the device's identity: certificate, key, bundle; and TLS alone, beside a running agent."""

from __future__ import annotations

import fcntl
import os
import socket
import ssl
import stat
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path

from edge_agent.findings import Finding
from edge_agent.identity import IdentityStore, certificate_in, check_certificate, load_key
from edge_agent.identity_file import KEY, IdentityError
from edge_agent.settings import AgentSettings
from edge_agent.trusted_clock import TrustedClock
from side_tuning.broker_failures import connect_failure, tls_failure
from side_tuning.broker_settings import BrokerSettings
from side_tuning.broker_tls import tls_context
from side_tuning.bundle import BundleError, read_bundle

RENEWAL_OVERDUE = 0.8  # of a certificate's life; it renews at two thirds
ALERT_SECONDS = 2.0  # how long a broker may take to say that it refuses our certificate


def check_identity(settings: AgentSettings, clock: TrustedClock) -> Iterator[Finding]:
    """Certificate, chain, dates, key, bundle."""
    if not settings.uses_identity:
        serial, ends = certificate_in(settings.broker.certificate_file)
        if ends is not None:
            yield _dates(f"{settings.broker.certificate_file}, serial {serial}", None, ends, clock.now(), "put a new certificate in its place: it does not renew itself")
        return
    store = IdentityStore(settings.state_directory)
    try:
        identity = store.load()
        if identity is None:
            yield _bundle_alone(settings.bundle_file, clock)
            return
        key_file = store.link / KEY
        check_certificate((store.link / "client.pem").read_bytes(), load_key(key_file.read_bytes()), settings.device, identity.authorities)
    except (IdentityError, OSError, ValueError, TypeError) as error:
        yield Finding("identity", "failed", str(error), f"enrol anew: `coordinator enrol {settings.device}`, then `edge-agent enrol --bundle BUNDLE`")
        return
    anew = f"enrol anew: `coordinator enrol {identity.facts.device}`, then `edge-agent enrol --bundle BUNDLE`"
    yield _dates(f"{identity.facts.device!r}, serial {identity.serial}", identity.begins, identity.ends, clock.now(), anew)
    mode = stat.S_IMODE(key_file.stat().st_mode)
    if mode & 0o077:
        yield Finding("identity", "failed", f"others may read {key_file} (mode {mode:04o})", f"`chmod 600 {key_file}`; if somebody may have read it, {anew}")
    if settings.bundle_file is not None and settings.bundle_file.exists():
        yield Finding("bundle", "warning", f"{settings.bundle_file} is still there", "delete it, unless it is a new one: then `edge-agent enrol` or a restart uses it")


def _dates(what: str, begins: float | None, ends: float, now: float, cure: str) -> Finding:
    if now > ends:
        return Finding("identity", "failed", f"{what}: the certificate ended on {_day(ends)}", cure)
    if begins is not None and now > begins + RENEWAL_OVERDUE * (ends - begins):
        return Finding("identity", "warning", f"{what}: good until {_day(ends)}, and its renewal is overdue", "see what the agent logs of it; is `coordinator enrolment` running?")
    return Finding("identity", "ok", f"{what}: good until {_day(ends)}")


def _bundle_alone(bundle_file: Path | None, clock: TrustedClock) -> Finding:
    anew = "make a new one with `coordinator enrol DEVICE`"
    if bundle_file is None:
        return Finding("identity", "failed", "this device is not enrolled", "`edge-agent enrol --bundle BUNDLE`")
    try:
        bundle = read_bundle(bundle_file)
    except BundleError as error:
        return Finding("identity", "failed", f"not enrolled: {error}", anew)
    if clock.now() > bundle.expires_at:
        return Finding("identity", "failed", f"not enrolled, and the bundle {bundle_file} ended on {_day(bundle.expires_at)}", anew)
    return Finding("identity", "warning", f"not enrolled yet; the bundle for {bundle.device!r} is unspent and good until {_day(bundle.expires_at)}", "`edge-agent enrol`, or start the agent, which does it")


def agent_runs(settings: AgentSettings) -> bool:
    """Whether an agent holds this spool, and so the device's one connection."""
    try:
        lock = os.open(f"{settings.spool_path}.lock", os.O_RDWR)
    except OSError:
        return False
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(lock)
    return False


def tls_trouble(broker: BrokerSettings, clock: TrustedClock, timeout_seconds: float) -> str:
    """Why TLS with the broker does not stand; empty if it does. Sends nothing, so that no connection is thrown out for it."""
    address = f"{broker.host}:{broker.port}"
    context = tls_context(broker, clock.instead_of_system())
    assert context is not None, "only with TLS"
    try:
        with (
            socket.create_connection((broker.host, broker.port), timeout=timeout_seconds) as plain,
            context.wrap_socket(plain, server_hostname=broker.host) as tls,
        ):
            tls.settimeout(ALERT_SECONDS)
            try:
                if not tls.recv(1):
                    return f"the broker at {address} closed the connection at once; its log says why"
            except TimeoutError:  # it waits for us to speak
                return ""
            except ssl.SSLError as error:
                return tls_failure(error, broker, address).words
    except (OSError, ssl.CertificateError) as error:
        return connect_failure(error, broker, address).words
    return ""


def _day(at: float) -> str:
    return f"{datetime.fromtimestamp(at, tz=timezone.utc):%Y-%m-%d %H:%M} UTC"
