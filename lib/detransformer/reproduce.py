"""Runs the numbered notebooks in order into one run folder, keeps finished ones, and redraws a saved run.

A profile (profiles/*.yaml) gives each notebook its settings. A notebook is skipped if its inputs are unchanged: its
cells and settings, the library, the available data, and the notebooks whose results it uses. The manifest is written
after every notebook, so that an interrupted run continues with the next one. A run's index.html links its executed
notebooks, tables and figures, and shows what made them.
"""

import hashlib
import json
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from datetime import datetime
from multiprocessing import get_context
from pathlib import Path

import jinja2
import nbformat
import pandas as pd
from filelock import FileLock, Timeout
from latex2mathml.converter import convert
from nbconvert import HTMLExporter

from detransformer import machine
from detransformer.files import PACKAGE, atomic_write, computing_digest, data_folder, repository_root
from detransformer.notebooks import USES, NotebookFailed, execute, find_notebooks, select_notebooks, shown
from detransformer.profiles import built_in_profiles, load_profile, load_settings
from detransformer.record import provenance
from detransformer.record.run import RunFolder

DATA = ("published", "measured")
# Files and subpackages that no notebook's result depends on.
FRAME = ("cli.py", "commands", "doctor.py", "reproduce.py", "notebooks.py", "kernels.py", "profiles/__init__.py")

TEMPLATE = Path(__file__).with_name("index.html.jinja")
FORMULA = re.compile(r"\$\$(.+?)\$\$|\$(.+?)\$", re.DOTALL)  # LaTeX between dollars, in a line of its own or inline
FACTS = ("profile", "command", "date", "commit", "dirty", "drawn")  # fields of the manifest on the index page


def reproduce(
    profile: str = "quick",
    only: Iterable[str] = (),
    force: bool = False,
    output: str | Path | None = None,
    root: Path | None = None,
    say: Callable[[str], None] = print,
) -> RunFolder:
    """Runs a profile's notebooks into `output` (default: results/PROFILE) and returns the run folder.

    Raises:
        NotebookFailed: if a cell raises; finished work is kept.
        ValueError, FileNotFoundError: for a wrong profile or notebook name, no clone, or a reference run from an
            uncommitted state.
    """
    root = root or repository_root()
    notebooks = find_notebooks(root)
    settings = {notebook.stem: load_settings(profile, notebook.stem) for notebook in notebooks}
    if unknown := [section for section in load_profile(profile) if section not in settings]:
        raise ValueError(
            f"The profile has a section {unknown[0]!r}, and no notebook has that name; choose from "
            f"{', '.join(settings)}."
        )
    chosen = select_notebooks(notebooks, only)
    path = Path(output).resolve() if output else root / "results" / Path(profile).stem
    if path.exists() and not path.is_dir():
        raise ValueError(f"--output {output} is a file; give the folder the run should be written to.")
    if path.resolve().is_relative_to((root / "results" / "reference").resolve()):
        check_traceable(root, path)
    with locked(RunFolder(path)) as run:
        _run(run, root, profile, settings, chosen, force, say)
    return run


def redraw(
    path: str | Path, only: Iterable[str] = (), root: Path | None = None, say: Callable[[str], None] = print
) -> RunFolder:
    """Redraws the figures of a run from its saved tables: runs its notebooks without measuring.

    Raises:
        ValueError: if the folder is not a run, no notebook has a name of `only`, or none could be drawn.
    """
    root = root or repository_root()
    if not (Path(path) / "tables").is_dir():
        raise ValueError(f"{path} is not the folder of a run (it has no tables/); give one such as results/quick.")
    with locked(RunFolder(Path(path).resolve())) as run:
        manifest, start, num_drawn = read_manifest(run), time.perf_counter(), 0
        # The manifest has only the name of a user's own profile; drawing needs hardly any of its settings.
        profile = manifest["profile"] if manifest.get("profile") in built_in_profiles() else "quick"
        notebooks = select_notebooks(find_notebooks(root), only)
        # In processes, since papermill changes the working directory.
        with ProcessPoolExecutor(min(2, machine.usable_cores()), get_context("spawn")) as pool:
            drawing = [pool.submit(execute, notebook, run, root, profile, measure=False) for notebook in notebooks]
            for notebook, task in zip(notebooks, drawing, strict=True):
                try:
                    task.result()
                    num_drawn += 1
                    say(f"{notebook.stem}: drawn")
                except NotebookFailed as error:
                    say(f"{notebook.stem}: not drawn: {str(error).splitlines()[0]}")
        if not num_drawn:
            raise ValueError(f"{path} has no notebook's tables; run `detransformer reproduce` first.")
        manifest["drawn"] = {"date": machine.now(), **provenance.commit(root)}
        write_manifest(run, manifest)
        took = _duration(time.perf_counter() - start)
        say(f"{num_drawn} of {len(notebooks)} notebooks drawn in {took}: {shown(write_index(run))}")
    return run


