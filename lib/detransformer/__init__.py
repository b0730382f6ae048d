"""DeTransformer, reproduced: decoupled Transformers and block parallelism for inference over weak links.

Subpackages: `models` (decoupled and original models), `training`, `parallel` (strategies and their executor),
`planning` (profile, cost, placement), `cluster` (devices, links, emulation), `tables` (computed from saved rows).
"""

__version__ = "0.1.0"
