"""Models side by side, as a comparison has them, made of numbers alone."""

import hashlib
from collections.abc import Sequence

import numpy as np
import pandas as pd

from pipeline.findings import Entry
from pipeline.spec import LETTERS

N_EACH = 20  # test letters of each kind


def predictions(truth: str, guesses: str, confidence: float = 0.9) -> pd.DataFrame:
    """A row for each letter of ``truth``."""
    return pd.DataFrame(
        {"letter": list(truth), "guess": list(guesses), "confidence": [confidence] * len(truth)}
    )


def trials(values: Sequence[float | None], seconds: float = 10.0) -> pd.DataFrame:
    """A sweep's trials, each of ``seconds`` CPU-seconds; None is one that failed."""
    n = len(values)
    return pd.DataFrame(
        {
            "number": range(n),
            "val_accuracy": [np.nan if value is None else value for value in values],
            "model_uri": [np.nan if value is None else f"models:/m-{value}" for value in values],
            "spent_cpu_seconds": seconds * np.arange(1, n + 1),
        }
    )


def entry(
    label: str,
    accuracy: float = 0.9,
    step: str = "sweep",
    guesses: pd.DataFrame | None = None,
    budget: float | None = 120.0,
    importance: dict[str, float] | None = None,
    **tags: str,
) -> Entry:
    """A model whose guesses are right for ``accuracy`` of the letters, else taken for the next."""
    if guesses is None:
        letters = np.repeat(np.arange(26), N_EACH)
        rng = np.random.default_rng(int(hashlib.sha256(label.encode()).hexdigest()[:8], 16))
        wrong = rng.random(len(letters)) > accuracy
        names = np.array(list(LETTERS))
        guesses = predictions(
            "".join(names[letters]), "".join(names[(letters + wrong) % 26]), confidence=0.8
        )
    right = float((guesses["letter"] == guesses["guess"]).mean())
    metrics = {
        "val_accuracy": right,
        "cpu_seconds": 110.0,
        "fit_cpu_seconds": 100.0,
        "overhead_cpu_seconds": 10.0,
        "overhead/tracing_cpu_seconds": 8.0,
        "overhead/engine_cpu_seconds": 2.0,
        "predict_us_per_letter": 300.0 + len(label),
        "predict_us_one_letter": 40_000.0,
        "model_mb": 1.5 * len(label),
    }
    for name in ("accuracy", "mean_recall", "mean_precision"):
        metrics |= {f"test_{name}": right}
        metrics |= {f"test_{name}_low": right - 0.02, f"test_{name}_high": right + 0.02}
    is_sweep = step == "sweep"
    if is_sweep:
        metrics |= {"n_trials": 4.0, "confirmed_val_accuracy": right, "n_seeds": 3.0}
        metrics |= {"confirmed_val_accuracy_std": 0.0012}
    if is_sweep and budget is not None:
        metrics |= {"budget_cpu_seconds": budget}
    known = {"cpu_model": "a processor", "git_commit": "0123456789abcdef", "precision": "float32"}
    return Entry(
        label=label,
        model=label.split()[0].lower(),
        step=step,
        run_id=f"run{label.lower()}".replace(" ", ""),
        model_uri=f"models:/m-{label.lower()}",
        metrics=metrics,
        tags=known | tags,
        predictions=guesses,
        trials=trials([0.5, None, 0.7, right]) if is_sweep else None,
        importance={"units": 0.7, "rate": 0.3}
        if importance is None and is_sweep
        else importance or {},
    )
