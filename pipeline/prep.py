"""The step ``prep``: read or draw a data set's letters, split them into parts, keep them as files.

mlflow run . -e prep -P dataset=strokes
"""

import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from pipeline import cli, datasets, disk, nist, registry, tracking
from pipeline.spec import LETTERS, PARTS, SIDE, Dataset, Letters, Part, Source, Stream, UserError

OPTIONS: dict[str, cli.Convert] = {
    "dataset": cli.text,
    "archive": cli.text,
    "n_train": cli.n_train,
    "data_dir": cli.folder,
}
CURE = "pass -P data_dir=FOLDER"


def prepare(dataset: str, archive: str, n_train: int | None, data_dir: str) -> Dataset:
    """The prepared data set; read and split only where no copy of the same content is found."""
    return _prepare(dataset, archive, n_train, Path(data_dir))[0]


def ensure(dataset: str, archive: str, n_train: int | None, data_dir: str) -> Dataset:
    """As ``prepare``, for steps that come after: letters read anew get a run of their own."""
    data, fresh = _prepare(dataset, archive, n_train, Path(data_dir))
    if fresh:
        with tracking.start("prep", adopt=False) as run:
            log(run, data)
    return data


def find(data_dir: str, digest: str) -> Dataset:
    """The prepared data set with this digest."""
    for path in _prepared(Path(data_dir), f"*-{digest}"):
        return Dataset.open(path)
    raise UserError(
        f"the data set with digest {digest} must lie in {data_dir!r}, but it is not there: "
        "run `mlflow run . -e prep` with the parameters of that run"
    )


def _prepare(
    dataset: str, archive: str, n_train: int | None, data_dir: Path
) -> tuple[Dataset, bool]:
    source: Source = registry.load(datasets, dataset).source(archive, n_train)
    key = _sha256(_canonical(_key_facts(dataset, n_train, source)))
    for path in _prepared(data_dir, f"{dataset}-*"):
        found = Dataset.open(path)
        if found.facts["key"] == key:
            return found, False
    letters = source.read()
    rows = datasets.split(len(letters.train.labels), len(letters.test.labels), n_train)
    n_letters = sum(len(part) for parts in rows.values() for part in parts.values())
    disk.check_room(data_dir, n_letters * (SIDE * SIDE + 1), CURE)
    return _write(data_dir, dataset, source, key, letters, rows), True


def _prepared(data_dir: Path, pattern: str) -> list[Path]:
    """Folders of prepared data sets."""
    try:
        return [path.parent for path in data_dir.glob(f"{pattern}/dataset.json")]
    except OSError as error:
        raise UserError(
            f"data_dir must be a folder that may be read, but {str(data_dir)!r} answered "
            f"'{error.strerror}': {CURE}"
        ) from error


_Rows = Mapping[str, Mapping[str, datasets.Rows]]


def _key_facts(dataset: str, n_train: int | None, source: Source) -> dict[str, Any]:
    """All that decides the content: the source, the parameters, and the code that makes it."""
    files = [*Path(datasets.__file__).parent.glob("*.py"), Path(nist.__file__)]
    code = {path.name: _sha256(path.read_bytes()) for path in sorted(files)}
    return {"dataset": dataset, "n_train": n_train, "source": dict(source.facts), "code": code}


def _write(
    data_dir: Path, dataset: str, source: Source, key: str, letters: Letters, rows: _Rows
) -> Dataset:
    """Write the arrays beside their folder's final place, then move it there in one step."""
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
        _sweep_up(data_dir)
        scratch = Path(tempfile.mkdtemp(prefix=".prep-", dir=data_dir))
    except OSError as error:
        raise _unwritable(data_dir, error) from error
    try:
        sha256, counts = dict[str, str](), dict[str, int]()
        for home, parts in rows.items():
            sha256 |= _save(scratch, getattr(letters, home), parts)
            counts |= {part: len(of_part) for part, of_part in parts.items()}
        content = {"name": dataset, "official": source.official, "sha256": sha256}
        digest = _sha256(_canonical(content))[:12]
        facts = content | {
            "digest": digest,
            "title": source.title,
            "key": key,
            "counts": counts,
            "letters": LETTERS,
            "readers": PARTS,
            "split_seed": datasets.SPLIT_SEED,
            "source": dict(source.facts),
        }
        with (scratch / "dataset.json").open("w") as file:
            file.write(json.dumps(facts, indent=2) + "\n")
            disk.keep(file)
        scratch.chmod(0o755)  # mkdtemp makes it private
        root = data_dir / f"{dataset}-{digest}"
        try:
            scratch.rename(root)
        except OSError:
            if not root.exists():
                raise
            # The same letters, by other code or by a process at the same time: the key may be new.
            os.replace(scratch / "dataset.json", root / "dataset.json")
    except OSError as error:
        raise _unwritable(data_dir, error) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return Dataset.open(root)


