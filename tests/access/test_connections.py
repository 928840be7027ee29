"""Who gets in at all: certificates that are wrong in every way, on both ports, and what the device's side says about it."""

import socket
import ssl
from datetime import timedelta

import pytest
from cryptography.x509.oid import ExtendedKeyUsageOID

from coordinator.authority import make_authority, new_key
from side_tuning.broker_connection import BrokerConnection, BrokerFilesError
from side_tuning.broker_failures import connect_failure
from tests.access.conftest import Client, confirm, token
from tests.access.rules import CLAIM, EVERY_TOPIC, OTHER_CLAIM, may_read, may_write
from tests.brokers import needs_mosquitto
from tests.tls_broker import HOST, Issued, odd_certificate, save, utc_now

pytestmark = [pytest.mark.broker, needs_mosquitto]

DAY = timedelta(days=1)
PORTS = {"devices": False, "claims": True}
RIGHT_NAME = {False: "kitchen", True: CLAIM}


# Each makes a certificate that the port of `claims` must refuse: (broker, folder, claims) -> Issued or None.


def _odd(**options):
    return lambda broker, folder, claims: odd_certificate(
        broker.authorities["claims" if claims else "fleet"], folder, "odd", name=RIGHT_NAME[claims], **options
    )


def _foreign(common_name):
    """Of another authority, which may bear the right one's name."""

    def make(broker, folder, claims):
        name = common_name or broker.authorities["claims" if claims else "fleet"].certificate.subject.rfc4514_string().removeprefix("CN=")
        key = new_key()
        other = make_authority(name, now=utc_now(), days=5)
        return save(other.issue(key.public_key(), RIGHT_NAME[claims], now=utc_now(), days=1, usage="client"), key, folder, "foreign")

    return make


def _self_signed(_broker, folder, claims):
    authority = make_authority(RIGHT_NAME[claims], now=utc_now(), days=5)
    return save(authority.certificate, authority.key, folder, "self-signed")


def _of_the_other_port(*names):
    return lambda broker, _folder, claims: broker.issue(names[claims], claims=not claims)


def _brokers_own(broker, _folder, _claims):
    return Issued(None, broker.broker_directory / "broker.pem", broker.broker_directory / "broker.key")


UNKNOWN = ("own-unknown", "does not know the authority")
REFUSED = {
    "none": (lambda *_: None, ("own-missing", "asks for a client certificate")),
    "another authority": (_foreign("somebody else's fleet"), UNKNOWN),
    "another authority of the same name": (_foreign(None), UNKNOWN),
    "self-signed": (_self_signed, UNKNOWN),
    "of the other port": (_of_the_other_port(CLAIM, "kitchen"), UNKNOWN),
    "of the other port, in a right name": (_of_the_other_port("kitchen", CLAIM), UNKNOWN),
    "of the other port, in the gateway's name": (_of_the_other_port("gateway", "gateway"), UNKNOWN),
    "of the other port, in the enrolment program's name": (_of_the_other_port("enrolment", "enrolment"), UNKNOWN),
    "of the other port, in the doctor's name": (_of_the_other_port("doctor", "doctor"), UNKNOWN),
    "expired": (_odd(not_before=utc_now() - 2 * DAY, not_after=utc_now() - timedelta(minutes=1)), ("own-expired", "has expired")),
    "long expired": (_odd(not_before=utc_now() - 900 * DAY, not_after=utc_now() - 800 * DAY), ("own-expired", "has expired")),
    "not yet valid": (_odd(not_before=utc_now() + DAY, not_after=utc_now() + 2 * DAY), ("own-refused", "not valid yet")),
    "for servers": (_odd(usage=ExtendedKeyUsageOID.SERVER_AUTH), ("own-refused", "another use")),
    "for signing code": (_odd(usage=ExtendedKeyUsageOID.CODE_SIGNING), ("own-refused", "another use")),
}


@pytest.mark.parametrize("port", PORTS)
@pytest.mark.parametrize("case", REFUSED)
def test_a_wrong_certificate_is_refused_with_its_reason(broker, make_client, tmp_path, case, port):
    make, (kind, words) = REFUSED[case]
    client = make_client(broker.settings(make(broker, tmp_path, PORTS[port]), claims=PORTS[port]))
    assert client.connection.epoch == 0
    assert (client.connection.failure_kind, words in client.connection.last_error) == (kind, True), client.connection.last_error


