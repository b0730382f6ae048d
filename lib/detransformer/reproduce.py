"""Runs the numbered notebooks in order with papermill into one run folder, and keeps what is finished.

A profile (profiles/*.yaml) gives each notebook its parameters. A notebook is skipped when nothing that made it has
changed: its cells, its parameters, the library, the data on offer, and the notebooks whose results it uses. The
manifest is written after every notebook, so that an interrupted run continues with the next one.
"""

import ast
import hashlib
import json
import logging
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import IO

import nbformat
import yaml
from filelock import FileLock, Timeout

from detransformer import machine
from detransformer.files import PACKAGE, atomic_write, data_folder, repository_root
from detransformer.record import provenance
from detransformer.record.run import RunFolder
from detransformer.settings import data_environment

PROFILES = PACKAGE / "profiles"
# A notebook is run again when one whose results it reads has been: the pre-trained models, the profile, every table.
USES = {
    "03_accuracy": ("02_pretraining",),
    "05_placement": ("04_profiling",),
    "06_latency": ("04_profiling",),
    "08_adaptive": ("04_profiling",),
    "12_comparison": ("02_pretraining", "11_decomposition"),
    "13_aggregation": ("02_pretraining", "12_comparison"),
    "07_summary": ("01_decoupling", "02_pretraining", "03_accuracy", "04_profiling", "05_placement", "06_latency"),
}
# Files of the package that no notebook's result depends on.
DATA = ("published", "measured")
FRAME = ("cli.py", "doctor.py", "reproduce.py", "report/page.py")


class NotebookFailed(Exception):
    """A cell of a notebook raised, or its kernel died; the message is one paragraph for the user."""


@dataclass(frozen=True)
class Notebook:
    """One notebook of a run and the parameters its profile gives it."""

    path: Path
    parameters: dict
    uses: tuple[str, ...] = ()
    cells: list = field(default_factory=list, compare=False)

    @property
    def name(self) -> str:
        return self.path.stem


def load_profile(profile: str) -> tuple[str, dict[str, dict]]:
    """(name, section a notebook) of a built-in profile or of a YAML file of one's own.

    Raises:
        ValueError: for an unknown name, or a file that is not a mapping of mappings.
    """
    path = PROFILES / f"{profile}.yaml"
    if profile.endswith((".yaml", ".yml")):
        path = Path(profile)
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in PROFILES.glob("*.yaml")))
        raise ValueError(f"Profile {profile!r} is unknown; choose one of {known}, or give the path of a YAML file.")
    try:
        sections = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"Profile {path} is not valid YAML ({reason}); correct that line.") from error
    if not isinstance(sections, dict) or not all(isinstance(v, dict) for v in sections.values()):
        raise ValueError(f"Profile {path} must have one section of `parameter: value` lines for each notebook.")
    return path.stem, sections


def parameters_cell(cells: list) -> dict:
    """The literals of a notebook's `parameters` cell, by name."""
    for cell in cells:
        if cell["cell_type"] == "code" and "parameters" in cell.get("metadata", {}).get("tags", []):
            assigned = [node for node in ast.parse(cell["source"]).body if isinstance(node, ast.Assign)]
            return {target.id: _literal(node.value) for node in assigned for target in node.targets}
    return {}


