"""A small generated English corpus with five tasks, for machines without any data: the same names and metrics.

A seeded grammar of people, places, things and feelings writes everything, so that labels follow from the text and can
be learned. It stands in for the real sets in form only: its scores say that the software works, nothing about English.
"""

import random
from collections.abc import Callable, Iterator

from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from detransformer.training.data.tasks import Task

SEED = 2024
NUM_ROWS = {"train": 2000, "validation": 400}
NUM_ARTICLES = {"train": 1500, "validation": 100}
VOCAB_SIZE = 2000
SPECIAL_TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]

NAMES = "Anna Boris Clara David Elena Felix Greta Hugo Irene Jonas Karla Liam Maria Nadia Oscar Paula".split()
PLACES = "Paris London Rome Cairo Oslo Lima Tokyo Delhi Boston Vienna Madrid Lagos".split()
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
COLOURS = "red blue green yellow black white brown purple".split()
SIZES = "small large tiny huge heavy light".split()
OBJECTS = "kite book lamp chair bicycle guitar clock basket camera ladder bottle carpet".split()
ANIMALS = "dog cat horse bird lion rabbit goat bear tiger duck".split()
VERBS = {"bought": "purchased", "found": "discovered", "sold": "traded", "carried": "transported", "fixed": "repaired"}
OPPOSITE = {"bought": "sold", "sold": "bought", "found": "lost", "carried": "dropped", "fixed": "broke"}
BASE_FORM = {"bought": "buy", "found": "find", "sold": "sell", "carried": "carry", "fixed": "fix"}
ACTIONS = {"chases": "chase", "sees": "see", "follows": "follow", "helps": "help", "fears": "fear"}
GOOD = "wonderful brilliant charming moving delightful superb clever warm graceful funny".split()
BAD = "dull awful boring clumsy hollow tedious bleak stupid lifeless annoying".split()
FILM_PARTS = "film story acting music ending dialogue cast plot script camerawork".split()


class BuiltInSource:
    """The generated corpus as a data source (see `sources.py` for what a source offers)."""

    name = "built-in"
    is_real = False

    def tokenizer(self) -> Tokenizer:
        """A WordPiece tokenizer trained on the training articles, with BERT's normalisation and special tokens.

        Training breaks ties by chance. Kept are the letters and the pieces that the text is made of, in alphabetical
        order: those are the same every time.
        """
        trained = self._tokenizer(models.WordPiece(unk_token="[UNK]"))
        trainer = trainers.WordPieceTrainer(
            vocab_size=VOCAB_SIZE, special_tokens=SPECIAL_TOKENS, show_progress=False, min_frequency=1
        )
        articles = list(self.articles("train"))
        trained.train_from_iterator(articles, trainer)
        used = {token for encoding in trained.encode_batch(articles) for token in encoding.tokens}
        letters = {token for token in trained.get_vocab() if len(token.removeprefix("##")) == 1}
        tokens = SPECIAL_TOKENS + sorted((used | letters).difference(SPECIAL_TOKENS))
        vocabulary = {token: number for number, token in enumerate(tokens)}
        tokenizer = self._tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
        tokenizer.add_special_tokens(SPECIAL_TOKENS)
        tokenizer.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]",
            pair="[CLS] $A [SEP] $B:1 [SEP]:1",
            special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
        )
        return tokenizer

    def _tokenizer(self, model: models.WordPiece) -> Tokenizer:
        tokenizer = Tokenizer(model)
        tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        tokenizer.decoder = decoders.WordPiece()
        return tokenizer

    def fingerprint(self) -> str:
        return f"built-in-{SEED}-2"

    def task_rows(self, task: Task, split: str) -> Dataset:
        rng = random.Random(f"{SEED} {task.name} {split}")
        make = MAKERS[task.name]
        rows = [make(rng, index) for index in range(NUM_ROWS[split])]
        return Dataset.from_list(rows)

    def articles(self, split: str) -> Iterator[str]:
        rng = random.Random(f"{SEED} articles {split}")
        for _ in range(NUM_ARTICLES[split]):
            yield article(rng)


def article(rng: random.Random) -> str:
    """A title line and three paragraphs about one person, one animal pair and one film."""
    name, place = rng.choice(NAMES), rng.choice(PLACES)
    events = [fact_sentence(fact(rng, name=name)) for _ in range(rng.randint(3, 5))]
    animals = [capital(animal_sentence(rng)) for _ in range(rng.randint(2, 4))]
    reviews = [capital(review(rng, rng.random() < 0.5)) for _ in range(rng.randint(2, 4))]
    return "\n".join([f"{name} of {place}", " ".join(events), " ".join(animals), " ".join(reviews)])


def fact(rng: random.Random, name: str | None = None) -> dict[str, str]:
    return {
        "name": name or rng.choice(NAMES),
        "verb": rng.choice(list(VERBS)),
        "size": rng.choice(SIZES),
        "colour": rng.choice(COLOURS),
        "object": rng.choice(OBJECTS),
        "place": rng.choice(PLACES),
        "day": rng.choice(DAYS),
    }


