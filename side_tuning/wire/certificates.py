"""A device asks for a certificate, the coordinator answers. Times are seconds since 1970, UTC.

The request names nobody but the CSR's own subject: who asks is the topic's owner, which the broker took from the
client's certificate (a claim's for the first certificate, the device's own for the next).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from side_tuning.wire.bounded import unpack_bounded
from side_tuning.wire.messages import Fields, pack_message

AnswerStatus = Literal["issued", "waiting", "refused"]

MAX_CSR_BYTES = 8192
MAX_REQUEST_BYTES = MAX_CSR_BYTES + 1024
MAX_CERTIFICATES_BYTES = 32_768


@dataclass(frozen=True)
class CertificateRequest:
    """A PKCS #10 request (PEM), and what the asker's clock shows."""

    csr: bytes
    at: float

    def to_bytes(self) -> bytes:
        return pack_message(self)

    @classmethod
    def from_bytes(cls, payload: bytes) -> CertificateRequest:
        fields = Fields(unpack_bounded(payload, max_bytes=MAX_REQUEST_BYTES), "certificate request")
        return cls(csr=fields.binary("csr", MAX_CSR_BYTES), at=fields.number("at", 0.0, 1e12))


@dataclass(frozen=True)
class CertificateAnswer:
    """What became of the request for the key with `key_digest`; an answer to another key is somebody else's.

    `waiting`: a person must approve; ask again. `refused`: `reason` is one word for programs, `text` says it to people.
    """

    status: AnswerStatus
    key_digest: str  # sha256 of the requested public key (SubjectPublicKeyInfo, DER), hexadecimal
    at: float  # the coordinator's clock, for devices that have none
    reason: str = ""  # refused: unknown-claim, claim-spent, claim-expired, claim-withdrawn, wrong-name, bad-request, revoked
    text: str = ""
    certificate: bytes = b""  # PEM
    authorities: bytes = b""  # PEM: whom to trust as the broker's authority from now on

    def to_bytes(self) -> bytes:
        return pack_message(self)

    @classmethod
    def from_bytes(cls, payload: bytes) -> CertificateAnswer:
        fields = Fields(unpack_bounded(payload, max_bytes=2 * MAX_CERTIFICATES_BYTES + 4096), "certificate answer")
        return cls(
            status=fields.choice("status", get_args(AnswerStatus)),
            key_digest=fields.text("key_digest", 64),
            at=fields.number("at", 0.0, 1e12),
            reason=fields.text("reason", 32, ""),
            text=fields.text("text", 1000, ""),
            certificate=fields.binary("certificate", MAX_CERTIFICATES_BYTES),
            authorities=fields.binary("authorities", MAX_CERTIFICATES_BYTES),
        )
