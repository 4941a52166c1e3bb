"""Letters drawn from stroke fonts: built in, without a download and without an end.

Each letter is a glyph of a Hershey font, bent, stretched, slanted and turned as by a hasty hand,
drawn with a round pen and brought to 28x28 by the recipe of NIST and EMNIST (Cohen et al. 2017,
"EMNIST: an extension of MNIST to handwritten letters"). The bending is the elastic distortion of
Simard, Steinkraus and Platt (2003, "Best practices for convolutional neural networks applied to
visual document analysis"), white noise smoothed by a Gaussian; it moves pen points, not pixels.
"""

import importlib.metadata
import math
from collections.abc import Iterator, Mapping
from functools import partial
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from HersheyFonts import HersheyFonts
from PIL import Image, ImageDraw
from tqdm import tqdm

from pipeline import nist
from pipeline.spec import LETTERS, Images, Labels, Letters, Source, Stream, UserError

_SEED = 2017
_CHUNK = 1_000  # letters a random stream

# Font: how often, in eighths. Of the package's other Latin alphabets four are copies, and four draw
# every stroke two or three times, of which a pen makes blots.
_FONTS = {"futural": 4, "scripts": 2, "timesr": 1, "timesi": 1}

# What a hand does, uniform between two ends and drawn anew for each letter. An em is the longer
# side of a glyph. Size is missing: the crop to the ink undoes it; the pen's width stands for it.
_HAND = {
    "corners": (0.0, 1.0),  # 0 as sharp as the font has them, 1 rounded by a fast pen
    "elastic": (0.02, 0.09),  # em, standard deviation of what moves neighbouring points together
    "drift": (0.0, 0.05),  # em, of what moves a stroke from its place and its course
    "tremor": (0.0, 0.012),  # em, of what shakes the pen along a stroke
    "stretch": (-0.45, 0.35),  # natural logarithm of width / height
    "slant": (-0.25, 0.4),  # tangent of the angle to the right
    "turn": (-15.0, 15.0),  # degrees, clockwise
    "pen": (6.0, 13.0),  # px of the canvas, width
}
_SMOOTH = {"corners": 0.06, "elastic": 0.25, "drift": 0.4, "tremor": 0.05}  # em, sigma of Gaussians
_STEP = 0.05  # em, between pen points at most

_Array = npt.NDArray[np.float64]
_Stroke = list[tuple[float, float]]


class _Glyph(NamedTuple):
    """A letter of a font as n pen points, with all that does not depend on chance."""

    sharp: _Array  # (n, 2) em, y down
    rounded: _Array  # (n, 2) em, the same points where corners are cut
    noise: Mapping[str, _Array]  # (n, n), times white noise is smooth noise of variance 1
    starts: list[int]  # where strokes start, but the first


