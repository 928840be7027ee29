"""MAIN FLOW of enrolment on the device: bundle -> key made here -> request with the claim's certificate -> certificate.

Read `enrol`. Rules: the key never leaves this device; nothing in an answer is believed before it was checked against what
the bundle says; the identity is on the disk before the bundle's secret is wiped, so that a crash at any point costs nothing
but the next try. Neither torch nor the samples' code is loaded.
"""

from __future__ import annotations

import logging
import os
import queue
import random
import stat
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec

from edge_agent import exit_codes
from edge_agent.first_steps import FirstSteps
from edge_agent.identity import (
    IdentityStore,
    certificate_request,
    check_authorities,
    check_certificate,
    key_digest,
)
from edge_agent.identity_file import IdentityError, IdentityFacts
from edge_agent.sd_notify import notify
from edge_agent.settings import AgentSettings
from edge_agent.spool_file import sync_folder
from edge_agent.trusted_clock import TrustedClock
from side_tuning.alive import alive_trouble, touch_alive
from side_tuning.broker_connection import BrokerConnection, Message, PublishHandle
from side_tuning.broker_settings import BrokerSettings
from side_tuning.bundle import Bundle, BundleError, read_bundle
from side_tuning.wire import topics
from side_tuning.wire.bounded import FrameError
from side_tuning.wire.certificates import CertificateAnswer, CertificateRequest

logger = logging.getLogger(__name__)

REPEAT_SECONDS = 5.0
REPEAT_WAITING_SECONDS = 30.0  # once a person must approve
LOOK_SECONDS = 0.1
TOUCH_SECONDS = 10.0
ANSWER_SECONDS = 300.0
USABLE_SECONDS = 60.0  # for a new bundle where there is an identity to go on with
RETRY_MIN_SECONDS = 10.0
RETRY_MAX_SECONDS = 600.0
NOT_REACHED = ("", "unreachable", "files")  # other failures are the broker's answer


class EnrolmentFailed(Exception):  # noqa: N818 - reads as what happened
    """No certificate; the text says why and the cure, `exit_code` whether trying again can help."""

    def __init__(self, text: str, exit_code: int) -> None:
        super().__init__(text)
        self.exit_code = exit_code


class Stopped(Exception):  # noqa: N818
    """Somebody wants the program to end."""


def enrol(
    bundle_file: Path,
    state_directory: Path,
    *,
    clock: TrustedClock,
    timeout_seconds: float | None = None,
    say: Callable[[str], None] = logger.info,
    stop: threading.Event | None = None,
    tick: Callable[[], None] = lambda: None,
) -> str:
    """Turn a bundle into this device's identity; returns what was done, in words. Does nothing if that is done already.

    Args:
        bundle_file: from `coordinator enrol`; its secret is wiped at the end.
        state_directory: where the identity goes.
        clock: for devices whose own is wrong.
        timeout_seconds: give up after this time; None: after five minutes without any answer, but wait for an approval.
        say: is told what takes time.
        stop: ends the waiting.
        tick: is called while waiting.

    Raises:
        EnrolmentFailed: with the cure.
        IdentityError: the state directory cannot be used.
        Stopped: `stop` was set.

    """
    store = IdentityStore(state_directory)
    with store.held():
        try:
            bundle = read_bundle(bundle_file)
        except BundleError as error:
            identity = store.load()
            if identity is not None and not bundle_file.exists():
                return f"already enrolled as {identity.facts.device!r}; {bundle_file} is gone, as it should be"
            if identity is not None and _wiping_began(bundle_file):
                return f"already enrolled as {identity.facts.device!r}{_wiped(bundle_file)}"
            raise EnrolmentFailed(str(error), exit_codes.CONFIG_ERROR) from error
        if _is_done(store, bundle, bundle_file):
            return f"already enrolled as {bundle.device!r}{_wiped(bundle_file)}"

        key = store.next_key(bundle.claim)
        steps = FirstSteps(state_directory)
        answer = _ask(bundle, key, clock, steps, timeout_seconds=timeout_seconds, say=say, stop=stop or threading.Event(), tick=tick)
        identity = store.install(
            IdentityFacts.of(bundle), answer.certificate, answer.authorities or bundle.authorities.encode(), bundle.checkpoint_public_key,
        )
        clock_right = not clock.is_behind  # of the time that the coordinator told
        steps.note("enrolled", *(("clock",) if clock_right else ()))
        steps.settle(clock_right=clock_right)
        ends = identity.certificate.not_valid_after_utc
        return f"enrolled as {bundle.device!r}; the certificate is good until {ends:%Y-%m-%d} and renews itself{_wiped(bundle_file)}"


