"""Prompts with tools, open turns and odd content: what is judged is what the policy's own template shows."""

from __future__ import annotations

import copy
import json
import random
from pathlib import Path
from typing import Any

import pytest
from tiny_models import family, random_image, reward_model
from trl.data_utils import apply_chat_template, prepare_multimodal_messages
from trl_templates import TEMPLATES, TOOL, call, processor, template, tokenizer

from mr_reward import GroupScorer, MultiResponseReward, MultiResponseRewardModel, ResponseGroup
from mr_reward.data import load_preferences, save_preferences
from mr_reward.errors import ConfigurationError, GroupError, MediaError
from mr_reward.grpo.groups import read_rollouts
from mr_reward.integrations.verl import _rollout
from mr_reward.scorers.wire import WireGroup, dump, from_wire, to_wire
from mr_reward.templates.rendering import Renderer, template_hash
from mr_reward.templates.thoughts import without_thoughts
from mr_reward.worlds import tiny

WITH_TOOLS = ("qwen2_5", "qwen3", "qwen3_instruct_2507", "glm4moe", "llama3_1", "llama3_2", "qwen3_vl", "gptoss")


def tool_prompt(seed: int, content: Any = None) -> list[dict[str, Any]]:
    rng = random.Random(seed)
    a, b = rng.randint(0, 99), rng.randint(0, 99)
    turns = [
        {"role": "user", "content": f"{a} + {b}?"},
        call(a, b, content=content),
        {"role": "tool", "name": "add", "content": str(a + b)},
    ]
    if rng.random() < 0.5:
        turns.insert(0, {"role": "system", "content": "Be brief."})
    return turns


def group(prompt: Any, responses: Any = ("4", "5"), **options: Any) -> ResponseGroup:
    return ResponseGroup(prompt=prompt, responses=responses, id="g", **options)


def text_of(renderer: Renderer, one: ResponseGroup) -> str:
    return renderer.tokenizer.decode(renderer.render(one).prompt_ids.tolist())


# --- tools ---


@pytest.mark.parametrize("tools", [(), (TOOL,)], ids=["", "schemas"])
@pytest.mark.parametrize("content", [None, "", "I add."])
@pytest.mark.parametrize("name", WITH_TOOLS)
def test_tool_calls_and_results_are_shown_as_trl_shows_them(name: str, content: Any, tools: Any) -> None:
    made = tokenizer(name)
    renderer = Renderer(made)
    for seed in range(3):
        prompt = tool_prompt(seed, content)
        if content and name.startswith("llama"):  # these leave out what is said beside a call
            with pytest.raises(GroupError, match=r"leaves out the text of turn \d \('assistant'\)"):
                renderer.render(group(prompt, tools=tools))
            continue
        expected = apply_chat_template({"prompt": prompt}, made, tools=list(tools))["prompt"]
        rendered = renderer.render(group(prompt, tools=tools))
        assert rendered.prompt_ids.tolist() == made(expected, add_special_tokens=False)["input_ids"]
        assert "add" in expected


@pytest.mark.parametrize("content", [None, "", "I add."])
@pytest.mark.parametrize("images", [0, 1])
def test_a_vision_language_model_sees_them_too(content: Any, images: int) -> None:
    made = processor()
    media = [random_image(random.Random(0)) for _ in range(images)]
    prompt = prepare_multimodal_messages(tool_prompt(1, content), images=media)
    expected = made.apply_chat_template(
        [prompt], tools=[TOOL], tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True
    )
    renderer = Renderer(made, adapter=family("qwen3_vl").adapter)
    for one in (group(prompt, tools=[TOOL]), group(tool_prompt(1, content), images=media, tools=[TOOL])):
        assert renderer.render(one).prompt_ids.tolist() == expected["input_ids"][0].tolist()
        assert renderer.render_all([one, group("a")])[0].prompt_ids.tolist() == expected["input_ids"][0].tolist()


@pytest.mark.parametrize("name", ["llama3", "phi3", "cohere2", "qwen2_5_vl", "deepseek_r1_distill", "smolvlm"])
def test_a_template_that_drops_calls_or_results_is_refused(name: str) -> None:
    renderer = Renderer(tokenizer(name))
    with pytest.raises(GroupError, match=r"group 'g': the backbone's chat template (leaves out|refuses)"):
        renderer.render(group(tool_prompt(0, content="I add.")))
    with pytest.raises(GroupError, match=r"leaves out tool 0|refuses"):
        renderer.render(group("2 + 2?", tools=[TOOL]))
    renderer.render(group("2 + 2?"))


