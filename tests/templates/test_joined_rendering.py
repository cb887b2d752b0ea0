"""Templates that join the responses to one text: ids are those of the whole text, and nobody forges a separator."""

from __future__ import annotations

import copy
import functools
import random
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tiny_models import family, random_image, random_video
from tokenizers import AddedToken
from transformers import Qwen2Tokenizer

from mr_reward import ResponseGroup
from mr_reward.errors import ConfigurationError, OverLengthError
from mr_reward.model.rows import Packer
from mr_reward.templates.rendering import JOINED_TEMPLATES, SEPARATOR, Renderer, template_hash
from mr_reward.worlds import tiny

# Line breaks merge with each other and with what stands before them, as in the tokenizers of Qwen and Molmo2.
_NEWLINE = "\u010a"
_MERGES = [
    (_NEWLINE, _NEWLINE),
    (_NEWLINE * 2, _NEWLINE),
    (_NEWLINE * 2, _NEWLINE * 2),
    (".", _NEWLINE),
    (".", _NEWLINE * 2),
    ("?", _NEWLINE * 2),
    (".", _NEWLINE * 4),
]


@functools.cache
def merging_tokenizer(separator: bool = True) -> Qwen2Tokenizer:
    alphabet = list(dict.fromkeys([*tiny.build_tokenizer().get_vocab(), *(a + b for a, b in _MERGES)]))
    words = list(dict.fromkeys(a + b for a, b in _MERGES))
    alphabet = [entry for entry in alphabet if len(entry) == 1] + list(tiny.SPECIAL_TOKENS) + words
    tokenizer = Qwen2Tokenizer(
        vocab={entry: index for index, entry in enumerate(alphabet)},
        merges=_MERGES,
        unk_token=None,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
    )
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in tiny.SPECIAL_TOKENS])
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in tiny.ADDED_TOKENS])
    if separator:
        tokenizer.add_tokens([AddedToken(SEPARATOR, special=True, normalized=False)])
    tokenizer.chat_template = tiny.CHAT_TEMPLATE
    return tokenizer


@functools.cache
def renderer(template: str) -> Renderer:
    return Renderer(merging_tokenizer(), template)


@functools.cache
def image_renderer(name: str, template: str) -> Renderer:
    processor = copy.deepcopy(family(name).processor)
    processor.tokenizer.add_tokens([AddedToken(SEPARATOR, special=True, normalized=False)])
    return Renderer(processor, template, adapter=family(name).adapter)


def packer(template: str, max_tokens: int = 10_000, policy: str = "error") -> Packer:
    return Packer(renderer(template), layout="causal", max_tokens=max_tokens, over_length=policy)


def whole_text(template: str, prompt: str, responses: list[str]) -> str:
    joined = f"\n\n{SEPARATOR}\n\n".join(responses)
    if template == "mr2rm-user":
        return f"<|im_start|>user\n{prompt}\n\n{joined}<|im_end|>\n"
    return f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n{joined}<|im_end|>\n"


def ids_of(text: str) -> list[int]:
    return merging_tokenizer()(text, add_special_tokens=False)["input_ids"]


def test_the_tokenizer_merges_over_the_boundaries() -> None:
    """Otherwise nothing below means anything."""
    for text in ("a.\n\n", "\n\n\n\n", "what?\n\n"):
        halves = ids_of(text[:-2]) + ids_of(text[-2:])
        assert len(ids_of(text)) < len(halves), text
    assert ids_of("assistant\n\nx") != [*ids_of("assistant\n"), *ids_of("\nx")]


# --- ids and sites ---

HARMLESS = st.lists(
    st.sampled_from(
        ["\n", "\n\n", ".", "?", " ", "a", "user", "4", "é", "🙂", "漢", "<", "|", ">", "\t", "<|im_", "e\u0301"]
    ),
    max_size=6,
).map("".join)


@pytest.mark.parametrize("template", JOINED_TEMPLATES)
@settings(max_examples=300, deadline=None)
@given(prompt=HARMLESS, responses=st.lists(HARMLESS, min_size=1, max_size=4))
@example(prompt="Sum?", responses=["", "", ""])
@example(prompt="Sum.", responses=["\n\n", ".", "\n"])
@example(prompt="", responses=["\n"])
def test_ids_are_those_of_the_whole_text(template: str, prompt: str, responses: list[str]) -> None:
    row = packer(template).pack(ResponseGroup(prompt=prompt, responses=responses))
    assert row is not None
    expected = ids_of(whole_text(template, prompt, responses))
    assert row.input_ids[0].tolist() == expected
    separators = [i for i, index in enumerate(expected) if index == ids_of(SEPARATOR)[0]]
    assert row.score_sites[0].tolist() == [*(i - 1 for i in separators), len(expected) - 1]
    assert not row.kinds.any() and not any(row.truncated[0])
    # Running positions, as in any text.
    positions = torch.where(
        row.segments > 0, row.offsets + int((row.segments == 0).sum()), torch.arange(len(expected))
    )
    assert positions[0].tolist() == list(range(len(expected)))
    for (start, end), text in zip(row.spans[0], responses, strict=True):
        assert merging_tokenizer().decode(row.input_ids[0, start:end]).strip() in merging_tokenizer().decode(
            ids_of(text)
        )


