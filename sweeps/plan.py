"""What a budget will buy, found by timing a few steps: ``mlflow run . -e sweep -P plan=true``."""

import math
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from pathlib import Path
from statistics import mean
from typing import NamedTuple

import numpy as np
from mlflow.models import Model

from pipeline import models, precision, registry, tracking
from pipeline.bill import METER
from pipeline.spec import LETTERS, Dataset, Fitted, Images, Part, UserError
from sweeps import search
from sweeps.budget import GRANT_SHARE, RESERVE_CPU_SECONDS, own_cpu_seconds
from sweeps.engine import Task, preload
from sweeps.nursery import Message, Nursery
from sweeps.phases import (
    MARGIN,
    SCREEN_SHARE,
    SEARCH_SHARE,
    Growth,
    growth,
    margin,
    max_steps,
    screens,
    shares,
)
from sweeps.trial import prepare as prepare  # the nursery calls it

PLAN_CPU_SECONDS = 20.0  # all that a plan may spend, start-up included
CLOSING_CPU_SECONDS = 1.5  # what it takes to end the nursery and to write the plan down
GRANTS = (4.0, 6.0, 3.0)  # CPU-seconds to time the defaults, the first prior, each other set
LEAST_GRANT = 3.0  # for which a first look at 2 % of the letters can be had
MAX_TIMED = 8  # sets of hyperparameters
MAX_STEPS = 3  # of one fit: those that come later cost as much
FIRST_SHARE, FIRST_LETTERS = 0.02, 800  # of the letters, for a first look at what a step costs
CLOCK_SECONDS = 0.001  # what the process's clock can tell
WRITING_CPU_SECONDS = 0.3  # a trial's run in MLflow, beside its model


class Timed(NamedTuple):
    """What a trial costs, in CPU-seconds on all letters.

    Attributes:
        extra: beside its steps: graphs, model, run.
        step: of its first step.
        later: of each step after that.
        n_steps: of a whole fit.
    """

    extra: float
    step: float
    later: float
    n_steps: int

    def cost(self, n_steps: float) -> float:
        """CPU-seconds of a trial of so many steps, at least 1."""
        return self.extra + self.step + self.later * (n_steps - 1)

    def n_affordable(self, cpu_seconds: float) -> int:
        """How many steps of a whole fit a grant pays for; 0 where it does not pay for the first."""
        n_later = math.floor((cpu_seconds - self.cost(1)) / self.later)
        return max(0, min(self.n_steps, 1 + n_later))


def body(spec: Message, call: Callable[[Message], Message]) -> Message:
    """Time the first steps of a fit on as many letters as the grant pays for. Runs in a fork."""
    METER.restart()
    data = Dataset.open(Path(spec["root"]))
    n_letters = len(data.part("train").labels)
    share, limit = min(FIRST_SHARE, FIRST_LETTERS / n_letters), 0.9 * spec["cpu_seconds"]
    seen: list[tuple[float, float]] = []  # shares of the letters, and what a first step took
    while True:
        began = METER.seconds()
        parts = [_share(data.part("train"), share), _share(data.part("val"), share)]
        fitted, steps = _fit(spec, parts, share == 1.0, limit)
        seen.append((share, steps[0]))
        tracing = METER.seconds().get("tracing", 0.0) - began.get("tracing", 0.0)
        room = limit - time.process_time() - tracing
        # At worst a step's cost grows with the square of the letters.
        growth = math.sqrt(max(0.0, room) / steps[0])
        if share == 1.0 or growth < 1.5:
            break
        share = min(1.0, growth * share)
    later = mean(steps[1:]) if len(steps) > 1 else steps[0]
    saving = _save(fitted, np.asarray(parts[1].images[: len(LETTERS)]))
    extra = tracing + saving + WRITING_CPU_SECONDS
    step = on_all(seen)
    timed = Timed(extra, step, step * later / steps[0], fitted.n_steps)
    return timed._asdict() | {"rough": len(seen) == 1 and share < 1}


def on_all(seen: Sequence[tuple[float, float]]) -> float:
    """What a step takes on all letters, of what it took on the last one or two shares of them.

    By a line through two, as there may be work that the number of letters does not change; but no
    more than half of it all is taken for such work, since a first look may have been slow.
    """
    share, cost = seen[-1]
    if len(seen) > 1 and cost > seen[-2][1]:
        slope = (cost - seen[-2][1]) / (share - seen[-2][0])
        return max(cost + slope * (1 - share), cost / share / 2)
    return cost / share


def _share(part: Part, share: float) -> Part:
    n_letters = max(100, round(share * len(part.labels)))
    return Part(part.images[:n_letters], part.labels[:n_letters])


