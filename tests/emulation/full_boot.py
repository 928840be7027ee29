"""The whole way under emulation: our image, flashed with a bundle, booted as a machine of its own, until its frames are stored.

python -m tests.emulation.full_boot --image image/mobillm-fleet-arm64.img --work FOLDER      (docs/image.md)

The guest has no other network than the way to this machine. Ends with 0 when frames of the guest are stored and nothing
secret is left on its boot partition.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from edge_agent.flash.fat import FatPartition
from edge_agent.flash.partitions import boot_partition
from edge_agent.flash.volume import FileVolume
from tests.emulation.host_side import DEVICE, HostSide, patiently, running

GUEST_SEES_HOST = "10.0.2.2"  # qemu's user network


class FullBoot(HostSide):
    """See this module."""

    def run(self, seconds: float) -> None:
        with ExitStack() as stack:
            self.serve(stack)
            self.flash()
            with self.card.open("r+b") as file:
                file.truncate(self.image.stat().st_size + 512 * 1024 * 1024)  # a card is larger than the image: /var has to grow
            raw = self.boot_partition()
            assert all(secret in raw for secret in self.secrets()), "the search finds nothing where the secret must be"
            self.say("booting")
            guest = stack.enter_context(self.boot())
            patiently(lambda: "Reached target" in self.serial() or guest.poll() is not None, seconds, "systemd runs in the guest")
            self.say("systemd runs in the guest")
            self.wait(guest, self.folder / "serial.log", seconds)
            print(self.coordinator("devices", "show", DEVICE))
            # Its own last step comes after the agent's first: the root read-only, written out.
            patiently(lambda: "Make the root read-only" in self.serial() or guest.poll() is not None, seconds, "the first boot ends")
        self.say("guest switched off")
        assert "resized filesystem" in self.serial() or "CHANGED: partition=3" in self.serial(), "/var did not grow"
        self.search_secrets()
        self.say("nothing secret is left on the boot partition")

    @contextmanager
    def boot(self) -> Iterator[subprocess.Popen[bytes]]:
        """Kernel, initramfs and command line come from the flashed card, as the Raspberry Pi's boot loader takes them."""
        with FileVolume(self.card) as volume:
            part = boot_partition(volume)
            boot = FatPartition(volume, part.start)
            names = boot.names()
            cmdline = boot.read("cmdline.txt").decode()
        files = {}
        for kind in ("vmlinuz", "initrd"):
            files[kind] = self.folder / kind
            name = next(name for name in names if name.startswith(kind))
            subprocess.run(["mcopy", "-o", "-i", f"{self.card}@@{part.start}", f"::/{name}", files[kind]], check=True)
        command = [
            "qemu-system-aarch64", "-M", "virt", "-cpu", "cortex-a72", "-smp", "2", "-m", "2048", "-accel", "tcg,thread=multi",
            "-display", "none", "-no-reboot", "-serial", f"file:{self.folder / 'serial.log'}",
            "-kernel", files["vmlinuz"], "-initrd", files["initrd"], "-append", f"{cmdline} console=ttyAMA0 systemd.journald.forward_to_console=1",
            "-drive", f"file={self.card},format=raw,if=none,id=card", "-device", "virtio-blk-pci,drive=card",
            "-netdev", "user,id=net,restrict=off", "-device", "virtio-net-pci,netdev=net,romfile=", "-device", "virtio-rng-pci",
        ]
        with running(list(map(str, command)), self.folder / "qemu.log") as process:
            yield process

    def serial(self) -> str:
        path = self.folder / "serial.log"
        return path.read_text(errors="replace") if path.exists() else ""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.emulation.full_boot", description=__doc__)
    parser.add_argument("--image", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True, help="a new folder; keeps the logs and the card, 4 GB")
    parser.add_argument("--seconds", type=float, default=1800, help="for each step")
    options = parser.parse_args()
    missing = [name for name in ("qemu-system-aarch64", "mcopy", "mosquitto") if shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin") is None]
    if missing:
        sys.exit(f"not installed: {', '.join(missing)} (apt install qemu-system-arm mtools mosquitto)")
    options.work.mkdir(parents=True)
    FullBoot(options.image, options.work.absolute(), seen_as=GUEST_SEES_HOST).run(options.seconds)


if __name__ == "__main__":
    main()
