import errno
import hashlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import mlflow
import numpy as np
import pytest
from archives import idx, member, write_archive
from steps import arguments

from pipeline import datasets, disk, nist, prep, registry
from pipeline.datasets import emnist_letters, strokes
from pipeline.spec import PARTS, Dataset, Letters, Part, UserError

ROOT = Path(__file__).parent.parent

TOY = """
import numpy as np
from pipeline.spec import Letters, Part, Source

def _part(n):
    return Part(np.full((n, 28, 28), 7, np.uint8), np.arange(n, dtype=np.uint8) % 26)

def source(archive, n_train):
    return Source("toy letters", True, {"seed": 0}, lambda: Letters(_part(1040), _part(260)))
"""


def _plain(letters: Letters, n_train: int | None) -> dict[str, Part]:
    """The split as it is in words, with all letters in memory."""
    n_letters, n_test = len(letters.train.labels), len(letters.test.labels)
    n_pool = n_letters - n_test
    n_train = n_pool - min(10_000, n_pool // 6) if n_train is None else n_train
    order = np.random.default_rng(0).permutation(n_pool)
    rows = {
        "train": order[:n_train],
        "val": order[n_train:][:10_000],
        "gate": np.arange(n_pool, n_letters),
    }
    train = {part: Part(*(array[some] for array in letters.train)) for part, some in rows.items()}
    return train | {"test": Part(*letters.test)}


def _digest(parts: dict[str, Part]) -> str:
    """The digest of a data set: of the SHA-256 of each array as numpy itself writes it."""
    sha256 = {}
    for part, arrays in parts.items():
        for name, array in arrays._asdict().items():
            file = io.BytesIO()
            np.save(file, np.ascontiguousarray(array))
            sha256[f"{part}_{name}"] = hashlib.sha256(file.getvalue()).hexdigest()
    content = {"name": "emnist_letters", "official": False, "sha256": sha256}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]


@pytest.mark.parametrize("n_train", [520, 700, None])
@pytest.mark.parametrize(("chunk", "stretch"), [(4_096, 1 << 15), (64, 1), (7, 37), (1040, 130)])
def test_streams_become_the_arrays_that_a_plain_split_gives(
    n_train: int | None,
    chunk: int,
    stretch: int,
    archive: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(emnist_letters, "CHUNK", chunk)
    monkeypatch.setattr(disk, "STRETCH", stretch)
    letters = write_archive(tmp_path / "again.zip", n_train=1040, n_test=260)
    plain = _plain(letters, n_train)
    data = prep.prepare("emnist_letters", str(archive), n_train, str(tmp_path / "data"))
    for name, part in plain.items():
        np.testing.assert_array_equal(data.part(name).images, part.images)
        np.testing.assert_array_equal(data.part(name).labels, part.labels)
    # Law: also the files are numpy's, byte for byte, and so the digest depends on letters alone.
    assert data.digest == _digest(plain)


def _large(path: Path, n_train: int) -> None:
    """An archive of many empty letters, quickly written."""
    labels = (np.arange(n_train) % 26 + 1).astype(np.uint8)
    write_archive(
        path,
        1040,
        260,
        replace={
            member("train", "images-idx3"): idx(np.zeros((n_train, 28, 28), np.uint8)),
            member("train", "labels-idx1"): idx(labels),
        },
    )


def test_memory_does_not_grow_with_the_letters(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk, "STRETCH", 1 << 12)
    peaks = []
    for n_letters in (20_000, 120_000):
        path = tmp_path / f"{n_letters}.zip"
        _large(path, n_letters)
        tracemalloc.start()  # numpy tells it of arrays, but for memory maps
        prep.prepare("emnist_letters", str(path), None, str(tmp_path / "data"))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    # Law: a letter of 784 bytes takes what its label and its place take: 64 bytes at most.
    assert peaks[1] - peaks[0] < 64 * 100_000
    assert peaks[1] < 40_000_000


def test_a_disk_without_room_is_a_sentence_before_anything_is_written(
    archive: Path, data_options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    n_bytes = (520 + 3 * 260) * 785
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=n_bytes - 1))
    with pytest.raises(UserError) as caught:
        prep.prepare(**data_options | {"archive": str(archive)})
    sentence = str(caught.value)
    assert sentence.startswith(f"{n_bytes:,} bytes must have room in '{data_options['data_dir']}'")
    assert sentence.endswith("make room or pass -P data_dir=FOLDER")
    assert not Path(data_options["data_dir"]).exists()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=n_bytes))
    assert prep.prepare(**data_options | {"archive": str(archive)}).digest


