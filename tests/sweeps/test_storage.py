"""Studies that are kept in a database, and what is said of its URL."""

from pathlib import Path

import pytest

from benchmarks import services
from pipeline.spec import UserError
from sweeps import search
from sweeps.storage import VARIABLE, open_storage, parse, shown

SECRET = "pa55word"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A study's folder."""
    folder = tmp_path / "knn-1a2b"
    folder.mkdir()
    return folder


def _refused(folder: Path) -> str:
    with pytest.raises(UserError) as refusal:
        search.open_study("knn-1a2b", 0, folder)
    text = str(refusal.value)
    assert SECRET not in text
    assert "\n" not in text
    # Nor does a traceback hold it that would be logged: what came before is not chained to it.
    assert SECRET not in "".join(map(str, (refusal.value.__cause__, refusal.value.__context__)))
    return text


@pytest.mark.parametrize(
    ("url", "rule"),
    [
        (SECRET, "must be a database's URL like"),
        (f"postgresql+psycopg2://u:{SECRET}@127.0.0.1:1", "must be a database's URL like"),
        (f"postgresql+psycopg2://u:x@{SECRET}@127.0.0.1:1/d", "@, / and : in a password as %40"),
        (f"postgresql+psycopg2://u:{SECRET}@127.0.0.1:{SECRET}/d", "must be a database's URL"),
        (f"nosuch://u:{SECRET}@127.0.0.1/d", "whose driver is installed, but nosuch://u:***@127"),
        (f"mysql+pymysql://u:{SECRET}@127.0.0.1/d", "name its driver as in postgresql"),
        (f"postgresql+psycopg2://u:{SECRET}@127.0.0.1:1/d", "Connection refused"),
        (f"postgresql+psycopg2://u@127.0.0.1:1/d?password={SECRET}", "u@127.0.0.1:1/d gave"),
    ],
)
def test_a_bad_url_is_one_sentence_without_its_password(
    url: str, rule: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, url)
    text = _refused(folder)
    assert text.startswith("OPTUNA_STORAGE must ")
    assert rule in text
    assert list(folder.iterdir()) == []


def test_a_wrong_password_and_a_missing_database_are_sentences(
    postgres: services.Postgres, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = postgres.url("nowhere", password=False)
    monkeypatch.setenv(VARIABLE, url.replace("@", f":{SECRET}@"))
    assert "password authentication failed" in _refused(folder)
    monkeypatch.setenv(VARIABLE, postgres.url("nowhere"))
    text = _refused(folder)
    assert 'database "nowhere" does not exist' in text
    assert postgres.password not in text


def test_a_study_stays_where_it_began(
    postgres: services.Postgres, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    postgres.create("first")
    postgres.create("second")
    monkeypatch.setenv(VARIABLE, postgres.url("first"))
    study = search.open_study("knn-1a2b", 0, folder)
    study.add_trial(search.optuna.create_trial(value=0.5))
    for text in (path.read_text() for path in folder.iterdir()):
        assert postgres.password not in text
    monkeypatch.delenv(VARIABLE)
    assert "study knn-1a2b is kept in postgresql+psycopg2://letters:***@" in _refused(folder)
    monkeypatch.setenv(VARIABLE, postgres.url("second"))
    assert "/second, which does not have it" in _refused(folder)
    monkeypatch.setenv(VARIABLE, postgres.url("first"))
    assert len(search.open_study("knn-1a2b", 0, folder).trials) == 1


def test_a_study_with_a_journal_is_not_begun_anew_in_a_database(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    search.open_study("knn-1a2b", 0, folder)
    monkeypatch.setenv(VARIABLE, f"postgresql+psycopg2://u:{SECRET}@127.0.0.1:1/d")
    assert "is kept in its folder's journal" in _refused(folder)


def test_a_connection_that_was_cut_is_made_anew(
    postgres: services.Postgres, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    postgres.create("cut")
    monkeypatch.setenv(VARIABLE, postgres.url("cut"))
    study = search.open_study("knn-1a2b", 0, folder)
    study.tell(study.ask(), 0.5)
    postgres.kill()
    postgres.start()
    study.tell(study.ask(), 0.6)
    assert study.best_value == 0.6


def test_what_is_shown_has_neither_password_nor_options() -> None:
    url = parse(f"postgresql+psycopg2://u:{SECRET}@h:5/d?sslpassword={SECRET}")
    assert shown(url) == "postgresql+psycopg2://u:***@h:5/d"


def test_without_the_variable_the_study_is_in_its_folder(folder: Path) -> None:
    open_storage("knn-1a2b", folder).create_new_study([search.optuna.study.StudyDirection(2)])
    assert [path.name for path in folder.iterdir()] == ["optuna.journal"]
