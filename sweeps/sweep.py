"""The step ``sweep``: tune one model until its budget of CPU-seconds is spent.

mlflow run . -e sweep -P model=lstm -P cpu_minutes=10
"""

from collections.abc import Sequence
from statistics import median

import optuna
import pandas as pd
from optuna.trial import TrialState
from tqdm import tqdm

from pipeline import cli, models, plots, prep, registry, tracking
from pipeline.spec import Dataset, UserError
from pipeline.train import OPTIONS as TRAIN_OPTIONS
from sweeps import search
from sweeps.budget import Budget
from sweeps.trial import Outcome, run_trial

OPTIONS: dict[str, cli.Convert] = TRAIN_OPTIONS | {"cpu_minutes": cli.positive}
MAX_FAILURES = 3  # a sweep whose first trials all fail has one cause


def search_model(
    run: tracking.Run, study: optuna.Study, model: str, data: Dataset, seed: int, budget: Budget
) -> list[Outcome]:
    """Ask, fit and tell until what is left cannot pay for another trial's first step."""
    space = registry.load(models, model).PARAMS
    distributions = {name: param.distribution for name, param in space.items()}
    outcomes: list[Outcome] = []
    # Silent where the output is no terminal: there the line of each trial is enough.
    bar = tqdm(total=round(budget.total), desc=model, unit="CPU-s", disable=None)
    with bar:
        while budget.left() > price(outcomes):
            trial = study.ask(fixed_distributions=distributions)
            outcome = run_trial(run, trial, model, data, seed, budget)
            tell(study, trial, outcome)
            outcomes.append(outcome)
            bar.n = min(round(outcome.spent_cpu_seconds), round(budget.total))
            bar.set_postfix_str(f"best {best(outcomes):.2%}")
            tqdm.write(line(model, outcome, budget))
            # Best and bill so far, by trial: the last values are the sweep's own.
            run.metrics(
                {"val_accuracy": best(outcomes), "cpu_seconds": outcome.spent_cpu_seconds},
                trial.number,
            )
            if len(outcomes) == MAX_FAILURES and all(o.state == "failed" for o in outcomes):
                break
    return outcomes


def price(outcomes: Sequence[Outcome]) -> float:
    """CPU-seconds that the next trial's first step will cost: as the past ones', at the median."""
    return median(outcome.first_step_cpu_seconds for outcome in outcomes) if outcomes else 0.0


def best(outcomes: Sequence[Outcome]) -> float:
    """Best validation accuracy so far; 0 before a trial has reported one."""
    return max((outcome.val_accuracy or 0.0 for outcome in outcomes), default=0.0)


def tell(study: optuna.Study, trial: optuna.Trial, outcome: Outcome) -> None:
    """Tell Optuna how a trial ended. A fit that its grant ended early has a value all the same."""
    if outcome.state == "failed":
        study.tell(trial, state=TrialState.FAIL)
    elif outcome.state == "pruned":
        study.tell(trial, state=TrialState.PRUNED)
    else:
        study.tell(trial, outcome.val_accuracy)


def line(model: str, outcome: Outcome, budget: Budget) -> str:
    """One trial in one line of the terminal."""
    value = f"{outcome.val_accuracy:.2%}" if outcome.val_accuracy is not None else outcome.error
    return (
        f"{model} {outcome.number:03}  {outcome.state:11} {value}  "
        f"{outcome.cpu_seconds:.1f} CPU-s, {outcome.spent_cpu_seconds:.0f} of {budget.total:.0f}"
    )


