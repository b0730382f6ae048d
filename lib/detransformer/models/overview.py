"""How decoupling changes a model, as rows: layer pattern, parameters, operations and output differences.

X [B, T, D]; D and O stand for decoupled and original layers (DATE 2024, Figs. 4 and 5).
"""

from collections.abc import Iterable

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
    num_original_layers: Iterable[int | None],
    divisions: Iterable[int],
    attention_widths: Iterable[str],
    seq_lens: Iterable[int],
) -> pd.DataFrame:
    """Parameters and operations of every combination; Nb None is the original model, one row a sequence length.

    `layer_flops_ratio`: the operations of a decoupled layer over those of an original one; 1 for the original model.
    """
    rows = []
    for seq_len in seq_lens:
        original = preset_config(model)
        base = layer_flops(original, "original", seq_len)
        for count in num_original_layers:
            for division in divisions if count is not None else [None]:
                for width in attention_widths if count is not None else [None]:
                    config = original if count is None else preset_config(model, count, division, width)
                    kind = "original" if count is None else "decoupled"
                    rows.append(
                        {
                            "model": model,
                            "num_original_layers": count,
                            "num_divisions": division,
                            "attention_width": width,
                            "seq_len": seq_len,
                            "parameters": model_parameters(config),
                            "gflops": model_flops(config, seq_len) / 1e9,
                            "layer_flops_ratio": layer_flops(config, kind, seq_len) / base,
                        }
                    )
    return pd.DataFrame(rows).astype({"num_original_layers": "Int64", "num_divisions": "Int64"})


@torch.inference_mode()
def output_differences(
    config: BertConfig, variants: Iterable[tuple[int, int, str]], seq_len: int = 32, seed: int = 0
) -> pd.DataFrame:
    """Largest absolute output difference between a random original model and its decoupled variants (Nb, Ndiv, width).

    Same weights, non-zero biases, a batch of two with one request padded, float32, eval mode. Ndiv = 1 and all layers
    original must give the original's output; a real division must not, because sub-blocks no longer mix slices.
    """
    generator = torch.Generator().manual_seed(seed)
    original = BertModel(config).eval()
    for name, parameter in original.named_parameters():
        if name.endswith("bias"):
            parameter.normal_(std=0.02, generator=generator)
    ids = torch.randint(config.vocab_size, (2, seq_len), generator=generator)  # [B, T]
    mask = torch.ones_like(ids)
    mask[1, seq_len // 2 :] = 0
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
