"""Data sources: the order of `auto`, explicit choices, damaged files, the built-in corpus, packing and masks."""

import json
import lzma
import pickle
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from detransformer.training.data import TASKS, open_data, reduced_data
from detransformer.training.data import sources as sources_module
from detransformer.training.data.built_in import BuiltInSource
from detransformer.training.data.hub import hub_problem
from detransformer.training.data.mirror import MirrorSource
from detransformer.training.data.packing import MaskedBatches, SpecialTokens, mask_tokens, pack_text, stream_rows

SQUAD = {
    "data": [
        {
            "title": "T",
            "paragraphs": [
                {
                    "context": "Anna lives in Oslo.",
                    "qas": [{"id": "1", "question": "Where?", "answers": [{"text": "Oslo", "answer_start": 14}]}],
                }
            ],
        }
    ]
}


@pytest.fixture
def mirror(tmp_path):
    """A small mirror folder in the real layout: BOM and literal quotes in MRPC, xz Wikipedia."""
    folder = tmp_path / "mirror"
    for name in ("glue/CoLA", "glue/SST-2", "glue/MRPC", "glue/MNLI", "squad", "wikipedia", "vocab"):
        (folder / name).mkdir(parents=True)
    for split in ("train", "dev"):
        (folder / f"glue/CoLA/{split}.tsv").write_text("gj04\t1\t\tIt works.\ngj04\t0\t*\tWorks it it.\n")
        (folder / f"glue/SST-2/{split}.tsv").write_text('sentence\tlabel\na "good film\t1\nbad\t0\n')
        header = "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\n"
        (folder / f"glue/MRPC/{split}.tsv").write_text(header + '1\t1\t2\tHe said " yes .\tYes , he said .\n')
    (folder / "glue/MNLI/train_subset.tsv").write_text("sentence1\tsentence2\tgold_label\nA.\tB.\tneutral\n")
    (folder / "glue/MNLI/dev_matched.tsv").write_text(
        "index\tsentence1\tsentence2\tgold_label\n0\tA.\tB.\tentailment\n"
    )
    for name in ("train-v1.1-a.json", "train-v1.1-b.json", "dev-v1.1.json"):
        (folder / "squad" / name).write_text(json.dumps(SQUAD))
    text = "\n\n".join(f"Title {i}\nA paragraph about number {i}.\nAnother one." for i in range(30))
    for name in ("enwiki-00.txt.xz", "enwiki-valid.txt.xz"):
        (folder / "wikipedia" / name).write_bytes(lzma.compress(text.encode()))
    BuiltInSource().tokenizer().save(str(folder / "vocab" / "tokenizer.json"))
    return folder


@pytest.fixture
def no_hub(monkeypatch):
    monkeypatch.setattr(sources_module, "hub_problem", lambda offline: "no network in this test")


def rows(folder, task, split="train"):
    return MirrorSource(folder).task_rows(TASKS[task], split)


def test_auto_prefers_the_mirror_and_says_so(mirror, tmp_path, monkeypatch):
    monkeypatch.setenv("DETRANSFORMER_DATA", str(mirror))
    data = open_data("auto", tmp_path / "cache")
    assert data.name == "mirror" and "DETRANSFORMER_DATA" in data.note
    note = data.task("SST-2", max_train_rows=1).note
    assert note == "mirror; reduced training set, 1 of 67,349 rows; reduced validation set, 2 of 872 rows"


def test_auto_falls_through_to_built_in_and_says_why(tmp_path, monkeypatch, no_hub):
    monkeypatch.setenv("DETRANSFORMER_DATA", str(tmp_path / "nowhere"))
    data = open_data("auto", tmp_path / "cache")
    assert data.name == "built-in"
    assert "nowhere" in data.note and "no network in this test" in data.note
    assert data.task("CoLA", 100).note == "built-in generated set, 100 training rows; 400 validation rows"


def test_an_explicit_source_that_is_not_there_is_an_error(tmp_path, monkeypatch, no_hub):
    monkeypatch.setenv("DETRANSFORMER_DATA", str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="no mirror folder.*nowhere"):
        open_data("mirror", tmp_path)
    with pytest.raises(ValueError, match=r"'hub' is not available \(no network in this test\): connect"):
        open_data("hub", tmp_path)
    with pytest.raises(ValueError, match="'web' is unknown: choose one of auto"):
        open_data("web", tmp_path)


