"""Tiny archives in EMNIST's layout, of crude but learnable letters, for any test to train on."""

import gzip
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from pipeline.spec import Letters, Part

N_LETTERS, SIDE = 26, 28


def member(part: str, kind: str) -> str:
    """The name of a member; kind is ``images-idx3`` or ``labels-idx1``."""
    return f"gzip/emnist-letters-{part}-{kind}-ubyte.gz"


def idx(array: npt.NDArray[np.uint8], magic: int | None = None) -> bytes:
    """A gzipped idx file of ``array`` just as it is."""
    magic = 2048 + array.ndim if magic is None else magic
    head = struct.pack(f">{1 + array.ndim}I", magic, *array.shape)
    return gzip.compress(head + array.tobytes(), 1, mtime=0)


def write_archive(
    path: Path,
    n_train: int,
    n_test: int,
    seed: int = 0,
    replace: Mapping[str, bytes | None] | None = None,
    n_filler: int = 0,
) -> Letters:
    """Write a zip as NIST packs it, and return what a reader must make of it.

    Args:
        path: where to.
        n_train: rows of train, of which the last ``n_test`` are the balanced validation split.
        n_test: rows of test, at best a multiple of 26; they are sorted by label.
        seed: other seeds draw other examples of the same 26 letters.
        replace: member name: other bytes for it, or None to leave it out.
        n_filler: bytes of a member that is of no use to anybody, put before the others.
    """
    rng = np.random.default_rng(seed)
    labels = {
        "train": np.append(_balanced(n_train - n_test, rng), _balanced(n_test, rng)),
        "test": np.sort(_balanced(n_test, rng)),
    }
    parts = {part: Part(_draw(some, rng), some) for part, some in labels.items()}
    members: dict[str, bytes | None] = {"gzip/emnist-byclass.gz": rng.bytes(n_filler)}
    for part, (images, some) in parts.items():
        members[member(part, "images-idx3")] = idx(images.swapaxes(1, 2))
        members[member(part, "labels-idx1")] = idx(some + np.uint8(1))
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, data in (members | dict(replace or {})).items():
            if data is not None:
                archive.writestr(zipfile.ZipInfo(name), data)
    return Letters(**parts)


def _balanced(n: int, rng: np.random.Generator) -> npt.NDArray[np.uint8]:
    return rng.permutation(np.arange(n) % N_LETTERS).astype(np.uint8)


def _draw(labels: npt.NDArray[np.uint8], rng: np.random.Generator) -> npt.NDArray[np.uint8]:
    """Each label has one blot, which is shifted, dimmed and buried in noise; (n, 28, 28) uint8."""
    coarse = np.random.default_rng(2017).random((N_LETTERS, 6, 6))  # the same for all seeds
    blots = np.zeros((N_LETTERS, SIDE, SIDE), np.float32)
    blots[:, 5:23, 5:23] = np.clip(ndimage.zoom(coarse, (1, 3, 3), order=1) * 4 - 2, 0, 1)
    images = np.empty((len(labels), SIDE, SIDE), np.uint8)
    for i, (label, shift) in enumerate(
        zip(labels, rng.integers(-3, 4, (len(labels), 2)), strict=True)
    ):
        ink = np.roll(blots[label], tuple(shift), (0, 1)) * rng.uniform(120, 220)
        images[i] = np.clip(ink + rng.normal(0, 30, ink.shape), 0, 255)
    return images