def source(archive: str, n_train: int | None) -> Source:
    """Letters drawn on demand, as many as asked for."""
    if archive != "default":
        raise UserError(
            f"the data set strokes is drawn and reads no archive, but archive={archive!r} came: "
            "leave archive out, or name dataset=emnist_letters"
        )
    if n_train is None:
        raise UserError(
            "the data set strokes is drawn on demand and has no end, but n_train=all came: "
            "give a number, such as n_train=40000"
        )
    n_val = min(10_000, n_train // 4)
    n_test = len(LETTERS) * min(max(round(n_train * 0.195 / len(LETTERS)), 10), 300)
    return Source(
        title="strokes (drawn letters)",
        official=True,
        facts={
            "fonts": _FONTS,
            "hand": {name: list(ends) for name, ends in _HAND.items()},
            "smooth": _SMOOTH,
            "n_train_and_val": n_train + n_val,
            "n_gate": n_test,
            "n_test": n_test,
            "seed": _SEED,
            "hershey_fonts_version": importlib.metadata.version("Hershey-Fonts"),
            "pillow_version": importlib.metadata.version("pillow"),
        },
        read=partial(_read, n_train + n_val, n_test),
    )


def _read(n_train_and_val: int, n_test: int) -> Letters:
    """All parts as one row of letters, so that no two share a random stream; drawn when read.

    As in EMNIST the gate, the last rows of train, is balanced, and test is balanced and sorted.
    """
    rng = np.random.default_rng(_SEED)
    sizes = n_train_and_val, n_test
    train, gate = (rng.permutation(np.arange(n) % len(LETTERS)) for n in sizes)
    labels = np.concatenate([train, gate, np.sort(gate)]).astype(np.uint8)
    cut = len(labels) - n_test
    ends = (0, cut), (cut, len(labels))
    parts = (Stream(labels[slice(*some)], partial(_draw, labels, *some)) for some in ends)
    return Letters(*parts)


def _draw(labels: Labels, begin: int, end: int) -> Iterator[Images]:
    """The pictures of the labels from ``begin`` to ``end``, a chunk at a time.

    Chunks are independent: any of them can be drawn without the others.
    """
    glyphs = _glyphs()
    starts = range(0, len(labels), _CHUNK)
    seeds = np.random.SeedSequence(_SEED).spawn(len(starts))
    chunks = [
        (start, seed)
        for start, seed in zip(starts, seeds, strict=True)
        if begin < start + _CHUNK and start < end
    ]
    for start, seed in tqdm(chunks, "thousand letters", disable=None):
        rng = np.random.default_rng(seed)
        images = []
        for label in labels[start : min(start + _CHUNK, end)]:
            glyph = glyphs[label][rng.integers(len(glyphs[label]))]
            hand = {name: rng.uniform(*ends) for name, ends in _HAND.items()}
            strokes = _write(glyph, hand, rng)
            images.append(_picture(strokes, hand["pen"]))
        yield np.stack(images)[max(begin - start, 0) :]


def _glyphs() -> list[list[_Glyph]]:
    """The glyphs of each label, upper and lower case; a common font's are there many times."""
    fonts = [(HersheyFonts(load_default_font=name), often) for name, often in _FONTS.items()]
    return [
        [
            glyph
            for font, often in fonts
            for character in (letter, letter.lower())
            for glyph in [_glyph(list(font.strokes_for_text(character)))] * often
        ]
        for letter in LETTERS
    ]


def _glyph(strokes: list[_Stroke]) -> _Glyph:
    em = np.ptp(np.concatenate(strokes), axis=0).max()
    spaced = [_spaced(np.array(stroke) / em) for stroke in strokes]
    sharp = np.concatenate([points for points, _ in spaced])
    # Strokes lie far apart on the pen's path, so that noise along it moves each on its own.
    path = np.concatenate([at + 1_000 * i for i, (_, at) in enumerate(spaced)])
    along = np.abs(path[:, None] - path)  # (n, n) em
    across = np.linalg.norm(sharp[:, None] - sharp, axis=2)  # (n, n) em
    near = _gaussian(along, "corners")
    distances = {"elastic": across, "drift": along, "tremor": along}
    noise = {name: _gaussian(distance, name) for name, distance in distances.items()}
    return _Glyph(
        sharp=sharp,
        rounded=near @ sharp / near.sum(axis=1, keepdims=True),
        noise={k: g / np.linalg.norm(g, axis=1, keepdims=True) for k, g in noise.items()},
        starts=np.cumsum([len(at) for _, at in spaced])[:-1].tolist(),
    )


def _spaced(corners: _Array) -> tuple[_Array, _Array]:
    """Points at even steps along a stroke, and how far along it each lies."""
    length = np.append(0, np.cumsum(np.linalg.norm(np.diff(corners, axis=0), axis=1)))
    at = np.linspace(0, length[-1], 2 + math.ceil(length[-1] / _STEP))
    return np.stack([np.interp(at, length, xy) for xy in corners.T], axis=1), at


def _gaussian(distance: _Array, name: str) -> _Array:
    return np.exp(-0.5 * (distance / _SMOOTH[name]) ** 2)


def _write(glyph: _Glyph, hand: Mapping[str, float], rng: np.random.Generator) -> list[_Array]:
    """Move the pen points of a glyph as this hand does; the strokes in px of the canvas."""
    points = glyph.sharp + hand["corners"] * (glyph.rounded - glyph.sharp)
    for name, smooth in glyph.noise.items():
        points += hand[name] * (smooth @ rng.normal(size=points.shape))
    wide, turn = math.exp(hand["stretch"] / 2), math.radians(hand["turn"])
    points = points @ [[wide, 0], [-hand["slant"], 1 / wide]]
    points = points @ [[math.cos(turn), math.sin(turn)], [-math.sin(turn), math.cos(turn)]]
    low, high = points.min(axis=0), points.max(axis=0)
    points = (points - (low + high) / 2) * (nist.DRAWN / (high - low).max()) + nist.CANVAS / 2
    # Processors differ in the last bits of a product; rounding lets them draw the same picture.
    return np.split(points.round(3), glyph.starts)


def _picture(strokes: list[_Array], pen: float) -> Images:
    """What the pen draws on the canvas, brought to (28, 28) by NIST's recipe."""
    image = Image.new("L", (nist.CANVAS, nist.CANVAS))
    draw = ImageDraw.Draw(image)
    for stroke in strokes:
        draw.line(stroke.ravel().tolist(), fill=255, width=round(pen))
        for point in stroke.tolist():  # the pen is round: at joints and at both ends
            draw.circle(point, pen / 2, fill=255)
    return nist.letter(image)
