"""What a host's fork server imports: all that its workers need, kept out of their garbage collections.

A collection writes into every object that it looks at, and so copies what a worker shares with the fork server: tens of
MiB a worker, at times of its own. The model's digests are taken here once, and are known to all workers.
"""

import contextlib
import gc
import os

from detransformer.cluster import answers, worker  # noqa: F401
from detransformer.cluster.facts import model_facts

if folder := os.environ.get("DETRANSFORMER_PRELOADED_MODEL"):
    with contextlib.suppress(ValueError):  # the worker says what is wrong with it
        model_facts(folder)
gc.collect()
gc.freeze()
