"""What a logged model is loaded by: it stands between MLflow's scoring server and the model.

``tracking`` stores this very file in every logged model, so it imports nothing of ours. That server
casts a request to uint8 before a model sees it: 0.5 becomes 0 and "7" becomes 7 without a word. It
also repeats whole requests in its refusals, takes letters without end, and answers some requests
with 500. As it has no place for a model's own checks, they are put in front of its ``invocations``.
Anywhere but in that server nothing is changed: MLflow's signature guards ``predict`` there.
"""

import functools
import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from mlflow.models import Model

SIDE = 28  # pixels
MAX_LETTERS = 1_000  # of one request: about a second's work
MAX_BYTES = 8_000_000  # of one request; so many letters take 5.5 million at most, written tightly
INNER = "letters_loader"  # key of the loader that this one stands before, in the file MLmodel
EXAMPLE = '{"inputs": [LETTER, ...]}, each letter 28 rows of 28 pixels'


class Refused(Exception):
    """A request that the model cannot answer: an HTTP status and a sentence."""

    def __init__(self, status: int, sentence: str) -> None:
        super().__init__(sentence)
        self.status = status


def _load_pyfunc(path: str, model_config: dict[str, Any] | None = None) -> Any:
    """What MLflow calls to load a model; ``path`` is the model's folder or its ``data``."""
    root = next(one for one in (Path(path), Path(path).parent) if (one / "MLmodel").exists())
    inner = importlib.import_module(Model.load(str(root)).flavors["python_function"][INNER])
    model = inner._load_pyfunc(*((path, model_config) if model_config else (path,)))
    if "mlflow.pyfunc.scoring_server.app" in sys.modules:  # nothing else imports it
        _guard(sys.modules["mlflow.pyfunc.scoring_server"])
    return model


def _guard(server: Any) -> None:
    """Put the checks in front of a scoring server's answers."""
    answer: Callable[..., Any] = server.invocations

    @functools.wraps(answer)
    def invocations(data: bytes, content_type: str | None, *rest: Any) -> Any:
        try:
            check(data, content_type)
        except Refused as refused:
            error = {"error_code": "BAD_REQUEST", "message": str(refused)}
            text = json.dumps(error, ensure_ascii=False)
            return server.InvocationsResponse(text, refused.status, "application/json")
        return answer(data, content_type, *rest)

    server.invocations = invocations


def check(body: bytes, content_type: str | None) -> None:
    """Raise ``Refused`` unless the request holds letters, and no more of them than allowed."""
    if (content_type or "").partition(";")[0].strip().lower() != "application/json":
        came = repr(content_type[:80]) if content_type else "none"
        raise Refused(
            415,
            f"the content type must be application/json, but {came} came: "
            "send the header Content-Type: application/json",
        )
    if len(body) > MAX_BYTES:
        raise Refused(
            413,
            f"a request must be at most {MAX_BYTES / 1e6:.0f} MB, but {len(body) / 1e6:.1f} MB "
            f"came: send at most {MAX_LETTERS} letters at once",
        )
    try:
        request = json.loads(body)
    except (ValueError, RecursionError) as error:
        came = f"what came is not: {str(error).partition(';')[0]}" if body else "nothing came"
        raise Refused(400, f"a request must be JSON, but {came}: send {EXAMPLE}") from error
    keys = list(request) if isinstance(request, dict) else []
    if keys not in (["inputs"], ["instances"]):
        came = repr(keys)[:80] if isinstance(request, dict) else f"a {type(request).__name__}"
        raise Refused(400, f"a request must have the one key inputs, but {came} came: {EXAMPLE}")
    _check_letters(request[keys[0]])


def _check_letters(letters: Any) -> None:
    pixels = np.array(letters, dtype=object)  # as they are: no type is made another's
    if pixels.ndim == 0 or not len(pixels):
        raise Refused(400, f"a request must hold a letter at least, but none came: send {EXAMPLE}")
    if len(pixels) > MAX_LETTERS:
        raise Refused(
            413,
            f"a request must hold at most {MAX_LETTERS} letters, but {len(pixels)} came: "
            "send them in parts",
        )
    if pixels.shape[1:] != (SIDE, SIDE):
        raise Refused(
            400,
            f"letters must be (n, {SIDE}, {SIDE}), but {_shape(pixels)} came: send {EXAMPLE}",
        )
    for pixel in pixels.flat:
        if type(pixel) not in (int, float) or not 0 <= pixel <= 255 or pixel != int(pixel):
            raise Refused(
                400,
                "a pixel must be a whole number from 0 to 255, ink high, but "
                f"{json.dumps(pixel)[:40]} came: scale and round the letters",
            )


def _shape(pixels: Any) -> str:
    """The shape of what came; numpy sees lists where their lengths differ."""
    if pixels.ndim > 4:
        return f"lists {pixels.ndim} deep"
    ragged = any(isinstance(pixel, list) for pixel in pixels.flat)
    return f"{pixels.shape}{' lists of unequal lengths' if ragged else ''}"
