"""The registered model ``letters``: its versions, their aliases, and the decisions kept on them.

The only place that writes to the registry. The registry moves an alias for whoever asks, so two
promotions at once could both win and neither would know. What a tracking store does give out once
is a param: a second value under the same name is refused. So each change of the champion first
takes its number as a param of one run, the promotion that registered the first version, and of two
that have seen the same champion only one gets the next number.
"""

import json
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from typing import Any, NamedTuple

import mlflow
from mlflow.entities import Run as RunEntity
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException

from pipeline.spec import UserError

NAME = "letters"
CHAMPION, CHALLENGER, PREVIOUS = "champion", "challenger", "previous"
TURN = "champion_change_"  # param: number of the change, value: the run that makes it
DECISION = "decision/"  # tag of a version for each decision on it
RULE = "\n\n---\n\n"  # between the pages of a description
LONGEST = 5000  # characters of a description that every store keeps


class Stand(NamedTuple):
    """Who was champion, and before whom, when someone looked; ``turn`` changes had been made."""

    champion: ModelVersion | None
    previous: ModelVersion | None
    turn: int


def stand(client: mlflow.MlflowClient) -> Stand:
    """The champion as it is; refused while another promotion is at moving it."""
    turns = _turns(_keeper(client))  # before the aliases: who changes them meanwhile is noticed
    last = _run(client, turns[max(turns)]) if turns else None
    if last and last.info.status == "RUNNING" and "decision" not in last.data.tags:
        raise UserError(
            "one promotion moves the champion at a time, but run "
            f"{last.info.run_id} ({last.data.tags.get('decided_by', 'someone')}) is at it: type "
            "the command again; a run that died on another machine is closed by the next command "
            "there"
        )
    aliases = _aliases(client)
    champion, previous = (
        client.get_model_version(NAME, aliases[alias]) if alias in aliases else None
        for alias in (CHAMPION, PREVIOUS)
    )
    return Stand(champion, previous, max(turns, default=0))


def versions(client: mlflow.MlflowClient) -> Iterator[ModelVersion]:
    """All versions, the first first."""
    found, token = [], None
    while token != "":
        page = client.search_model_versions(f"name = '{NAME}'", page_token=token)
        found += list(page)
        token = page.token or ""
    yield from sorted(found, key=lambda version: int(version.version))


def version_of(client: mlflow.MlflowClient, model_uri: str) -> ModelVersion | None:
    """The version under which this very model is registered already."""
    same = (one for one in versions(client) if one.tags.get("model_uri") == model_uri)
    return next(same, None)


def register(
    client: mlflow.MlflowClient, model_uri: str, tags: Mapping[str, str], run_id: str
) -> ModelVersion:
    """The version of a model, made by the run ``run_id`` if there is none: the challenger now."""
    version = version_of(client, model_uri)
    if version is None:
        keep = dict(tags) | {"model_uri": model_uri, "registered_by": run_id}
        version = mlflow.register_model(model_uri, NAME, tags=keep)
        for other in versions(client):  # a server whose answer was lost was asked for another one
            twice = other.tags.get("registered_by") == run_id
            if twice and str(other.version) != str(version.version):
                client.delete_model_version(NAME, str(other.version))
    _point(client, CHALLENGER, version.version)
    return version


def crown(client: mlflow.MlflowClient, seen: Stand, version: ModelVersion, run_id: str) -> bool:
    """Make a version champion, and the one that it replaces ``previous``.

    False, and nothing moves, where the champion is no longer the one that was ``seen``.
    """
    keeper = _keeper(client)
    if keeper is None:
        raise UserError(
            f"the runs of {NAME} number the changes of its champion, but all were deleted: restore "
            "one by `mlflow runs restore --run-id RUN_ID`"
        )
    if not _take(client, keeper, seen.turn + 1, run_id):
        return False
    before = str(seen.champion.version) if seen.champion else None
    if _aliases(client).get(CHAMPION) != before:  # moved by hand: that takes no number
        return False
    if before is not None:
        _point(client, PREVIOUS, before)
    _point(client, CHAMPION, version.version)
    return True


