"""The study of notebook 15: architectures for slow links, trained alike, with bytes and latency of a request.

All have GPT-2's layer, LayerNorm before attention and FFN. As decoders they are trained on the next token, as encoders,
whose tokens attend to all others, on masked tokens. Every row starts from the same seeded weights and sees the same
text.
"""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd
import torch
from transformers import AutoModel, GPT2Config, GPT2LMHeadModel, PretrainedConfig, PreTrainedModel

from detransformer import training
from detransformer.cluster.devices import cluster_profile, device_specs
from detransformer.models.configuration import config_fields, decoupled_config
from detransformer.models.sync_gpt2 import SyncGPT2Config, synced
from detransformer.parallel.plan import layer_plan, strategies_for
from detransformer.planning.cost import Prediction, predict
from detransformer.planning.placement import CHUNKS, place_freely
from detransformer.planning.profile import ClusterProfile
from detransformer.record.intervals import around
from detransformer.tables.accuracy import compared
from detransformer.training.data.packing import SpecialTokens

ORIGINAL = "original"  # the row to which all others are compared
REPORTED = (  # of a `training.Result`
    *("seed", "valid_loss", "unigram_loss", "num_steps", "tokens", "valid_tokens", "hidden_size", "seconds"),
    *("precision", "source", "note"),
)
SEQ_LEN = 128
BERT_BASE = {"num_layers": 12, "hidden_size": 768, "num_heads": 12, "vocab_size": 30522, "seq_len": 512}


@dataclass(frozen=True)
class ArchitectureRow(training.ModelRow):
    """A row that is the original, decoupled, or one of `models.sync_gpt2`, with `sync` and its settings.

    Args:
        name: its name in tables.
        sync, fuse_every, shared_fraction: as in `SyncGPT2Config`, with four parts.
    """

    name: str = ORIGINAL
    sync: str | None = None
    fuse_every: int | None = None
    shared_fraction: float = 0.0

    @property
    def key(self) -> str:
        return "".join(letter if letter.isalnum() else "-" for letter in self.name)

    @property
    def label(self) -> str:
        return self.name

    @property
    def _sync(self) -> dict:
        return {name: getattr(self, name) for name in ("sync", "fuse_every", "shared_fraction")}

    def config_of(self, original: GPT2Config) -> PretrainedConfig:
        """The configuration of this row's model, made from an original one."""
        if self.sync is not None:
            return SyncGPT2Config(**config_fields(original) | self._sync)
        return original if self.is_original else decoupled_config(original, *self.structure)

    def made_of(self, model: GPT2LMHeadModel) -> PreTrainedModel:
        made = super().made_of(model) if self.sync is None else synced(model, **self._sync)
        for layer in made.transformer.h:  # transformers' own layers assume that every decoder is causal
            layer.attn.is_causal = getattr(made.config, "is_causal", True)
        return made


@dataclass(frozen=True, kw_only=True)
class ArchitectureRecipe(training.CausalConfig):
    """`CausalConfig`, or with `masked` training on masked tokens of a model that attends to all tokens."""

    masked: bool = False

    @property
    def predicts_next(self) -> bool:
        return not self.masked

    def original_config(self, model: str, vocab_size: int, special: SpecialTokens) -> GPT2Config:
        config = super().original_config(model, vocab_size, special)
        config.is_causal = not self.masked
        return config


def architecture_rows(architectures: Mapping[str, Mapping]) -> list[ArchitectureRow]:
    """The rows of a profile's mapping from names to an `ArchitectureRow`'s other fields."""
    return [ArchitectureRow(model="gpt2", name=name, **fields) for name, fields in architectures.items()]


# Training ---------------------------------------------------------------------------------------------------------


def train_architectures(
    folder: str | Path,
    rows: Sequence[ArchitectureRow],
    recipe: ArchitectureRecipe,
    data: training.TrainingData,
    seeds: Iterable[int],
    objectives: Sequence[str],
) -> Iterable[dict]:
    """Trains every row, by seed, then by objective ("causal" or "masked"); finished rows are read back.

    Yields for each the model, its training data, and its held-out loss in nats per predicted token.
    """
    for seed, objective, row in itertools.product(seeds, objectives, rows):
        config = replace(recipe, seed=seed, masked=objective == "masked")
        result = training.pretrain(row, config, data, Path(folder) / f"{objective}-{seed}")
        yield {"architecture": row.name, "objective": objective} | {name: getattr(result, name) for name in REPORTED}


