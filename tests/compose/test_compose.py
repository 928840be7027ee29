"""The whole fleet in real containers, brought up with the commands of docs/bring-up.md.

The tests run in order over one fleet; any of them can be run alone, since the fixture brings everything up. Times are
printed, not asserted: the machine may be busy.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from tests.compose.stack import (
    BASE,
    DEVICES,
    IMAGES,
    PROGRAMS,
    PROJECT,
    Stack,
    build_images,
    clear_away,
    container,
    image,
    logs,
    podman,
    state_of,
    volumes,
    wait_slowly,
)

missing = [name for name in ("podman", "buildah", "podman-compose") if shutil.which(name) is None]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(2400),
    pytest.mark.skipif(bool(missing) and "CI" not in os.environ, reason=f"not installed: {', '.join(missing)}"),
]

AGENT_MEGABYTES = 1000
PRIVATE_KEY = re.compile(rb"-----BEGIN (?:EC |RSA |ENCRYPTED |)PRIVATE KEY-----\s*[A-Za-z0-9+/=]{40}")
# Which file may hold a private key, by the volume that it lies in.
OWNERS = {
    "authority": {"fleet-authority.key", "claims-authority.key"},
    "broker": {"broker.key"},
    "gateway-identity": {"client.key", "checkpoint-signing.key"},
    "enrolment-identity": {"client.key"},
    "doctor-identity": {"client.key"},
    "kitchen": {"client.key"},
    "bedroom": {"client.key"},
}


@pytest.fixture(scope="module")
def fleet(tmp_path_factory):
    """Images built, the guide's first three sections done: two devices are enrolled over TLS and send."""
    clear_away()
    try:
        took = build_images()
        print("\nseconds to build:", {name: round(seconds) for name, seconds in took.items()})
        start = time.monotonic()
        stack = Stack(tmp_path_factory.mktemp("fleet"))
        stack.section("1")
        stack.section("2")
        stack.wait_until_enrolled("kitchen")  # before approval is by hand
        stack.section("3")
        stack.wait_for_devices(dict.fromkeys(DEVICES, 1))
        print(f"seconds from nothing to two enrolled devices, without building: {time.monotonic() - start:.0f}")
        yield stack
    except BaseException:
        print("\n".join(logs()))
        raise
    finally:
        clear_away()


@pytest.fixture(autouse=True)
def tell_logs(request):
    failed = request.session.testsfailed
    yield
    if request.session.testsfailed > failed:
        print("\n".join(logs()))


def test_two_devices_send_and_a_checkpoint_comes_back(fleet):
    """Enrolled by bundle, one by hand; samples are stored; the device itself labels a text with a checkpoint that it verified."""
    ledgers = fleet.wait_for_devices(dict.fromkeys(DEVICES, 200))
    assert all(ledger["balanced"] and ledger["rejected"] == 0 for ledger in ledgers.values()), ledgers
    print("\n" + fleet.section("4"))
    audit = fleet.coordinator("audit")
    assert "kitchen" in audit
    assert "approve" in audit


def test_each_program_is_confined(fleet):
    """What the compose file says is in force: no root, nothing writable but /tmp and volumes, no capabilities."""
    for service in (*PROGRAMS, *DEVICES):
        status = podman("exec", container(service), "sh", "-c", "id -u; grep CapEff /proc/1/status; touch /nowhere 2>/dev/null && echo writable; true")
        assert status.split() == ["10001", "CapEff:", "0000000000000000"], (service, status)


def test_the_dashboard_answers(fleet):
    code = "import urllib.request; print(urllib.request.urlopen('http://127.0.0.1:8080/', timeout=60).status)"
    assert podman("exec", container("dashboard"), "python", "-c", code).strip() == "200"


