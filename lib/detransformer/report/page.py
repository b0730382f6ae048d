"""One page of a run: `index.html` in its folder, with verdicts, figures, tables and executed notebooks.

Reads what a run has saved and computes nothing. The page is plain HTML that refers to the run's own files by relative
paths, so that the folder can be published as it is. What a run lacks is said in its place. Absolute paths are cut to
their last part, and of the manifest only what a reader needs is shown.
"""

import json
import os
import re
from collections import Counter
from dataclasses import dataclass, field
from datetime import datetime
from functools import cache
from pathlib import Path
from urllib.parse import quote

import bleach
import jinja2
import mistune
import nbformat
import pandas as pd
import yaml
from bs4 import BeautifulSoup
from markupsafe import Markup, escape
from PIL import Image, UnidentifiedImageError

from detransformer.files import atomic_write
from detransformer.record.provenance import kept_from
from detransformer.record.run import TABLE_NOTEBOOKS, RunFolder, to_markdown
from detransformer.record.verdict import NOISE, NOT_JUDGED, NOT_TESTED
from detransformer.report import readme
from detransformer.report.claims import SUMMARY_COLUMNS
from detransformer.report.figures import FIGURES

TEMPLATES = Path(__file__).with_name("templates")
OTHER = "other"  # the section of tables and figures that no notebook is known to make
FOLDED_ROWS = 12  # a longer table is folded
SHOWN_ROWS = 40  # of a table; all are in its CSV
SHOWN_LINES = 40  # of what a notebook's cell printed
NOTEBOOKS_BYTES = 5_000_000  # notebooks that take more as HTML are written only when asked for
WIDE_CELL = 40  # characters from which a cell is broken into lines
PNG_DPI, SCREEN_DPI = 150, 100
VERDICT_CLASSES = {
    **dict.fromkeys(("matches", "holds"), "good"),
    **dict.fromkeys(("holds, larger", "holds, smaller", "differs, larger", "differs, smaller", "differs"), "partly"),
    "does not hold": "bad",
    **dict.fromkeys((NOT_TESTED, NOISE, NOT_JUDGED), "none"),
}
VERDICT_COLUMNS = ["claim", "expected", "obtained", "kind", "judged"]
STATUS_CLASSES = {"done": "good", "running": "partly", "interrupted": "partly", "failed": "bad", "not run": "none"}
# What outputs and Markdown of a notebook may bring into its page.
HTML_TAGS = set(
    "a b blockquote br caption code dd div dl dt em h1 h2 h3 h4 hr i img li ol p pre s small span strong sub sup table "
    "tbody td tfoot th thead tr ul".split()
)
PROTOCOLS = {"data", "http", "https", "mailto"}
TABLE_CAPTIONS = {
    "decoupling": "Parameters and operations of original and decoupled models",
    "pretraining": "Pre-training: held-out loss and perplexity",
    "pretraining_loss": "Pre-training: loss by step",
    "placements": "Original layers elsewhere among the decoupled ones",
    "widths": "Full and narrow sub-blocks",
    "calibration": "Held-out loss after slicing, by how a model was trained on",
    "accuracy_runs": "Fine-tuning, one row a seed",
    "table_iii": "Table III: accuracy on five tasks",
    "wire_accuracy": "Accuracy with messages in other number formats",
    "profile": "Operations measured on this host, by strategy",
    "efficiency": "Rate of small products, as a share of the whole layer's",
    "pace": "How latencies and speedups depend on the pace of small products",
    "overlap": "What messages cost beside compute on one core",
    "links": "Collectives measured over the emulated links",
    "fig2a": "Fig. 2a: latency on one device",
    "placement": "Predicted latency of every plan, and which is chosen",
    "latency": "All measured requests",
    "timeline": "What each device did when",
    "fig7_error": "Latencies beside those published in Fig. 7, absolute",
    "methods": "All methods: latency, collectives, weights, output error",
    "wire": "Messages in other number formats",
    "reads": "Reading [CLS] alone of the last layer",
    "scaling": "Latency over the number of devices",
    "prediction": "Error of the cost model's prediction",
    "table_ii": "Table II: what each approach gains over one device",
    "table_iv": "Table IV: speedup over tensor and sequence parallelism",
    "summary": "Every published value beside the obtained one",
    "plan_map": "The plan chosen by devices, bandwidth and length",
    "choices": "The chosen plan and others, measured",
    "choice_cells": "The chosen plan over the best measured one",
    "unequal": "Unequal devices: planned and even splits",
    "trace": "Requests while the link's rate changes",
    "generation": "Text generation over devices",
    "perplexity": "Perplexity of decoupled GPT-2",
    "scale_out": "Predicted speedup on many devices",
    "adaptive": "What was expected of adaptive execution",
    "predictor_points": "CoFormer: latency predicted and measured, by sub-model",
    "predictor": "CoFormer: error of the latency predictor",
    "proxy_points": "CoFormer: calibrated policies and what was said of them before",
    "proxy": "CoFormer: how well proxies order policies",
    "search_history": "CoFormer: the policy search, evaluation by evaluation",
    "search": "CoFormer: searches compared",
    "policies": "CoFormer: policies and their devices' times",
    "constraints": "CoFormer: policies under tighter limits",
    "decomposition": "What was expected of the decomposition",
    "coformer_runs": "CoFormer: every run of sub-models, one row a seed",
    "coformer_ablation": "CoFormer, Table III: sub-models alone and together",
    "coformer_aggregators": "CoFormer, Table IV: aggregators on the same sub-models",
    "coformer_devices": "CoFormer, Table V: one to four devices",
    "coformer_budgets": "CoFormer, Fig. 13: the most operations of a device",
    "coformer_recipes": "CoFormer, like sub-models and one small model, calibrated for longer",
    "coformer_rules": "CoFormer: rules of the booster",
    "coformer_equal_flops": "CoFormer: one model, like and unlike sub-models at the same operations",
    "coformer_missing": "CoFormer: accuracy without one device",
    "coformer_latency": "CoFormer beside other methods: latency and energy by bandwidth",
    "coformer_text": "CoFormer on text",
    "coformer": "What the paper says of CoFormer",
    "which_one": "Which method to take, by bandwidth",
    "not_run": "What the paper shows and this run does not",
    "chaos": "A serving cluster that is broken on purpose",
    "chaos_rounds": "A serving cluster that is broken on purpose, round by round",
    "soak": "A serving cluster under load, a fault a minute",
    "soak_samples": "A serving cluster under load: memory and answers",
    "encrypted": "What WireGuard costs between two devices",
    "coverage": "Lines that the tests run, by room",
}

