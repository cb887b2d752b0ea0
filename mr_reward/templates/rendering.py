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

from __future__ import annotations

import copy
import functools
import hashlib
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from mr_reward.backbones.base import BackboneAdapter
from mr_reward.errors import ConfigurationError, GroupError, MediaError, MRRewardError
from mr_reward.groups import ResponseGroup
from mr_reward.messages.completions import Transcript
from mr_reward.templates.chat import (
    TEMPLATE_ERRORS,
    ChatTemplate,
    chat_template_text,
    encodable,
    is_prefilled,
    template_options,
)
from mr_reward.templates.images import DecodedImages, load_image
from mr_reward.templates.thoughts import THOUGHTS, ThoughtRules, opened_thought
from mr_reward.templates.turns import TurnEncoder

TEMPLATE = "chat"
JOINED_TEMPLATES = ("mr2rm-assistant", "mr2rm-user")
SEPARATOR = "<|resp_sep|>"
# Between responses that a template joins to one text.
GLUE = "\n\n"
# Stands for the responses while a chat template is looked at; the line breaks tell whether it changes white space.
_SLOT = "\n\nRESPONSES\n\n"
# Raise it when rendering changes what a row holds: checkpoints trained before are then refused.
_TEMPLATE_VERSION = 1
_FRAMES_PER_SECOND = 1.0
_PROMPT_OPTIONS = {"tokenize": True, "return_dict": True, "sanitize_control_tokens": True}


def check_template(template: str, layout: str = "causal") -> None:
    """Refuse a template that does not exist or does not go with the layout."""
    if template not in (TEMPLATE, *JOINED_TEMPLATES):
        raise ConfigurationError(
            f"unknown template {template!r}, expected {TEMPLATE!r}, {' or '.join(map(repr, JOINED_TEMPLATES))}"
        )
    if template in JOINED_TEMPLATES and layout != "causal":
        raise ConfigurationError(
            f"template {template!r} joins the responses to one text and has no readout tokens, which layout "
            f"{layout!r} needs; use layout='causal', or template={TEMPLATE!r}"
        )


def template_hash(processor: Any, template: str = TEMPLATE, thoughts: str = THOUGHTS[0]) -> str:
    """Identify everything that turns a group into text: 16 hexadecimal digits."""
    content: list[Any] = [template, _TEMPLATE_VERSION, chat_template_text(processor)]
    if template == TEMPLATE and opened_thought(
        ChatTemplate(processor, sees_images=getattr(processor, "tokenizer", processor) is not processor)
    ):
        content.append("an opened thought is closed")  # answers stood inside of it before
    if thoughts != THOUGHTS[0]:
        content.append(thoughts)
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


@dataclass(frozen=True, slots=True, kw_only=True)
class RenderedGroup:
    """Token ids of one group, not laid out yet."""

    prompt_ids: Tensor  # (P,) int64, media placeholders expanded
    # N lists of token ids, none of them special or added but the marks of a thought that the chat template opens
    response_ids: list[list[int]]
    # Tensors of the prompt's media by name, as the processor makes them; empty for text
    media: dict[str, Tensor] = field(default_factory=dict)
    mm_token_type_ids: Tensor | None = None  # (P,) int64, 0 text, 1 image, 2 video; None for text-only backbones
    # N pairs of token ids that the template puts before and after a response; they are never cut, and the score
    # is read at the last of them. None for templates whose scores are read at readout tokens
    framing: list[tuple[list[int], list[int]]] | None = None
    texts: Sequence[str] = ()  # the N responses, where their ids depend on what stands beside them
    joiner: Joiner | None = None  # encodes them

    def select(self, indices: Sequence[int]) -> RenderedGroup:
        """The same prompt with the responses at `indices`, in that order."""
        if self.joiner is None:
            return replace(self, response_ids=[self.response_ids[i] for i in indices])
        texts = [self.texts[i] for i in indices]
        return replace(self, texts=texts, **self.joiner.join(texts))

    def without_prompt(self) -> RenderedGroup:
        """The responses alone, for a prompt that was read before."""
        return replace(self, prompt_ids=self.prompt_ids[:0], media={}, mm_token_type_ids=None)

    def has_prompt_of(self, other: RenderedGroup) -> bool:
        """Whether prompt and media are the same as those of another group."""
        return (
            torch.equal(self.prompt_ids, other.prompt_ids)
            and self.media.keys() == other.media.keys()
            and all(
                tensor is other.media[name] or torch.equal(tensor, other.media[name])
                for name, tensor in self.media.items()
            )
        )