def test_the_hub_is_given_up_in_seconds(monkeypatch):
    assert "HF_HUB_OFFLINE" in hub_problem(offline=True)

    class Hanging:
        def dataset_info(self, *args, **kwargs):
            time.sleep(30)

    monkeypatch.setattr("detransformer.training.data.hub.HfApi", Hanging)
    start = time.monotonic()
    assert "no answer within" in hub_problem(offline=False, timeout_s=0.3)
    assert time.monotonic() - start < 5


def test_mirror_reads_quotes_byte_order_mark_and_parts(mirror):
    assert rows(mirror, "SST-2")[0] == {"sentence": 'a "good film', "label": 1}
    assert rows(mirror, "MRPC")[0] == {"sentence1": 'He said " yes .', "sentence2": "Yes , he said .", "label": 1}
    assert rows(mirror, "CoLA", "validation")[1] == {"sentence": "Works it it.", "label": 0}
    assert rows(mirror, "MNLI")[0]["label"] == 1 and rows(mirror, "MNLI", "validation")[0]["label"] == 0
    assert len(rows(mirror, "SQuAD")) == 2 and len(rows(mirror, "SQuAD", "validation")) == 1
    articles = list(MirrorSource(mirror).articles("train"))
    assert len(articles) == 30 and articles[3] == "Title 3\nA paragraph about number 3.\nAnother one."


@pytest.mark.parametrize(
    ("name", "content", "task", "message"),
    [
        ("glue/CoLA/train.tsv", b"gj04\t1\t\tIt works.\ngj04\t1\n", "CoLA", r"train.tsv, line 2: 2 tab-separated"),
        ("glue/CoLA/train.tsv", b"gj04\t7\t\tIt works.\n", "CoLA", r"train.tsv, line 1: label '7' is none of 0, 1"),
        ("glue/SST-2/train.tsv", b"sentence\tlabel\nok\t1\ncaf\xe9\t1\n", "SST-2", r"train.tsv, line 3: not UTF-8"),
        ("glue/SST-2/train.tsv", b"text\tlabel\nok\t1\n", "SST-2", r"line 1: the header has no column 'sentence'"),
        ("glue/SST-2/train.tsv", b"sentence\tlabel\n", "SST-2", r"train.tsv has no rows"),
        ("glue/MRPC/train.tsv", None, "MRPC", r"MRPC/train.tsv is missing: copy it there"),
        ("squad/train-v1.1-a.json", b'{"data": [\n{"title"', "SQuAD", r"train-v1.1-a.json, line 2: not JSON"),
        ("squad/train-v1.1-a.json", b'{"version": 1}', "SQuAD", r"not SQuAD v1.1"),
        (
            "squad/train-v1.1-a.json",
            json.dumps(SQUAD).replace("14", "3").encode(),
            "SQuAD",
            r"question 1: the answer 'Oslo' is not at character 3",
        ),
    ],
)
def test_a_damaged_file_is_named_with_line_and_remedy(mirror, name, content, task, message):
    (mirror / name).unlink()
    if content is not None:
        (mirror / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        rows(mirror, task)
    assert "copy it" in str(error.value)


def test_questions_without_an_answer_are_left_out(mirror):
    """SQuAD 2.0's files under the names of 1.1; one without any answer is refused."""
    path = mirror / "squad" / "train-v1.1-a.json"
    content = json.loads(path.read_text())
    (paragraph, *_) = content["data"][0]["paragraphs"]
    known = rows(mirror, "SQuAD").to_list()
    without = [
        {"id": f"{i}", "question": "Why?", "answers": a} for i, a in enumerate(([], [{"text": "", "answer_start": 0}]))
    ]
    plausible = [{"text": paragraph["context"][:3], "answer_start": 0}]
    without.append({"id": "2", "question": "Who?", "answers": plausible, "is_impossible": True})
    paragraph["qas"] = without + paragraph["qas"]
    path.write_text(json.dumps(content))
    assert rows(mirror, "SQuAD").to_list() == known
    for part in (mirror / "squad").glob("train*.json"):
        only = {"data": [{"paragraphs": [paragraph | {"qas": without}]}]}
        part.write_text(json.dumps(only))
    with pytest.raises(ValueError, match="train-v1.1-a.json has no question with an answer"):
        rows(mirror, "SQuAD")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data[: len(data) // 2], "xz data is damaged"),
        (lambda data: b"not xz at all", "xz data is damaged"),
        (lambda data: lzma.compress(b"Title\nfine\nna\xefve\n"), "line 3: not UTF-8"),
    ],
)
def test_damaged_wikipedia_is_named(mirror, damage, message):
    path = mirror / "wikipedia" / "enwiki-00.txt.xz"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=rf"enwiki-00.txt.xz.*{message}"):
        list(MirrorSource(mirror).articles("train"))


