"""Pre-trains a profile's rows from the command line, on one device or, by `accelerate launch`, on several.

    accelerate launch --num_processes 4 -m detransformer.training --profile paper --run-dir results/paper
    torchrun --nproc_per_node 2 -m detransformer.training --profile laptop --run-dir results/laptop   # without a GPU

The notebooks find the finished rows in the run folder and do not train them again.
"""

import sys
from importlib.resources import files
from pathlib import Path

import typer
import yaml

from detransformer.training import PretrainConfig, make_config, model_rows, open_data, pretrain_all, reduced_data


def main(
    profile: str = "quick", run_dir: Path = Path("results/local"), row: int | None = None, num_jobs: int = 1
) -> None:
    """Pre-train the rows of PROFILE into RUN_DIR/checkpoints; --row N takes the N-th row only (0 is the first)."""
    named = profile.endswith(".yaml")
    path = Path(profile) if named else Path(str(files("detransformer"))) / "profiles" / f"{profile}.yaml"
    if not path.is_file():
        raise ValueError(f"profile {profile!r} is unknown: choose quick, reference, laptop, paper or a YAML file.")
    section = yaml.safe_load(path.read_text(encoding="utf-8"))["02_pretraining"]
    rows = model_rows(section["rows"])
    if row is not None and not 0 <= row < len(rows):
        raise ValueError(f"row {row} is outside 0..{len(rows) - 1}: profile {profile} has {len(rows)} rows.")
    data = reduced_data(open_data(section["source"], cache_dir=run_dir / "cache"), section.get("vocab_size"))
    config = make_config(PretrainConfig, section["pretraining"])
    chosen = rows if row is None else rows[row : row + 1]
    for result in pretrain_all(chosen, config, data, run_dir / "checkpoints", num_jobs):
        typer.echo(f"{result.row.label}: validation loss {result.valid_loss:.4f} after {result.tokens:,} tokens")


if __name__ == "__main__":
    try:
        typer.run(main)
    except ValueError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(2)
