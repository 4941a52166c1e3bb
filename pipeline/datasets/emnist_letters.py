"""EMNIST Letters, from NIST's archive or from any archive in the same layout.

Cohen, Afshar, Tapson and van Schaik (2017), "EMNIST: an extension of MNIST to handwritten letters",
arXiv 1702.05373. Its letters are gzipped idx files in a zip: pictures transposed, labels 1..26
with upper and lower case merged, the last rows of train a validation split as large as test.
"""

import gzip
import hashlib
import os
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import IO
from urllib.parse import unquote, urlsplit

import numpy as np
import numpy.typing as npt
from platformdirs import user_cache_path

from pipeline.datasets._download import BROKEN, FetchError, fetch, local_path
from pipeline.disk import check_size
from pipeline.spec import CHUNK, LETTERS, SIDE, Images, Labels, Letters, Source, Stream, UserError

_URLS = (
    "https://biometrics.nist.gov/cs_links/EMNIST/gzip.zip",
    "https://www.itl.nist.gov/iaui/vip/cs_links/EMNIST/gzip.zip",  # its older address
)
_IMAGES = {p: f"gzip/emnist-letters-{p}-images-idx3-ubyte.gz" for p in ("train", "test")}
_LABELS = {p: f"gzip/emnist-letters-{p}-labels-idx1-ubyte.gz" for p in ("train", "test")}
_MEMBERS = (*_IMAGES.values(), *_LABELS.values())
# SHA-256 of the official label members, and how often the official archive has each letter.
_OFFICIAL_LABELS = {
    "train": "93bf4478de9adf5495fa83338ee2d66a998dc67bbecf6bfaf6ca6e24f202c0d1",
    "test": "929a3c9d33c507a13856e902c156052e0104f8aba428f857bf7da934c00c912e",
}
_OFFICIAL_COUNTS = {"train": 4_000, "gate": 800, "test": 800}


def source(archive: str, n_train: int | None) -> Source:
    """EMNIST Letters.

    Args:
        archive: ``default`` for NIST's archive; or the path or http(s) URL of any archive in its
            layout. Of a URL only the letters are fetched (36 MB of 562), once, into the user's
            cache folder, or into the folder that the environment variable LETTERS_CACHE names.
        n_train: of no use here; the split into parts is the same for all data sets.

    Raises:
        UserError: the archive cannot be had, is broken, or is not in EMNIST's layout.
    """
    path, name = _locate(archive)
    digests = {member: _sha256(path, member) for member in _MEMBERS}
    official = all(digests[_LABELS[part]] == sha for part, sha in _OFFICIAL_LABELS.items())
    if archive == "default" and not official:
        raise UserError(
            "archive=default must be EMNIST, and the labels that came from NIST have another "
            f"SHA-256: delete {path} to fetch it anew, or use it as it is with archive={path}"
        )
    title = "EMNIST Letters" if official else f"{name} (EMNIST's layout, not EMNIST)"
    facts = {"archive": name, "official": official, "sha256": digests}
    return Source(title, official, facts, partial(_read, path, official))


def _locate(archive: str) -> tuple[Path, str]:
    """The archive on this machine, and the file name to show (of a URL without its secrets)."""
    if archive == "default":
        return _fetch(_URLS), "gzip.zip"
    if archive.lower().startswith(("http://", "https://")):
        return _fetch((archive,)), Path(unquote(urlsplit(archive).path)).name
    try:
        path = Path(archive).expanduser()
        why = "" if path.is_file() else f"there is no file {path}"
    except (OSError, RuntimeError) as error:  # a folder that is not ours; no such user
        why = f"{archive} gave '{getattr(error, 'strerror', None) or error}'"
    if why:
        raise UserError(
            f"archive must be 'default', a file or an http(s) URL, and {why}: "
            "pass archive=PATH of a copy of EMNIST's gzip.zip, or use dataset=strokes"
        )
    return path, path.name


def _fetch(urls: tuple[str, ...]) -> Path:
    """Fetch from the first address that answers."""
    cache = Path(os.environ.get("LETTERS_CACHE") or user_cache_path("letters")).expanduser()
    failures = []
    # A copy that is here already goes before an address that must be asked.
    for url in sorted(urls, key=lambda url: not local_path(url, cache).exists()):
        try:
            return fetch(url, cache, _MEMBERS.__contains__)
        except FetchError as error:
            host = url.split("/")[2].rpartition("@")[2]
            failures.append(f"{host} ({error})")
    raise UserError(
        f"EMNIST's archive could not be fetched from {' or '.join(failures)}: "
        "pass archive=PATH of a copy of gzip.zip, or archive=URL of a mirror, "
        "or train on the built-in letters with dataset=strokes"
    )


