"""Tables, figures, verdicts and the page of a run, from saved tables alone; `explorer` predicts other settings."""
