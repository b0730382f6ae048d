"""A small generated English corpus with five tasks, so that everything runs without data: the same names and metrics.

Labels follow from the text and can be learned. Scores on it say that the software works, nothing about English.
"""

import random
from collections.abc import Iterator

from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from detransformer.training.data.tasks import Task

SEED = 2024
NUM_ROWS = {"train": 2000, "validation": 400}
NUM_ARTICLES = {"train": 1500, "validation": 100}
SPECIAL_TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
LETTERS = "abcdefghijklmnopqrstuvwxyz"

NAMES = "Anna Boris Clara David Elena Felix Greta Hugo Irene Jonas Karla Liam Maria Nadia Oscar Paula".split()
PLACES = "Paris London Rome Cairo Oslo Lima Tokyo Delhi Boston Vienna Madrid Lagos".split()
COLOURS = "red blue green yellow black white brown purple".split()
THINGS = "kite book lamp chair bicycle guitar clock basket camera ladder bottle carpet".split()
VERBS = {"bought": "purchased", "found": "discovered", "sold": "traded", "fixed": "repaired"}  # and a synonym
GOOD = "wonderful brilliant charming moving delightful superb clever warm graceful funny".split()
BAD = "dull awful boring clumsy hollow tedious bleak stupid lifeless annoying".split()
FILM_PARTS = "film story acting music ending dialogue cast plot script camerawork".split()


def fact(rng: random.Random, name: str, **known: str) -> tuple[str, str, str, str, str]:
    """Who did what to a thing of which colour, where; all but the name by chance where it is not `known`."""
    chosen = {"verb": list(VERBS), "colour": COLOURS, "thing": THINGS, "place": PLACES}
    return (name, *(known.get(part) or rng.choice(words) for part, words in chosen.items()))


def sentence(name: str, verb: str, colour: str, thing: str, place: str) -> str:
    return f"{name} {verb} a {colour} {thing} in {place}."


def review(rng: random.Random, positive: bool) -> str:
    one, two = rng.sample(GOOD if positive else BAD, 2)
    return f"the {rng.choice(FILM_PARTS)} is {one} and {two}."


def row(task: Task, rng: random.Random, number: int) -> dict:
    """A row of `task`: its columns and `label`, or SQuAD's."""
    label = rng.randrange(max(1, len(task.labels)))
    people = rng.sample(NAMES, 3)
    facts = [fact(rng, name) for name in people]
    name, verb, colour, thing, place = facts[0]
    if task.name == "CoLA":
        words = sentence(*facts[0]).split()
        return {"sentence": " ".join(words if label else [*words[3::-1], *words[4:]]), "label": label}
    if task.name == "SST-2":
        return {"sentence": review(rng, bool(label)), "label": label}
    if task.name == "MRPC":
        other = thing if label else rng.choice([word for word in THINGS if word != thing])
        second = f"A {colour} {other} was {VERBS[verb]} by {name} in {place}."
        return {"sentence1": sentence(*facts[0]), "sentence2": second, "label": label}
    if task.name in ("MNLI", "RTE"):
        second = (f"{name} {VERBS[verb]} a {thing}.", f"{name} plans to leave soon.", f"{name} never saw a {thing}.")
        return {"sentence1": sentence(*facts[0]), "sentence2": second[label], "label": label}
    texts, asked = [sentence(*each) for each in facts], rng.randrange(3)
    start = sum(len(text) + 1 for text in texts[:asked]) + texts[asked].rindex(" ") + 1
    return {
        "id": str(number),
        "question": f"Where was {people[asked]} with the {facts[asked][3]}?",
        "context": " ".join(texts),
        "answers": {"text": [facts[asked][4]], "answer_start": [start]},
    }


class BuiltInSource:
    """The generated corpus as a data source (see `sources.py` for what a source offers)."""

    name = "built-in"

    def tokenizer(self) -> Tokenizer:
        """WordPiece with BERT's normalisation and special tokens; its pieces are the letters and the corpus' words."""
        split = pre_tokenizers.BertPreTokenizer().pre_tokenize_str
        words = {word for article in self.articles("train") for word, _ in split(article.lower())}
        singles = [*LETTERS, *(f"##{letter}" for letter in LETTERS), *(w for w in words if not w.isalpha())]
        pieces = [*SPECIAL_TOKENS, *sorted(singles), *sorted(words.difference(singles))]
        vocabulary = {piece: number for number, piece in enumerate(pieces)}
        tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
        tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        tokenizer.decoder = decoders.WordPiece()
        tokenizer.add_special_tokens(SPECIAL_TOKENS)
        tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
        return tokenizer

    def fingerprint(self) -> str:
        return f"built-in-{SEED}-3"

    def task_rows(self, task: Task, split: str) -> Dataset:
        rng = random.Random(f"{SEED} {task.name} {split}")
        return Dataset.from_list([row(task, rng, number) for number in range(NUM_ROWS[split])])

    def articles(self, split: str) -> Iterator[str]:
        """A title, some events of one person's life, some reviews."""
        rng = random.Random(f"{SEED} articles {split}")
        for _ in range(NUM_ARTICLES[split]):
            name, place = rng.choice(NAMES), rng.choice(PLACES)
            events = [sentence(*fact(rng, name, place=place)) for _ in range(rng.randint(4, 8))]
            reviews = [review(rng, rng.random() < 0.5) for _ in range(rng.randint(3, 6))]
            yield "\n".join([f"{name} of {place}", " ".join(events), " ".join(reviews)])
