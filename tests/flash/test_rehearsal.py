"""An image that cannot become this device's card is refused before the target changes, and a file is not overwritten unasked."""

from __future__ import annotations

import io
import lzma
import sys
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from edge_agent.cli import app
from edge_agent.flash.command import FlashOptions, flash
from edge_agent.flash.errors import FlashError
from edge_agent.flash.rehearsal import open_preview, rehearse
from tests.flash.images import MIB, boot_file, make_image, needs_image_tools
from tests.flash.test_card import put_bundle
from tests.flash.test_first_boot import SYSTEMS, make_bundle

pytestmark = needs_image_tools

SOMEBODYS = b"somebody's only copy" * 1000


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def desk(tmp_path: Path) -> Path:
    (tmp_path / "bundle").write_text(make_bundle().to_text())
    (tmp_path / "card").write_bytes(SOMEBODYS)
    return tmp_path


def arguments(desk: Path, image: Path, *more: str) -> list[str]:
    return [
        "flash",
        "--image",
        str(image),
        "--target",
        str(desk / "card"),
        "--bundle",
        str(desk / "bundle"),
        *more,
    ]


def packed(image: Path) -> Path:
    place = image.with_name(f"{image.name}.xz")
    place.write_bytes(lzma.compress(image.read_bytes(), preset=0))
    return place


@pytest.mark.parametrize("table", ["dos", "gpt"])
@pytest.mark.parametrize("is_packed", [False, True])
def test_an_image_that_nothing_would_set_up_is_refused_and_the_target_stays(
    desk: Path, table: str, is_packed: bool
):
    image = make_image(
        desk / "os.img",
        {"kernel.img": b"x", "cmdline.txt": b"root=/dev/mmcblk0p2"},
        table=table,
        root_megabytes=1,
    )
    result = CliRunner().invoke(app, arguments(desk, packed(image) if is_packed else image, "--yes"))
    assert result.exit_code == 1
    assert "none of the first-boot systems" in result.output
    assert "kernel.img" in result.output
    assert "does not boot" not in result.output
    assert (desk / "card").read_bytes() == SOMEBODYS


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "no image"),
        (b"text" * 5000, "no disk image"),
        (bytes(510) + b"\x55\xaa" + bytes(4096), "no FAT boot partition"),
        (lzma.compress(bytes(MIB))[:100], "cut short or damaged"),
    ],
)
def test_what_is_no_image_leaves_the_target_as_it_was(desk: Path, content: bytes, words: str):
    (desk / "os.img").write_bytes(content)
    result = CliRunner().invoke(app, arguments(desk, desk / "os.img", "--yes"))
    assert result.exit_code == 1
    assert words in result.output
    assert (desk / "card").read_bytes() == SOMEBODYS


def test_an_image_that_ends_within_its_boot_partition_is_refused(desk: Path):
    image = make_image(desk / "os.img", SYSTEMS["cloud-init"], root_megabytes=1)
    image.write_bytes(image.read_bytes()[: 4 * MIB + 100_000])
    result = CliRunner().invoke(app, arguments(desk, image, "--yes"))
    assert "within its boot partition" in result.output
    assert (desk / "card").read_bytes() == SOMEBODYS


def test_a_target_that_was_not_there_is_not_made_for_a_refused_image(desk: Path):
    (desk / "card").unlink()
    image = make_image(desk / "os.img", {"a": b"b"}, root_megabytes=1)
    assert CliRunner().invoke(app, arguments(desk, image)).exit_code == 1
    assert not (desk / "card").exists()


def test_only_the_part_that_is_looked_at_is_unpacked(desk: Path):
    """Half of a packed image tells as much as all of it; and rehearsing twice gives the same, since nothing stays."""
    whole = packed(make_image(desk / "os.img", SYSTEMS["cloud-init"])).read_bytes()
    (desk / "half.img.xz").write_bytes(whole[: len(whole) // 2])
    rehearse(desk / "half.img.xz", put_bundle)
    with open_preview(desk / "half.img.xz") as preview:
        for _ in range(2):
            preview.rehearse(
                lambda boot: (
                    {}
                    if not boot.exists("mobillm/device.bundle")
                    else pytest.fail("it stayed") or put_bundle(boot)
                )
            )


def test_a_file_with_something_in_it_is_overwritten_only_when_confirmed(
    desk: Path, monkeypatch: pytest.MonkeyPatch
):
    image = make_image(desk / "os.img", SYSTEMS["cloud-init"], root_megabytes=1)
    refused = CliRunner().invoke(app, arguments(desk, image))
    assert refused.exit_code == 1
    assert "add --yes" in refused.output
    options = FlashOptions(image, desk / "card", desk / "bundle")
    monkeypatch.setattr(sys, "stdin", Terminal("no\n"))
    with pytest.raises(FlashError, match="not confirmed; nothing was written"):
        flash(options, Console(file=io.StringIO()))
    assert (desk / "card").read_bytes() == SOMEBODYS
    monkeypatch.setattr(sys, "stdin", Terminal(f"{desk / 'card'}\n"))
    flash(options, Console(file=io.StringIO()))
    assert b"kitchen" in boot_file(desk / "card", "mobillm/flashed.json")
    assert CliRunner().invoke(app, arguments(desk, image, "--yes")).exit_code == 0
    (desk / "card").write_bytes(b"")
    assert CliRunner().invoke(app, arguments(desk, image)).exit_code == 0