@contextmanager
def locked(run: RunFolder) -> Iterator[RunFolder]:
    """Locks a run folder against other writers; ValueError if it is locked already."""
    try:
        lock = FileLock(run.path / ".lock").acquire(timeout=0)
    except Timeout as error:
        raise ValueError(
            f"{run.path} is in use by another reproduce; wait for it, or choose another --output."
        ) from error
    with lock:
        yield run


def check_traceable(root: Path, path: Path) -> None:
    """Raises ValueError if the clone at `root` is not in a committed state: `path` is to be committed."""
    state = provenance.commit(root)
    if state["commit"] == "unknown":
        fault = f"{root} is at none that git knows; run in a git clone"
    elif state["dirty"]:
        changed = provenance.changed_files(root)
        names = ", ".join(changed[:3]) + (f" and {len(changed) - 3} more" if len(changed) > 3 else "")
        fault = f"{names} {'is' if len(changed) == 1 else 'are'} not committed; commit first"
    else:
        return
    raise ValueError(f"{shown(path)} holds results of one commit, and {fault}, or choose another folder with --output.")


def _run(run, root, profile, settings, chosen, force, say) -> None:
    manifest, commit, data = read_manifest(run), provenance.commit(root), provenance.data_setting(root)
    finished = manifest["notebooks"]
    manifest |= {
        "profile": Path(profile).stem,
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "date": machine.now(),
        **commit,
        "versions": provenance.versions(root),
        "hardware": machine.hardware(),
        "data": data.copy(),
        "seeds": provenance.seeds(settings),
        "parameters": settings,
        "notebooks": finished,
    }
    write_manifest(run, manifest)
    library, start = library_digest(), time.perf_counter()
    for index, notebook in enumerate(chosen, 1):
        name = notebook.stem
        title = f"[{index}/{len(chosen)}] {name}"
        key = notebook_key(notebook, settings[name], library, data, finished)
        if not force and _is_finished(run, finished.get(name, {}), key, name):
            say(f"{title}: unchanged, skipped (--force runs it again)")
            continue
        say(f"{title}: started, {_duration(time.perf_counter() - start)} into the run")
        entry = {"status": "running", "key": key, "started": machine.now(), **commit}
        earlier, finished[name] = finished.get(name, {}), entry
        write_manifest(run, manifest)
        before, records, notebook_start = _outputs(run), _records(run), time.perf_counter()
        try:
            execute(notebook, run, root, profile, title=title)
            entry |= {"status": "done", "finished": machine.now()}
        except BaseException as error:
            entry["status"] = "failed" if isinstance(error, NotebookFailed) else "interrupted"
            entry["error"] = str(error) if isinstance(error, NotebookFailed) else type(error).__name__
            raise
        finally:
            entry["duration_s"] = round(time.perf_counter() - notebook_start, 1)
            made = sorted(path for path, stamp in _outputs(run).items() if before.get(path) != stamp)
            entry["tables"] = [path.stem for path in made if path.suffix == ".csv"]
            entry["figures"] = [path.stem for path in made if path.suffix == ".png"]
            entry["rows_kept_from"] = _rows_kept_from(earlier, records, _records(run), commit["commit"])
            write_manifest(run, manifest)
        tables, figures = (", ".join(entry[kind]) or "none" for kind in ("tables", "figures"))
        say(f"{title}: done in {_duration(entry['duration_s'])}; tables: {tables}; figures: {figures}")
    say(f"Finished in {_duration(time.perf_counter() - start)}: {shown(write_index(run))}")


def library_digest() -> str:
    """Digest of the package's sources and committed data: what notebooks compute with."""
    inside = {path: path.relative_to(PACKAGE) for path in sorted(PACKAGE.rglob("*.py"))}
    modules = [path for path, name in inside.items() if not {name.as_posix(), name.parts[0]} & set(FRAME)]
    return computing_digest([*modules, *(p for name in DATA for p in sorted(data_folder(name).glob("*.csv")))])


def notebook_key(notebook: Path, settings: Mapping, library: str, data: dict, finished: dict[str, dict]) -> str:
    """Digest of all inputs of a notebook's result; the same key means that nothing has changed."""
    try:
        cells = nbformat.read(notebook, as_version=4).cells
    except ValueError as error:
        raise ValueError(f"{notebook} is not a readable notebook; restore it from git.") from error
    sources = [(c["cell_type"], c["source"], c.get("metadata", {}).get("tags", [])) for c in cells]
    studies = computing_digest(sorted(notebook.parent.glob("*.py")))
    used = {name: finished.get(name, {}).get("finished") for name in USES.get(notebook.stem, ())}
    made_of = [sources, studies, settings, library, data, used]
    return hashlib.sha256(json.dumps(made_of, sort_keys=True, default=str).encode()).hexdigest()


