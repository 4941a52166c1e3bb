"""The step ``promote``: whether a run's model becomes the champion of ``letters``, with evidence.

mlflow run . -e promote -P run_id=... -P max_latency_us=500
"""

import getpass
import hashlib
import os
import tempfile
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
from mlflow.entities import Run as RunEntity
from mlflow.entities.model_registry import ModelVersion

from pipeline import champion, cli, evaluate, owner, plots, prep, tracking, verdict
from pipeline.champion import CHAMPION, NAME, PREVIOUS, Stand
from pipeline.spec import LETTERS, Dataset, Part, Refused, UserError
from pipeline.verdict import Hits, Limits

OPTIONS: dict[str, cli.Convert] = {
    "run_id": cli.text,
    "data_dir": cli.folder,
    "max_latency_us": cli.limit,
    "max_model_mb": cli.limit,
    "min_gain": cli.share,
    "dry_run": cli.flag,
    "rollback": cli.flag,
    "history": cli.flag,
}
PROMOTED, REFUSED, RESTORED = "promoted", "refused", "restored"
OF_MODEL = ("model", "model_uri", "dataset_digest", "dataset_title", "git_commit")
# What of a decision a version shows as tags; all of it is in the history's tag and the artifact.
TAGS = (
    "decision", "reason", "decided_at", "decided_by", "decision_run_id", "decision_git_commit",
    "gate_accuracy", "predict_us_per_letter", "model_mb", "model_digest", "champion_version",
    "champion_gate_accuracy", "champion_dataset_digest", "champion_model_digest", "gain",
    "gain_low", "gain_high", "p_value",
)  # fmt: skip
FIGURES = ("gate_accuracy", "predict_us_per_letter", "predict_us_one_letter", "model_mb")
LATE = "another promotion has moved the champion meanwhile: type the command again to face it"

# JSON values: who stood against whom, what came of it and why, who asked, when, by which code.
Evidence = dict[str, Any]


def find(client: Any, run_id: str) -> RunEntity:
    """The run whose model is meant; ``best`` is the sweep with the best ``val_accuracy``.

    Only the latest sweeps of the data set that was swept last take part.
    """
    if run_id != "best":
        return evaluate.find(client, run_id)
    return best(client, "latest")


def best(client: Any, digest: str) -> RunEntity:
    """Of the latest sweeps on one data set that with the best ``val_accuracy``."""
    sweeps = tracking.latest_sweeps(client, digest)
    return max(sweeps.values(), key=lambda sweep: float(sweep.data.metrics["val_accuracy"]))


def promote(
    run: tracking.Run, source: RunEntity, data_dir: str, limits: Limits, dry_run: bool
) -> Evidence:
    """Set the model of the run ``source`` against the champion; the alias moves if it wins."""
    seen = champion.stand(run.client)
    tags = {key: source.data.tags[key] for key in OF_MODEL}
    tags |= {
        "run_id": source.info.run_id,
        "val_accuracy": f"{source.data.metrics['val_accuracy']:.4f}",
    }
    version = champion.version_of(run.client, tags["model_uri"])
    evidence = _opening(run, seen, tags | {"version": version and str(version.version)})
    evidence["limits"] = {
        name: value if np.isfinite(value) else None for name, value in limits._asdict().items()
    }
    if reason := _no_contest(evidence["challenger"], evidence["champion"]):
        evidence |= {"decision": REFUSED, "reason": reason}
    else:
        _contest(run, evidence, prep.find(data_dir, tags["dataset_digest"]), limits)
    if not dry_run:
        version = champion.register(run.client, tags["model_uri"], tags, run.id)
        _move(run, evidence, seen, version)
    return _close(run, evidence, version, dry_run)


def restore(run: tracking.Run, dry_run: bool) -> Evidence:
    """Make ``previous`` the champion again; the champion becomes ``previous``."""
    seen = champion.stand(run.client)
    version, now = seen.previous, seen.champion
    if version is None or (now and now.version == version.version):
        raise UserError(
            f"rollback restores the alias {PREVIOUS}, but {NAME} has "
            f"{'none' if version is None else 'it on the champion itself'}: promote a model "
            "first, so that one replaces another"
        )
    evidence = _opening(run, seen, _of(version))
    evidence |= {"decision": RESTORED, "reason": "rollback was asked for"}
    if not dry_run:
        _move(run, evidence, seen, version)
    return _close(run, evidence, version, dry_run)


