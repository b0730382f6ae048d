"""The commands of README.md and docs/*.md are run here, in a folder that has small models of the names they use.

A command is found in indented and fenced blocks and in code spans. `SHORTER` has what is added to each so that it takes
seconds; a command that is not in it fails, and so does one whose files `Sandbox` does not make.
"""

import ast
import importlib.util
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import nbformat
import pytest
import torch
import typer
import yaml
from transformers import BertConfig, BertForMaskedLM, BertForSequenceClassification, BertTokenizer

from detransformer import cli
from detransformer.cluster.network import can_emulate
from detransformer.cluster.spec import ClusterSpec
from detransformer.files import PACKAGE, repository_root
from detransformer.models import decouple
from detransformer.service.session import Session
from test_hosts import WORDS, ended, free_ports, hosts, save_decoder, wait_for

pytestmark = pytest.mark.slow
ROOT = repository_root()
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
COMMANDS = typer.main.get_command(cli.app).commands
SIZES = dict(hidden_size=48, num_hidden_layers=6, num_attention_heads=6, intermediate_size=72, vocab_size=len(WORDS))
PROFILES = [path.stem for path in (PACKAGE / "profiles").glob("*.yaml")]
# By command: what is added, unless it is given, to be done in seconds.
SHORTER = {
    "bench": "--model my-decoupled-bert/ --repeats 1 --seq-len 16 --time-scale 1",
    "calibrate": "--text my-text --steps 2 --batch-size 4 --seq-len 16 --fit-sequences 8 --precision no",
    "decompose": "--source built-in --evaluations 4 --steps 4 --batch-size 16 --train-rows 32 --seq-len 16",
    "decouple": "",
    "doctor": "",
    "figures": "",
    "plan": "",
    "profile": "--model my-decoupled-bert/",
    "reproduce": "",
    "run": "--repeats 2",
    "serve": "",
}


# --- What is shown -----------------------------------------------------------------------------------------------


def code_of(text: str) -> Iterator[tuple[str, bool]]:
    """(code, whether it is a line of a block) of a page, from its start."""
    fenced, prose, lines = False, "", text.replace("\\\n", " ").splitlines()
    for line in [*lines, ""]:
        if line.lstrip().startswith("```"):
            fenced = not fenced
        elif fenced or (line.startswith("    ") and not prose):
            yield (line if fenced else line[4:]).rstrip(), True
        elif line.strip():
            prose += line + " "
        else:
            yield from ((span, False) for span in re.findall(r"`([^`]+)`", prose))
            prose = ""


def words_of(code: str, in_block: bool) -> list[str]:
    """The words of the `detransformer` command in a piece of code, [] where there is none.

    In a sentence a name without arguments is a command's name, and no command to be run.
    """
    if "`" in code or code.lstrip().startswith(("from ", "import ")):
        return []
    found = re.search(r"(?:^|[\s;'/])detransformer ([a-z][a-z-]*(?:\s.*)?)$", code)
    if not found:
        return []
    text = re.sub(r"'\s*&?$", "", found[1])  # the end of what ssh is told
    words = shlex.split(text, comments=True)
    words = words[: next((i for i, word in enumerate(words) if word in ("&&", "||", "|", ";", "&")), None)]
    return words if in_block or len(words) > 1 else []


CODE = [piece for page in PAGES for piece in code_of(page.read_text(encoding="utf-8"))]
SHOWN = [words for words in (words_of(*piece) for piece in CODE) if words]
CURLS = sorted({code.strip() for code, _ in CODE if code.strip().startswith("curl ")})


def without_parts(shown: list[list[str]]) -> list[list[str]]:
    """Each command once, and none whose words another one has too."""
    plain = [tuple(word.removeprefix("~/").rstrip("/") for word in words) for words in shown]
    kept = {key: words for key, words in zip(plain, shown, strict=True)}
    return [
        words for key, words in kept.items() if not any(key[0] == other[0] and set(key) < set(other) for other in kept)
    ]


def option(words: list[str], name: str) -> str | None:
    return words[words.index(name) + 1] if name in words else None


# --- A folder in which they run ----------------------------------------------------------------------------------