def read_manifest(run: RunFolder) -> dict:
    """The run's manifest, or an empty one; ValueError if it is damaged."""
    if not run.manifest_path.is_file():
        return {"notebooks": {}}
    try:
        manifest = json.loads(run.manifest_path.read_text(encoding="utf-8"))
        assert isinstance(manifest["notebooks"], dict)
    except (ValueError, KeyError, TypeError, AssertionError) as error:
        raise ValueError(f"{run.manifest_path} is damaged; delete it, and the run starts over.") from error
    return manifest


def write_manifest(run: RunFolder, manifest: dict) -> None:
    """Saves the manifest atomically, with the data sources that the tables name now."""
    manifest.setdefault("data", {})["sources"] = provenance.data_sources(run)
    manifest["kept_from"] = provenance.kept_from(manifest)
    with atomic_write(run.manifest_path) as file:
        json.dump(manifest, file, indent=2, default=str)
        file.write("\n")


def _is_finished(run: RunFolder, entry: dict, key: str, name: str) -> bool:
    return (
        entry.get("status") == "done"
        and entry.get("key") == key
        and (run.notebooks / f"{name}.ipynb").is_file()
        and all(run.has_table(table) for table in entry.get("tables", []))
    )


def _outputs(run: RunFolder) -> dict[Path, tuple[int, int]]:
    files = [*run.tables.glob("*.csv"), *run.figures.glob("*.png")]
    return {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in files}


def _records(run: RunFolder) -> dict[str, float]:
    """File -> time (seconds since 1970) of rows and trained models that an interrupted or repeated notebook reuses."""
    files = [*run.path.rglob("result.json"), *run.path.rglob("*rows.json")]
    return {str(path): path.stat().st_mtime for path in files}


def _rows_kept_from(earlier: dict, before: dict[str, float], after: dict[str, float], commit: str) -> dict[str, list]:
    """Other commit -> [from, to] (seconds since 1970) of a notebook's earlier runs whose rows were kept."""
    windows = dict(earlier.get("rows_kept_from") or {})
    if earlier.get("started") and earlier.get("commit"):
        start = datetime.fromisoformat(earlier["started"]).timestamp() - 1  # rounded to the second
        end = start + earlier["duration_s"] + 2 if "duration_s" in earlier else max(before.values(), default=start)
        windows[earlier["commit"]] = [start, end]
    # A file of rows that was removed during the run was read into a table: its rows are kept, too.
    kept = [made for path, made in before.items() if after.get(path, made) == made]
    return {c: [a, b] for c, (a, b) in windows.items() if c != commit and any(a <= made <= b for made in kept)}


def write_index(run: RunFolder) -> Path:
    """Writes RUN/html/NOTEBOOK.html for each executed notebook, and RUN/index.html with links to all of the run."""
    template = jinja2.Template(TEMPLATE.read_text(encoding="utf-8"), autoescape=True)
    exporter = HTMLExporter(template_name="basic")
    notebooks, notes = [], run.notes()
    manifest = read_manifest(run)
    for path in sorted(run.notebooks.glob("*.ipynb")):
        notebook = nbformat.read(path, as_version=4)
        title = next(iter(notebook.cells[0].source.splitlines()), path.stem).lstrip("# ")
        for cell in notebook.cells:
            if cell.cell_type == "markdown":
                cell.source = FORMULA.sub(_in_mathml, cell.source)
        body, _ = exporter.from_notebook_node(notebook)
        with atomic_write(run.path / "html" / f"{path.stem}.html") as file:
            file.write(template.render(title=title, body=body))
        entry = manifest["notebooks"].get(path.stem, {})
        notebooks.append(entry | {"name": path.stem, "title": title, "commit": entry.get("commit", "")[:12]})
    tables = [
        {"name": path.stem, "columns": list(pd.read_csv(path, nrows=0)), "note": notes.get(path.stem, "")}
        for path in sorted(run.tables.glob("*.csv"))
    ]
    figures = sorted(path.stem for path in run.figures.glob("*.png"))
    facts = {name: manifest[name] for name in FACTS if name in manifest} | manifest.get("hardware", {})
    page = template.render(
        title=f"Run {run.path.name}", notebooks=notebooks, tables=tables, figures=figures, facts=facts
    )
    with atomic_write(run.path / "index.html") as file:
        file.write(page)
    return run.path / "index.html"


def _in_mathml(formula: re.Match) -> str:
    """A formula of `FORMULA` as browsers show it without a script."""
    block, inline = formula.groups()
    return convert(block or inline, display="block" if block else "inline")


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