def finish(
    run: tracking.Run,
    study: optuna.Study,
    model: str,
    data: Dataset,
    outcomes: Sequence[Outcome],
    budget: Budget,
) -> Outcome:
    """Log what the sweep found; gives its best trial."""
    winner = max(
        (outcome for outcome in outcomes if outcome.val_accuracy is not None),
        key=lambda outcome: outcome.val_accuracy or 0.0,
        default=None,
    )
    if winner is None or winner.model_uri is None:
        raise _nothing(outcomes, budget)
    title = f"{model} on {data.title}"
    params = pd.DataFrame([study.trials[outcome.number].params for outcome in outcomes])
    trials = pd.DataFrame(outcomes)
    run.params(study.trials[winner.number].params)
    run.link_model(winner.model_uri)
    run.tags({"best_run_id": winner.run_id, "study": study.study_name})
    run.csv("trials.csv", trials.join(params))
    run.figure("optimisation_history.png", plots.best_so_far(trials, title))
    run.figure(
        "parallel_coordinates.png",
        plots.parallel_coordinates(params, trials["val_accuracy"], title),
    )
    if importances := search.importances(study):
        run.figure("hyperparameter_importance.png", plots.importance(importances, title))
    run.name(f"{model} sweep · {winner.val_accuracy:.1%}")
    run.describe(description(title, outcomes, winner, budget))
    spent, fit = budget.spent(), sum(outcome.fit_cpu_seconds for outcome in outcomes)
    run.metrics(
        {
            "n_trials": len(outcomes),
            "cpu_seconds": spent,
            "fit_cpu_seconds": fit,
            "overhead_cpu_seconds": spent - fit,
        },
        len(outcomes),
    )
    return winner


def _nothing(outcomes: Sequence[Outcome], budget: Budget) -> UserError:
    if outcomes:
        return UserError(
            f"a sweep needs a trial that ends well, but the first {len(outcomes)} all failed, "
            f"the last with '{outcomes[-1].error}': see traceback.txt of the child runs"
        )
    minutes = (budget.total - budget.left()) / 60
    return UserError(
        f"cpu_minutes must pay for start-up and one trial, but {budget.total / 60:g} came and "
        f"start-up alone takes {minutes:.2g}: raise cpu_minutes above {2 * minutes:.2g}"
    )


def description(title: str, outcomes: Sequence[Outcome], winner: Outcome, budget: Budget) -> str:
    """Markdown for the sweep's page: the best trials, and how the others ended."""
    ranked = sorted(outcomes, key=lambda outcome: -(outcome.val_accuracy or 0.0))
    rows = [
        [f"{o.number:03}", o.state, f"{o.val_accuracy or 0:.2%}", f"{o.cpu_seconds:.1f}"]
        for o in ranked[:5]
    ]
    states = pd.Series([outcome.state for outcome in outcomes]).value_counts()
    counts = ", ".join(f"{count} {state}" for state, count in states.items())
    return (
        f"**{title}**: best val_accuracy {winner.val_accuracy:.2%} in trial {winner.number:03}; "
        f"{len(outcomes)} trials ({counts}) in {budget.spent():.0f} of {budget.total:.0f} "
        f"CPU-seconds; trial 000 is the deck's model\n\n"
        + tracking.markdown(["trial", "state", "val_accuracy", "CPU-s"], rows)
    )


def main(argv: Sequence[str]) -> None:
    options = cli.parse_all("sweep", argv, OPTIONS)
    model, seed = options.pop("model"), options.pop("seed")
    budget = Budget(options.pop("cpu_minutes"))
    space = registry.load(models, model).PARAMS
    with tracking.start("sweep") as run:
        run.name(f"{model} sweep")
        run.tags({"model": model})
        data = prep.ensure(**options)
        run.use_dataset(data, "train")
        name = f"{model}-{run.id[:8]}"
        study = search.create_study(name, space, seed, options["data_dir"])
        outcomes = search_model(run, study, model, data, seed, budget)
        winner = finish(run, study, model, data, outcomes, budget)
    print(
        f"{model}: best val_accuracy {winner.val_accuracy:.4f} of {len(outcomes)} trials on "
        f"{data.title}, {budget.spent():.0f} of {budget.total:.0f} CPU-s, run {run.id}"
    )
    print(tracking.ui_hint(run.experiment_id))


if __name__ == "__main__":
    cli.run(main)