def test_no_key_and_no_claim_lies_outside_its_place(fleet):
    found: dict[str, set[str]] = {}
    for name, folder in volumes().items():
        for path in folder.rglob("*"):
            if path.is_file() and not path.is_symlink() and PRIVATE_KEY.search(path.read_bytes()):
                found.setdefault(name, set()).add(path.name)
                assert path.stat().st_mode & 0o077 == 0, path
    assert found == {name: files for name, files in OWNERS.items() if name in found}, found
    assert set(OWNERS) == set(found), "each key is where it belongs; a bundle's is wiped"
    for path in fleet.folder.rglob("*"):
        assert not path.is_file() or not PRIVATE_KEY.search(path.read_bytes()), path
    told = "\n".join(logs()) + "".join(podman("inspect", container(service)) for service in (*PROGRAMS, *DEVICES))
    assert "PRIVATE KEY" not in told
    for name in IMAGES:
        root = Path(podman("image", "mount", image(name)).strip())
        try:
            for place in (root / "opt" / "mobillm-fleet", root / "var" / "lib" / "mobillm-fleet"):
                hits = subprocess.run(["grep", "-rlE", "^-----BEGIN .*PRIVATE KEY-----", str(place)], capture_output=True, text=True).stdout.split()
                keys = [hit for hit in hits if PRIVATE_KEY.search(Path(hit).read_bytes())]
                assert not keys, keys
            assert not any((root / "var" / "lib" / "mobillm-fleet").rglob("*.pem")), name
        finally:
            podman("image", "unmount", image(name), check=False)


def enrolling(device: str) -> list[str]:
    """A container that reads a bundle from its input and enrols with it."""
    script = "umask 077; cat > /tmp/bundle; exec edge-agent enrol --bundle /tmp/bundle --state /tmp/state --timeout 240"
    options = ["run", "--rm", "-i", "--network", f"{PROJECT}_fleet", "--read-only", "--tmpfs", "/tmp", "--cap-drop", "ALL", "--entrypoint", "sh"]
    return ["podman", *options, "--name", f"{PROJECT}_{device}_1", image("agent"), "-c", script]


def test_a_spent_bundle_is_worthless(fleet):
    """Anybody who gets hold of it later gets nothing."""
    bundle = fleet.coordinator("enrol", "attic", "--out", "-")
    command = enrolling("attic")
    first = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert first.stdin is not None
    first.stdin.write(bundle)
    first.stdin.close()

    def approved() -> bool:
        return first.poll() is not None or subprocess.run(
            ["podman", "exec", container("enrolment"), "coordinator", "devices", "approve", "attic"], capture_output=True
        ).returncode == 0  # fmt: skip

    wait_slowly(approved, 240, "the device asks and is approved")
    assert first.wait(300) == 0, first.stdout.read() if first.stdout else ""
    again = subprocess.run(command, input=bundle, capture_output=True, text=True, timeout=400)
    assert again.returncode not in (0, 75), again
    print("\n" + again.stdout + again.stderr)


def test_each_container_stops_gracefully_and_comes_back(fleet):
    """SIGTERM is enough, nobody needs SIGKILL; afterwards everything goes on."""
    before = {name: ledger["stored"] for name, ledger in fleet.ledgers().items() if name in DEVICES}
    for service in (*PROGRAMS, *DEVICES):
        start = time.monotonic()
        podman("stop", "-t", "120", container(service))
        seconds = time.monotonic() - start
        code = state_of(service)["ExitCode"]
        assert code in (0, 143), f"{service} ended with {code}:\n{podman('logs', '--tail', '20', container(service), check=False)}"
        podman("start", container(service))
        print(f"\n{service}: stopped within {seconds:.1f} s with {code}", end="")
    for program in ("gateway", "trainer", "enrolment"):
        fleet.block(f"docker compose exec -T {program} coordinator alive {program}")
    ledgers = fleet.wait_for_devices(before)
    assert all(ledger["balanced"] for ledger in ledgers.values()), ledgers


