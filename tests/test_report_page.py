"""A run's page: everything saved is on it, what is missing is said, links resolve, and a browser shows it unbroken."""

import json
import queue
import re
import shutil
import subprocess
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

import nbformat
import pandas as pd
import pytest
from bs4 import BeautifulSoup

from detransformer import reproduce
from detransformer.cli import main
from detransformer.files import repository_root
from detransformer.record.run import RunFolder
from detransformer.report import page
from detransformer.report.claims import summarise
from detransformer.report.figures import draw
from detransformer.report.page import without_paths, write_page
from detransformer.report.peers import methods_table
from report_frames import decoupling_rows, latency_rows

ROOT = repository_root()
HOSTILE = "<script>alert(1)</script>"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
VERDICT_HTML = """<style>#T_1 td {color: red}</style><table id="T_1"><thead><tr><th>claim</th><th>expected</th>
<th>obtained</th><th>ratio</th><th>judged</th></tr></thead><tbody><tr><td>counted</td><td>109.480000</td>
<td>109.482240</td><td>1.00</td><td>matches</td></tr><tr><td>gained</td><td>3.0</td><td>0.5</td><td>0.17</td>
<td>does not hold</td></tr></tbody></table>"""


def executed_notebook(run: RunFolder, name: str, *cells: tuple[str, list[dict]]) -> None:
    """An executed notebook of a title, a question and code cells with their outputs."""
    notebook = nbformat.v4.new_notebook()
    opening = [f"# {int(name[:2])}. About {name[3:]}", f"**Question.** What is {HOSTILE} made of?", "Paper: none."]
    notebook.cells = [nbformat.v4.new_markdown_cell("\n\n".join(opening))]
    for source, outputs in cells:
        shown = [nbformat.v4.new_output("display_data", data) for data in outputs]
        notebook.cells.append(nbformat.v4.new_code_cell(source, outputs=shown, execution_count=1))
    nbformat.write(notebook, run.notebooks / f"{name}.ipynb")