def test_different_calls_get_different_scores() -> None:
    """The instance of the issue: add(2, 2) and add(9, 9)."""
    model = reward_model("llama", fresh=True)
    model.processor = copy.deepcopy(model.processor)  # it is that of all tests
    model.processor.chat_template = template("qwen3")
    scorer = GroupScorer(model)
    base = [{"role": "user", "content": "Add."}]
    first, second = (scorer.score([group([*base, call(n, n), {"role": "tool", "content": "?"}])])[0] for n in (2, 9))
    assert first != second


def test_prompts_with_tools_travel_and_are_told_apart(tmp_path: Path) -> None:
    one = group([*tool_prompt(0), {"role": "assistant", "content": "So"}], tools=[TOOL], rankings=[1, 2])
    (sent,) = [from_wire(WireGroup.model_validate(json.loads(dump(to_wire(one, "0")))), max_pixels=10)]
    save_preferences([one], tmp_path / "g.jsonl")
    (read,) = load_preferences(tmp_path / "g.jsonl")
    for found in (sent, read, one.select([1, 0])):
        assert found.messages == one.messages and found.tools == one.tools == (TOOL,)
    assert b"tools" not in dump(to_wire(group("a"), "0")), "a server of before would refuse it"
    rows = [
        json.dumps({"prompt": "a", "responses": ["b"], "rankings": [1], "tools": tools}) for tools in ("[{}]", "{")
    ]
    (tmp_path / "text.jsonl").write_text(rows[0])
    assert load_preferences(tmp_path / "text.jsonl")[0].tools == ({},)
    (tmp_path / "text.jsonl").write_text(rows[1])
    with pytest.raises(GroupError, match=r"line 1: tools is '\{', which is no JSON"):
        load_preferences(tmp_path / "text.jsonl")
    prompts = [tool_prompt(0), tool_prompt(1)]
    _, rollouts = read_rollouts(prompts, ["a", "a"], {})
    assert rollouts[0].fingerprint != rollouts[1].fingerprint


@pytest.mark.parametrize("tools", ["add", [3], {"a": 1}, [{"f": object()}]])
def test_tools_that_are_no_schemas(tools: Any) -> None:
    with pytest.raises(GroupError, match="group 'g': tools"):
        group("a", tools=tools)
    with pytest.raises(GroupError, match="tool 0 is .*'name'"):
        Renderer(tokenizer("qwen3")).render(group("a", tools=[{"type": "function"}]))
    with pytest.raises(GroupError, match=r"a tool call of turn 1 \('assistant'\) is \{\}"):
        Renderer(tokenizer("qwen3")).render(
            group([{"role": "user", "content": "a"}, {"role": "assistant", "tool_calls": [{}]}, tool_prompt(0)[-1]])
        )


# --- the assistant's last turn ---


