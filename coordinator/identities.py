"""`coordinator init`: the authorities, the broker's certificate and those of our own programs, kept fit for use.

Run it as often as you like: it makes what is missing, renews what ends soon, and leaves the rest alone. A key is kept
when its certificate is renewed, so that one renamed file is the whole change and a crash leaves nothing half done.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature

from coordinator.authority import (
    PRIVATE_FILE,
    PRIVATE_FOLDER,
    Authority,
    AuthorityError,
    Usage,
    certificate_pem,
    common_name_of,
    general_name,
    key_digest,
    key_pem,
    load_authority,
    load_certificate,
    load_key,
    make_authority,
    new_key,
    public_key_of,
    save_authority,
)
from coordinator.files import held, write_atomically
from coordinator.settings import ConfigError, CoordinatorSettings
from side_tuning.broker_settings import BrokerSettings

logger = logging.getLogger(__name__)

FLEET_AUTHORITY, CLAIMS_AUTHORITY = "fleet-authority", "claims-authority"
FLEET_REVOKED, CLAIMS_REVOKED = "fleet-revoked.pem", "claims-revoked.pem"
BROKER = "broker"
LOCAL_NAMES = (BROKER, "localhost", "127.0.0.1", "::1")  # what this machine's own programs may call the broker
PROGRAMS = ("gateway", "enrolment", "doctor")  # those that the broker knows by a certificate of their own

AUTHORITY_DAYS = 3650.0
CERTIFICATE_DAYS = 365.0
# `coordinator enrolment` writes new lists all the time; this is how long the broker goes on without it.
REVOCATION_LIST_DAYS = 365.0
AUTHORITY_WARNING = timedelta(days=365)

PUBLIC_FILE = 0o644


@dataclass(frozen=True)
class _Wanted:
    """A certificate that must be there; `names` are those that a server answers to."""

    authority: Authority
    common_name: str
    usage: Usage
    directory: Path
    file_name: str
    names: tuple[str, ...] = ()

    @property
    def certificate_file(self) -> Path:
        return self.directory / f"{self.file_name}.pem"

    @property
    def key_file(self) -> Path:
        return self.directory / f"{self.file_name}.key"


def make_identities(settings: CoordinatorSettings, now: datetime) -> list[str]:
    """Make, renew or reissue whatever needs it; gives a line for each thing done or to be known.

    Raises:
        AuthorityError: a file there cannot be used, or another program is at it.
        ConfigError: a host name in the settings can be in no certificate.

    """
    settings.authority_directory.mkdir(mode=PRIVATE_FOLDER, parents=True, exist_ok=True)
    taken = AuthorityError(f"another `coordinator init` is at work in {settings.authority_directory}; try again when it is done")
    with held(settings.authority_directory / "init.lock", taken):
        return _make_identities(settings, now)


class Renewals:
    """Once a day, in a program that holds the authorities' keys and runs for years: renews what ends soon and lies here.

    Certificates whose keys are elsewhere are left to the next `coordinator init`. Trouble is logged and tried the next day.
    """

    def __init__(self, settings: CoordinatorSettings) -> None:
        self._settings = settings
        self._done_at: datetime | None = None

    def run_due(self, fleet: Authority, now: datetime) -> None:
        if self._done_at is not None and timedelta(0) <= now - self._done_at < timedelta(days=1):
            return  # negative: the clock was ahead, and so is what was issued then
        self._done_at = now
        done: list[str] = []
        for wanted in _certificates(self._settings, fleet):
            try:
                if wanted.key_file.exists():
                    _keep_certificate(wanted, now, done)
            except (ConfigError, OSError) as error:
                logger.error("the certificate of %r was not looked after, trying again in a day: %s", wanted.common_name, error)
        for line in done:
            logger.info("%s", line)


def broker_settings_for(settings: CoordinatorSettings, name: str) -> BrokerSettings:
    """How the program `name` reaches the broker: with the files of `make_identities`, where the settings name none."""
    broker, folder = settings.broker, identity_directory(settings, name)
    if not broker.tls or broker.ca_file or broker.certificate_file or not (folder / "client.pem").exists():
        return broker
    files = {"ca_file": folder / "authorities.pem", "certificate_file": folder / "client.pem", "key_file": folder / "client.key"}
    return broker.model_copy(update=files)


def identity_directory(settings: CoordinatorSettings, name: str) -> Path:
    return settings.data_directory / "identities" / name


def public_host(settings: CoordinatorSettings) -> str:
    """The broker as devices reach it."""
    return settings.enrolment.public_host or settings.broker.host


def broker_names(settings: CoordinatorSettings) -> tuple[str, ...]:
    """Every name and address that the broker's certificate answers to."""
    return tuple(dict.fromkeys([*LOCAL_NAMES, settings.broker.host, public_host(settings)]))