def test_a_stream_that_breaks_leaves_nothing(tmp_path: Path, data_options: dict[str, Any]) -> None:
    path = tmp_path / "broken.zip"
    images = idx(np.zeros((1040, 28, 28), np.uint8))[:-9]
    write_archive(path, 1040, 260, replace={member("train", "images-idx3"): images})
    with pytest.raises(UserError, match="end-of-stream"):
        prep.prepare(**data_options | {"archive": str(path)})
    assert list(Path(data_options["data_dir"]).iterdir()) == []


KILLED = """
import os, signal, sys
from pipeline import disk, prep
disk.RowFile.finish = lambda self: os.kill(os.getpid(), signal.SIGKILL)
prep.prepare("emnist_letters", sys.argv[1], 520, sys.argv[2])
"""


def test_a_killed_prep_leaves_its_scratch_alone(archive: Path, tmp_path: Path) -> None:
    data_dir = tmp_path / "data"
    command = [sys.executable, "-c", KILLED, str(archive), str(data_dir)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    (scratch,) = data_dir.iterdir()
    assert scratch.name.startswith(".prep-")
    # Law: nobody takes it for letters; the next prep makes them whole.
    data = prep.prepare("emnist_letters", str(archive), 520, str(data_dir))
    assert data.part("train").images[:].any(axis=(1, 2)).all()


def test_images_without_labels_are_refused(
    add_member: Callable[[ModuleType, str, str], None], data_options: dict[str, Any]
) -> None:
    stream = "Letters(Stream(_part(1040).labels, lambda: iter([_part(1041).images])), _part(260))"
    toy = TOY.replace("Letters(_part(1040), _part(260))", stream).replace(
        "Part, S", "Part, Stream, S"
    )
    add_member(datasets, "toy", toy)
    with pytest.raises(UserError, match="one image for each label, but 1041 images and 1040 label"):
        prep.prepare(**data_options | {"dataset": "toy", "archive": "default"})
    assert list(Path(data_options["data_dir"]).iterdir()) == []


def _numbers(n_letters: int, n_test: int, n_train: int | None) -> dict[str, set[int]]:
    """Numbers of the letters of each part; those of the test part follow those of train."""
    rows = datasets.split(n_letters, n_test, n_train)
    test = set((rows["test"]["test"] + n_letters).tolist())
    return {part: set(some.tolist()) for part, some in rows["train"].items()} | {"test": test}


@pytest.mark.parametrize(("n_train", "n_val"), [(520, 260), (700, 80), (None, 130)])
def test_parts_are_disjoint_and_the_gate_is_the_end_of_train(
    n_train: int | None, n_val: int
) -> None:
    numbers = _numbers(1040, 260, n_train)
    assert list(numbers) == list(PARTS)
    # Every letter is in one part at most, and as many are in val as are left, all taking a sixth.
    assert sum(map(len, numbers.values())) == len(set.union(*numbers.values()))
    assert len(numbers["val"]) == n_val
    assert len(numbers["train"]) == 780 - n_val if n_train is None else n_train
    # EMNIST's validation split, the last rows of train, is the gate; test is test.
    assert numbers["gate"] == set(range(780, 1040))
    assert numbers["test"] == set(range(1040, 1300))


def test_val_has_at_most_ten_thousand_letters() -> None:
    assert len(_numbers(40_260, 260, 10_000)["val"]) == 10_000
    # Of all letters, too, train leaves that many to val.
    assert len(_numbers(61_000, 260, None)["train"]) == 60_740 - 10_000


def test_train_must_leave_letters_to_val() -> None:
    with pytest.raises(UserError, match="leave at least 26 of this data set's 780 letters to val"):
        datasets.split(1040, 260, 760)


def test_prepared_letters_are_those_of_the_archive(
    archive: Path, data_options: dict[str, Any]
) -> None:
    data = prep.prepare(**data_options | {"archive": str(archive)})
    letters = write_archive(archive.parent / "again.zip", n_train=1040, n_test=260)
    # The test part is the archive's; the folder is named by data set and digest.
    assert np.array_equal(data.part("test").images, letters.test.images)
    assert np.array_equal(data.part("test").labels, letters.test.labels)
    assert data.root.name == f"emnist_letters-{data.digest}"
    assert data.facts["counts"] == {"train": 520, "val": 260, "gate": 260, "test": 260}
    # No archive but NIST's is called EMNIST.
    assert data.facts["official"] is False
    assert "not EMNIST" in data.title


def test_a_second_call_reads_no_letter(
    archive: Path, data_options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = data_options | {"archive": str(archive)}
    first = prep.prepare(**options)
    monkeypatch.setattr(prep, "_write", None)  # calling it would be a TypeError
    assert prep.prepare(**options) == first


def test_other_parameters_other_letters_or_other_code_are_prepared_anew(
    archive: Path, tmp_path: Path, data_options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = data_options | {"archive": str(archive)}
    first = prep.prepare(**options)
    assert prep.prepare(**options | {"n_train": 600}).digest != first.digest
    other = tmp_path / "other.zip"
    write_archive(other, n_train=1040, n_test=260, seed=1)
    assert prep.prepare(**options | {"archive": str(other)}).digest != first.digest
    # Other code that reads the same letters changes the key but not the digest.
    facts = json.loads((first.root / "dataset.json").read_text())
    (first.root / "dataset.json").write_text(json.dumps(facts | {"key": "of older code"}))
    again = prep.prepare(**options)
    assert (again.digest, again.facts["key"]) == (first.digest, first.facts["key"])


def test_the_code_that_draws_letters_is_part_of_the_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = strokes.source("default", 260)
    assert source.facts["pillow_version"]
    before = prep._key_facts("strokes", 260, source)
    # Law: whatever of the project a data set imports is in it.
    for path in Path(datasets.__file__).parent.glob("*.py"):
        names = re.findall(r"^from pipeline import (.*)$", path.read_text(), re.MULTILINE)
        used = {f"{name}.py" for line in names for name in line.split(", ")}
        assert used <= before["code"].keys()
    changed = tmp_path / "nist.py"
    changed.write_text(Path(nist.__file__).read_text() + "# changed\n")
    monkeypatch.setattr(nist, "__file__", str(changed))
    assert prep._key_facts("strokes", 260, source) != before


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EACCES])
def test_a_failed_write_leaves_nothing(
    code: int, archive: Path, data_options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def finish(file: disk.RowFile) -> str:
        raise OSError(code, "the disk said no")  # when some arrays are written already

    monkeypatch.setattr(disk.RowFile, "finish", finish)
    with pytest.raises(UserError, match="'the disk said no': make room or pass -P data_dir=FOLDER"):
        prep.prepare(**data_options | {"archive": str(archive)})
    assert list(Path(data_options["data_dir"]).iterdir()) == []


def test_what_a_killed_prep_has_left_is_removed_a_day_later(
    data_options: dict[str, Any], tmp_path: Path
) -> None:
    folder = data_options["data_dir"]
    old, new = folder / ".prep-old", folder / ".prep-new"
    for path in (old, new):
        path.mkdir(parents=True)
        (path / "train_images.npy").touch()
    os.utime(old, (0, 0))
    prep.prepare(
        **data_options | {"archive": str(data_options["archive"]), "data_dir": str(folder)}
    )
    assert (old.exists(), new.exists()) == (False, True)


def test_two_processes_may_prepare_the_same_letters_at_once(
    data_options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = data_options | {
        "archive": str(data_options["archive"]),
        "data_dir": str(data_options["data_dir"]),
    }
    first = prep.prepare(**options)
    # The second one looked before the first one was done.
    monkeypatch.setattr(Path, "glob", lambda self, pattern: [])
    second = prep.prepare(**options)
    assert second.root == first.root
    assert [path.name for path in first.root.parent.iterdir()] == [first.root.name]


def test_a_folder_that_cannot_be_made_is_a_sentence(
    archive: Path, tmp_path: Path, data_options: dict[str, Any]
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="prep must be able to write to its folder"):
        prep.prepare(**data_options | {"archive": str(archive), "data_dir": tmp_path / "file/data"})


def test_a_folder_that_may_not_be_read_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, pattern: str) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")  # root may read anything

    monkeypatch.setattr(Path, "glob", refuse)
    rule = "data_dir must be a folder that may be read, but 'there' answered 'Permission denied'"
    with pytest.raises(UserError, match=rule):
        prep._prepared(Path("there"), "*")
    with pytest.raises(UserError, match=rule):
        prep.find("there", "0123456789ab")


def test_find_names_the_cure(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="run `mlflow run . -e prep`"):
        prep.find(str(tmp_path), "0123456789ab")


def test_the_step_logs_counts_digest_and_contact_sheet(
    store: mlflow.MlflowClient, data_options: dict[str, Any]
) -> None:
    prep.main(arguments(data_options))
    (run,) = store.search_runs(["0"])
    data = Dataset.open(next(Path(data_options["data_dir"]).glob("emnist_letters-*")))
    assert run.info.status == "FINISHED"
    assert run.data.metrics == {"n_train": 520, "n_val": 260, "n_gate": 260, "n_test": 260}
    assert run.data.tags["dataset_digest"] == data.digest
    assert run.inputs.dataset_inputs[0].dataset.digest == data.digest
    artifacts = {item.path for item in store.list_artifacts(run.info.run_id)}
    assert artifacts == {"contact_sheet.png", "dataset.json"}


def test_a_bad_archive_leaves_a_failed_run_and_no_data(
    store: mlflow.MlflowClient, data_options: dict[str, Any], tmp_path: Path
) -> None:
    broken = tmp_path / "broken.zip"
    broken.write_bytes(Path(str(data_options["archive"])).read_bytes()[:5000])
    with pytest.raises(UserError):
        prep.main(arguments(data_options | {"archive": broken}))
    (run,) = store.search_runs(["0"])
    assert run.info.status == "FAILED"
    assert "broken.zip" in run.data.tags["error"]
    assert not Path(data_options["data_dir"]).exists()


def test_a_data_set_is_one_file(
    add_member: Callable[[ModuleType, str, str], None], data_options: dict[str, Any]
) -> None:
    add_member(datasets, "toy", TOY)
    assert registry.names(datasets) == ["emnist_letters", "strokes", "toy"]
    data = prep.prepare(**data_options | {"dataset": "toy", "archive": "default"})
    assert (data.title, data.facts["official"]) == ("toy letters", True)
    assert int(data.part("gate").images[0, 0, 0]) == 7


def test_an_unknown_data_set_is_a_sentence_with_the_known_ones(
    data_options: dict[str, Any],
) -> None:
    with pytest.raises(
        UserError, match="dataset must be one of emnist_letters, strokes, but 'mnist'"
    ):
        prep.prepare(**data_options | {"dataset": "mnist"})
