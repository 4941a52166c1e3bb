"""The tuners that people would pick, each as its documentation shows it, on one objective.

Each runs until it is killed: ``benchmarks.peers`` watches its CPU-seconds. An evaluation is one fit
by the project's own train function; whoever asks for it gets the accuracy on ``val`` after each
step. What it found is a line in a file.
"""

import json
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from optuna.distributions import CategoricalDistribution, IntDistribution

from pipeline import models, registry
from pipeline.bill import METER
from pipeline.spec import LATE_LETTERS, TTA, Dataset, Param, Params, Part

EPOCHS = 10  # of a whole fit, as the deck has it
# What a user of these tuners would search: the deck's network, and how Adam trains it.
PLAIN = {
    "cnn": ("filters", "kernel_size", "dense_units", "dropout", "learning_rate", "batch_size"),
    "lstm": ("units", "bidirectional", "dense_units", "dropout", "learning_rate", "batch_size"),
    "knn": ("n_neighbors", "weights", "deskew", "blur", "n_components"),
}
# What our sweep never searches, for how it works and not for what is known of letters: it compares
# fits by schedules that complete, which leave nothing to average (and the average over a short
# fit's few batches is still of its first weights); neighbours are counted and weighed for nothing;
# how far a fit must shorten itself is its grant's to say.
METHOD = ("schedule", "average", "n_neighbors", "weights", LATE_LETTERS)
Report = Callable[[int, float], bool]
# The project's sweep, and what it is without one of its parts.
OURS = ("ours", "without_screen", "without_bfloat16", "without_phases")


class Objective:
    """One evaluation: a fit, its accuracy on val, and lines in ``found.jsonl``."""

    def __init__(self, model: str, root: str, seed: int, whole: bool, policy: str, folder: str):
        """``whole``: each tuner with its own recipe; else all with the project's space."""
        self.member = registry.load(models, model)
        self.data = Dataset.open(Path(root))
        self.seed, self.folder = seed, Path(folder)
        self.made_of = (model, root, seed, whole, policy, folder)
        space: Mapping[str, Param] = self.member.PARAMS
        self.fixed = {name: param.default for name, param in space.items()}
        given = ("epochs", LATE_LETTERS, "n_letters", TTA, "dtype_policy")
        searched = [name for name in space if name not in given]
        if whole:
            searched = [name for name in searched if name in PLAIN[model]]
        elif "dtype_policy" in space:
            self.fixed["dtype_policy"] = policy
        self.space = {name: space[name].distribution for name in searched}
        self.has_epochs = "epochs" in space
        self.uncounted = 0.0  # CPU-seconds so far that are not the tuner's
        self.predict: Callable[[Any], Any] = lambda images: None
        if self.has_epochs:
            self._remember()

    def _remember(self) -> None:
        """Have the network at hand that the training loop looks at ``val`` with, at each report."""
        from pipeline.models import _keras

        answers = _keras._answers

        def remembering(net: Any) -> Any:
            self.predict = answers(net)
            return self.predict

        _keras._answers = remembering

    def __call__(
        self,
        params: Params,
        epochs: int = EPOCHS,
        report: Report = lambda step, value: False,
        paid: int = 0,
    ) -> float:
        """The last accuracy on val; ``report`` may stop the fit after any step.

        The first ``paid`` epochs are those of an earlier fit of the same: they are done once more,
        but not counted, as if this one went on from a checkpoint.
        """
        params = self.fixed | dict(params)
        if self.has_epochs:
            params["epochs"] = epochs
        values: list[float] = []
        uncounted = self.uncounted

        def note(step: int, value: float) -> bool:
            values.append(value)
            if step <= paid:
                again = METER.seconds()["fit"] - before - (self.uncounted - uncounted)
                self._write(uncounted=again)
            elif self.has_epochs:
                # Each step counts, as if all tuners kept what a fit has learned so far.
                self._note(value)
            return report(step, value)

        before = METER.seconds().get("fit", 0.0)
        with METER.charge("fit"):
            train, val = self.data.part("train"), self.data.part("val")
            fitted = self.member.fit(params, train, val, self.seed, note)
        fit = METER.seconds()["fit"] - before - (self.uncounted - uncounted)
        if not self.has_epochs:
            self.predict = fitted.predict
            self._note(values[-1])
        self._write(fit=fit, val=values[-1], params=params)
        return values[-1]

    def _note(self, value: float) -> None:
        """Write down a new best, with its accuracy on test.

        The look at test is the benchmark's: the watchdog does not count it.
        """
        began = time.process_time()
        path = self.folder / "found.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        if value > max((json.loads(line)["val"] for line in lines), default=0.0):
            test = self.data.part("test")
            test_accuracy = accuracy(self.predict(test.images), test)
            self._write(val=value, test=test_accuracy, uncounted=time.process_time() - began)

    def _write(self, **line: Any) -> None:
        self.uncounted += line.get("uncounted", 0.0)
        _write(self.folder, **line)