# An absolute path, but not the rest of a URL or of a relative path.
_PATH = re.compile(r"(?<![\w.:/~<-])(?:/[\w.@+~-]+)+/([\w.@+~-]+)/?")
_WORDS = "|".join(sorted(map(re.escape, VERDICT_CLASSES), key=len, reverse=True))
_COUNTS = re.compile(rf"\d+ (?:{_WORDS})(?:, \d+ (?:{_WORDS}))*")
_DRAWN = re.compile(r"""\bdraw\(\s*run\s*,\s*["'](\w+)["']\s*\)""")


@dataclass(frozen=True)
class TableView:
    """A table as the page shows it; `error` where it cannot be shown."""

    name: str
    caption: str
    body: Markup = Markup("")
    note: Markup = Markup("")
    num_rows: int = 0
    files: tuple[tuple[str, str, str], ...] = ()  # word, address, size
    error: str = ""

    @property
    def folded(self) -> bool:
        return self.num_rows > FOLDED_ROWS


@dataclass(frozen=True)
class FigureView:
    """A figure as the page shows it: its address, caption, size on the page in pixels, and other files of it."""

    name: str
    caption: str
    address: str
    width: int | None
    height: int | None
    files: tuple[tuple[str, str, str], ...]


@dataclass
class NotebookView:
    """A notebook's section: what the manifest and the executed copy say of it, and what it made."""

    name: str
    status: str = "not run"
    title: str = ""
    question: Markup = Markup("")
    verdicts: pd.DataFrame = field(default_factory=pd.DataFrame)
    problem: str = ""
    facts: list[tuple[str, str]] = field(default_factory=list)
    parameters: str = ""
    tables: list[TableView] = field(default_factory=list)
    figures: list[FigureView] = field(default_factory=list)
    missing_tables: list[str] = field(default_factory=list)
    missing_figures: list[str] = field(default_factory=list)
    ipynb: str = ""
    html: str = ""

    @property
    def number(self) -> str:
        return self.name.split("_")[0]

    @property
    def heading(self) -> str:
        return self.title or _words(self.name.partition("_")[2] or self.name)

    @property
    def counts(self) -> list[tuple[str, int]]:
        """How many of its claims got each verdict."""
        return list(Counter(self.verdicts["judged"]).items()) if len(self.verdicts) else []


