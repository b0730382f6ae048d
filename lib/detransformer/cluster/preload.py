"""Imported by a host's fork server: loads all that its workers need, and keeps it out of their garbage collections.

A collection writes into every object that it visits, and so copies the pages that a worker shares with the fork server.
The model's digests are computed here once; every worker inherits them.
"""

import contextlib
import gc
import os

from detransformer.cluster import answering, worker  # noqa: F401
from detransformer.cluster.hello import model_facts

if folder := os.environ.get("DETRANSFORMER_PRELOADED_MODEL"):
    with contextlib.suppress(ValueError):  # the worker reports what is wrong with the model
        model_facts(folder)
gc.collect()
gc.freeze()
