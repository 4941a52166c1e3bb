"""In what precision networks are trained here: bfloat16 where the processor pays for it.

In Keras's ``mixed_bfloat16`` the weights and their updates stay in float32, products are bfloat16.
"""

import platform
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from pipeline import quiet
from pipeline.bill import charge
from pipeline.spec import Param, Params, UserError

AUTO = "auto"
POLICIES = {"float32": "float32", "bfloat16": "mixed_bfloat16"}  # precision: dtype policy of Keras
HYPERPARAMETER = "dtype_policy"  # of a model whose fits know more than one precision
FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}  # of x86-64 and of ARM, as /proc/cpuinfo has them
LEAST_GAIN = 1.1  # below, the rounding is not worth it
BATCH, SIDE, FILTERS, ROUNDS = 64, 14, 64, 4  # of the probe's convolution


def option(name: str, value: str) -> str:
    """The option ``precision`` of a command line: auto, float32 or bfloat16."""
    if value not in (AUTO, *POLICIES):
        raise UserError(
            f"{name} must be auto, float32 or bfloat16, but {value!r} came: pass -P {name}=auto"
        )
    return value


def check(wanted: str, model: str, space: Mapping[str, Param]) -> None:
    """Refuse bfloat16 for a model that knows float32 only."""
    if wanted == "bfloat16" and HYPERPARAMETER not in space:
        raise UserError(
            f"precision must be auto or float32 for {model}, which has no {HYPERPARAMETER}, "
            f"but 'bfloat16' came: leave it out"
        )


def params(chosen: str, space: Mapping[str, Param]) -> Params:
    """What a chosen precision means for a model's hyperparameters."""
    return {HYPERPARAMETER: POLICIES[chosen]} if HYPERPARAMETER in space else {}


def of(params: Params) -> str:
    """The precision that hyperparameters mean."""
    policy = params.get(HYPERPARAMETER, POLICIES["float32"])
    return next(name for name, value in POLICIES.items() if value == policy)


def resolve(
    wanted: str, space: Mapping[str, Param], measure: Callable[[], float] | None = None
) -> str:
    """The precision for fits; ``auto`` is tried where it makes a difference.

    ``measure`` gives what bfloat16 gains, which ``gain`` finds in this process.
    """
    if wanted != AUTO:
        return wanted
    return chosen((measure or gain)()) if HYPERPARAMETER in space and supported() else "float32"


def supported() -> bool:
    """Whether the processor has instructions for bfloat16."""
    if platform.system() != "Linux":
        return False
    return not FLAGS.isdisjoint(Path("/proc/cpuinfo").read_text().split())


def gain() -> float:
    """How many times cheaper a convolution is in bfloat16 than in float32, by CPU-seconds.

    Takes 0.1 CPU-seconds beside the import of TensorFlow, and runs operations in this process.
    """
    with charge("import"):
        quiet.import_keras()  # which sets threads, and must come first
        import tensorflow as tf

    seconds = {}
    for dtype in (tf.float32, tf.bfloat16):
        letters = tf.ones((BATCH, SIDE, SIDE, FILTERS), dtype)
        kernel = tf.ones((3, 3, FILTERS, FILTERS), dtype)
        tf.nn.conv2d(letters, kernel, 1, "SAME")  # the first call sets up
        began = time.process_time()
        for _ in range(ROUNDS):
            tf.nn.conv2d(letters, kernel, 1, "SAME")
        seconds[dtype] = time.process_time() - began
    return seconds[tf.float32] / max(seconds[tf.bfloat16], 1e-6)


def chosen(gain: float) -> str:
    """The precision that a probe's ``gain`` speaks for."""
    return "bfloat16" if gain >= LEAST_GAIN else "float32"
