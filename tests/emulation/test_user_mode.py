"""From a flashed card to stored activations on arm64, without a machine that boots: what the suite can afford of tests/emulation/full_boot.py.

The root is Debian's for arm64 with the agent as the image has it, made into a card image by the image's own recipe. `edge-agent flash` puts
it on a file. A kernel mounts that file's partitions and runs, emulated as a Cortex-A72, what cloud-init would run, then the sealing of the
root. Then the agent runs as its unit says, on the card's read-only root and its /var. Left out: systemd, cloud-init itself, the network.
Set-up and agent are in unlike boots, as on systems that start again after the set-up: steps before the agent's first have no time.
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import pytest
from sqlalchemy import create_engine, select
from sqlalchemy.orm import Session

from coordinator.store.models import FrameRow
from coordinator.store.training import frame_payloads
from edge_agent.backbone import Backbone
from edge_agent.flash.image import root as roots
from edge_agent.flash.image.disk import DISK_ID, make_disk
from edge_agent.flash.image.tree import MIRROR, cache_folder, debian_tree
from edge_agent.install import UNIT
from edge_agent.taps import compute_taps
from side_tuning.bundle import read_bundle
from side_tuning.first_steps import ORDER
from side_tuning.wire.codecs import decode_vectors
from side_tuning.wire.frame import decode_frame
from side_tuning.wire.messages import TapPlan
from tests.brokers import needs_mosquitto
from tests.emulation.card_kernel import BINFMT, needs_card_kernel, run_with_card
from tests.emulation.host_side import DEVICE, SAMPLES, HostSide, as_lines, rows, running
from tests.emulation.test_secrets import first_boot, found, partition_bytes, secrets_of
from tests.flash.images import SBIN, needs_image_tools
from tests.flash.test_first_boot import PASSPHRASE

PACKAGES = ["systemd", "python3", "tzdata"]
# Python's packages compile its library when they are set up: under emulation that takes longer than all the rest.
_HOOK = """python=/usr/lib/python3.13; divert="chroot $1 dpkg-divert --local --rename"; """
HOOKS = [
    f'--essential-hook={_HOOK}mkdir -p "$1$python"; $divert --divert $python/py_compile.debian --add $python/py_compile.py; touch "$1$python/py_compile.py"',
    f'--customize-hook={_HOOK}rm "$1$python/py_compile.py"; $divert --remove $python/py_compile.py',
]
SECONDS = 1200.0  # for one step on a busy machine
TOOLS = {"mmdebstrap": "mmdebstrap", "arch-test": "arch-test", "qemu-aarch64-static": "qemu-user-static", "mke2fs": "e2fsprogs", "debugfs": "e2fsprogs", "unshare": "util-linux"}


def why_not() -> str:
    """What is missing, in words; empty where the test can run."""
    missing = sorted({package for tool, package in TOOLS.items() if shutil.which(tool, path=SBIN) is None})
    if missing:
        return f"apt install {' '.join(missing)}"
    return "" if os.geteuid() == 0 else "making Debian's tree and mounting the card need root"


pytestmark = [
    pytest.mark.slow, pytest.mark.broker, pytest.mark.timeout(3600), needs_mosquitto, needs_image_tools, needs_card_kernel,
    pytest.mark.skipif(bool(why_not()), reason=why_not()),
]


def mirror() -> str:
    """Where this machine gets Debian's packages, where it is a Debian; it may have no way to another."""
    command = ["apt-get", "indextargets", "--format", "$(ORIGIN) $(COMPONENT) $(REPO_URI)", "Created-By: Packages"]
    for line in subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines():
        origin, component, address = line.split(" ", 2)
        if (origin, component) == ("Debian", "main") and not address.rstrip("/").endswith("security"):
            return address
    return MIRROR


def prepare_emulation() -> None:
    """The kernel of this machine runs arm64 programs, too, from now on."""
    place = Path("/proc/sys/fs/binfmt_misc")
    if not (place / "register").exists():
        subprocess.run(["mount", "-t", "binfmt_misc", "binfmt_misc", place], check=True)
    if not (place / "qemu-aarch64").exists() and platform.machine() != "aarch64":
        (place / "register").write_bytes(BINFMT.read_bytes())


