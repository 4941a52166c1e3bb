import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import mlflow
import numpy as np
import pytest
from archives import write_archive
from steps import arguments

from pipeline import datasets, prep, registry
from pipeline.spec import PARTS, Dataset, Letters, Part, UserError

TOY = """
import numpy as np
from pipeline.spec import Letters, Part, Source

def _part(n):
    return Part(np.full((n, 28, 28), 7, np.uint8), np.arange(n, dtype=np.uint8) % 26)

def source(archive, n_train):
    return Source("toy letters", True, {"seed": 0}, lambda: Letters(_part(1040), _part(260)))
"""


def _letters(n_train: int, n_test: int) -> Letters:
    """Letters of which each can be told from every other by its first two pixels."""
    numbers = np.arange(n_train + n_test)
    images = np.zeros((len(numbers), 28, 28), np.uint8)
    images[:, 0, 0], images[:, 0, 1] = numbers // 256, numbers % 256
    labels = (numbers % 26).astype(np.uint8)
    return Letters(
        Part(images[:n_train], labels[:n_train]), Part(images[n_train:], labels[n_train:])
    )


def _numbers(part: Part) -> set[int]:
    first = part.images[:, 0, :2].astype(int)
    return set((first[:, 0] * 256 + first[:, 1]).tolist())


@pytest.mark.parametrize(("n_train", "n_val"), [(520, 260), (700, 80), (None, 130)])
def test_parts_are_disjoint_and_the_gate_is_the_end_of_train(
    n_train: int | None, n_val: int
) -> None:
    parts = datasets.split(_letters(1040, 260), n_train)
    numbers = {name: _numbers(part) for name, part in parts.items()}
    assert list(parts) == list(PARTS)
    # Every letter is in one part at most, and as many are in val as are left, all taking a sixth.
    assert sum(map(len, numbers.values())) == len(set.union(*numbers.values()))
    assert len(numbers["val"]) == n_val
    assert len(numbers["train"]) == 780 - n_val if n_train is None else n_train
    # EMNIST's validation split, the last rows of train, is the gate; test is test.
    assert numbers["gate"] == set(range(780, 1040))
    assert numbers["test"] == set(range(1040, 1300))


def test_val_has_at_most_ten_thousand_letters() -> None:
    assert len(datasets.split(_letters(40_260, 260), 10_000)["val"].labels) == 10_000
    # Of all letters, too, train leaves that many to val.
    assert len(datasets.split(_letters(61_000, 260), None)["train"].labels) == 60_740 - 10_000


def test_train_must_leave_letters_to_val() -> None:
    with pytest.raises(UserError, match="leave at least 26 of this data set's 780 letters to val"):
        datasets.split(_letters(1040, 260), 760)


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


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EACCES])
def test_a_failed_write_leaves_nothing(
    code: int, archive: Path, data_options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Path] = []

    def save(path: Path, array: Any) -> None:
        calls.append(path)
        if len(calls) == 3:  # some arrays are written already
            raise OSError(code, "the disk said no")

    monkeypatch.setattr(np, "save", save)
    monkeypatch.setattr(prep, "_save", lambda path, array: save(path, array) or "0")
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
