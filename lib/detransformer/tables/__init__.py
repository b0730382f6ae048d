"""The papers' tables computed from saved rows, and the style of all the notebooks' figures."""