def write_page(path: str | Path, notebooks: bool = False) -> tuple[Path, str]:
    """Write `index.html` into the run at `path`; returns its path and a sentence on the notebooks as HTML.

    Those stand in `html/`, which is this function's own, unless they take more than `NOTEBOOKS_BYTES`; `notebooks`
    writes them even then. The page is written last, so that what it links to is there.

    Raises:
        ValueError: for a folder that is not a run's.
    """
    path = Path(path)
    if not (path / "tables").is_dir() and not (path / "manifest.json").is_file():
        raise ValueError(
            f"{path} is not the folder of a run (it has neither tables/ nor manifest.json); give one such as "
            f"results/quick, or make one with `detransformer reproduce`."
        )
    run = RunFolder(path)
    manifest, problem = run.known_manifest()
    executed = {file.stem: _read_notebook(file) for file in sorted(run.notebooks.glob("*.ipynb"))}
    views = _notebook_views(run, manifest, executed)
    rendered = {name: _notebook_html(run, name, cells) for name, cells in executed.items() if cells is not None}
    written, sentence = _write_notebooks(run, rendered, notebooks)
    for view in views:
        view.html = f"html/{quote(view.name)}.html" if view.name in written else ""
    other = _other(run, manifest, views)
    claims, rest = _verdicts(run, views)
    template = _templates().get_template("page.html")
    text = template.render(
        title=f"DeTransformer, run {manifest.get('profile') or path.resolve().name}",
        facts=_run_facts(manifest, views),
        versions=manifest["versions"],
        sources=manifest["data"].get("sources") or {},
        seeds=manifest["seeds"],
        problem=problem,
        claims=claims,
        rest=rest,
        notebooks=views,
        other=other,
        sentence=sentence,
        shown_rows=SHOWN_ROWS,
    )
    with atomic_write(run.path / "index.html") as file:
        file.write(text)
    return run.path / "index.html", sentence


# --- What the run has --------------------------------------------------------------------------------------------


def _read_notebook(file: Path) -> nbformat.NotebookNode | None:
    """An executed notebook; None where it cannot be read, as while it is being written."""
    try:
        return nbformat.read(file, as_version=4)
    except (OSError, ValueError, KeyError, AttributeError, nbformat.ValidationError):
        return None


