"""`detransformer decouple`: converts a checkpoint by slicing its weights."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from detransformer.commands import options
from detransformer.files import with_home
from detransformer.presets import HEADS


def decouple(
    checkpoint: Annotated[
        str, typer.Argument(parser=with_home, help="Folder of a checkpoint, its name on the Hub, or minilm.")
    ],
    output: Annotated[Path, typer.Option(parser=options.path, help="Folder to write the decoupled checkpoint to.")],
    num_original_layers: options.Layers = 4,
    num_divisions: options.Divisions = 4,
    attention_width: options.Width = "full",
    original_placement: options.Placement = "last",
    head: Annotated[Literal[HEADS], typer.Option(help="auto is the head that the checkpoint was saved with.")] = "auto",
    force: options.Force = False,
) -> None:
    """Convert a checkpoint to a decoupled one by slicing its weights."""
    from detransformer.checkpoints import decouple_checkpoint

    sizes = num_original_layers, num_divisions, attention_width
    decouple_checkpoint(checkpoint, output, *sizes, head, force, original_placement=original_placement)