class Renderer:
    """Turns groups into token ids with a `ProcessorMixin` (vision-language) or a tokenizer (text-only)."""

    def __init__(
        self,
        processor: Any,
        template: str = TEMPLATE,
        *,
        thoughts: str = THOUGHTS[0],
        adapter: BackboneAdapter | None = None,
    ) -> None:
        check_template(template)
        chat_template_text(processor)
        self.template = template
        self.tokenizer = getattr(processor, "tokenizer", processor)
        self.sees_images = self.tokenizer is not processor
        if self.sees_images and adapter is None:
            raise ConfigurationError(
                f"{type(processor).__name__} reads images, whose tensors differ between families; pass the adapter "
                "of the backbone (get_adapter(config), or a model's `adapter`)"
            )
        self.adapter: BackboneAdapter = BackboneAdapter() if adapter is None else adapter
        self.processor = copy.copy(processor)
        if self.sees_images:
            # Before it counts placeholders, it takes control tokens out of the text, and what is left of
            # "<<|endoftext|>|image_pad|>" counts as one. A group's media were matched when it was made.
            self.processor.validate_inputs = functools.partial(_check_media, processor.validate_inputs)
        self.encode_text = TextEncoder(self.tokenizer)
        self.chat = ChatTemplate(self.processor, sees_images=self.sees_images)
        self.thoughts = ThoughtRules(thoughts, self.chat, self.tokenizer)
        self._encode_turns = TurnEncoder(
            self.chat, self.tokenizer, self.encode_text.pattern(), self.thoughts.opener or ""
        )
        if template in JOINED_TEMPLATES:
            self._control_token = self.encode_text.pattern()
            self._separator_id = self._find_separator()
            self._surroundings(self._joined_messages(ResponseGroup(prompt="", responses=[""]))[0])

    def render(self, group: ResponseGroup) -> RenderedGroup:
        """Render one group.

        Raises MediaError for media that cannot be read, or not by this family, GroupError for turns that the chat
        template refuses.
        """
        if self.template in JOINED_TEMPLATES:
            return self._render_joined(group)
        prompt = self._render_messages(group, group.messages, **template_options(group))
        token_types = prompt.pop("mm_token_type_ids", None)
        ids = prompt.pop("input_ids")[0]
        end = len(ids) if is_prefilled(group.messages) else self.thoughts.cut(ids, group.name)
        return RenderedGroup(
            prompt_ids=ids[:end],
            response_ids=self._response_ids(group),
            media=prompt,
            mm_token_type_ids=None if token_types is None else token_types[0, :end].long(),
        )

    def render_all(self, groups: Sequence[ResponseGroup]) -> list[RenderedGroup]:
        """As `render`, in one call of the processor where it can: its own work for a call is that for many prompts."""
        one_by_one = self.thoughts.opened or any(
            group.videos or group.tools or is_prefilled(group.messages) or _has_turns(group) for group in groups
        )
        if len(groups) == 1 or self.template in JOINED_TEMPLATES or one_by_one:
            return [self.render(group) for group in groups]
        # Groups with one prompt, as the same objects, are one chat.
        places: dict[Any, int] = {}
        index = [places.setdefault((repr(group.messages), *map(id, group.images)), len(places)) for group in groups]
        prompts = [groups[index.index(place)] for place in range(len(places))]
        load = DecodedImages()
        try:
            chats = [self._load_messages(group, group.messages, load) for group in prompts]
            found = self.processor.apply_chat_template(chats, **_PROMPT_OPTIONS, add_generation_prompt=True)
        except (MRRewardError, ValueError, *TEMPLATE_ERRORS):
            return [self.render(group) for group in groups]  # the one at fault says so under its name
        media = {name: tensor for name, tensor in found.items() if isinstance(tensor, torch.Tensor)}
        num_images = [len(group.images) for group in prompts]
        own = self.adapter.split_media(media, num_images) if media else [{}] * len(prompts)
        no_types: list[None] = [None] * len(prompts)
        ids = [torch.tensor(ids) for ids in found["input_ids"]]
        types = [None if own is None else torch.tensor(own) for own in found.get("mm_token_type_ids", no_types)]
        responses = iter(
            self.encode_text.encode_all([text for group in groups for text in self.thoughts.judged(group)])
        )
        return [
            RenderedGroup(
                prompt_ids=ids[place],
                response_ids=[next(responses) for _ in group.responses],
                media=dict(own[place]),
                mm_token_type_ids=types[place],
            )
            for place, group in zip(index, groups, strict=True)
        ]

    def _response_ids(self, group: ResponseGroup) -> list[list[int]]:
        judged = self.thoughts.judged(group)
        texts = [one for one in judged if not isinstance(one, Transcript)]
        encoded = iter(self.thoughts.encode(group, texts, self.encode_text.encode_all))
        return [
            self._encode_turns.encode(group, one, i) if isinstance(one, Transcript) else next(encoded)
            for i, one in enumerate(judged)
        ]

    def _render_joined(self, group: ResponseGroup) -> RenderedGroup:
        """The prompt ends at the last control token before the responses; plain text behind it is the joiner's."""
        messages, user_text = self._joined_messages(group)
        before, after, after_ids = self._surroundings(messages)
        prompt = self._render_messages(group, messages)
        token_types = prompt.pop("mm_token_type_ids", None)
        ids = prompt.pop("input_ids")[0]
        end = self.encode_text(before + _SLOT + after) + after_ids
        if ids[-len(end) :].tolist() != end:
            raise ConfigurationError(
                f"{type(self.tokenizer).__name__} tokenizes the end of a rendered chat in another way than its parts; "
                f"template {self.template!r} does not work with it, use {TEMPLATE!r}"
            )
        texts = [encodable(response) for response in self.thoughts.judged(group)]
        joiner = Joiner(
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
        if group.tools or is_prefilled(group.messages) or _has_turns(group):
            raise GroupError(
                f"{group.name}: template {self.template!r} takes no tools, no prompt that ends in an assistant turn "
                f"and no response with tool calls; change that, or train a model with template={TEMPLATE!r}"
            )
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
        return messages, encodable(text) + GLUE

    def _surroundings(self, messages: list[dict[str, Any]]) -> tuple[str, str, list[int]]:
        """What the chat template writes around the slot: text before, text after, ids from a control token on."""
        messages = [self.chat.turn(message) for message in messages]
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
        found = self.tokenizer(f"a{GLUE}{SEPARATOR}{GLUE}b", add_special_tokens=False)["input_ids"]
        index = {token: i for i, token in self.encode_text.control_tokens.items()}.get(SEPARATOR)
        if index is None or found != [*self.encode_text("a" + GLUE), index, *self.encode_text(GLUE + "b")]:
            raise ConfigurationError(
                f"{type(self.tokenizer).__name__} has no control token {SEPARATOR} that leaves the text beside it "
                f"alone, which template {self.template!r} needs; MultiResponseRewardModel.from_backbone adds one"
            )
        return index

    def _load_messages(
        self, group: ResponseGroup, messages: list[dict[str, Any]], load: Callable[[Any], Any] = load_image
    ) -> list[dict[str, Any]]:
        """The chat as the processor takes it, with the group's media in it."""
        if not self.sees_images and (group.images or group.videos):
            raise MediaError(
                f"{group.name}: {len(group.images)} images and {len(group.videos)} videos for a text-only "
                "backbone; use a vision-language backbone or remove them"
            )
        self.chat.check(group)
        turns = [self.chat.turn(message) for message in messages]
        if not self.sees_images:
            return turns
        images, videos = iter(group.images), iter(group.videos)
        return [
            {
                **turn,
                "content": [self._load_block(block, images, videos, group.name, load) for block in turn["content"]],
            }
            for turn in turns
        ]

    def _render_messages(
        self, group: ResponseGroup, messages: list[dict[str, Any]], **options: Any
    ) -> dict[str, Tensor]:
        """Token ids and media tensors of a chat that holds the group's media; `options` of the chat template."""
        messages = self._load_messages(group, messages)
        if self.sees_images:
            options["processor_kwargs"] = {}
        if group.videos:
            metadata = [
                {"total_num_frames": len(video), "fps": _FRAMES_PER_SECOND, "frames_indices": list(range(len(video)))}
                for video in group.videos
            ]
            options["processor_kwargs"] = {"do_sample_frames": False, "video_metadata": [metadata]}
        try:
            rendered = self.processor.apply_chat_template(
                [messages],
                **_PROMPT_OPTIONS,
                return_tensors="pt",
                **options,
            )
        except TEMPLATE_ERRORS as error:  # Molmo2's takes no system turn, for instance
            if isinstance(error, TypeError) and (group.images or group.videos):
                raise  # of an image processor, rather
            roles = ", ".join(message["role"] for message in messages)
            raise GroupError(
                f"{group.name}: the backbone's chat template refuses the turns ({roles}): {error}; change the prompt"
            ) from error
        except ValueError as error:
            if "continue_final_message" in options:
                raise GroupError(f"{group.name}: its last turn cannot be continued: {error}") from error
            if not (group.images or group.videos):
                raise
            raise MediaError(
                f"{group.name}: {type(self.processor).__name__} does not take its images or videos ({error}); "
                "resize or remove them"
            ) from error
        tensors = {
            key: value
            for key, value in rendered.items()
            if isinstance(value, torch.Tensor) and key != "attention_mask"
        }
        self.adapter.check_media(tensors, group.name)
        return tensors

    @staticmethod
    def _load_block(
        block: dict[str, Any], images: Any, videos: Any, name: str, load: Callable[[Any], Any]
    ) -> dict[str, Any]:
        if block["type"] == "text":
            return block
        try:
            if block["type"] == "image":
                return {"type": "image", "image": load(next(images))}
            return {"type": "video", "video": [load(frame) for frame in next(videos)]}
        except MediaError as error:
            raise MediaError(f"{name}: {error}") from error


def _has_turns(group: ResponseGroup) -> bool:
    return any(isinstance(response, Transcript) for response in group.responses)


def _check_media(
    validate: Callable[..., None], images: Any = None, text: Any = None, videos: Any = None, **options: Any
) -> None:
    """The processor's own look at its media, without the text."""
    if images is not None or videos is not None:
        validate(images=images, videos=videos, **options)


def _media_first(message: dict[str, Any]) -> dict[str, Any]:
    """The media of a turn, then its text as one block."""
    media = [block for block in message["content"] if block["type"] != "text"]
    text = "".join(block["text"] for block in message["content"] if block["type"] == "text")
    return {**message, "content": [*media, {"type": "text", "text": text}]}


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
        """Encode texts, in one call of the tokenizer and equal ones once."""
        pieces = {text: encodable(text) for text in texts}
        encoded = {
            text: self._without_control_tokens(piece) if self._controls(ids) else ids
            for (text, piece), ids in zip(pieces.items(), self._encode_pieces([*pieces.values()]), strict=True)
        }
        return [encoded[text] for text in texts]

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
        longest_first = sorted(self.control_tokens.values(), key=len, reverse=True)
        return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")  # nothing, for a tokenizer without any


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