def test_taken_down_and_up_again_nothing_is_lost(fleet):
    """Containers go, volumes stay: the guide's way down and its upgrade. In the end every sample that was produced is stored."""
    before = fleet.devices()
    checkpoints = len(fleet.coordinator("checkpoints", "list").splitlines())
    fleet.section("8")
    assert not [name for name in podman("ps", "--format", "{{.Names}}").split() if name.startswith(f"{PROJECT}_")]
    fleet.section("6")
    fleet.wait_for_devices({name: before[name]["ledger"]["stored"] for name in DEVICES})

    def all_accounted_for() -> bool:
        ledgers = fleet.ledgers()
        return all(ledgers[name]["settled"] and ledgers[name]["stored"] == ledgers[name]["produced"] for name in DEVICES)

    wait_slowly(all_accounted_for, 600, "every sample that the devices produced is stored")
    after = fleet.devices()
    for name in DEVICES:
        assert after[name]["ledger"]["produced"] >= before[name]["ledger"]["produced"]
        assert after[name]["ledger"]["rejected"] == 0
    assert len(fleet.coordinator("checkpoints", "list").splitlines()) >= min(checkpoints, 1)


def test_a_revoked_device_is_out_and_a_backup_brings_all_back(fleet):
    before = {name: record["stored_samples"] for name, record in fleet.devices().items()}
    fleet.section("5")  # while the devices go on sending
    backup = fleet.folder / "backups" / "fleet.tar"
    assert backup.stat().st_mode & 0o077 == 0
    after = {name: record["stored_samples"] for name, record in fleet.devices().items()}
    assert "REVOKED" in fleet.section("7")
    shown = json.loads(fleet.coordinator("devices", "show", "bedroom", "--json"))
    assert shown["identity"]["revoked_at"]

    # A new machine: no volumes, only the backup.
    fleet.block("docker compose down -v")
    assert not set(volumes()) & {"data", "authority"}
    fleet.block("docker compose run --rm -T init restore /backups/fleet.tar\ndocker compose up -d")
    fleet.block("docker compose exec -T enrolment coordinator alive enrolment")
    restored = fleet.devices()
    for name in DEVICES:
        assert before[name] <= restored[name]["stored_samples"] <= after[name], name
    fleet.block("docker compose down -v")


def test_postgresql_in_place_of_sqlite(fleet):
    """A new fleet on the other database: it comes up by itself, and lets a device in."""
    fleet.block("docker compose down -v")
    fleet.section("9")
    for program in ("gateway", "trainer", "enrolment"):
        fleet.block(f"docker compose exec -T {program} coordinator alive {program}")
    bundle = fleet.coordinator("enrol", "attic", "--out", "-")
    done = subprocess.run(enrolling("attic"), input=bundle, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "certificate issued" in fleet.coordinator("audit")
    assert not list(volumes()["data"].glob("*.db")), "nothing went into SQLite"
    fleet.block("docker compose down -v")


def test_sizes_and_start_times(fleet):
    """The agent's image is at most 1.0 GB above its base."""
    sizes = {name: int(podman("image", "inspect", "--format", "{{.Size}}", tag)) / 1e6 for name, tag in (("base", BASE), *((name, image(name)) for name in IMAGES))}
    for name in IMAGES:
        print(f"\n{name}: {sizes[name] - sizes['base']:.0f} MB above its base", end="")
    listing = "cd /opt/mobillm-fleet/lib/python3.*/site-packages && du -sm -- * | sort -rn | head -12"
    for name in ("agent", "coordinator"):
        print(f"\n{name}, MB: " + ", ".join(line.replace("\t", " ") for line in podman("run", "--rm", "--entrypoint", "sh", image(name), "-c", listing).splitlines()))
    heavy = {"agent": "import edge_agent.agent, edge_agent.backbone, torch", "coordinator": "import coordinator.training.trainer, coordinator.gateway"}
    for name, code in heavy.items():
        start = time.monotonic()
        podman("run", "--rm", "--read-only", "--entrypoint", "python", image(name), "-c", code)
        print(f"{name}: ready to work {time.monotonic() - start:.1f} s after its container was started")
    assert sizes["agent"] - sizes["base"] <= AGENT_MEGABYTES
