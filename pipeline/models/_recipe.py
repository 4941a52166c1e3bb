"""How the networks are trained: hyperparameters that they share. The defaults are the deck's."""

from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from pipeline.spec import LATE_LETTERS, N_LETTERS, TTA, Param, Params

PARAMS = {
    "learning_rate": Param(1e-3, FloatDistribution(5e-4, 4e-2, log=True)),  # of Adam, the highest
    "batch_size": Param(32, CategoricalDistribution((32, 64, 128, 256))),
    "epochs": Param(10, IntDistribution(1, 40)),
    # That an epoch sees, evenly taken from the training letters; 0 is all.
    N_LETTERS: Param(0, IntDistribution(0, 10_000_000)),
    # That each epoch of the second half sees of them, one after the other; 0 leaves it to the fit:
    # all, or as many as its grant pays for.
    LATE_LETTERS: Param(0, IntDistribution(0, 10_000_000)),
    # Cosine: up for a tenth of the fit, then down to 0 at its last batch.
    "schedule": Param("constant", CategoricalDistribution(("constant", "cosine"))),
    "weight_decay": Param(0.0, FloatDistribution(0.0, 0.2)),  # of AdamW; kernels only
    "label_smoothing": Param(0.0, FloatDistribution(0.0, 0.2)),
    "dropout": Param(0.0, FloatDistribution(0.0, 0.5)),  # before the output
    # Strength of random distortions; a fit of fewer than 10 epochs gets proportionally less.
    "augment": Param(0.0, FloatDistribution(0.0, 1.5)),
    "average": Param(0.0, CategoricalDistribution((0.0, 0.99, 0.998))),  # of weights; 0 is none
    # An answer is the mean of those to a letter and to copies that are shifted by a pixel each way.
    TTA: Param(1, CategoricalDistribution((1, 5))),
    "dtype_policy": Param("float32", CategoricalDistribution(("float32", "mixed_bfloat16"))),
}
STEPS = "epochs"
SCREEN: Params = {"epochs": 1, N_LETTERS: 10_000, TTA: 1}
# Small batches, many steps, learn the most in a short fit, but not in a long one.
LATE = ("batch_size", "weight_decay", "label_smoothing", "dropout", "augment")
FIXED: Params = {"schedule": "cosine", "average": 0.0, LATE_LETTERS: 0, TTA: 5}
PRIOR: Params = FIXED | {
    "learning_rate": 1e-2,
    "batch_size": 64,
    "epochs": 10,
    N_LETTERS: 0,
    "weight_decay": 0.05,
    "label_smoothing": 0.1,
    "dropout": 0.2,
    "augment": 1.0,
    "dtype_policy": "float32",
}
