"""NVIDIA's Jetson Linux on the host, `Linux_for_Tegra`: is its `rootfs` ready for the agent?

After the Jetson Linux Developer Guide (r36.4: Quick Start, Root File System, Flashing Support) and its `apply_binaries.sh`:
the release is unpacked (flash.sh, apply_binaries.sh, bootloader, kernel, nv_tegra), then the sample root file system into
`rootfs`, then `apply_binaries.sh` puts NVIDIA's packages in, `etc/nv_tegra_release` with them.
"""

from __future__ import annotations

from pathlib import Path

RELEASE = Path("etc/nv_tegra_release")
_DEFAULT_TARGET = Path("etc/systemd/system/default.target")
_OF_THE_RELEASE = ("flash.sh", "apply_binaries.sh", "bootloader", "kernel", "nv_tegra")


def is_jetson_root(root: Path) -> bool:
    """Whether `root` is the `rootfs` of NVIDIA's tree, ready or not."""
    tree = root.resolve().parent
    return root.resolve().name == "rootfs" and (tree.name == "Linux_for_Tegra" or any((tree / name).exists() for name in _OF_THE_RELEASE))


def not_ready(root: Path) -> str | None:
    """What is still to be done before the agent is put into NVIDIA's `rootfs`, in words."""
    tree = root.resolve().parent
    if missing := [name for name in _OF_THE_RELEASE if not (tree / name).exists()]:
        return f"{tree} is no complete Jetson Linux (no {', '.join(missing)}); unpack Jetson_Linux_R*_aarch64.tbz2 again"
    if not (root / "usr").is_dir() or not (root / "etc").is_dir():
        return (
            f"{root} has no root file system in it; unpack NVIDIA's: sudo tar xpf Tegra_Linux_Sample-Root-Filesystem_R*_aarch64.tbz2 -C {root}, "
            f"then run sudo ./apply_binaries.sh in {tree}"
        )
    if not (root / RELEASE).is_file():
        return f"{root / RELEASE} is missing, so NVIDIA's own packages are not in the tree yet; run sudo ./apply_binaries.sh in {tree} first"
    return None


def waits_for_a_person(root: Path) -> bool:
    """Whether the board will start NVIDIA's set-up dialogue, which keeps every service of multi-user.target from starting."""
    link = root / _DEFAULT_TARGET
    return link.is_symlink() and link.readlink().name == "nv-oem-config.target"