def _unwritable(data_dir: Path, error: OSError) -> UserError:
    return UserError(
        f"prep must be able to write to its folder, but {str(data_dir)!r} answered "
        f"'{error.strerror}': make room or {CURE}"
    )


def _save(
    scratch: Path, letters: Part | Stream, parts: Mapping[str, datasets.Rows]
) -> dict[str, str]:
    """Write the parts that are rows of ``letters``, and read these once; SHA-256 of each array."""
    n_letters, n_images = len(letters.labels), 0
    part_of = np.full(n_letters, len(parts), np.uint8)
    places = np.empty(n_letters, np.int64)  # of each letter in its part
    sha256 = {}
    with ExitStack() as stack:
        files = []
        for number, (part, rows) in enumerate(parts.items()):
            part_of[rows], places[rows] = number, np.arange(len(rows))
            labels, images = (
                stack.enter_context((scratch / f"{part}_{name}.npy").open("w+b"))
                for name in ("labels", "images")
            )
            np.save(labels, letters.labels[rows])
            disk.keep(labels)
            labels.seek(0)
            sha256[f"{part}_labels"] = _sha256(labels.read())
            files.append(disk.RowFile(images, len(rows), (SIDE, SIDE)))
        for chunk in letters.chunks():
            here = slice(n_images, n_images + len(chunk))
            n_images = here.stop
            for number, file in enumerate(files):
                chosen = np.flatnonzero(part_of[here] == number)
                file.put(chunk[chosen], places[here][chosen])
        if n_images != n_letters:
            raise UserError(
                f"a data set must have one image for each label, but {n_images} images and "
                f"{n_letters} labels came: mend its file in pipeline/datasets"
            )
        for part, file in zip(parts, files, strict=True):
            sha256[f"{part}_images"] = file.finish()
    return sha256


def _sweep_up(data_dir: Path) -> None:
    """Remove what a prep that was killed has left; none takes as long as a day."""
    for path in data_dir.glob(".prep-*"):
        if time.time() - path.stat().st_mtime > 24 * 3600:
            shutil.rmtree(path, ignore_errors=True)


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _canonical(facts: Mapping[str, Any]) -> bytes:
    return json.dumps(facts, sort_keys=True).encode()


def log(run: tracking.Run, data: Dataset) -> None:
    """Counts, digest and a contact sheet of a prepared data set."""
    from pipeline import plots  # a sweep's trials, which import this module, draw nothing

    run.use_dataset(data)
    run.name(f"prep · {data.name}")
    run.metrics({f"n_{part}": count for part, count in data.facts["counts"].items()})
    run.json("dataset.json", dict(data.facts))
    run.figure("contact_sheet.png", plots.contact_sheet(data.part("train"), data.title))
    counts = [[part, count, PARTS[part]] for part, count in data.facts["counts"].items()]
    table = tracking.markdown(["part", "letters", "read by"], counts)
    run.describe(f"**{data.title}**, digest `{data.digest}`\n\n{table}")


def main(argv: Sequence[str]) -> None:
    options = cli.parse_all("prep", argv, OPTIONS)
    with tracking.start("prep") as run:
        data = prepare(**options)
        log(run, data)
    counts = ", ".join(f"{count:,} {part}" for part, count in data.facts["counts"].items())
    print(f"{data.title}: {counts} letters in {data.root}")


if __name__ == "__main__":
    cli.run(main)
