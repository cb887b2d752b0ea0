"""`ResponseGroup` -> token ids. The only place with a template; its hash goes into the checkpoint.

The prompt goes through the processor's own chat template with the generation prompt at its end, so that each response
stands where the assistant would write it. No text of a response can become a special or added token. In the prompt,
transformers' `sanitize_control_tokens` keeps text from becoming a special token, a media placeholder or a token that
the template itself uses.

Legend: N responses, P tokens of the prompt.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from mr_reward.errors import ConfigurationError, MediaError
from mr_reward.groups import ResponseGroup
from mr_reward.media import load_image

__all__ = ["TEMPLATE", "RenderedGroup", "Renderer", "check_template", "template_hash"]

TEMPLATE = "chat"
# Raise it when rendering changes what a row holds: checkpoints trained before are then refused.
_TEMPLATE_VERSION = 1
_FRAMES_PER_SECOND = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class RenderedGroup:
    """Token ids of one group, not laid out yet.

    Args:
        prompt_ids: (P,) int64, media placeholders expanded.
        response_ids: N lists of token ids, none of them special or added.
        media: tensors of the prompt's media by name, as the processor makes them; empty for text.
        mm_token_type_ids: (P,) int64, 0 text, 1 image, 2 video; None for text-only backbones.
    """

    prompt_ids: Tensor
    response_ids: list[list[int]]
    media: dict[str, Tensor]
    mm_token_type_ids: Tensor | None

    def select(self, indices: Sequence[int]) -> "RenderedGroup":
        """The same prompt with the responses at `indices`, in that order.

        Args:
            indices: positions of responses.

        Returns:
            A new rendered group that shares the prompt's tensors.
        """
        return replace(self, response_ids=[self.response_ids[i] for i in indices])


def check_template(template: str) -> None:
    """Refuse a template that does not exist.

    Args:
        template: a name.

    Raises:
        ConfigurationError: unknown name.
    """
    if template != TEMPLATE:
        raise ConfigurationError(f"unknown template {template!r}, expected {TEMPLATE!r}")


def template_hash(processor: Any) -> str:
    """Identify everything that turns a prompt into text.

    Args:
        processor: processor or tokenizer.

    Returns:
        16 hexadecimal digits.

    Raises:
        ConfigurationError: the processor has no chat template.
    """
    return hashlib.sha256(json.dumps([TEMPLATE, _TEMPLATE_VERSION, _chat_template(processor)]).encode()).hexdigest()[
        :16
    ]


def _chat_template(processor: Any) -> str:
    template = getattr(processor, "chat_template", None) or getattr(
        getattr(processor, "tokenizer", None), "chat_template", None
    )
    if not template:
        raise ConfigurationError(
            f"{type(processor).__name__} has no chat template; set processor.chat_template before making the model"
        )
    return template if isinstance(template, str) else json.dumps(template, sort_keys=True)


def _encodable(text: str) -> str:
    """Replace lone surrogates, which no UTF-8 tokenizer takes, by U+FFFD."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


class Renderer:
    """Turns groups into token ids with one processor.

    Args:
        processor: a `ProcessorMixin` (vision-language) or a tokenizer (text-only).

    Raises:
        ConfigurationError: no chat template.
    """

    def __init__(self, processor: Any) -> None:
        _chat_template(processor)
        self.processor = processor
        self.tokenizer = getattr(processor, "tokenizer", processor)
        self.sees_images = self.tokenizer is not processor
        # A single character that is not special (the line breaks of some tokenizers) is text: it controls nothing and
        # cannot be cut.
        self._added_tokens = {
            index: token.content
            for index, token in self.tokenizer.added_tokens_decoder.items()
            if len(token.content) > 1 or (token.content and token.special)
        }

    def render(self, group: ResponseGroup) -> RenderedGroup:
        """Render one group.

        Args:
            group: prompt, media and responses.

        Returns:
            Its token ids and media tensors.

        Raises:
            MediaError: media for a text-only backbone, or media that cannot be read.
        """
        prompt = self._render_prompt(group)
        token_types = prompt.pop("mm_token_type_ids", None)
        prompt.pop("attention_mask", None)
        return RenderedGroup(
            prompt_ids=prompt.pop("input_ids")[0],
            response_ids=[self.encode_text(response) for response in group.responses],
            media=prompt,
            mm_token_type_ids=None if token_types is None else token_types[0].long(),
        )

    def encode_text(self, text: str) -> list[int]:
        """Encode text so that no control token can come out of it.

        Args:
            text: anything a policy may write, `<|im_end|>` and lone surrogates included.

        Returns:
            Token ids without special or added tokens.
        """
        pieces = [_encodable(text)]
        while True:
            encoded = [
                self.tokenizer(piece, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]
                for piece in pieces
            ]
            ids = [index for piece in encoded for index in piece]
            found = {self._added_tokens[index] for index in ids if index in self._added_tokens}
            if not found:
                return ids
            # split_special_tokens leaves added tokens that are not special (<think>): cut them and encode the parts.
            parts = [part for piece in pieces for part in _cut(piece, found)]
            if parts == pieces:  # the token stands in the normalised text only, there is nothing to cut
                return [index for index in ids if index not in self._added_tokens]
            pieces = parts

    def _render_prompt(self, group: ResponseGroup) -> dict[str, Tensor]:
        if not self.sees_images:
            if group.images or group.videos:
                raise MediaError(
                    f"{group.name}: {len(group.images)} images and {len(group.videos)} videos for a text-only "
                    "backbone; use a vision-language backbone or remove them"
                )
            messages = [
                {**message, "content": "".join(_encodable(block["text"]) for block in message["content"])}
                for message in group.messages
            ]
            return self._apply_chat_template(messages)
        images, videos = iter(group.images), iter(group.videos)
        messages = [
            {
                **message,
                "content": [self._load_block(block, images, videos, group.name) for block in message["content"]],
            }
            for message in group.messages
        ]
        options: dict[str, Any] = {}
        if group.videos:
            metadata = [
                {"total_num_frames": len(video), "fps": _FRAMES_PER_SECOND, "frames_indices": list(range(len(video)))}
                for video in group.videos
            ]
            options = {"do_sample_frames": False, "video_metadata": [metadata]}
        try:
            return self._apply_chat_template(messages, processor_kwargs=options)
        except ValueError as error:
            if not (group.images or group.videos):
                raise
            raise MediaError(
                f"{group.name}: {type(self.processor).__name__} does not take its images or videos ({error}); "
                "resize or remove them"
            ) from error

    def _apply_chat_template(self, messages: list[dict[str, Any]], **options: Any) -> dict[str, Tensor]:
        rendered = self.processor.apply_chat_template(
            [messages],
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            add_generation_prompt=True,
            sanitize_control_tokens=True,
            **options,
        )
        return {key: value for key, value in rendered.items() if isinstance(value, torch.Tensor)}

    @staticmethod
    def _load_block(block: dict[str, Any], images: Any, videos: Any, name: str) -> dict[str, Any]:
        if block["type"] == "text":
            return {"type": "text", "text": _encodable(block["text"])}
        try:
            if block["type"] == "image":
                return {"type": "image", "image": load_image(next(images))}
            return {"type": "video", "video": [load_image(frame) for frame in next(videos)]}
        except MediaError as error:
            raise MediaError(f"{name}: {error}") from error


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
