"""Imported by a nursery before it forks: makes the models known that a test has written."""

import os

from pipeline import models

models.__path__ = [*models.__path__, os.environ["TOY_MODELS"]]
