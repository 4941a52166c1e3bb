"""What a toy model answers; MLflow runs this file where the model is loaded."""

from typing import Any

import mlflow
import numpy as np
from mlflow.pyfunc import PythonModel


class Toy(PythonModel):
    # Without a type hint MLflow warns at every trial.
    def predict(self, context: Any, model_input: np.ndarray, params: Any = None) -> np.ndarray:
        """A guess for each letter, which has nothing to do with it but is always the same."""
        guesses = model_input.sum(axis=(1, 2), dtype=int) % 26
        return (np.eye(26, dtype=np.float32)[guesses] + 0.04) / (1 + 26 * 0.04)


mlflow.models.set_model(Toy())