@pytest.mark.parametrize("port", PORTS)
def test_the_brokers_own_certificate_is_for_servers_only(broker, make_client, port):
    client = make_client(broker.settings(_brokers_own(broker, None, None), claims=PORTS[port]))
    assert client.connection.epoch == 0
    assert client.connection.failure_kind == ("own-unknown" if port == "claims" else "own-refused"), client.connection.last_error


@pytest.mark.parametrize(
    ("name", "port"), [("kitchen", "devices"), ("garage", "devices"), ("gateway", "devices"), ("enrolment", "devices"), ("doctor", "devices"), (CLAIM, "claims"), (OTHER_CLAIM, "claims")]
)
def test_a_right_certificate_lets_in(broker, observer, make_client, name, port):
    """So that the tests above could fail."""
    client = make_client(broker.client(name, claims=PORTS[port]), name, [may_read(name)])
    assert (client.connected, client.connection.last_error) == (True, "")
    confirm(observer, client, may_read(name))
    assert client.publish(may_write(name), token()) == "success"


def test_causes_that_differ_are_told_apart(broker, make_client, tmp_path):
    """One message for each cause, but for the names of files."""
    causes = ("none", "another authority", "expired", "not yet valid", "for servers")
    told = []
    for cause in causes:
        issued = REFUSED[cause][0](broker, tmp_path / cause.replace(" ", "-"), False)
        error = make_client(broker.settings(issued)).connection.last_error
        told.append(error.replace(str(issued.certificate_file), "FILE") if issued else error)
    assert len(set(told)) == len(causes), told


# The other layers: no TLS, old TLS, files that do not belong together, a broker that is not ours.


@pytest.mark.parametrize("port", PORTS)
def test_no_tls_no_entry(broker, make_client, port):
    """Anonymous and in clear, on a TLS port."""
    settings = broker.settings(None, claims=PORTS[port]).model_copy(update={"tls": False, "ca_file": None})
    client = make_client(settings)
    assert client.connection.epoch == 0
    assert (client.connection.failure_kind, "is that port the TLS listener" in client.connection.last_error) == ("no-tls", True)


OLD_AND_NEW = {
    "TLS 1.0": (ssl.TLSVersion.TLSv1, False),
    "TLS 1.1": (ssl.TLSVersion.TLSv1_1, False),
    "TLS 1.2": (ssl.TLSVersion.TLSv1_2, True),
    "TLS 1.3": (ssl.TLSVersion.TLSv1_3, True),
}


@pytest.mark.filterwarnings("ignore:ssl.TLSVersion:DeprecationWarning")
@pytest.mark.parametrize("port", PORTS)
@pytest.mark.parametrize("version", OLD_AND_NEW)
def test_tls_versions(broker, version, port):
    """Our own client would not even ask for an old one, so this is a bare socket with the library's objections switched off."""
    asked, allowed = OLD_AND_NEW[version]
    issued = broker.issue(RIGHT_NAME[PORTS[port]], claims=PORTS[port])
    settings = broker.settings(issued, claims=PORTS[port])
    context = ssl.create_default_context(cafile=str(settings.ca_file))
    context.set_ciphers("ALL:@SECLEVEL=0")
    context.minimum_version = context.maximum_version = asked
    context.load_cert_chain(str(issued.certificate_file), str(issued.key_file))
    with socket.create_connection((HOST, settings.port), timeout=30) as plain:
        if allowed:
            with context.wrap_socket(plain, server_hostname=HOST) as tls:
                assert tls.version() == version.replace("TLS ", "TLSv")
            return
        # An alert: the broker refused, not our own library.
        with pytest.raises(ssl.SSLError, match="ALERT") as raised:
            context.wrap_socket(plain, server_hostname=HOST)
    failure = connect_failure(raised.value, settings, f"{HOST}:{settings.port}")
    assert (failure.kind, "at least TLS 1.2 is needed" in failure.words) == ("tls", True)


def test_a_certificate_with_anothers_key_is_told_before_anything_is_sent(broker):
    kitchen, garage = broker.issue("kitchen"), broker.issue("garage")
    settings = broker.settings(Issued(kitchen.certificate, kitchen.certificate_file, garage.key_file))
    with pytest.raises(BrokerFilesError, match="belong together"):
        BrokerConnection(settings, "kitchen")


@pytest.mark.parametrize("port", PORTS)
def test_a_broker_of_another_authority_is_not_spoken_to(broker, make_client, tmp_path, port):
    other = make_authority("somebody else's fleet", now=utc_now(), days=5)
    settings = broker.client(RIGHT_NAME[PORTS[port]], claims=PORTS[port])
    ca_file = save(other.certificate, other.key, tmp_path, "other").certificate_file
    client = make_client(settings.model_copy(update={"ca_file": ca_file}))
    assert client.connection.epoch == 0
    assert (client.connection.failure_kind, "cannot be trusted" in client.connection.last_error) == ("broker-untrusted", True)


