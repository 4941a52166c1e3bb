"""A photo or scan of one letter, brought to EMNIST's form: (28, 28), upright, ink high on 0.

The paper's light is fitted and taken away, the ink told from it, specks dropped; the rest is
``nist``. Which of the two colours is paper is told by how much there is of it.
"""

import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError
from scipy import ndimage

from pipeline import nist
from pipeline.spec import Images, UserError

Grey = npt.NDArray[np.float32]  # (height, width), 0 black to 1 white
Mask = npt.NDArray[np.bool_]

MAX_SIDE = 1024  # px; a larger picture is shrunk first
SMALL_SIDE = 112  # px; a smaller one is enlarged first: its grey pixels hold finer edges
MIN_SIDE = 5  # px
MIN_CONTRAST = 0.06  # of the way from black to white, between paper and ink
MIN_SEPARATION = 5.0  # standard deviations of the paper, between paper and ink
N_FITS = 4  # of the paper's light, each without what the one before took for ink
MIN_PART = 0.04  # of the largest part's area; smaller ones are specks
MIN_PEN = 8.0  # px of 96: a thin pen of EMNIST's (median 11); a thinner one is widened


class Seen(NamedTuple):
    """A letter that was found: the upright picture, the box around its ink, the letter itself."""

    picture: Grey
    box: tuple[int, int, int, int]  # px of the picture: left, top, right, bottom
    letter: Images  # (28, 28)


def read(path: Path) -> Grey:
    """The picture in ``path``, upright, grey, its longer side 112 to 1024 px."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                image.draft("L", (2 * MAX_SIDE, 2 * MAX_SIDE))  # a JPEG is then read in a fraction
                width, height = image.size
                grey = _grey(ImageOps.exif_transpose(image))
    except UnidentifiedImageError as error:
        raise UserError(
            f"image must be a picture, but {str(path)!r} is none that can be read: "
            "pass a PNG, JPEG or TIFF file"
        ) from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise UserError(
            f"image must have at most {(Image.MAX_IMAGE_PIXELS or 0) / 1e6:.0f} million pixels, "
            f"but {str(path)!r} has more: make it smaller"
        ) from error
    except FileNotFoundError as error:
        raise UserError(
            f"image must name a file, but {str(path.absolute())!r} is not there: correct the path"
        ) from error
    except (OSError, SyntaxError, ValueError) as error:  # what Pillow raises for broken files
        raise UserError(
            f"image must be a whole picture, but {str(path)!r} gave: {error}: copy it anew"
        ) from error
    if min(width, height) < MIN_SIDE:
        raise UserError(
            f"image must be at least {MIN_SIDE} pixels wide and high, but {str(path)!r} is "
            f"{width}x{height}: pass a larger picture"
        )
    return grey


def _grey(image: Image.Image) -> Grey:
    if image.mode[0] in "IF":  # 16 bit or more: between its darkest and its lightest pixel
        deep = np.asarray(image, np.float32)
        deep = (deep - deep.min()) / max(float(np.ptp(deep)), 1e-6)
        image = Image.fromarray((deep * 255).astype(np.uint8))
    if image.has_transparency_data:
        image = _on_paper(image.convert("LA"))
    image = image.convert("L")
    image.thumbnail((MAX_SIDE, MAX_SIDE), Image.Resampling.BOX)
    if (scale := SMALL_SIDE / max(image.size)) > 1:
        width, height = (max(1, round(side * scale)) for side in image.size)
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(image, np.float32) / np.float32(255)


def _on_paper(image: Image.Image) -> Image.Image:
    """A grey picture with transparent pixels, on white paper; on black where its ink is light."""
    grey, opacity = (np.asarray(band, np.float32) for band in image.split())
    light = opacity.any() and float(np.average(grey, weights=opacity)) > 127
    paper = Image.new("L", image.size, 0 if light else 255)
    paper.paste(image.getchannel("L"), mask=image.getchannel("A"))
    return paper


def find(picture: Grey) -> Seen:
    """Find the letter in a picture and bring it to EMNIST's form."""
    ink = _ink(picture)
    kept = _parts(ink > 0.5)
    rows, columns = (np.flatnonzero(kept.any(axis=axis)) for axis in (1, 0))
    box = int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1
    return Seen(picture, box, nist.letter(_canvas(ink, kept)))


def _ink(picture: Grey) -> Grey:
    """How much of each pixel is ink: 0 paper to 1 ink, whatever the light and the colours."""
    smooth = ndimage.gaussian_filter(picture, max(picture.shape) / 600)
    height, width = smooth.shape
    flat = smooth - ndimage.gaussian_filter(smooth, max(height, width) / 6)
    for _ in range(N_FITS):
        paper = _paper(flat)
        flat = smooth - _light(smooth, paper)
    paper = _paper(flat)
    level = np.median(flat[paper])
    depth = flat - level
    if paper.all() or not paper.any():
        raise _nothing()
    contrast = np.percentile(np.abs(depth[~paper]), 75)
    noise = 1.4826 * np.median(np.abs(depth[paper]))
    if contrast < max(MIN_CONTRAST, MIN_SEPARATION * noise):
        raise _nothing()
    sign = np.sign(np.median(depth[~paper]))
    ink: Grey = np.clip(sign * depth / contrast, 0, 1).astype(np.float32)
    return ink


