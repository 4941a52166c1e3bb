"""Pictures of letters, as people make them, and what is made of them."""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage

from pipeline import nist, scan
from pipeline.spec import UserError

Grey = npt.NDArray[np.float64]


def drawn(text: str = "F", size: int = 300, side: int = 480) -> Grey:
    """Ink (side, side) from 0 to 1: a printed letter. No turn and no mirror leaves an F alone."""
    image = Image.new("L", (side, side))
    font = ImageFont.load_default(size)
    ImageDraw.Draw(image).text((side / 2, side / 2), text, 255, font, anchor="mm")
    return np.asarray(image) / 255


def page(ink: Grey) -> Image.Image:
    """Dark ink on white paper."""
    return Image.fromarray(np.uint8(np.clip(1 - ink, 0, 1) * 255))


def seen(image: Image.Image, path: Path, **options: Any) -> npt.NDArray[np.float64]:
    """What is made of an image that was saved as ``path``; (28, 28)."""
    image.save(path, **options)
    letter = scan.find(scan.read(path)).letter
    assert letter.shape == (28, 28)
    assert letter.dtype == np.uint8
    return letter.astype(float)


def alike(one: Grey, other: Grey) -> bool:
    """Whether two letters differ in a few grey pixels at most: by 6 of 255 in the mean."""
    return bool(np.abs(one - other).mean() < 6)


@pytest.fixture
def plain(tmp_path: Path) -> Grey:
    """What is made of a clean F."""
    return seen(page(drawn()), tmp_path / "plain.png")


def test_a_letter_has_emnists_form(plain: Grey) -> None:
    # Law: ink is high on 0, the longer side fills 24 pixels, the shorter one is centred.
    assert plain.max() > 200
    rows, columns = (np.flatnonzero((plain > 40).any(axis=axis)) for axis in (1, 0))
    assert (rows[0], rows[-1]) == (2, 25)
    assert abs((columns[0] + columns[-1]) / 2 - 13.5) <= 1
    # It is upright and not mirrored: an F's stem is left, its foot is empty on the right.
    assert plain[20:, :13].sum() > 10 * plain[20:, 17:].sum()


def test_a_letter_in_emnists_form_comes_back_nearly_as_it_was(plain: Grey, tmp_path: Path) -> None:
    again = seen(Image.fromarray(plain.astype(np.uint8)), tmp_path / "small.png")
    assert np.abs(again - plain).mean() < 12
    assert np.corrcoef(again.ravel(), plain.ravel())[0, 1] > 0.96


@pytest.mark.parametrize("side", [80, 200, 2500])
def test_any_size(side: int, plain: Grey, tmp_path: Path) -> None:
    image = page(drawn()).resize((side, side), Image.Resampling.BICUBIC)
    assert alike(seen(image, tmp_path / "image.png"), plain)


def test_anywhere_on_the_page_and_cut_to_its_ink(plain: Grey, tmp_path: Path) -> None:
    corner = np.pad(drawn(), ((0, 300), (500, 20)))
    assert alike(seen(page(corner), tmp_path / "corner.png"), plain)
    cut = Image.fromarray(255 - np.asarray(page(drawn()))).getbbox()
    assert alike(seen(page(drawn()).crop(cut), tmp_path / "cut.png"), plain)


def test_light_on_dark(plain: Grey, tmp_path: Path) -> None:
    assert alike(seen(page(1 - drawn()), tmp_path / "chalk.png"), plain)


@pytest.mark.parametrize("mode", ["1", "P", "RGB", "CMYK", "I;16", "F"])
def test_any_mode(mode: str, plain: Grey, tmp_path: Path) -> None:
    if mode in ("I;16", "F"):
        deep = 9_000 + 40_000 * (1 - drawn())
        image = Image.fromarray(deep.astype(np.uint16 if mode == "I;16" else np.float32))
    else:
        image = page(drawn()).convert(mode)
    assert alike(seen(image, tmp_path / "image.tiff"), plain)


@pytest.mark.parametrize("grey", [0, 255])
def test_ink_on_transparent_paper(grey: int, plain: Grey, tmp_path: Path) -> None:
    ink = np.uint8(drawn() * 255)
    image = Image.merge("LA", (Image.fromarray(np.full_like(ink, grey)), Image.fromarray(ink)))
    assert alike(seen(image.convert("RGBA"), tmp_path / "image.png"), plain)


