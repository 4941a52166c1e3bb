"""What preparing and training cost as letters grow: CPU-seconds, and memory at its peak.

    python -m benchmarks.scale

Synthesises archives in EMNIST's layout (drawn letters, moved and dimmed at random), prepares them
with ``n_train=all``, and fits one step of each model on them, each in a process of its own and on
one thread. The networks are small ones, so that five million letters are soon through; a step of
nearest neighbours is the whole of its recipe with LDA, and a tenth of a search among plain pixels.
It draws what it found: ``results/scale.png``.
"""

import argparse
import gzip
import json
import os
import resource
import struct
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from matplotlib.figure import Figure

from pipeline import models, plots, prep, registry
from pipeline.datasets import strokes
from pipeline.spec import CHUNK, LETTERS, SIDE, Dataset
from sweeps.nursery import ONE_THREAD

HERE = Path(__file__).parent
N_DRAWN, SHIFT = 2_600, 2  # letters drawn; pixels that a copy is moved by, at most
POLL_SECONDS = 0.02  # between two looks at a process's memory
NETWORK = {"batch_size": 256, "epochs": 1}
STEPS: dict[str, tuple[str, dict[str, Any]]] = {
    "cnn": ("cnn", {**NETWORK, "filters": 8}),
    "lstm": ("lstm", {**NETWORK, "rows": 4, "units": 32}),
    "knn, LDA": ("knn", {"features": "gradients", "lda_shrinkage": 0.01}),
    "knn, pixels": ("knn", {}),
}

_Bytes = npt.NDArray[np.uint8]


