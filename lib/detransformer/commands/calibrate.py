"""`detransformer calibrate`: decouples a user's encoder and trains it with the original as the teacher."""

import dataclasses
import shutil
from pathlib import Path
from typing import Annotated, Literal

import typer

from detransformer.commands import options
from detransformer.files import with_home

MICRO_BATCH = 32  # sequences in one forward pass, at most

SeqLen = Annotated[int, typer.Option(min=8, max=512, help="Tokens per sequence.")]


def calibrate(
    teacher: Annotated[
        str, typer.Argument(parser=with_home, help="Folder of an encoder with its tokenizer, or minilm.")
    ],
    output: Annotated[
        Path, typer.Argument(parser=options.path, help="Folder to write the decoupled and trained model to.")
    ],
    num_original_layers: options.Layers = 4,
    num_divisions: options.Divisions = 4,
    attention_width: options.Width = "full",
    original_placement: options.Placement = "last",
    text: options.Texts = None,
    source: options.Source = "auto",
    tokens: Annotated[float, typer.Option(min=1, help="Tokens to train on, such as 1e6.")] = 1e6,
    steps: Annotated[int | None, typer.Option(min=1, help="Optimizer steps, instead of --tokens.")] = None,
    batch_size: options.Samples = 8,
    seq_len: SeqLen = 128,
    learning_rate: options.LearningRate = 1e-3,
    fit_sequences: Annotated[int, typer.Option(min=0, help="Sequences for the closed-form fit; 0: none.")] = 256,
    alone_share: Annotated[float, typer.Option(min=0, max=1, help="Share of steps that train layers alone.")] = 0.0,
    precision: Annotated[
        Literal["auto", "no", "bf16", "bf16-weights"], typer.Option(help="Precision of products; no is float32.")
    ] = "auto",
    seed: options.Seed = 0,
    force: options.Force = False,
) -> None:
    """Decouple an encoder and train it to compute what the original does; an interrupted run resumes.

    Until it is done, OUTPUT.work beside the output keeps its progress.
    """
    from detransformer.checkpoints import check_output
    from detransformer.models.configuration import decoupled_config, head_of, max_tokens
    from detransformer.opening import find_folder, open_checkpoint
    from detransformer.training import calibration
    from detransformer.training.config import ModelRow
    from detransformer.training.data.text import text_for

    structure = num_original_layers, num_divisions, attention_width, original_placement
    row = ModelRow("minilm", *structure)  # the name is a label: the sizes are the teacher's
    folder = find_folder(teacher)
    check_output(output, folder, force)
    opened = open_checkpoint(folder)
    if head_of(opened.config) not in calibration.TRAINED_HEADS:
        print(open_checkpoint(folder, head="base").note)
    if seq_len > max_tokens(opened.config):
        raise ValueError(f"--seq-len {seq_len} is above the model's {max_tokens(opened.config)} positions.")
    if not opened.decoupled:  # checks sizes before any text is read
        decoupled_config(opened.config, *structure)
    config = calibration.CalibrationConfig(
        num_steps=steps or max(1, round(tokens / (batch_size * seq_len))),
        seq_len=seq_len,
        global_batch_size=batch_size,
        micro_batch_size=max(size for size in range(1, MICRO_BATCH + 1) if batch_size % size == 0),
        learning_rate=learning_rate,
        fit_sequences=fit_sequences,
        alone_share=alone_share,
        mixed_precision=precision,
        checkpoint_every_s=120,
        seed=seed,
    )
    work = output.with_name(f"{output.name}.work")
    data = text_for(folder, text, source, work / "text")
    print(f"Text: {data.note}. Until it is done, {work} keeps the progress of an interrupted run.")
    untrained = dataclasses.replace(config, num_steps=0)
    started = calibration.calibrate(folder, row, untrained, data, work)
    result = calibration.calibrate(folder, row, config, data, work, started)
    calibration.save(result, folder, output)
    shutil.rmtree(work)
    print(
        f"Squared error of the last layer relative to the original's output, held-out text: {started.errors[-1]:.3f} "
        f"{started.stage}, {result.errors[-1]:.3f} trained on {result.tokens:,} tokens ({result.seconds:.0f} s); "
        f"cosine of the mean-pooled outputs {result.cosine:.3f}.\nWritten to {output}."
    )