@pytest.fixture
def run(made, tmp_path) -> RunFolder:
    """A copy of the made-up run, to be changed."""
    return RunFolder(shutil.copytree(made, tmp_path / "a run"))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Notebooks of which one failed and one was not run, their tables and figures, and a table of none."""
    run = RunFolder(tmp_path_factory.mktemp("made"))
    run.save_table(decoupling_rows(), "decoupling", note=f"Counted, see /home/someone/notes {HOSTILE}.")
    latency = latency_rows()
    run.save_table(latency, "latency")
    run.save_table(methods_table(latency), "methods")
    run.save_table(summarise(run), "summary")
    odd = pd.DataFrame({"claim": [HOSTILE, "![x](https://example.org/x.png)"], "judged": ["holds", "does not hold"]})
    run.save_table(odd, "own_table")
    draw(run, "decoupling")
    draw(run, "wire")
    picture = {"image/png": "aGVsbG8=", "text/plain": "<Figure>"}
    executed_notebook(
        run,
        "01_decoupling",
        ('run_dir = "/home/someone/results"', []),
        ('draw(run, "decoupling")', [picture]),
        ("verdict()", [{"text/html": VERDICT_HTML, "text/plain": "Styler"}]),
    )
    executed_notebook(run, "06_latency", ("print('x')", [{"text/html": f"{HOSTILE}<img src='https://example.org/y'>"}]))
    notebooks = {
        "01_decoupling": {"status": "done", "duration_s": 14.0, "finished": "2026-01-02T03:04:05+00:00"}
        | {"commit": "fedcba9876543210"},
        "06_latency": {"status": "failed", "error": f"KeyError in /home/someone/lib/x.py: {HOSTILE}\nmore"},
    }
    notebooks["01_decoupling"]["commit"] = "fedcba9876543210"
    manifest = {
        "notebooks": notebooks,
        "profile": "quick",
        "command": "detransformer reproduce --output /home/someone/results/quick",
        "commit": "0123456789abcdef",
        "dirty": True,
        "host": "secret-host",
        "hardware": {"cpu": "A CPU", "cores": 2, "memory_bytes": 2**34, "system": "Linux", "kernel": "6.1.0-builder"},
        "versions": {"python": "3.12.1", "torch": "2.13.0"},
        "data": {"mirror": "none", "hub": "offline", "sources": {"latency": ["made up"]}},
        "seeds": {"01_decoupling.seed": 0},
        "parameters": {"01_decoupling": {"seed": 0}, "06_latency": {}, "08_adaptive": {}},
    }
    run.manifest_path.write_text(json.dumps(manifest), encoding="utf-8")
    return run.path


def soup_of(path) -> BeautifulSoup:
    return BeautifulSoup(path.read_text(encoding="utf-8"), "html.parser")


def assert_sound(path, known: dict | None = None) -> None:
    """Unique ids, links and pictures that are there, nothing that acts or is loaded from elsewhere.

    `known` are the ids of pages that were looked at before.
    """
    soup, known = soup_of(path), {} if known is None else known
    ids = [tag["id"] for tag in soup.find_all(id=True)]
    assert len(ids) == len(set(ids))
    known[path.resolve()] = set(ids)
    assert soup.html["lang"] == "en" and soup.title.text and len(soup.find_all("h1")) == 1
    assert not soup.find_all(["script", "iframe", "object"]) and not soup.find_all("link", rel="stylesheet")
    assert "url(" not in soup.style.text and "@import" not in soup.style.text
    for tag in soup.find_all(True):
        assert not [name for name in tag.attrs if name.startswith("on")], tag
    for picture in soup.find_all("img"):
        assert picture.get("alt"), picture
        if not picture["src"].startswith("data:image/"):
            assert (path.parent / unquote(picture["src"])).is_file(), picture["src"]
    for link in soup.find_all("a", href=True):
        target, _, fragment = link["href"].partition("#")
        if re.match(r"https?:|mailto:", target):
            continue
        file = (path.parent / unquote(target)).resolve() if target else path.resolve()
        assert file.is_file(), link["href"]
        if fragment:
            known[file] = known.get(file) or {tag["id"] for tag in soup_of(file).find_all(id=True)}
            assert fragment in known[file], link["href"]


def test_tables_figures_and_notebooks_are_on_the_page_in_their_order(run):
    path, sentence = write_page(run.path)
    soup = soup_of(path)
    assert path == run.path / "index.html" and "html/" in sentence
    sections = [section["aria-labelledby"] for section in soup.find_all("section")]
    notebooks = ["nb-01_decoupling", "nb-06_latency", "nb-07_summary", "nb-08_adaptive", "nb-other"]
    assert sections == ["verdicts", "run", *notebooks]
    table = soup.find(id="table-decoupling")
    assert table.h3.text == page.TABLE_CAPTIONS["decoupling"] and "Counted, see" in table.find(class_="note").text
    assert [a["href"] for a in table.find_all("a")] == ["tables/decoupling.csv", "tables/decoupling.md"]
    assert table.details.summary.text.startswith("18 rows") and len(table.tbody.find_all("tr")) == 18
    latency = soup.find(id="table-latency")
    assert f"the first {page.SHOWN_ROWS} of each part are here" in latency.summary.text
    assert len(latency.tbody.find_all("tr")) == page.SHOWN_ROWS
    figure = soup.find(id="figure-decoupling")
    assert figure.img["src"] == "figures/decoupling.png" and figure.img["alt"] == figure.figcaption.text
    assert figure.img["alt"].startswith("FLOPs of a decoupled layer") and int(figure.img["width"]) > 300
    section = soup.find("section", {"aria-labelledby": "nb-01_decoupling"})
    assert section.h2.text == "01 About decoupling" and "What is" in section.p.text
    assert "commit fedcba987654" in section.text and "Kept from other commits" in soup.text
    assert [a["href"] for a in section.find(class_="files").find_all("a")] == [
        "html/01_decoupling.html",
        "notebooks/01_decoupling.ipynb",
    ]
    assert soup.find(id="table-own_table").find_parent("section")["aria-labelledby"] == "nb-other"


def test_links_resolve_and_ids_are_unique(run):
    (path, _), known = write_page(run.path), {}
    for file in (path, *(run.path / "html").glob("*.html")):
        assert_sound(file, known)


def test_what_files_say_is_escaped_and_no_place_is_named(run):
    path, _ = write_page(run.path)
    for file in (path, *(run.path / "html").glob("*.html")):
        text = file.read_text(encoding="utf-8")
        assert "<script" not in text and "/home/someone" not in text and "secret-host" not in text
        assert "example.org/y" not in text and 'src="https' not in text
    text = path.read_text(encoding="utf-8")
    assert "&lt;script&gt;" in text and "--output …/quick" in text and "…/notes" in text
    assert "Linux 6.1.0," in text and "builder" not in text


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("/srv/data/file.csv is there", "…/file.csv is there"),
        ("published / obtained, D/P, 1/2", "published / obtained, D/P, 1/2"),
        ("https://example.org/a/b and ../results/local", "https://example.org/a/b and ../results/local"),
        ('"/srv" alone names little', '"/srv" alone names little'),
        ("torch/nn/modules", "torch/nn/modules"),
    ],
)
def test_only_absolute_paths_are_cut(text, shown):
    assert without_paths(text) == shown


def test_verdicts_are_on_top_and_coloured(run):
    soup = soup_of(write_page(run.path)[0])
    overview, claims, rest = soup.find("section", {"aria-labelledby": "verdicts"}).find_all("table")
    rows = {row.td.text: row for row in overview.tbody.find_all("tr")}
    badges = rows["01 About decoupling"].find(class_="counts").find_all("span")
    counts = [(badge.text, badge["class"][1]) for badge in badges]
    assert counts == [("1 matches", "good"), ("1 does not hold", "bad")]
    assert rows["06 About latency"].find(class_="badge").text == "failed"
    assert rows["08 Adaptive"].find(class_="badge").text == "not run"
    assert "BERT-Base on one device, s (paced to it)" in claims.text and "by value" in claims.text
    assert {badge["class"][1] for badge in claims.find_all(class_="badge")} >= {"good", "none"}
    assert [cell.text for cell in rest.tbody.tr.find_all("td")] == ["counted", "109.5", "109.5", "", "matches", "01"]


def test_a_saved_table_of_verdicts_counts_before_what_a_notebook_shows(run):
    saved = pd.DataFrame({"claim": ["saved"], "published": [1.5], "obtained": [1.23456], "judged": ["holds, smaller"]})
    run.save_table(saved, "adaptive")
    executed_notebook(run, "08_adaptive", ("verdict()", [{"text/html": VERDICT_HTML}]))
    soup = soup_of(write_page(run.path)[0])
    rest = soup.find("section", {"aria-labelledby": "verdicts"}).find_all("table")[2]
    last = [cell.text for cell in rest.find_all("tr")[-1].find_all("td")]
    assert last == ["saved", "1.5", "1.235", "", "holds, smaller", "08"]


def test_figures_of_the_run_are_not_repeated_in_its_notebooks(run):
    write_page(run.path)
    soup = soup_of(run.path / "html" / "01_decoupling.html")
    assert [picture["src"] for picture in soup.find_all("img")] == ["../figures/decoupling.png"]
    assert soup.find("table").find_parent(class_="scroll") and "color: red" not in soup.main.text
    (run.figures / "decoupling.png").unlink()
    write_page(run.path)
    assert soup_of(run.path / "html" / "01_decoupling.html").img["src"].startswith("data:image/png")


def test_missing_pieces_are_said(run):
    (run.tables / "latency.csv").unlink()
    (run.tables / "methods.md").unlink()
    (run.tables / "summary.csv").write_text("")
    (run.figures / "wire.png").write_bytes(b"no picture")
    (run.notebooks / "01_decoupling.ipynb").write_text('{"cells": [')
    path, _ = write_page(run.path)
    soup, text = soup_of(path), path.read_text(encoding="utf-8")
    assert "Its CSV is missing." in soup.find(id="table-latency").text
    assert len(soup.find(id="table-methods").tbody.find_all("tr")), "made from the CSV"
    assert "table <code>summary</code> is missing" in text and "picture is damaged" in text
    assert "The executed notebook cannot be read" in text and "This notebook was not run." in text
    assert "Figures not drawn in this run: fig2b" in text and "Tables not in this run: timeline" in text
    assert not (run.path / "html" / "01_decoupling.html").exists()
    assert_sound(path)


@pytest.mark.parametrize(("manifest", "said"), [(None, "has no manifest.json"), ("[1]", "damaged"), ("{", "damaged")])
def test_a_run_without_its_manifest_still_has_a_page(run, manifest, said):
    run.manifest_path.unlink()
    if manifest:
        run.manifest_path.write_text(manifest)
    path, _ = write_page(run.path)
    assert said in path.read_text(encoding="utf-8")
    assert soup_of(path).find(id="nb-02_pretraining").find(class_="badge").text == "not run"


def test_an_almost_empty_run_has_a_page(tmp_path):
    (tmp_path / "tables").mkdir()
    path, sentence = write_page(tmp_path)
    assert "No executed notebook could be read." in sentence
    assert_sound(path)


def test_large_notebooks_are_written_only_when_asked_for(run, monkeypatch):
    monkeypatch.setattr(page, "NOTEBOOKS_BYTES", 10)
    path, sentence = write_page(run.path)
    assert "--notebooks" in sentence and not (run.path / "html").exists()
    assert "html/01_decoupling.html" not in path.read_text(encoding="utf-8")
    assert write_page(run.path, notebooks=True) and (run.path / "html" / "01_decoupling.html").is_file()
    write_page(run.path)
    assert not list((run.path / "html").iterdir()), "no page of an older run is left"


def test_a_folder_that_is_no_run_is_refused_and_left_alone(tmp_path, capsys):
    with pytest.raises(ValueError, match="is not the folder of a run.*detransformer reproduce"):
        write_page(tmp_path / "nothing")
    assert not (tmp_path / "nothing").exists()
    with pytest.raises(SystemExit) as ended:
        main(["page", str(tmp_path)])
    assert ended.value.code == 2 and "is not the folder of a run" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_the_command_says_what_it_wrote(run, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["page", str(run.path), "--notebooks"])
    assert ended.value.code == 0 and str(run.path / "index.html") in capsys.readouterr().out


def test_reproduce_ends_with_the_page(tmp_path, monkeypatch):
    def execute(notebook, run, root, title):
        run.save_table(pd.DataFrame({"value": [1]}), "first")
        executed_notebook(run, notebook.name, ("1 + 1", []))

    monkeypatch.setattr(reproduce, "execute", execute)
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "pyproject.toml").write_text('[project]\nname = "x"\ndependencies = ["pandas==3.1.*"]\n')
    (tmp_path / "tiny.yaml").write_text("01_first: {}\n")
    nbformat.write(nbformat.v4.new_notebook(), tmp_path / "notebooks" / "01_first.ipynb")
    said = []
    run = reproduce.reproduce(str(tmp_path / "tiny.yaml"), root=tmp_path, say=said.append)
    assert said[-1].endswith("index.html")
    section = soup_of(run.path / "index.html").find("section", {"aria-labelledby": "nb-01_first"})
    assert section.find(id="table-first") and section.find("a", href="html/01_first.html")
    assert "report/page.py" in reproduce.FRAME, "a page changes no result"


def test_the_same_run_gives_the_same_page(run):
    first = write_page(run.path)[0].read_bytes()
    assert write_page(run.path)[0].read_bytes() == first


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """The page of a copy of the committed run."""
    folder = tmp_path_factory.mktemp("reference")
    for name in ("tables", "figures", "notebooks"):
        shutil.copytree(ROOT / "results" / "reference" / name, folder / name, ignore=shutil.ignore_patterns(".*"))
    shutil.copy(ROOT / "results" / "reference" / "manifest.json", folder)
    return write_page(folder)[0]


def test_the_reference_run_has_a_small_sound_page(reference):
    files = [reference, *(reference.parent / "html").glob("*.html")]
    known = {}
    for file in files:
        assert_sound(file, known)
        assert str(ROOT) not in file.read_text(encoding="utf-8")
    assert len(files) > 1 and sum(file.stat().st_size for file in files) < 5e6
    soup = soup_of(reference)
    saved = {path.stem for path in (reference.parent / "tables").glob("*.csv")}
    assert {tag["id"] for tag in soup.find_all(id=re.compile("^table-"))} == {f"table-{name}" for name in saved}


PROBE = """<!doctype html><meta charset="utf-8"><link rel="icon" href="data:,"><body><script>
const results = {};
const loaded = picture => picture.complete ? true : new Promise(done => picture.onload = picture.onerror = done);
async function look(width) {
  const frame = document.createElement("iframe");
  frame.style.width = width + "px"; frame.style.height = "900px";
  await new Promise(done => { frame.onload = done; frame.src = "PAGE"; document.body.append(frame); });
  const inside = frame.contentDocument, root = inside.documentElement;
  for (const part of inside.querySelectorAll("details")) part.open = true;
  for (const picture of inside.images) { picture.loading = "eager"; await loaded(picture); }
  const broken = [...inside.images].filter(picture => !picture.naturalWidth).map(picture => picture.src);
  const overflow = root.scrollWidth - root.clientWidth;
  results[width] = {overflow, broken, images: inside.images.length};
}
const send = () => fetch("/", {method: "POST", body: JSON.stringify(results)});
look(1280).then(() => look(390)).then(() => look(360)).then(send, error => { results.error = String(error); send(); });
</script></body>"""


def in_a_browser(folder, page_name: str, profile) -> tuple[dict, list[str], list[str]]:
    """What `PROBE` finds of a served page by width, the addresses that were not there, and the console's lines."""
    found, missing = queue.Queue(), []

    class Handler(SimpleHTTPRequestHandler):
        def do_GET(self):
            if self.path != "/probe":
                return super().do_GET()
            body = PROBE.replace("PAGE", f"/{page_name}").encode()
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def do_POST(self):
            found.put(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(204)
            self.end_headers()

        def log_message(self, form, *values):
            if "404" in values:
                missing.append(self.path)

        def log_error(self, *values):
            missing.append(self.path)

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=folder))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--no-proxy-server", "--enable-logging=stderr"]
    options += ["--remote-debugging-port=0", f"--user-data-dir={profile}"]  # stays until it is told to go
    with open(f"{profile}.log", "w+") as log:
        url = f"http://127.0.0.1:{server.server_port}/probe"
        browser = subprocess.Popen([CHROMIUM, *options, url], stdout=log, stderr=log)
        try:
            result = found.get(timeout=200)
        finally:
            browser.terminate()
            browser.wait(timeout=30)
            server.shutdown()
            server.server_close()
        log.seek(0)
        return result, missing, [line for line in log if "CONSOLE" in line]


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine: install it to test pages in a browser")
@pytest.mark.parametrize("page_name", ["index.html", "html/06_latency.html"])
def test_a_browser_shows_it_without_errors_or_overflow(reference, tmp_path, page_name):
    results, missing, console = in_a_browser(reference.parent, page_name, tmp_path / "profile")
    assert set(results) == {"1280", "390", "360"}, results
    for width, result in results.items():
        assert result["overflow"] <= 0, f"{width} px wide: {result['overflow']} px too wide"
        assert result["broken"] == [] and result["images"], width
    assert missing == [] and console == []
