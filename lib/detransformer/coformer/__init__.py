"""CoFormer (2025): a large transformer decomposed into sub-models that run side by side and are aggregated.

`policy` holds the sizes and constraints of sub-models, `sampling` draws policies, `predictor` prices them, `evaluator`
and `search` find a good one; `decomposer` cuts the sub-models out of the large model's weights, `booster` calibrates
them, `fusion` trains the aggregator, and `calibration` does these three in order. `ensemble` keeps the result in a
folder, and `distributed` runs it on a cluster. Importing the package makes the AutoModel classes know the sub-models.
"""

import detransformer.coformer.submodels  # noqa: F401  (AutoModel knows sub-models)
