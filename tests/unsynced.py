"""Has this process not wait until what it writes is on the disk: no power is cut in a test.

A kill loses nothing by it, and half of the time of a suite that makes thousands of MLflow's runs is
SQLite's waiting.
"""

import os
import sqlite3
from typing import Any

_connect = sqlite3.connect


def connect(*given: Any, **named: Any) -> sqlite3.Connection:
    """``sqlite3.connect``, of a database that does not wait."""
    connection = _connect(*given, **named)
    connection.execute("PRAGMA synchronous = OFF").close()
    return connection


sqlite3.connect = sqlite3.dbapi2.connect = connect
os.fsync = lambda file: None
