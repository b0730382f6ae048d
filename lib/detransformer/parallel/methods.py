"""The methods by name, as tables list them, with their strategy for original layers. Strings only."""

# A method's strategy for original layers; decoupled layers have one of their own.
ORIGINAL_LAYER_STRATEGY = {
    "single": "replicate",
    "dp": "replicate",
    "pp": "replicate",  # EdgeShard's form of a pipeline
    "tp": "tensor",
    "sp": "sequence",
    "ulysses": "ulysses",
    "galaxy": "galaxy",
    "dtensor": "tensor",  # PyTorch's own implementation of TP, run by `parallel.dtensor`
    "bp+tp": "tensor",
    "bp+sp": "sequence",
    "bp+allgather": "replicate",
    "bp+ulysses": "ulysses",
    "bp+heads": "heads",
}
PAPER_METHODS = ("bp+tp", "bp+sp", "bp+allgather")  # the paper's Plans 1 to 3 (Section III-C)
DIRECT_METHODS = ("bp+ulysses", "bp+heads")  # reshard by one all_to_all, unlike the published plans
BLOCK_METHODS = (*PAPER_METHODS, *DIRECT_METHODS)
# Chosen by the planner: `auto` is the best plan for the unmodified model; for the decoupled model `bp+paper` is the
# best of the paper's three plans, `bp+auto` the best of all, `bp+narrow` the paper's best with the smaller sub-block
# that the authors' released code times.
PLANNED_METHODS = ("auto", "bp+paper", "bp+auto", "bp+narrow")
_UNMODIFIED = tuple(method for method in ORIGINAL_LAYER_STRATEGY if method not in BLOCK_METHODS)
METHODS = (*_UNMODIFIED, "auto", *BLOCK_METHODS, *PLANNED_METHODS[1:])  # as tables list them
SHARDS_LAYERS = ("tp", "sp", "ulysses", "galaxy", "dtensor")  # only for models without decoupled layers
