"""Letters as another hand might have written them: one random affine map each. TensorFlow."""

import math
from typing import Any

import tensorflow as tf

ROTATION, SHEAR, SCALE = math.radians(15), 0.2, 0.15  # at most, at strength 1
SHIFT = 2.0  # pixels


def distort(letters: Any, strength: float, key: Any) -> Any:
    """Letters (n, 28, 28) uint8, each turned, sheared, scaled and shifted at random.

    One composed resampling a batch: the effects one after the other cost many times as much. The
    same ``key`` (2,) gives the same letters again.
    """
    n, middle = tf.shape(letters)[0], (letters.shape[1] - 1) / 2
    draw = tf.random.stateless_uniform((6, n), key, -strength, strength)
    angle, shear = ROTATION * draw[0], SHEAR * draw[1]
    wide, high = tf.exp(SCALE * draw[2]), tf.exp(SCALE * draw[3])
    cos, sin = tf.cos(angle), tf.sin(angle)
    a, b = wide * cos, wide * (shear * cos - sin)
    c, d = high * sin, high * (shear * sin + cos)
    x = middle - a * middle - b * middle + SHIFT * draw[4]
    y = middle - c * middle - d * middle + SHIFT * draw[5]
    zero = tf.zeros_like(x)
    resampled = tf.raw_ops.ImageProjectiveTransformV3(
        images=letters[..., None],
        transforms=tf.stack([a, b, x, c, d, y, zero, zero], axis=1),
        output_shape=letters.shape[1:],
        fill_value=0.0,
        interpolation="BILINEAR",
        fill_mode="CONSTANT",
    )
    return resampled[..., 0]
