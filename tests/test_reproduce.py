"""Reproduction with tiny notebooks made here: order, skipping, continuing, a failing cell, the manifest, the kernel."""

import json
import signal
import subprocess
import sys

import nbformat
import psutil
import pytest
import yaml

from conftest import wait_until
from detransformer.notebooks import NotebookFailed
from detransformer.record.run import RunFolder
from detransformer.reproduce import locked, redraw, reproduce, write_index

PARAMETERS = 'run_dir = "../results/local"\nprofile = "quick"\nmeasure = True'
VALUE = 'from detransformer.profiles import load_settings\nvalue = load_settings(profile, "{name}").get("value", 1)'
SAVE = (
    "import pandas as pd\nfrom detransformer.record.run import RunFolder\n"
    'RunFolder(run_dir).save_table(pd.DataFrame({{"value": [value], "source": ["made here"]}}), "{table}")'
)


def write_notebook(root, name, *cells):
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    notebook = nbformat.v4.new_notebook(metadata={"kernelspec": kernel})
    notebook.cells = [nbformat.v4.new_markdown_cell(f"# {name}")]
    notebook.cells += [nbformat.v4.new_code_cell(source) for source in (PARAMETERS, VALUE.format(name=name), *cells)]
    notebook.cells[1].metadata["tags"] = ["parameters"]
    (root / "notebooks").mkdir(parents=True, exist_ok=True)
    nbformat.write(notebook, root / "notebooks" / f"{name}.ipynb")


@pytest.fixture
def clone(tmp_path, monkeypatch):
    """A repository of two notebooks, each saving one table, and a profile for them."""
    monkeypatch.delenv("DETRANSFORMER_DATA", raising=False)
    root = tmp_path / "clone"
    root.mkdir()
    (root / "pyproject.toml").write_text('[project]\nname = "x"\ndependencies = ["pandas==3.1.*"]\n')
    write_notebook(root, "01_first", SAVE.format(table="first"))
    write_notebook(root, "02_second", SAVE.format(table="second"))
    set_profile(root, first={"value": 5, "seed": 7}, second={})
    return root


def set_profile(root, first, second):
    (root / "tiny.yaml").write_text(yaml.safe_dump({"01_first": first, "02_second": second}))


def run_all(root, **options):
    said = []
    run = reproduce(str(root / "tiny.yaml"), root=root, say=said.append, **options)
    return run, said, json.loads(run.manifest_path.read_text())


def test_runs_in_order_and_writes_everything(clone):
    run, said, manifest = run_all(clone)
    assert run.path == clone / "results" / "tiny"
    assert [line.split(":")[0] for line in said[:-1]] == ["[1/2] 01_first"] * 2 + ["[2/2] 02_second"] * 2
    assert run.load_table("first")["value"].tolist() == [5], "the profile's setting"
    assert run.load_table("second")["value"].tolist() == [1], "the notebook's own default"
    for name in ("01_first", "02_second"):
        executed = nbformat.read(run.notebooks / f"{name}.ipynb", as_version=4)
        assert any(cell.get("execution_count") for cell in executed.cells)
        assert str(clone) not in json.dumps(executed), "an executed notebook names no place outside the clone"
    first = manifest["notebooks"]["01_first"]
    assert (first["status"], first["tables"]) == ("done", ["first"]) and first["duration_s"] > 0
    assert manifest["profile"] == "tiny" and manifest["parameters"]["01_first"] == {"value": 5, "seed": 7}
    assert manifest["seeds"] == {"01_first.seed": 7}
    assert manifest["versions"]["pandas"].startswith("3.1") and manifest["hardware"]["memory_bytes"] > 2**28
    assert manifest["hardware"]["cores"] >= 1 and manifest["hardware"]["kernel"]
    assert manifest["data"]["mirror"] == "none" and manifest["data"]["sources"]["first"] == ["made here"]
    assert manifest["commit"] == "unknown" and manifest["command"] and manifest["date"].startswith("20")


def test_second_run_skips_and_a_change_runs_what_it_touches(clone):
    run_all(clone)
    _, said, _ = run_all(clone)
    assert sum("skipped" in line for line in said) == 2
    set_profile(clone, first={"value": 5, "seed": 7}, second={"value": 8})
    run, said, _ = run_all(clone)
    assert [line.split(" ")[1].rstrip(":") for line in said if "skipped" in line] == ["01_first"]
    assert run.load_table("second")["value"].tolist() == [8]
    write_notebook(clone, "01_first", SAVE.format(table="first"), "print('one cell more')")
    _, said, _ = run_all(clone)
    assert ["skipped" in line for line in said if ": started" in line or "skipped" in line] == [False, True]