def _nothing() -> UserError:
    return UserError(
        "image must show a letter that stands out from its paper, but none was found: "
        "pass a picture of one letter, dark on light or light on dark"
    )


def _paper(flat: Grey) -> Mask:
    """Which pixels are paper: those on the side of the threshold where most pixels lie."""
    middle = np.median(flat)
    far = np.abs(flat - middle)
    threshold = _otsu(flat)
    noise = 1.4826 * np.median(far)
    if abs(threshold - middle) < 3 * noise and (outside := flat[far > MIN_SEPARATION * noise]).size:
        # So little ink that Otsu's threshold parts the paper's noise.
        threshold = (middle + np.median(outside)) / 2
    light = flat > threshold
    edge = np.concatenate([light[0], light[-1], light[:, 0], light[:, -1]])
    # A letter cut to its ink has half of the edge, a bold one half of the picture, none has both.
    paper: Mask = light if 2 * light.mean() + edge.mean() > 1.5 else ~light
    return paper


def _otsu(values: Grey) -> float:
    """The threshold between two classes whose means lie farthest apart (Otsu 1979)."""
    counts, edges = np.histogram(values, 256)
    below = np.cumsum(counts)  # pixels up to each bin
    sums = np.cumsum(counts * (edges[:-1] + edges[1:]) / 2)
    above = np.maximum(below[-1] - below, 1)
    between = below * above * (sums / np.maximum(below, 1) - (sums[-1] - sums) / above) ** 2
    best = np.flatnonzero(between[:-1] >= between[:-1].max() * (1 - 1e-9))
    return float(edges[best + 1].mean())  # the middle of a gap


def _light(picture: Grey, paper: Mask) -> Grey:
    """The light on the paper: a surface of second order through the pixels that are paper."""
    y, x = np.meshgrid(*(np.linspace(-1, 1, n) for n in picture.shape), indexing="ij")
    terms = np.stack([np.ones_like(x), x, y, x * x, x * y, y * y], axis=-1)  # (h, w, 6)
    step = max(1, int(paper.sum()) // 20_000)
    surface = np.linalg.lstsq(terms[paper][::step], picture[paper][::step], rcond=None)[0]
    light: Grey = (terms @ surface).astype(np.float32)
    return light


def _parts(ink: Mask) -> Mask:
    """The parts of the letter: all that is connected, but for specks and what the edge cuts off."""
    labels, n = ndimage.label(ink, np.ones((3, 3)))
    if not n:
        raise _nothing()
    areas = np.bincount(labels.ravel())
    areas[0] = 0
    edge = np.unique(np.concatenate([labels[0], labels[-1], labels[:, 0], labels[:, -1]]))
    inside = areas.copy()
    inside[edge] = 0
    if inside.max() >= areas.max() / 4:  # else it is the letter itself that reaches the edge
        areas = inside
    kept: Mask = (areas >= MIN_PART * areas.max())[labels] & ink
    return kept


def _canvas(ink: Grey, kept: Mask) -> Image.Image:
    """The letter in white on black, its longer side as long as NIST's recipe wants it."""
    away = ndimage.distance_transform_edt(~kept)  # px, from the letter
    soft = np.where(away < 2, ink, 0)  # pixels at its edge are grey, and say how far it reaches
    inside = ndimage.distance_transform_edt(kept)[kept]  # px, from the paper
    pen = max(4 * inside.mean() - 2, 1)  # of a straight stroke that is its width
    longer = max(np.ptp(np.flatnonzero(kept.any(axis=axis))) + 1 for axis in (0, 1))
    if (missing := MIN_PEN * longer / nist.DRAWN - pen) > 0:
        soft = np.maximum(soft, np.clip(missing / 2 + 1 - away, 0, 1))
    rows, columns = (np.flatnonzero((soft > 0).any(axis=axis)) for axis in (1, 0))
    cut = soft[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    image = Image.fromarray((cut * 255).astype(np.uint8))
    scale = nist.DRAWN / max(image.size)
    width, height = (max(1, round(side * scale)) for side in image.size)
    canvas = Image.new("L", (nist.CANVAS, nist.CANVAS))
    corner = (nist.CANVAS - width) // 2, (nist.CANVAS - height) // 2
    canvas.paste(image.resize((width, height), Image.Resampling.BICUBIC), corner)
    return canvas
