"""Records that cannot be used: skipped, counted and listed, or raised."""

import json
import os
import struct
import tempfile
import weakref
import zlib
from pathlib import Path

from PIL import Image
from transformers.utils import logging

logger = logging.get_logger(__name__)

# What a damaged file makes the standard library, Pillow, numpy and pycocotools raise. A missing
# package (ImportError) is none of it: no record can be read without it.
DAMAGE = (
    OSError,
    EOFError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    ArithmeticError,
    SyntaxError,  # Pillow's for broken PNGs
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)


class BrokenRecords:
    """A list of what was skipped, shared by all processes that read one dataset.

    It is kept in a file, which reading processes append to. The list is logged when the dataset
    goes out of use, at the latest when the program ends.

    Args:
        on_error: "skip", or "raise" to stop at the first.
        path: File to keep the list in; by default a temporary one, deleted at the end.
    """

    def __init__(self, on_error: str = "skip", path: str | os.PathLike | None = None):
        if on_error not in ("skip", "raise"):
            raise ValueError(f'on_error is "skip" or "raise", not {on_error!r}.')
        self.on_error = on_error
        self.known: set[str] = set()  # noted by this process
        if path is None:
            handle, name = tempfile.mkstemp(prefix="broken-records-", suffix=".jsonl")
            os.close(handle)
            self.path = Path(name)
        else:
            self.path = Path(path)
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.touch()
        # Only here: copies in worker processes must neither list nor delete.
        self.at_end = weakref.finalize(self, finish, self.path, os.getpid(), path is None)

    def __getstate__(self) -> dict:
        return {"on_error": self.on_error, "path": self.path, "known": self.known}

    def __len__(self) -> int:
        return len(self.listed())

    def add(self, record_id: str, error: BaseException) -> None:
        """Note a record that cannot be used, or raise."""
        reason = f"{type(error).__name__}: {error}".rstrip(".")
        if self.on_error == "raise":
            raise ValueError(
                f"Record {record_id} cannot be used: {reason}. Mend or remove it, or pass "
                'on_error="skip" to go on without it.'
            ) from error
        if record_id in self.known:
            return
        self.known.add(record_id)
        line = json.dumps([record_id, reason]) + "\n"
        with open(self.path, "ab") as file:  # a short line is appended in one piece
            file.write(line.encode())
        logger.warning(f"Skipped record {record_id} ({len(self.known)} so far): {reason}.")

    def listed(self) -> dict[str, str]:
        """Why each record was skipped."""
        return read_list(self.path)

    def report(self) -> None:
        """Log what was skipped so far."""
        log_list(self.listed())


def read_list(path: Path) -> dict[str, str]:
    """Records and reasons out of the file."""
    return dict(json.loads(line) for line in path.read_text().splitlines())


def log_list(listed: dict[str, str]) -> None:
    """One warning that names them all."""
    if listed:
        lines = "\n".join(f"  {name}: {reason}" for name, reason in listed.items())
        logger.warning(f"Skipped records, since they cannot be used ({len(listed)}):\n{lines}")


def finish(path: Path, owner: int, is_temporary: bool) -> None:
    """List what was skipped, in the process that made the list, and delete a temporary file."""
    if os.getpid() == owner and path.exists():
        log_list(read_list(path))
        if is_temporary:
            path.unlink()