def _notebook_views(run: RunFolder, manifest: dict, executed: dict) -> list[NotebookView]:
    """One section a notebook of the run, those that were not run too, in their order."""
    names = set(manifest["parameters"]) or set(TABLE_NOTEBOOKS.values())
    makers, kept = _makers(manifest), kept_from(manifest)
    found = {name: makers.get(name, OTHER) for name in _stems(run.tables, ".csv", ".md")}
    drawn = {name: _figure_notebook(name, manifest) for name in _stems(run.figures, ".svg", ".png")}
    names |= set(manifest["notebooks"]) | set(executed) | (set(found.values()) | set(drawn.values())) - {OTHER}
    views = []
    for name in sorted(names):
        entry = manifest["notebooks"].get(name, {})
        view = NotebookView(name, str(entry.get("status") or ("done" if name in executed else "not run")))
        view.tables = [_table(run, table) for table in _ordered(found, TABLE_NOTEBOOKS, name)]
        view.figures = [_figure(run, figure) for figure in _ordered(drawn, FIGURES, name)]
        if view.status != "not run":
            view.missing_tables = [t for t, n in TABLE_NOTEBOOKS.items() if n == name and t not in found]
            view.missing_figures = [f for f in FIGURES if _figure_notebook(f, manifest) == name and f not in drawn]
        view.facts = _notebook_facts(entry, kept.get(name, []))
        parameters = manifest["parameters"].get(name)
        view.parameters = (
            without_paths(yaml.safe_dump(parameters, sort_keys=False, default_flow_style=None)) if parameters else ""
        )
        if name in executed:
            view.ipynb = f"notebooks/{quote(name)}.ipynb"
            _read_cells(view, executed[name])
        saved = [_saved_verdicts(run, table.name) for table in view.tables]
        saved = [frame for frame in saved if len(frame)]
        view.verdicts = pd.concat(saved, ignore_index=True) if saved else view.verdicts
        if entry.get("error"):
            view.problem = without_paths(str(entry["error"]).splitlines()[0])
        views.append(view)
    return views


def _read_cells(view: NotebookView, notebook: nbformat.NotebookNode | None) -> None:
    """Title, question and verdicts of the executed notebook into its view."""
    if notebook is None:
        view.problem = "The executed notebook cannot be read; it may be being written just now."
        return
    opening = next((cell.source for cell in notebook.cells if cell.cell_type == "markdown"), "")
    title = re.search(r"^# (?:\d+\. *)?(.+)$", opening, re.M)
    question = re.search(r"\*\*Question\W*\*\*\W*(.+?)(?:\n\n|$)", opening, re.S)
    view.title = without_paths(title.group(1).strip()) if title else ""
    view.question = markdown(question.group(1)) if question else Markup("")
    view.verdicts = _shown_verdicts(notebook)


def _saved_verdicts(run: RunFolder, table: str) -> pd.DataFrame:
    """Claim, expected, obtained, kind and verdict of a saved table that has them; empty for others."""
    try:
        frame = run.load_table(table).rename(columns={"published": "expected"})
    except ValueError:
        return pd.DataFrame()
    if not {"claim", "judged"} <= set(frame.columns):
        return pd.DataFrame()
    return frame.reindex(columns=VERDICT_COLUMNS).astype(object).map(_short_number)


def _shown_verdicts(notebook: nbformat.NotebookNode) -> pd.DataFrame:
    """The same of the last table that an executed notebook shows with a claim and a verdict."""
    for cell in reversed(notebook.cells):
        for output in reversed(cell.get("outputs", [])):
            html = output.get("data", {}).get("text/html", "")
            for table in reversed(BeautifulSoup(html, "html.parser").find_all("table")):
                rows = [[c.get_text(" ", strip=True) for c in row.find_all(("th", "td"))] for row in table("tr")]
                if rows and {"claim", "judged"} <= set(rows[0]):
                    rows = [row for row in rows if len(row) == len(rows[0])]
                    frame = pd.DataFrame(rows[1:], columns=rows[0]).reindex(columns=VERDICT_COLUMNS, fill_value="")
                    return frame.map(_short_number)
    return pd.DataFrame()


def _makers(manifest: dict) -> dict[str, str]:
    """Table -> the notebook that makes it, by the registry, or by what the manifest says was made."""
    made = {str(t): name for name, e in manifest["notebooks"].items() for t in e.get("tables") or ()}
    return made | TABLE_NOTEBOOKS