def _literal(node: ast.expr):
    """The value of a literal, where `dict(name=value)` counts as one; ValueError for anything that computes."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "dict" and not node.args:
        return {keyword.arg: _literal(keyword.value) for keyword in node.keywords}
    if isinstance(node, ast.Dict):
        return {_literal(key): _literal(value) for key, value in zip(node.keys, node.values, strict=True)}
    if isinstance(node, (ast.List, ast.Tuple)):
        values = [_literal(item) for item in node.elts]
        return values if isinstance(node, ast.List) else tuple(values)
    return ast.literal_eval(node)


def find_notebooks(root: Path, sections: dict[str, dict], uses: dict[str, tuple[str, ...]] = USES) -> list[Notebook]:
    """The numbered notebooks of the clone at `root` in order, with their profile's parameters.

    Raises:
        FileNotFoundError: when there are none.
        ValueError: for a notebook without a section, a section without a notebook, or a parameter the notebook lacks.
    """
    paths = sorted((root / "notebooks").glob("[0-9][0-9]_*.ipynb"))
    if not paths:
        raise FileNotFoundError(f"No numbered notebooks in {root / 'notebooks'}; run this inside a complete clone.")
    names = [path.stem for path in paths]
    for section in sections:
        if section not in names:
            raise ValueError(
                f"The profile has a section {section!r} but no such notebook; choose from {', '.join(names)}."
            )
    notebooks = []
    for path in paths:
        if path.stem not in sections:
            raise ValueError(f"The profile has no section {path.stem!r}; add one (it may be empty: `{{}}`).")
        try:
            cells = nbformat.read(path, as_version=4).cells
        except (nbformat.reader.NotJSONError, nbformat.ValidationError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is not a notebook that can be read; restore it from git.") from error
        known = parameters_cell(cells)
        for parameter in [] if "measure" in known else sections[path.stem]:  # such a notebook loads its section itself
            if parameter not in known:
                raise ValueError(
                    f"Parameter {parameter!r} of the profile's section {path.stem} is not in that notebook's "
                    f"parameters cell; it has {', '.join(known) or 'none'}."
                )
        parameters = {} if "measure" in known else dict(sections[path.stem])
        notebooks.append(Notebook(path, parameters, tuple(uses.get(path.stem, ())), cells))
    return notebooks


def select_notebooks(notebooks: list[Notebook], only: Iterable[str]) -> list[Notebook]:
    """Those named by `only` ("06", "6" or "06_latency"), in order; all of them where `only` is empty."""
    wanted = set()
    for word in only:
        found = [n.name for n in notebooks if n.name == word or n.name.startswith(f"{word.zfill(2)}_")]
        if not found:
            raise ValueError(f"--only {word} names no notebook; choose from {', '.join(n.name for n in notebooks)}.")
        wanted.update(found)
    return [n for n in notebooks if n.name in wanted] if wanted else list(notebooks)


def library_digest(package: Path = PACKAGE) -> str:
    """Digest of the package's sources and committed data: what notebooks compute with."""
    digest = hashlib.sha256()
    modules = [p for p in sorted(package.rglob("*.py")) if p.relative_to(package).as_posix() not in FRAME]
    for path in [*modules, *(p for name in DATA for p in sorted(data_folder(name, package).glob("*.csv")))]:
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def notebook_key(notebook: Notebook, library: str, data: dict, finished: dict[str, dict]) -> str:
    """Digest of everything that made a notebook's result; the same key means that nothing has changed."""
    cells = [(c["cell_type"], c["source"], c.get("metadata", {}).get("tags", [])) for c in notebook.cells]
    used = {name: finished.get(name, {}).get("finished") for name in notebook.uses}
    made_of = [cells, notebook.parameters, library, data, used]
    return hashlib.sha256(json.dumps(made_of, sort_keys=True, default=str).encode()).hexdigest()


def read_manifest(run: RunFolder) -> dict:
    """The run's manifest, or an empty one; ValueError where it is damaged."""
    if not run.manifest_path.is_file():
        return {"notebooks": {}}
    try:
        manifest = json.loads(run.manifest_path.read_text(encoding="utf-8"))
        assert isinstance(manifest["notebooks"], dict)
    except (ValueError, KeyError, TypeError, AssertionError) as error:
        raise ValueError(f"{run.manifest_path} is damaged; delete it, and the run starts over.") from error
    return manifest


def write_manifest(run: RunFolder, manifest: dict) -> None:
    """Saves the manifest whole, with what the tables now say of their data."""
    manifest["data"]["sources"] = provenance.data_sources(run)
    manifest["kept_from"] = provenance.kept_from(manifest)
    with atomic_write(run.manifest_path) as file:
        json.dump(manifest, file, indent=2, default=str)
        file.write("\n")