class Sandbox:
    """Makes what the pages' commands name, each thing once, and a folder with links to them for each command."""

    def __init__(self, store: Path):
        self.store = store
        self.makers = {
            "my-bert": lambda path: self._bert(path, BertForMaskedLM),
            "my-decoupled-bert": lambda path: self._bert(path, BertForSequenceClassification, decoupled=True),
            "my-classifier": lambda path: self._bert(path, BertForSequenceClassification),
            "my-gpt2": lambda path: save_decoder(path, decoupled=False),
            "my-decoupled-gpt2": save_decoder,
            "my-text": self._text,
            "my-ensemble": self._ensemble,
            "cluster.yaml": lambda path: shutil.copy(ROOT / "examples/four-pis.yaml", path),
            "my.yaml": self._profile,
            "plan.json": lambda path: self.run(["plan", "--model", "my-decoupled-bert", "--output", str(path)]),
        }
        self.outputs = 0

    def made(self, name: str) -> Path:
        path = self.store / name
        if not path.exists():
            self.makers[name](path)
        return path

    def folder(self, words: list[str]) -> Path:
        """A new folder with what `words` name, but for what they write."""
        self.outputs += 1
        folder = self.store / f"folder{self.outputs}"
        folder.mkdir()
        (folder / "examples").symlink_to(ROOT / "examples")
        for run in ("quick", "reference"):
            (folder / "results" / run / "tables").mkdir(parents=True)
            for table in (ROOT / "results/reference/tables").glob("pretraining_loss*"):
                shutil.copy(table, folder / "results" / run / "tables")
        written = {option(words, "--output"), *(words[2:3] if words[0] == "calibrate" else ())}
        for word in set(words) - written:
            name = word.rstrip("/")
            if name in self.makers and name != words[0]:
                (folder / name).symlink_to(self.made(name))
        return folder

    def run(self, words: list[str]) -> int:
        """The command in this process; its exit code."""
        folder, before = self.folder(words), os.getcwd()
        os.chdir(folder)
        try:
            with pytest.raises(SystemExit) as end:
                cli.main(words)
        finally:
            os.chdir(before)
        return end.value.code or 0

    @staticmethod
    def _bert(path: Path, kind, decoupled: bool = False) -> None:
        torch.manual_seed(3)
        labels = {"id2label": {0: "bad", 1: "good"}, "label2id": {"bad": 0, "good": 1}}
        model = kind(BertConfig(**SIZES, **labels))
        (decouple(model, num_original_layers=4, num_divisions=4) if decoupled else model).save_pretrained(path)
        (path / "vocab.txt").write_text("\n".join(WORDS))
        BertTokenizer(str(path / "vocab.txt")).save_pretrained(path)

    @staticmethod
    def _text(path: Path) -> None:
        path.mkdir()
        (path / "a.txt").write_text("\n".join(" ".join(WORDS[5:] * 3) for _ in range(60)))

    @staticmethod
    def _profile(path: Path) -> None:
        """Of one notebook, the first of profile `quick`."""
        sections = yaml.safe_load((PACKAGE / "profiles/quick.yaml").read_text(encoding="utf-8"))
        path.write_text(yaml.safe_dump(dict([next(iter(sections.items()))])))

    def _ensemble(self, path: Path) -> None:
        words = ["decompose", "my-classifier", "--task", "SST-2", "--cluster", "examples/jetsons.yaml"]
        assert self.run([*words, *SHORTER["decompose"].split(), "--output", str(path)]) == 0


@pytest.fixture(scope="module")
def sandbox(tmp_path_factory) -> Sandbox:
    return Sandbox(tmp_path_factory.mktemp("sandbox"))


def prepared(words: list[str]) -> list[str]:
    """A command as it is run: with files of the sandbox, and made shorter."""
    words = ["my-decoupled-bert/" if word == "..." else word.removeprefix("~/") for word in words]
    extra = SHORTER[words[0]].split()
    for name, value in zip(extra[::2], extra[1::2], strict=True):
        takes = any(name in p.opts for p in COMMANDS[words[0]].params)
        words += [name, value] if takes and name not in words else []
    return words


# --- The tests ---------------------------------------------------------------------------------------------------


def test_commands_are_found():
    assert {"decouple", "run", "serve"} <= {words[0] for words in SHOWN} and CURLS
    page = "See `detransformer\nrun --check`:\n\n    one\n\n```python\nwith a:\n    b()\n```\n"
    assert [*code_of(page)][:2] == [("detransformer run --check", False), ("one", True)]
    assert ("    b()", True) in code_of(page)


@pytest.mark.parametrize("words", without_parts(SHOWN), ids=" ".join)
@pytest.mark.timeout(300)
def test_a_command_that_is_shown_works(words, sandbox, monkeypatch, tmp_path):
    assert words[0] in COMMANDS, f"there is no command {words[0]}"
    assert words[0] in SHORTER, f"say in SHORTER how `detransformer {words[0]}` is to be run here"
    words = prepared(words)
    cluster = option(words, "--cluster")
    if words[0] == "reproduce":
        small_clone(tmp_path, [] if option(words, "--profile") in (None, *PROFILES) else ["01"])
        monkeypatch.setattr("detransformer.reproduce.repository_root", lambda: tmp_path)
    if words[0] == "serve":
        serve(words, sandbox)
    elif words[0] == "run" and not ClusterSpec.load(sandbox.folder(words) / cluster).emulated:
        run_on_hosts(words, sandbox, tmp_path)
    else:
        assert sandbox.run(words) == 0


def small_clone(root: Path, numbers: list[str]) -> None:
    """A repository with the notebooks of this one, or some of them; of their cells only the parameters are left."""
    shutil.copy(ROOT / "pyproject.toml", root)
    (root / "notebooks").mkdir()
    for path in (ROOT / "notebooks").glob("*.ipynb"):
        if numbers and path.name[:2] not in numbers:
            continue
        notebook = nbformat.read(path, as_version=4)
        notebook.cells = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ())]
        nbformat.write(notebook, root / "notebooks" / path.name)