def _figure_notebook(figure: str, manifest: dict) -> str:
    if figure in FIGURES:
        return max(TABLE_NOTEBOOKS.get(table, OTHER) for table in FIGURES[figure][0])
    made = {str(f): name for name, e in manifest["notebooks"].items() for f in e.get("figures") or ()}
    return made.get(figure, OTHER)


def _other(run: RunFolder, manifest: dict, views: list[NotebookView]) -> NotebookView | None:
    """Tables and figures of no notebook."""
    tables = {table.name for view in views for table in view.tables}
    figures = {figure.name for view in views for figure in view.figures}
    other = NotebookView(OTHER, title="Other tables and figures")
    other.tables = [_table(run, name) for name in _stems(run.tables, ".csv", ".md") if name not in tables]
    other.figures = [_figure(run, name) for name in _stems(run.figures, ".svg", ".png") if name not in figures]
    return other if other.tables or other.figures else None


def _stems(folder: Path, *suffixes: str) -> list[str]:
    files = [file for file in folder.iterdir() if file.suffix in suffixes and not file.name.startswith(".")]
    return sorted({file.stem for file in files})


def _ordered(found: dict[str, str], registry: dict, notebook: str) -> list[str]:
    """Names of `found` that belong to `notebook`, in the registry's order, others after them."""
    order = list(registry)
    mine = [name for name, maker in found.items() if maker == notebook]
    return sorted(mine, key=lambda name: (order.index(name) if name in order else len(order), name))


# --- Tables and figures ------------------------------------------------------------------------------------------


def _table(run: RunFolder, name: str) -> TableView:
    caption = TABLE_CAPTIONS.get(name) or _words(name)
    files = _files(run, "tables", name, (".csv", "CSV"), (".md", "Markdown"))
    try:
        file = run.tables / f"{name}.md"
        text = file.read_text(encoding="utf-8") if file.is_file() else to_markdown(run.load_table(name))
    except (OSError, ValueError) as error:
        return TableView(name, caption, files=files, error=without_paths(str(error)))
    lines = [re.sub(r" {2,}", " ", line) if line.startswith("|") else line for line in text.splitlines()]
    last = max((i for i, line in enumerate(lines) if line.startswith("|")), default=-1)
    body, num_rows = _cut(lines[: last + 1])
    note = "\n".join(lines[last + 1 :])
    missing = "" if (run.tables / f"{name}.csv").is_file() else "Its CSV is missing."
    return TableView(name, caption, markdown("\n".join(body)), markdown(note), num_rows, files, missing)


def _cut(lines: list[str]) -> tuple[list[str], int]:
    """Every table of `lines` with its first rows only, and how many rows there were in all."""
    kept, position, num_rows = [], 0, 0
    for line in lines:
        position = position + 1 if line.startswith("|") else 0
        num_rows += position > 2  # after head and rule
        if position <= SHOWN_ROWS + 2:
            kept.append(line)
    return kept, num_rows


def _figure(run: RunFolder, name: str) -> FigureView:
    """PNG where there is one: it is laid out with the fonts it was made with; the SVG is linked."""
    function = FIGURES[name][1] if name in FIGURES else None
    caption = ((function and function.__doc__) or _words(name)).strip().splitlines()[0]
    files = _files(run, "figures", name, (".svg", "SVG"), (".png", "PNG"))
    shown = next((address for word, address, _ in files if word == "PNG"), files[0][1])
    width = height = None
    if shown.endswith(".png"):
        try:
            with Image.open(run.figures / f"{name}.png") as image:
                width, height = (round(n * SCREEN_DPI / PNG_DPI) for n in image.size)
        except (OSError, UnidentifiedImageError):
            caption += " (the picture is damaged)"
    return FigureView(name, caption, shown, width, height, files)


def _files(run: RunFolder, folder: str, name: str, *kinds: tuple[str, str]) -> tuple[tuple[str, str, str], ...]:
    paths = [(word, run.path / folder / f"{name}{suffix}") for suffix, word in kinds]
    return tuple((w, f"{folder}/{quote(p.name)}", size_words(p.stat().st_size)) for w, p in paths if p.is_file())