def reproduce(
    profile: str = "quick",
    only: Iterable[str] = (),
    force: bool = False,
    output: str | Path | None = None,
    root: Path | None = None,
    say: Callable[[str], None] = print,
) -> RunFolder:
    """Run a profile's notebooks into `output` (results/PROFILE) and return the run folder.

    Raises:
        NotebookFailed: when a cell raises; what was finished before is kept.
        ValueError, FileNotFoundError: for a wrong profile, notebook name, a clone that is not complete, or a reference
            run from a state that no commit holds.
    """
    root = root or repository_root()
    name, sections = load_profile(profile)
    notebooks = find_notebooks(root, sections)
    chosen = select_notebooks(notebooks, only)
    path = Path(output).resolve() if output else root / "results" / name
    if path.exists() and not path.is_dir():
        raise ValueError(f"--output {output} is a file; give the folder the run should be written to.")
    if is_reference(path):
        check_traceable(root, path)
    run = RunFolder(path)
    try:
        with FileLock(run.path / ".lock", timeout=0):
            _run(run, root, name, notebooks, chosen, force, say)
    except Timeout as error:
        raise ValueError(
            f"{run.path} is in use by another reproduce; wait for it, or choose another --output."
        ) from error
    return run


def is_reference(path: Path) -> bool:
    """Whether `path` is the committed run of a clone, results/reference, or lies in it."""
    return any(
        folder.parts[-2:] == ("results", "reference") and (folder.parents[1] / "pyproject.toml").is_file()
        for folder in (path, *path.parents)
    )


def check_traceable(root: Path, path: Path) -> None:
    """Raises ValueError where the clone at `root` is in a state that no commit holds: `path` is to be committed."""
    state = provenance.commit(root)
    if not provenance.is_commit(root, state["commit"]):
        raise ValueError(
            f"{_shown(path)} holds results of one commit, and {root} has none that git knows; "
            "run in a git clone, or choose another folder with --output."
        )
    if state["dirty"]:
        changed = provenance.changed_files(root)
        names = ", ".join(changed[:3]) + (f" and {len(changed) - 3} more" if len(changed) > 3 else "")
        raise ValueError(
            f"{_shown(path)} holds results of one commit, and {names} {'is' if len(changed) == 1 else 'are'} not "
            "committed; commit first, or choose another folder with --output."
        )


def _run(run, root, profile, notebooks, chosen, force, say) -> None:
    manifest = read_manifest(run)
    finished = manifest["notebooks"]
    data = provenance.data_setting(root)
    parameters = {n.name: n.parameters for n in notebooks}
    commit = provenance.commit(root)
    manifest |= {
        "profile": profile,
        "command": provenance.command_line(),
        "date": machine.now(),
        **commit,
        "versions": provenance.versions(root),
        "hardware": machine.hardware(),
        "data": data.copy(),
        "seeds": provenance.seeds(parameters),
        "parameters": parameters,
        "notebooks": finished,
    }
    write_manifest(run, manifest)
    library = library_digest()
    start = time.perf_counter()
    for index, notebook in enumerate(chosen, 1):
        title = f"[{index}/{len(chosen)}] {notebook.name}"
        key = notebook_key(notebook, library, data, finished)
        if not force and _is_finished(run, finished.get(notebook.name, {}), key, notebook.name):
            say(f"{title}: unchanged, skipped (--force runs it again)")
            continue
        say(f"{title}: started, {_duration(time.perf_counter() - start)} into the run")
        entry = {"status": "running", "key": key, "started": machine.now(), **commit}
        earlier, finished[notebook.name] = finished.get(notebook.name, {}), entry
        write_manifest(run, manifest)
        before, records, cell_start = _outputs(run), _records(run), time.perf_counter()
        try:
            execute(notebook, run, root, title)
            entry["status"] = "done"
            entry["finished"] = machine.now()
        except BaseException as error:
            entry["status"] = "failed" if isinstance(error, NotebookFailed) else "interrupted"
            entry["error"] = str(error) if isinstance(error, NotebookFailed) else type(error).__name__
            raise
        finally:
            entry["duration_s"] = round(time.perf_counter() - cell_start, 1)
            made = sorted(path for path, stamp in _outputs(run).items() if before.get(path) != stamp)
            entry["tables"] = [Path(p).stem for p in made if p.endswith(".csv")]
            entry["figures"] = [Path(p).stem for p in made if p.endswith(".svg")]
            entry["rows_kept_from"] = _rows_kept_from(earlier, records, _records(run), commit["commit"])
            write_manifest(run, manifest)
        say(f"{title}: done in {_duration(entry['duration_s'])}; {_listed(entry)}")
    from detransformer.report.page import write_page  # late: it loads what converts notebooks

    page, _ = write_page(run.path)
    say(f"Finished in {_duration(time.perf_counter() - start)}: {_shown(page)}")


