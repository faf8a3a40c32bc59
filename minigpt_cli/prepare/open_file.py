"""Open a source's files for reading: only regular ones, decompressed where they must be."""

import io
import lzma
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, cast

from minigpt_cli.core.errors import UserError, first_line
from minigpt_cli.prepare.sources import check_regular
from minigpt_cli.prepare.text_check import TextCheck

SKIPPED_AT_ONCE = 1 << 20  # bytes


@contextmanager
def readable(file: Path) -> Iterator[None]:
    """Turn errors of reading into a ``UserError`` that names the file."""
    try:
        yield
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        if isinstance(error, OSError) and error.strerror is not None:
            raise UserError(f"{file} can't be read: {error.strerror}") from None
        raise UserError(
            f"{file} can't be read: it is damaged or cut off ({first_line(error)}); get it again, "
            "or rename it if it is not compressed"
        ) from None


def open_uncompressed(file: Path, offset: int = 0) -> BinaryIO:
    """Open a file for reading bytes from ``offset`` on; ``COMPRESSED`` files are decompressed.

    Raises:
        UserError: It is a pipe or a device, which can't be read twice.
        OSError: It can't be opened.
    """
    check_regular(file)
    stream = _open(file)
    if stream.seekable():
        stream.seek(offset)
        return stream
    while offset > 0:  # a .zst stream must be read up to there
        offset -= len(stream.read(min(offset, SKIPPED_AT_ONCE))) or offset
    return stream


def read_whole(file: Path) -> str:
    """Return the text of a file, which may be compressed.

    Raises:
        UserError: It can't be read, or isn't UTF-8.
    """
    check = TextCheck(file, whole=True)
    with readable(file), open_uncompressed(file) as stream:
        data = stream.read()
    check.read(data)
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        check.bad(data)
        check.finish()
        raise UserError(f"{file} is not UTF-8 text: byte {error.start:,} is invalid") from None


def _open(file: Path) -> BinaryIO:
    ending = file.suffix.lower()
    if ending == ".gz":
        import gzip

        return cast(BinaryIO, gzip.open(file))
    if ending == ".xz":
        return cast(BinaryIO, lzma.open(file))
    if ending == ".zst":
        import pyarrow as pa

        return cast(BinaryIO, io.BufferedReader(pa.input_stream(str(file), compression="zstd")))
    return file.open("rb")