# Names that no authority of ours signs (see tests/wire/test_topics.py and tests/coordinator/): should one be signed all the same,
# it opens nothing that belongs to another.

NOT_LET_IN = {"empty": "", "NUL": "\0", "NUL inside": "kitchen\0x"}
POWERLESS = ("+", "#", "kitchen/#", "garage/up/#", "+/up", "..", "/", "kitchen/up", "$SYS", "$share", "kit chen", " ", "kitchen\n", "Gateway", "GATEWAY", "gateway ", "é", "x" * 64)


@pytest.mark.parametrize("port", PORTS)
@pytest.mark.parametrize("name", NOT_LET_IN)
def test_a_name_that_is_none_is_not_let_in(broker, make_client, tmp_path, name, port):
    authority = broker.authorities["claims" if PORTS[port] else "fleet"]
    client = make_client(broker.settings(odd_certificate(authority, tmp_path, "odd", name=NOT_LET_IN[name]), claims=PORTS[port]))
    assert client.connection.epoch == 0
    assert client.connection.failure_kind == "refused"
    assert "refuses the credentials" in client.connection.last_error


@pytest.mark.parametrize("port", PORTS)
@pytest.mark.parametrize("name", POWERLESS)
def test_an_odd_name_opens_nothing_of_anothers(broker, observer, tmp_path, name, port):
    authority = broker.authorities["claims" if PORTS[port] else "fleet"]
    issued = odd_certificate(authority, tmp_path, "odd", name=name)
    client = Client(broker.settings(issued, claims=PORTS[port]), "odd", ["#", "mobillm/v1/+/down/#"])
    client.start()
    try:
        handles = [(topic, client.connection.publish(topic, token("forged"))) for topic in EVERY_TOPIC]
        outcomes = {topic: (handle.wait(30), handle.rc) for topic, handle in handles}
        assert [topic for topic, (sent, _) in outcomes.items() if sent] == []
        # Every answer has come, so every subscription stands; what it reads of all topics is what the whole fleet reads.
        world = {topic: token() for topic in EVERY_TOPIC}
        for topic, payload in world.items():
            observer.connection.publish(topic, payload)
        last = token("last")
        observer.publish("observer/last", last)
        observer.wait_for(last)
        client.publish("mobillm/v1/kitchen/up/health", token())  # its refusal comes after all that was sent to it
        received = {message.topic for message in client.messages()}
        assert all(topic.startswith("mobillm/v1/fleet/down/") for topic in received), received
    finally:
        client.stop()


# Revocation. Alone in its order: before the list is read, after, and what lives on.


@pytest.mark.parametrize("port", PORTS)
def test_revocation_counts_from_the_next_reading_of_the_list(broker, observer, make_client, port):
    claims = PORTS[port]
    name, other = ("claim-" + "f" * 20, "claim-" + "e" * 20) if claims else ("attic", "cellar")
    settings, others = broker.client(name, claims=claims), broker.client(other, claims=claims)
    early = make_client(settings, name, [may_read(name)])
    bystander = make_client(others, other, [may_read(other)])
    broker.revoke(name, claims=claims)
    confirm(observer, early, may_read(name))
    broker.reload()
    # The connection that is up outlives its revocation (the enrolment program ends it) and so does everybody else's.
    confirm(observer, early, may_read(name))
    confirm(observer, bystander, may_read(other))
    assert (early.connection.epoch, bystander.connection.epoch) == (1, 1)
    early.stop()
    late = make_client(settings, name)
    assert late.connection.epoch == 0
    assert (late.connection.failure_kind, "was revoked" in late.connection.last_error) == ("own-revoked", True), late.connection.last_error
    assert make_client(others, "x").connected


def test_an_outdated_revocation_list_locks_everybody_out_and_a_new_one_lets_them_in(broker, make_client):
    broker.write_revocations("claims", days=-1 / 24)
    broker.reload()
    locked_out = make_client(broker.client(CLAIM, claims=True))
    assert locked_out.connection.epoch == 0
    assert "revocation list" in locked_out.connection.last_error
    assert make_client(broker.client("kitchen"), "kitchen").connected, "the other port has a list of its own"
    broker.write_revocations("claims")
    broker.reload()
    assert make_client(broker.client(CLAIM, claims=True)).connected
