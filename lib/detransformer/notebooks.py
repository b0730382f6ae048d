"""Finds the numbered notebooks of a clone and executes them with papermill."""

import json
import logging
import os
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import nbformat

from detransformer.files import atomic_write
from detransformer.kernels import COMMAND, VARIABLES, forking_process
from detransformer.profiles import built_in_profiles
from detransformer.record.run import RunFolder
from detransformer.settings import named_folders

KERNEL = "detransformer"
# Notebook -> the notebooks whose results (models, the profile of operations, tables) it reads; it reruns after them.
USES = {
    "05_placement": ("04_profiling",),
    "06_latency": ("04_profiling",),
    "07_peers": ("04_profiling", "06_latency"),
    "08_scaling": ("06_latency",),
    "09_adaptive": ("04_profiling",),
    "10_generation": ("04_profiling",),
    "12_comparison": ("02_pretraining", "11_decomposition"),
    "13_aggregation": ("02_pretraining", "12_comparison"),
    "14_slow_links": ("04_profiling",),
    "16_summary": ("02_pretraining", "03_accuracy", "06_latency", "07_peers"),
}


class NotebookFailed(Exception):
    """A cell of a notebook raised, or its kernel died; the message is one paragraph for the user."""


def find_notebooks(root: Path) -> list[Path]:
    """The numbered notebooks of the clone at `root`, in order."""
    return sorted((root / "notebooks").glob("[0-9][0-9]_*.ipynb"))


def select_notebooks(notebooks: list[Path], only: Iterable[str]) -> list[Path]:
    """The notebooks that `only` names ("06", "6" or "06_latency"), in order; all if `only` is empty."""
    wanted = set()
    for word in only:
        found = {path for path in notebooks if path.stem == word or path.stem.startswith(f"{word.zfill(2)}_")}
        if not found:
            raise ValueError(f"--only {word} names no notebook; choose from {', '.join(p.stem for p in notebooks)}.")
        wanted |= found
    return sorted(wanted) or notebooks


def execute(notebook: Path, run: RunFolder, root: Path, profile: str, measure: bool = True, title: str = "") -> None:
    """Executes one notebook in a new kernel and saves the executed copy in the run.

    The values of its parameters cell are replaced by the run's folder, the profile and `measure`. A measuring notebook
    is saved after each cell, so that a failed one keeps its finished cells. A notebook that only draws (`measure`
    False) replaces the run's copy after its last cell has succeeded.

    Raises:
        NotebookFailed: naming the notebook, the cell and the error.
    """
    import papermill  # slow to import
    from nbclient.exceptions import DeadKernelError
    from papermill.exceptions import PapermillExecutionError

    logging.getLogger("papermill").setLevel(logging.ERROR)
    parameters = {"run_dir": _seen_from(notebook.parent, run.path, root), "profile": profile, "measure": measure}
    if profile not in built_in_profiles():
        parameters["profile"] = _seen_from(notebook.parent, Path(profile), root)
    target = run.notebooks / notebook.name
    bar = {"desc": title, "file": sys.stderr}
    if not sys.stderr.isatty():
        bar |= {"mininterval": 20, "ascii": True, "ncols": 100}  # a log wants few lines
    try:
        with this_interpreter():
            executed = papermill.execute_notebook(
                _literal(notebook),
                _literal(target) if measure else None,
                parameters=parameters,
                cwd=notebook.parent,
                kernel_name=KERNEL,
                language="python",
                request_save_on_cell_execute=measure,
                progress_bar=bar if measure else False,
                coalesce_streams=True,  # keep a progress bar's last line only
            )
    except PapermillExecutionError as error:
        reason = f"{error.ename}: {error.evalue}".strip(": ")
        raise NotebookFailed(_failure(notebook, target, f"in code cell {error.exec_count}: {reason}")) from error
    except (DeadKernelError, RuntimeError) as error:  # RuntimeError: the kernel died before it was ready
        reason = f"because its kernel died, most often for lack of memory: {error}"
        raise NotebookFailed(_failure(notebook, target, reason)) from error
    except (KeyboardInterrupt, SystemExit):
        logging.getLogger("asyncio").setLevel(logging.CRITICAL)  # tasks that waited for the kernel fail as it ends
        raise
    executed.metadata["papermill"].update(input_path=notebook.name, output_path=notebook.name)
    with atomic_write(target) as file:
        file.write(nbformat.writes(executed).replace(str(root), ".") + "\n")  # no absolute paths


@contextmanager
def this_interpreter() -> Iterator[None]:
    """Makes the kernel `KERNEL` run this interpreter; its spec lies in a temporary folder.

    Its connection and IPython's own files go there too: a home folder may be read-only, or have start-up files.
    """
    env = dict(VARIABLES)
    for name, path in named_folders().items():  # resolved here: a kernel runs in notebooks/
        env[name] = str(path).replace("$", "$$")  # a spec expands ${NAME}
    argv = [*COMMAND, f"{forking_process().name}/kernels", "-f", "{connection_file}"]
    argv.append("--IPKernelApp.log_level=50")  # no warnings about its own sockets
    spec = {"argv": argv, "env": env, "display_name": KERNEL, "language": "python"}
    places = ("JUPYTER_PATH", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR")
    before = {name: os.environ[name] for name in places if name in os.environ}
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder, "kernels", KERNEL)
        place.mkdir(parents=True)
        (place / "kernel.json").write_text(json.dumps(spec), encoding="utf-8")
        os.environ |= dict.fromkeys(places, folder)
        try:
            yield
        finally:
            for name in places:
                del os.environ[name]
            os.environ |= before


def _literal(path: Path) -> str:
    """`path` escaped for papermill, which expands braces."""
    return str(path).replace("{", "{{").replace("}", "}}")


def _seen_from(folder: Path, path: Path, root: Path) -> str:
    """The absolute path; inside the clone relative to `folder`, so that an executed notebook has no absolute path."""
    whole = path.resolve()
    return os.path.relpath(whole, folder) if whole.is_relative_to(root.resolve()) else str(whole)


def _failure(notebook: Path, target: Path, reason: str) -> str:
    reason = " ".join(reason.split())
    reason = reason if len(reason) <= 600 else reason[:600] + " ..."
    return (
        f"Notebook {notebook.stem} stopped {reason}\n"
        f"Finished work is kept, the cells run so far are in {shown(target)}, "
        f"and the same command continues from {notebook.stem}."
    )


def shown(path: Path) -> str:
    """`path`, relative to the current directory if it lies below."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)
