"""Turns tokens that come one by one into text, up to a stop string or an end token."""

from collections.abc import Collection, Sequence

from transformers import PreTrainedTokenizerBase

UNFINISHED = "\N{REPLACEMENT CHARACTER}"  # for a character whose bytes are incomplete


class Writer:
    """Takes tokens and returns text that no later token can change.

    `reason`: "stop" after a stop string (which is not part of the text) or an end token; else None. Without a tokenizer
    all text is empty.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase | None, stop: Sequence[str], end_tokens: Collection[int]):
        self.tokens: list[int] = []  # without the end token
        self.text = ""  # returned so far
        self.reason: str | None = None
        self._tokenizer, self._stop, self._end_tokens = tokenizer, stop, end_tokens

    def add(self, token: int) -> str:
        """The text that this token makes certain."""
        if token in self._end_tokens:
            self.reason = "stop"
            return self.finish()
        self.tokens.append(token)
        whole = self._decoded()
        found = [whole.find(stop) for stop in self._stop if stop in whole]
        if found:
            self.reason = "stop"
            return self._give_out(whole[: min(found)])
        certain = whole.rstrip(UNFINISHED)
        return self._give_out(certain[: len(certain) - self._begun(certain)])

    def finish(self) -> str:
        """The text held back so far, if no token follows."""
        return self._give_out(self._decoded())

    def _decoded(self) -> str:
        return self._tokenizer.decode(self.tokens) if self._tokenizer else ""

    def _begun(self, text: str) -> int:
        """Characters at the end of `text` that may begin a stop string."""
        begun = (n for stop in self._stop for n in range(1, len(stop)) if text.endswith(stop[:n]))
        return max(begun, default=0)

    def _give_out(self, text: str) -> str:
        new, self.text = text[len(self.text) :], max(self.text, text, key=len)
        return new
