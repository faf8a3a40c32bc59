"""Check that a file is UTF-8 text, while it is read; say how to convert it if it isn't."""

import shlex
from dataclasses import dataclass
from pathlib import Path

from minigpt_cli.core.errors import UserError

_MOST_INVALID = 1000  # refuse a file if more than one byte in so many is invalid

# First bytes -> (what the file is, the command that prints its content).
_DECOMPRESS = {".gz": "gzip -dc", ".xz": "xz -dc", ".zst": "zstd -dc"}
_COMPRESSED = {
    b"\x1f\x8b": ("gzip", "gunzip -c", ".gz"),
    b"\xfd7zXZ": ("xz", "xz -dc", ".xz"),
    b"\x28\xb5\x2f\xfd": ("zstd", "zstd -dc", ".zst"),
}
_BINARY = {
    b"\x7fELF": "a program",
    b"PK\x03\x04": "a zip archive",
    b"%PDF": "a PDF",
    b"PAR1": "a Parquet file",
}


@dataclass
class TextCheck:
    """What was found in a file so far.

    Attributes:
        file: The file, for messages.
        whole: Whether it is read from its beginning. Else its share of invalid bytes isn't known.
        head: Its first bytes.
        size: Bytes so far.
        invalid: Bytes so far that aren't UTF-8.
    """

    file: Path
    whole: bool
    head: bytes = b""
    size: int = 0
    invalid: int = 0

    def read(self, data: bytes) -> None:
        """Count the file's next bytes.

        Raises:
            UserError: There is a NUL among them: this is no text.
        """
        if not self.size:
            self.head = data[:512]
        self.size += len(data)
        if b"\0" in data:
            raise UserError(f"{self.file} holds NUL bytes: {self._way_out(is_binary=True)}")

    def bad(self, data: bytes) -> None:
        """Count the invalid bytes of a line that isn't UTF-8."""
        self.invalid += len(data) - len(data.decode(errors="ignore").encode())

    def finish(self) -> None:
        """Judge the whole file.

        Raises:
            UserError: Too many of its bytes are invalid.
        """
        if self.whole and self.invalid * _MOST_INVALID > self.size:
            share = self.invalid / self.size
            raise UserError(
                f"{self.file} is not UTF-8 text ({share:.1%} of its bytes are invalid): "
                f"{self._way_out()}"
            )

    def _way_out(self, is_binary: bool = False) -> str:
        name = shlex.quote(str(self.file))
        for magic, (kind, command, ending) in _COMPRESSED.items():
            if self.head.startswith(magic):
                return (
                    f"it is compressed with {kind}; rename it to end with {ending}, "
                    f"or use `{command} < {name} > NEW`"
                )
        for magic, kind in _BINARY.items():
            if self.head.startswith(magic):
                return f"it is {kind}; leave it out, or extract its text first"
        if self.head.startswith((b"\xff\xfe", b"\xfe\xff")) or self._alternates():
            return f"it looks like UTF-16; convert it: `{self._iconv('UTF-16')}`"
        if is_binary:
            return "it looks like a binary file; leave it out"
        return f"leave it out, or convert it, for example from Latin-1: `{self._iconv('LATIN1')}`"

    def _iconv(self, encoding: str) -> str:
        """Return the command that converts the file; a compressed one is decompressed first."""
        name = shlex.quote(str(self.file))
        reader = _DECOMPRESS.get(self.file.suffix)
        if reader is not None:
            return f"{reader} < {name} | iconv -f {encoding} -t UTF-8 > NEW"
        return f"iconv -f {encoding} -t UTF-8 {name} > NEW"

    def _alternates(self) -> bool:
        """Return whether nearly every second byte is NUL, as in UTF-16 without a mark."""
        fewer, more = sorted(self.head[parity::2].count(b"\0") for parity in (0, 1))
        return more * 5 > len(self.head) * 2 and fewer * 10 < len(self.head)
