"""How decoupling changes a model, as rows: layer pattern, parameters, operations and output differences.

X [B, T, D]; D and O stand for decoupled and original layers (DATE 2024, Figs. 4 and 5).
"""

from collections.abc import Iterable, Sequence
from itertools import product

import pandas as pd
import torch
from transformers import BertConfig, BertModel

from detransformer.models.configuration import layer_kinds, preset_config
from detransformer.models.conversion import decouple
from detransformer.models.sizes import layer_flops, model_flops, model_parameters


def layer_pattern(config: BertConfig) -> str:
    """The layers first to last, e.g. `DDO DDO DDO DDO`: each group ends, or begins, with its original layer."""
    letters = "".join("O" if kind == "original" else "D" for kind in layer_kinds(config))
    placement = getattr(config, "original_placement", "last")
    spaced = {"last": "O ", "first": " O"}.get(placement, "O")
    return letters.replace("O", spaced).strip()


def size_rows(
    model: str,
    num_original_layers: Sequence[int | None],
    divisions: Sequence[int],
    attention_widths: Sequence[str],
    seq_lens: Sequence[int],
) -> pd.DataFrame:
    """Parameters and operations of every combination; Nb None is the original model, one row a sequence length.

    `layer_flops_ratio`: the operations of a decoupled layer over those of an original one; 1 for the original model.
    """
    rows, original = [], preset_config(model)
    for seq_len, count in product(seq_lens, num_original_layers):
        for division, width in product(divisions, attention_widths) if count is not None else [(None, None)]:
            config = original if count is None else preset_config(model, count, division, width)
            kind = "original" if count is None else "decoupled"
            of_layer, of_original = layer_flops(config, kind, seq_len), layer_flops(original, "original", seq_len)
            rows.append(
                {
                    "model": model,
                    "num_original_layers": count,
                    "num_divisions": division,
                    "attention_width": width,
                    "seq_len": seq_len,
                    "parameters": model_parameters(config),
                    "gflops": model_flops(config, seq_len) / 1e9,
                    "layer_flops_ratio": of_layer / of_original,
                }
            )
    return pd.DataFrame(rows).astype({"num_original_layers": "Int64", "num_divisions": "Int64"})


@torch.inference_mode()
def output_differences(config: BertConfig, variants: Iterable[tuple[int, int, str]], seed: int) -> pd.DataFrame:
    """Largest absolute output difference between a random original model and its decoupled variants (Nb, Ndiv, width).

    Same weights, non-zero biases, a batch of two with one request padded, float32, eval mode. Ndiv = 1 and all layers
    original must give the original's output; a real division must not, because sub-blocks no longer mix slices.
    """
    generator = torch.Generator().manual_seed(seed)
    original = BertModel(config).eval()
    for name, parameter in original.named_parameters():
        if name.endswith("bias"):
            parameter.normal_(std=0.02, generator=generator)
    ids = torch.randint(config.vocab_size, (2, 32), generator=generator)  # [B, T]
    mask = torch.ones_like(ids)
    mask[1, 16:] = 0
    expected = original(ids, attention_mask=mask).last_hidden_state  # [B, T, D]
    rows = []
    for num_original_layers, num_divisions, attention_width in variants:
        model = decouple(original, num_original_layers, num_divisions, attention_width)
        obtained = model(ids, attention_mask=mask).last_hidden_state
        rows.append(
            {
                "num_original_layers": num_original_layers,
                "num_divisions": num_divisions,
                "attention_width": attention_width,
                "parameters": sum(p.numel() for p in model.parameters()),
                "max_abs_error": (obtained - expected)[mask.bool()].abs().max().item(),
            }
        )
    return pd.DataFrame(rows)
