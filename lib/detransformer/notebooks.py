"""Finds the numbered notebooks of a clone and executes them with papermill."""

import logging
import os
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import nbformat

from detransformer.files import atomic_write
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


@dataclass(frozen=True)
class Notebook:
    """One notebook, the names in its parameters cell, and the section of settings that the profile gives it."""

    path: Path
    names: tuple[str, ...]
    settings: dict

    @property
    def name(self) -> str:
        return self.path.stem

    @property
    def uses(self) -> tuple[str, ...]:
        return USES.get(self.name, ())

    def parameters(self, **values: object) -> dict:
        """The values that papermill injects: those of the settings and of `values` that the parameters cell names."""
        return {name: value for name, value in (self.settings | values).items() if name in self.names}


def find_notebooks(root: Path, sections: dict[str, dict]) -> list[Notebook]:
    """The numbered notebooks of the clone at `root` in order, with their profile's settings.

    Raises:
        FileNotFoundError: if there are none.
        ValueError: for a section without a notebook, or an unreadable notebook.
    """
    import papermill  # slow to import

    logging.getLogger("papermill").setLevel(logging.ERROR)
    paths = sorted((root / "notebooks").glob("[0-9][0-9]_*.ipynb"))
    if not paths:
        raise FileNotFoundError(f"No numbered notebooks in {root / 'notebooks'}; run this inside a complete clone.")
    names = [path.stem for path in paths]
    for section in sections:
        if section not in names:
            raise ValueError(
                f"The profile has a section {section!r}, and no notebook has that name; choose from {', '.join(names)}."
            )
    notebooks = []
    for path in paths:
        try:
            known = tuple(papermill.inspect_notebook(_literal(path)))
        except (nbformat.reader.NotJSONError, nbformat.ValidationError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is not a readable notebook; restore it from git.") from error
        notebooks.append(Notebook(path, known, dict(sections.get(path.stem, {}))))
    return notebooks


def select_notebooks(notebooks: list[Notebook], only: Iterable[str]) -> list[Notebook]:
    """The notebooks that `only` names ("06", "6" or "06_latency"), in order; all if `only` is empty."""
    wanted = set()
    for word in only:
        found = [n.name for n in notebooks if n.name == word or n.name.startswith(f"{word.zfill(2)}_")]
        if not found:
            raise ValueError(f"--only {word} names no notebook; choose from {', '.join(n.name for n in notebooks)}.")
        wanted.update(found)
    return [n for n in notebooks if n.name in wanted] if wanted else list(notebooks)


def execute(
    notebook: Notebook, run: RunFolder, root: Path, profile: str, kernel: str, measure: bool = True, title: str = ""
) -> None:
    """Executes one notebook with a kernel (`this_interpreter`) and saves the executed copy in the run.

    A measuring notebook is saved after each cell, so that a failed one keeps its finished cells. A notebook that only
    draws (`measure` False) replaces the run's copy after its last cell has succeeded.

    Raises:
        NotebookFailed: naming the notebook, the cell and the error.
    """
    import papermill
    from nbclient.exceptions import DeadKernelError
    from papermill.exceptions import PapermillExecutionError

    run_dir, profile = (_seen_from(notebook.path.parent, path, root) for path in (str(run.path.resolve()), profile))
    target = run.notebooks / notebook.path.name
    bar = {"desc": title or notebook.name, "file": sys.stderr}
    if not sys.stderr.isatty():
        bar |= {"mininterval": 20, "ascii": True, "ncols": 100}  # a log wants few lines
    try:
        executed = papermill.execute_notebook(
            _literal(notebook.path),
            _literal(target) if measure else None,
            parameters=notebook.parameters(run_dir=run_dir, profile=profile, measure=measure),
            cwd=notebook.path.parent,
            kernel_name=kernel,
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
    executed.metadata.get("papermill", {}).update(input_path=notebook.path.name, output_path=notebook.path.name)
    with atomic_write(target) as file:
        file.write(nbformat.writes(executed).replace(str(root), ".") + "\n")  # no absolute paths


@contextmanager
def this_interpreter() -> Iterator[str]:
    """The name of a kernel that runs this interpreter; its spec lies in a temporary folder.

    Its connection and IPython's own files go there too: a home folder may be read-only, or have start-up files.
    """
    from ipykernel.kernelspec import write_kernel_spec

    env = {"TOKENIZERS_PARALLELISM": "false"}
    env["OMP_WAIT_POLICY"] = "PASSIVE"  # idle threads of a kernel must not spin beside the workers
    for name, path in named_folders().items():  # resolved here: a kernel runs in notebooks/
        env[name] = str(path).replace("$", "$$")  # a spec expands ${NAME}
    # tqdm must draw its bars as text: a saved widget could not be shown.
    options = ["--IPKernelApp.exec_lines=import sys; sys.modules['tqdm.notebook'] = None"]
    options.append("--IPKernelApp.log_level=50")  # no warnings about its own sockets
    places = ("JUPYTER_PATH", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR")
    before = {name: os.environ[name] for name in places if name in os.environ}
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder, "kernels", KERNEL)
        write_kernel_spec(place, overrides={"env": env}, extra_arguments=options)
        os.environ |= dict.fromkeys(places, folder)
        try:
            yield KERNEL
        finally:
            for name in places:
                del os.environ[name]
            os.environ |= before


def _literal(path: Path) -> str:
    """`path` escaped for papermill, which expands braces."""
    return str(path).replace("{", "{{").replace("}", "}}")


def _seen_from(folder: Path, path: str, root: Path) -> str:
    """A path inside the clone relative to `folder`, so that an executed notebook has no absolute path."""
    whole = Path(path).resolve()
    return os.path.relpath(whole, folder) if whole.exists() and whole.is_relative_to(root.resolve()) else path


def _failure(notebook: Notebook, target: Path, reason: str) -> str:
    reason = " ".join(reason.split())
    reason = reason if len(reason) <= 600 else reason[:600] + " ..."
    return (
        f"Notebook {notebook.name} stopped {reason}\n"
        f"Finished work is kept, the cells run so far are in {shown(target)}, "
        f"and the same command continues from {notebook.name}."
    )


def shown(path: Path) -> str:
    """`path`, relative to the current directory if it lies below."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)
