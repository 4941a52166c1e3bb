"""The last steps of NIST's recipe (Cohen et al. 2017), for drawn letters and for photographed ones.

A letter of white ink lies on a black canvas of 128x128. It is blurred, cropped to its ink, centred
in a square frame with an empty edge of 2 pixels, and shrunk to 28x28 by bicubic interpolation.
"""

import numpy as np
from PIL import Image, ImageFilter

from pipeline.spec import SIDE, Images

CANVAS, BLUR = 128, 1.0  # px, what a letter lies on, and the sigma of its blur
DRAWN, BOX = 96, 24  # px, a letter's longer side on the canvas, and in the end


def letter(canvas: Image.Image) -> Images:
    """A picture of mode L, (128, 128) with some ink, in EMNIST's form: (28, 28)."""
    canvas = canvas.filter(ImageFilter.GaussianBlur(BLUR))
    ink = canvas.getbbox()
    assert ink, "a pen leaves ink"
    left, top, right, bottom = ink
    side = max(right - left, bottom - top)
    left, top = (left + right - side) // 2, (top + bottom - side) // 2
    square = canvas.crop((left, top, left + side, top + side))
    small = np.asarray(square.resize((BOX, BOX), Image.Resampling.BICUBIC))
    return np.pad(small, (SIDE - BOX) // 2)