# --- Verdicts ----------------------------------------------------------------------------------------------------


def _verdicts(run: RunFolder, views: list[NotebookView]) -> tuple[Markup, Markup]:
    """The README's table of the papers' claims, and the verdicts of the notebooks that it has no row of."""
    claims, covered = Markup(""), set()
    summary = _claims_table(run, "summary")
    if set(SUMMARY_COLUMNS) <= set(summary.columns):
        claims = markdown(readme.claims(run))
        covered = {*summary["notebook"].dropna(), TABLE_NOTEBOOKS["summary"]}
    rest = [view.verdicts.assign(notebook=view.number) for view in views if view.name not in covered]
    rest = [frame for frame in rest if len(frame)]
    return claims, markdown(to_markdown(pd.concat(rest, ignore_index=True))) if rest else Markup("")


def _claims_table(run: RunFolder, name: str) -> pd.DataFrame:
    try:
        return run.load_table(name)
    except ValueError:
        return pd.DataFrame()


# --- What made the run -------------------------------------------------------------------------------------------


def _run_facts(manifest: dict, views: list[NotebookView]) -> list[tuple[str, str]]:
    """Name and value of what a reader asks first; nothing of the machine's name or folders."""
    hardware, data = manifest["hardware"], manifest["data"]
    seconds = sum(float(e.get("duration_s") or 0) for e in manifest["notebooks"].values())
    machine = [str(hardware[key]) for key in ("cpu", "machine") if hardware.get(key)]
    machine += [f"{hardware['cores']} cores"] if hardware.get("cores") else []
    machine += [f"{hardware['memory_bytes'] / 2**30:.1f} GiB"] if hardware.get("memory_bytes") else []
    machine += [f"GPU: {gpu}" for gpu in hardware.get("gpus") or ()]
    kernel = str(hardware.get("kernel", "")).split("-")[0]  # what follows is the builder's
    system = f"{hardware.get('system', '')} {kernel}, Python {manifest['versions'].get('python', '')}"
    mirror = str(data.get("mirror", ""))
    if data.get("mirror_files"):
        mirror += f", {data['mirror_files']} files, {size_words(data.get('mirror_bytes') or 0)}"
    facts = [
        ("Profile", manifest.get("profile")),
        ("Last command", manifest.get("command")),
        ("Date", _date(manifest.get("date"))),
        ("Commit", _commit(manifest)),
        ("Kept from other commits", ", ".join(kept_from(manifest))),
        ("Notebooks", f"{sum(v.status == 'done' for v in views)} of {len(views)} done"),
        ("Duration", _duration(seconds) if seconds else ""),
        ("Hardware", ", ".join(machine)),
        ("System", system if hardware else ""),
        ("Data mirror", mirror),
        ("Hugging Face Hub", data.get("hub")),
    ]
    return [(name, without_paths(str(value))) for name, value in facts if value]


def _notebook_facts(entry: dict, kept: list[str]) -> list[tuple[str, str]]:
    facts = [
        ("Finished", _date(entry.get("finished"))),
        ("Duration", _duration(float(entry["duration_s"])) if entry.get("duration_s") else ""),
        ("Commit", _commit(entry)),
        ("Kept from", ", ".join(f"commit {commit[:12]}" for commit in kept)),
    ]
    return [(name, value) for name, value in facts if value]


def _commit(entry: dict) -> str:
    commit = str(entry.get("commit") or "")
    changed = ", with changes that were not committed" if entry.get("dirty") else ""
    return commit[:12] + changed if commit and commit != "unknown" else commit


def _date(text: object) -> str:
    try:
        return f"{datetime.fromisoformat(str(text)):%Y-%m-%d %H:%M} UTC" if text else ""
    except ValueError:
        return ""


