"""Where an Optuna study is kept: a journal in its folder, or the database of OPTUNA_STORAGE.

The variable's URL may hold a password, so it comes from the environment alone, and what is shown of
it is ``shown``.
"""

import os
from pathlib import Path

import optuna
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from sqlalchemy import URL, make_url
from sqlalchemy.exc import ArgumentError, NoSuchModuleError, SQLAlchemyError

from pipeline.spec import UserError

VARIABLE = "OPTUNA_STORAGE"
# A connection that a restart of the server or a firewall has cut is noticed, and made anew.
ENGINE = {"pool_pre_ping": True, "pool_recycle": 1800}
EXAMPLE = "postgresql+psycopg2://USER:PASSWORD@HOST/DATABASE"
PLACE = "storage.txt"  # in a study's folder: where it is kept, if not there


def open_storage(name: str, folder: Path) -> BaseStorage:
    """The storage of the study ``name``, whose folder is ``folder``.

    A study stays where it began: one that is looked for elsewhere would begin anew, while its
    ledger says what it has spent.
    """
    journal, place = folder / "optuna.journal", folder / PLACE
    text = os.environ.get(VARIABLE)
    if not text:
        if place.exists():
            raise UserError(
                f"study {name} is kept in {place.read_text().strip()}, but {VARIABLE} is not set: "
                "set it to that database's URL, with its password"
            )
        _mend(journal)
        return JournalStorage(JournalFileBackend(str(journal)))
    url = parse(text)
    if journal.exists():
        raise UserError(
            f"study {name} is kept in its folder's journal, but {VARIABLE} names {shown(url)}: "
            f"unset {VARIABLE}, or begin a new study"
        )
    storage = connect(url)
    if place.exists() and name not in optuna.get_all_study_names(storage):
        raise UserError(
            f"study {name} is kept in {place.read_text().strip()}, but {VARIABLE} names "
            f"{shown(url)}, which does not have it: set {VARIABLE} as it was then"
        )
    return storage


def check() -> None:
    """Raise what is wrong with the variable, before anything is read or begun for a sweep."""
    if text := os.environ.get(VARIABLE):
        connect(parse(text)).engine.dispose()


def keep_place(folder: Path) -> None:
    """Note in a study's folder where the study is kept, now that it is there."""
    if text := os.environ.get(VARIABLE):
        (folder / PLACE).write_text(f"{shown(parse(text))}\n")


def parse(text: str) -> URL:
    """A database's URL. What is wrong with it is said without it: any part may be the password."""
    try:
        url = make_url(text)
    except (ArgumentError, ValueError):
        url = None
    # With an @ in the password the rest of it would be taken for the host.
    if url is None or not url.database or "@" in f"{url.host}{url.database}":
        raise UserError(
            f"{VARIABLE} must be a database's URL like {EXAMPLE}, but what came is none (it is not "
            "shown, for it may hold a password): write @, / and : in a password as %40, %2F and %3A"
        )
    return url


def connect(url: URL) -> RDBStorage:
    """Optuna's storage in a database; one clear sentence where it is not to be had."""
    try:
        return RDBStorage(url.render_as_string(hide_password=False), engine_kwargs=dict(ENGINE))
    except (ImportError, NoSuchModuleError) as error:
        raise UserError(
            f"{VARIABLE} must name a database whose driver is installed, but {shown(url)} came: "
            "`pip install -r sweeps/requirements.txt`, and name its driver as in "
            "postgresql+psycopg2://"
        ) from error
    except SQLAlchemyError as error:
        cause = str(getattr(error, "orig", None) or type(error).__name__).splitlines()[0]
        raise UserError(
            f"{VARIABLE} must name a database that answers, but {shown(url)} gave {cause!r}: start "
            "it, make the database, or correct the URL"
        ) from None  # SQLAlchemy's traceback may show what the driver was called with


def shown(url: URL) -> str:
    """A URL as it may be seen: its password starred, and without options, which may hold one."""
    return url.set(query={}).render_as_string(hide_password=True)


def _mend(journal: Path) -> None:
    """Make good what a kill or a power cut may leave: a lock that nobody holds, a torn last line.

    Optuna would wait half a minute for the one, and read nothing any more behind the other. Only
    the process that holds the ledger opens a study, so nobody else is at it.
    """
    Path(f"{journal}.lock").unlink(missing_ok=True)
    if not journal.exists():
        return
    with journal.open("rb+") as file:
        text = file.read()
        file.truncate(text.rfind(b"\n") + 1)