def test_missing_wikipedia_and_damaged_vocabulary(mirror):
    (mirror / "wikipedia" / "enwiki-valid.txt.xz").unlink()
    with pytest.raises(ValueError, match="no validation text"):
        list(MirrorSource(mirror).articles("validation"))
    (mirror / "vocab" / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match="tokenizer.json is no tokenizer file"):
        MirrorSource(mirror).tokenizer()


def test_built_in_corpus_is_the_same_every_time():
    first, second = BuiltInSource(), BuiltInSource()
    assert list(first.articles("train")) == list(second.articles("train"))
    assert first.tokenizer().to_str() == second.tokenizer().to_str()
    for task in TASKS.values():
        assert first.task_rows(task, "train").to_list() == second.task_rows(task, "train").to_list()


def test_built_in_labels_follow_from_the_text_and_spans_match():
    """Word-pair counts and a linear model beat the most frequent label by far: the tasks can be learned."""
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.linear_model import LogisticRegression

    source = BuiltInSource()
    for name in ("CoLA", "SST-2", "MNLI"):
        task = TASKS[name]
        train, valid = source.task_rows(task, "train"), source.task_rows(task, "validation")
        vectors = CountVectorizer(ngram_range=(1, 2))
        model = LogisticRegression(max_iter=500).fit(vectors.fit_transform(train[task.columns[-1]]), train["label"])
        score = model.score(vectors.transform(valid[task.columns[-1]]), valid["label"])
        share = max(np.bincount(valid["label"])) / len(valid)
        assert score > share + 0.15, (name, score, share)
    for row in source.task_rows(TASKS["MRPC"], "validation"):
        thing = row["sentence1"].split()[4]  # Anna bought a yellow kite in Oslo.
        assert (thing in row["sentence2"].split()) == bool(row["label"])
    for row in source.task_rows(TASKS["SQuAD"], "validation"):
        start, text = row["answers"]["answer_start"][0], row["answers"]["text"][0]
        assert row["context"][start : start + len(text)] == text


def test_packed_text_is_made_once_and_damage_is_named(tmp_path, monkeypatch):
    data = open_data("built-in", tmp_path)
    packed = data.packed("train", 32, 3200)
    assert packed.shape == (100, 32) and isinstance(packed, np.memmap)
    assert (packed[:, 0] == data.special.cls).all() and (packed[:, -1] == data.special.sep).all()
    path = Path(packed.filename)
    before = path.stat().st_mtime_ns
    assert np.array_equal(open_data("built-in", tmp_path).packed("train", 32, 3200), packed)
    assert path.stat().st_mtime_ns == before
    text = data.tokenizer.decode(packed[:5].flatten().tolist())
    assert next(data.source.articles("train")).split("\n")[0].lower() in text
    path.write_bytes(b"short")
    with pytest.raises(ValueError, match="is damaged.*made again"):
        data.packed("train", 32, 3200)


def test_a_vocabulary_that_two_bytes_do_not_number_is_refused(tmp_path):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *map(str, range(2**16))]
    tokenizer = Tokenizer(WordLevel({word: number for number, word in enumerate(words)}, "[UNK]"))
    with pytest.raises(ValueError, match="has 65,541 tokens, packed text holds 65,536"):
        pack_text(iter(["a"]), tokenizer, 16, None, tmp_path / "a.bin", "text")


def test_a_stopped_packing_leaves_nothing_half_written(tmp_path):
    data = open_data("built-in", tmp_path)

    def broken(split):
        yield from list(BuiltInSource().articles(split))[:600]
        raise KeyboardInterrupt

    data.source.articles = broken
    with pytest.raises(KeyboardInterrupt):
        data.packed("train", 32, None)
    assert list(tmp_path.iterdir()) == []


