"""Every notebook: one parameters cell, short cells, figures drawn in cells, a verdict last; profiles in step."""

import ast
import inspect
import re
import shutil

import adaptive_studies as adaptive
import latency_studies as latency
import matplotlib
import nbformat
import pandas as pd
import pytest
from generation_studies import generation_rows

from detransformer.files import repository_root
from detransformer.notebooks import USES, find_notebooks
from detransformer.profiles import built_in_profiles, load_profile, load_settings
from detransformer.training import CausalConfig

ROOT = repository_root()

PATHS = sorted((ROOT / "notebooks").glob("*.ipynb"))


@pytest.fixture(params=PATHS, ids=lambda path: path.stem)
def notebook(request):
    return nbformat.read(request.param, as_version=4)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def tags(cell):
    return cell.metadata.get("tags", [])


def test_one_claim_a_notebook_numbered_without_a_gap():
    assert [path.stem[:2] for path in PATHS] == [f"{number:02}" for number in range(1, len(PATHS) + 1)]


def test_has_one_parameters_cell(notebook):
    """Long recipes live in the profile."""
    (cell,) = (cell for cell in code_cells(notebook) if "parameters" in tags(cell))
    values = {line.targets[0].id: ast.literal_eval(line.value) for line in ast.parse(cell.source).body}
    assert values == {"profile": "quick", "run_dir": "../results/local", "measure": True}


def test_opens_with_title_question_paper_and_minutes(notebook):
    opening = notebook.cells[0]
    assert opening.cell_type == "markdown" and opening.source.startswith("# ")
    assert "**Question" in opening.source and "Paper" in opening.source
    assert re.search(r"minute|second|hour", opening.source), "says how long it takes"


def test_imports_then_parameters_then_short_cells(notebook):
    cells = code_cells(notebook)
    assert "parameters" in tags(cells[1]), "imports come first, parameters second"
    first = [node for node in ast.parse(cells[0].source).body if not isinstance(node, (ast.Import, ast.ImportFrom))]
    assert not first, "the first code cell only imports"
    for cell in cells[2:]:
        tree = ast.parse(cell.source)
        limit = 15 if "plot" in tags(cell) else 10
        lines = [line for line in cell.source.splitlines() if line.strip() and not line.strip().startswith("#")]
        assert len(lines) <= limit and max(map(len, lines)) <= 130, cell.source
        assert not [node for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom))], cell.source
        assert ("plot" in tags(cell)) == ("save(run" in cell.source), "a cell that draws saves its figure, and no other"


def test_every_code_cell_follows_a_word_of_explanation(notebook):
    for before, cell in zip(notebook.cells, notebook.cells[1:], strict=False):
        if cell.cell_type == "code" and "parameters" not in tags(cell):
            assert before.cell_type == "markdown", cell.source


def test_reaches_for_no_place_installer_or_process_group(notebook):
    for cell in code_cells(notebook):
        assert not re.search(r"""["']/(home|work|root|tmp|Users)|[!%]pip|^\s*!""", cell.source, re.M), cell.source
        assert "init_process_group" not in cell.source and "torch.distributed" not in cell.source, cell.source


def test_ends_with_expected_obtained_verdict(notebook):
    text = "\n".join(cell.source for cell in notebook.cells[-3:])
    assert re.search(r"expected", text, re.I) and re.search(r"obtained", text, re.I)
    last = code_cells(notebook)[-1].source
    assert "verdict" in last or "summary" in last, "the last cell shows the verdict table"


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_draws_from_the_saved_tables_of_the_committed_run(path, tmp_path, monkeypatch):
    """All cells with `measure = False`, in this process: every figure that a cell saves is there."""
    run = committed_run(tmp_path)
    monkeypatch.chdir(ROOT / "notebooks")
    drawn = draw(path, run)
    assert drawn == set(re.findall(r'save\(run, \\"(\w+)\\"', path.read_text(encoding="utf-8")))