def _opening(run: tracking.Run, seen: Stand, challenger: dict[str, Any]) -> Evidence:
    """The evidence before anything is measured: the two models, who asks, by which code."""
    code = tracking.environment_tags()
    evidence: Evidence = {
        "decided_by": f"{_user()}@{owner.machine()}",
        "decision_run_id": run.id,
        "git_commit": code["git_commit"],
        "git_dirty": code["git_dirty"] == "true",
        "dataset_title": challenger["dataset_title"],
        "challenger": challenger,
        "champion": seen.champion and _of(seen.champion),
        "limits": {},
        "test": None,
        "checks": [],
    }
    run.tags({"decided_by": evidence["decided_by"], "model": challenger["model"]})
    return evidence


def _of(version: ModelVersion) -> dict[str, Any]:
    """What a version says of its model; one that was registered by hand may say nothing."""
    said = {key: version.tags.get(key, "unknown") for key in (*OF_MODEL, "run_id", "val_accuracy")}
    return said | {"version": str(version.version)}


def _no_contest(challenger: dict[str, Any], holder: dict[str, Any] | None) -> str:
    """Why these two are not compared; empty where they can be."""
    if holder is None:
        return ""
    if holder["model_uri"] == challenger["model_uri"]:
        return "it is the champion already"
    mine, its = challenger["dataset_digest"], holder["dataset_digest"]
    if mine == its:
        return ""
    return (
        f"both must be of one data set, but it is of {mine} and the champion, version "
        f"{holder['version']}, of {its}: promote a model that was trained on {its}, or begin a new "
        f"line by taking the alias {CHAMPION} off that version in the MLflow UI"
    )


def _contest(run: tracking.Run, evidence: Evidence, data: Dataset, limits: Limits) -> None:
    """Read ``gate`` with the challenger, and the champion if there is one, and decide."""
    gate = data.part("gate")
    challenger, holder = evidence["challenger"], evidence["champion"]
    rule = f"the challenger's model must be there, but {challenger['model_uri']!r}"
    with tracking.readable(rule, "put its files back, or promote another run"):
        hits = _measure(challenger, gate)
    if holder:
        rule = f"the champion's model must be there, but version {holder['version']}"
        cure = f"put its files back, or take the alias {CHAMPION} off it in the MLflow UI"
        with tracking.readable(rule, cure):
            against = _measure(holder, gate)
        evidence["test"] = verdict.paired_test(hits, against)
        won, lost = (
            np.bincount(gate.labels[which], minlength=len(LETTERS))
            for which in (hits & ~against, against & ~hits)
        )
        title = f"{challenger['model']} against version {holder['version']}, {holder['model']}"
        run.figure("won_and_lost.png", plots.won_and_lost(won, lost, f"{title}\n{data.title}"))
    checks = verdict.checks(challenger, evidence["test"], limits)
    evidence["checks"] = [check._asdict() for check in checks]
    evidence["decision"] = PROMOTED if all(check.passed for check in checks) else REFUSED
    evidence["reason"] = verdict.why(checks, evidence["test"])
    run.use_dataset(data, "gate")
    run.metrics({key: challenger[key] for key in FIGURES} | (evidence["test"] or {}))
    run.metrics({f"champion_{key}": holder[key] for key in FIGURES} if holder else {})


def _measure(model: dict[str, Any], gate: Part) -> Hits:
    """Which letters of ``gate`` a model reads right; its figures go into ``model``."""
    with tempfile.TemporaryDirectory() as folder:
        path = mlflow.artifacts.download_artifacts(model["model_uri"], dst_path=folder)
        model["model_digest"] = _digest(Path(path))
        probabilities, latencies = evaluate.answer(path, gate.images)
        model["model_mb"] = tracking.model_mb(path)
    hits: Hits = probabilities.argmax(axis=1) == gate.labels
    low, high = evaluate.wilson(int(hits.sum()), len(hits))
    model |= latencies | {"gate_accuracy": float(hits.mean())}
    model |= {"gate_accuracy_low": low, "gate_accuracy_high": high}
    return hits


