"""`RenderedGroup`: token ids and media of a group, before they are laid out as a row.

Legend: P tokens of the prompt, N responses.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

__all__ = ["GLUE", "Joiner", "RenderedGroup"]

# Between responses that a template joins to one text.
GLUE = "\n\n"


@dataclass(frozen=True, slots=True, kw_only=True)
class Joiner:
    """Encodes responses as parts of one text that a template makes of them."""

    encode: Callable[[str], list[int]]  # text -> ids without control tokens
    separator_id: int  # of `<|resp_sep|>`
    before: str  # plain text between the last control token and the first response
    after: str  # plain text between the last response and the next control token
    after_ids: list[int]  # from that control token on

    def join(self, texts: Sequence[str]) -> dict[str, Any]:
        """`response_ids` and `framing` of a `RenderedGroup`.

        Tokenizers split at control tokens, so the pieces between separators have the ids that they have in the whole
        text. A token in which a response and its surroundings are merged counts as surroundings.
        """
        response_ids, framing = [], []
        for i, text in enumerate(texts):
            before = GLUE if i else self.before
            after = GLUE if i < len(texts) - 1 else self.after
            ids = self.encode(before + text + after)
            end = max(0, len(ids) - len(self.encode(after)))
            start = min(end, len(self.encode(before)))
            response_ids.append(ids[start:end])
            framing.append(([self.separator_id] * bool(i) + ids[:start], ids[end:]))
        framing[-1][1].extend(self.after_ids)
        return {"response_ids": response_ids, "framing": framing}


@dataclass(frozen=True, slots=True, kw_only=True)
class RenderedGroup:
    """Token ids of one group, not laid out yet."""

    prompt_ids: Tensor  # (P,) int64, media placeholders expanded
    response_ids: list[list[int]]  # N lists of token ids, none of them special or added
    media: dict[str, Tensor]  # tensors of the prompt's media by name, as the processor makes them; empty for text
    mm_token_type_ids: Tensor | None  # (P,) int64, 0 text, 1 image, 2 video; None for text-only backbones
    # N pairs of token ids that the template puts before and after a response; they are never cut, and the score
    # is read at the last of them. None for templates whose scores are read at readout tokens
    framing: list[tuple[list[int], list[int]]] | None = None
    texts: Sequence[str] = ()  # the N responses, where their ids depend on what stands beside them
    joiner: Joiner | None = None  # encodes them

    def select(self, indices: Sequence[int]) -> "RenderedGroup":
        """The same prompt with the responses at `indices`, in that order."""
        if self.joiner is None:
            return replace(self, response_ids=[self.response_ids[i] for i in indices])
        texts = [self.texts[i] for i in indices]
        return replace(self, texts=texts, **self.joiner.join(texts))

    def without_prompt(self) -> "RenderedGroup":
        """The responses alone, for a prompt that was read before."""
        return replace(self, prompt_ids=self.prompt_ids[:0], media={}, mm_token_type_ids=None)

    def has_prompt_of(self, other: "RenderedGroup") -> bool:
        """Whether prompt and media are the same as those of another group."""
        return (
            torch.equal(self.prompt_ids, other.prompt_ids)
            and self.media.keys() == other.media.keys()
            and all(
                tensor is other.media[name] or torch.equal(tensor, other.media[name])
                for name, tensor in self.media.items()
            )
        )
