"""Bodies of requests and answers over HTTP, each field checked.

Three dialects besides this project's own routes: Hugging Face's task shape (`Hub...`), Text Embeddings Inference's
(`Embed`, `Predict`, `Rerank`, `Similarity`) and OpenAI's (`Embeddings`, `Completions`). Unknown fields are ignored,
since clients send many; an unsupported field that would change the answer is refused.
"""

from typing import Annotated, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from detransformer.answers import MAX_ANSWER_TOKENS

MAX_TEXT = 20_000  # characters
MAX_DEADLINE_S = 600.0
MAX_NEW_TOKENS = 1024
MAX_STOPS = 16

Text = Annotated[str, Field(min_length=1, max_length=MAX_TEXT)]
Token = Annotated[int, Field(ge=0, lt=2**31)]
Tokens = Annotated[list[Token], Field(min_length=1, max_length=8192)]
Texts = Annotated[list[Text], Field(min_length=1)]
Prompts = Text | Tokens | Texts | Annotated[list[Tokens], Field(min_length=1)]
NewTokens = Annotated[int, Field(ge=1, le=MAX_NEW_TOKENS)]
Temperature = Annotated[float, Field(ge=0, le=100)]
TopP = Annotated[float, Field(gt=0, le=1)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Stops = Annotated[list[Text], Field(max_length=MAX_STOPS)]


# Other programs' options to choose or cut tokens -> the values that change nothing.
LIKELIEST = {"n": (1,), "best_of": (1,), "top_k": (0, -1), "min_p": (0,), "typical_p": (1,), "num_beams": (1,)}
LIKELIEST |= {"use_beam_search": (False,), "repetition_penalty": (1,), "presence_penalty": (0,)}
LIKELIEST |= {"frequency_penalty": (0,), "no_repeat_ngram_size": (0,), "logit_bias": ({},), "bad_words": ([],)}
LIKELIEST |= {"min_tokens": (0,), "min_new_tokens": (0,), "ignore_eos": (False,), "stop_token_ids": ([],)}
LIKELIEST |= dict.fromkeys(("stop_sequences", "max_length", "truncate", "truncate_prompt_tokens"), ())
LIKELIEST |= {"watermark": (False,)} | dict.fromkeys(("grammar", "guided_json", "response_format", "adapter_id"), ())
AT_THE_END = {"truncation_direction": ("right",)}  # where texts that are too long are cut


class Checked(BaseModel):
    """A body that is checked without conversion; unknown fields are ignored.

    Fields in `only` would change the answer: they are refused unless they are null or have one of the listed values.
    """

    model_config = ConfigDict(strict=True, allow_inf_nan=False, extra="allow")
    only: ClassVar[dict[str, tuple]] = {}

    @model_validator(mode="after")
    def _no_other(self) -> Self:
        for name, values in self.only.items():
            given = self.model_extra.get(name)
            if given is not None and (given.lower() if isinstance(given, str) else given) not in values:
                raise ValueError(f"{name} is {given!r}, which this server does not do; leave it out")
        return self


class Body(Checked):
    """The field of all requests."""

    deadline_s: Annotated[float, Field(gt=0, le=MAX_DEADLINE_S, description="seconds to answer in")] = 60.0


# --- This project's own routes -----------------------------------------------------------------------------------


class Classify(Body):
    """A text, or a pair of texts, or the tokens of one."""

    text: Text | None = None
    text_pair: Text | None = None
    input_ids: Tokens | None = None

    @model_validator(mode="after")
    def _one_of(self) -> Self:
        if self.input_ids is not None and self.text_pair is not None:
            raise ValueError("text_pair goes with text, not with input_ids")
        return _either(self, "text", self.text)


class Answer(Body):
    """A question and the passage that has the answer, or the tokens of both."""

    question: Text | None = None
    passage: Text | None = None
    input_ids: Tokens | None = None

    @model_validator(mode="after")
    def _one_of(self) -> Self:
        if (self.question is None) != (self.passage is None):
            raise ValueError("question and passage go together")
        return _either(self, "question and passage", self.question)


class Generate(Body):
    """A text to continue, or its tokens; without `temperature`, with the likeliest tokens."""

    only = LIKELIEST
    text: Text | None = None
    input_ids: Tokens | None = None
    max_new_tokens: NewTokens = 32
    temperature: Temperature = 0.0
    top_p: TopP = 1.0
    seed: Seed | None = None
    stop: Stops = []

    @model_validator(mode="after")
    def _one_of(self) -> Self:
        return _either(self, "text", self.text)

    @property
    def prompt(self) -> str | list[int]:
        return self.input_ids or self.text


def _either(body: Body, name: str, value: str | None) -> Body:
    if (value is None) == (body.input_ids is None):
        raise ValueError(f"give either {name} or input_ids")
    return body


class Health(BaseModel):
    """Whether the devices serve; the other fields are for clients with the token."""

    status: str
    devices: list[str] | None = None
    waiting: int | None = None
    model: str | None = None
    last_event: str | None = None


class Problem(BaseModel):
    """A refusal as a sentence."""

    error: str
    error_type: str


# --- Hugging Face's task shape: POST / ---------------------------------------------------------------------------


class Pair(Checked):
    """Two texts that are classified together."""

    text: Text
    text_pair: Text | None = None


class ClassificationParameters(Checked):
    """How logits become scores (None: as the model says), and how many labels to return."""

    function_to_apply: Literal["sigmoid", "softmax", "none"] | None = None
    top_k: Annotated[int, Field(ge=1)] | None = None


class HubClassification(Body):
    """A text, a pair, or a list of these."""

    inputs: Text | Pair | Annotated[list[Text | Pair], Field(min_length=1)]
    parameters: ClassificationParameters | None = None


class EntityParameters(Checked):
    """Runs of tokens with one label are joined; `O` is no entity."""

    only = {"aggregation_strategy": ("simple",), "ignore_labels": (["O"],)}


class HubEntities(Body):
    """A text, or a list of texts."""

    inputs: Text | Texts
    parameters: EntityParameters | None = None


class QuestionParameters(Checked):
    """One answer, or none if the passage has none."""

    only = {"top_k": (1,), "max_answer_len": (MAX_ANSWER_TOKENS,), "handle_impossible_answer": (True,)}


class QuestionAndContext(Checked):
    """A question, and the passage that has the answer."""

    question: Text
    context: Text


class HubQuestion(Body):
    """A question about a passage."""

    inputs: QuestionAndContext
    parameters: QuestionParameters | None = None


class Sentences(Checked):
    """A sentence, and the sentences to compare it with."""

    source_sentence: Text
    sentences: Texts


class Vectors(Body):
    """Options of embeddings. `normalize` None: as the checkpoint says."""

    normalize: bool | None = None
    truncate: bool | None = None
    dimensions: int | None = None
    only = AT_THE_END | {"prompt_name": ()}


class FillParameters(Checked):
    """How many tokens to return for a mask."""

    top_k: Annotated[int, Field(ge=1)] | None = None
    only = {"targets": ()}


class HubFeatures(Vectors):
    """Texts to embed; options stand beside `inputs`, as the client sends them. `parameters` are for filling masks."""

    inputs: Text | Texts | Sentences
    parameters: FillParameters | None = None


class TextParameters(Checked):
    """Options of generation; without `do_sample`, `temperature` and `top_p`, tokens are the likeliest."""

    max_new_tokens: NewTokens = 20
    do_sample: bool | None = None
    temperature: Annotated[float, Field(gt=0, le=100)] | None = None
    top_p: TopP | None = None
    seed: Seed | None = None
    stop: Stops | None = None
    return_full_text: bool | None = None
    only = LIKELIEST

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.do_sample is False and (self.temperature is not None or self.top_p is not None):
            raise ValueError("do_sample is false beside temperature or top_p: leave out the one or the others")
        return self


class HubText(Body):
    """A text to continue."""

    inputs: Text
    parameters: TextParameters | None = None
    stream: bool | None = None


# --- Text Embeddings Inference -----------------------------------------------------------------------------------


class Embed(Vectors):
    """Texts, or rows of tokens, to embed."""

    inputs: Prompts
    normalize: bool = True


class Predict(Body):
    """A text, a pair [a, b], or a list of lists, each of one text or of a pair."""

    inputs: Text | Texts | Annotated[list[Annotated[Texts, Field(max_length=2)]], Field(min_length=1)]
    raw_scores: bool = False
    truncate: bool | None = None
    only = AT_THE_END

    @model_validator(mode="after")
    def _pair(self) -> Self:
        if isinstance(self.inputs, list) and isinstance(self.inputs[0], str) and len(self.inputs) > 2:
            raise ValueError("a list of texts is one text or a pair; give several as [[a], [b], ...]")
        return self


class Rerank(Body):
    """A query, and texts to rank by it."""

    query: Text
    texts: Texts
    raw_scores: bool = False
    return_text: bool = False
    truncate: bool | None = None
    only = AT_THE_END


class SimilarityParameters(Checked):
    """Whether texts that are too long are cut."""

    truncate: bool | None = None
    only = AT_THE_END | {"prompt_name": ()}


class Similarity(Body):
    """Sentences to compare."""

    inputs: Sentences
    parameters: SimilarityParameters | None = None


# --- OpenAI ------------------------------------------------------------------------------------------------------


class Embeddings(Vectors):
    """Texts, or rows of tokens, to embed, and the encoding of the vectors."""

    input: Prompts
    encoding_format: Literal["float", "base64"] | None = None


class StreamOptions(Checked):
    """Whether a stream ends with the numbers of tokens."""

    include_usage: bool | None = None


class Completions(Body):
    """Prompts and options with OpenAI's defaults: 16 tokens, drawn at temperature 1."""

    prompt: Prompts
    max_tokens: NewTokens | None = None
    temperature: Temperature | None = None
    top_p: TopP | None = None
    seed: Seed | None = None
    stop: Text | Stops | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    only = LIKELIEST | {"echo": (False,), "logprobs": (), "suffix": ("",)}

    @model_validator(mode="after")
    def _one_prompt(self) -> Self:
        several = isinstance(self.prompt, list) and not isinstance(self.prompt[0], int) and len(self.prompt) > 1
        if self.stream and several:
            raise ValueError("a stream has one prompt; ask for several without stream, or one after another")
        return self


class OpenAIError(BaseModel):
    """The fields that OpenAI's clients read in a refusal."""

    message: str
    type: str
    param: str | None
    code: str | None


class OpenAIProblem(BaseModel):
    """A refusal in OpenAI's shape."""

    error: OpenAIError