def enrol_before_start(settings: AgentSettings, stop: threading.Event) -> bool:
    """`edge-agent run` with a bundle: enrol first, however long it takes. False: stopped meanwhile.

    Where trying again cannot help, a new bundle can be put in the old one's place while this waits.
    """
    bundle_file, store = settings.bundle_file, IdentityStore(settings.state_directory)
    if bundle_file is None or not settings.uses_identity:
        return True
    tick = partial(_still_starting, settings.alive_file)
    pause = RETRY_MIN_SECONDS
    while not stop.is_set():
        clock = TrustedClock(settings.state_directory)
        usable = _usable(store, clock)
        if usable and not bundle_file.exists():
            return True
        try:
            timeout = USABLE_SECONDS if usable else None
            logger.info("%s", enrol(bundle_file, settings.state_directory, clock=clock, timeout_seconds=timeout, stop=stop, tick=tick))
        except Stopped:
            break
        except (EnrolmentFailed, IdentityError) as error:
            if usable:
                logger.error("the bundle is of no use, the identity from before stays: %s", error)
                return True
            logger.error("not enrolled: %s; next try in %.0f s", error, pause)
        else:
            return True
        deadline = time.monotonic() + pause
        while time.monotonic() < deadline and not stop.wait(1.0):
            tick()
        pause = min(pause * 2, RETRY_MAX_SECONDS) * random.uniform(0.8, 1.0)  # noqa: S311 - a whole fleet may be waiting
    return False


def _usable(store: IdentityStore, clock: TrustedClock) -> bool:
    """Whether there is an identity that has not ended."""
    try:
        identity = store.load()
    except IdentityError:
        return False
    return identity is not None and clock.now() < identity.ends


def _is_done(store: IdentityStore, bundle: Bundle, bundle_file: Path) -> bool:
    """Whether this very claim has become the identity; another claim for the same device is meant to replace it."""
    try:
        identity = store.load()
    except IdentityError as error:
        logger.warning("%s; enrolling anew", error)
        return False
    if identity is None:
        return False
    if identity.facts.device != bundle.device:
        raise EnrolmentFailed(
            f"{store.state} belongs to {identity.facts.device!r}, but {bundle_file} is for {bundle.device!r}; give the right bundle, "
            "or another state directory",
            exit_codes.CONFIG_ERROR,
        )
    return identity.facts.claim == bundle.claim


# The question and its answer.


