"""The reader of EMNIST's layout: what it makes of good archives, and what it says of bad ones."""

import gzip
import json
import random
import re
import warnings
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from archives import idx, member, write_archive

from pipeline import disk
from pipeline.datasets import _download, emnist_letters
from pipeline.datasets.emnist_letters import source
from pipeline.spec import Letters, Part, Stream, UserError

if TYPE_CHECKING:
    from datasets.conftest import FileServer

SHARED = Path(__file__).parents[2] / "../shared/data/letters-emnist-layout.zip"
N_TRAIN, N_TEST = 130, 52


def whole(read: Letters) -> Letters:
    """All letters of streams, in memory."""
    return Letters(*(Part(np.concatenate(list(part.chunks())), part.labels) for part in read))


def refuse(path: Path, *parts: str) -> None:
    """Assert that reading ``path`` fails with a sentence that holds all of ``parts``."""
    with pytest.raises(UserError) as caught:
        whole(source(str(path), None).read())
    sentence = str(caught.value)
    # Law: an error is one sentence that names the rule, what came and the cure.
    assert all(part in sentence for part in parts), sentence
    assert "\n" not in sentence


def test_reads_what_was_written(tmp_path: Path) -> None:
    path = tmp_path / "tiny.zip"
    written = write_archive(path, N_TRAIN, N_TEST)
    read = whole(source(str(path), None).read())
    for (images, labels), (images_written, labels_written) in zip(read, written, strict=True):
        # Law: pictures come upright, though stored transposed, and labels 0..25, though 1..26.
        np.testing.assert_array_equal(images, images_written)
        np.testing.assert_array_equal(labels, labels_written)
        # Law: arrays are uint8 in C order.
        assert images.dtype == labels.dtype == np.uint8
        assert images.flags.c_contiguous


