"""Archives that mean harm: nothing is written outside, no memory is spent on what they claim."""

import gzip
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from archives import member, write_archive
from stores import ROOT

from pipeline.datasets import emnist_letters
from pipeline.spec import Dataset, Letters, Part, Stream, UserError

IMAGES = member("train", "images-idx3")
LABELS = member("train", "labels-idx1")


def _head(*sizes: int) -> bytes:
    return struct.pack(f">{len(sizes)}I", *sizes)


def _read(path: Path) -> Letters:
    """All letters of an archive, images included, which are read when they are asked for."""
    read = emnist_letters.source(str(path), None).read()
    parts = [part if isinstance(part, Part) else _whole(part) for part in read]
    return Letters(*parts)


def _whole(stream: Stream) -> Part:
    return Part(np.concatenate(list(stream.chunks())), stream.labels)


@pytest.mark.parametrize("name", ["../../escaped", "/tmp/letters-escaped", "gzip/../../escaped"])
def test_a_member_that_leads_outside_is_never_written(name: str, tmp_path: Path) -> None:
    home = tmp_path / "a" / "b"
    home.mkdir(parents=True)
    path = home / "evil.zip"
    write_archive(path, 1040, 260, replace={name: b"gotcha"})
    before = sorted(tmp_path.rglob("*"))
    _read(path)  # it has all that is needed, and the rest is left alone
    assert sorted(tmp_path.rglob("*")) == before
    assert not Path("/tmp/letters-escaped").exists()


def test_a_link_in_place_of_a_member_is_not_followed(tmp_path: Path) -> None:
    """A zip may hold symbolic links; to a reader of members they are bytes like others."""
    path = tmp_path / "link.zip"
    write_archive(path, 1040, 260, replace={LABELS: None})
    link = zipfile.ZipInfo(LABELS)
    link.create_system, link.external_attr = 3, 0o120777 << 16
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(link, "/etc/passwd")
    with pytest.raises(UserError, match="whole zip of gzip files"):
        _read(path)


@pytest.mark.parametrize(
    "sizes",
    [
        (2051, 2**32 - 1, 28, 28),
        (2051, 2**31, 28, 28),
        (2051, 1, 2**31, 2**31),
        (2051, 1, 0, 28),
        (2051, 2**32 - 1),
        (),
    ],
)
def test_absurd_sizes_are_refused(sizes: tuple[int, ...], tmp_path: Path) -> None:
    path = tmp_path / "absurd.zip"
    data = gzip.compress(_head(*sizes) + bytes(784), mtime=0)
    write_archive(path, 1040, 260, replace={IMAGES: data})
    with pytest.raises(UserError, match=r"train-images|whole zip"):
        _read(path)


def test_a_member_that_says_another_size_than_it_has(tmp_path: Path) -> None:
    """The zip's own entry lies about the size: too small is refused, too large gains nothing."""
    honest = tmp_path / "honest.zip"
    write_archive(honest, 1040, 260)
    wanted = _read(honest)
    for size in (10, 2**31):
        path = tmp_path / f"{size}.zip"
        write_archive(path, 1040, 260)
        raw = bytearray(path.read_bytes())
        entry = raw.rindex(IMAGES.encode()) - 46  # in the central directory
        assert raw[entry : entry + 4] == b"PK\x01\x02"
        raw[entry + 24 : entry + 28] = struct.pack("<I", size)
        path.write_bytes(raw)
        if size == 10:
            with pytest.raises(UserError):
                _read(path)
        else:
            found = _read(path)
            assert np.array_equal(found.train.images, wanted.train.images)
            assert np.array_equal(found.train.labels, wanted.train.labels)


# Reads an archive in a process that may have so much more memory than it has after its imports.
BOMB = """
import resource, sys
from pipeline.datasets import emnist_letters
from pipeline.spec import UserError
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 300_000_000,) * 2)
resource.setrlimit(resource.RLIMIT_CPU, (60, 60))
try:
    emnist_letters.source(sys.argv[1], None).read()
except UserError as error:
    print(error)
    sys.exit(2)
"""


@pytest.mark.parametrize("kind", ["trailing", "deflated"])
def test_a_bomb_is_read_no_further_than_its_header_says(kind: str, tmp_path: Path) -> None:
    """A gigabyte of zeros in a megabyte: behind the last row, or around the gzip file itself."""
    zeros = gzip.compress(bytes(1 << 20), 9, mtime=0) * 1024  # members of gzip follow each other
    path = tmp_path / "bomb.zip"
    if kind == "trailing":
        data = gzip.compress(_head(2049, 1040) + bytes([1]) * 1040, mtime=0) + zeros
        write_archive(path, 1040, 260, replace={LABELS: data})
    else:
        write_archive(path, 1040, 260, replace={LABELS: None})
        with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr(LABELS, zeros)
    assert path.stat().st_size < 4 << 20
    done = subprocess.run(
        [sys.executable, "-c", BOMB, str(path)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 2, done.stderr[-2000:]
    assert "train-labels" in done.stdout


def test_prepared_letters_that_are_a_pickle_are_not_loaded(tmp_path: Path) -> None:
    (tmp_path / "dataset.json").write_text("{}")
    for array in ("images", "labels"):
        np.save(tmp_path / f"train_{array}.npy", np.array([Trap()]), allow_pickle=True)
    with pytest.raises(ValueError, match="allow_pickle|Object arrays|Python objects"):
        Dataset.open(tmp_path).part("train")
    assert not Trap.sprung


class Trap:
    """What runs when it is unpickled."""

    sprung = False

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return setattr, (Trap, "sprung", True)
