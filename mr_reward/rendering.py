"""`ResponseGroup` -> token ids. The only place with a template; its hash goes into the checkpoint.

`chat`: the prompt goes through the processor's own chat template with the generation prompt at its end, so that each
response stands where the assistant would write it. No text of a response can become a special or added token. In the
prompt, transformers' `sanitize_control_tokens` keeps text from becoming a special token, a media placeholder or a
token that the template itself uses.

`mr2rm-assistant`, `mr2rm-user`: how the public code of arXiv 2604.10966 shows the responses, for its checkpoints. They
are one text, joined by a blank line, `<|resp_sep|>` and a blank line, and stand in the assistant's turn (its training)
or behind the prompt in the user's turn (its README); the media of a turn come before its text.

Legend: N responses, P tokens of the prompt.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jinja2 import TemplateError
from torch import Tensor

from mr_reward.encoding import TextEncoder, encodable
from mr_reward.errors import ConfigurationError, GroupError, MediaError
from mr_reward.groups import ResponseGroup
from mr_reward.media import load_image

__all__ = [
    "JOINED_TEMPLATES",
    "SEPARATOR",
    "TEMPLATE",
    "RenderedGroup",
    "Renderer",
    "check_template",
    "template_hash",
]

TEMPLATE = "chat"
JOINED_TEMPLATES = ("mr2rm-assistant", "mr2rm-user")
SEPARATOR = "<|resp_sep|>"
_GLUE = "\n\n"
# Stands for the responses while a chat template is looked at; the line breaks tell whether it changes white space.
_SLOT = "\n\nRESPONSES\n\n"
# Raise it when rendering changes what a row holds: checkpoints trained before are then refused.
_TEMPLATE_VERSION = 1
_FRAMES_PER_SECOND = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class _Joiner:
    """Encodes responses as parts of one text that a template makes of them.

    Args:
        encode: text -> ids without control tokens.
        separator_id: of `<|resp_sep|>`.
        before: plain text between the last control token and the first response.
        after: plain text between the last response and the next control token.
        after_ids: from that control token on.
    """

    encode: Callable[[str], list[int]]
    separator_id: int
    before: str
    after: str
    after_ids: list[int]

    def join(self, texts: Sequence[str]) -> dict[str, Any]:
        """`response_ids` and `framing` of a `RenderedGroup`.

        Tokenizers split at control tokens, so the pieces between separators have the ids that they have in the whole
        text. A token in which a response and its surroundings are merged counts as surroundings.
        """
        response_ids, framing = [], []
        for i, text in enumerate(texts):
            before = _GLUE if i else self.before
            after = _GLUE if i < len(texts) - 1 else self.after
            ids = self.encode(before + text + after)
            end = max(0, len(ids) - len(self.encode(after)))
            start = min(end, len(self.encode(before)))
            response_ids.append(ids[start:end])
            framing.append(([self.separator_id] * bool(i) + ids[:start], ids[end:]))
        framing[-1][1].extend(self.after_ids)
        return {"response_ids": response_ids, "framing": framing}


@dataclass(frozen=True, slots=True, kw_only=True)
class RenderedGroup:
    """Token ids of one group, not laid out yet.

    Args:
        prompt_ids: (P,) int64, media placeholders expanded.
        response_ids: N lists of token ids, none of them special or added.
        media: tensors of the prompt's media by name, as the processor makes them; empty for text.
        mm_token_type_ids: (P,) int64, 0 text, 1 image, 2 video; None for text-only backbones.
        framing: N pairs of token ids that the template puts before and after a response; they are never cut, and the
            score is read at the last of them. None for templates whose scores are read at readout tokens.
        texts: the N responses, where their ids depend on what stands beside them.
        joiner: encodes them.
    """

    prompt_ids: Tensor
    response_ids: list[list[int]]
    media: dict[str, Tensor]
    mm_token_type_ids: Tensor | None
    framing: list[tuple[list[int], list[int]]] | None = None
    texts: Sequence[str] = ()
    joiner: _Joiner | None = None

    def select(self, indices: Sequence[int]) -> "RenderedGroup":
        """The same prompt with the responses at `indices`, in that order.

        Args:
            indices: positions of responses.

        Returns:
            A new rendered group that shares the prompt's tensors.
        """
        if self.joiner is None:
            return replace(self, response_ids=[self.response_ids[i] for i in indices])
        texts = [self.texts[i] for i in indices]
        return replace(self, texts=texts, **self.joiner.join(texts))

    def without_prompt(self) -> "RenderedGroup":
        """The responses alone, for a prompt that was read before."""
        return replace(self, prompt_ids=self.prompt_ids[:0], media={}, mm_token_type_ids=None)

    def has_prompt_of(self, other: "RenderedGroup") -> bool:
        """Whether prompt and media are the same as those of another group.

        Args:
            other: of the same renderer.

        Returns:
            True if every token and every pixel is.
        """
        return (
            torch.equal(self.prompt_ids, other.prompt_ids)
            and self.media.keys() == other.media.keys()
            and all(torch.equal(tensor, other.media[name]) for name, tensor in self.media.items())
        )


def check_template(template: str, layout: str = "causal") -> None:
    """Refuse a template that does not exist or does not go with the layout.

    Args:
        template: a name.
        layout: name of the layout.

    Raises:
        ConfigurationError: unknown name, or responses joined by text in a layout that hides them from each other.
    """
    if template not in (TEMPLATE, *JOINED_TEMPLATES):
        raise ConfigurationError(
            f"unknown template {template!r}, expected {TEMPLATE!r}, {' or '.join(map(repr, JOINED_TEMPLATES))}"
        )
    if template in JOINED_TEMPLATES and layout != "causal":
        raise ConfigurationError(
            f"template {template!r} joins the responses to one text and has no readout tokens, which layout "
            f"{layout!r} needs; use layout='causal', or template={TEMPLATE!r}"
        )


def template_hash(processor: Any, template: str = TEMPLATE) -> str:
    """Identify everything that turns a group into text.

    Args:
        processor: processor or tokenizer.
        template: name of the template.

    Returns:
        16 hexadecimal digits.

    Raises:
        ConfigurationError: the processor has no chat template.
    """
    content = json.dumps([template, _TEMPLATE_VERSION, _chat_template(processor)])
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def _chat_template(processor: Any) -> str:
    template = getattr(processor, "chat_template", None) or getattr(
        getattr(processor, "tokenizer", None), "chat_template", None
    )
    if not template:
        raise ConfigurationError(
            f"{type(processor).__name__} has no chat template; set processor.chat_template before making the model"
        )
    return template if isinstance(template, str) else json.dumps(template, sort_keys=True)


class Renderer:
    """Turns groups into token ids with one processor.

    Args:
        processor: a `ProcessorMixin` (vision-language) or a tokenizer (text-only).
        template: name of the template.

    Raises:
        ConfigurationError: unknown template, no chat template, or for `mr2rm-*` no `<|resp_sep|>` token or a chat
            template that does not take contents as they are.
    """

    def __init__(self, processor: Any, template: str = TEMPLATE) -> None:
        check_template(template)
        _chat_template(processor)
        self.template = template
        self.processor = processor
        self.tokenizer = getattr(processor, "tokenizer", processor)
        self.sees_images = self.tokenizer is not processor
        self.encode_text = TextEncoder(self.tokenizer)
        if template in JOINED_TEMPLATES:
            self._control_token = self.encode_text.pattern()
            self._separator_id = self._find_separator()
            self._surroundings(self._joined_messages(ResponseGroup(prompt="", responses=[""]))[0])

    def render(self, group: ResponseGroup) -> RenderedGroup:
        """Render one group.

        Args:
            group: prompt, media and responses.

        Returns:
            Its token ids and media tensors.

        Raises:
            MediaError: media for a text-only backbone, or media that cannot be read.
            GroupError: `mr2rm-user` and a prompt whose last turn is not the user's.
        """
        if self.template in JOINED_TEMPLATES:
            return self._render_joined(group)
        prompt = self._render_messages(group, group.messages, add_generation_prompt=True)
        token_types = prompt.pop("mm_token_type_ids", None)
        return RenderedGroup(
            prompt_ids=prompt.pop("input_ids")[0],
            response_ids=[self.encode_text(response) for response in group.responses],
            media=prompt,
            mm_token_type_ids=None if token_types is None else token_types[0].long(),
        )

    def _render_joined(self, group: ResponseGroup) -> RenderedGroup:
        """The prompt ends at the last control token before the responses; plain text behind it is the joiner's."""
        messages, user_text = self._joined_messages(group)
        before, after, after_ids = self._surroundings(messages)
        prompt = self._render_messages(group, messages, add_generation_prompt=False)
        token_types = prompt.pop("mm_token_type_ids", None)
        ids = prompt.pop("input_ids")[0]
        end = self.encode_text(before + _SLOT + after) + after_ids
        if ids[-len(end) :].tolist() != end:
            raise ConfigurationError(
                f"{type(self.tokenizer).__name__} tokenizes the end of a rendered chat in another way than its parts; "
                f"template {self.template!r} does not work with it, use {TEMPLATE!r}"
            )
        texts = [encodable(response) for response in group.responses]
        joiner = _Joiner(
            encode=self.encode_text,
            separator_id=self._separator_id,
            before=before + user_text,
            after=after,
            after_ids=after_ids,
        )
        return RenderedGroup(
            prompt_ids=ids[: -len(end)],
            media=prompt,
            mm_token_type_ids=None if token_types is None else token_types[0, : -len(end)].long(),
            texts=texts,
            joiner=joiner,
            **joiner.join(texts),
        )

    def _joined_messages(self, group: ResponseGroup) -> tuple[list[dict[str, Any]], str]:
        """The chat with a slot for the responses, and the user's text that stands right before them."""
        messages = [_media_first(message) for message in group.messages]
        if self.template == "mr2rm-assistant":
            return [*messages, {"role": "assistant", "content": [{"type": "text", "text": _SLOT}]}], ""
        if messages[-1]["role"] != "user":
            raise GroupError(
                f"{group.name}: the last turn is of {messages[-1]['role']!r}, but template {self.template!r} writes "
                "the responses into the user's last turn; end the prompt with a user turn"
            )
        text = messages[-1]["content"].pop()["text"]
        messages[-1]["content"].append({"type": "text", "text": _SLOT})
        return messages, encodable(text) + _GLUE

    def _surroundings(self, messages: list[dict[str, Any]]) -> tuple[str, str, list[int]]:
        """What the chat template writes around the slot: text before, text after, ids from a control token on."""
        if not self.sees_images:
            messages = [{**m, "content": "".join(block["text"] for block in m["content"])} for m in messages]
        (chat,) = self.processor.apply_chat_template([messages], tokenize=False, add_generation_prompt=False)
        head, slot, tail = chat.rpartition(_SLOT)
        starts = [match.end() for match in self._control_token.finditer(head)]
        if not slot or not starts:
            raise ConfigurationError(
                f"the chat template {'writes no control token' if slot else 'changes the white space of a turn'}; "
                f"template {self.template!r} needs one that writes a control token and then the text as it is, use "
                f"{TEMPLATE!r} with this processor"
            )
        control = self._control_token.search(tail)
        cut = control.start() if control else len(tail)
        after_ids = self.tokenizer(tail[cut:], add_special_tokens=False)["input_ids"]
        return head[starts[-1] :], tail[:cut], after_ids

    def _find_separator(self) -> int:
        """The id of the separator, if it splits text as a control token does and takes no white space with it."""
        found = self.tokenizer(f"a{_GLUE}{SEPARATOR}{_GLUE}b", add_special_tokens=False)["input_ids"]
        index = {token: i for i, token in self.encode_text.control_tokens.items()}.get(SEPARATOR)
        if index is None or found != [*self.encode_text("a" + _GLUE), index, *self.encode_text(_GLUE + "b")]:
            raise ConfigurationError(
                f"{type(self.tokenizer).__name__} has no control token {SEPARATOR} that leaves the text beside it "
                f"alone, which template {self.template!r} needs; MultiResponseRewardModel.from_backbone adds one"
            )
        return index

    def _render_messages(
        self, group: ResponseGroup, messages: list[dict[str, Any]], *, add_generation_prompt: bool
    ) -> dict[str, Tensor]:
        """Token ids and media tensors of a chat that holds the group's media."""
        if not self.sees_images:
            if group.images or group.videos:
                raise MediaError(
                    f"{group.name}: {len(group.images)} images and {len(group.videos)} videos for a text-only "
                    "backbone; use a vision-language backbone or remove them"
                )
            messages = [
                {**message, "content": "".join(encodable(block["text"]) for block in message["content"])}
                for message in messages
            ]
            return self._apply_chat_template(group, messages, add_generation_prompt=add_generation_prompt)
        images, videos = iter(group.images), iter(group.videos)
        messages = [
            {
                **message,
                "content": [self._load_block(block, images, videos, group.name) for block in message["content"]],
            }
            for message in messages
        ]
        options: dict[str, Any] = {}
        if group.videos:
            metadata = [
                {"total_num_frames": len(video), "fps": _FRAMES_PER_SECOND, "frames_indices": list(range(len(video)))}
                for video in group.videos
            ]
            options = {"do_sample_frames": False, "video_metadata": [metadata]}
        try:
            return self._apply_chat_template(
                group, messages, add_generation_prompt=add_generation_prompt, processor_kwargs=options
            )
        except ValueError as error:
            if not (group.images or group.videos):
                raise
            raise MediaError(
                f"{group.name}: {type(self.processor).__name__} does not take its images or videos ({error}); "
                "resize or remove them"
            ) from error

    def _apply_chat_template(
        self, group: ResponseGroup, messages: list[dict[str, Any]], **options: Any
    ) -> dict[str, Tensor]:
        try:
            rendered = self.processor.apply_chat_template(
                [messages],
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
                sanitize_control_tokens=True,
                **options,
            )
        except TemplateError as error:  # Molmo2's takes no system turn, for instance
            roles = ", ".join(message["role"] for message in messages)
            raise GroupError(
                f"{group.name}: the backbone's chat template refuses the turns ({roles}): {error}; change the prompt"
            ) from error
        return {
            key: value
            for key, value in rendered.items()
            if isinstance(value, torch.Tensor) and key != "attention_mask"
        }

    @staticmethod
    def _load_block(block: dict[str, Any], images: Any, videos: Any, name: str) -> dict[str, Any]:
        if block["type"] == "text":
            return {"type": "text", "text": encodable(block["text"])}
        try:
            if block["type"] == "image":
                return {"type": "image", "image": load_image(next(images))}
            return {"type": "video", "video": [load_image(frame) for frame in next(videos)]}
        except MediaError as error:
            raise MediaError(f"{name}: {error}") from error


def _media_first(message: dict[str, Any]) -> dict[str, Any]:
    """The media of a turn, then its text as one block."""
    media = [block for block in message["content"] if block["type"] != "text"]
    text = "".join(block["text"] for block in message["content"] if block["type"] == "text")
    return {**message, "content": [*media, {"type": "text", "text": text}]}
