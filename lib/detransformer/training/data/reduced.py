"""A smaller vocabulary for small models: most of BERT's 30,522 pieces are too rare to be learned from little text."""

import json

from tokenizers import Tokenizer, processors

from detransformer.training.data.sources import TrainingData


def reduced_data(data: TrainingData, vocab_size: int | None, decoder: bool = False) -> TrainingData:
    """`data` with a vocabulary of `vocab_size`; itself where it has no more pieces, or None is asked.

    Perplexity is a token's, so it compares with that of the same vocabulary only.

    Args:
        decoder: what is encoded starts with [CLS], as a decoder's training text does, and has no [SEP].
    """
    if vocab_size is None or vocab_size >= data.vocab_size:
        return data
    tokenizer = reduced_tokenizer(data.tokenizer, vocab_size, decoder)
    note = f"{data.note}; {vocab_size:,} pieces of its vocabulary"
    return TrainingData(data.source, data.cache_dir, note, tokenizer, f"{data.name}-{vocab_size}-pieces")


def reduced_tokenizer(tokenizer: Tokenizer, vocab_size: int, decoder: bool = False) -> Tokenizer:
    """`tokenizer` with fewer pieces: special tokens, single ASCII characters, then the first others of its vocabulary.

    BERT's vocabulary is in order of frequency. Words are cut in shorter pieces instead; characters outside ASCII (after
    the tokenizer's normalisation, which takes accents away) make a word [UNK].

    Raises:
        ValueError: if `vocab_size` has no room for special tokens and characters.
    """
    described = json.loads(tokenizer.to_str())
    pieces = sorted(described["model"]["vocab"], key=described["model"]["vocab"].get)
    special = [token["content"] for token in described["added_tokens"]]
    single = [p for p in pieces if len(p.removeprefix("##")) == 1]
    characters = [p for p in single if p.isascii()]
    taken = {*special, *single}
    others = [p for p in pieces if p not in taken and not p.startswith("[unused")]
    room = vocab_size - len(special) - len(characters)
    if room < 0:
        raise ValueError(
            f"vocab_size={vocab_size} has no room for {len(special)} special tokens and {len(characters)} "
            f"characters: choose at least {len(special) + len(characters)}, or None for all."
        )
    numbers = {piece: number for number, piece in enumerate((*special, *characters, *others[:room]))}
    described["model"]["vocab"] = numbers
    described["post_processor"] = None
    for token in described["added_tokens"]:
        token["id"] = numbers[token["content"]]
    reduced = Tokenizer.from_str(json.dumps(described))
    reduced.post_processor = processors.TemplateProcessing(
        single="[CLS] $A" if decoder else "[CLS] $A [SEP]",
        pair="[CLS] $A $B" if decoder else "[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(name, numbers[name]) for name in ("[CLS]", "[SEP]")],
    )
    return reduced
