"""The papers' numbers, from CSV files whose comment lines cite the paper and place."""

import pandas as pd

from detransformer.files import data_folder


def published(name: str) -> pd.DataFrame:
    """data/published/NAME.csv as a frame.

    Raises:
        ValueError: for an unknown name, listing the known ones.
    """
    folder = data_folder("published")
    path = folder / f"{name}.csv"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in folder.glob("*.csv")))
        raise ValueError(f"No published table {name!r} in {folder}; choose one of {known}.")
    return pd.read_csv(path, comment="#")


def published_claim(claim: str) -> float:
    """One value from the papers' running text, by its name in text_claims.csv."""
    claims = published("text_claims").set_index("claim")["value"]
    if claim not in claims.index:
        raise ValueError(f"No published claim {claim!r}; choose one of {', '.join(claims.index)}.")
    return float(claims[claim])