def compared_losses(runs: pd.DataFrame) -> pd.DataFrame:
    """One row an objective and architecture: mean loss over seeds, and its difference to the original's by seed.

    low and high are two standard errors of the difference on each side; with one seed there are none.
    """
    rows = []
    for (objective, name), group in runs.groupby(["objective", "architecture"], sort=False):
        losses = group.set_index("seed")["valid_loss"]
        known = runs[(runs["objective"] == objective) & (runs["architecture"] == ORIGINAL)].set_index("seed")
        common = losses.index.intersection(known.index)
        made = compared(losses[common], known.loc[common, "valid_loss"])
        low, high = around(made["difference"], made["difference_std_error"])
        below = (known.loc[common, "unigram_loss"] - losses[common]).mean()
        rows.append({"objective": objective, "architecture": name, "valid_loss": made["mean"]} | made)
        rows[-1] |= {"low": low, "high": high, "below_unigram": below}
    return pd.DataFrame(rows).drop(columns="mean")


# Prices -----------------------------------------------------------------------------------------------------------


def cost_rows(
    rows: Sequence[ArchitectureRow], recipe: ArchitectureRecipe, bandwidths_mbps: Sequence[float]
) -> pd.DataFrame:
    """Bytes and latency of each architecture's fastest plan over four devices, at the trained size and at BERT-Base's.

    One row an architecture, size and bandwidth. A request is 128 tokens of an encoder; all is predicted by the
    roofline pace, since the efficiency of small shares was not measured for all strategies. The original is there
    twice: with any strategies, and with tensor parallelism alone, on which the new ones are built. `alone_s` is the
    original on one device.
    """
    specs, found = device_specs(4, "rpi4b"), []
    for size, scaled in (("trained", recipe), ("BERT-Base", replace(recipe, **BERT_BASE))):
        original = scaled.original_config("gpt2", scaled.vocab_size, SpecialTokens(0, 1, 2, 3))
        original.is_causal = False
        for row, mbps in itertools.product(rows, bandwidths_mbps):
            config = row.config_of(original)
            profile = cluster_profile(specs, config, mbps * 1e6, pace="roofline")
            _, alone = _fixed(original, cluster_profile(specs[:1], original, mbps * 1e6, pace="roofline"))
            with torch.device("meta"):
                parameters = AutoModel.from_config(config).num_parameters()
            common = {"size": size, "bandwidth_mbps": mbps, "parameters": parameters, "alone_s": alone.latency_s}
            choose = _free if row.sync is None else _fixed
            planned = {row.name: choose(config, profile)}
            if row.name == ORIGINAL:
                planned[f"{ORIGINAL}, tensor parallel"] = _fixed(config, profile)
            found += [common | _price(name, *plan) for name, plan in planned.items()]
    return pd.DataFrame(found)


def _free(config: PretrainedConfig, profile: ClusterProfile) -> tuple[str, Prediction]:
    """The fastest plan of any strategies that uses all devices."""
    listed = place_freely(config, profile, SEQ_LEN).alternatives
    best = next(found for found in listed if found.plan.num_devices == len(profile.devices))
    return best.plan.describe(), best.prediction


def _fixed(config: PretrainedConfig, profile: ClusterProfile) -> tuple[str, Prediction]:
    """The fastest number of chunks with a layer's only strategy, or with tensor parallelism."""
    speeds, strategies = [1.0] * len(profile.devices), strategies_for(config, "tensor")
    plans = [layer_plan("tp", config, strategies, speeds, num_chunks=count) for count in CHUNKS]
    priced = [(plan.describe(), predict(config, plan, profile, SEQ_LEN)) for plan in plans]
    return min(priced, key=lambda pair: pair[1].latency_s)


def _price(name: str, plan: str, prediction: Prediction) -> dict:
    return {
        "architecture": name,
        "plan": plan,
        "latency_s": prediction.latency_s,
        "compute_s": prediction.compute_s,
        "messages": sum(prediction.counts.values()),
        "sent_bytes": sum(prediction.bytes.values()),
        "weights_bytes": max(prediction.weights_bytes),
    }


def beside_losses(costs: pd.DataFrame, losses: pd.DataFrame) -> pd.DataFrame:
    """Costs with the losses of the same architecture; the original's two plans have the same loss."""
    known = costs.assign(trained=costs["architecture"].str.removesuffix(", tensor parallel"))
    return known.merge(losses.rename(columns={"architecture": "trained"}), on="trained").drop(columns="trained")