def _digest(folder: Path) -> str:
    """Of the names and the content of all files of a model."""
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        digest.update(f"{path.relative_to(folder)} {path.stat().st_size} ".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def _move(run: tracking.Run, evidence: Evidence, seen: Stand, version: ModelVersion) -> None:
    """Do as was decided, unless the champion is no longer the one that was faced."""
    evidence["challenger"]["version"] = str(version.version)
    won = evidence["decision"] != REFUSED
    if won and not champion.crown(run.client, seen, version, run.id):
        evidence |= {"decision": REFUSED, "reason": LATE}


def _close(
    run: tracking.Run, evidence: Evidence, version: ModelVersion | None, dry_run: bool
) -> Evidence:
    """Put the decision into words, and on the version and the run."""
    evidence["decided_at"] = f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%S.%f}Z"
    evidence["sentence"] = _sentence(evidence, dry_run)
    page, row = verdict.page(evidence), _row(evidence)
    run.json("evidence.json", evidence)
    run.text("evidence.md", page + "\n")
    if version and not dry_run:
        tags = {key: str(row[key]) for key in TAGS if key in row}
        tags |= {"evidence": f"runs:/{run.id}/evidence.json"}
        link = f"[that run](#/experiments/{run.experiment_id}/runs/{run.id}/artifacts)"
        note = f"{page}\n\nThe evidence, `evidence.json`, is an artifact of {link}."
        champion.record(run.client, version, row, tags, note)
        run.tags({"model_version": version.version})
    run.name(f"promote {evidence['challenger']['model']}: {evidence['decision']}")
    run.describe(page)
    kept = ("decision", "reason", "sentence", "decided_at")
    run.tags({key: evidence[key] for key in kept} | {"dry_run": str(dry_run).lower()})
    return evidence


def _sentence(evidence: Evidence, dry_run: bool) -> str:
    challenger, decision = evidence["challenger"], evidence["decision"]
    version = challenger["version"]
    name = f"{NAME} version {version}" if version else f"the model of run {challenger['run_id']}"
    if decision == REFUSED:
        says = f"{'would' if dry_run else 'does'} not become the {CHAMPION}"
    else:
        says = f"{'would become' if dry_run else 'becomes'} the {CHAMPION}"
    accuracy = challenger.get("gate_accuracy")
    figure = f", {accuracy:.2%} on gate" if accuracy is not None else ""
    before = f"dry run, nothing is changed: {name}" if dry_run else name
    return f"{before} ({challenger['model']}{figure}) {says}: {evidence['reason']}"


def _row(evidence: Evidence) -> dict[str, Any]:
    """A decision in short, as the history keeps it."""
    keys = ("decision", "reason", "decided_at", "decided_by", "decision_run_id", "git_commit")
    challenger, holder = evidence["challenger"], evidence["champion"] or {}
    row = {key: evidence[key] for key in keys if key != "git_commit"}
    row |= {"decision_git_commit": evidence["git_commit"]}
    row |= {key: challenger[key] for key in ("version", "model", "dataset_digest")}
    row |= {key: challenger[key] for key in ("model_digest", *FIGURES) if key in challenger}
    for key in ("version", "model", "dataset_digest", "model_digest", "gate_accuracy"):
        row[f"champion_{key}"] = holder.get(key, "")
    # Blank where nothing was tested: a version's tags would else show an earlier test's figures.
    return row | (evidence["test"] or dict.fromkeys(verdict.TESTED, ""))


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user may have no name
        return f"uid-{os.getuid()}"


def _check(options: dict[str, Any]) -> None:
    """Refuse options that ask for two things at once."""
    asked = [name for name in ("history", "rollback") if options[name]]
    if options["run_id"] != "best":
        asked.append("run_id")
    if len(asked) > 1:
        raise UserError(
            f"promote does one thing at a time, but {' and '.join(asked)} came: leave out all but "
            "one of them"
        )


def main(argv: Sequence[str]) -> None:
    options = cli.parse_all("promote", argv, OPTIONS)
    _check(options)
    if options["history"]:
        with tracking.start("history") as run:
            rows = champion.history(run.client)
            text = verdict.table(rows) if rows else f"no decision on {NAME} yet"
            run.name(f"decisions on {NAME}")
            run.describe(text)
        print(text)
        return
    with tracking.start("promote") as run:
        if options["rollback"]:
            evidence = restore(run, options["dry_run"])
        else:
            limits = Limits(*(options[name] for name in Limits._fields))
            source = find(run.client, options["run_id"])
            evidence = promote(run, source, options["data_dir"], limits, options["dry_run"])
    print(f"\n{verdict.page(evidence)}\n")
    if evidence["decision"] == REFUSED:
        raise Refused(evidence["sentence"])
    print(evidence["sentence"])
    if not options["dry_run"]:
        print(f"serve it: mlflow models serve -m models:/{NAME}@{CHAMPION} --env-manager local")


if __name__ == "__main__":
    cli.run(main)
