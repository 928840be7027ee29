"""init, enrol, devices, claims, audit as a person uses them: bundles that are secret, words that say what to do."""

import json
import logging
import stat
import sys
from datetime import datetime, timedelta, timezone

import pytest
from cryptography import x509

from coordinator import cli
from coordinator.authority import common_name_of, key_digest, load_authority, new_key, serial_hex
from coordinator.settings import load_settings
from coordinator.store.assignments import assignments
from coordinator.store.commands import commands_to_send
from coordinator.store.engine import open_store
from coordinator.store.health import record_health
from coordinator.store.identities import (
    add_certificate,
    find_claim,
    hold_request,
    mark_certificate_seen,
    spend_claim,
)
from coordinator.store.registry import register_backbone
from side_tuning.bundle import read_bundle
from tests.coordinator.enrolling import make_csr
from tests.coordinator.fleet import MANIFEST, settings_file
from tests.store.frames import report

NOW = datetime.now(timezone.utc)


class CommandLine:
    """`coordinator` in this process, with one configuration; what it printed and its exit code."""

    def __init__(self, folder, capsys, monkeypatch):
        self.config = settings_file(folder, 1883)
        self.settings = load_settings(self.config)
        self._capsys, self._monkeypatch = capsys, monkeypatch
        self.out = self.err = ""

    def __call__(self, *arguments):
        self._monkeypatch.setattr(sys, "argv", ["coordinator", *map(str, arguments)])
        self._monkeypatch.setenv("COORDINATOR_CONFIG", str(self.config))
        with pytest.raises(SystemExit) as ended:
            cli.main()
        self.out, self.err = self._capsys.readouterr()
        return ended.value.code or 0

    def says(self, *arguments):
        assert self(*arguments) == 0, self.err
        return self.out

    def store(self):
        return open_store(self.settings.database_url)