def execute(notebook: Notebook, run: RunFolder, root: Path, title: str) -> None:
    """Execute one notebook with this interpreter's kernel; the executed copy is saved cell by cell.

    Raises:
        NotebookFailed: naming the notebook, the cell and the error.
    """
    import papermill
    from nbclient.exceptions import DeadKernelError
    from papermill.exceptions import PapermillExecutionError

    logging.getLogger("papermill").setLevel(logging.ERROR)
    # Relative inside the clone, so that an executed notebook names no place outside it.
    inside = run.path.resolve().is_relative_to(root.resolve())
    run_dir = os.path.relpath(run.path, notebook.path.parent) if inside else str(run.path)
    parameters = notebook.parameters | {"run_dir": run_dir}
    target = run.notebooks / notebook.path.name
    bar = {"desc": title, "file": sys.stderr}
    if not sys.stderr.isatty():
        bar |= {"mininterval": 20, "ascii": True, "ncols": 100}  # a log wants few lines
    log = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")
    try:
        executed = papermill.execute_notebook(
            notebook.path,
            target,
            parameters=parameters,
            cwd=notebook.path.parent,
            kernel_name="python3",
            language="python",
            kernel_manager_class=_this_python_kernels(log),
            request_save_on_cell_execute=True,
            progress_bar=bar,
        )
    except PapermillExecutionError as error:
        reason = f"{error.ename}: {error.evalue}".strip(": ")
        raise NotebookFailed(_failure(notebook, run, f"in code cell {error.exec_count}: {reason}")) from error
    except (DeadKernelError, RuntimeError) as error:  # RuntimeError: the kernel died before it was ready
        log.seek(0)
        last = ([line.strip() for line in log if line.strip()] or [str(error)])[-1]
        reason = f"because its kernel died, most often for want of memory: {last}"
        raise NotebookFailed(_failure(notebook, run, reason)) from error
    except (KeyboardInterrupt, SystemExit):
        logging.getLogger("asyncio").setLevel(logging.CRITICAL)  # tasks that waited for the kernel fail as it ends
        raise
    finally:
        log.close()
    _tidy(executed, notebook, root)
    with atomic_write(target) as file:
        nbformat.write(executed, file)


def _this_python_kernels(log: IO) -> type:
    """A kernel manager that starts this interpreter, whatever kernel specs are installed, its stderr to `log`."""
    from ipykernel.kernelspec import get_kernel_dict
    from jupyter_client import AsyncKernelManager
    from jupyter_client.kernelspec import KernelSpec

    env = {"TOKENIZERS_PARALLELISM": "false"}
    env["OMP_WAIT_POLICY"] = "PASSIVE"  # idle threads of a kernel must not spin beside the workers
    environment = data_environment()
    if environment.mirror_named_by == "DETRANSFORMER_DATA":  # relative to the user's folder, not to notebooks/
        env["DETRANSFORMER_DATA"] = str(environment.mirror)
    # Nobody watches an executed notebook: tqdm writes its bars as text, where a saved widget could not be shown.
    text_bars = "--IPKernelApp.exec_lines=import sys; sys.modules['tqdm.notebook'] = None"
    spec = KernelSpec(**get_kernel_dict(extra_arguments=[text_bars]) | {"env": env})

    class ThisPythonKernelManager(AsyncKernelManager):
        kernel_spec = property(lambda self: spec)

        async def _async_start_kernel(self, **kwargs):
            await super()._async_start_kernel(**kwargs | {"stderr": log})

        start_kernel = _async_start_kernel

    return ThisPythonKernelManager