def _fit(spec: Message, parts: list[Part], whole: bool, limit: float) -> tuple[Fitted, list[float]]:
    """A fit's first step, and what it took; all that fit into ``limit`` where all letters do."""
    ends = [METER.seconds().get("fit", 0.0)]

    def report(step: int, val_accuracy: float) -> bool:
        ends.append(METER.seconds()["fit"])
        return (
            not whole
            or len(ends) > MAX_STEPS
            or time.process_time() + (ends[-1] - ends[-2]) > limit
        )

    with METER.charge("fit"):
        fit = registry.load(models, spec["model"]).fit
        fitted: Fitted = fit(spec["params"], *parts, spec["seed"], report)
    steps = [after - before for before, after in zip(ends, ends[1:], strict=False)]
    return fitted, [max(step, CLOCK_SECONDS) for step in steps]


def _save(fitted: Fitted, example: Images) -> float:
    """CPU-seconds that it takes to store a model."""
    before = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        fitted.save_model(
            path=f"{folder}/model",
            mlflow_model=Model(),
            signature=tracking.SIGNATURE,
            input_example=example,
            pip_requirements=tracking.requirements(fitted.requirements),
        )
    return time.process_time() - before


def plan(task: Task, cpu_seconds: float, prepared: float) -> str:
    """Markdown that says what a sweep of so many CPU-seconds will buy.

    ``prepared`` CPU-seconds of this process went into the letters, which a sweep will find.
    """
    began = own_cpu_seconds() - prepared
    timed, n_too_dear, imported = _time(task, prepared)
    start = began + imported
    grant, left = GRANT_SHARE * cpu_seconds, cpu_seconds - start - RESERVE_CPU_SECONDS
    baseline = timed[0]
    member = registry.load(models, task.model)
    grown = growth(member, task.data)
    screened = screens(member, grown)
    first = baseline.extra + baseline.step / (grown.cost if screened else 1.0)
    if first > min(grant, left):
        least = max(first / GRANT_SHARE, first + cpu_seconds - left)
        raise UserError(
            f"cpu_minutes must pay for start-up and a first step, but {cpu_seconds / 60:g} came, "
            f"and these take {start:.0f} and {first:.0f} CPU-s: raise cpu_minutes above "
            f"{1.1 * least / 60:.2g}"
        )
    rows: list[list[object]] = [
        ["start-up and closing", "", "", f"{start + RESERVE_CPU_SECONDS:.0f}"]
    ]
    # A prior races unless the screen shows what promises much less error.
    racer = timed.get(1) if hasattr(member, "PRIORS") else None
    if hasattr(member, "STEPS"):
        rows += phased([*timed.values()], racer, cpu_seconds, left, grown, margin(member))
    elif screened:
        rows += searched([*timed.values()], racer, cpu_seconds, left, grown)
    else:
        rows += _halved([*timed.values()], grant, left)
    spent = own_cpu_seconds() - prepared
    return (
        f"**{task.model} on {task.data.title}**: what {cpu_seconds:.0f} CPU-seconds will buy\n\n"
        + tracking.markdown(["", "trials", "steps each", "CPU-s each"], rows)
        + f"\n\nA step of the deck's model takes {baseline.later:.1f} CPU-s. Timed on {len(timed)} "
        f"set{'s' if len(timed) > 1 else ''} of hyperparameters in {spent:.0f} CPU-s."
        + (f" Too dear for that: {n_too_dear} more." if n_too_dear else "")
        + (f" Preparing the letters took {prepared:.0f} more, once." if prepared > 1 else "")
    )