@pytest.fixture
def fresh(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    kept = list(logging.getLogger().handlers)  # the programs set up the log for themselves
    yield CommandLine(tmp_path, capsys, monkeypatch)
    logging.getLogger().handlers[:] = kept


@pytest.fixture
def coordinator(fresh):
    fresh.says("init")
    return fresh


def test_a_device_is_given_its_backbone_when_it_is_let_in(coordinator):
    store = coordinator.store()
    with store.write() as session:
        register_backbone(session, MANIFEST)
    assert coordinator("enrol", "kitchen", "--backbone", "ffff") == 78
    assert "no registered backbone begins with 'ffff'" in coordinator.err
    assert not (coordinator.config.parent / "kitchen.bundle.json").exists()
    coordinator.says("enrol", "kitchen", "--backbone", MANIFEST.fingerprint[:8])
    with store.read() as session:
        assert assignments(session) == {"kitchen": MANIFEST.fingerprint}
    store.close()


def enrolled(coordinator, device="kitchen"):
    """The device as the enrolment program leaves it."""
    coordinator.says("enrol", device)
    bundle = read_bundle(coordinator.config.parent / f"{device}.bundle.json")
    store = coordinator.store()
    with store.write() as session:
        assert spend_claim(session, bundle.claim, key_digest="ef" * 32, at=NOW)
        add_certificate(
            session,
            serial="4b" * 20,
            device=device,
            key_digest="ef" * 32,
            pem=b"PEM",
            issued_at=NOW,
            expires_at=NOW + timedelta(days=90),
            claim=bundle.claim,
        )
    store.close()
    return bundle


def test_a_fleet_file_gets_what_is_missing_and_nothing_twice(coordinator, tmp_path):
    spent = enrolled(coordinator, "attic")
    fleet = tmp_path / "fleet.csv"
    fleet.write_text("device,group,hostname,country\nattic,,,\nkitchen,ground-floor,larder,GB\nstudy,,,GB\n")
    arguments = ("enrol", "--fleet", fleet, "--out", tmp_path / "made", "--group", "house")
    out = coordinator.says(*arguments)
    assert "attic is enrolled already: left as it is" in out
    places = {device: tmp_path / "made" / f"{device}.bundle.json" for device in ("kitchen", "study")}
    assert sorted((tmp_path / "made").iterdir()) == sorted(places.values())
    first = {device: read_bundle(place) for device, place in places.items()}
    assert {device: bundle.group for device, bundle in first.items()} == {"kitchen": "ground-floor", "study": "house"}
    assert len({bundle.claim for bundle in first.values()} | {spent.claim}) == 3
    assert stat.S_IMODE(places["study"].stat().st_mode) == 0o600

    again = coordinator.says(*arguments)
    assert again.count("good until") == 2
    assert {device: read_bundle(place) for device, place in places.items()} == first

    # A claim that was withdrawn, another group, and a new line are reasons for a new bundle.
    coordinator.says("claims", "withdraw", first["study"].claim)
    fleet.write_text("device,group\nkitchen,cellar\nstudy,\nporch,\n")
    coordinator.says(*arguments)
    later = {device: read_bundle(tmp_path / "made" / f"{device}.bundle.json") for device in ("kitchen", "study", "porch")}
    assert later["kitchen"].group == "cellar"
    assert not {bundle.claim for bundle in later.values()} & {bundle.claim for bundle in first.values()}
    assert "group cellar" in coordinator.says("devices", "show", "kitchen")


def test_a_wrong_fleet_file_makes_no_bundle(coordinator, tmp_path):
    fleet = tmp_path / "fleet.csv"
    fleet.write_text("device,group\nkitchen,\nki+chen,\nkitchen,\nporch,the porch\n")
    assert coordinator("enrol", "--fleet", fleet) == 1
    for words in ("line 3 (ki+chen): device name", "line 4 (kitchen): device kitchen is that of line 2 too", "line 5 (porch): group 'the porch'"):
        assert words in coordinator.err
    fleet.write_text("device\nkitchen\nattic\n")
    coordinator.says("enrol", "attic")
    coordinator.says("devices", "revoke", "attic")
    assert coordinator("enrol", "--fleet", fleet) == 1
    assert "revoked: attic; add --readmit" in coordinator.err
    assert not (tmp_path / "bundles").exists()
    coordinator.says("enrol", "--fleet", fleet, "--readmit")
    assert len(list((tmp_path / "bundles").iterdir())) == 2
    assert coordinator("enrol") != 0
    assert coordinator("enrol", "kitchen", "--fleet", fleet) != 0
    assert coordinator("enrol", "--fleet", tmp_path / "none.csv") == 1


def test_init_makes_everything_and_again_says_that_all_is_there(fresh):
    first = fresh.says("init")
    assert first.count("made the") == 2
    assert "certificate of 'broker' for broker, localhost" in first
    for file in (fresh.settings.public_key_file, fresh.settings.data_directory / "coordinator.db"):
        assert file.exists()
    again = fresh.says("init")
    assert again.splitlines() == ["keys and certificates are all there and fit for use", "the database's schema is up to date"]


def test_a_key_that_others_may_read_stops_init_and_enrol_with_78(coordinator):
    key = coordinator.settings.authority_directory / "claims-authority.key"
    key.chmod(0o644)
    for command in (("init",), ("enrol", "kitchen")):
        assert coordinator(*command) == 78
        assert f"chmod 600 {key}" in coordinator.err


def test_a_bundle_holds_all_that_a_device_needs_and_is_secret(coordinator, tmp_path):
    out = coordinator.says("enrol", "kitchen", "--expires", "12h", "--group", "attic")
    assert "enrolment.public_host" in out
    path = tmp_path / "kitchen.bundle.json"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    bundle = read_bundle(path)
    assert (bundle.device, bundle.group, bundle.host, bundle.port, bundle.claims_port) == ("kitchen", "attic", "127.0.0.1", 1883, 8884)
    assert bundle.expires_at - bundle.issued_at == pytest.approx(12 * 3600, abs=2)
    assert bundle.checkpoint_public_key == coordinator.settings.public_key_file.read_text().strip()

    certificate = x509.load_pem_x509_certificate(bundle.claim_certificate.encode())
    claims = load_authority(coordinator.settings.authority_directory, "claims-authority")
    certificate.verify_directly_issued_by(claims.certificate)
    assert common_name_of(certificate) == bundle.claim
    assert bundle.authorities.encode() == (coordinator.settings.broker_directory / "fleet-authority.pem").read_bytes()
    store = coordinator.store()
    with store.read() as session:
        noted = find_claim(session, bundle.claim)
    store.close()
    assert noted is not None
    assert (noted.serial, noted.device) == (serial_hex(certificate), "kitchen")


def test_the_claims_key_is_nowhere_but_in_the_bundle(coordinator, tmp_path):
    coordinator.says("enrol", "kitchen")
    secret = read_bundle(tmp_path / "kitchen.bundle.json").claim_key.splitlines()[1]
    files = [path for path in tmp_path.rglob("*") if path.is_file() and path.suffix != ".json"]
    assert files
    assert not [path for path in files if secret.encode() in path.read_bytes()]
    assert secret not in coordinator.says("devices", "show", "kitchen", "--json") + coordinator.says("audit", "--json")


def test_a_bundle_on_stdout_is_all_of_stdout(coordinator, tmp_path):
    out = coordinator.says("enrol", "kitchen", "--out", "-")
    assert json.loads(out)["device"] == "kitchen"
    assert "good for one certificate of kitchen" in coordinator.err
    assert not list(tmp_path.glob("*.bundle.json"))


def test_a_bundle_is_replaced_only_by_force_and_the_earlier_claim_is_withdrawn(coordinator, tmp_path):
    coordinator.says("enrol", "kitchen")
    first = read_bundle(tmp_path / "kitchen.bundle.json").claim
    assert coordinator("enrol", "kitchen") == 1
    assert "--force" in coordinator.err
    assert first in coordinator.says("claims", "list")
    assert f"withdrew {first}" in coordinator.says("enrol", "kitchen", "--force")
    assert first not in coordinator.says("claims", "list")
    assert "withdrawn since" in coordinator.says("claims", "list", "--all")


def test_a_bundle_that_cannot_be_written_leaves_no_open_claim(coordinator, tmp_path):
    (tmp_path / "file").write_text("")
    assert coordinator("enrol", "kitchen", "--out", tmp_path / "file" / "bundle") == 1
    assert coordinator.says("claims", "list") == "no open claims\n"


def test_without_init_enrol_says_what_to_do(fresh):
    fresh.says("database", "upgrade")
    assert fresh("enrol", "kitchen") == 78
    assert "coordinator init" in fresh.err


@pytest.mark.parametrize("name", ["a+b", "a#", "a/b", "$SYS", "", "gateway", "Fleet", "claim-0123456789abcdef", "-x", "a" * 65])
@pytest.mark.parametrize("command", [["enrol"], *(["devices", one] for one in ("show", "approve", "revoke", "rotate"))])
def test_names_that_no_device_may_have_are_refused_with_the_reason(fresh, command, name):
    assert fresh(*command, "--", name) == 1
    assert "is not allowed" in fresh.err


@pytest.mark.parametrize("expires", ["7", "0d", "-1d", "week", "400d", "1e3h", "nan"])
def test_times_that_make_no_sense_are_refused(fresh, expires):
    assert fresh("enrol", "kitchen", "--expires", expires) == 2
    assert "12h" in fresh.err


def test_devices_shows_what_waits_for_a_person(coordinator):
    assert "no device has been heard of yet" in coordinator.says("devices")
    coordinator.says("enrol", "attic", "--out", "-")
    assert "attic  not enrolled yet; its claim is good until" in coordinator.says("devices")
    bundle = json.loads(coordinator.says("enrol", "cellar", "--out", "-"))
    store = coordinator.store()
    with store.write() as session:
        key = new_key()
        hold_request(session, bundle["claim"], request=make_csr(key, "cellar"), at=NOW - timedelta(hours=2))
    shown = f"with the key {key_digest(key.public_key())[:16]}"
    about = coordinator.says("devices", "show", "cellar")
    assert shown in about
    assert f"  asked for approval   {NOW - timedelta(hours=2):%Y-%m-%d %H:%M:%S}" in about
    assert "  approved             OVERDUE: “approved” did not come within 1 hour" in about
    assert "  first sample stored  not yet" in about
    steps = json.loads(coordinator.says("devices", "show", "cellar", "--json"))["first_steps"]
    assert [step["step"] for step in steps] == ["asked", "claimed", "approved", "seen", "stored"]
    assert "cellar  WAITS FOR APPROVAL: `coordinator devices approve cellar`" in coordinator.says("devices", "list")
    assert f"cellar is approved {shown}" in coordinator.says("devices", "approve", "cellar", "--actor", "anna")
    assert "anna: device approved" in coordinator.says("audit", "--device", "cellar")
    assert coordinator("devices", "approve", "cellar") == 1
    assert "nothing of 'cellar' waits" in coordinator.err

    enrolled(coordinator)
    assert "kitchen  enrolled" in coordinator.says("devices")
    with store.write() as session:
        record_health(session, "kitchen", report(0, 0, 0, 1), NOW)
        mark_certificate_seen(session, "kitchen", "4b" * 20, at=NOW)
    store.close()
    assert "kitchen  enrolled" not in coordinator.says("devices")
    shown = coordinator.says("devices", "--config", coordinator.config, "show", "kitchen")
    for words in ("identity: since", "spent since", "in use since", "enrolment: certificate issued"):
        assert words in shown
    assert [one["device"] for one in json.loads(coordinator.says("devices", "--json"))] == ["kitchen"]
    assert json.loads(coordinator.says("devices", "list", "--json"))
    assert json.loads(coordinator.says("devices", "show", "kitchen", "--json"))["certificates"][0]["serial"] == "4b" * 20


def test_a_revoked_device_comes_back_only_when_asked_for(coordinator):
    enrolled(coordinator)
    assert "kitchen is revoked" in coordinator.says("devices", "revoke", "kitchen", "--reason", "stolen")
    assert "already" in coordinator.says("devices", "revoke", "kitchen")
    assert "kitchen  revoked" in coordinator.says("devices")
    assert "REVOKED" in coordinator.says("devices", "show", "kitchen")
    assert coordinator("enrol", "kitchen", "--force") == 1
    assert "stolen" in coordinator.err
    assert "--readmit" in coordinator.err
    coordinator.says("enrol", "kitchen", "--force", "--readmit")
    assert "device readmitted" in coordinator.says("audit")


def test_rotate_orders_a_new_certificate_from_a_device_that_can_hear_it(coordinator):
    assert coordinator("devices", "rotate", "kitchen") == 1
    assert "was never given a claim" in coordinator.err
    coordinator.says("enrol", "attic", "--out", "-")
    assert coordinator("devices", "rotate", "attic") == 1
    assert "no valid certificate" in coordinator.err
    enrolled(coordinator)
    coordinator.says("devices", "rotate", "kitchen")
    store = coordinator.store()
    with store.read() as session:
        assert [(row.device, row.name, row.created_by) for row in commands_to_send(session, NOW)] == [
            ("kitchen", "renew-certificate", "operator")
        ]
    store.close()
    assert "renewal asked for" in coordinator.says("audit", "--limit", "1")


def test_claims_are_withdrawn_by_name(coordinator):
    claim = json.loads(coordinator.says("enrol", "kitchen", "--out", "-"))["claim"]
    assert "worthless" in coordinator.says("claims", "withdraw", claim, "--reason", "left on the bus")
    assert "already" in coordinator.says("claims", "withdraw", claim)
    assert "left on the bus" in coordinator.says("audit")
    assert coordinator("claims", "withdraw", "claim-none") == 1
    assert "claims list" in coordinator.err


def test_a_device_that_nobody_knows_is_told_so(coordinator):
    assert coordinator("devices", "show", "kitchen") == 1
    assert "coordinator enrol kitchen" in coordinator.err
    assert coordinator.says("audit") == "nothing to tell yet\n"