def test_masks_hit_the_right_number_of_ordinary_tokens():
    special = SpecialTokens(pad=0, cls=2, sep=3, mask=4)
    tokens = torch.randint(5, 1000, (400, 64), generator=torch.Generator().manual_seed(0))
    tokens[:, 0], tokens[:, -1] = special.cls, special.sep
    batch = mask_tokens(tokens, 1000, special, 9, torch.Generator().manual_seed(1))
    picked = batch["input_ids"].gather(1, batch["positions"])
    assert torch.equal(batch["labels"], tokens.gather(1, batch["positions"]))
    assert (batch["positions"].diff(dim=1) > 0).all()  # all different, in order
    assert batch["positions"].min() > 0 and batch["positions"].max() < 63
    masked, kept = (picked == special.mask).float().mean(), (picked == batch["labels"]).float().mean()
    assert abs(masked - 0.8) < 0.03 and abs(kept - 0.1) < 0.02
    untouched = torch.ones_like(tokens, dtype=torch.bool).scatter(1, batch["positions"], False)
    assert torch.equal(batch["input_ids"][untouched], tokens[untouched])
    short = mask_tokens(torch.tensor([[2, 7, 3, 0, 0]]), 1000, special, 3, torch.Generator().manual_seed(0))
    assert sorted(short["labels"][0].tolist()) == [-100, -100, 7]


def test_order_covers_each_epoch_and_depends_on_the_seed_alone(tmp_path):
    data = open_data("built-in", tmp_path)
    sequences = data.packed("train", 32, 3200)
    batches = MaskedBatches(sequences, data.vocab_size, data.special, seed=3)
    assert sorted(np.concatenate([stream_rows(100, 0, 60, 3), stream_rows(100, 60, 40, 3)])) == list(range(100))
    assert list(stream_rows(100, 90, 20, 3)) == [*stream_rows(100, 90, 10, 3), *stream_rows(100, 100, 10, 3)]
    again = MaskedBatches(sequences, data.vocab_size, data.special, seed=3)
    for name, tensor in batches.train_batch(7, 8).items():
        assert torch.equal(tensor, again.train_batch(7, 8)[name])
    other = MaskedBatches(sequences, data.vocab_size, data.special, seed=4)
    assert not torch.equal(batches.train_batch(7, 8)["input_ids"], other.train_batch(7, 8)["input_ids"])


def test_the_mirror_given_here_reads_whole():
    """Every file of the real mirror, where one is given: official row counts of the full sets."""
    from detransformer.settings import data_environment

    folder = data_environment().mirror
    if not folder.is_dir():
        pytest.skip("no mirror folder on this machine")
    source = MirrorSource(folder)
    for task in TASKS.values():
        assert len(source.task_rows(task, "validation")) == task.full_eval_rows
        assert 0 < len(source.task_rows(task, "train")) <= task.full_train_rows
    assert isinstance(source.tokenizer(), Tokenizer) and source.tokenizer().get_vocab_size() == 30_522
    assert len(next(source.articles("validation")).split()) > 20


# --- fewer pieces ----------------------------------------------------------------------------------------------------


def test_a_reduced_vocabulary_keeps_bert_inputs(tmp_path):
    whole = open_data("built-in", tmp_path)
    data = reduced_data(whole, 120)
    assert data.vocab_size == 120 and data.name == "built-in-120-pieces"
    encoding = data.tokenizer.encode("a film", "of charm")
    assert encoding.tokens[0] == "[CLS]" and encoding.tokens[-1] == "[SEP]" and encoding.tokens.count("[SEP]") == 2
    middle = encoding.tokens.index("[SEP]")
    assert encoding.type_ids == [0] * (middle + 1) + [1] * (len(encoding.ids) - middle - 1)
    assert "[UNK]" not in encoding.tokens and max(encoding.ids) < 120
    ids = {name: data.tokenizer.token_to_id(f"[{name.upper()}]") for name in ("pad", "cls", "sep", "mask")}
    assert ids == vars(data.special)
    assert "".join(t.removeprefix("##") for t in encoding.tokens if not t.startswith("[")) == "afilmofcharm"


def test_data_travels_to_another_process_as_its_source(tmp_path):
    data = reduced_data(open_data("built-in", tmp_path), 120)
    copy = pickle.loads(pickle.dumps(data))
    assert (copy.name, copy.fingerprint, copy.cache_dir) == (data.name, data.fingerprint, data.cache_dir)
    assert copy.tokenizer.to_str() == data.tokenizer.to_str()