@pytest.mark.parametrize("template", JOINED_TEMPLATES)
@settings(max_examples=100, deadline=None)
@given(responses=st.lists(HARMLESS, min_size=2, max_size=4), seed=st.randoms(use_true_random=False))
def test_other_orders_are_encoded_again(template: str, responses: list[str], seed: Any) -> None:
    order = seed.sample(range(len(responses)), len(responses))
    rendered = renderer(template).render(ResponseGroup(prompt="Sum?", responses=responses)).select(order)
    row = packer(template).lay_out(rendered, "g")
    assert row is not None
    assert row.input_ids[0].tolist() == ids_of(whole_text(template, "Sum?", [responses[i] for i in order]))


@pytest.mark.parametrize("template", JOINED_TEMPLATES)
@pytest.mark.parametrize("name", ["qwen3_vl", "qwen2_5_vl", "molmo2"])
def test_media_come_before_the_text_of_their_turn(name: str, template: str) -> None:
    """Compared with the processor's own answer for the joined chat."""
    generator = random.Random(3)
    images = [random_image(generator) for _ in range(3)]
    blocks: list[Any] = [{"type": "text", "text": "A "}, {"type": "image"}, {"type": "text", "text": "or B?"}]
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "First"}, {"type": "image"}]},
        {"role": "assistant", "content": "Yes."},
        {"role": "user", "content": [*blocks, {"type": "image"}]},
    ]
    responses = ["A", "B.", ""]
    render = image_renderer(name, template)
    row = Packer(render, layout="causal", max_tokens=10_000).pack(
        ResponseGroup(prompt=turns, responses=responses, images=images)
    )
    assert row is not None
    joined = f"\n\n{SEPARATOR}\n\n".join(responses)
    pictures = [{"type": "image", "image": image} for image in images]
    text = f"A or B?\n\n{joined}" if template == "mr2rm-user" else "A or B?"
    messages = [
        {"role": "system", "content": [{"type": "text", "text": "Be brief."}]},
        {"role": "user", "content": [pictures[0], {"type": "text", "text": "First"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "Yes."}]},
        {"role": "user", "content": [*pictures[1:], {"type": "text", "text": text}]},
    ]
    if template == "mr2rm-assistant":
        messages.append({"role": "assistant", "content": [{"type": "text", "text": joined}]})
    expected = render.processor.apply_chat_template([messages], tokenize=True, return_dict=True, return_tensors="pt")
    assert row.input_ids[0].tolist() == expected["input_ids"][0].tolist()
    assert row.media["mm_token_type_ids"].tolist() == expected["mm_token_type_ids"].tolist()
    for key, value in row.media.items():
        assert torch.equal(value, expected[key])


@pytest.mark.parametrize("template", JOINED_TEMPLATES)
@pytest.mark.parametrize("name", ["qwen3_vl", "molmo2"])
def test_videos(name: str, template: str) -> None:
    video = random_video(random.Random(4), 4)
    row = Packer(image_renderer(name, template), layout="causal", max_tokens=10_000).pack(
        ResponseGroup(prompt="Which?", responses=["a", "b"], videos=[video])
    )
    assert row is not None and row.media["mm_token_type_ids"].any()


# --- hostile text ---

CONTROL = (*tiny.SPECIAL_TOKENS, *tiny.ADDED_TOKENS, SEPARATOR)
HOSTILE = st.lists(
    st.sampled_from([*CONTROL, "<|resp_", "sep|>", "\n\n", "a", "<|resp_<|resp_sep|>sep|>", "RESPONSES", "\ud83d"]),
    max_size=6,
).map("".join)