@pytest.mark.parametrize("prefill", ["The answer is", "The answer is ", "a\n\n", "<think>\nHm", ""])
@pytest.mark.parametrize("name", ["qwen2_5", "qwen3", "llama3_1", "gemma3", "qwen3_5_think", "glm4moe", "qwen3_vl"])
def test_responses_continue_a_prefilled_turn(name: str, prefill: str) -> None:
    made = tokenizer(name)
    prompt = [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": prefill}]
    expected = apply_chat_template({"prompt": prompt}, made)["prompt"]
    renderer = Renderer(made)
    alone = renderer.render(group(prompt)).prompt_ids.tolist()
    # The prompt's own <think> is text, as control tokens of a prompt are everywhere.
    assert made.decode(alone) == expected
    assert "think" in prefill or alone == made(expected, add_special_tokens=False)["input_ids"]
    other, batched = renderer.render_all([group("a"), group(prompt)])
    assert batched.prompt_ids.tolist() == alone
    assert other.prompt_ids.tolist() == renderer.render(group("a")).prompt_ids.tolist()


def test_a_vision_language_prefill() -> None:
    made = processor()
    renderer = Renderer(made, adapter=family("qwen3_vl").adapter)
    prompt = [{"role": "user", "content": "<image>Which?"}, {"role": "assistant", "content": "It is"}]
    one = group(prompt, images=[random_image(random.Random(0))])
    assert text_of(renderer, one).endswith("<|im_start|>assistant\nIt is")


def test_turns_that_nothing_can_continue() -> None:
    renderer = Renderer(tokenizer("qwen3"))
    user = {"role": "user", "content": "a"}
    with pytest.raises(GroupError, match="ends in an assistant turn with tool calls"):
        renderer.render(group([user, call(2, 2, content="So")]))
    with pytest.raises(GroupError, match="no text at its end"):
        renderer.render(group([user, {"role": "assistant", "content": []}]))
    separated = tiny.build_tokenizer()
    separated.add_special_tokens({"additional_special_tokens": ["<|resp_sep|>"]})
    for name in ("mr2rm-assistant", "mr2rm-user"):
        with pytest.raises(GroupError, match="template 'mr2rm.*no prompt that ends in an assistant"):
            Renderer(separated, name).render(group([user, {"role": "assistant", "content": "b"}]))


# --- the form of the content ---


@pytest.mark.parametrize("name", ["smolvlm", "idefics3", "llava_next"])
def test_a_tokenizer_whose_template_reads_blocks_gets_blocks(name: str) -> None:
    made = tokenizer(name)
    blocks = [{"role": "user", "content": [{"type": "text", "text": "2 + 2?"}]}]
    expected = made.apply_chat_template(blocks, add_generation_prompt=True, return_dict=False)
    for prompt in ("2 + 2?", blocks):
        assert Renderer(made).render(group(prompt)).prompt_ids.tolist() == expected
    assert "2 + 2?" in text_of(Renderer(made), group("2 + 2?"))


@pytest.mark.parametrize(
    "path",
    sorted(set(TEMPLATES.glob("*.jinja")) - set(TEMPLATES.glob("*_training.jinja"))),
    ids=lambda path: path.stem,
)
def test_every_template_of_trl_shows_every_text_or_refuses(path: Path) -> None:
    """Of random shapes of prompts; what the template itself takes out of a text is left to it."""
    renderer = Renderer(tokenizer(path.stem))
    for seed in range(6):
        rng = random.Random(seed)
        turns: list[dict[str, Any]] = []
        if rng.random() < 0.4:
            turns.append({"role": "system", "content": f"system{seed}"})
        for i in range(rng.randint(1, 3)):
            turns.append({"role": "user", "content": [{"type": "text", "text": f"user{seed}-{i}{p}"} for p in "ab"]})
            if rng.random() < 0.3:
                turns += [
                    call(seed, i, content=rng.choice([None, f"calling{i}"])),
                    {"role": "tool", "content": f"r{i}"},
                ]
            turns.append({"role": "assistant", "content": [{"type": "text", "text": f"said{i}{p}"} for p in "ab"]})
        if rng.random() < 0.7:
            turns.append({"role": "user", "content": "last"})
        try:
            text = text_of(renderer, group(turns))
        except GroupError:
            continue
        for message in turns:
            content = message.get("content") or ""
            parts = [content] if isinstance(content, str) else [block["text"] for block in content]
            assert all(part in text for part in parts), (message, text)
            if "tool_calls" in message:
                assert "add" in text


def test_a_template_that_shows_nothing_is_refused_at_once() -> None:
    silent = tiny.build_tokenizer()
    for source in ("hello", "{% for m in messages %}{{ m.role }}{% endfor %}", "{{ raise_exception('no') }}"):
        silent.chat_template = source
        with pytest.raises(ConfigurationError, match="shows no user turn.*give the backbone a template"):
            Renderer(silent)
    shown = copy.deepcopy(family("qwen3_vl").processor)
    shown.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"  # blocks as Python writes them
    with pytest.raises(ConfigurationError, match="shows no user turn"):
        Renderer(shown, adapter=family("qwen3_vl").adapter)


# --- tags in text ---


IMAGES = [random_image(random.Random(seed)) for seed in range(2)]


def test_image_tags_stand_for_images_wherever_a_prompt_comes_from(tmp_path: Path) -> None:
    """JSON Lines, the verl adapter and TRL's columns give what blocks give; the places matter."""
    text = "Is <image>\nlike <image>?"
    blocks = [
        {"type": "text", "text": "Is "},
        {"type": "image"},
        {"type": "text", "text": "\nlike "},
        {"type": "image"},
        {"type": "text", "text": "?"},
    ]
    expected = [{"role": "user", "content": blocks}]
    paths = []
    for i, image in enumerate(IMAGES):
        image.save(tmp_path / f"{i}.png")
        paths.append(str(tmp_path / f"{i}.png"))
    row = {"prompt": text, "responses": ["a", "b"], "rankings": [1, 2], "images": paths}
    (tmp_path / "g.jsonl").write_text(json.dumps(row))
    (read,) = load_preferences(tmp_path / "g.jsonl", media_within=tmp_path)
    found = [
        group(text, images=IMAGES),
        group([{"role": "user", "content": text}], images=IMAGES),
        group([{"role": "user", "content": [{"type": "text", "text": text}]}], images=IMAGES),
        _rollout({"index": 0, "prompt": text, "images": paths}, "a"),
        read_rollouts([text], ["a"], {"images": [IMAGES]})[0][0],
        read,
    ]
    for one in found:
        assert one.messages == expected and len(one.images) == 2
    assert group(found[0].messages, images=IMAGES).messages == expected
    frames = [[IMAGES[0], IMAGES[0]]]
    assert [b["type"] for b in group("<video>a", videos=frames).messages[0]["content"]] == ["video", "text"]


def test_tags_that_are_text() -> None:
    assert group("What does <image> mean?").messages[0]["content"][0]["text"] == "What does <image> mean?"
    beside = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What does <image> mean?"}]}]
    assert group(beside, images=IMAGES[:1]).messages == beside, "blocks say where the images stand, as in TRL"
    with pytest.raises(MediaError, match=r"group 'g': the text of the prompt has 1 <image> but 2 images"):
        group("<image>a", images=IMAGES)


def test_text_with_tags_survives_a_file(tmp_path: Path) -> None:
    beside = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What does <image> mean?"}]}]
    for one in (group(beside, images=IMAGES[:1], rankings=[1, 2]), group("a <image>", rankings=[1, 2])):
        save_preferences([one], tmp_path / "g.jsonl")
        assert load_preferences(tmp_path / "g.jsonl")[0].messages == one.messages


# --- thoughts ---

THINKING = ("qwen3_5_think", "deepseek_r1_distill", "nemotron_3_nano", "qwen3_8")


def full_text(renderer: Renderer, one: ResponseGroup, index: int = 0) -> str:
    rendered = renderer.render(one)
    return str(renderer.tokenizer.decode(rendered.prompt_ids.tolist() + rendered.response_ids[index]))


@pytest.mark.parametrize("name", THINKING)
def test_an_answer_stands_behind_the_thought_that_the_template_opens(name: str) -> None:
    """As the template writes an assistant turn; a thought that the response ends stands in the open one."""
    made = tokenizer(name)
    renderer = Renderer(made)
    turns = [{"role": "user", "content": "2 + 2?"}]
    whole = made.apply_chat_template([*turns, {"role": "assistant", "content": "4"}], tokenize=False)
    opened = made.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert opened.endswith("<think>\n")
    one = group(turns, ["4", "2 and 2\n</think>\n\n4", "<think>\n2 and 2\n</think>\n\n4", "<think>\nHm"])
    assert whole.startswith(full_text(renderer, one, 0))
    assert full_text(renderer, one, 1) == full_text(renderer, one, 2) == opened + "2 and 2\n</think>\n\n4"
    assert full_text(renderer, one, 3) == opened + "Hm"
    # The marks are tokens, as the policy has them.
    close = made.convert_tokens_to_ids("</think>")
    assert renderer.render(one).response_ids[1].count(close) == 1
    both = renderer.render_all([one, group("a")])
    assert [r.response_ids for r in both] == [renderer.render(g).response_ids for g in (one, group("a"))]
    assert both[0].prompt_ids.tolist() == renderer.render(one).prompt_ids.tolist()


def test_a_template_that_opens_no_thought_is_left_alone() -> None:
    renderer = Renderer(tokenizer("qwen3"))
    texts = ["<think>a</think>b", "b"]
    rendered = renderer.render(group("a", texts))
    assert rendered.response_ids == renderer.encode_text.encode_all(texts)


@pytest.mark.parametrize("name", ["qwen3", "qwen3_5_think"])
def test_thoughts_are_stripped_or_refused(name: str) -> None:
    made = tokenizer(name)
    answers = ["4", "5", "", "4"]
    texts = ["2 and 2</think>4", "<think>\nx\n</think>\n\n5", "<think>unfinished", "4"]
    stripped = Renderer(made, thoughts="stripped")
    expected = Renderer(made).render(group("a", answers))
    assert stripped.render(group("a", texts)).response_ids == expected.response_ids
    found = stripped.render_all([group("a", texts), group("b", texts)])
    assert [one.response_ids for one in found] == [expected.response_ids] * 2
    refusing = Renderer(made, thoughts="refused")
    with pytest.raises(GroupError, match="group 'g': response 1 holds a thought.*thoughts='refused'"):
        refusing.render(group("a", ["4", "x</think>4"]))
    assert refusing.render(group("a", answers)).response_ids == expected.response_ids
    with pytest.raises(ConfigurationError, match="thoughts is 'some', expected one of included"):
        Renderer(made, thoughts="some")
    hashes = [template_hash(made, "chat", thoughts) for thoughts in ("included", "stripped", "refused")]
    assert len(set(hashes)) == 3 and template_hash(made) == hashes[0]


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("4", "4"),
        ("", ""),
        (" 4\n", " 4\n"),
        ("so</think> 4", "4"),
        ("</think>4", "4"),
        ("<think>so</think>\n\n4", "4"),
        ("<think></think>4", "4"),
        ("4 <think>sure?</think> yes", "4 yes"),  # what stands before a thought that is opened later is answer
        ("<think>a</think>b<think>c\n</think>\nd", "bd"),
        ("a</think>4 <think>b</think> c", "4 c"),
        ("4<think>never ends", "4"),
        ("<think>never ends", ""),
        ("<think>a</think>4<think>never ends", "4"),
        ("a\nb</think>4", "4"),
    ],
)
def test_the_answer_without_its_thoughts(text: str, answer: str) -> None:
    assert without_thoughts(text) == answer


