"""Real data from a local folder: glue/*/*.tsv, squad/*.json, wikipedia/*.txt.xz, vocab/tokenizer.json.

TSV is not CSV: quotes are literal. Every damaged, missing or wrongly encoded file is a ValueError that names the file,
the line and the remedy.
"""

import hashlib
import json
import lzma
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from datasets import Dataset
from tokenizers import Tokenizer

from detransformer.training.data.tasks import PAIR, Task


@dataclass(frozen=True)
class TsvLayout:
    """The file's names of a task's columns."""

    columns: tuple[str, ...]
    label: str
    labels: tuple[str, ...]  # as written in the file, in the task's order
    header: tuple[str, ...] = ()  # of a file that has no header line
    train: tuple[str, ...] = ("train.tsv",)  # the first that exists
    validation: tuple[str, ...] = ("dev.tsv",)


LAYOUTS = {
    "CoLA": TsvLayout(("sentence",), "label", ("0", "1"), header=("source", "label", "mark", "sentence")),
    "SST-2": TsvLayout(("sentence",), "label", ("0", "1")),
    "MRPC": TsvLayout(("#1 String", "#2 String"), "Quality", ("0", "1")),
    "MNLI": TsvLayout(
        *(PAIR, "gold_label", ("entailment", "neutral", "contradiction")),
        train=("train.tsv", "train_subset.tsv"),
        validation=("dev_matched.tsv",),
    ),
    "RTE": TsvLayout(PAIR, "label", ("entailment", "not_entailment")),
}


class MirrorSource:
    """The mirror folder as a data source (see `sources.py` for what a source offers)."""

    name = "mirror"

    def __init__(self, folder: Path):
        if not folder.is_dir():
            raise ValueError(
                f"no mirror folder at {folder}: set DETRANSFORMER_DATA to a folder with glue/, squad/, wikipedia/ and "
                "vocab/, or choose the source hub or built-in."
            )
        self.folder = folder

    def tokenizer(self) -> Tokenizer:
        path = require_file(self.folder / "vocab" / "tokenizer.json")
        try:
            return Tokenizer.from_file(str(path))
        except Exception as error:  # the tokenizers library raises plain Exception
            raise ValueError(f"{path} is no tokenizer file ({error}): copy it again from the original.") from error

    def fingerprint(self) -> str:
        """Changes with the names and sizes of the text and vocabulary files."""
        paths = [self.folder / "vocab" / "tokenizer.json", *sorted((self.folder / "wikipedia").glob("*.txt.xz"))]
        listing = [(path.name, path.stat().st_size) for path in paths if path.exists()]
        return hashlib.sha256(repr(listing).encode()).hexdigest()[:16]

    def task_rows(self, task: Task, split: str) -> Dataset:
        """Rows of `split` ("train" or "validation"): the task's columns and `label`, or SQuAD's."""
        if task.is_question_answering:
            paths = self._squad_files(split)
            rows = [row for path in paths for row in read_squad(path)]
            if not rows:
                raise ValueError(f"{paths[0]} has no question with an answer: copy SQuAD v1.1's file there.")
            return Dataset.from_list(rows)
        layout = LAYOUTS[task.name]
        folder = self.folder / "glue" / task.name
        names = getattr(layout, split)
        path = next((folder / name for name in names if (folder / name).exists()), folder / names[0])
        return Dataset.from_dict(read_tsv(path, layout, task))

    def articles(self, split: str) -> Iterator[str]:
        """Wikipedia articles, one text each with its paragraphs in lines; files named `*valid*` are the validation."""
        folder = self.folder / "wikipedia"
        paths = [p for p in sorted(folder.glob("*.txt.xz")) if ("valid" in p.name) == (split == "validation")]
        if not paths:
            pattern = "*-valid.txt.xz" if split == "validation" else "*.txt.xz"
            raise ValueError(
                f"no {split} text {folder / pattern}: copy it there, or choose the source hub or built-in."
            )
        for path in paths:
            yield from read_wikipedia(path)

    def _squad_files(self, split: str) -> list[Path]:
        folder = self.folder / "squad"
        whole = folder / ("train-v1.1.json" if split == "train" else "dev-v1.1.json")
        parts = sorted(folder.glob("train-v1.1-*.json")) if split == "train" and not whole.exists() else []
        return parts or [whole]


