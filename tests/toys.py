"""Makes the models known that a test has written; imported by a nursery before it forks."""

import os

from pipeline import models

models.__path__ = [*models.__path__, os.environ["TOY_MODELS"]]
