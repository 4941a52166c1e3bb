"""The nouns that the steps share. Imports nothing of ours.

A *letter* is one 28x28 grey picture, upright, ink high on 0. A *part* is one of the four disjoint
sets of letters of a data set; which step may read which part is said in ``PARTS``.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from optuna.distributions import BaseDistribution

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
SIDE = 28  # pixels
CHUNK = 4_096  # letters handed on at once

# part: the steps that read it
PARTS = {
    "train": "train, sweep",
    "val": "train, sweep: what a study maximises",
    "gate": "promote",
    "test": "evaluate",
}

Images = npt.NDArray[np.uint8]  # (n, 28, 28)
Labels = npt.NDArray[np.uint8]  # (n,), 0..25 for A..Z
Probabilities = npt.NDArray[np.float32]  # (n, 26), rows sum to 1
Params = dict[str, Any]

# A hyperparameter of models that may be trained on some letters: how many; 0 are all.
N_LETTERS = "n_letters"
# One of models whose fit shortens itself where its grant is too small: to how much.
LATE_LETTERS = "late_letters"
# One of models that do test-time augmentation: copies of a letter that an answer is the mean of.
TTA = "tta"
# What a letter of val costs in an epoch, by one that is trained on: the priors of CNN and LSTM.
VALIDATION = 0.27

# report(step, val_accuracy) -> True if the fit must stop here and return what it has.
# A step is an epoch for the networks and a tenth of the training letters for KNN.
Report = Callable[[int, float], bool]


class UserError(Exception):
    """A mistake that the user can mend, in one sentence: the rule, what came, the cure."""


class Refused(UserError):
    """A decision against what was asked for, in one sentence; nothing is wrong with the asking."""


class Part(NamedTuple):
    """Letters of one part, row i of one belonging to row i of the other."""

    images: Images
    labels: Labels

    def chunks(self) -> Iterator[Images]:
        """The images in their order, some at a time."""
        for start in range(0, len(self.labels), CHUNK):
            yield self.images[start : start + CHUNK]

    def some(self, n_letters: int) -> "Part":
        """So many letters, evenly taken from all; all where there are no more, or for 0."""
        n_all = len(self.labels)
        if not 0 < n_letters < n_all:
            return self
        rows = np.arange(n_letters) * n_all // n_letters
        return Part(self.images[rows], self.labels[rows])


class Stream(NamedTuple):
    """Letters too many for memory: all labels, and ``chunks()`` reads the images, some at a time.

    Row i of the labels belongs to row i of all chunks, one after the other.
    """

    labels: Labels
    chunks: Callable[[], Iterator[Images]]


class Letters(NamedTuple):
    """What a data set file reads: all its letters, before they are split into parts.

    As in EMNIST, the last ``len(test.labels)`` rows of ``train`` are the validation split ("gate").
    """

    train: Part | Stream
    test: Part | Stream


@dataclass(frozen=True)
class Source:
    """Where a data set's letters come from; made by ``source(archive, n_train)`` of its file.

    Attributes:
        title: names the data set beside every figure; says so where it is not the official one.
        official: whether these are the letters that the data set's name promises.
        facts: JSON values that pin the content, such as file digests; part of the cache key.
        read: reads or draws all letters; costly, called only where no prepared copy is found. What
            comes as a ``Stream`` is read when its chunks are.
    """

    title: str
    official: bool
    facts: Mapping[str, Any]
    read: Callable[[], Letters]


@dataclass(frozen=True)
class Dataset:
    """A prepared data set: a folder with ``dataset.json`` and one ``.npy`` file an array."""

    root: Path
    facts: Mapping[str, Any]

    @classmethod
    def open(cls, root: Path) -> "Dataset":
        """Open a folder that ``prep`` wrote."""
        return cls(root, json.loads((root / "dataset.json").read_text()))

    @property
    def name(self) -> str:
        return str(self.facts["name"])

    @property
    def title(self) -> str:
        return str(self.facts["title"])

    @property
    def digest(self) -> str:
        return str(self.facts["digest"])

    def part(self, name: str) -> Part:
        """One part, memory-mapped, so that processes share its pages."""
        images, labels = (
            np.load(self.root / f"{name}_{array}.npy", mmap_mode="r") for array in Part._fields
        )
        return Part(images, labels)


class Param(NamedTuple):
    """A hyperparameter: the deck's value, and the range a study searches and ``train`` accepts."""

    default: Any
    distribution: BaseDistribution


@dataclass(frozen=True)
class Fitted:
    """A trained model, ready to answer and to be logged.

    Attributes:
        predict: letters in (n, 28, 28) uint8, probabilities out (n, 26) float32.
        save_model: stores it as an MLflow model, with the arguments of a flavour's ``save_model``:
            path, mlflow_model, signature, input_example, pip_requirements.
        n_steps: steps of a whole fit, which is more than were done where ``report`` stopped it, or
            where its CPU-seconds ended in a step.
        requirements: distributions that the logged model needs; versions come from the lock.
        found: hyperparameters that were left to the fit, as it has found them.
    """

    predict: Callable[[Images], Probabilities]
    save_model: Callable[..., None]
    requirements: tuple[str, ...]
    n_steps: int
    found: Params = field(default_factory=dict)