def test_a_model_keeps_what_it_judges(tmp_path: Path) -> None:
    """The same in a checkpoint, in scoring and in GRPO, whether TRL has parsed the reasoning or not."""
    backbone = family("llama")
    options: dict[str, Any] = {"processor": copy.deepcopy(backbone.processor), "layout": "set"}
    model = MultiResponseRewardModel.from_backbone(reward_model("llama").backbone, thoughts="stripped", **options)
    model.save_pretrained(tmp_path / "rm")
    loaded = MultiResponseRewardModel.from_pretrained(tmp_path / "rm")
    assert loaded.config.thoughts == "stripped"
    scorer = GroupScorer(loaded)
    plain = scorer.score([group("a", ["4", "5"])])
    assert scorer.score([group("a", ["<think>x</think>4", "y</think>5"])]) == plain
    parsed = [[{"role": "assistant", "content": text, "reasoning_content": "Hm"}] for text in ("4", "5")]
    raw = ["<think>\nHm\n</think>\n\n" + text for text in ("4", "5")]
    for thoughts in ("stripped", "included"):
        judge = MultiResponseRewardModel.from_backbone(reward_model("llama").backbone, thoughts=thoughts, **options)
        rewards = [MultiResponseReward(judge, 2)(["a", "a"], given) for given in (parsed, raw, ["4", "5"])]
        assert rewards[0] == rewards[1]
        assert (rewards[0] == rewards[2]) == (thoughts == "stripped")


