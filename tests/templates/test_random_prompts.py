"""Random prompts with everything at once, against the stock chat template; and what scores of them promise.

Tools, calls and results, prefilled last turns, thoughts, media in odd places, tags in plain text. A prompt is shown as
the policy sees it, or refused because the template leaves a part of it out.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from jinja2 import TemplateError
from tiny_models import LAYOUTS, ROUNDING, family, random_image, random_video, reward_model, score
from trl.data_utils import apply_chat_template
from trl_templates import TEMPLATES, TOOL, call, processor, tokenizer

from mr_reward import GroupScorer, MultiResponseRewardModel, ResponseGroup
from mr_reward.errors import GroupError
from mr_reward.templates.rendering import Renderer

NAMES = sorted(path.stem for path in TEMPLATES.glob("*.jinja") if not path.stem.endswith("_training"))
Turns = list[dict[str, Any]]


class Prompt:
    """Turns of random shapes whose texts are all different; the media stand anywhere."""

    def __init__(self, rng: random.Random, media: Sequence[str] = ()) -> None:
        self.rng, self.media_kinds = rng, media
        self.count = 0
        self.media: dict[str, list[Any]] = {"image": [], "video": []}
        self.turns: Turns = []
        self.tools: list[Any] = [TOOL] if rng.random() < 0.4 else []
        if rng.random() < 0.5:
            self.turns.append({"role": "system", "content": self.content(media=0.1)})
        for _ in range(rng.randint(1, 3)):
            self.turns.append({"role": "user", "content": self.content(media=0.5)})
            if self.tools and rng.random() < 0.6:
                self.turns += [
                    call(rng.randint(100, 999), rng.randint(100, 999), content=rng.choice([None, "", self.text()])),
                    {"role": "tool", "name": "add", "content": self.content(media=0.1)},
                ]
            self.turns.append({"role": "assistant", "content": self.content(media=0.05)})
        if rng.random() < 0.7:
            self.turns.pop()

    def text(self) -> str:
        self.count += 1
        return f"said {self.count} {self.rng.choice(['<image>', 'x', '<video> a', '2 < 3'])}."

    @property
    def parts(self) -> list[str]:
        """What has to be seen: texts, arguments of calls, tools."""
        found = ["Adds."] * bool(self.tools)
        for turn in self.turns:
            content = turn["content"] or []
            blocks = [{"type": "text", "text": content}] if isinstance(content, str) else content
            found += [block["text"] for block in blocks if block["type"] == "text"]
            found += [str(n) for one in turn.get("tool_calls", ()) for n in one["function"]["arguments"].values()]
        return found

    def content(self, media: float) -> Any:
        rng = self.rng
        if rng.random() < 0.4:
            return self.text()
        blocks: Turns = [{"type": "text", "text": self.text()} for _ in range(rng.randint(1, 3))]
        for kind in self.media_kinds:
            while rng.random() < media and len(self.media[kind]) < 3:
                medium = random_image(rng) if kind == "image" else random_video(rng, 4)
                place = rng.randint(0, len(blocks))
                blocks.insert(place, {"type": kind, kind: medium})
        return blocks

    @property
    def ordered_media(self) -> dict[str, list[Any]]:
        blocks = [b for turn in self.turns if isinstance(turn["content"], list) for b in turn["content"]]
        return {kind: [b[kind] for b in blocks if b["type"] == kind] for kind in ("image", "video")}

    def group(self, responses: Sequence[str] = ("4", "5")) -> ResponseGroup:
        """Media inside of the blocks, or beside them."""
        turns, media = self.turns, self.ordered_media
        if self.rng.random() < 0.5 or not any(media.values()):
            return ResponseGroup(prompt=turns, responses=responses, tools=self.tools)
        bare = [
            {**turn, "content": [{k: v for k, v in b.items() if k in ("type", "text")} for b in turn["content"]]}
            if isinstance(turn["content"], list)
            else turn
            for turn in turns
        ]
        return ResponseGroup(
            prompt=bare, responses=responses, tools=self.tools, images=media["image"], videos=media["video"]
        )

    def stock_turns(self, *, blocks: bool) -> Turns:
        """In the one form of content that the template reads."""
        turns = []
        for turn in self.turns:
            content = turn["content"]
            if content is None:  # beside tool calls
                turns.append(
                    {**{k: v for k, v in turn.items() if k != "content"}, **({"content": []} if blocks else {})}
                )
                continue
            as_blocks = [{"type": "text", "text": content}] if isinstance(content, str) else content
            turns.append({**turn, "content": as_blocks if blocks else "".join(b["text"] for b in as_blocks)})
        return turns

    @property
    def prefilled(self) -> bool:
        return self.turns[-1]["role"] == "assistant"


@pytest.mark.parametrize("name", NAMES)
def test_a_random_prompt_is_shown_as_trl_shows_it(name: str) -> None:
    made = tokenizer(name)
    renderer = Renderer(made)
    shown = 0
    for seed in range(15):
        prompt = Prompt(random.Random(f"{name}{seed}"))
        turns = prompt.stock_turns(blocks=renderer.chat.takes_blocks)
        try:
            expected = apply_chat_template({"prompt": turns}, made, tools=prompt.tools or None)["prompt"]
        except (TemplateError, TypeError, ValueError):
            with pytest.raises(GroupError):
                renderer.render(prompt.group())
            continue
        missing = [part for part in prompt.parts if part not in expected]
        if missing:
            with pytest.raises(GroupError, match="leaves out"):
                renderer.render(prompt.group())
            continue
        shown += 1
        answers = ["4", "so</think>\n\n5", "<think>\nHm\n</think>\n\n6", ""]
        rendered = renderer.render(prompt.group(answers))
        opens = expected.endswith("<think>\n") and not prompt.prefilled
        for answer, ids in zip(answers, rendered.response_ids, strict=True):
            whole = made.decode(rendered.prompt_ids.tolist() + ids)
            if not opens:
                assert whole == expected + answer
            elif "</think>" in answer:
                assert whole == expected + answer.removeprefix("<think>\n")
            else:
                closed = made.apply_chat_template(
                    [*turns, {"role": "assistant", "content": answer}], tokenize=False, tools=prompt.tools or None
                )
                assert not answer or closed.startswith(whole)
        if not opens:
            assert rendered.prompt_ids.tolist() == made(expected, add_special_tokens=False)["input_ids"]
    assert shown >= 2


@pytest.mark.parametrize(
    ("name", "template"),
    [("qwen3_vl", "qwen3_vl"), ("qwen3_vl", "qwen2_5_vl"), ("qwen3_vl", None), ("qwen2_5_vl", None)],
)
def test_media_in_odd_places_are_shown_or_refused(name: str, template: str | None) -> None:
    made = family(name).processor if template is None else processor(template)
    renderer = Renderer(made, adapter=family(name).adapter)
    counts = {"shown": 0, "refused": 0}
    for seed in range(25):
        prompt = Prompt(random.Random(f"{name}{template}{seed}"), ("image", "video"))
        turns = prompt.stock_turns(blocks=True)
        options: dict[str, Any] = {"continue_final_message" if prompt.prefilled else "add_generation_prompt": True}
        if prompt.tools:
            options["tools"] = prompt.tools
        if prompt.prefilled and turns[-1]["content"][-1]["type"] != "text":
            with pytest.raises(GroupError, match="no text at its end"):
                renderer.render(prompt.group())
            continue
        (text,) = made.apply_chat_template([turns], tokenize=False, **options)
        media = prompt.ordered_media
        lost = [part for part in prompt.parts if part not in text]
        lost += [kind for kind in media if text.count(f"<|{kind}_pad|>") != len(media[kind])]
        if lost:
            counts["refused"] += 1
            with pytest.raises(GroupError, match="leaves out"):
                renderer.render(prompt.group())
            continue
        counts["shown"] += 1
        if media["video"]:
            metadata = [
                {"total_num_frames": len(video), "fps": 1.0, "frames_indices": [*range(len(video))]}
                for video in media["video"]
            ]
            options["processor_kwargs"] = {"do_sample_frames": False, "video_metadata": [metadata]}
        stock = made.apply_chat_template([turns], tokenize=True, return_dict=True, return_tensors="pt", **options)
        one = prompt.group()
        for rendered in (
            renderer.render(one),
            renderer.render_all([ResponseGroup(prompt="a", responses=["b"]), one])[1],
        ):
            assert rendered.prompt_ids.tolist() == stock["input_ids"][0].tolist()
            assert rendered.mm_token_type_ids.tolist() == stock["mm_token_type_ids"][0].tolist()
            for key, value in rendered.media.items():
                assert torch.equal(value, stock[key])
    assert min(counts.values()) >= 3, counts


def random_groups(renderer: Renderer, seed: int, count: int) -> list[ResponseGroup]:
    """Prompts that the template shows, with thoughts and equal texts among the responses."""
    rng = random.Random(seed)
    found: list[ResponseGroup] = []
    while len(found) < count:
        responses = [
            rng.choice(["4", "", "<think>a</think>5", "b</think>6", "<image>"]) for _ in range(rng.randint(2, 5))
        ]
        try:
            group = Prompt(rng, ("image", "video")).group(responses)
            renderer.render(group)
        except GroupError:
            continue
        found.append(group)
    return found


@pytest.mark.parametrize("thoughts", ["included", "stripped"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_scores_of_random_prompts_keep_their_promises(layout: str, thoughts: str) -> None:
    """Padding side, company in the batch, order, equal responses, N = 1."""
    model = MultiResponseRewardModel.from_backbone(
        reward_model("qwen3_vl").backbone, layout=layout, processor=processor(), thoughts=thoughts
    )
    renderer = Renderer(model.processor, thoughts=thoughts, adapter=model.adapter)
    groups = random_groups(renderer, 5, 6)
    alone = [score(model, [group])[0] for group in groups]
    for side in ("left", "right"):
        for found, one in zip(score(model, groups, side), alone, strict=True):
            torch.testing.assert_close(found, one, rtol=0, atol=ROUNDING)
    scorer = GroupScorer(model)  # reads equal responses once
    together = scorer.score(groups)
    for group, found in zip(groups, together, strict=True):
        assert found == pytest.approx(scorer.score([group])[0], abs=ROUNDING)
        ids = renderer.render(group).response_ids
        assert [found[ids.index(one)] for one in ids] == found or layout == "causal", "equal responses, equal bits"
    for group, found in zip(groups, alone, strict=True):
        order = random.Random(0).sample(range(group.num_responses), group.num_responses)
        if layout != "causal":
            turned = score(model, [group.select(order)])[0]
            torch.testing.assert_close(turned, found[order], rtol=0, atol=ROUNDING)
        if layout == "isolated":
            single = torch.cat([score(model, [group.select([i])])[0] for i in range(group.num_responses)])
            torch.testing.assert_close(single, found, rtol=0, atol=ROUNDING)
