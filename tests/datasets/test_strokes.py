"""Laws of the built-in letters, as the steps see them: through ``source``."""

import json

import numpy as np
import numpy.typing as npt
import pytest

from pipeline.datasets import strokes
from pipeline.spec import LETTERS, Images, Letters, Part, UserError

N_TRAIN = 1_000
N_VAL = N_TRAIN // 4
N_TEST = 10 * len(LETTERS)  # ten a letter at least


def drawn() -> Letters:
    """All letters, drawn."""
    streams = strokes.source("default", N_TRAIN).read()
    return Letters(*(Part(np.concatenate([*s.chunks()]), s.labels) for s in streams))


@pytest.fixture(scope="module")
def letters() -> Letters:
    return drawn()


@pytest.fixture(scope="module")
def images(letters: Letters) -> Images:
    """The pictures of all parts."""
    return np.concatenate([letters.train.images, letters.test.images])


def ends(inked: npt.NDArray[np.bool_]) -> npt.NDArray[np.intp]:
    """First and last True of each row: (n, 28) -> (n, 2)."""
    return np.stack([inked.argmax(axis=1), 27 - inked[:, ::-1].argmax(axis=1)], axis=1)


def test_shapes(letters: Letters) -> None:
    for part, n in ((letters.train, N_TRAIN + N_VAL + N_TEST), (letters.test, N_TEST)):
        # A picture a label, bytes both.
        assert part.images.shape == (n, 28, 28)
        assert part.labels.shape == (n,)
        assert part.images.dtype == part.labels.dtype == np.uint8


def test_every_part_is_balanced(letters: Letters) -> None:
    gate = letters.train.labels[-N_TEST:]
    rest = np.bincount(letters.train.labels[:-N_TEST])
    # All 26 letters are there, equally often in gate and test, and nearly so in the rest.
    assert np.bincount(gate).tolist() == [10] * 26
    assert np.bincount(letters.test.labels).tolist() == [10] * 26
    assert len(rest) == 26
    assert np.ptp(rest) <= 1


def test_only_test_is_sorted(letters: Letters) -> None:
    # As in EMNIST, test comes letter by letter; a share of train must be a fair sample.
    assert (np.diff(letters.test.labels.astype(int)) >= 0).all()
    assert len(np.unique(letters.train.labels[:100])) > 20
    assert len(np.unique(letters.train.labels[-100:])) > 20


@pytest.mark.parametrize(
    ("n_train", "n_test", "n_val"),
    [(1, 260, 0), (8_000, 1_560, 2_000), (40_000, 7_800, 10_000), (400_000, 7_800, 10_000)],
)
def test_sizes_follow_n_train(n_train: int, n_test: int, n_val: int) -> None:
    facts = strokes.source("default", n_train).facts
    # Test and gate are about a fifth of train, 10 to 300 a letter; val a quarter, 10,000 at most.
    assert (facts["n_gate"], facts["n_test"]) == (n_test, n_test)
    assert facts["n_train_and_val"] == n_train + n_val


def test_facts_are_json_and_name_the_seed() -> None:
    source = strokes.source("default", N_TRAIN)
    # A prepared copy is found by its facts, which go through JSON unchanged.
    assert json.loads(json.dumps(source.facts)) == source.facts
    assert {"fonts", "seed", "hershey_fonts_version"} <= source.facts.keys()
    # These are the letters that the name promises.
    assert source.official


def test_ink_is_high_on_zero(images: Images) -> None:
    # EMNIST's recipe leaves two pixels of paper on each side, and every letter has full ink.
    assert images[:, [0, 1, 26, 27]].max() == 0
    assert images[:, :, [0, 1, 26, 27]].max() == 0
    assert images.max(axis=(1, 2)).min() > 200
    # No letter is a speck or a blot (of real letters 98 in 100 lie between 0.05 and 0.27).
    share = (images > 127).mean(axis=(1, 2))
    assert share.min() > 0.02
    assert share.max() < 0.4


def test_the_longer_side_fills_24_pixels_and_is_centred(images: Images) -> None:
    rows, columns = ends(images.max(axis=2) > 0), ends(images.max(axis=1) > 0)
    longer = 1 + np.maximum(np.ptp(rows, axis=1), np.ptp(columns, axis=1))
    # The recipe keeps the aspect, so that one side is 24; real letters obey it without exception.
    assert (longer == 24).all()
    # The box of the ink is centred, but for the half pixel of an odd side.
    assert np.abs(rows.sum(axis=1) - 27).max() <= 1
    assert np.abs(columns.sum(axis=1) - 27).max() <= 1


def test_no_two_letters_are_the_same_picture(images: Images) -> None:
    # Every letter has its own random draws, in each chunk and each part.
    assert len(np.unique(images.reshape(len(images), -1), axis=0)) == len(images)


def test_drawing_repeats(letters: Letters) -> None:
    # The same seed, the same bytes.
    for part, other in zip(letters, drawn(), strict=True):
        np.testing.assert_array_equal(part.images, other.images)
        np.testing.assert_array_equal(part.labels, other.labels)


def test_letters_are_drawn_some_at_a_time(letters: Letters) -> None:
    train, test = strokes.source("default", N_TRAIN).read()
    chunks = train.chunks()
    some = next(chunks)
    assert len(some) < len(train.labels)
    np.testing.assert_array_equal(some, letters.train.images[: len(some)])
    # Law: a part is the same whether others are drawn or not, also from the midst of a chunk.
    np.testing.assert_array_equal(np.concatenate([*test.chunks()]), letters.test.images)


def test_labels_name_the_pictures(letters: Letters) -> None:
    train, test = (part.images.reshape(-1, 784).astype(np.float32) for part in letters)
    # Squared distance (n_test, n_train), less a term that is the same for a whole row.
    distance = (train**2).sum(axis=1) - 2 * test @ train.T
    nearest = letters.train.labels[distance.argmin(axis=1)]
    # The nearest of so few letters is right far oftener than by chance (1 in 26), yet not always.
    assert 0.4 < (nearest == letters.test.labels).mean() < 0.9


@pytest.mark.parametrize(
    ("heavy", "letter"), [("top", "P"), ("bottom", "L"), ("left", "C"), ("right", "J")]
)
def test_letters_are_upright(letters: Letters, heavy: str, letter: str) -> None:
    images = letters.train.images[letters.train.labels == LETTERS.index(letter)]
    share = images.mean(axis=0) / images.mean(axis=0).sum()  # (28, 28)
    halves = {
        "top": share[:14],
        "bottom": share[14:],
        "left": share[:, :14],
        "right": share[:, 14:],
    }
    # More than half of the ink is where a reader expects it: nothing is transposed or mirrored.
    assert halves[heavy].sum() > 0.53


def test_an_archive_is_refused() -> None:
    # The sentence says the rule, what came, and the cure.
    with pytest.raises(UserError, match=r"reads no archive.*'x\.zip'.*dataset=emnist_letters"):
        strokes.source("x.zip", N_TRAIN)


def test_all_letters_are_refused() -> None:
    # There is no last letter to draw.
    with pytest.raises(UserError, match=r"has no end.*n_train=all.*give a number"):
        strokes.source("default", None)
