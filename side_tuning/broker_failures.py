"""Why there is no connection to the broker, in words that name the cure. Pure: no sockets, no paho."""

from __future__ import annotations

import socket
import ssl
from typing import Literal, NamedTuple

from side_tuning.broker_settings import BrokerSettings

# MQTT 5 reason codes; paho gives 3.1.1 return codes the same numbers.
UNSPECIFIED_ERROR = 0x80  # also paho's word for a closed socket
UNSUPPORTED_PROTOCOL_VERSION = 0x84
CLIENT_ID_NOT_VALID = 0x85
NOT_AUTHORIZED = 0x87
BAD_CREDENTIALS = (0x86, 0x87, 0x8C)
SESSION_TAKEN_OVER = 0x8E
PACKET_TOO_LARGE = 0x95

FailureKind = Literal[
    "",
    "unreachable",  # name, network, port
    "lost",
    "refused",  # by MQTT: credentials, client id, access
    "taken-over",
    "too-large",
    "no-tls",  # plain port spoken to with TLS, or the reverse
    "tls",
    "broker-untrusted",  # the broker's certificate: authority or host name
    "broker-dates",  # expired or not valid yet, or this clock is wrong
    "own-revoked",
    "own-expired",
    "own-unknown",  # the broker does not know the authority
    "own-refused",
    "own-missing",
    "files",
]


class Failure(NamedTuple):
    """`kind` for programs, `words` for people."""

    kind: FailureKind
    words: str


def connect_failure(error: Exception, settings: BrokerSettings, address: str) -> Failure:
    """What went wrong before the connection stood, the TLS handshake included."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return _untrusted(error, settings, address)
    if isinstance(error, ssl.SSLError):
        return tls_failure(error, settings, address)
    if isinstance(error, socket.gaierror):
        return Failure("unreachable", f"the broker's name {settings.host!r} cannot be resolved: {error.strerror}; check broker.host and the network")
    if isinstance(error, TimeoutError):
        return Failure("unreachable", f"the broker at {address} does not answer; check the network, broker.host and any firewall")
    if isinstance(error, ConnectionResetError | BrokenPipeError) and settings.tls:
        return _no_tls(address)
    return Failure(
        "unreachable", f"the broker at {address} cannot be reached: {error.strerror if isinstance(error, OSError) else error}; is it running?"
    )


def tls_failure(error: ssl.SSLError, settings: BrokerSettings, address: str) -> Failure:
    """What the other side's TLS alert means, in the handshake or (TLS 1.3) at the first read after it."""
    reason = (error.reason or str(error)).upper().replace(" ", "_")
    mine = f"this program's certificate ({settings.certificate_file})" if settings.certificate_file else "this program's certificate"
    broker = f"the broker at {address}"
    _, _, alert = reason.rpartition("ALERT_")
    if "PROTOCOL_VERSION" in reason or "UNSUPPORTED_PROTOCOL" in reason:
        return Failure("tls", f"{broker} and this program share no TLS version; at least TLS 1.2 is needed at both ends")
    if isinstance(error, ssl.SSLEOFError) or reason in ("WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE", "UNEXPECTED_EOF_WHILE_READING"):
        return _no_tls(address)
    if "ALERT_" in reason:
        match alert:
            case "CERTIFICATE_REVOKED":
                return Failure("own-revoked", f"{broker} refuses {mine}: it was revoked; if that was a mistake, enrol anew")
            case "CERTIFICATE_EXPIRED":
                return Failure("own-expired", f"{broker} refuses {mine}: it has expired (or the broker's own revocation list has); enrol anew")
            case "UNKNOWN_CA":
                return Failure("own-unknown", f"{broker} refuses {mine}: it does not know the authority that signed it; enrol anew with a bundle of this fleet")
            case "BAD_CERTIFICATE" | "CERTIFICATE_UNKNOWN" | "UNSUPPORTED_CERTIFICATE" | "ACCESS_DENIED" | "DECRYPT_ERROR":
                return Failure(
                    "own-refused", f"{broker} does not accept {mine} ({_words(alert)}): not valid yet by the broker's clock, or made for another use; compare the clocks, else enrol anew"
                )
            case "CERTIFICATE_REQUIRED" | "NO_CERTIFICATE":
                return Failure("own-missing", f"{broker} asks for a client certificate and was given none that it can use; set certificate_file and key_file, or enrol")
            case "HANDSHAKE_FAILURE" if not settings.certificate_file:  # TLS 1.2's word for the same
                return Failure("own-missing", f"{broker} ended the TLS handshake; most likely it asks for a client certificate: set certificate_file and key_file, or enrol")
        return Failure("tls", f"{broker} ended TLS: {_words(alert)}; its log says why")
    return Failure("tls", f"TLS with {broker} failed: {error.reason or error}; is that port the TLS listener?")


