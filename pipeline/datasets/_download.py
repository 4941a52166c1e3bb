"""Fetches, of a zip archive on a web server, only the members that are needed.

HTTP range requests write the archive's directory and the spans of those members, each at its own
place, into a sparse file of the archive's full size, so that ``zipfile`` does all the parsing and
checking. Of EMNIST that is 36 MB of 562. A server that ignores ranges sends the whole file.
"""

import fcntl
import hashlib
import json
import lzma
import os
import re
import struct
import time
import zipfile
import zlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

import requests
import urllib3
from tqdm import tqdm

from pipeline.disk import check_room, check_size
from pipeline.spec import UserError

WAITS = (1.0, 2.0, 4.0)  # seconds before the second, third and fourth try
TIMEOUT = (5.0, 30.0)  # seconds: to connect, between two packets
BROKEN = (  # what reading a broken zip raises
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
    struct.error,
    EOFError,
    UnicodeDecodeError,  # in the name of a member
    RuntimeError,  # encrypted, or packed in an unknown way
)
_CURE = "set LETTERS_CACHE to another folder"
_CHUNK = 1 << 16  # bytes
_TAIL = 1 << 18  # bytes; room for the directory of some 2,000 members


class FetchError(Exception):
    """Why an archive could not be fetched, in a few words; the caller adds the cure."""


class _Again(Exception):
    """A failure that the next try may mend."""


def local_path(url: str, cache: Path) -> Path:
    """Where the finished copy of ``url`` lies in the folder ``cache``."""
    return cache / f"{hashlib.sha256(url.encode()).hexdigest()[:32]}.zip"


