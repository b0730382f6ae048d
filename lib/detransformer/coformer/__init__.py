"""CoFormer (2025): a large transformer decomposed into sub-models that run side by side and are aggregated.

`policy` holds the sizes and constraints of sub-models, `sampling` draws policies, `predictor` prices them, `search`
finds a good one. `decomposer` cuts the sub-models out of the large model's weights, `booster` calibrates them, and
`calibration` does both and trains the aggregator on their `outputs`. `ensemble` keeps the result in a folder,
`distributed` runs it on a cluster, `ensemble_requests` answers `detransformer run`. Importing the package registers the
sub-models with the AutoModel classes.
"""

import detransformer.coformer.submodels  # noqa: F401  (AutoModel knows sub-models)