def _tidy(executed, notebook: Notebook, root: Path) -> None:
    """Keep only the last state of progress bars, and no absolute path of the clone, in an executed notebook."""
    executed.metadata.get("papermill", {}).update(input_path=notebook.path.name, output_path=notebook.path.name)
    for cell in executed.cells:
        merged = []
        for output in cell.get("outputs", []):
            follows = merged and output.output_type == merged[-1].output_type == "stream"
            if follows and output.name == merged[-1].name:  # every step of a progress bar is an output of its own
                merged[-1].text += output.text
            else:
                merged.append(output)
        for output in merged:
            holder = output if output.output_type == "stream" else output.get("data", {})
            for key, value in holder.items():
                if isinstance(value, str) and (key == "text" or key.startswith("text/")):
                    lines = [line.rsplit("\r", 1)[-1] for line in value.replace("\r\n", "\n").split("\n")]
                    holder[key] = "\n".join(lines).replace(str(root), ".")
        if "outputs" in cell:
            cell.outputs = [o for o in merged if o.output_type != "stream" or o.text.strip()]


def _failure(notebook: Notebook, run: RunFolder, reason: str) -> str:
    reason = reason if len(reason) <= 600 else reason[:600] + " ..."
    return (
        f"Notebook {notebook.name} stopped {' '.join(reason.split())}\n"
        f"What was finished is kept, the cells run so far are in {_shown(run.notebooks / notebook.path.name)}, "
        f"and the same command continues from {notebook.name}."
    )


def _is_finished(run: RunFolder, entry: dict, key: str, name: str) -> bool:
    return (
        entry.get("status") == "done"
        and entry.get("key") == key
        and (run.notebooks / f"{name}.ipynb").is_file()
        and all(run.has_table(table) for table in entry.get("tables", []))
    )


def _outputs(run: RunFolder) -> dict[str, tuple[int, int]]:
    files = [*run.tables.glob("*.csv"), *run.figures.glob("*.svg")]
    return {str(p): (p.stat().st_mtime_ns, p.stat().st_ino) for p in files}


def _records(run: RunFolder) -> dict[str, float]:
    """Rows and trained models that an interrupted or repeated notebook does not make again, and when each was made."""
    files = [*run.path.rglob("result.json"), *run.path.rglob("*rows.json")]
    return {str(path): path.stat().st_mtime for path in files}


def _rows_kept_from(earlier: dict, before: dict[str, float], after: dict[str, float], commit: str) -> dict[str, list]:
    """Other commit -> [from, to] (seconds since 1970) of a notebook's run `earlier` whose rows were not made again."""
    windows = dict(earlier.get("rows_kept_from") or {})
    if earlier.get("started") and earlier.get("commit"):
        start = datetime.fromisoformat(earlier["started"]).timestamp() - 1  # to the second
        end = start + earlier["duration_s"] + 2 if "duration_s" in earlier else max(before.values(), default=start)
        windows[earlier["commit"]] = [start, end]
    # A file of rows that went during the run was read into a table: its rows are kept, too.
    kept = [made for path, made in before.items() if after.get(path, made) == made]
    return {c: [a, b] for c, (a, b) in windows.items() if c != commit and any(a <= made <= b for made in kept)}


def _listed(entry: dict) -> str:
    tables, figures = ", ".join(entry["tables"]) or "none", ", ".join(entry["figures"]) or "none"
    return f"tables: {tables}; figures: {figures}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def _shown(path: Path) -> str:
    """`path` relative to the current directory where it lies below it."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)
