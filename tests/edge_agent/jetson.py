"""NVIDIA's tree as its documentation lays it out; made here, not NVIDIA's own."""

from __future__ import annotations

from pathlib import Path


def make_jetson_tree(folder: Path) -> Path:
    """`Linux_for_Tegra` in `folder`, after apply_binaries.sh and l4t_create_default_user.sh and with the agent in it; gives its rootfs."""
    tree = folder / "Linux_for_Tegra"
    root = tree / "rootfs"
    for name in ("bootloader", "kernel/dtb", "nv_tegra", "tools"):
        (tree / name).mkdir(parents=True)
    for name in ("flash.sh", "apply_binaries.sh", "jetson-orin-nano-devkit.conf", "tools/l4t_create_default_user.sh", "kernel/Image", "nv_tegra/nv-apply-debs.sh"):
        (tree / name).touch()
    for name in ("etc/systemd/system/multi-user.target.wants", "usr/lib/systemd/system", "boot/extlinux", "opt/mobillm-fleet/bin"):
        (root / name).mkdir(parents=True)
    (root / "lib").symlink_to("usr/lib")  # as in Ubuntu
    (root / "etc" / "nv_tegra_release").write_text("# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic, EABI: aarch64\n")
    (root / "opt" / "mobillm-fleet" / "bin" / "edge-agent").touch(mode=0o755)
    return root
