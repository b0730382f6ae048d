"""What decoupling and compressing cost in accuracy, in sentences that cite the saved table and row."""

import pandas as pd

from detransformer.files import repository_root
from detransformer.record.run import RunFolder
from detransformer.tables.claims import WORDS, longest_trainings


def saved_tables() -> RunFolder | None:
    """The committed run of this clone; None without a clone or run."""
    try:
        folder = repository_root() / "results" / "reference"
    except FileNotFoundError:
        return None
    return RunFolder(folder) if folder.is_dir() else None


def decoupling_costs(run: RunFolder | None, original_share: float) -> list[str]:
    """Sentences on the share of the original's scores that a decoupled model keeps, and that fewer layers keep.

    `original_share`: the fraction of layers that stay original; the sentences cite the saved row nearest to it.
    """
    if run is None or not run.has_table("kept"):  # saved after the other two
        return ["No saved table says what decoupling costs; run notebook 03."]
    rows, probes, trained = (run.load_table(name) for name in ("kept", "probes", "calibration"))
    sizes = trained.loc[trained["stage"] == "trained", ["row", "num_original_layers", "num_layers"]].drop_duplicates()
    models = longest_trainings(rows).merge(sizes.rename(columns={"row": "structure"}), on="structure")
    probed, tuned = (models[models["how"] == how] for how in ("probe", "fine-tuned"))
    distance = (probed["num_original_layers"] / probed["num_layers"] - original_share).abs()
    row = probed.loc[distance.idxmin()]
    name, words = row["row"], rows[(rows["row"] == WORDS) & (rows["how"] == "probe")]["share"]
    counting = f"; counting words keeps {words.iloc[0]:.0f}%" if len(words) else ""
    sentences = [
        f"Nearest row, {name!r}: {row['share']:.0f}% ({row['low']:.0f} to {row['high']:.0f}) of the original's mean "
        f"over {row['tasks']}{counting} (table kept)."
    ]
    for probe in probes[(probes["row"] == name) & (probes["task"] == "retrieval@1")].itertuples():
        low, high = probe.difference_low, probe.difference_high
        sentences.append(
            f"The same row: retrieval@1 {probe.difference:+.1f} points ({low:+.1f} to {high:+.1f}) (table probes)."
        )
    for each in tuned.itertuples():
        sentences.append(
            f"Fine-tuned, row {each.row!r}: {each.share:.0f}% ({each.low:.0f} to {each.high:.0f}) of the original's "
            f"mean over {each.tasks} (table kept)."
        )
    for fewer in probed[probed["num_original_layers"].isna()].itertuples():
        sentences.append(
            f"Fewer layers instead, row {fewer.row!r}: {fewer.share:.0f}% ({fewer.low:.0f} to {fewer.high:.0f}) of the "
            "probes' mean (table kept); see notebook 03 before you decouple."
        )
    return sentences


def compression_costs(run: RunFolder | None, wire: str, is_decoupled: bool) -> list[str]:
    """Sentences on what messages in format `wire` cost an original or a decoupled model."""
    rows, sentences = _rows(run, "wire_accuracy"), []
    if len(rows):
        alike = rows[(rows["wire"] == wire) & (rows["num_original_layers"].notna() == is_decoupled)]
        for name, part in alike.groupby("row", sort=False):
            worst = part.loc[part["change"].abs().idxmax()]
            sentences.append(
                f"Nearest row, {name!r} in {wire}: {worst['change']:+.2f} points at most, on {worst['task']}; a model "
                "of width 128, at chance in most tasks (table wire_accuracy)."
            )
    rows = _rows(run, "wire_probes")
    if len(rows) and not is_decoupled:
        for row in rows[rows["row"].str.endswith(f" {wire}") & (rows["task"] == "retrieval@1")].itertuples():
            sentences.append(
                f"Row {row.row!r}: retrieval@1 {row.difference:+.1f} points ({row.difference_low:+.1f} to "
                f"{row.difference_high:+.1f}) (table wire_probes)."
            )
    return sentences or [f"No saved table says what messages in {wire} cost such a model."]


def _rows(run: RunFolder | None, name: str) -> pd.DataFrame:
    return run.load_table(name) if run and run.has_table(name) else pd.DataFrame()