class UserMode(HostSide):
    """The device's part: its system is the card's, its kernel this machine's."""

    def make_image(self) -> None:
        tree = self.folder / "work/root"
        tar = debian_tree(PACKAGES, cache_folder(), mirror=mirror(), more=HOOKS)
        self.say("Debian's tree is there")
        roots.unpack(tar, tree)
        roots.add_agent(tree)
        roots.configure(tree)
        self.say("agent and torch are in it")
        make_disk(tree, self.image)
        shutil.rmtree(self.folder / "work")
        self.say(f"image of {self.image.stat().st_size:,} bytes made")

    @contextmanager
    def agent(self, name: str, new_samples: str = "") -> Iterator[tuple[subprocess.Popen[bytes], Path]]:
        """The service as its unit starts it, on the card, after `new_samples` came; all mounts end with it."""
        place = self.folder / name
        place.mkdir()
        root, var = (f"noatime,loop,offset={part.start},sizelimit={part.size}" for part in (self.partition(1), self.partition(2)))
        mount = "\n".join(
            [
                "set -eu",
                f"mount -o ro,{root} {self.card} {place}",
                f"mount -o {var} {self.card} {place}/var",
                f"printf %s {shlex.quote(new_samples)} >> {place}/var/lib/mobillm-fleet/samples.jsonl",
                f"grep -q '^PARTUUID=[^ ]* / ext4 ro,' {place}/etc/fstab",
                f"mount -t tmpfs tmpfs {place}/tmp",
                f"mount --bind /dev {place}/dev",
                f"mount --bind /proc {place}/proc",
                f"user=$(sed -n 's/^mobillm-fleet:[^:]*:\\([0-9]*:[0-9]*\\):.*/\\1/p' {place}/etc/passwd)",
                f"unit={place}/etc/systemd/system/{UNIT}",
                "program=$(sed -n 's/^ExecStart=//p' $unit)",
                "environment=$(sed -n 's/^Environment=//p' $unit)",
                f"exec chroot --userspec=$user {place} /usr/bin/env -i QEMU_CPU=cortex-a72 OMP_NUM_THREADS=1 PATH=/usr/bin:/bin HOME=/var/lib/mobillm-fleet $environment $program",
            ]
        )
        log = self.folder / f"{name}.log"
        with running(["unshare", "--mount", "--propagation", "private", "sh", "-c", mount], log) as process:
            yield process, log

    def taps(self) -> dict[int, np.ndarray]:
        """What is stored, by layer, in the order in which it was made: (samples, width)."""
        engine = create_engine(f"sqlite:///{self.folder / 'data/coordinator.db'}")
        with Session(engine) as session:
            payloads = frame_payloads(session, session.scalars(select(FrameRow.id)))
        engine.dispose()
        frames = sorted((decode_frame(payload) for payload in payloads.values()), key=lambda frame: frame.captured_at)
        taps = [tap for frame in frames for tap in frame.taps]
        return {
            layer: np.concatenate([decode_vectors(tap.data, tap.rows, tap.width, tap.codec, tap.group) for tap in taps if tap.layer == layer])
            for layer in sorted({tap.layer for tap in taps})
        }


def test_a_flashed_card_comes_to_stored_activations_on_arm64(tmp_path: Path):
    prepare_emulation()
    host = UserMode(tmp_path / "made.img", tmp_path, seen_as="127.0.0.1", settings='[plan]\ncodec = "int8"\n')
    host.make_image()
    with ExitStack() as stack:
        host.serve(stack)
        (tmp_path / "wifi").write_text(PASSPHRASE)
        (tmp_path / "hash").write_text("$6$salt$hash\n")
        wifi = ["--wifi", "Küche 'n' Bar", "--wifi-secret-file", tmp_path / "wifi", "--country", "GB"]
        host.flash(*wifi, "--password-hash-file", tmp_path / "hash")
        host.image.unlink()
        secrets = secrets_of(read_bundle(host.bundle))
        raw = partition_bytes(host.card)
        assert all(found(raw, secret) for secret in secrets), "the search finds nothing where the secret must be"

        script = [
            "export QEMU_CPU=cortex-a72 PATH=/usr/sbin:/usr/bin:/sbin:/bin",
            "uname -m",
            f"mkdir -p /dev/disk/by-partuuid && ln -s /dev/ubda2 /dev/disk/by-partuuid/{DISK_ID}-02",  # udev's work
            "systemd-tmpfiles --create /etc/tmpfiles.d/mobillm-fleet.conf",  # as every boot does
            first_boot("cloud-init", host.card),
            "/usr/lib/mobillm-fleet/seal-root",
        ]
        output = run_with_card(host.card, "\n".join(script) + "\n", tmp_path / "set-up", own_system=True)
        assert output == "aarch64\n", "something had to be said, by seal-root where the root stays writable"
        host.say("set up and sealed")
        raw = partition_bytes(host.card)
        assert not [secret for secret in secrets if found(raw, secret)]
        host.search_secrets()

        with host.agent("first") as (agent, log):
            host.wait(agent, log, SECONDS)
        shown = json.loads(host.coordinator("devices", "show", DEVICE, "--json"))
        print(host.coordinator("devices", "show", DEVICE))
        steps = {step["step"]: step for step in shown["first_steps"]}
        assert set(steps) == {*ORDER} - {"asked", "approved"}  # a claim that is given out is approved
        assert all(step["done"] and not step["overdue"] for step in steps.values()), steps

        with host.agent("second", as_lines(rows(SAMPLES))) as (agent, log):
            host.wait(agent, log, SECONDS, samples=2 * SAMPLES)
        assert host.query("select count(*) from certificates") == 1, "the second boot enrolled anew"

    texts = [row["text"] for row in rows() + rows(SAMPLES)]
    here = compute_taps(Backbone.load(host.backbone), texts, TapPlan(1, ("light", "music"), 2)).values
    there = host.taps()
    assert list(there) == list(here)
    for layer, values in here.items():
        errors = np.linalg.norm(there[layer] - values, axis=1) / np.linalg.norm(values, axis=1)
        host.say(f"layer {layer}: relative error at most {errors.max():.4f}")
        assert errors.max() < 0.02, "the emulated device computed something else"
    host.card.unlink()  # two gigabytes