def test_tasks_that_counting_words_masters_leave_nothing_to_keep(tmp_path, monkeypatch):
    """As on the built-in corpus."""
    run = committed_run(tmp_path)
    probes = pd.read_csv(run / "tables" / "probes.csv").assign(score=100.0)
    probes.to_csv(run / "tables" / "probes.csv", index=False)
    (run / "tables" / "finetuning_runs.csv").unlink()
    monkeypatch.chdir(ROOT / "notebooks")
    (path,) = (path for path in PATHS if path.stem == "03_accuracy")
    assert "accuracy_latency" not in draw(path, run)
    assert pd.read_csv(run / "tables" / "kept.csv")["share"].isna().all()
    (path,) = (path for path in PATHS if path.stem == "16_summary")
    draw(path, run)


def committed_run(folder):
    """A copy of the committed run's tables."""
    shutil.copytree(ROOT / "results" / "reference" / "tables", folder / "run" / "tables")
    shutil.copy(ROOT / "results" / "reference" / "manifest.json", folder / "run")
    return folder / "run"


def draw(path, run) -> set[str]:
    """Runs a notebook's cells without measuring, in this process, and returns the names of all figures in `run`."""
    matplotlib.use("agg")
    names = {"display": lambda shown: shown}
    for cell in code_cells(nbformat.read(path, as_version=4)):
        exec(compile(cell.source, path.stem, "exec"), names)
        if "parameters" in tags(cell):
            names |= {"run_dir": str(run), "measure": False, "profile": "reference"}
        matplotlib.pyplot.close("all")
    return {figure.stem for figure in (run / "figures").glob("*.png")}


@pytest.mark.parametrize("profile", built_in_profiles())
def test_profile_has_known_notebooks_and_settings(profile):
    sections = load_profile(profile)
    assert set(sections) <= {path.stem for path in PATHS}
    for path in PATHS:
        if path.stem in sections:
            settings, defaults = load_settings(profile, path.stem), load_profile("quick")[path.stem]
            for name, value in settings.items():
                kinds = {type(value), type(defaults[name])}
                assert kinds <= {int, float} or len(kinds) == 1 or type(None) in kinds, f"{profile}: {path.stem}.{name}"


def test_a_setting_that_nothing_reads_is_refused(tmp_path):
    (tmp_path / "mine.yaml").write_text("06_latency:\n  methdos: [tp]\n")
    with pytest.raises(ValueError, match="'methdos' in section 06_latency .*choose from grids"):
        load_settings(str(tmp_path / "mine.yaml"), "06_latency")
    assert load_settings("reference", "05_placement") == load_settings("quick", "05_placement")


def test_settings_that_a_notebook_reads_are_in_quick():
    for path in PATHS:
        read = set(re.findall(r'settings\[\\"(\w+)\\"\]', path.read_text(encoding="utf-8")))
        assert read <= set(load_settings("quick", path.stem)), path.stem


@pytest.mark.parametrize("profile", built_in_profiles())
def test_settings_fit_the_functions_that_take_them(profile):
    """The sections that a notebook passes on as keyword arguments."""
    rows, adaptive_settings = load_settings(profile, "06_latency"), load_settings(profile, "09_adaptive")
    assert all(latency.latency_cells(**grid) for grid in rows["grids"])
    for function, settings in (
        (latency.plan_map_rows, adaptive_settings["plan_map"]),
        (adaptive.choice_rows, adaptive_settings["choices"]),
        (adaptive.unequal_rows, adaptive_settings["unequal"]),
        (adaptive.trace_rows, adaptive_settings["trace"] | {"phases": adaptive_settings["phases"]}),
        (generation_rows, load_settings(profile, "10_generation")["generation"]),
    ):
        inspect.signature(function).bind("run", **settings)
    inspect.signature(latency.scale_out_rows).bind(**load_settings(profile, "08_scaling")["scale_out"])
    assert CausalConfig(**load_settings(profile, "10_generation")["perplexity"])


def test_the_uses_table_names_earlier_notebooks():
    names = sorted({*USES, *(used for uses in USES.values() for used in uses)})
    for name, used in USES.items():
        assert all(other < name for other in used)
    assert set(names) <= {path.stem for path in PATHS}
    assert find_notebooks(ROOT) == PATHS
