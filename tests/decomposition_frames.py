"""Rows of notebook 09 made up by small rules, for the tests of its tables and figures."""

import numpy as np
import pandas as pd

from detransformer.coformer import studies


def predictor_points() -> pd.DataFrame:
    latency = np.linspace(0.01, 0.1, 12)
    rows = []
    for device, kind in (("tx2", "modelled"), (studies.HOST, "measured")):
        for name, error in (*((name, 0.002) for name in studies.FEATURES), (studies.LINE, 0.001)):
            made = dict(device=device, kind=kind, predictor=name, latency_s=latency, predicted_s=latency + error)
            rows.append(pd.DataFrame(made | dict(spread_s=0.0, num_train=36, whole_s=0.1, source="test")))
    return pd.concat(rows, ignore_index=True)


def proxy_points(count: int = 16) -> pd.DataFrame:
    rng = np.random.default_rng(0)
    error = rng.uniform(60, 90, count)
    made = dict(number=range(count), error_alone=error, error_together=error - 4, loss=error / 20)
    made |= dict(probe_error=error + rng.normal(0, 2, count), loss_after_steps=error / 25, log_flops=-error)
    made |= {f"seconds_{name}": 0.1 for name in studies.PROXIES}
    return pd.DataFrame(made).assign(seconds_calibration=3.0, num_steps=20, few_steps=2)


def search_history() -> pd.DataFrame:
    rows = []
    for seed in range(10):
        for method, end in (("bayesian", 4.0), (studies.FITTED, 3.9), ("random", 4.2), ("uniform", 4.4)):
            best = np.linspace(5, end + 0.01 * seed, 8)
            made = dict(method=method, seed=seed, evaluation=range(8), objective=best, best_objective=best)
            latency = 0.03 if method == "uniform" else 0.02
            rows.append(pd.DataFrame(made | dict(best_loss=best - 0.1, best_latency_s=latency)))
    return pd.concat(rows, ignore_index=True)


def policy_rows() -> pd.DataFrame:
    rows = []
    for method, waits in (("bayesian", (1.0, 0.0, 2.0)), ("uniform", (0.0, 8.0, 7.0))):
        for device, wait in zip(("nano", "tx2", "orin"), waits, strict=True):
            made = dict(method=method, device=device, backbone_ms=10 - wait, send_ms=0.5, idle_ms=wait)
            rows.append(made | dict(flops_share=0.1, aggregate_ms=0.0))
    return pd.DataFrame(rows)


def decomposition_frames() -> dict[str, pd.DataFrame]:
    points, proxies, history = predictor_points(), proxy_points(), search_history()
    made = dict(predictor_points=points, predictor=studies.predictor_table(points), proxy_points=proxies)
    made |= dict(proxy=studies.proxy_table(proxies, num_resamples=200), search_history=history)
    return made | dict(search=studies.search_table(history), policies=policy_rows())
