"""A card's boot partition, really mounted and written by Linux's own VFAT driver: by a kernel that runs as a program (User-mode Linux).

Where the tests run, VFAT is often not built in, and mounting needs root. The "device" is either the system on the card itself, arm64 and run by
user-mode emulation, or this machine's seen through an overlay: what a script then writes outside the card is gone with the kernel.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.flash.images import SBIN

MODULES = Path("/usr/lib/uml/modules")
SECONDS = 600  # it takes four; a hundred for arm64 programs on a busy machine
BINFMT = Path("/usr/lib/binfmt.d/qemu-aarch64.conf")  # of qemu-user-static: how a kernel learns to run arm64 programs

needs_card_kernel = pytest.mark.skipif(
    not all(shutil.which(tool, path=SBIN) for tool in ("linux.uml", "insmod")),
    reason="no kernel that runs as a program, or no insmod (apt install user-mode-linux kmod; User-mode Linux is for x86 alone)",
)

# Runs as process 1. /proc/sysrq-trigger because poweroff is not in every container.
_INIT = """#!/bin/sh
PATH=/usr/sbin:/usr/bin:/sbin:/bin
mount -t proc proc /proc
modules={modules}/$(uname -r)/kernel/fs
for module in nls/nls_cp437 nls/nls_iso8859-1 fat/fat fat/vfat overlayfs/overlay binfmt_misc; do insmod $modules/$module.ko; done
mount -t tmpfs tmpfs /mnt
mkdir /mnt/upper /mnt/work /mnt/root
{root} && cd /mnt/root || exit
mkdir -p boot/firmware
mount -t proc proc proc
mount -t devtmpfs dev dev
mount -t hostfs -o {folder} none mnt
mount -t vfat -o noatime,umask=0077 dev/ubda1 boot/firmware &&
  chroot . sh -eu /mnt/script > mnt/output 2>&1 && echo done > mnt/done
cd /
umount -R /mnt/root
sync
echo o > /proc/sysrq-trigger
sleep 60
"""
_THIS_MACHINE = "mount -t overlay -o lowerdir=/,upperdir=/mnt/upper,workdir=/mnt/work overlay /mnt/root"
# /dev holds all of the card's partitions before it is mounted anew below.
_CARD = f"""mount -t binfmt_misc binfmt_misc /proc/sys/fs/binfmt_misc && cat {BINFMT} > /proc/sys/fs/binfmt_misc/register
mount -t ext4 /dev/ubda2 /mnt/root && mount -t ext4 /dev/ubda3 /mnt/root/var"""


def run_with_card(card: Path, script: str, folder: Path, *, own_system: bool = False) -> str:
    """Run `script` (sh -eu) with the card's first partition at /boot/firmware and the new `folder` at /mnt; its output.

    `own_system`: on the card's root (partition 2) and /var (3).

    Raises:
        AssertionError: the script failed, or it was not reached; with all that was said.

    """
    folder.mkdir()
    (folder / "script").write_text(script)
    (folder / "init").write_text(_INIT.format(modules=MODULES, folder=folder, root=_CARD if own_system else _THIS_MACHINE))
    (folder / "init").chmod(0o755)
    linux = shutil.which("linux.uml", path=SBIN)
    assert linux is not None, "mark the test with needs_card_kernel"
    command = [linux, "mem=256M", "root=/dev/root", "rootfstype=hostfs", "rootflags=/", "ro", f"ubd0={card}", f"init={folder / 'init'}"]
    command += ["con=null", "con0=null,fd:1", f"uml_dir={folder}"]
    console = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=SECONDS, check=False)
    output = (folder / "output").read_text(errors="replace") if (folder / "output").exists() else ""
    assert (folder / "done").exists(), f"{output}\n{console.stdout[-3000:]}\n{console.stderr[-1000:]}"
    return output
