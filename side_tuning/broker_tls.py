"""TLS with the broker: what must hold before a byte is sent, and what a failure was.

Chain and host name are always verified. A device without a clock cannot check dates against it; then dates alone are
checked here, against a *trusted time* that certainly lies in the past: a certificate that had expired by then is refused.
One that begins later proves nothing, the true time is unknown; nor are intermediate certificates looked at, which Python
does not show.
"""

from __future__ import annotations

import contextlib
import ssl
from typing import Any

from side_tuning.broker_settings import BrokerFilesError, BrokerSettings

NO_CHECK_TIME = 0x200000  # X509_V_FLAG_NO_CHECK_TIME, openssl/x509_vfy.h; the ssl module has no name for it
HAS_EXPIRED = 10  # X509_V_ERR_CERT_HAS_EXPIRED


class RememberingSocket(ssl.SSLSocket):
    """Keeps what TLS failed with, which paho swallows.

    With TLS 1.3 a client learns that its certificate is refused after the handshake, at its first read.
    """

    failure: OSError | None = None
    trusted_time: float | None = None

    def do_handshake(self, block: bool = False) -> None:
        super().do_handshake(block)
        if self.trusted_time is not None:
            _refuse_expired(self, self.trusted_time)

    def recv(self, buflen: int = 1024, flags: int = 0) -> bytes:
        try:
            return super().recv(buflen, flags)
        except OSError as error:
            self._remember(error)
            raise

    def send(self, data: Any, flags: int = 0) -> int:
        try:
            return super().send(data, flags)
        except OSError as error:
            self._remember(error)
            if self.failure is not None:  # the reason may have arrived before the connection broke
                with contextlib.suppress(OSError, ValueError):
                    self.recv(1)
            raise

    def _remember(self, error: OSError) -> None:
        if isinstance(error, ssl.SSLWantReadError | ssl.SSLWantWriteError | BlockingIOError):
            return
        if self.failure is None or isinstance(error, ssl.SSLError):
            self.failure = error


def tls_context(settings: BrokerSettings, trusted_time: float | None = None) -> ssl.SSLContext | None:
    """What a connection with these settings needs; None without TLS. Reads the files anew: they may have been renewed.

    Args:
        settings: the files.
        trusted_time: seconds since 1970 that have certainly passed, where the system's clock is known to be wrong.

    Raises:
        BrokerFilesError: a file is missing or wrong.

    """
    if not settings.tls:
        return None
    try:
        context = ssl.create_default_context(cafile=str(settings.ca_file) if settings.ca_file else None)
    except (OSError, ssl.SSLError) as error:
        raise BrokerFilesError(f"ca_file {settings.ca_file} cannot be used: {error}; give a PEM file with the authority") from error
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if trusted_time is not None:
        context.verify_flags |= NO_CHECK_TIME
    context.sslsocket_class = type("BrokerSocket", (RememberingSocket,), {"trusted_time": trusted_time})
    if settings.certificate_file is not None:
        try:
            context.load_cert_chain(str(settings.certificate_file), str(settings.key_file))
        except (OSError, ssl.SSLError) as error:
            raise BrokerFilesError(
                f"certificate_file {settings.certificate_file} with key_file {settings.key_file} cannot be used: {error}; "
                "both must be readable PEM files that belong together"
            ) from error
    return context


def _refuse_expired(connection: ssl.SSLSocket, trusted_time: float) -> None:
    peer: Any = connection.getpeercert()
    issuers: list[Any] = [authority for authority in connection.context.get_ca_certs() if authority["subject"] == peer["issuer"]]
    valid = ssl.cert_time_to_seconds(peer["notAfter"]) >= trusted_time
    if issuers:  # one name, several certificates: an authority that was renewed
        valid = valid and any(ssl.cert_time_to_seconds(issuer["notAfter"]) >= trusted_time for issuer in issuers)
    if not valid:
        error = ssl.SSLCertVerificationError(1, "certificate has expired")
        error.verify_code, error.verify_message = HAS_EXPIRED, "certificate has expired"
        raise error
