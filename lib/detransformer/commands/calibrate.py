"""`detransformer calibrate` and `evaluate`: a BERT checkpoint of one's own, decoupled with itself as the teacher."""

import shutil
import tempfile
from pathlib import Path
from typing import Annotated, Literal

import typer

from detransformer.commands import options
from detransformer.parallel.wire import WIRE_FORMATS

MICRO_BATCH = 32  # sequences in one forward pass, at most
MAX_VALID_TOKENS = 200_000

SeqLen = Annotated[int, typer.Option(min=8, max=512, help="Tokens of a sequence.")]


def calibrate(
    teacher: Annotated[Path, typer.Argument(help="Folder of a BERT checkpoint with its masked-LM head and tokenizer.")],
    output: Annotated[Path, typer.Argument(help="Folder to write the decoupled and trained model to.")],
    num_original_layers: options.Layers = 4,
    num_divisions: options.Divisions = 4,
    attention_width: options.Width = "full",
    original_placement: options.Placement = "last",
    text: options.Texts = None,
    source: options.Source = "auto",
    steps: options.Steps = 2000,
    batch_size: options.Samples = 64,
    seq_len: SeqLen = 128,
    learning_rate: options.LearningRate = 2e-4,
    ce_weight: Annotated[float, typer.Option(help="Of the masked tokens' cross-entropy.")] = 1,
    kl_weight: Annotated[float, typer.Option(help="Of the divergence from the teacher's probabilities; 0: none.")] = 1,
    hidden_weight: Annotated[float, typer.Option(help="Of the error of the original layers' outputs; 0: none.")] = 1,
    temperature: Annotated[float, typer.Option(help="By which logits are divided in the divergence.")] = 2,
    precision: Annotated[
        Literal["auto", "no", "bf16", "bf16-weights"], typer.Option(help="Of the products; no is float32.")
    ] = "auto",
    seed: options.Seed = 0,
    force: options.Force = False,
) -> None:
    """Decouple a BERT checkpoint and train it on, with the original as its teacher; interrupted, it goes on.

    While it trains, OUTPUT.work beside the output holds what it goes on from.
    """
    from detransformer.checkpoints import check_output, read_config
    from detransformer.models.configuration import check_decoupling
    from detransformer.training import distillation
    from detransformer.training.config import ModelRow, PretrainConfig
    from detransformer.training.data.text import text_for

    structure = num_original_layers, num_divisions, attention_width, original_placement
    row = ModelRow("bert-base", *structure)  # a name that nothing is built from: the sizes are the teacher's
    config = distillation.CalibrationConfig(
        PretrainConfig(
            num_steps=steps,
            seq_len=seq_len,
            global_batch_size=batch_size,
            micro_batch_size=max(size for size in range(1, MICRO_BATCH + 1) if batch_size % size == 0),
            optimizer="adamw",
            learning_rate=learning_rate,
            warmup=0.1,
            decay_power=1.0,
            dropout=0.0,  # text is hardly seen twice
            max_train_tokens=steps * batch_size * seq_len,
            max_valid_tokens=MAX_VALID_TOKENS,
            mixed_precision=precision,
            seed=seed,
        ),
        ce_weight=ce_weight,
        kl_weight=kl_weight,
        hidden_weight=hidden_weight,
        temperature=temperature,
    )
    check_output(output, teacher, force)
    if not teacher.is_dir():
        raise ValueError(f"{teacher} is no folder; give one of a BERT checkpoint.")
    sizes = read_config(str(teacher))
    if seq_len > sizes.get("max_position_embeddings", 512):
        raise ValueError(f"--seq-len {seq_len} is above the model's {sizes['max_position_embeddings']} positions.")
    if sizes["model_type"] == "bert":  # said before any text is read
        check_decoupling(
            *(sizes[name] for name in ("hidden_size", "num_hidden_layers", "num_attention_heads")), *structure
        )
    work = output.with_name(f"{output.name}.work")
    data = text_for(teacher, text, source, work / "text")
    print(f"Text: {data.note}. Until it is done, {work} holds what an interrupted run goes on from.")
    result = distillation.calibrate(teacher, row, config, data, work)
    distillation.save(result, teacher, output)
    shutil.rmtree(work)
    print(
        f"Loss of a masked token, held-out text: {result.sliced_valid_loss:.3f} sliced, {result.valid_loss:.3f} "
        f"calibrated ({result.method}, {result.tokens:,} tokens, {result.seconds:.0f} s), "
        f"{result.teacher_valid_loss:.3f} the teacher's, {result.unigram_loss:.3f} word frequencies alone.\n"
        f"Written to {output}."
    )


def evaluate(
    checkpoint: Annotated[Path, typer.Argument(help="Folder of a BERT or decoupled BERT with its masked-LM head.")],
    text: options.Texts = None,
    source: options.Source = "auto",
    seq_len: SeqLen = 128,
    max_tokens: Annotated[int, typer.Option(min=8, help="Held-out text read, at most.")] = MAX_VALID_TOKENS,
    wire: Annotated[
        Literal[WIRE_FORMATS] | None, typer.Option(help="Also with messages of four devices in this format.")
    ] = None,
) -> None:
    """Held-out loss and perplexity of a pre-trained model, e.g. results/reference/models/bert-base-nb4-ndiv4."""
    from detransformer.training.data.text import text_for
    from detransformer.training.evaluation import held_out_loss, load_masked_lm

    model = load_masked_lm(checkpoint)
    with tempfile.TemporaryDirectory() as cache:
        data = text_for(checkpoint, text, source, Path(cache))
        print(f"Text: {data.note}.")
        for name in ("", wire) if wire else ("",):
            found = held_out_loss(model, data, seq_len, max_tokens, name)
            how = f"{name} messages between four devices" if name else "exact"
            print(
                f"{how}: {found['loss']:.4f} nats a masked token, perplexity {found['perplexity']:.1f} "
                f"({found['tokens']:,} tokens)"
            )
