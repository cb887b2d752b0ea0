"""Many prompts in one call of the processor give what each gives alone."""

from __future__ import annotations

import copy
import dataclasses
import random
from dataclasses import fields
from typing import Any

import pytest
import torch
from PIL import Image
from tiny_models import FAMILIES, family, random_group, random_image, random_text
from tokenizers import AddedToken

from mr_reward import ResponseGroup
from mr_reward.errors import MediaError
from mr_reward.templates import images
from mr_reward.templates.rendering import RenderedGroup, TextEncoder


def assert_same(found: RenderedGroup, expected: RenderedGroup) -> None:
    for field in fields(RenderedGroup):
        one, other = getattr(found, field.name), getattr(expected, field.name)
        if isinstance(one, torch.Tensor):
            assert torch.equal(one, other) and one.dtype == other.dtype, field.name
        elif field.name == "media":
            assert one.keys() == other.keys()
            for name in one:
                assert torch.equal(one[name], other[name]) and one[name].dtype == other[name].dtype, name
        else:
            assert one == other, field.name


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("name", FAMILIES)
def test_rendering_together_equals_rendering_alone(name: str, seed: int) -> None:
    rng = random.Random(seed)
    sees = family(name).sees_images
    groups = [random_group(rng, rng.randint(1, 4), images=rng.choice([0, 1, 1, 2, 3]) * sees) for _ in range(7)]
    if seed == 0:
        groups = [group for group in groups if not group.images] or groups[:2]
    if seed == 1 and sees:
        groups[3] = random_group(rng, 2, videos=1)  # a video among them: one by one
    renderer = family(name).renderer()
    found = renderer.render_all(groups)
    assert len(found) == len(groups)
    for one, group in zip(found, groups, strict=True):
        assert_same(one, renderer.render(group))


def test_the_group_at_fault_is_named() -> None:
    rng = random.Random(0)
    groups = [random_group(rng, 2, images=1) for _ in range(3)]
    broken = ResponseGroup(prompt=groups[1].messages, responses=["a"], images=[Image.new("RGB", (4000, 2))], id="thin")
    with pytest.raises(MediaError, match="thin"):
        family("qwen3_vl").renderer().render_all([groups[0], broken, groups[2]])


@pytest.mark.parametrize("name", ["qwen3_vl", "molmo2"])
def test_encoding_together_equals_encoding_alone(name: str) -> None:
    """Control tokens as text in some of the texts do not change the others."""
    encode = TextEncoder(family(name).tokenizer)
    rng = random.Random(1)
    controls = list(encode.control_tokens.values())
    texts = ["", *(random_text(rng, 30) for _ in range(20)), *controls, "a" + controls[0] + "b", "x" + chr(0xD800)]
    rng.shuffle(texts)
    assert encode.encode_all(texts) == [encode(text) for text in texts]
    assert encode.encode_all([]) == []
    assert not any(index in encode.control_tokens for ids in encode.encode_all(texts) for index in ids)


@pytest.mark.parametrize("change", ["images", "order", "system", "text", "prefill", "role"])
def test_prompts_that_differ_in_one_thing_are_rendered_apart(change: str) -> None:
    """In one call, where equal ones are rendered once."""
    renderer = family("qwen3_vl").renderer()
    pictures = [random_image(random.Random(seed), max_tiles=1) for seed in range(3)]
    prompt: list[dict[str, Any]] = [
        {"role": "user", "content": [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "Which?"}]}
    ]
    first = ResponseGroup(prompt=prompt, responses=["a", "b"], images=pictures[:2])
    changed: dict[str, Any] = {
        "images": {"images": [pictures[0], pictures[2]]},
        "order": {"images": pictures[1::-1]},
        "system": {"prompt": [{"role": "system", "content": "Be kind."}, *prompt]},
        "text": {"prompt": [{"role": "user", "content": [*prompt[0]["content"], {"type": "text", "text": " "}]}]},
        "prefill": {"prompt": [*prompt, {"role": "assistant", "content": "The"}]},
        "role": {"prompt": [*prompt, {"role": "user", "content": "The"}]},
    }
    second = dataclasses.replace(first, **{"prompt": first.messages, **changed[change]})
    groups = [first, second, first]
    expected = [renderer.render(group) for group in groups]
    assert not expected[0].has_prompt_of(expected[1]) and expected[0].has_prompt_of(expected[2])
    for found, one in zip(renderer.render_all(groups), expected, strict=True):
        assert_same(found, one)


def test_of_control_tokens_that_begin_alike_the_longest_is_found() -> None:
    tokenizer = copy.deepcopy(family("llama").tokenizer)
    tokens = ["<x>", "<x>y", "<x>yz", "a<x>"]
    tokenizer.add_tokens([AddedToken(token, special=i % 2 == 0, normalized=False) for i, token in enumerate(tokens)])
    encode = TextEncoder(tokenizer)
    assert set(tokens) <= {*encode.control_tokens.values()}
    assert encode.pattern().findall("<x>yz <x>y! <x> ba<x>y <x") == ["<x>yz", "<x>y", "<x>", "a<x>"]
    for text in ("<x>yz", "a<x>y", "<x<x>>yz", "aa<x>yz<x>"):
        ids = encode(text)
        assert not {*ids} & {*encode.control_tokens} and tokenizer.decode(ids) == text


def test_a_prompt_of_several_groups_is_rendered_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """One image object in several groups is decoded once, and one prompt is one chat for the processor."""
    renderer = family("qwen3_vl").renderer()
    image = random_image(random.Random(0))
    prompt = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Which?"}]}]
    other = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Why?"}]}]
    groups = [
        ResponseGroup(prompt=messages, responses=[f"{i}", "b"], images=[image])
        for i, messages in enumerate([prompt, other, prompt, prompt])
    ]
    expected = [renderer.render(group) for group in groups]
    decoded: list[Any] = []
    chats: list[int] = []
    load = images.load_image
    monkeypatch.setattr(images, "load_image", lambda source: decoded.append(source) or load(source))
    template = renderer.processor.apply_chat_template

    def counted(messages: Any, **options: Any) -> Any:
        chats.append(len(messages))
        return template(messages, **options)

    monkeypatch.setattr(renderer.processor, "apply_chat_template", counted)
    found = renderer.render_all(groups)
    assert len(decoded) == 1 and chats == [2]
    for one, two in zip(found, expected, strict=True):
        assert one.has_prompt_of(two) and one.response_ids == two.response_ids