def synthesise(path: Path, n_letters: int, seed: int = 0) -> None:
    """Write an archive of ``n_letters``, gate and test included, a chunk at a time."""
    rng = np.random.default_rng(seed)
    n_test = len(LETTERS) * min(800, max(10, n_letters // 200))
    labels = {
        "train": np.append(_balanced(n_letters - 2 * n_test, rng), _balanced(n_test, rng)),
        "test": np.sort(_balanced(n_test, rng)),
    }
    drawn = strokes.source("default", N_DRAWN).read().train
    windows = _windows(np.concatenate([*drawn.chunks()]))
    rows = [np.flatnonzero(drawn.labels == label) for label in range(len(LETTERS))]
    with zipfile.ZipFile(path, "w") as archive:
        for part, some in labels.items():
            name = f"gzip/emnist-letters-{part}-"
            chunks = (
                _copies(windows, rows, some[start : start + CHUNK], rng)
                for start in range(0, len(some), CHUNK)
            )
            _member(archive, f"{name}images-idx3-ubyte.gz", (len(some), SIDE, SIDE), chunks)
            _member(archive, f"{name}labels-idx1-ubyte.gz", (len(some),), [some + np.uint8(1)])


def _balanced(n_letters: int, rng: np.random.Generator) -> _Bytes:
    return rng.permutation((np.arange(n_letters) % len(LETTERS)).astype(np.uint8))


def _windows(images: _Bytes) -> _Bytes:
    """Each letter at each shift: (n, 5, 5, 28, 28), a view."""
    wide = np.pad(images, ((0, 0), (SHIFT, SHIFT), (SHIFT, SHIFT)))
    found: _Bytes = np.lib.stride_tricks.sliding_window_view(wide, (SIDE, SIDE), (1, 2))
    return found


def _copies(
    windows: _Bytes, rows: list[npt.NDArray[np.int64]], labels: _Bytes, rng: np.random.Generator
) -> _Bytes:
    """A drawn letter for each label, moved and dimmed at random, transposed as in EMNIST."""
    pick = rng.random(len(labels))
    chosen = np.array([rows[i][int(p * len(rows[i]))] for i, p in zip(labels, pick, strict=True)])
    x, y = rng.integers(0, 2 * SHIFT + 1, (2, len(labels)))
    ink = rng.integers(128, 257, (len(labels), 1, 1), np.uint16)
    dimmed = (windows[chosen, y, x] * ink) >> 8
    return dimmed.astype(np.uint8).transpose(0, 2, 1)


def _member(archive: zipfile.ZipFile, name: str, shape: tuple[int, ...], chunks: Any) -> None:
    """A gzipped idx file; as EMNIST's, the zip itself packs no further."""
    with (
        archive.open(name, "w", force_zip64=True) as stored,
        gzip.GzipFile("", "wb", 1, stored, mtime=0) as packed,
    ):
        packed.write(struct.pack(f">{1 + len(shape)}I", 0x800 + len(shape), *shape))
        for chunk in chunks:
            packed.write(chunk.tobytes())


def measured(*command: str) -> dict[str, float]:
    """Run ``benchmarks.scale`` with ``command``; what it prints, and its memory at its peak."""
    started = [sys.executable, "-m", "benchmarks.scale", *command]
    child = subprocess.Popen(
        started, cwd=HERE.parent, env=os.environ | ONE_THREAD, stdout=subprocess.PIPE, text=True
    )
    peaks = {"RssAnon": 0.0, "VmHWM": 0.0}
    while child.poll() is None:
        for name, mb in _memory(child.pid):
            peaks[name] = max(peaks.get(name, 0.0), mb)
        time.sleep(POLL_SECONDS)
    assert child.stdout is not None
    said = child.stdout.read()
    if child.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with exit code {child.returncode}")
    told = json.loads(said.splitlines()[-1])
    return told | {"peak_anon_mb": peaks["RssAnon"]}


def _memory(pid: int) -> Iterator[tuple[str, float]]:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):  # it has just ended
        return
    for line in lines:
        name, _, value = line.partition(":")
        if name in ("RssAnon", "VmHWM"):
            yield name, 1024 * int(value.split()[0]) / 1e6


def prepare(archive: str, data_dir: str) -> dict[str, Any]:
    began = time.process_time()
    data = prep.prepare("emnist_letters", archive, None, data_dir)
    return _told(began, data.facts["counts"]["train"]) | {"root": str(data.root)}


def step(name: str, root: str) -> dict[str, Any]:
    """Fit until the first report, and no further."""
    model, params = STEPS[name]
    member = registry.load(models, model)
    defaults = {key: param.default for key, param in member.PARAMS.items()}
    data = Dataset.open(Path(root))
    registry.preload(member)
    train, val = data.part("train"), data.part("val")
    began = time.process_time()
    told: dict[str, Any] = {}

    def report(step: int, val_accuracy: float) -> bool:
        told.update(_told(began, len(train.labels)))
        return True

    member.fit(defaults | params, train, val, 0, report)
    return told


def _told(began: float, n_train: int) -> dict[str, Any]:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return {
        "n_train": n_train,
        "cpu_seconds": time.process_time() - began,
        "peak_rss_mb": 1024 * usage.ru_maxrss / 1e6,
    }


def rows(sizes: list[int], largest_knn: int, folder: Path) -> Iterator[dict[str, Any]]:
    """A row for each size and work; what an archive of one size took on disk is removed at once.

    Neighbours' cost grows with the square of letters: above ``largest_knn`` there are none.
    """
    for n_letters in sizes:
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            archive = Path(scratch) / "drawn.zip"
            synthesise(archive, n_letters)
            found = measured("--archive", str(archive), "--data_dir", scratch)
            archive.unlink()
            root = found.pop("root")
            yield {"work": "prep", "letters": n_letters} | found
            for name, (model, _) in STEPS.items():
                if model == "knn" and n_letters > largest_knn:
                    continue
                found = measured("--step", name, "--root", str(root))
                yield {"work": name, "letters": n_letters} | found


def picture(table: pd.DataFrame) -> Figure:
    """CPU-seconds and memory of each work, by the number of training letters."""
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    panels = {"cpu_seconds": "CPU-seconds", "peak_anon_mb": "MB of its own, at the peak"}
    for axes, (column, label) in zip(figure.subplots(1, 2), panels.items(), strict=True):
        for (work, found), colour, mark in zip(
            table.groupby("work"), plots.COLOURS, plots.MARKS, strict=False
        ):
            axes.plot(found["n_train"], found[column], color=colour, marker=mark, label=work)
        axes.set(xlabel="training letters", ylabel=label, xscale="log", yscale="log")
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].legend(fontsize=8)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    sizes = [10_000, 40_000, 125_000, 500_000, 5_000_000]
    parser.add_argument("--sizes", type=int, nargs="+", default=sizes)
    parser.add_argument("--largest_knn", type=int, default=500_000)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--results", type=Path, default=HERE / "results")
    for name in ("archive", "data_dir", "step", "root"):  # of a process that is measured
        parser.add_argument(f"--{name}", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.archive:
        print(json.dumps(prepare(given.archive, given.data_dir)))
        return
    if given.step:
        print(json.dumps(step(given.step, given.root)))
        return
    given.results.mkdir(exist_ok=True)
    found = []
    for row in rows(given.sizes, given.largest_knn, given.folder):
        found.append(row | {"data_set": "drawn letters in EMNIST's layout, not EMNIST"})
        print(row, flush=True)
        # As each comes: a large one may take long, or the disk may be full.
        table = pd.DataFrame(found).sort_values(["work", "letters"]).round(2)
        table.to_csv(given.results / "scale.csv", index=False)
        picture(table).savefig(given.results / "scale.png", dpi=110)


if __name__ == "__main__":
    main()
