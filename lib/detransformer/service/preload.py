"""What a device's fork server imports: all that its workers need, kept out of their garbage collections.

A collection writes into every object that it looks at, and so copies what a worker shares with the fork server: tens of
MiB a worker, at times of its own.
"""

import gc

from detransformer.service import worker  # noqa: F401

gc.collect()
gc.freeze()