def record(
    client: mlflow.MlflowClient,
    version: ModelVersion,
    row: Mapping[str, Any],
    tags: Mapping[str, str],
    description: str,
) -> None:
    """Keep a decision on a version: as a tag of its own, its figures as the version's tags too.

    The description has the last decision on top, and as many of the earlier ones as it can hold.
    """
    key = f"{DECISION}{row['decided_at']}/{row['decision_run_id'][:8]}"
    for name, value in (dict(tags) | {key: json.dumps(row)}).items():
        client.set_model_version_tag(NAME, version.version, name, value)
    before = client.get_model_version(NAME, version.version).description or ""
    pages = [description, *(page for page in before.split(RULE) if page)]
    while len(pages) > 1 and len(RULE.join(pages)) > LONGEST:
        pages.pop()
    client.update_model_version(NAME, version.version, description=RULE.join(pages))


def history(client: mlflow.MlflowClient) -> list[dict[str, Any]]:
    """Every decision on every version, the first first, and the changes that were cut short."""
    rows = [
        json.loads(value)
        for version in versions(client)
        for name, value in version.tags.items()
        if name.startswith(DECISION)
    ]
    told = {row["decision_run_id"] for row in rows}
    begun = (_run(client, run_id) for run_id in _turns(_keeper(client)).values())
    rows += [_row_of(run) for run in begun if run and run.info.run_id not in told]
    return sorted(rows, key=lambda row: str(row["decided_at"]))


def _row_of(run: RunEntity) -> dict[str, Any]:
    """The history's row of a run that began to move the champion and has not recorded it.

    Or whose record is gone, with the version that a user has deleted: the run has it too.
    """
    tags = run.data.tags
    began = datetime.fromtimestamp(run.info.start_time / 1000, UTC)
    return {
        "decision": tags.get("decision", "cut short"),
        "reason": tags.get(
            "reason", f"the run is {run.info.status}: see which version is {CHAMPION} now"
        ),
        "decided_at": tags.get("decided_at", f"{began:%Y-%m-%dT%H:%M:%S.%f}Z"),
        "decided_by": tags.get("decided_by", "unknown"),
        "decision_run_id": run.info.run_id,
        "version": tags.get("model_version", ""),
        "model": tags.get("model", "unknown"),
        "champion_version": "",
    }


def _point(client: mlflow.MlflowClient, alias: str, version: str) -> None:
    """Set an alias, asked for again where another promotion has set it first in the same moment.

    A store inserts an alias that it did not find: of two that insert it at once, it refuses one.
    """
    try:
        client.set_registered_model_alias(NAME, alias, version)
    except MlflowException:
        if alias not in _aliases(client):
            raise
        client.set_registered_model_alias(NAME, alias, version)


def _aliases(client: mlflow.MlflowClient) -> dict[str, str]:
    """Version of each alias."""
    found = client.search_registered_models(f"name = '{NAME}'")
    return {alias: str(version) for one in found for alias, version in one.aliases.items()}


def _keeper(client: mlflow.MlflowClient) -> RunEntity | None:
    """The run whose params number the changes; all see the same, for versions are counted up.

    The training run stands in where a version was registered by hand or its promotion deleted.
    """
    for version in versions(client):
        for run_id in (version.tags.get("registered_by"), version.run_id):
            run = _run(client, run_id) if run_id else None
            if run and run.info.lifecycle_stage == "active":
                return run
    return None


def _turns(keeper: RunEntity | None) -> dict[int, str]:
    """Run of each change of the champion, by its number."""
    params = keeper.data.params if keeper else {}
    return {
        int(name.removeprefix(TURN)): run_id
        for name, run_id in params.items()
        if name.startswith(TURN)
    }


def _take(client: mlflow.MlflowClient, keeper: RunEntity, turn: int, run_id: str) -> bool:
    """Whether this run is the one that gets the number ``turn``."""
    try:
        client.log_param(keeper.info.run_id, f"{TURN}{turn}", run_id)
    except MlflowException:
        # A store says in ways of its own that the number is taken; whose it is tells them apart.
        if turn not in _turns(client.get_run(keeper.info.run_id)):
            raise
    return _turns(client.get_run(keeper.info.run_id))[turn] == run_id


def _run(client: mlflow.MlflowClient, run_id: str) -> RunEntity | None:
    """A run; None where it was purged."""
    try:
        return client.get_run(run_id)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
    return None