def require_file(path: Path) -> Path:
    if not path.is_file():
        raise ValueError(f"{path} is missing: copy it there, or choose the source hub or built-in.")
    return path


def read_text(path: Path) -> str:
    """The text of a UTF-8 file without its byte order mark."""
    content = require_file(path).read_bytes().removeprefix(b"\xef\xbb\xbf")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise damaged(f"{path}, line {line}", f"not UTF-8 ({error.reason})") from error


def damaged(place: str, what: str) -> ValueError:
    return ValueError(f"{place}: {what}; the file is damaged, copy it again from the original.")


def read_tsv(path: Path, layout: TsvLayout, task: Task) -> dict[str, list]:
    """A GLUE TSV file as columns: the task's text columns and `label` (its index in the task's labels)."""
    lines = read_text(path).removesuffix("\n").split("\n")  # only line feeds end a line
    header, first = (layout.header, 0) if layout.header else (lines[0].rstrip("\r").split("\t"), 1)
    for name in (*layout.columns, layout.label):
        if name not in header:
            raise damaged(f"{path}, line 1", f"the header has no column {name!r} of GLUE's file for {task.name}")
    wanted = [header.index(name) for name in (*layout.columns, layout.label)]
    rows = []
    for number, line in enumerate(lines[first:], start=first + 1):
        fields = line.rstrip("\r").split("\t")
        if len(fields) != len(header):
            what = f"{len(fields)} tab-separated fields where {len(header)} are expected"
            raise damaged(f"{path}, line {number}", what)
        *texts, label = (fields[at] for at in wanted)
        if label not in layout.labels:
            raise damaged(f"{path}, line {number}", f"label {label!r} is none of {', '.join(layout.labels)}")
        rows.append((*texts, layout.labels.index(label)))
    if not rows:
        raise ValueError(f"{path} has no rows: the file is empty, copy it again from the original.")
    return dict(zip((*task.columns, "label"), map(list, zip(*rows, strict=True)), strict=True))


def read_squad(path: Path) -> Iterator[dict]:
    """SQuAD JSON as rows id, question, context, answers {text, answer_start}; every span is checked.

    Questions without an answer, which version 2.0 has, are left out: the task is that of 1.1.
    """
    try:
        content = json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise damaged(f"{path}, line {error.lineno}", f"not JSON ({error.msg})") from error
    try:
        for paragraph in (paragraph for article in content["data"] for paragraph in article["paragraphs"]):
            context = paragraph["context"]
            for question in paragraph["qas"]:
                texts = [answer["text"] for answer in question["answers"]]
                starts = [answer["answer_start"] for answer in question["answers"]]
                if question.get("is_impossible") or not any(texts):
                    continue
                for text, start in zip(texts, starts, strict=True):
                    if start < 0 or context[start : start + len(text)] != text:
                        what = f"the answer {text!r} is not at character {start} of its context"
                        raise damaged(f"{path}, question {question['id']}", what)
                answers = {"text": texts, "answer_start": starts}
                row = {"id": str(question["id"]), "question": question["question"]}
                yield row | {"context": context, "answers": answers}
    except (KeyError, TypeError) as error:
        raise damaged(f"{path}, line 1", f"not SQuAD v1.1 ({type(error).__name__}: {error})") from error


def read_wikipedia(path: Path) -> Iterator[str]:
    """Articles of an xz text file: title line, one paragraph a line, blank line between articles; read as needed."""
    number, article = 0, []
    try:
        with lzma.open(require_file(path), "rb") as file:
            for raw in file:
                number += 1
                line = raw.decode("utf-8").strip()
                if line:
                    article.append(line)
                elif article:
                    yield "\n".join(article)
                    article = []
    except UnicodeDecodeError as error:
        raise damaged(f"{path}, line {number}", f"not UTF-8 ({error.reason})") from error
    except (lzma.LZMAError, EOFError) as error:
        raise damaged(f"{path}, after line {number}", f"the xz data is damaged ({error})") from error
    if article:
        yield "\n".join(article)
