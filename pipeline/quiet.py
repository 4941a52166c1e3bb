"""Importing Keras with TensorFlow, on one thread and without their remarks."""

import importlib
import os
import tempfile


def import_keras() -> None:
    """Import Keras and TensorFlow; keep progress bars and remarks on oneDNN from the terminal.

    TensorFlow writes those to file descriptor 2 at every import, whatever its log level. Where the
    import fails, all that was written is shown.
    """
    # TensorFlow leaves oneDNN alone where a processor has no instructions for neural networks, but
    # there too a convolution takes half the time with it.
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")
    with tempfile.TemporaryFile() as remarks:
        stderr = os.dup(2)
        os.dup2(remarks.fileno(), 2)
        try:
            keras = importlib.import_module("keras")
        except ImportError:
            remarks.seek(0)
            os.write(stderr, remarks.read())
            raise
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)
    # Two one-thread fits side by side do 1.5 times the work of one fit with two threads. Set here,
    # since TensorFlow takes it before its first op only, and threadpool_limits does not reach it.
    threading = importlib.import_module("tensorflow").config.threading
    threading.set_intra_op_parallelism_threads(1)
    threading.set_inter_op_parallelism_threads(1)
    # MLflow calls predict without verbose=0: a progress bar for each batch.
    keras.utils.disable_interactive_logging()