def _write(folder: Path, **line: Any) -> None:
    """A line for the watchdog, who dates it."""
    with (folder / "found.jsonl").open("a") as file:
        file.write(
            json.dumps({"fit": 0.0, "val": 0.0, "test": None, "uncounted": 0.0} | line) + "\n"
        )


def accuracy(probabilities: Any, part: Part) -> float:
    """Share of a part's letters that are guessed."""
    return float(np.mean(probabilities.argmax(axis=1) == part.labels))


def drawn(space: Mapping[str, Any], rng: np.random.Generator) -> Params:
    """Hyperparameters at random, each by its distribution."""
    sampler = optuna.samplers.RandomSampler(seed=int(rng.integers(2**31)))
    study = optuna.create_study(sampler=sampler)
    return study.ask(fixed_distributions=dict(space)).params


def deck(objective: Objective, seed: int) -> None:
    """The deck's model, as it is, once."""
    objective({})


def random(objective: Objective, seed: int) -> None:
    """Whole fits of random hyperparameters."""
    rng = np.random.default_rng(seed)
    while True:
        objective(drawn(objective.space, rng))


def random_top(objective: Objective, seed: int, budget: float) -> None:
    """Random ones for a step each, for half of the budget; then the best of them in full."""
    rng, screened = np.random.default_rng(seed), []
    while time.process_time() - objective.uncounted < budget / 2:
        params = drawn(objective.space, rng)
        screened.append((objective(params, 1, lambda step, value: True), len(screened), params))
    for _, _, params in sorted(screened, key=lambda one: -one[0]):
        objective(params)


def optuna_median(objective: Objective, seed: int) -> None:
    """``study.optimize`` with TPE and the median pruner."""
    study = optuna.create_study(
        direction="maximize",
        sampler=optuna.samplers.TPESampler(seed=seed),
        pruner=optuna.pruners.MedianPruner(),
    )

    def evaluate(trial: optuna.Trial) -> float:
        params = {name: trial._suggest(name, space) for name, space in objective.space.items()}

        def report(step: int, value: float) -> bool:
            trial.report(value, step)
            return trial.should_prune()

        value = objective(params, report=report)
        if trial.should_prune():
            raise optuna.TrialPruned
        return value

    study.optimize(evaluate)