def test_only_force_and_a_deleted_table_run_again(clone):
    run, _, before = run_all(clone)
    _, said, after = run_all(clone, only=["2"], force=True)
    assert "[1/1] 02_second: started" in said[0]
    assert after["notebooks"]["01_first"] == before["notebooks"]["01_first"]
    (run.tables / "first.csv").unlink()
    _, said, _ = run_all(clone)
    assert "started" in said[0] and "skipped" in said[2]


def test_data_on_offer_is_part_of_the_key(clone, monkeypatch, tmp_path):
    run_all(clone, only=["01"])
    (tmp_path / "mirror").mkdir()
    (tmp_path / "mirror" / "rows.tsv").write_text("a\tb\n")
    monkeypatch.setenv("DETRANSFORMER_DATA", str(tmp_path / "mirror"))
    _, said, manifest = run_all(clone, only=["01"])
    assert "started" in said[0]
    assert manifest["data"]["mirror_files"] == 1 and str(tmp_path) not in json.dumps(manifest["data"])


def test_failing_cell_is_named_and_the_rest_is_kept(clone):
    write_notebook(clone, "02_second", SAVE.format(table="half"), "raise KeyError('no such layer')", "1 + 1")
    with pytest.raises(NotebookFailed, match=r"02_second stopped in code cell 5: KeyError: 'no such layer'") as caught:
        run_all(clone)
    assert len(str(caught.value).splitlines()) == 2 and "Traceback" not in str(caught.value)
    run = RunFolder(clone / "results" / "tiny")
    manifest = json.loads(run.manifest_path.read_text())
    assert [manifest["notebooks"][n]["status"] for n in ("01_first", "02_second")] == ["done", "failed"]
    assert run.has_table("first") and run.has_table("half") and (run.notebooks / "02_second.ipynb").is_file()
    write_notebook(clone, "02_second", SAVE.format(table="second"))
    _, said, manifest = run_all(clone)
    assert "01_first: unchanged" in said[0] and manifest["notebooks"]["02_second"]["status"] == "done"


def test_executed_notebook_keeps_the_last_state_of_a_progress_bar(clone):
    """As text: a saved widget could not be shown."""
    bar = "import time\nfrom tqdm.auto import tqdm\nfor _ in tqdm(range(3), mininterval=0):\n    time.sleep(0.1)"
    write_notebook(clone, "01_first", bar)
    run, _, _ = run_all(clone, only=["01"])
    (output,) = nbformat.read(run.notebooks / "01_first.ipynb", as_version=4).cells[-1].outputs
    assert output.output_type == "stream" and "3/3" in output.text and "1/3" not in output.text