def add(a: int, b: int) -> int:
    """Adds two numbers.

    Args:
        a: one
        b: the other
    """
    return a + b


class Trainer:
    """What a reward sees of TRL's trainer."""

    num_generations = num_generations_eval = 1
    tools: Any = ()

    def log_metric(self, name: str, value: float) -> None:
        """Nothing."""


def test_rollouts_have_the_tools_that_the_policy_saw() -> None:
    trainer = Trainer()
    columns = {"tools": [[TOOL]], "log_metric": trainer.log_metric}
    assert read_rollouts(["a"], ["b"], columns)[0][0].tools == (), "TRL shows the trainer's, no column"
    trainer.tools = [add]
    (seen,) = read_rollouts(["a"], ["b"], columns)[0]
    made = tokenizer("qwen3")
    expected = apply_chat_template({"prompt": [{"role": "user", "content": "a"}]}, made, tools=[add])["prompt"]
    assert text_of(Renderer(made), seen) == expected
    trainer._env_tools, trainer._batch_environments = {"x": [add], "y": []}, ["y", "x"]  # type: ignore[attr-defined]
    both, rows = read_rollouts(["a"] * 2, ["b"] * 2, {"log_metric": trainer.log_metric})
    assert [len(one.tools) for one in both] == [0, 1] and rows[0].fingerprint != rows[1].fingerprint
    for column in ([TOOL], json.dumps([TOOL])):
        assert read_rollouts(["a"], ["b"], {"tools": [column]})[0][0].tools == (TOOL,)


def test_a_reward_judges_the_continuation_and_says_what_trl_does(caplog: pytest.LogCaptureFixture) -> None:
    model = reward_model("llama")
    prompt = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "The answer is"}]
    reward = MultiResponseReward(model, 2, reward="raw")
    found = [reward([prompt] * 2, [" 4", " 5"]) for _ in range(2)]
    assert found[0] == found[1] == GroupScorer(model).score([group(prompt, [" 4", " 5"])])[0]
    assert found[0] != GroupScorer(model).score([group(prompt[:1], [" 4", " 5"])])[0]
    assert caplog.text.count("judged as the rest of that turn") == 1
