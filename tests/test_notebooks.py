"""Every notebook: no outputs, one parameters cell of literals, short cells, a verdict last; profiles in step."""

import ast
import builtins
import re

import nbformat
import pytest

from detransformer.files import repository_root
from detransformer.reproduce import PROFILES, USES, find_notebooks, load_profile, parameters_cell

ROOT = repository_root()
PATHS = sorted((ROOT / "notebooks").glob("*.ipynb"))
BUILTIN = sorted(path.stem for path in PROFILES.glob("*.yaml"))


@pytest.fixture(params=PATHS, ids=lambda path: path.stem)
def notebook(request):
    return nbformat.read(request.param, as_version=4)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def tags(cell):
    return cell.metadata.get("tags", [])


def test_all_are_there():
    assert [int(path.stem[:2]) for path in PATHS] == [*range(1, 9), 11, 12, 13]


def test_is_valid_and_committed_without_outputs(notebook):
    nbformat.validate(notebook)
    for cell in code_cells(notebook):
        assert cell.outputs == [] and cell.execution_count is None
    assert "papermill" not in notebook.metadata


def test_has_one_parameters_cell_of_literals(notebook):
    tagged = [cell for cell in code_cells(notebook) if "parameters" in tags(cell)]
    assert len(tagged) == 1
    for statement in ast.parse(tagged[0].source).body:
        assert isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name), ast.unparse(statement)
    parameters = parameters_cell(notebook.cells)  # raises for what is not a literal
    assert parameters["run_dir"] == "../results/local"
    assert not any("injected-parameters" in tags(cell) for cell in notebook.cells)


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
        lines = [line for line in cell.source.splitlines() if line.strip() and not line.strip().startswith("#")]
        assert len(lines) <= (15 if "plot" in tags(cell) else 10), cell.source
        imports = [n for n in ast.walk(ast.parse(cell.source)) if isinstance(n, (ast.Import, ast.ImportFrom))]
        assert not imports, cell.source


def test_every_code_cell_follows_a_word_of_explanation(notebook):
    for before, cell in zip(notebook.cells, notebook.cells[1:], strict=False):
        if cell.cell_type == "code" and "parameters" not in tags(cell):
            assert before.cell_type == "markdown", cell.source


def test_uses_nothing_of_this_machine_and_runs_alone(notebook):
    """Names are defined above in the same notebook, and no cell reaches for an absolute path or an installer."""
    defined = set(vars(builtins)) | {"display"}
    for cell in code_cells(notebook):
        assert not re.search(r"""["']/(home|work|root|tmp|Users)|[!%]pip|^\s*!""", cell.source, re.M), cell.source
        tree = ast.parse(cell.source)
        for node in ast.walk(tree):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                defined |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                defined.add(node.id)
            elif isinstance(node, ast.arg):
                defined.add(node.arg)
            elif isinstance(node, ast.FunctionDef):
                defined.add(node.name)
        loaded = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)}
        assert loaded <= defined, loaded - defined


def test_starts_no_process_group_in_the_kernel(notebook):
    assert not any("init_process_group" in cell.source or "torch.distributed" in cell.source for cell in notebook.cells)


def test_ends_with_expected_obtained_verdict(notebook):
    text = "\n".join(cell.source for cell in notebook.cells[-3:])
    assert re.search(r"expected", text, re.I) and re.search(r"obtained", text, re.I)
    last = code_cells(notebook)[-1].source
    assert "verdict" in last or "summary" in last, "the last cell shows the verdict table"


@pytest.mark.parametrize("profile", BUILTIN)
def test_profile_has_a_section_for_each_notebook_and_only_known_parameters(profile):
    _, sections = load_profile(profile)
    notebooks = find_notebooks(ROOT, sections)
    assert list(sections) == [notebook.name for notebook in notebooks]
    for notebook in notebooks:
        defaults = parameters_cell(notebook.cells)
        assert "run_dir" not in notebook.parameters, "reproduce sets it"
        for name, value in notebook.parameters.items():
            kinds = {type(value), type(defaults[name])}
            allowed = kinds <= {int, float} or len(kinds) == 1 or type(None) in kinds
            assert allowed, f"{profile}: {notebook.name}.{name} is {value!r}, the notebook has {defaults[name]!r}"


def test_notebooks_run_alone_with_the_quick_values():
    _, sections = load_profile("quick")
    for notebook in find_notebooks(ROOT, sections):
        defaults = parameters_cell(notebook.cells)
        differing = {k: (v, defaults[k]) for k, v in notebook.parameters.items() if defaults[k] != v}
        assert not differing, f"{notebook.name}: (quick, notebook) {differing}"


def test_the_uses_table_names_earlier_notebooks():
    names = [path.stem for path in PATHS]
    for name, used in USES.items():
        assert name in names and all(names.index(other) < names.index(name) for other in used)
