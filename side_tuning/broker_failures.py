"""Why there is no connection to the broker, in words that name the cure. Pure: no sockets, no paho."""

from __future__ import annotations

import socket
import ssl

from side_tuning.broker_settings import BrokerSettings

# MQTT 5 reason codes; paho gives 3.1.1 return codes the same numbers.
UNSPECIFIED_ERROR = 0x80  # also paho's word for a closed socket
UNSUPPORTED_PROTOCOL_VERSION = 0x84
CLIENT_ID_NOT_VALID = 0x85
BAD_CREDENTIALS = (0x86, 0x87, 0x8C)
SESSION_TAKEN_OVER = 0x8E
PACKET_TOO_LARGE = 0x95


def connect_words(error: Exception, settings: BrokerSettings, address: str) -> str:
    if isinstance(error, ssl.SSLCertVerificationError):
        cure = {
            9: "its certificate is not valid yet: is this device's clock right?",
            10: "its certificate has expired: renew it, or set this device's clock",
        }.get(error.verify_code, f"is ca_file ({settings.ca_file or 'the system store'}) the authority that signed it?")
        return f"the broker at {address} cannot be trusted: {error.verify_message}; {cure}"
    if isinstance(error, ssl.SSLError):
        return f"TLS with the broker at {address} failed: {error.reason or error}; is that port the TLS listener?"
    if isinstance(error, socket.gaierror):
        return f"the broker's name {settings.host!r} cannot be resolved: {error.strerror}; check broker.host and the network"
    if isinstance(error, TimeoutError):
        return f"the broker at {address} does not answer; check the network, broker.host and any firewall"
    return f"the broker at {address} cannot be reached: {error.strerror if isinstance(error, OSError) else error}; is it running?"


def refusal_words(reason: int, text: str, settings: BrokerSettings, client_id: str, address: str) -> str:
    if reason in BAD_CREDENTIALS:
        who = f"username {settings.username!r}" if settings.username else "no username"
        certificate = "a client certificate" if settings.certificate_file else "no client certificate"
        return (
            f"the broker at {address} refuses the credentials ({text}; {who}, {certificate}); "
            "check username, password_file and certificate_file"
        )
    if reason == CLIENT_ID_NOT_VALID:
        return f"the broker at {address} refuses the client id {client_id!r}; check its rules for client ids"
    return f"the broker at {address} refuses the connection: {text}"


def dropped_words(reason: int, text: str, client_id: str, address: str) -> str:
    if reason == SESSION_TAKEN_OVER:
        return f"another client connected to {address} under the same name {client_id!r}; every client needs its own"
    if reason == PACKET_TOO_LARGE:
        return f"the broker at {address} ended the connection: packet too large; raise its max_packet_size"
    if reason == UNSPECIFIED_ERROR:
        return f"the connection to the broker at {address} was lost; the network or the broker went away"
    return f"the connection to the broker at {address} was lost: {text}"