def phased(
    timed: Sequence[Timed],
    racer: Timed | None,
    cpu_seconds: float,
    left: float,
    growth: Growth,
    planned: float,
) -> list[list[object]]:
    """Rows of the phases: a screen by short fits, then whole fits of a racer, or of the median.

    ``planned`` is the share of a grant that a fit's length is planned with.
    """
    costs = [one.extra + one.step / growth.cost for one in timed]
    n_screened = max(1, math.ceil(min(left, SCREEN_SHARE * cpu_seconds) / mean(costs)))
    left -= n_screened * mean(costs)
    good = racer or sorted(timed, key=lambda one: one.later)[len(timed) // 2]
    # A whole fit's last look at val may be dearer than the others.
    last = growth.last / (growth.n_train + growth.looks) * good.later
    good = good._replace(extra=good.extra + last)
    # How many race is known when the screen has shown how close to each other the best ones are.
    plans = [
        shares(max(left, 0.0), good.later, good.extra, good.n_steps, n_rivals)
        for n_rivals in (1, math.inf)
    ]
    n_steps = [good.n_affordable(planned * plan.cpu_seconds) for plan in plans]
    rows: list[list[object]] = [
        ["screen, the deck's model first", f"about {n_screened}", "short", _range(costs)]
    ]
    n_racing, n_confirming = zip(*(plan[:2] for plan in plans), strict=True)
    for phase, n_fits in (("race", n_racing), ("confirm", n_confirming)):
        if any(n_fits) and (all(n_steps) or growth.n_short < growth.n_train):
            steps = f"about {_span(n_steps)}" if all(n_steps) else "2, on fewer letters"
            rows.append([phase, _span(n_fits), steps, _span(plan.cpu_seconds for plan in plans)])
    return rows


def searched(
    timed: Sequence[Timed], racer: Timed | None, cpu_seconds: float, left: float, growth: Growth
) -> list[list[object]]:
    """Rows of a screen on fewer letters, and of whole fits of what is as dear as a racer.

    Without a racer these cost what those that were timed do on average.
    """
    wholes = [one.cost(one.n_steps) for one in timed]
    costs = [
        one.extra + (whole - one.extra) / growth.cost
        for one, whole in zip(timed, wholes, strict=True)
    ]
    whole = racer.cost(racer.n_steps) if racer else mean(wholes)
    n_paid_for = math.floor((left - whole / MARGIN) / mean(costs))
    n_screened = max(1, min(math.ceil(SEARCH_SHARE * cpu_seconds / mean(costs)), n_paid_for))
    n_racing = max(0, math.floor((left - n_screened * mean(costs)) / whole))
    rows: list[list[object]] = [
        ["screen, the deck's model first", f"about {n_screened}", "short", _range(costs)]
    ]
    if n_racing:
        rows.append(["race", f"about {n_racing}", "all letters", _rounded(whole)])
    return rows


def _halved(timed: Sequence[Timed], grant: float, left: float) -> list[list[object]]:
    """Rows of a plain search: the deck's model in full, the others under successive halving."""
    baseline, others = timed[0], timed[1:] or timed
    n_steps = baseline.n_affordable(min(grant, left))
    depths = [search.expected_steps(max(1, one.n_affordable(grant))) for one in others]
    costs = [one.cost(depth) for one, depth in zip(others, depths, strict=True)]
    n_more = max(0, int((left - baseline.cost(n_steps)) / mean(costs)))
    return [
        ["trial 000, the deck's model", 1, n_steps, _rounded(baseline.cost(n_steps))],
        ["further trials", f"about {n_more}", f"{mean(depths):.1f}", _range(costs)],
    ]


def _span(values: Iterable[float]) -> str:
    return " to ".join(sorted({_rounded(value) for value in values}, key=float))


def _range(costs: Sequence[float]) -> str:
    return f"{_rounded(mean(costs))} ({_rounded(min(costs))} to {_rounded(max(costs))})"


def _rounded(value: float) -> str:
    """Three digits that count, and no exponent."""
    return f"{float(f'{value:.3g}'):.6g}"


def _time(task: Task, prepared: float) -> tuple[dict[int, Timed], int, float]:
    """Costs of the first proposals of a study, by their place; the defaults are 0.

    Gives also how many were too dear to be timed, and the CPU-seconds of loading the nursery.
    """
    member = registry.load(models, task.model)
    timed: dict[int, Timed] = {}
    n_too_dear = 0
    with closing(Nursery("sweeps.plan:body", preload(member))) as nursery:
        # A sweep would try what bfloat16 gains; a plan takes the instructions for the gain.
        chosen = precision.resolve(task.precision, member.PARAMS, lambda: precision.LEAST_GAIN)
        everywhere = precision.params(chosen, member.PARAMS)
        proposals = search.proposals(member, task.seed, MAX_TIMED, everywhere)
        whole = search.whole(member)
        for number, proposed in enumerate(proposals):
            params = proposed | whole
            if hasattr(member, "STEPS"):  # a long fit, of which the first steps are timed
                params[member.STEPS] = max_steps(member)
            spent = own_cpu_seconds() - prepared + nursery.cpu_seconds()
            room = PLAN_CPU_SECONDS - CLOSING_CPU_SECONDS - spent
            grant = min(GRANTS[min(number, 2)], room)
            if grant < LEAST_GRANT:
                break
            spec = {
                "model": task.model,
                "params": params,
                "root": str(task.data.root),
                "seed": task.seed,
                "cpu_seconds": grant,
            }
            nursery.start(number, spec, grant)
            end = _end(nursery)
            if error := end.get("error"):
                raise UserError(
                    f"a plan times fits, but {params} failed with '{error}': mend the model, "
                    "or sweep without plan=true, which outlives a trial that fails"
                )
            # One look at 2 % of the letters tells little where much is the same for any number.
            if "step" in end and not (end.pop("rough") and number > 1):
                timed[number] = Timed(**end)
            elif number == 0:
                break  # the defaults are the measure of all others
            else:
                n_too_dear += 1
        imported = nursery.imported
    if not timed:
        raise UserError(
            f"a plan must time a step of the deck's model in {PLAN_CPU_SECONDS:.0f} CPU-s, but "
            "that is too little here for so many letters: pass a smaller n_train"
        )
    return timed, n_too_dear, imported


def _end(nursery: Nursery) -> Message:
    """What the body of the trial under way returned; empty where it was stopped."""
    while True:
        for event in nursery.events(1.0):
            if "end" in event:
                return event["end"] or {}