def fact_sentence(f: dict[str, str]) -> str:
    return f"{f['name']} {f['verb']} a {f['size']} {f['colour']} {f['object']} in {f['place']} on {f['day']}."


def animal_sentence(rng: random.Random) -> str:
    """Subject and verb agree: `the dogs chase a small cat .`"""
    subject, other, verb = rng.choice(ANIMALS), rng.choice(ANIMALS), rng.choice(list(ACTIONS))
    adjective = rng.choice(SIZES)
    if rng.random() < 0.5:
        return f"the {adjective} {subject} {verb} a {other}."
    return f"the {adjective} {subject}s {ACTIONS[verb]} a {other}."


def review(rng: random.Random, positive: bool) -> str:
    """A verdict on a film; `not` turns it round."""
    words, opposite = (GOOD, BAD) if positive else (BAD, GOOD)
    part, other = rng.sample(FILM_PARTS, 2)
    kind = rng.random()
    if kind < 0.25:
        return f"the {part} is not {rng.choice(opposite)}, and the {other} is {rng.choice(words)}."
    if kind < 0.6:
        return f"a {rng.choice(words)} {part} with {rng.choice(words)} {other}."
    return f"the {part} is {rng.choice(words)} and {rng.choice(words)}."


def capital(text: str) -> str:
    return text[0].upper() + text[1:]


def make_cola(rng: random.Random, index: int) -> dict:
    """Acceptable, or spoiled by word order, a missing noun or a doubled verb."""
    sentence, acceptable = animal_sentence(rng), rng.random() < 0.6
    if not acceptable:
        words = sentence.rstrip(".").split()
        kind = rng.randrange(3)
        if kind == 0:
            words[0], words[2] = words[2], words[0]
        elif kind == 1:
            words.pop(2)
        else:
            words.insert(3, words[3])
        sentence = " ".join(words) + "."
    return {"sentence": capital(sentence), "label": int(acceptable)}


def make_sst2(rng: random.Random, index: int) -> dict:
    positive = rng.random() < 0.5
    return {"sentence": review(rng, positive), "label": int(positive)}


def make_mrpc(rng: random.Random, index: int) -> dict:
    """A paraphrase (synonym, passive), or the same event with another object and place."""
    f, same = fact(rng), rng.random() < 0.6
    g = (
        dict(f)
        if same
        else f
        | {
            "object": rng.choice([o for o in OBJECTS if o != f["object"]]),
            "place": rng.choice([p for p in PLACES if p != f["place"]]),
        }
    )
    if rng.random() < 0.5:
        second = (
            f"On {g['day']}, {g['name']} {VERBS[g['verb']]} a {g['size']} {g['colour']} {g['object']} in {g['place']}."
        )
    else:
        second = f"A {g['size']} {g['colour']} {g['object']} was {VERBS[g['verb']]} by {g['name']} in {g['place']}."
    return {"sentence1": fact_sentence(f), "sentence2": second, "label": int(same)}


def make_mnli(rng: random.Random, index: int) -> dict:
    """Entailment leaves out details, contradiction denies or reverses, neutral adds a wish nobody stated."""
    f, label = fact(rng), rng.randrange(3)
    if label == 0:
        verb = rng.choice([f["verb"], VERBS[f["verb"]]])
        second = f"{f['name']} {verb} a {f['object']}."
    elif label == 1:
        options = [
            f"{f['name']} {rng.choice(['hopes', 'plans'])} to leave {f['place']} soon.",
            f"The {f['object']} was {rng.choice(['a gift', 'very old'])}.",
        ]
        second = rng.choice(options)
    else:
        options = [
            f"{f['name']} did not {BASE_FORM[f['verb']]} a {f['object']}.",
            f"{f['name']} {OPPOSITE[f['verb']]} a {f['object']}.",
        ]
        second = rng.choice(options)
    return {"sentence1": fact_sentence(f), "sentence2": second, "label": label}


def make_squad(rng: random.Random, index: int) -> dict:
    """A paragraph of three events by three people, and a question about the place, day or colour of one."""
    facts = [fact(rng, name=name) for name in rng.sample(NAMES, 3)]
    context = " ".join(fact_sentence(f) for f in facts)
    at = rng.randrange(3)
    f = facts[at]
    base = BASE_FORM[f["verb"]]
    kind = rng.choice(["place", "day", "colour"])
    question = {
        "place": f"Where did {f['name']} {base} the {f['object']}?",
        "day": f"On which day did {f['name']} {base} the {f['object']}?",
        "colour": f"Which colour was the {f['object']} of {f['name']}?",
    }[kind]
    sentence_start = sum(len(fact_sentence(g)) + 1 for g in facts[:at])
    start = sentence_start + fact_sentence(f).index(f" {f[kind]}") + 1
    return {
        "id": f"built-in-{index}",
        "question": question,
        "context": context,
        "answers": {"text": [f[kind]], "answer_start": [start]},
    }


MAKERS: dict[str, Callable[[random.Random, int], dict]] = {
    "CoLA": make_cola,
    "SST-2": make_sst2,
    "MRPC": make_mrpc,
    "MNLI": make_mnli,
    "SQuAD": make_squad,
}
