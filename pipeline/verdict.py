"""Whether a challenger becomes champion: a paired test, limits, and the words for what came of it.

Figures in, a verdict and its tables out. Nothing here reads a letter or writes to MLflow.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from pipeline.findings import mcnemar
from pipeline.tracking import markdown

ALPHA = 0.05  # a gain that chance gives more often than this is none
N_RESAMPLES = 10_000
# Letters read right by the challenger alone are won, by the champion alone lost.
TESTED = ("n_letters", "n_won", "n_lost", "gain", "gain_low", "gain_high", "p_value")

Hits = npt.NDArray[np.bool_]  # (n,), which letters a model has read right
Figures = Mapping[str, Any]


class Limits(NamedTuple):
    """What a challenger must keep, beside the test; ``inf`` where there is no limit."""

    max_latency_us: float  # wall microseconds a letter
    max_model_mb: float  # 10^6 bytes
    min_gain: float  # share of the letters of ``gate``


class Check(NamedTuple):
    """One rule, what was found, and whether that is enough."""

    rule: str
    found: str
    passed: bool


def paired_test(challenger: Hits, champion: Hits) -> dict[str, float]:
    """McNemar's exact test of two models on the same letters, and the gain with its 95 % interval.

    The interval is the percentile bootstrap's. Letters on which both do alike differ in nothing, so
    a resample of the letters is one draw from the multinomial of won, lost and alike.
    """
    n = len(challenger)
    won, lost = int((challenger & ~champion).sum()), int((champion & ~challenger).sum())
    shares = np.array([won, lost, n - won - lost]) / n
    draws = np.random.default_rng(0).multinomial(n, shares, N_RESAMPLES)  # (10000, 3)
    low, high = np.percentile((draws[:, 0] - draws[:, 1]) / n, [2.5, 97.5])
    gain = (won - lost) / n
    figures = (n, won, lost, gain, float(low), float(high), mcnemar(won, lost))
    return dict(zip(TESTED, figures, strict=True))


def checks(challenger: Figures, test: Figures | None, limits: Limits) -> list[Check]:
    """Every rule that a challenger must keep; without a champion there is no ``test``."""
    found = []
    if test:
        gain, p_value = test["gain"], test["p_value"]
        found += [
            Check(
                f"the gain must be at least {points(limits.min_gain)} points",
                f"{points(gain)} (95 % interval {interval(test)})",
                gain >= limits.min_gain,
            ),
            Check(
                f"p of McNemar's exact test must be below {ALPHA:g}",
                f"{p_value:.2g} ({test['n_won']} letters won, {test['n_lost']} lost)",
                p_value < ALPHA,
            ),
        ]
    for rule, key, limit in (
        ("µs a letter", "predict_us_per_letter", limits.max_latency_us),
        ("MB of model", "model_mb", limits.max_model_mb),
    ):
        if np.isfinite(limit):
            value = challenger[key]
            found.append(Check(f"{rule} must be at most {limit:g}", f"{value:.4g}", value <= limit))
    return found


def why(found: Sequence[Check], test: Figures | None) -> str:
    """The rules that were broken; or that none was, and the gain."""
    if broken := [f"{one.rule}, but is {one.found}" for one in found if not one.passed]:
        return "; ".join(broken)
    if test is None:
        return "there was no champion, and it keeps every limit"
    return (
        f"it gains {points(test['gain'])} points (95 % interval {interval(test)}, "
        f"p = {test['p_value']:.2g}) and keeps every limit"
    )


def points(share: float) -> str:
    """A share as percentage points."""
    return f"{100 * share:.2f}"


def interval(test: Figures) -> str:
    """The interval of the gain, in points."""
    return f"{points(test['gain_low'])} to {points(test['gain_high'])}"


def page(evidence: Figures) -> str:
    """Markdown of one decision: the sentence, both models, the rules, who decided and when."""
    table = [
        (label, *(_cell(evidence[who], form) for who in ("challenger", "champion")))
        for label, form in (
            ("version", "{version}"),
            ("model", "{model}"),
            ("accuracy on gate", "{gate_accuracy:.2%}"),
            ("95 % interval", "{gate_accuracy_low:.2%} to {gate_accuracy_high:.2%}"),
            ("µs a letter", "{predict_us_per_letter:.0f}"),
            ("µs of a letter alone", "{predict_us_one_letter:.0f}"),
            ("model MB", "{model_mb:.2f}"),
            ("data set digest", "`{dataset_digest}`"),
            ("digest of the model's files", "`{model_digest}`"),
            ("run", "`{run_id}`"),
            ("trained at commit", "`{git_commit:.12}`"),
        )
    ]
    rows = [row for row in table if row[1:] != ("–", "–")]
    who = "restored" if evidence["decision"] == "restored" else "challenger"
    parts = [
        f"**{evidence['sentence']}**",
        markdown(["", who, "champion until then"], rows),
        _rules(evidence),
        f"Decided by {evidence['decided_by']} at {evidence['decided_at']}, commit "
        f"`{evidence['git_commit']:.12}`{' with changes' if evidence['git_dirty'] else ''}, "
        f"run `{evidence['decision_run_id']}`, on {evidence['dataset_title']}.",
    ]
    return "\n\n".join(part for part in parts if part)


def _rules(evidence: Figures) -> str:
    rows = [
        [one["rule"], one["found"], "yes" if one["passed"] else "NO"] for one in evidence["checks"]
    ]
    return markdown(["rule", "found", "kept"], rows) if rows else ""


def _cell(model: Figures | None, form: str) -> str:
    """A cell of the table, or a dash where nothing of the kind is known."""
    known = {key: value for key, value in (model or {}).items() if value is not None}
    try:
        return form.format(**known)
    except KeyError:
        return "–"


def table(rows: Sequence[Figures]) -> str:
    """Decisions as a markdown table, a row each."""
    columns = [
        "When (UTC)", "Who", "Decision", "Challenger", "Champion until then", "Gain, points",
        "95 % interval", "p", "Why",
    ]  # fmt: skip
    cells = [
        [
            row["decided_at"][:19].replace("T", " "),
            row["decided_by"],
            row["decision"],
            f"{row['version']} {row['model']}",
            f"{row['champion_version']} {row['champion_model']}"
            if row["champion_version"]
            else "–",
            *(
                (points(row["gain"]), interval(row), f"{row['p_value']:.2g}")
                if row.get("p_value", "") != ""
                else 3 * ["–"]
            ),
            row["reason"],
        ]
        for row in rows
    ]
    return markdown(columns, cells)
