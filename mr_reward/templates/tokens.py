"""Text -> token ids from which no control token can come out, whatever a policy writes."""

import re
from collections.abc import Sequence
from typing import Any

__all__ = ["TextEncoder", "encodable"]


def encodable(text: str) -> str:
    """Replace lone surrogates, which no UTF-8 tokenizer takes, by U+FFFD.

    Example:
        >>> encodable("a" + chr(0xD800)) == "a" + chr(0xFFFD)
        True
    """
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


class TextEncoder:
    """Encodes text with one tokenizer and keeps its special and added tokens out."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        # A single character that is not special (the line breaks of some tokenizers) is text: it controls nothing and
        # cannot be cut.
        self.control_tokens: dict[int, str] = {
            index: token.content
            for index, token in tokenizer.added_tokens_decoder.items()
            if len(token.content) > 1 or (token.content and token.special)
        }

    def __call__(self, text: str) -> list[int]:
        """Encode a text; without control tokens in it the ids are those of the plain tokenizer."""
        return self.encode_all([text])[0]

    def encode_all(self, texts: Sequence[str]) -> list[list[int]]:
        """Encode texts, in one call of the tokenizer."""
        pieces = [encodable(text) for text in texts]
        encoded = self._encode_pieces(pieces)
        return [
            self._without_control_tokens(piece) if self._controls(ids) else ids
            for piece, ids in zip(pieces, encoded, strict=True)
        ]

    def _encode_pieces(self, pieces: list[str]) -> list[list[int]]:
        options = {"add_special_tokens": False, "split_special_tokens": True, "verbose": False}
        return self.tokenizer(pieces, **options)["input_ids"] if pieces else []

    def _controls(self, ids: list[int]) -> set[str]:
        return {self.control_tokens[index] for index in ids if index in self.control_tokens}

    def _without_control_tokens(self, text: str) -> list[int]:
        """split_special_tokens leaves added tokens that are not special (<think>): cut them and encode the parts."""
        pieces = [text]
        while True:
            ids = [index for piece in self._encode_pieces(pieces) for index in piece]
            found = self._controls(ids)
            if not found:
                return ids
            parts = [part for piece in pieces for part in _cut(piece, found)]
            if parts == pieces:  # the token stands in the normalised text only, there is nothing to cut
                return [index for index in ids if index not in self.control_tokens]
            pieces = parts

    def pattern(self) -> re.Pattern[str]:
        """Matches any control token in a text, the longest one where several begin."""
        return re.compile("|".join(map(re.escape, sorted(self.control_tokens.values(), key=len, reverse=True))))


def _cut(text: str, tokens: set[str]) -> list[str]:
    """Cut every occurrence of a token after its first character; no other text is touched."""
    parts = [text]
    for token in sorted(tokens, key=len, reverse=True):
        cut: list[str] = []
        for part in parts:
            chunks = part.split(token)
            for i, chunk in enumerate(chunks):
                head = token[1:] if i else ""
                tail = token[:1] if i < len(chunks) - 1 else ""
                cut.append(head + chunk + tail)
        parts = cut
    return [part for part in parts if part]