@pytest.mark.parametrize("n_rows", [1, 7, N_TRAIN - 1, N_TRAIN, N_TRAIN + 1])
def test_chunks(n_rows: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(emnist_letters, "CHUNK", n_rows)
    written = write_archive(tmp_path / "tiny.zip", N_TRAIN, N_TEST)
    read = source(str(tmp_path / "tiny.zip"), None).read()
    assert isinstance(read.train, Stream)
    # Law: no more than a chunk is ever handed on, and nothing is changed by it.
    assert max(map(len, read.train.chunks())) == min(n_rows, N_TRAIN)
    np.testing.assert_array_equal(whole(read).train.images, written.train.images)
    np.testing.assert_array_equal(read.train.labels, written.train.labels)


def test_facts_pin_the_content(tmp_path: Path) -> None:
    facts = []
    for seed in (0, 0, 1):
        write_archive(tmp_path / "tiny.zip", N_TRAIN, N_TEST, seed=seed)
        made = source(str(tmp_path / "tiny.zip"), None)
        facts.append(json.dumps(made.facts))
    # Law: the same content has the same facts, other content has others.
    assert facts[0] == facts[1] != facts[2]
    # Law: what is not EMNIST is not called EMNIST.
    assert not made.official
    assert made.title == "tiny.zip (EMNIST's layout, not EMNIST)"


def test_source_reads_no_pixels(tmp_path: Path) -> None:
    broken = {member("train", "images-idx3"): b"no gzip"}
    write_archive(tmp_path / "tiny.zip", N_TRAIN, N_TEST, replace=broken)
    # Law: source() only hashes; letters are unpacked by read() alone.
    assert len(source(str(tmp_path / "tiny.zip"), None).facts["sha256"]) == 4


@pytest.mark.skipif(not SHARED.exists(), reason=f"no archive of real handwriting at {SHARED}")
def test_real_handwriting() -> None:
    train, test = whole(source(str(SHARED), None).read())
    # Law: the counts are those of shared/data/README.md.
    assert train.images.shape == (55_035, 28, 28)
    assert test.images.shape == (7_800, 28, 28)
    np.testing.assert_array_equal(np.bincount(test.labels), 300)
    np.testing.assert_array_equal(np.bincount(train.labels[-7_800:]), 300)
    # Law: letters stand upright: Y has its ink above, U below, C to the left.
    mean = {letter: test.images[test.labels == ord(letter) - 65].mean(0) for letter in "YUC"}
    assert mean["Y"][:14].sum() > 1.2 * mean["Y"][14:].sum()
    assert mean["U"][14:].sum() > 1.2 * mean["U"][:14].sum()
    assert mean["C"][:, :14].sum() > 1.2 * mean["C"][:, 14:].sum()


def test_missing_file(tmp_path: Path) -> None:
    refuse(tmp_path / "none.zip", "there is no file", "none.zip", "dataset=strokes")
    refuse(tmp_path, "there is no file", "archive=PATH")
    refuse(Path("~nosuchuser/gzip.zip"), "~nosuchuser", "archive=PATH")
    refuse(tmp_path / ("a" * 300), "File name too long", "archive=PATH")


@pytest.mark.parametrize("n_kept", [0, 10, 20_000, -10])
def test_truncated_zip(tmp_path: Path, n_kept: int) -> None:
    path = tmp_path / "tiny.zip"
    write_archive(path, N_TRAIN, N_TEST)
    path.write_bytes(path.read_bytes()[:n_kept])
    refuse(path, "whole zip", "File is not a zip file", "copy that file again")


@pytest.mark.parametrize("part", ["train", "test"])
@pytest.mark.parametrize("kind", ["images-idx3", "labels-idx1"])
def test_flipped_byte(tmp_path: Path, part: str, kind: str) -> None:
    path, name = tmp_path / "tiny.zip", member(part, kind)
    write_archive(path, N_TRAIN, N_TEST)
    data = bytearray(path.read_bytes())
    data[data.index(name.encode()) + len(name) + 30] ^= 1
    path.write_bytes(data)
    refuse(path, "Bad CRC-32", name, "copy that file again")


@pytest.mark.parametrize("part", ["train", "test"])
@pytest.mark.parametrize("kind", ["images-idx3", "labels-idx1"])
def test_missing_member(tmp_path: Path, part: str, kind: str) -> None:
    name = member(part, kind)
    write_archive(tmp_path / "tiny.zip", N_TRAIN, N_TEST, replace={name: None})
    refuse(tmp_path / "tiny.zip", "has no member", name, "as NIST packs it")


LABELS = (np.arange(N_TRAIN) % 26 + 1).astype(np.uint8)
IMAGES = np.zeros((N_TRAIN, 28, 28), np.uint8)
BAD_TRAIN = {
    "no gzip": ("images-idx3", b"no gzip", "Not a gzipped file"),
    "half a gzip": ("images-idx3", idx(IMAGES)[:-20], "end-of-stream"),
    "gzip CRC": ("labels-idx1", idx(LABELS)[:-8] + bytes(8), "CRC check failed"),
    "deflate": ("labels-idx1", idx(LABELS)[:10] + b"\x07" * 30, "invalid block type"),
    "empty": ("labels-idx1", gzip.compress(b""), "starts with []"),
    "half a header": ("images-idx3", gzip.compress(b"\0\0\x08\x03\0\0"), "starts with [2051]"),
    "magic of labels": ("labels-idx1", idx(LABELS, 2051), "starts with [2051, 130]"),
    "magic of images": ("images-idx3", idx(IMAGES, 2049), "starts with [2049, 130, 28, 28]"),
    "side": ("images-idx3", idx(IMAGES[:, 1:]), "starts with [2051, 130, 27, 28]"),
    "bomb": (
        "images-idx3",
        gzip.compress(b"\0\0\x08\x03\xff\xff\xff\xff\0\0\0\x1c\0\0\0\x1c"),
        "must not exceed 16,000,000,000 bytes",
    ),
    "an image short": (
        "images-idx3",
        gzip.compress(b"\0\0\x08\x03\0\0\0\x82\0\0\0\x1c\0\0\0\x1c" + bytes(129 * 784)),
        "fewer than 130 rows",
    ),
    "a pixel long": (
        "images-idx3",
        gzip.compress(b"\0\0\x08\x03\0\0\0\x82\0\0\0\x1c\0\0\0\x1c" + bytes(130 * 784 + 1)),
        "more than 130 rows",
    ),
    "labels without end": (
        "labels-idx1",
        gzip.compress(b"\0\0\x08\x01\x7f\xff\xff\xff" + bytes(1000)),
        "130 images and 2147483647 labels",
    ),
    "a row short": (
        "labels-idx1",
        gzip.compress(b"\0\0\x08\x01\0\0\0\x82\1"),
        "fewer than 130 rows",
    ),
    "a row long": (
        "labels-idx1",
        gzip.compress(b"\0\0\x08\x01\0\0\0\x82" + bytes(131)),
        "more than 130 rows",
    ),
    "counts": ("labels-idx1", idx(LABELS[1:]), "130 images and 129 labels"),
    "label 0": ("labels-idx1", idx(LABELS - np.uint8(1)), "must be in 1..26"),
    "label 27": ("labels-idx1", idx(LABELS + np.uint8(1)), "must be in 1..26"),
    "no Z in gate": (
        "labels-idx1",
        idx(np.minimum(LABELS, np.arange(130)[::-1] // 3 + 1).astype(np.uint8)),
        "gate must hold all 26",
    ),
    "only A": ("labels-idx1", idx(np.ones_like(LABELS)), "train must hold all 26 letters"),
}


@pytest.mark.parametrize(("kind", "data", "said"), BAD_TRAIN.values(), ids=BAD_TRAIN)
def test_bad_train_member(tmp_path: Path, kind: str, data: bytes, said: str) -> None:
    replace = {member("train", kind): data}
    write_archive(tmp_path / "tiny.zip", N_TRAIN, N_TEST, replace=replace)
    refuse(tmp_path / "tiny.zip", said, "tiny.zip")


def test_letter_missing_in_test(tmp_path: Path) -> None:
    replace = {member("test", "labels-idx1"): idx(np.ones(N_TEST, np.uint8))}
    write_archive(tmp_path / "tiny.zip", N_TRAIN, N_TEST, replace=replace)
    refuse(tmp_path / "tiny.zip", "test must hold all 26 letters", "from 0 to 52")


def test_train_not_larger_than_test(tmp_path: Path) -> None:
    write_archive(tmp_path / "tiny.zip", 52, 52)
    refuse(tmp_path / "tiny.zip", "train must have more letters than test", "52 and 52")


def test_member_that_declares_too_much(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_archive(tmp_path / "tiny.zip", N_TRAIN, N_TEST)
    monkeypatch.setattr(disk, "MAX_BYTES", 1_000)
    refuse(tmp_path / "tiny.zip", "must not exceed 1,000 bytes", "tiny.zip")


def test_member_name_that_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "tiny.zip"
    write_archive(path, N_TRAIN, N_TEST)
    data = bytearray(path.read_bytes())
    at = data.index(b"PK\1\2")
    data[at + 9] |= 8  # names are UTF-8
    data[at + 46] = 0xFF
    path.write_bytes(data)
    refuse(path, "cannot be read", "codec can't decode")


def test_any_spoilt_byte(tmp_path: Path) -> None:
    path, rng = tmp_path / "tiny.zip", random.Random(0)
    write_archive(path, N_TRAIN, N_TEST)
    good = path.read_bytes()
    heads = [at for at in range(len(good)) if good.startswith(b"PK", at)]
    for _ in range(300):
        spoilt = bytearray(good)
        spoilt[min(rng.choice(heads) + rng.randrange(90), len(good) - 1)] = rng.randrange(256)
        path.write_bytes(spoilt)
        # Law: whatever a zip's heads say, there are letters or there is an error in a sentence.
        with suppress(UserError), warnings.catch_warnings(action="ignore"):
            assert len(whole(source(str(path), None).read()).train.labels) == N_TRAIN


def official(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Take the labels of ``path`` for EMNIST's."""
    digests = source(str(path), None).facts["sha256"]
    labels = {part: digests[member(part, "labels-idx1")] for part in ("train", "test")}
    monkeypatch.setattr(emnist_letters, "_OFFICIAL_LABELS", labels)


def test_official_is_known_by_its_labels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "any name.zip"
    write_archive(path, N_TRAIN, N_TEST)
    official(path, monkeypatch)
    counts = {"train": 3, "gate": 2, "test": 2}
    monkeypatch.setattr(emnist_letters, "_OFFICIAL_COUNTS", counts)
    made = source(str(path), None)
    # Law: content decides what is EMNIST, not the file's name or address.
    assert made.official
    assert made.title == "EMNIST Letters"
    assert len(made.read().test.labels) == N_TEST
    # Law: EMNIST has each letter equally often in each part; any other count is refused.
    for part in counts:
        monkeypatch.setattr(emnist_letters, "_OFFICIAL_COUNTS", counts | {part: 4})
        refuse(path, f"{part} must hold each letter 4 times")


def test_official_figures() -> None:
    # Law: the three parts of EMNIST Letters have 4,000, 800 and 800 of each letter, and the last
    # 800 of the archive's 4,800 are the gate.
    n_train, n_gate, n_test = (26 * n for n in emnist_letters._OFFICIAL_COUNTS.values())
    assert (n_train + n_gate, n_test) == (124_800, 20_800)


def test_url(tmp_path: Path, server: "FileServer", cache: Path) -> None:
    written = write_archive(tmp_path / "tiny.zip", N_TRAIN, N_TEST)
    server.content = (tmp_path / "tiny.zip").read_bytes()
    made = source(server.url, None)
    # Law: a URL gives the letters of the file behind it, under that file's name.
    np.testing.assert_array_equal(whole(made.read()).train.images, written.train.images)
    # Law: the query of a URL, which may hold a password, is shown and stored nowhere.
    assert made.facts["archive"] == "gzip.zip"
    assert "secret" not in repr(made)
    # Law: what was fetched once is not fetched again.
    n_sent = server.n_sent
    assert source(server.url, None).facts == made.facts
    assert server.n_sent == n_sent


def test_default(
    tmp_path: Path, server: "FileServer", cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_archive(tmp_path / "tiny.zip", N_TRAIN, N_TEST)
    server.content = (tmp_path / "tiny.zip").read_bytes()
    monkeypatch.setattr(emnist_letters, "_URLS", ("http://127.0.0.1:9/gzip.zip", server.url))
    # Law: archive=default is EMNIST or nothing.
    with pytest.raises(UserError, match="archive=default must be EMNIST"):
        source("default", None)
    official(tmp_path / "tiny.zip", monkeypatch)
    # Law: where the first address fails, the second is asked.
    assert source("default", None).title == "EMNIST Letters"
    # Law: a copy that is here goes before an address that must be asked.
    monkeypatch.setattr(_download, "_download", lambda *_: pytest.fail("an address was asked"))
    assert source("default", None).official


def test_no_network(server: "FileServer", cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    closed = ("http://user:secret@127.0.0.1:9/gzip.zip", "http://127.0.0.2:9/gzip.zip")
    monkeypatch.setattr(emnist_letters, "_URLS", closed)
    with pytest.raises(UserError) as caught:
        source("default", None)
    # Law: without a network the error names hosts, cause and the three ways on, and no password.
    assert str(caught.value) == (
        "EMNIST's archive could not be fetched from 127.0.0.1:9 (Connection refused) or "
        "127.0.0.2:9 (Connection refused): pass archive=PATH of a copy of gzip.zip, or archive=URL "
        "of a mirror, or train on the built-in letters with dataset=strokes"
    )


@pytest.mark.parametrize("url", ["http://", "https://[::1", "http://127.0.0.1:x/y"])
def test_malformed_url(url: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.sleep", lambda _: pytest.fail("it was tried again"))
    # Law: a malformed URL is an error in a sentence, at once.
    with pytest.raises(UserError, match=re.escape("pass archive=PATH")):
        source(url, None)


def test_where_downloads_go(
    tmp_path: Path, server: "FileServer", cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_archive(tmp_path / "tiny.zip", N_TRAIN, N_TEST)
    server.content = (tmp_path / "tiny.zip").read_bytes()
    source(server.url, None)
    # Law: LETTERS_CACHE names the folder of downloads.
    assert {file.suffix for file in cache.iterdir()} == {".lock", ".zip"}
    monkeypatch.setenv("LETTERS_CACHE", str(tmp_path / "tiny.zip"))
    # Law: a folder that cannot be written is an error in a sentence.
    with pytest.raises(UserError, match="set LETTERS_CACHE to another folder"):
        source(server.url, None)


def test_tiny_letters_can_be_learnt(tmp_path: Path) -> None:
    train, test = write_archive(tmp_path / "tiny.zip", 780, 260)
    a, b = (part.images.reshape(-1, 784).astype(np.float32) for part in (train, test))
    nearest = ((b**2).sum(1)[:, None] + (a**2).sum(1) - 2 * b @ a.T).argmin(1)
    # Law: tests that train on tiny archives can tell a model that learns from one that guesses.
    assert (train.labels[nearest] == test.labels).mean() > 0.9