def run_on_hosts(words: list[str], sandbox: Sandbox, folder: Path) -> None:
    """The same command on each of two hosts; the first prints the answer."""
    model = sandbox.made(option(words, "--model").rstrip("/"))
    (command, *options) = words
    for name in ("--cluster", "--model"):
        place = options.index(name)
        del options[place : place + 2]
    with hosts(folder, 2) as shelf:
        running = [shelf.start(i, model, *options, command=command) for i in range(2)]
        results = [ended(process) for process in running]
    for code, _, stderr in results:
        assert code == 0, stderr
    assert "-> " in results[0][1] and results[1][1] == ""


def serve(words: list[str], sandbox: Sandbox) -> None:
    """Serves, answers what the pages ask by curl at the model's path, and ends by Ctrl-C."""
    if not can_emulate()[0]:
        pytest.skip(can_emulate()[1])
    port = free_ports()
    code = "from detransformer.cli import main; main()"
    process = subprocess.Popen(
        [sys.executable, "-c", code, *words, "--port", str(port)],
        cwd=sandbox.folder(words), stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    try:
        said = wait_for(process.stderr, "listening on")
        path = said[-1].strip().rpartition("/")[2]
        token = next(line.split()[-1] for line in said if "token: " in line)
        for line in CURLS:
            if f"localhost:8000/{path}" in line:
                line = line.replace("localhost:8000", f"localhost:{port}")
                asked = subprocess.run(["bash", "-c", line], env=os.environ | {"TOKEN": token}, capture_output=True)
                answer = json.loads(asked.stdout)
                assert asked.returncode == 0 and "error" not in answer, answer
        process.send_signal(signal.SIGINT)
        assert process.wait(60) in (0, 130)
    finally:
        process.kill()
        process.communicate()


def test_what_is_asked_by_curl_is_served_by_a_command_that_is_shown(sandbox):
    from transformers import AutoConfig

    from detransformer.service.tasks import path_of

    models = {option(words, "--model").rstrip("/") for words in SHOWN if words[0] == "serve"}
    paths = {path_of(AutoConfig.from_pretrained(sandbox.made(model))) for model in models}
    for line in CURLS:
        assert any(f"localhost:8000{path}" in line for path in (*paths, "/health", "/metrics")), line


def snippets() -> list[str]:
    """Python that uses the package, of spans and blocks; lines of a block together."""
    found, block = [], []
    for code, in_block in [*CODE, ("", False)]:
        if in_block:
            block.append(code)
            continue
        for text in ("\n".join(block), code):
            with_package = re.search(r"ClusterSpec|from_pretrained|(import|from) detransformer", text)
            if with_package and not re.search(r"(?:^|\s)detransformer [a-z]", text):
                found.append(text)
        block = []
    return found


@pytest.mark.timeout(300)
def test_python_that_is_shown_runs(sandbox):
    """In the order in which it is shown; imports that a sentence leaves out are made."""
    from transformers import AutoModel

    texts = snippets()
    names = {
        "ClusterSpec": ClusterSpec,
        "Session": Session,
        "AutoModel": AutoModel,
        "ids": torch.ones(1, 4, dtype=torch.int64),
    }
    before = os.getcwd()
    os.chdir(sandbox.folder(["python", *re.findall(r"""["']([\w.-]+)/?["']""", " ".join(texts))]))
    try:
        for text in texts:
            if "Session(" in text and not can_emulate()[0]:
                continue
            exec(compile(ast.parse(text), "README", "exec"), names)  # our own text
    finally:
        os.chdir(before)


def test_options_and_names_of_commands_in_sentences_exist():
    known = {name for command in COMMANDS.values() for p in command.params for name in p.opts}
    for code, in_block in CODE:
        if not in_block and code.startswith("--"):
            assert code.split()[0] in known, code
        if not in_block and (name := re.fullmatch(r"detransformer ([a-z-]+)", code)):
            assert name[1] in COMMANDS, code


@pytest.mark.parametrize(
    "words", sorted({code for code, _ in CODE if re.fullmatch(r"make [a-z]+( [A-Z]+=\S+)*", code)})
)
def test_make_knows_what_is_shown(words):
    """A dry run: the target is there, and what it calls."""
    asked = subprocess.run([*words.split(), "--dry-run"], cwd=ROOT, capture_output=True, text=True)
    assert asked.returncode == 0, asked.stderr
    for command in re.findall(r"bin/detransformer ([a-z-]+)", asked.stdout):
        assert command in COMMANDS
    for module in re.findall(r"-m (detransformer[\w.]*)", asked.stdout):
        assert importlib.util.find_spec(module)
    for script in re.findall(r"bin/python (\S+\.py)", asked.stdout):
        assert (ROOT / script).is_file()