def test_dead_kernel_is_a_failed_notebook(clone):
    write_notebook(clone, "01_first", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    with pytest.raises(NotebookFailed, match="01_first stopped because its kernel died"):
        run_all(clone, only=["01"])


def start_command(root) -> tuple[subprocess.Popen, int]:
    """The command, and the process id of the kernel of its second notebook, which sleeps."""
    said = root / "kernel"
    sleeping = f"import os, pathlib, time\npathlib.Path({str(said)!r}).write_text(str(os.getpid()))\ntime.sleep(600)"
    write_notebook(root, "02_second", sleeping)
    # The command finds the clone it runs from; the tiny one is put in its place.
    code = (
        f"import pathlib, detransformer.reproduce as r; r.repository_root = lambda: pathlib.Path({str(root)!r})\n"
        "from detransformer.cli import main; main()"
    )
    options = ["reproduce", "--profile", str(root / "tiny.yaml"), "--output", "results/run"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen([sys.executable, "-c", code, *options], cwd=root, text=True, **pipes)
    wait_until(lambda: said.is_file() and said.read_text(), 200)
    return process, int(said.read_text())


def test_a_killed_run_leaves_no_kernel(clone):
    process, kernel = start_command(clone)
    process.kill()
    process.communicate(timeout=60)
    wait_until(lambda: not psutil.pid_exists(kernel), 60)


def test_interrupted_run_continues_with_the_next_notebook(clone):
    process, kernel = start_command(clone)
    manifest_path = clone / "results" / "run" / "manifest.json"
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 130, stderr
    wait_until(lambda: not psutil.pid_exists(kernel), 60)
    assert "Traceback" not in stderr and stderr.strip().endswith("interrupted; what was finished is kept.")
    statuses = {n: e["status"] for n, e in json.loads(manifest_path.read_text())["notebooks"].items()}
    assert statuses == {"01_first": "done", "02_second": "interrupted"}
    write_notebook(clone, "02_second", SAVE.format(table="second"))
    _, said, manifest = run_all(clone, output=clone / "results" / "run")
    assert "01_first: unchanged" in said[0] and manifest["notebooks"]["02_second"]["status"] == "done"


@pytest.fixture
def repository(clone):
    """The clone as a git repository with one commit; its results but for results/reference are ignored."""
    (clone / ".gitignore").write_text("/results/*\n!/results/reference/\n/results/**/*rows.json\n.lock\n/data/mirror\n")
    git(clone, "init", "-q")
    commit_all(clone)
    return clone


def git(root, *words):
    identity = ["-c", "user.name=Someone", "-c", "user.email=someone@example.org", "-c", "commit.gpgsign=false"]
    command = ["git", "-C", str(root), *identity, *words]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def commit_all(root):
    git(root, "add", "-A")
    git(root, "commit", "-q", "--allow-empty", "-m", "x")
    return git(root, "rev-parse", "HEAD")


def test_the_committed_run_is_of_a_commit(repository):
    reference = repository / "results" / "reference"
    profile = (repository / "tiny.yaml").read_text()
    (repository / "tiny.yaml").write_text(profile + "# changed\n")
    for output in (reference, reference / "part"):
        with pytest.raises(ValueError, match=r"tiny\.yaml is not committed; commit first, or .*--output") as caught:
            run_all(repository, output=output)
        assert len(str(caught.value).splitlines()) == 1
    assert not reference.exists(), "nothing is started"
    _, _, manifest = run_all(repository, only=["01"])
    assert manifest["dirty"] is True, "elsewhere it may be written, and says so"
    (repository / "tiny.yaml").write_text(profile)
    (repository / "lib").mkdir()
    (repository / "lib" / "new.py").write_text("x = 1\n")
    with pytest.raises(ValueError, match=r"lib/new\.py is not committed"):
        run_all(repository, output=reference)
    (repository / "lib" / "new.py").unlink()
    (repository / "data" / "mirror").mkdir(parents=True)
    (repository / "data" / "mirror" / "rows.tsv").write_text("ignored by git\n")
    head = git(repository, "rev-parse", "HEAD")
    _, _, manifest = run_all(repository, output=reference)
    assert (manifest["commit"], manifest["dirty"], manifest["kept_from"]) == (head, False, {})
    git(repository, "cat-file", "-e", manifest["commit"])
    commit_all(repository)
    (reference / "tables" / "first.csv").unlink()  # changes inside the run are the run's own
    _, _, manifest = run_all(repository, output=reference)
    assert manifest["dirty"] is False and manifest["notebooks"]["01_first"]["commit"] == manifest["commit"]


def test_the_committed_run_wants_a_commit_that_git_knows(clone):
    with pytest.raises(ValueError, match="that git knows; run in a git clone, or choose another folder with --output"):
        run_all(clone, output=clone / "results" / "reference")


def test_what_is_kept_from_another_commit_is_named(repository):
    keep = (
        "from pathlib import Path\nPath(run_dir, 'rows.json').exists() or Path(run_dir, 'rows.json').write_text('[]')"
    )
    write_notebook(repository, "02_second", keep, SAVE.format(table="second"))
    first = commit_all(repository)
    reference = repository / "results" / "reference"
    _, _, manifest = run_all(repository, output=reference)
    assert manifest["kept_from"] == {}
    write_notebook(repository, "02_second", keep, SAVE.format(table="second"), "'one cell more'")
    second = commit_all(repository)
    _, said, manifest = run_all(repository, output=reference)
    assert "01_first: unchanged" in said[0] and manifest["commit"] == second != first
    entries = manifest["notebooks"]
    assert [entries[name]["commit"] for name in ("01_first", "02_second")] == [first, second]
    assert list(entries["02_second"]["rows_kept_from"]) == [first], "its rows were there already"
    assert manifest["kept_from"] == {"01_first": [first], "02_second": [first]}
    write_notebook(
        repository,
        "02_second",
        SAVE.format(table="second"),
        "import pathlib\npathlib.Path(run_dir, 'rows.json').unlink(missing_ok=True)",
    )
    third = commit_all(repository)
    _, _, manifest = run_all(repository, output=reference)
    assert first in manifest["kept_from"]["02_second"], "rows that a table used up are in that table"
    _, _, manifest = run_all(repository, output=reference, force=True)
    assert manifest["kept_from"] == {} and manifest["commit"] == third


def test_kernel_is_this_interpreter_whatever_is_installed(clone, monkeypatch, tmp_path):
    foreign = tmp_path / "jupyter" / "kernels" / "python3"
    foreign.mkdir(parents=True)
    spec = {"argv": ["/bin/false", "{connection_file}"], "display_name": "other", "language": "python"}
    (foreign / "kernel.json").write_text(json.dumps(spec))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", "/proc/read-only")  # as in a home folder that is
    startup = tmp_path / "ipython" / "profile_default" / "startup"
    startup.mkdir(parents=True)
    (startup / "00_mine.py").write_text("raise SystemExit")
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    write_notebook(clone, "01_first", "import sys, os\nprint(sys.executable, os.environ['TOKENIZERS_PARALLELISM'])")
    run, _, _ = run_all(clone, only=["01"])
    executed = nbformat.read(run.notebooks / "01_first.ipynb", as_version=4)
    assert executed.cells[-1].outputs[0].text.strip().replace("./", f"{clone}/") == f"{sys.executable} false"


@pytest.mark.parametrize(
    ("section", "only", "message"),
    [
        ({"01_first": {}, "02_second": {}, "09_more": {}}, [], "'09_more'"),
        ({"01_first": {}, "02_second": {}}, ["07"], "--only 07 names no notebook.*02_second"),
        ({"01_first": {"value": [{3: "a"}]}, "02_second": {}}, [], "has the key 3, which is no word: put it in quotes"),
    ],
)
def test_wrong_profile_is_one_sentence(clone, section, only, message):
    (clone / "tiny.yaml").write_text(yaml.safe_dump(section))
    with pytest.raises(ValueError, match=message):
        run_all(clone, only=only)
    assert not (clone / "results").exists(), "nothing is started"


def test_paths_may_hold_braces_and_dollars(clone, tmp_path, monkeypatch):
    """papermill fills parameters into braces, and a kernel's spec variables into ${NAME}.

    Paths may be relative, too.
    """
    root = clone.rename(tmp_path / "cookie {value} {x} 日本")
    monkeypatch.chdir(tmp_path)
    (root / "tiny.yaml").rename("mine.yaml")
    monkeypatch.setenv("DETRANSFORMER_DATA", "data ${HOME} {x} $$")
    write_notebook(root, "01_first", "import os\nprint(os.environ['DETRANSFORMER_DATA'])")
    run = reproduce("mine.yaml", only=["01"], output="run {value} b", root=root)
    assert run.path == tmp_path / "run {value} b"
    executed = nbformat.read(run.notebooks / "01_first.ipynb", as_version=4)
    assert executed.cells[-1].outputs[0].text.strip() == f"{tmp_path}/data ${{HOME}} {{x}} $$"


def test_two_runs_into_one_folder_are_refused(clone, tmp_path):
    with locked(RunFolder(tmp_path / "run")):
        with pytest.raises(ValueError, match="is in use by another reproduce"):
            run_all(clone, output=tmp_path / "run")


def test_damaged_manifest_names_the_file(clone):
    run, _, _ = run_all(clone, only=["01"])
    run.manifest_path.write_text('{"notebooks": ')
    with pytest.raises(ValueError, match="manifest.json is damaged; delete it"):
        run_all(clone)


def test_formulas_of_a_page_need_no_script(tmp_path):
    run = RunFolder(tmp_path / "run")
    cells = [nbformat.v4.new_markdown_cell("# Title\n\nwith $N_b = 4$ and\n\n$$x^2$$")]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), run.notebooks / "01_first.ipynb")
    page = write_index(run).with_name("html").joinpath("01_first.html").read_text(encoding="utf-8")
    assert page.count("<math") == 2 and "$" not in page and "<script" not in page