def fetch(url: str, cache: Path, members: Callable[[str], bool]) -> Path:
    """A zip file on disk that ``zipfile`` can read for the members whose names ``members`` accepts.

    It appears when it is complete and its CRCs hold; until then ``.part`` and ``.json`` beside it
    keep what has come, and the next call goes on from that byte. One URL always goes with the same
    ``members``. Raises ``FetchError`` for the network and ``UserError`` for the disk.
    """
    final = local_path(url, cache)
    try:
        if not final.exists():
            cache.mkdir(parents=True, exist_ok=True)
            with final.with_suffix(".lock").open("w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)  # a second process waits, then finds all done
                if not final.exists():
                    _download(url, final, members)
    except OSError as error:
        raise UserError(
            f"the folder of downloads must be writable and have room, and {cache} gives "
            f"'{error.strerror or error}': make room there or set LETTERS_CACHE to another folder"
        ) from error
    return final


def _download(url: str, final: Path, members: Callable[[str], bool]) -> None:
    """Try, wait and try again, until all is here; then give the file its final name."""
    part = final.with_suffix(".part")
    bar: tqdm[NoReturn] = tqdm(desc="archive", unit="B", unit_scale=True, disable=None)
    with requests.Session() as session, bar:
        copy = _Copy(url, part, session, bar)
        for wait in (*WAITS, None):
            try:
                copy.begin()
                _fill(copy, members)
                break
            # urllib3's own errors come from read1, which requests does not wrap.
            except (_Again, requests.RequestException, urllib3.exceptions.HTTPError) as error:
                if wait is None or isinstance(error, ValueError):  # a malformed URL stays so
                    raise FetchError(_cause(error)) from error
                time.sleep(wait)
    part.replace(final)
    final.with_suffix(".json").unlink()


def _fill(copy: "_Copy", members: Callable[[str], bool]) -> None:
    """Bring what is missing of the archive's directory and of the members, and check their CRCs."""
    try:
        copy.bring(copy.size - _TAIL, copy.size)
        with zipfile.ZipFile(copy.path) as archive:
            infos, end = archive.infolist(), archive.start_dir
        starts = sorted(info.header_offset for info in infos)
        if starts and starts[0] < 0:
            raise zipfile.BadZipFile("a member before its beginning")
        stops = dict(zip(starts, [*starts[1:], end], strict=True))
        spans = {i: (i.header_offset, stops[i.header_offset]) for i in infos if members(i.filename)}
        if not spans:  # it is not kept: the next one at this address may be the right one
            raise FetchError("it is a zip archive without the letters")
        gaps = [gap for span in spans.values() for gap in copy.missing(*span)]
        for info in spans:
            check_size(info.filename, info.file_size)
        missing = sum(stop - start for start, stop in gaps)
        check_room(copy.path.parent, missing, _CURE)
        copy.bar.total = copy.bar.n + missing
        for span in spans.values():
            copy.bring(*span)
        # Opened anew, because a buffer of the first may hold zeros of holes that are filled by now.
        with zipfile.ZipFile(copy.path) as archive:
            for info in spans:
                with archive.open(info) as member:
                    while member.read(_CHUNK):  # up to the end, where zipfile compares the CRC
                        pass
    except BROKEN as error:
        copy.restart(0, "")
        raise _Again(f"what it sends is no whole zip archive ({error})") from error


class _Copy:
    """The sparse copy of a remote file, and a note of what has come that outlives a kill.

    The note holds the remote file's size, its version (ETag or date) and the spans [start, stop)
    that are here. It is written after the bytes that it tells of.
    """

    def __init__(
        self, url: str, path: Path, session: requests.Session, bar: "tqdm[NoReturn]"
    ) -> None:
        self.url, self.path, self.session, self.bar = url, path, session, bar
        self.note = path.with_suffix(".json")
        self.size, self.version, self.spans = 0, "", list[list[int]]()
        path.touch()
        with suppress(FileNotFoundError, ValueError):
            size, version, spans = json.loads(self.note.read_text())
            if size == path.stat().st_size:  # else the note is about a copy that is gone
                self.size, self.version, self.spans = size, version, spans

    def restart(self, size: int, version: str) -> None:
        """Forget all that has come."""
        self.size, self.version, self.spans = size, version, []
        self._save()
        os.truncate(self.path, size)

    def _save(self) -> None:
        new = self.note.with_suffix(".new")
        new.write_text(json.dumps([self.size, self.version, self.spans]))
        new.replace(self.note)  # atomic: a kill leaves the old note or the new one

    def missing(self, start: int, stop: int) -> list[tuple[int, int]]:
        """The gaps in [start, stop)."""
        gaps = []
        for here, gone in [*sorted(self.spans), [stop, stop]]:
            if start < min(here, stop):
                gaps.append((start, min(here, stop)))
            start = max(start, gone)
        return gaps

    def begin(self) -> None:
        """Ask for one byte, to learn whether the archive is still the one that was begun."""
        with self._get(0, 1) as reply:
            size = _place(reply)[2]
            version = reply.headers.get("ETag") or reply.headers.get("Last-Modified", "")
            if (size, version) != (self.size, self.version):
                self.restart(size, version)
            self._receive(reply)

    def bring(self, start: int, stop: int) -> None:
        """Make the bytes [start, stop) be here, as far as the remote file has them."""
        for gap in self.missing(max(0, start), min(stop, self.size)):
            with self._get(*gap) as reply:
                self._receive(reply)

    def _get(self, start: int, stop: int) -> requests.Response:
        headers = {"Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
        reply = self.session.get(self.url, headers=headers, timeout=TIMEOUT, stream=True)
        if reply.status_code in (200, 206):
            return reply
        reply.close()
        error = _Again if reply.status_code == 429 or reply.status_code >= 500 else FetchError
        raise error(f"HTTP status {reply.status_code}")

    def _receive(self, reply: requests.Response) -> None:
        at, stop, _ = _place(reply)
        check_room(self.path.parent, stop - at, _CURE)
        self.spans.append([at, at])
        with self.path.open("r+b") as file:
            file.seek(at)
            # read1 hands on what is there, so that a broken connection loses no byte that came.
            while at < stop and (chunk := reply.raw.read1(min(_CHUNK, stop - at))):
                file.write(chunk)
                file.flush()
                at += len(chunk)
                self.spans[-1][1] = at
                self._save()
                self.bar.update(len(chunk))
        if at < stop:
            raise _Again("the connection broke off")


def _place(reply: requests.Response) -> tuple[int, int, int]:
    """Where the bytes of a reply belong: start, stop, and the size of the whole file."""
    place = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+)", reply.headers.get("Content-Range", ""))
    length = reply.headers.get("Content-Length", "")
    if reply.status_code == 206 and place:
        at, stop, size = int(place[1]), int(place[2]) + 1, int(place[3])
    elif reply.status_code == 200 and length.isdecimal():  # ranges are ignored
        at, stop, size = 0, int(length), int(length)
    else:
        raise FetchError("it does not say which bytes it sends")
    check_size("an archive", max(stop, size))
    return at, stop, size


def _cause(error: BaseException) -> str:
    """The innermost error in a few words: requests' own text runs over several lines."""
    while error.__context__ is not None and not isinstance(error, _Again):
        error = error.__context__
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
