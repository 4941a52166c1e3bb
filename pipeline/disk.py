"""What may be written to disk and by whom, and arrays on disk whose rows come in any order."""

import errno
import fcntl
import hashlib
import os
import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from pipeline.spec import UserError

MAX_BYTES = 16_000_000_000  # of an archive, a member or an array: 20 million letters
STRETCH = 1 << 15  # rows that are put in order at once: 26 MB of letters


def check_size(what: str, n_bytes: int) -> None:
    """Refuse what would fill disk or memory, such as a zip bomb."""
    if n_bytes > MAX_BYTES:
        raise UserError(
            f"{what} must not exceed {MAX_BYTES:,} bytes, and declares {n_bytes:,}: "
            "pass another archive"
        )


def check_room(folder: Path, n_bytes: int, cure: str) -> None:
    """Refuse to begin what the disk of ``folder``, which may not exist yet, has no room for."""
    above = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(above).free
    if n_bytes > free:
        raise UserError(
            f"{n_bytes:,} bytes must have room in {str(folder)!r}, but only {free:,} are free on "
            f"its disk: make room or {cure}"
        )


def is_full(error: BaseException | None) -> bool:
    """Whether a full disk is behind an error, as the system says it or, in other words, SQLite."""
    if error is None:
        return False
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    full = isinstance(error, sqlite3.OperationalError) and "is full" in str(error)
    return full or is_full(error.__cause__ or error.__context__)


def keep(file: IO[Any]) -> None:
    """Have a file on the disk before its folder gets its name: a power cut may come between."""
    file.flush()
    os.fsync(file.fileno())


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a folder's own lock, and wait until others that hold it are done; it leaves no file."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def write(path: Path, content: bytes) -> None:
    """Write a file as a whole or not at all; what was there before stays until then.

    Raises:
        UserError: the disk is full, or does not let us write.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with part.open("wb") as file:
            file.write(content)
            keep(file)
        part.replace(path)
    except OSError as error:
        raise UserError(
            f"{str(path)!r} must be writable, but its disk answered '{error.strerror}': "
            "make room there, or name another place"
        ) from error
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)


class RowFile:
    """An ``.npy`` file of uint8 rows that are handed over in any order, of which few are in memory.

    Each row goes at once into the stretch of the file where it belongs, behind those that came
    before it; in the end each stretch is put in order. So all is written and read in long runs,
    however random the places, and there is no second copy on disk either.
    """

    def __init__(self, file: IO[bytes], n_rows: int, shape: tuple[int, ...]) -> None:
        """``file`` is new, and open for reading and writing; ``shape`` is that of a row."""
        facts = {"descr": "|u1", "fortran_order": False, "shape": (n_rows, *shape)}
        np.lib.format.write_array_header_1_0(file, facts)
        self.file, self.shape, self.n_bytes = file, shape, int(np.prod(shape))
        self.start = file.tell()
        self.ends = np.arange(0, n_rows, STRETCH)  # up to where each stretch has rows
        self.places = np.empty(n_rows, np.int64)  # where the row belongs that lies here for now

    def put(self, rows: npt.NDArray[np.uint8], places: npt.NDArray[np.int64]) -> None:
        """Add ``rows`` (m, *shape), of which row i of the array is to be ``places[i]``."""
        stretches = places // STRETCH
        order = np.argsort(stretches, kind="stable")
        found, firsts = np.unique(stretches[order], return_index=True)
        for stretch, some in zip(found, np.split(order, firsts)[1:], strict=True):
            end = self.ends[stretch]
            self.places[end : end + len(some)] = places[some]
            self._seek(end)
            self.file.write(rows[some].data)
            self.ends[stretch] += len(some)

    def finish(self) -> str:
        """Put all rows in order and have them on the disk; the file's SHA-256."""
        self.file.seek(0)
        digest = hashlib.sha256(self.file.read(self.start))
        for start in range(0, len(self.places), STRETCH):
            places = self.places[start : start + STRETCH] - start
            self._seek(start)
            rows = np.frombuffer(self.file.read(len(places) * self.n_bytes), np.uint8)
            ordered = np.empty((len(places), self.n_bytes), np.uint8)
            ordered[places] = rows.reshape(ordered.shape)
            self._seek(start)
            self.file.write(ordered.data)
            digest.update(ordered.data)
        keep(self.file)
        return digest.hexdigest()

    def _seek(self, row: int) -> None:
        self.file.seek(self.start + int(row) * self.n_bytes)