@pytest.mark.slow
def test_a_saved_run_is_drawn_without_measuring(clone, tmp_path):
    """Executed copies are renewed, and what lacks a table says so."""
    run, _, before = run_all(clone)
    drawing = "if measure:\n    raise AssertionError('measured')\n" + SAVE.format(table="drawn")
    write_notebook(clone, "03_third", drawing)
    lacking = "from detransformer.record.run import RunFolder\nRunFolder(run_dir).load_table('never', '02_second')"
    write_notebook(clone, "04_fourth", lacking)
    said = []
    redraw(run.path, only=["3", "4"], root=clone, say=said.append)
    assert said[0] == "03_third: drawn" and said[1].startswith("04_fourth: not drawn: ")
    assert "Table 'never'" in said[1] and "run 02_second first" in said[1]
    assert said[2].startswith("1 of 2 notebooks drawn in")
    assert sorted(p.stem for p in run.notebooks.iterdir()) == ["01_first", "02_second", "03_third"]
    manifest = json.loads(run.manifest_path.read_text())
    assert manifest["notebooks"] == before["notebooks"] and manifest["drawn"]["date"] >= before["date"]
    index = (run.path / "index.html").read_text()
    assert "html/03_third.html" in index and "tables/drawn.csv" in index and str(clone) not in index
    with pytest.raises(ValueError, match="is not the folder of a run"):
        redraw(tmp_path / "nowhere", root=clone)
