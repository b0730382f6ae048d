"""The papers' values, the one rule that judges ours against them, and the record of a run."""