def _duration(seconds: float) -> str:
    hours, minutes = divmod(round(seconds) // 60, 60)
    if seconds < 60:
        return f"{seconds:.0f} s"
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {round(seconds) % 60:02d} s"


# --- Executed notebooks ------------------------------------------------------------------------------------------


def _notebook_html(run: RunFolder, name: str, notebook: nbformat.NotebookNode) -> str:
    """An executed notebook as a page of its own; figures that the run has saved are referred to, not repeated."""
    from nbconvert import HTMLExporter

    notebook = nbformat.from_dict(json.loads(json.dumps(notebook)))
    for cell in notebook.cells:
        cell.source = without_paths(cell.source)
        _slim_outputs(run, cell)
    quiet = dict(exclude_anchor_links=True, exclude_input_prompt=True, exclude_output_prompt=True)
    body, _ = HTMLExporter(template_name="basic", **quiet).from_notebook_node(notebook)
    body = bleach.clean(body, HTML_TAGS, _harmless, PROTOCOLS, strip=True)
    body = _boxed(body)
    return _templates().get_template("notebook.html").render(name=name, body=Markup(body))


def _slim_outputs(run: RunFolder, cell: nbformat.NotebookNode) -> None:
    outputs = cell.get("outputs", [])
    pictures = [output for output in outputs if "image/png" in output.get("data", {})]
    drawn = _DRAWN.findall(cell.source)
    if len(drawn) == len(pictures):
        for figure, output in zip(drawn, pictures, strict=True):
            if (run.figures / f"{figure}.png").is_file():
                alt = escape(_figure(run, figure).caption)
                output.data = {"text/html": f'<img src="../figures/{quote(figure)}.png" alt="{alt}">'}
    for output in outputs:
        if output.output_type == "stream":
            lines = without_paths(output.text).splitlines()
            left_out = len(lines) - SHOWN_LINES
            if left_out > 0:
                lines = [*lines[:SHOWN_LINES], f"({left_out} more lines are in the .ipynb)"]
            output.text = "\n".join(lines) + "\n"
        for kind, value in list(output.get("data", {}).items()):
            if kind in ("text/plain", "text/markdown") and isinstance(value, str):
                output.data[kind] = without_paths(value)
            elif kind == "text/html":
                soup = BeautifulSoup(value, "html.parser")
                for tag in soup(["style", "script"]):
                    tag.decompose()
                output.data[kind] = str(soup)
        if output.output_type == "error":
            output.traceback = [without_paths(line) for line in output.traceback]


def _harmless(tag: str, name: str, value: str) -> bool:
    """Whether an attribute may stay: nothing that acts, or loads what is not the run's own."""
    if tag == "img" and name == "src":
        return value.startswith("data:image/") or not re.match(r"\w+:|//", value)
    if tag == "a" and name == "href":
        return not value.startswith("data:")
    return name in ("class", "colspan", "rowspan", "alt") or (name == "id" and tag in ("h1", "h2", "h3", "h4"))


def _boxed(html: str) -> str:
    """Tables in boxes of their own, every id once, every picture with a text."""
    soup, seen = BeautifulSoup(html, "html.parser"), set()
    for tag in soup.find_all(id=True):
        if tag["id"] in seen:
            del tag["id"]
        else:
            seen.add(tag["id"])
    for table in soup.find_all("table"):
        table.wrap(soup.new_tag("div", attrs={"class": "scroll", "tabindex": "0", "role": "group"}))
    for picture in soup.find_all("img"):
        if not picture.get("src"):
            picture.decompose()
        elif not picture.get("alt") or picture["alt"].startswith("No description"):  # nbconvert's own words
            picture["alt"] = "output of the cell above"
    return str(soup)


def _write_notebooks(run: RunFolder, rendered: dict[str, str], asked: bool) -> tuple[set[str], str]:
    """Write html/NAME.html; returns the names written and a sentence for the page."""
    size = sum(len(html.encode()) for html in rendered.values())
    if not rendered:
        written, sentence = {}, "No executed notebook could be read."
    elif size > NOTEBOOKS_BYTES and not asked:
        written = {}
        sentence = (
            f"As HTML the notebooks take {size_words(size)}, so that their .ipynb is linked; "
            f"`detransformer page --notebooks` writes them."
        )
    else:
        written, sentence = rendered, f"Executed notebooks as HTML: {size_words(size)} in html/."
    for name, html in written.items():
        with atomic_write(run.path / "html" / f"{name}.html") as file:
            file.write(html)
    for file in (run.path / "html").glob("*.html"):
        if file.stem not in written:
            file.unlink()
    return set(written), sentence


# --- Words -------------------------------------------------------------------------------------------------------


class _Renderer(mistune.HTMLRenderer):
    """Markdown of tables and notes: HTML in it is escaped, nothing is loaded, verdicts are coloured."""

    def image(self, text: str, url: str, title: str | None = None) -> str:
        return text

    def render_table(self, text: str) -> str:
        return f'<div class="scroll" tabindex="0" role="group"><table>{text}</table></div>\n'

    def render_table_head(self, text: str) -> str:
        return f"<thead><tr>{text}</tr></thead>"

    def render_table_body(self, text: str) -> str:
        return f"<tbody>{text}</tbody>"

    def render_table_row(self, text: str) -> str:
        return f"<tr>{text}</tr>\n"

    def render_table_cell(self, text: str, align: str | None = None, head: bool = False) -> str:
        if head:
            return f'<th scope="col">{text}</th>'
        if text in VERDICT_CLASSES or _COUNTS.fullmatch(text):
            kind = "" if text in VERDICT_CLASSES else ' class="counts"'
            return f"<td{kind}>{badges(text)}</td>"
        return f'<td class="wide">{text}</td>' if len(text) > WIDE_CELL else f"<td>{text}</td>"


def markdown(text: str) -> Markup:
    """Markdown as HTML that needs no escaping; absolute paths are cut."""
    return Markup(_markdown_parser()(without_paths(text)))


@cache
def _markdown_parser() -> mistune.Markdown:
    renderer = _Renderer(escape=True)
    parser = mistune.create_markdown(renderer=renderer, plugins=["table"])
    for name in ("table", "table_head", "table_body", "table_row", "table_cell"):  # instead of the plugin's
        renderer.register(name, getattr(_Renderer, f"render_{name}"))
    return parser


def badges(text: str) -> Markup:
    """A verdict, or counts such as `3 matches, 1 does not hold`, coloured; other text escaped."""
    if not (text in VERDICT_CLASSES or _COUNTS.fullmatch(text)):
        return escape(text)
    parts = re.findall(rf"(\d+ )?({_WORDS})", text)
    spans = [Markup('<span class="badge {}">{}</span>').format(VERDICT_CLASSES[w], n + w) for n, w in parts]
    return Markup(" ").join(spans)


def without_paths(text: str) -> str:
    """`text` with absolute paths cut to their last part."""
    return _PATH.sub(r"…/\1", text.replace(os.path.expanduser("~") + "/", "…/"))


def size_words(num_bytes: float) -> str:
    """Such as `1.2 MB` or `34 kB`."""
    return f"{num_bytes / 1e6:.1f} MB" if num_bytes >= 1e6 else f"{max(1, round(num_bytes / 1e3))} kB"


def _words(name: str) -> str:
    return name.replace("_", " ").strip().capitalize() or name


def _short_number(value: object) -> str:
    """A value of a cell in four digits where it is a number; nothing where it is missing."""
    number = pd.to_numeric(str(value), errors="coerce")
    return {"nan": "", "None": "", "<NA>": ""}.get(str(value), str(value)) if pd.isna(number) else f"{number:.4g}"


@cache
def _templates() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True, trim_blocks=True, lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )  # fmt: skip
    environment.globals["style"] = Markup((TEMPLATES / "page.css").read_text(encoding="utf-8"))
    environment.globals["status_class"] = lambda status: STATUS_CLASSES.get(status, "none")
    environment.globals["verdict_class"] = lambda verdict: VERDICT_CLASSES.get(verdict, "none")
    return environment