def _ask(
    bundle: Bundle,
    key: ec.EllipticCurvePrivateKey,
    clock: TrustedClock,
    steps: FirstSteps,
    *,
    timeout_seconds: float | None,
    say: Callable[[str], None],
    stop: threading.Event,
    tick: Callable[[], None],
) -> CertificateAnswer:
    """Ask again and again until the answer to this key is there, and checked."""
    arrived: queue.Queue[bytes] = queue.Queue(maxsize=32)

    def on_message(message: Message) -> None:
        with suppress(queue.Full):
            arrived.put_nowait(message.payload)

    request = certificate_request(key, bundle.device)
    deadline: float | None = time.monotonic() + (ANSWER_SECONDS if timeout_seconds is None else timeout_seconds)
    waiting, repeat, ask_at = False, REPEAT_SECONDS, 0.0
    asked: PublishHandle | None = None
    with _claim_settings(bundle) as settings:
        connection = BrokerConnection(
            settings, bundle.claim, subscriptions=[topics.certificate_answer(bundle.claim)], on_message=on_message,
            trusted_time=clock.instead_of_system,
        )
        connection.start()
        try:
            while True:
                if stop.is_set():
                    raise Stopped
                tick()
                if (connection.connected or connection.failure_kind not in NOT_REACHED) and steps.note("network"):
                    steps.settle(clock_right=False)
                now = time.monotonic()
                if connection.connected and now >= ask_at:
                    asked = connection.publish(topics.certificate_request(bundle.claim), CertificateRequest(request, max(0.0, time.time())).to_bytes())
                    ask_at = now + repeat * random.uniform(0.8, 1.2)  # noqa: S311 - a whole fleet may ask at once
                answer = _next_answer(arrived, key)
                if answer is not None and answer.status == "issued":
                    try:
                        certificate = check_certificate(answer.certificate, key, bundle.device, bundle.authorities.encode())
                        check_authorities(answer.authorities or bundle.authorities.encode())
                    except IdentityError as error:
                        logger.error("an answer was not accepted: %s", error)
                    else:
                        believe(clock, answer.at, certificate, connection.peer_certificate_expires_at)
                        return answer
                elif answer is not None and answer.status == "refused":
                    raise EnrolmentFailed(_refusal(answer, bundle), exit_codes.CONFIG_ERROR)
                elif answer is not None and not waiting:
                    waiting, repeat = True, REPEAT_WAITING_SECONDS
                    deadline = None if timeout_seconds is None else deadline
                    say(
                        f"the coordinator has the request of {bundle.device!r} with the key {key_digest(key.public_key())[:16]}; "
                        f"it waits for approval (`coordinator devices approve {bundle.device}`)"
                    )
                _give_up_if_hopeless(connection, bundle)
                if deadline is not None and now > deadline:
                    raise EnrolmentFailed(_silence(connection, asked, bundle, waiting=waiting), exit_codes.TRY_AGAIN)
        finally:
            connection.stop()


def believe(clock: TrustedClock, at: float, certificate: x509.Certificate, broker_ends: float | None) -> None:
    """Tell the clock the coordinator's time, unless that cannot be right: it would lock the device out for good.

    Past the end of the broker's certificate, that certificate and every next one would seem to have expired.
    """
    latest = min(certificate.not_valid_after_utc.timestamp(), float("inf") if broker_ends is None else broker_ends)
    if at < latest:
        clock.told(at, no_later_than=latest)
    else:
        logger.warning("the coordinator's clock is far ahead; its time was not taken over")


def _next_answer(arrived: queue.Queue[bytes], key: ec.EllipticCurvePrivateKey) -> CertificateAnswer | None:
    try:
        answer = CertificateAnswer.from_bytes(arrived.get(timeout=LOOK_SECONDS))
    except queue.Empty:
        return None
    except FrameError as error:
        logger.error("an answer was not understood: %s", error)
        return None
    if answer.key_digest != key_digest(key.public_key()) and (answer.key_digest or answer.status != "refused"):
        logger.warning("an answer to another key was ignored: is this bundle in use on a second device?")
        return None
    return answer


def _refusal(answer: CertificateAnswer, bundle: Bundle) -> str:
    cures = {
        "unknown-claim": "the coordinator does not know this claim: is the bundle from this fleet?",
        "claim-spent": "this bundle was already used, by another key than this device's",
        "claim-expired": "the claim has expired",
        "claim-withdrawn": "the claim was withdrawn",
        "wrong-name": "the claim is for another device",
        "revoked": f"{bundle.device!r} was revoked",
    }
    said = cures.get(answer.reason, f"the coordinator refused ({answer.reason or 'no reason given'})")
    return f"{said}{f' ({answer.text})' if answer.text else ''}; make a new bundle with `coordinator enrol {bundle.device}`"