def _untrusted(error: ssl.SSLCertVerificationError, settings: BrokerSettings, address: str) -> Failure:
    said = f"the broker at {address} cannot be trusted: {error.verify_message}"
    match error.verify_code:  # X509_V_ERR_*, openssl/x509_vfy.h
        case 9:
            return Failure("broker-dates", f"{said}; its certificate is not valid yet: is this device's clock right?")
        case 10:
            return Failure("broker-dates", f"{said}; its certificate has expired: renew it, or set this device's clock")
        case 62 | 64:
            return Failure("broker-untrusted", f"{said}; its certificate is for another name than broker.host: use the name in it, or reissue it for {settings.host!r}")
    return Failure("broker-untrusted", f"{said}; is ca_file ({settings.ca_file or 'the system store'}) the authority that signed it?")


def _no_tls(address: str) -> Failure:
    return Failure("no-tls", f"the broker at {address} ended the TLS handshake without a word; is that port the TLS listener?")


def refusal(reason: int, text: str, settings: BrokerSettings, client_id: str, address: str) -> Failure:
    """What a CONNACK that refuses means."""
    if reason in BAD_CREDENTIALS:
        who = f"username {settings.username!r}" if settings.username else "no username"
        certificate = "a client certificate" if settings.certificate_file else "no client certificate"
        return Failure(
            "refused", f"the broker at {address} refuses the credentials ({text}; {who}, {certificate}); check username, password_file and certificate_file"
        )
    if reason == CLIENT_ID_NOT_VALID:
        return Failure("refused", f"the broker at {address} refuses the client id {client_id!r}; check its rules for client ids")
    return Failure("refused", f"the broker at {address} refuses the connection: {text}")


def dropped(reason: int, text: str, settings: BrokerSettings, client_id: str, address: str, *, answered: bool) -> Failure:
    """Why a connection ended; `answered`: after the broker had accepted it."""
    if reason == SESSION_TAKEN_OVER:
        return Failure("taken-over", f"another client connected to {address} under the same name {client_id!r}; every client needs its own")
    if reason == PACKET_TOO_LARGE:
        return Failure("too-large", f"the broker at {address} ended the connection: packet too large; raise its max_packet_size")
    if not answered and not settings.tls:
        return Failure("no-tls", f"the broker at {address} closed the connection without an answer; is that port the TLS listener? then set tls = true")
    if not answered:
        return Failure("lost", f"the broker at {address} closed the connection without an answer; its log says why")
    if reason == UNSPECIFIED_ERROR:
        return Failure("lost", f"the connection to the broker at {address} was lost; the network or the broker went away")
    return Failure("lost", f"the connection to the broker at {address} was lost: {text}")


def publish_words(reason: int, text: str) -> str:
    """The fate of a publish that the broker refused (MQTT 5 only: 3.1.1 cannot say so)."""
    cure = "; its access rules do not let this name write to that topic" if reason == NOT_AUTHORIZED else ""
    return f"refused by the broker: {text}{cure}"


def _words(alert: str) -> str:
    return alert.lower().replace("_", " ")