def test_a_photo_that_a_camera_turned(plain: Grey, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[274] = 6  # turn it clockwise to see it upright
    turned = page(drawn()).transpose(Image.Transpose.ROTATE_90)
    assert alike(seen(turned, tmp_path / "photo.jpg", exif=exif, quality=90), plain)


def photo(ink: Grey, rng: np.random.Generator) -> Image.Image:
    """Dark ink on grained paper, under a lamp that leaves a third of its light to a corner."""
    y, x = np.mgrid[-1 : 1 : ink.shape[0] * 1j, -1 : 1 : ink.shape[1] * 1j]
    lamp = 0.65 + 0.25 * x - 0.1 * y
    grain = ndimage.gaussian_filter(rng.normal(size=ink.shape), 2) * 0.1
    grey = lamp * (0.92 - 0.65 * ink + grain) + rng.normal(0, 0.03, ink.shape)
    return Image.fromarray(np.uint8(np.clip(grey, 0, 1) * 255))


def test_a_photo_under_a_lamp(plain: Grey, tmp_path: Path) -> None:
    image = photo(drawn(), np.random.default_rng(0))
    assert alike(seen(image, tmp_path / "photo.jpg", quality=60), plain)


def test_specks_are_dropped_and_the_dot_of_an_i_is_kept(tmp_path: Path) -> None:
    clean = drawn("i")
    specked, rng = clean.copy(), np.random.default_rng(0)
    for y, x in rng.integers(0, 470, (40, 2)):
        specked[y : y + 4, x : x + 4] = 1
    expected = seen(page(clean), tmp_path / "clean.png")
    assert alike(seen(page(specked), tmp_path / "specked.png"), expected)
    # The dot, the gap below it, the stem.
    inked = expected.max(axis=1) > 60
    assert np.flatnonzero(np.diff(inked.astype(int))).size == 4


def test_a_thin_pen_is_widened(tmp_path: Path) -> None:
    image = Image.new("L", (600, 600), 255)
    ImageDraw.Draw(image).line([(100, 100), (100, 500), (400, 500)], 0, 3)
    letter = seen(image, tmp_path / "thin.png")
    # Law: a stroke is about as wide as EMNIST's: 2 pixels of 28, and as dark.
    assert letter.max() > 150
    assert 1.2 < letter[10].sum() / 255 < 3.5


@pytest.mark.parametrize("paper", ["white", "black", "grained"])
def test_a_picture_without_a_letter(paper: str, tmp_path: Path) -> None:
    nothing = np.zeros((300, 400))
    image = photo(nothing, np.random.default_rng(1)) if paper == "grained" else page(nothing)
    if paper == "black":
        image = page(nothing + 1)
    with pytest.raises(UserError, match=r"^image must show a letter that stands out"):
        seen(image, tmp_path / "nothing.png")


def test_files_that_are_no_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "image.png"
    with pytest.raises(UserError, match=r"image must name a file, but .*image\.png' is not there"):
        scan.read(path)
    path.write_text("a letter, but written")
    with pytest.raises(UserError, match="image must be a picture, but .* is none"):
        scan.read(path)
    page(np.random.default_rng(0).random((90, 90))).save(path)
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(UserError, match=r"image must be a whole picture, but .*: copy it anew"):
        scan.read(path)
    with pytest.raises(UserError, match="image must be a whole picture, but .*irectory"):
        scan.read(tmp_path)
    page(np.zeros((4, 90))).save(path)
    with pytest.raises(UserError, match="at least 5 pixels wide and high, but .* is 90x4"):
        scan.read(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    for side in (12, 90):  # a warning of Pillow's, and an error
        page(np.zeros((side, side))).save(path)
        with pytest.raises(UserError, match="image must have at most 0 million pixels"):
            scan.read(path)


def test_the_drawn_letters_share_the_recipe() -> None:
    canvas = Image.new("L", (nist.CANVAS, nist.CANVAS))
    ImageDraw.Draw(canvas).rectangle((30, 16, 40, 111), 255)
    letter = nist.letter(canvas)
    # A bar of 11 by 96 px: in the middle, and as long as the frame allows.
    assert letter[2:26].max() > 200
    assert letter[:2].max() == letter[26:].max() == 0
    assert abs(np.average(np.arange(28), weights=letter.sum(axis=0)) - 13.5) < 1