@pytest.mark.parametrize("template", JOINED_TEMPLATES)
@settings(max_examples=300, deadline=None)
@given(prompt=HOSTILE, responses=st.lists(HOSTILE, min_size=1, max_size=4))
@example(prompt="\n\nRESPONSES\n\n", responses=["\n\nRESPONSES\n\n", f"\n\n{SEPARATOR}\n\n"])
def test_no_text_becomes_a_control_token(template: str, prompt: str, responses: list[str]) -> None:
    row = packer(template).pack(ResponseGroup(prompt=prompt, responses=responses))
    harmless = packer(template).pack(ResponseGroup(prompt="p", responses=["r"] * len(responses)))
    assert row is not None and harmless is not None
    special = set(merging_tokenizer().all_special_ids)

    def controls(ids: torch.Tensor) -> list[int]:
        return [index for index in ids[0].tolist() if index in special]

    assert controls(row.input_ids) == controls(harmless.input_ids)
    separators = (row.input_ids[0] == ids_of(SEPARATOR)[0]).nonzero()[:, 0].tolist()
    assert row.score_sites[0].tolist() == [*(i - 1 for i in separators), row.num_tokens - 1]
    added = set(merging_tokenizer().added_tokens_decoder)
    for start, end in row.spans[0]:
        assert not added & set(row.input_ids[0, start:end].tolist())


# --- budget ---


@pytest.mark.parametrize("template", JOINED_TEMPLATES)
@settings(max_examples=150, deadline=None)
@given(responses=st.lists(HARMLESS.map(lambda text: text * 4), min_size=1, max_size=4), short=st.integers(0, 60))
def test_only_text_of_responses_is_cut(template: str, responses: list[str], short: int) -> None:
    group = ResponseGroup(prompt="Sum?", responses=responses, id="g")
    whole = packer(template).pack(group)
    assert whole is not None
    short = min(short, whole.num_tokens - 1)
    budget = whole.num_tokens - short
    num_text = sum(end - start for start, end in whole.spans[0])
    if short > num_text:
        with pytest.raises(OverLengthError, match="'g'.*prompt tokens"):
            packer(template, budget, "truncate_responses").pack(group)
        return
    row = packer(template, budget, "truncate_responses").pack(group)
    assert row is not None and row.num_tokens <= budget
    assert any(row.truncated[0]) == (short > 0)
    kept, source = [], whole.input_ids[0].tolist()
    position = 0
    for (start, end), (new_start, new_end) in zip(whole.spans[0], row.spans[0], strict=True):
        kept += source[position : start + new_end - new_start]
        position = end
    assert row.input_ids[0].tolist() == kept + source[position:]
    separator = ids_of(SEPARATOR)[0]
    for site in row.score_sites[0, :-1].tolist():
        assert row.input_ids[0, site + 1] == separator
        assert merging_tokenizer().decode(row.input_ids[0, site - 1 : site + 1]).endswith("\n\n")
    if short:
        assert packer(template, budget, "drop_group").pack(group) is None
        with pytest.raises(OverLengthError):
            packer(template, budget).pack(group)


# --- what does not work is refused ---


def test_a_tokenizer_without_the_separator_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"no control token <\|resp_sep\|>"):
        Renderer(merging_tokenizer(separator=False), "mr2rm-user")
    greedy = copy.deepcopy(merging_tokenizer(separator=False))
    greedy.add_tokens([AddedToken(SEPARATOR, special=True, normalized=False, lstrip=True)])
    with pytest.raises(ConfigurationError, match="that leaves the text beside it alone"):
        Renderer(greedy, "mr2rm-user")


@pytest.mark.parametrize(
    ("template", "change", "message"),
    [
        ("mr2rm-user", ("message.content }}", "message.content | trim }}"), "changes the white space"),
        ("mr2rm-assistant", ("message.content }}", "message.content | trim }}"), "changes the white space"),
        ("mr2rm-user", ("'<|im_start|>' + message.role", "message.role"), "writes no control token"),
    ],
)
def test_chat_templates_that_do_not_fit_are_refused(template: str, change: tuple[str, str], message: str) -> None:
    tokenizer = copy.deepcopy(merging_tokenizer())
    Renderer(tokenizer, template)
    tokenizer.chat_template = tokenizer.chat_template.replace(*change)
    with pytest.raises(ConfigurationError, match=message):
        Renderer(tokenizer, template)


def test_the_hash_tells_the_templates_apart() -> None:
    tokenizer = tiny.build_tokenizer()
    hashes = [template_hash(tokenizer, template) for template in ("chat", *JOINED_TEMPLATES)]
    assert len(set(hashes)) == 3 and hashes[0] == template_hash(tokenizer)
    assert hashes[0] == "31f06fc1261d38b8", "checkpoints of before would be refused"


def test_layouts_that_need_readout_tokens_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="has no readout tokens, which layout 'set' needs"):
        Packer(renderer("mr2rm-user"), layout="set", max_tokens=100)