def keras_hyperband(objective: Objective, seed: int) -> None:
    """KerasTuner's Hyperband.

    A round of more epochs goes on from the one before, as with KerasTuner's checkpoints, where the
    learning rate is constant; where it has a schedule, a longer fit is another one.
    """
    import keras_tuner

    class Tuner(keras_tuner.Hyperband):  # type: ignore[misc]
        def run_trial(self, trial: Any, *given: Any, **named: Any) -> float:
            chosen = trial.hyperparameters
            params = {name: chosen.get(name) for name in objective.space}
            epochs = max(1, int(chosen.values.get("tuner/epochs", EPOCHS)))
            again = "schedule" in objective.space
            paid = 0 if again else int(chosen.values.get("tuner/initial_epoch", 0))
            return objective(params, epochs, paid=paid)

        def load_model(self, trial: Any) -> None:
            return None

    hyperparameters = keras_tuner.HyperParameters()
    for name, space in objective.space.items():
        if isinstance(space, CategoricalDistribution):
            hyperparameters.Choice(name, list(space.choices))
        elif isinstance(space, IntDistribution):
            hyperparameters.Int(name, space.low, space.high, step=space.step)
        else:
            sampling = "log" if space.log else "linear"
            hyperparameters.Float(name, space.low, space.high, sampling=sampling)
    tuner = Tuner(
        hypermodel=lambda hp: None,
        hyperparameters=hyperparameters,
        tune_new_entries=False,
        objective=keras_tuner.Objective("default_objective", "max"),
        max_epochs=EPOCHS,
        hyperband_iterations=1000,
        seed=seed,
        directory=str(objective.folder / "keras_tuner"),
    )
    tuner.search()


def ray_asha(objective: Objective, seed: int) -> None:
    """Ray Tune: Optuna's search under ASHA, one trial at a time on one core."""
    import ray
    from ray import tune
    from ray.tune.schedulers import ASHAScheduler
    from ray.tune.search import ConcurrencyLimiter
    from ray.tune.search.optuna import OptunaSearch

    given = objective.made_of  # an Objective itself cannot be sent to another process
    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False)

    def evaluate(config: Params) -> None:
        mine = Objective(*given)

        def report(step: int, value: float) -> bool:
            tune.report({"value": value})
            return False

        mine(config, report=report)

    searcher = OptunaSearch(
        dict(objective.space),
        metric="value",
        mode="max",
        seed=seed,
    )
    tune.Tuner(
        tune.with_resources(evaluate, {"cpu": 1}),
        tune_config=tune.TuneConfig(
            metric="value",
            mode="max",
            search_alg=ConcurrencyLimiter(searcher, max_concurrent=1),
            scheduler=ASHAScheduler(max_t=EPOCHS, grace_period=1),
            num_samples=100_000,
        ),
        run_config=tune.RunConfig(storage_path=str(objective.folder.absolute() / "ray"), verbose=0),
    ).fit()


def flaml_blend(objective: Objective, seed: int) -> None:
    """FLAML's BlendSearch from a cheap start, each evaluation a whole fit."""
    from flaml import BlendSearch, tune

    config: dict[str, Any] = {}
    for name, space in objective.space.items():
        if isinstance(space, CategoricalDistribution):
            config[name] = tune.choice(list(space.choices))
        elif space.step:
            config[name] = tune.randint(0, _place(space, space.high) + 1)
        else:
            draw = tune.loguniform if space.log else tune.uniform
            config[name] = draw(space.low, space.high)
    cheap = {
        name: 0
        for name, space in objective.space.items()
        if isinstance(space, IntDistribution) and name in ("filters", "units", "dense_units")
    }

    def evaluate(config: Params) -> dict[str, float]:
        params = {name: _value(objective.space[name], place) for name, place in config.items()}
        return {"value": objective(params)}

    budget = {"num_samples": -1, "time_budget_s": 10**6}
    searcher = BlendSearch(
        metric="value",
        mode="max",
        space=config,
        low_cost_partial_config=cheap,
        seed=20 + seed,  # 20 is its default
        **budget,
    )
    tune.run(evaluate, search_alg=searcher, use_ray=False, verbose=0, **budget)


def _place(space: Any, value: Any) -> Any:
    """Where the values of a space have steps, which of them this is: FLAML's steps begin at 0."""
    return round((value - space.low) / space.step) if getattr(space, "step", None) else value


def _value(space: Any, place: Any) -> Any:
    """The value at a place, as ``_place`` has it; FLAML's numbers are NumPy's, a fit's Python's."""
    value = space.low + place * space.step if getattr(space, "step", None) else place
    return value.item() if isinstance(value, np.generic) else value


