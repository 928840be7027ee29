"""An image file as a stream of its unpacked bytes: .img, .img.xz, .img.gz, .img.zst, sized and hashed on the way."""

from __future__ import annotations

import gzip
import hashlib
import io
import lzma
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Protocol

from edge_agent.flash.errors import FlashError
from edge_agent.flash.volume import CHUNK_BYTES

MAX_XZ_MEMORY = 512 * 1024 * 1024
SUFFIXES = (".img", ".img.xz", ".img.gz", ".img.zst")


class _Readable(Protocol):
    def read(self, size: int, /) -> bytes: ...


class ImageStream:
    """Reads the unpacked image from the beginning, once. `packed_read` of `packed_size` tells how far it is."""

    def __init__(self, path: Path, packed: IO[bytes], unpacked: _Readable) -> None:
        self.path = path
        self._packed = packed
        self._unpacked = unpacked
        self.packed_size = path.stat().st_size
        self.size = 0
        self._sha256 = hashlib.sha256()

    @property
    def packed_read(self) -> int:
        return min(self._packed.tell(), self.packed_size)

    @property
    def sha256(self) -> str:
        """Of what was read so far."""
        return self._sha256.hexdigest()

    def chunks(self) -> Iterator[bytes]:
        """Chunks of CHUNK_BYTES, the last one may be shorter.

        Raises:
            FlashError: the file is cut short or damaged.

        """
        while content := self._read(CHUNK_BYTES):
            self.size += len(content)
            self._sha256.update(content)
            yield content

    def _read(self, length: int) -> bytes:
        pieces = io.BytesIO()
        try:
            while pieces.tell() < length and (piece := self._unpacked.read(length - pieces.tell())):
                pieces.write(piece)
        except (EOFError, lzma.LZMAError, zlib.error, gzip.BadGzipFile, OSError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise FlashError(f"image {self.path} cannot be read: {error.strerror}") from error
            raise FlashError(f"image {self.path} is cut short or damaged after {self.size:,} bytes ({error}); download it again") from error
        except Exception as error:  # zstandard's own exception, without importing it here
            if type(error).__name__ != "ZstdError":
                raise
            raise FlashError(f"image {self.path} is cut short or damaged after {self.size:,} bytes ({error}); download it again") from error
        return pieces.getvalue()


@contextmanager
def open_image(path: Path) -> Iterator[ImageStream]:
    """Open an image by what its first bytes say it is, whatever its name.

    Raises:
        FlashError: it cannot be opened, is an archive, or needs a package that is not installed.

    """
    try:
        packed = path.open("rb")
    except OSError as error:
        raise FlashError(f"image {path} cannot be opened: {error.strerror}; give the right path with --image") from error
    with packed:
        magic = packed.read(6)
        packed.seek(0)
        yield ImageStream(path, packed, _unpacker(path, packed, magic))


def _unpacker(path: Path, packed: IO[bytes], magic: bytes) -> _Readable:
    if magic.startswith(b"\xfd7zXZ\x00"):
        return _Xz(packed)
    if magic.startswith(b"\x1f\x8b"):
        return gzip.GzipFile(fileobj=packed)
    if magic.startswith(b"\x28\xb5\x2f\xfd"):
        try:
            import zstandard
        except ImportError as error:
            raise FlashError(f"image {path} is packed with zstd: install the package 'zstandard', or unpack it first (zstd -d)") from error
        return _ZstdToTheEnd(zstandard.ZstdDecompressor(max_window_size=2**27).stream_reader(packed, read_across_frames=True), path)
    if magic.startswith((b"PK", b"7z", b"Rar!")):
        raise FlashError(f"{path} is an archive; unpack it and give the .img file inside")
    return packed


class _Xz:
    """`lzma.open` with a limit on memory, which it does not offer; several streams and padding between them are read through."""

    def __init__(self, packed: IO[bytes]) -> None:
        self._packed = packed
        self._decompressor = self._fresh()
        self._waiting = b""

    @staticmethod
    def _fresh() -> Any:
        return lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=MAX_XZ_MEMORY)

    def read(self, size: int, /) -> bytes:
        while True:
            if self._decompressor.eof:
                self._waiting = self._decompressor.unused_data or self._packed.read(CHUNK_BYTES)
                while self._waiting and not self._waiting.strip(b"\x00"):
                    self._waiting = self._packed.read(CHUNK_BYTES)
                self._waiting = self._waiting.lstrip(b"\x00")
                if not self._waiting:
                    return b""
                self._decompressor = self._fresh()
            if self._decompressor.needs_input and not self._waiting:
                self._waiting = self._packed.read(CHUNK_BYTES)
                if not self._waiting:
                    raise EOFError("the file ends before the stream does")
            content: bytes = self._decompressor.decompress(self._waiting, max_length=size)
            self._waiting = b""
            if content:
                return content


class _ZstdToTheEnd:
    """zstandard's reader takes a cut-off file for a finished one; this one looks whether a frame was left open."""

    def __init__(self, reader: Any, path: Path) -> None:
        self._reader = reader
        self._stated = _zstd_content_size(path)
        self._read = 0

    def read(self, size: int, /) -> bytes:
        content: bytes = self._reader.read(size)
        self._read += len(content)
        if not content and self._stated is not None and self._read < self._stated:
            raise EOFError(f"{self._read:,} of {self._stated:,} bytes came out")
        return content


def _zstd_content_size(path: Path) -> int | None:
    """What the first frame states, where it is the only one as the `zstd` program writes files; None where it states nothing."""
    import zstandard

    with path.open("rb") as file:
        parameters = zstandard.get_frame_parameters(file.read(18))
    unknown = (zstandard.CONTENTSIZE_UNKNOWN, zstandard.CONTENTSIZE_ERROR)
    return None if parameters.content_size in unknown else int(parameters.content_size)
