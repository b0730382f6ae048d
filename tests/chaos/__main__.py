"""`python -m tests.chaos`: a serving cluster broken on purpose (`make chaos`, `make soak`) or loaded (`make load`)."""

import argparse
import functools
import signal
import sys
from collections.abc import Callable

import pandas as pd
import torch
from tests.chaos.faults import FAULTS
from tests.chaos.load import ONE_IN, run_load
from tests.chaos.rounds import NAMED_S, SERVED_S, made_by, run_chaos, summary
from tests.chaos.soak import LOAD, MAX_GROWTH, WARM, run_soak
from transformers.utils import logging

from detransformer.cluster.network import can_emulate
from detransformer.cluster.spec import ClusterSpec
from detransformer.machine import cpu_model, usable_cores
from detransformer.record.run import RunFolder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cluster", default="examples/jetsons.yaml")
    parser.add_argument("--faults", default=",".join(FAULTS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--soak", type=float, metavar="MINUTES", help="instead: load so long, a fault a minute")
    parser.add_argument("--load", type=float, metavar="MINUTES", help="instead: 30 clients over HTTP, no fault")
    parser.add_argument("--output", default="results/chaos")
    given = parser.parse_args()
    names = [] if given.load else given.faults.split(",")
    unknown = [name for name in names if name not in FAULTS]
    if unknown or given.rounds < 1:
        parser.error(f"faults are {', '.join(FAULTS)}, rounds 1 or more; not {', '.join(unknown) or given.rounds}")
    possible = {name: FAULTS[name].possible() for name in names}
    reasons = {name: why for name, (can, why) in possible.items() if not can}
    names = [name for name in names if name not in reasons]
    try:
        spec = ClusterSpec.load(given.cluster)
        if not spec.emulated:
            raise ValueError(f"{given.cluster} is of real hosts: give a file with `emulated: true`.")
        if not can_emulate()[0]:
            raise ValueError(f"{can_emulate()[1]}: run it as root.")
        if not names and not given.load:
            raise ValueError(f"none of these faults can be made here: {reasons}.")
    except ValueError as error:
        parser.error(str(error))
    note = on() + "".join(f" Not run: {name}, {why}." for name, why in reasons.items())
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # and so unwinds
    run = RunFolder(given.output)
    try:
        played = load if given.load else soak if given.soak else chaos
        held = played(spec, names, given, run, functools.partial(print, flush=True), note)
    except KeyboardInterrupt:
        kept = ": rounds that were played are kept, the same command goes on" if played is chaos else ""
        sys.exit(f"interrupted{kept}")
    print(run.load_table(played.__name__).to_markdown(index=False, floatfmt=".3g"))
    sys.exit(0 if held else 1)


def chaos(
    spec: ClusterSpec, names: list[str], given: argparse.Namespace, run: RunFolder, say: Callable, note: str
) -> bool:
    """All rounds, saved; whether everything was as promised."""
    note = f"Seconds: the longest of all rounds. Promised: named in {NAMED_S:g} s, served in {SERVED_S:g} s. {note}"
    kept = run.load_table("chaos_rounds").to_dict("records") if run.has_table("chaos_rounds") else []
    if kept:
        say(f"{len(kept)} rounds of an earlier call are kept; delete {run.tables}/chaos_rounds.csv to begin anew")

    def keep(rows: list[dict]) -> pd.DataFrame:
        return run.save_table(pd.DataFrame(rows), "chaos_rounds", note=note)

    rows = keep(run_chaos(spec, names, given.rounds, say, kept, keep))
    return bool(run.save_table(summary(rows), "chaos", note=note)["held"].all())


def soak(
    spec: ClusterSpec, names: list[str], given: argparse.Namespace, run: RunFolder, say: Callable, note: str
) -> bool:
    """The soak, saved; whether nothing was lost, wrong or answered twice, and memory stayed as it was."""
    samples, result = run_soak(spec, names, given.soak, say=say)
    note = (
        f"{given.soak:g} minutes, asked at {LOAD:.0%} of what it can answer undisturbed (answered: "
        f"{result['answered_per_s'] / result['capacity_per_s']:.0%}), a fault a minute. Growth: of memory, after the "
        f"first {WARM:.0%} of them; promised: {MAX_GROWTH:.0%} at most. {note}"
    )
    grown = max(result["front_growth"], result["devices_growth"]) > MAX_GROWTH
    result = {
        "minutes": given.soak,
        **result,
        "held": not (result["lost"] or result["wrong"] or result["twice"] or grown),
    }
    run.save_table(samples, "soak_samples", note=note)
    run.save_table(pd.DataFrame([result]), "soak", note=note)
    return result["held"]


def load(
    spec: ClusterSpec, names: list[str], given: argparse.Namespace, run: RunFolder, say: Callable, note: str
) -> bool:
    """The load, saved; whether no answer was wrong, and every malformed request was refused by the status it should."""
    row = run_load(given.cluster, given.load, say=say) | made_by()
    note = f"One request in {ONE_IN} malformed; latency is a client's, of requests that were answered. "
    note += f"On {cpu_model()}, {usable_cores()} cores; emulated devices at the pace of their presets."
    run.save_table(pd.DataFrame([row]), "load", note=note)
    return row["held"]


def on() -> str:
    return f"On {cpu_model()}, {usable_cores()} cores; emulated devices, computing as fast as that does."


if __name__ == "__main__":
    main()