def ours(part: str, model: str, root: Path, seed: int, budget: float, whole: bool) -> None:
    """The project's sweep, ``part`` of which may be left out: one of ``OURS``.

    Where all tuners are to have the same space it has no priors, and nothing fixed but ``METHOD``.
    """
    from pipeline import prep
    from sweeps import phases, search, sweep
    from sweeps.trial import Referee

    hear = Referee.__call__

    def noting(referee: Referee, message: Mapping[str, Any], overdraft: float) -> bool:
        # Each step counts, as of the others; but what is chosen is said in the end.
        _write(Path.cwd(), val=message["val_accuracy"])
        return hear(referee, message, overdraft)

    Referee.__call__ = noting  # type: ignore[method-assign]
    member: Any = registry.load(models, model)
    if not whole:
        fixed = {name: member.FIXED[name] for name in METHOD if name in member.FIXED}
        member.PRIORS, member.FIXED, member.LATE = [], fixed, ()
    if part == "without_screen" and hasattr(member, "STEPS"):  # the first prior, at once
        screened = search.screened
        search.screened = lambda member, place: screened(member, place + 1)
        phases.SCREEN_SHARE = 1e-9
    elif part in ("without_screen", "without_phases"):  # whole fits
        member.FIXED = member.FIXED | {"n_letters": 0}
        del member.SCREEN
    if part == "without_phases":  # TPE and median pruning
        member.LATE = ()
        if hasattr(member, "STEPS"):
            member.FIXED["epochs"] = EPOCHS
            del member.STEPS
        search.Halving = optuna.pruners.MedianPruner  # type: ignore[assignment,misc]
    prep.ensure = lambda **options: Dataset.open(root)
    options = {
        "dataset": "strokes",  # not read: the letters are there
        "archive": "default",
        "n_train": "40000",
        "data_dir": "data",
        "model": model,
        "seed": seed,
        "precision": "float32" if part == "without_bfloat16" else "auto",
        "cpu_minutes": budget / 60,
        "workers": 1,
        "scheduler": "local",
        "study": "auto",
        "plan": "false",
    }
    sweep.main([word for name, value in options.items() for word in (f"--{name}", str(value))])


def told(root: str) -> None:
    """Print, as JSON, what our sweep's trials have found, and what its model does on test."""
    import mlflow
    import pandas as pd

    (sweep,) = mlflow.search_runs(
        experiment_ids=["0"], filter_string="tags.step = 'sweep'", output_format="list"
    )
    path = mlflow.artifacts.download_artifacts(run_id=sweep.info.run_id, artifact_path="trials.csv")
    best = mlflow.get_run(sweep.data.tags["best_run_id"])
    test = Dataset.open(Path(root)).part("test")
    model = mlflow.pyfunc.load_model(best.data.tags["model_uri"])
    test_accuracy = accuracy(np.asarray(model.predict(np.asarray(test.images))), test)
    trials = [
        {
            "val": trial.val_accuracy,
            "test": test_accuracy if trial.run_id == best.info.run_id else None,
            "fit": trial.fit_cpu_seconds,
            "cpu": trial.spent_cpu_seconds,
            "chosen": trial.run_id == best.info.run_id,
        }
        for trial in pd.read_csv(path).fillna({"val_accuracy": 0.0}).itertuples()
    ]
    print(json.dumps(trials))


ARMS: dict[str, Callable[..., None]] = {
    "deck": deck,
    "random": random,
    "random_top": random_top,
    "optuna_median": optuna_median,
    "keras_hyperband": keras_hyperband,
    "ray_asha": ray_asha,
    "flaml_blend": flaml_blend,
}


def run(
    arm: str, model: str, root: str, seed: int, budget: float, whole: bool, policy: str
) -> None:
    """One arm in this process, until it ends or is killed."""
    METER.loaded()
    if arm in OURS:
        ours(arm, model, Path(root), seed, budget, whole)
        return
    objective = Objective(model, root, seed, whole, policy, os.getcwd())
    more = {"budget": budget} if arm == "random_top" else {}
    ARMS[arm](objective, seed, **more)
