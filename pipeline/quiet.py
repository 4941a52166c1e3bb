"""Importing TensorFlow without its remarks."""

import importlib
import os
import tempfile


def import_tensorflow() -> None:
    """Import TensorFlow, and keep what it says of oneDNN and absl from the terminal.

    It writes that to file descriptor 2 at every import, whatever its log level. Where the import
    fails, all that was written is shown.
    """
    with tempfile.TemporaryFile() as remarks:
        stderr = os.dup(2)
        os.dup2(remarks.fileno(), 2)
        try:
            importlib.import_module("tensorflow")
        except ImportError:
            remarks.seek(0)
            os.write(stderr, remarks.read())
            raise
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)
