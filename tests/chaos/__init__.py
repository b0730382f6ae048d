"""A service that is broken on purpose: faults, rounds of them under load, a soak. `python -m tests.chaos --help`."""