def _give_up_if_hopeless(connection: BrokerConnection, bundle: Bundle) -> None:
    """What the broker says of the claim's certificate will not change by asking again, nor will its own."""
    anew = f"make a new bundle with `coordinator enrol {bundle.device}`"
    words = {
        "own-expired": f"the claim in the bundle has expired; {anew}",
        "own-revoked": f"the claim in the bundle was already used, or withdrawn; {anew}",
        "own-unknown": f"the broker at {connection.address} does not know the authority of this claim, so the bundle is not from its fleet; {anew} there",
        "broker-untrusted": f"{connection.last_error.split(';')[0]}: it is not the broker that the bundle was made for, or its authority was replaced; "
        f"check that {bundle.host} is right, else {anew}",
    }.get(connection.failure_kind)
    if words is not None and connection.failures:
        raise EnrolmentFailed(words, exit_codes.CONFIG_ERROR)


def _silence(connection: BrokerConnection, asked: PublishHandle | None, bundle: Bundle, *, waiting: bool) -> str:
    if waiting:
        return f"still waiting for approval; `coordinator devices approve {bundle.device}`, then run this again"
    if connection.last_error:
        return f"{connection.last_error}. Run this again; the bundle is still good until it expires"
    if asked is not None and asked.failed:
        return f"the request could not be sent: {asked.rc}"
    if connection.connected:
        return f"the broker at {connection.address} took the request, but nobody answered; is `coordinator enrolment` running?"
    return f"the broker at {connection.address} does not answer; check the network"


def _still_starting(alive_file: Path) -> None:
    """To systemd and health checks, as long as it takes."""
    notify("EXTEND_TIMEOUT_USEC=120000000\nSTATUS=enrolling")
    if alive_trouble(alive_file, TOUCH_SECONDS):
        with suppress(OSError):
            touch_alive(alive_file)


# The claim's secret.


@contextmanager
def _claim_settings(bundle: Bundle) -> Iterator[BrokerSettings]:
    """How to reach the claims' port. TLS wants files: in memory where the system has such, else in a private folder."""
    contents = {"ca_file": bundle.authorities, "certificate_file": bundle.claim_certificate, "key_file": bundle.claim_key}
    with ExitStack() as cleanup:
        try:
            files = {name: _memory_file(name, content.encode(), cleanup) for name, content in contents.items()}
        except (AttributeError, OSError):  # another system than Linux, or forbidden
            folder = Path(cleanup.enter_context(tempfile.TemporaryDirectory()))  # mode 0700
            files = {name: folder / name for name in contents}
            for name, path in files.items():
                path.write_text(contents[name], encoding="ascii")
                cleanup.callback(wipe, path)
        yield BrokerSettings(host=bundle.host, port=bundle.claims_port, **files)  # type: ignore[arg-type]


def _memory_file(name: str, content: bytes, cleanup: ExitStack) -> Path:
    descriptor = os.memfd_create(name)
    cleanup.callback(os.close, descriptor)
    os.write(descriptor, content)
    path = Path(f"/proc/self/fd/{descriptor}")
    path.stat()  # a system may have the one without the other
    return path


def wipe(path: Path) -> str:
    """Overwrite and delete a file with a secret; returns why it is still there, or nothing.

    On flash memory the old blocks may survive below the file system; the claim inside is spent by then.
    """
    path = path.resolve()
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            return ""  # came through a pipe
    except FileNotFoundError:
        return ""
    except OSError as error:
        return error.strerror or str(error)
    gone = why = ""
    try:
        with path.open("r+b") as file:
            file.write(b"\0" * path.stat().st_size)
            file.flush()
            os.fsync(file.fileno())
            file.truncate(0)
        gone = "overwritten"
    except OSError as error:
        why = error.strerror or str(error)
    try:
        path.unlink()
        sync_folder(path.parent)
        gone = "deleted"
    except OSError as error:
        why = error.strerror or str(error)
    return "" if gone else why


def _wiping_began(path: Path) -> bool:
    """What a power cut while wiping leaves."""
    try:
        content = path.read_bytes()
    except OSError:
        return False
    return not content or b"\0" in content


def _wiped(bundle_file: Path) -> str:
    """The end of the last message: what became of the bundle."""
    why = wipe(bundle_file)
    return f". The bundle {bundle_file} could not be wiped ({why}): delete it, it holds a spent key" if why else "; the bundle was wiped"