def _make_identities(settings: CoordinatorSettings, now: datetime) -> list[str]:
    done: list[str] = []
    fleet = _keep_authority(settings, FLEET_AUTHORITY, now, done)
    claims = _keep_authority(settings, CLAIMS_AUTHORITY, now, done)

    folder = settings.broker_directory
    for name, authority in ((FLEET_AUTHORITY, fleet), (CLAIMS_AUTHORITY, claims)):
        _keep_file(folder / f"{name}.pem", certificate_pem(authority.certificate))
    for file, authority in ((FLEET_REVOKED, fleet), (CLAIMS_REVOKED, claims)):
        if not _is_list_of(authority, folder / file):
            write_atomically(folder / file, authority.revocation_list([], now=now, days=REVOCATION_LIST_DAYS), PUBLIC_FILE)
            done.append(f"made an empty revocation list: {folder / file}")

    for program in PROGRAMS:
        own = identity_directory(settings, program)
        own.mkdir(mode=PRIVATE_FOLDER, parents=True, exist_ok=True)
        _keep_file(own / "authorities.pem", certificate_pem(fleet.certificate))
    if now < fleet.certificate.not_valid_before_utc:
        done.append(
            f"WARNING: no certificate was looked after, since this machine's clock shows {now:%Y-%m-%d}, before the fleet authority was made: set it. "
            f"If it is right now and was ahead then, begin anew: delete {settings.authority_directory} and {folder}"
        )
        return done
    for wanted in _certificates(settings, fleet):
        if not wanted.key_file.exists():
            write_atomically(wanted.key_file, key_pem(new_key()), PRIVATE_FILE)
        _keep_certificate(wanted, now, done)
    return done


def _certificates(settings: CoordinatorSettings, fleet: Authority) -> list[_Wanted]:
    return [
        _Wanted(fleet, BROKER, "server", settings.broker_directory, BROKER, broker_names(settings)),
        *(_Wanted(fleet, program, "client", identity_directory(settings, program), "client") for program in PROGRAMS),
    ]


def _keep_authority(settings: CoordinatorSettings, name: str, now: datetime, done: list[str]) -> Authority:
    directory, common_name = settings.authority_directory, f"mobillm-fleet {name.replace('-', ' ')}"
    if not (directory / f"{name}.pem").exists():
        known = settings.broker_directory / f"{name}.pem"
        if known.exists():
            raise AuthorityError(
                f"{directory / name}.pem is gone, but the broker knows that authority: bring {directory} back from a backup. "
                f"To begin anew and enrol every device again, delete {known}"
            )
        # A key without certificate was left by a crash, nothing was signed with it.
        authority = make_authority(common_name, now=now, days=AUTHORITY_DAYS)
        save_authority(directory, name, authority)
        done.append(f"made the {name.replace('-', ' ')}: {directory / name}.key (keep it secret, and keep a copy)")
        return authority
    authority = load_authority(directory, name)
    ends = authority.certificate.not_valid_after_utc
    if ends - now < AUTHORITY_WARNING:
        done.append(f"WARNING: the {name.replace('-', ' ')} ends on {ends:%Y-%m-%d}, and every certificate that it signed with it")
    return authority


def _keep_certificate(wanted: _Wanted, now: datetime, done: list[str]) -> None:
    # The broker's key may be shared on purpose: with the user or the group that the broker runs as.
    key = load_key(wanted.key_file, shared=wanted.usage == "server").public_key()
    try:
        names = {general_name(name): name for name in wanted.names}
    except ValueError as error:
        raise ConfigError(f"broker.host or enrolment.public_host cannot be in a certificate: {error}; use a plain host name or address") from error
    found = _found(wanted)
    # Names are added, never dropped: devices that were given an earlier one go on reaching the broker under it.
    earlier = {} if found is None else {name: str(name.value) for name in _names_of(found)}
    reason = _reason_to_issue(wanted, found, key_digest(key), now) or ("" if names.keys() <= earlier.keys() else "it has a new name")
    if not reason:
        return
    answers_to = [*names.values(), *(text for name, text in earlier.items() if name not in names)]
    certificate = wanted.authority.issue(key, wanted.common_name, now=now, days=CERTIFICATE_DAYS, usage=wanted.usage, names=answers_to)
    write_atomically(wanted.certificate_file, certificate_pem(certificate), PUBLIC_FILE)
    known_as = f" for {', '.join(answers_to)}" if answers_to else ""
    ends = certificate.not_valid_after_utc
    done.append(f"issued the certificate of {wanted.common_name!r}{known_as}, until {ends:%Y-%m-%d} ({reason}): {wanted.certificate_file}")


def _found(wanted: _Wanted) -> x509.Certificate | None:
    """The certificate that is there, if it is this authority's."""
    try:
        found = load_certificate(wanted.certificate_file)
        found.verify_directly_issued_by(wanted.authority.certificate)
    except (ValueError, TypeError, InvalidSignature):
        return None
    return found


def _reason_to_issue(wanted: _Wanted, found: x509.Certificate | None, key: str, now: datetime) -> str:
    """Why the certificate that is there will not do; empty if it will."""
    if found is None:
        return "the old one was damaged, or another authority's" if wanted.certificate_file.exists() else "there was none"
    if key_digest(public_key_of(found)) != key or common_name_of(found) != wanted.common_name:
        return "the old one was for another key or name"
    begins, ends = found.not_valid_before_utc, found.not_valid_after_utc
    if now < begins:
        return "the old one is not valid yet"
    if ends - now < (ends - begins) / 3 and ends < wanted.authority.certificate.not_valid_after_utc:
        return f"the old one ends on {ends:%Y-%m-%d}"
    return ""


def _names_of(certificate: x509.Certificate) -> list[x509.GeneralName]:
    try:
        return list(certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value)
    except x509.ExtensionNotFound:
        return []


def _is_list_of(authority: Authority, file: Path) -> bool:
    """Whether the file is a revocation list of this authority; what it revokes is not ours to change."""
    try:
        return x509.load_pem_x509_crl(file.read_bytes()).is_signature_valid(authority.key.public_key())
    except (FileNotFoundError, ValueError, TypeError):
        return False


def _keep_file(path: Path, content: bytes) -> None:
    if not path.exists() or path.read_bytes() != content:
        write_atomically(path, content, PUBLIC_FILE)