@contextmanager
def _member(path: Path, member: str) -> Iterator[IO[bytes]]:
    """Open a member of the archive; what breaks inside the ``with`` becomes a ``UserError``."""
    try:
        with zipfile.ZipFile(path) as archive:
            if member not in archive.namelist():
                raise UserError(
                    f"the archive must be in EMNIST's layout, and {path} has no member {member}: "
                    "pass archive=PATH or URL of gzip.zip as NIST packs it, or delete that file "
                    "if it is a cached download"
                )
            check_size(f"{member} of {path}", archive.getinfo(member).file_size)
            with archive.open(member) as file:
                yield file
    except (*BROKEN, OSError) as error:  # OSError: of the disk, or gzip.BadGzipFile
        raise UserError(
            f"the archive must be a whole zip of gzip files, and {member} of {path} cannot be read "
            f"({str(error) or type(error).__name__}): copy that file again, or delete it if it is "
            "a cached download"
        ) from error


def _sha256(path: Path, member: str) -> str:
    with _member(path, member) as file:
        digest = hashlib.sha256()
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


@contextmanager
def _idx(path: Path, member: str, shape: tuple[int, ...]) -> Iterator[tuple[int, gzip.GzipFile]]:
    """How many rows of ``shape`` an idx file declares, and the file, which goes on with these."""
    magic = 0x801 + len(shape)  # unsigned bytes, so many axes
    with _member(path, member) as packed, gzip.open(packed) as file:
        header = file.read(4 * (2 + len(shape)))
        sizes = np.frombuffer(header[: len(header) // 4 * 4], ">u4").tolist()
        if len(sizes) < 2 or sizes != [magic, sizes[1], *shape]:
            raise UserError(
                f"{member} must be an idx file that starts with {[magic, 'rows', *shape]}, "
                f"and that of {path} starts with {sizes}: pass an archive in EMNIST's layout"
            )
        check_size(f"{member} of {path}", int(np.prod(sizes[1:])))
        yield sizes[1], file


def _rows(path: Path, member: str, shape: tuple[int, ...]) -> Iterator[npt.NDArray[np.uint8]]:
    """The rows of an idx file, (n, *shape), some at a time and as many as it declares."""
    with _idx(path, member, shape) as (n_rows, file):
        for start in range(0, n_rows, CHUNK):
            size = (min(CHUNK, n_rows - start), *shape)
            data = np.frombuffer(file.read(int(np.prod(size))), np.uint8)
            if data.size != np.prod(size):
                raise EOFError(f"fewer than {n_rows} rows")
            yield data.reshape(size)
        if file.read(1):  # at the end gzip and zipfile compare their CRCs
            raise EOFError(f"more than {n_rows} rows")


def _images(path: Path, part: str) -> Iterator[Images]:
    """The pictures of a part, set upright."""
    for images in _rows(path, _IMAGES[part], (SIDE, SIDE)):
        yield np.ascontiguousarray(images.transpose(0, 2, 1))


def _part(path: Path, part: str) -> Stream:
    with _idx(path, _IMAGES[part], (SIDE, SIDE)) as (n_images, _):
        pass
    with _idx(path, _LABELS[part], ()) as (n_labels, _):
        pass
    if n_images != n_labels:  # no label is read yet, as there might be any number
        raise UserError(
            f"each of {part}'s images needs one label, and {path} has {n_images} images and "
            f"{n_labels} labels: pass another archive"
        )
    labels: Labels = np.concatenate([np.empty(0, np.uint8), *_rows(path, _LABELS[part], ())])
    n_bad = int(np.count_nonzero((labels < 1) | (labels > len(LETTERS))))
    if n_bad:
        raise UserError(
            f"each of {part}'s labels must be in 1..26, and of those of {path} {n_bad} are not: "
            "pass another archive"
        )
    return Stream(labels - np.uint8(1), partial(_images, path, part))


def _read(path: Path, official: bool) -> Letters:
    train, test = _part(path, "train"), _part(path, "test")
    cut = len(train.labels) - len(test.labels)
    if cut <= 0:
        raise UserError(
            "train must have more letters than test, because its last rows, as many as test has, "
            f"are the gate, and {path} has {len(train.labels)} and {len(test.labels)}: "
            "pass another archive"
        )
    labels = {"train": train.labels[:cut], "gate": train.labels[cut:], "test": test.labels}
    for part, wanted in _OFFICIAL_COUNTS.items():
        counts = np.bincount(labels[part], minlength=len(LETTERS))
        law = f"each letter {wanted} times, as EMNIST's does" if official else "all 26 letters"
        if counts.min() == 0 or (official and (counts != wanted).any()):
            raise UserError(
                f"{part} must hold {law}, and {path} has from {counts.min()} to {counts.max()} "
                "of a letter there: pass another archive"
            )
    return Letters(train, test)
