"""Prompts that are read once: groups that share one, and groups larger than a pass. Scores are those of one pass."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny_models import (
    FAMILIES,
    ROUNDING,
    assert_close,
    family,
    pack,
    random_group,
    random_responses,
    reward_model,
    score,
)

from mr_reward import GroupScorer, MultiResponseRewardModel, ResponseGroup
from mr_reward.errors import OverLengthError
from mr_reward.model import model as model_module
from mr_reward.model.chunks import _fill, _split
from mr_reward.templates.rendering import RenderedGroup


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The number of tokens of every pass of a model's backbone from here on."""

    def watch(model: MultiResponseRewardModel) -> list[int]:
        assert model.reads_flat()
        sizes: list[int] = []
        forward = model.backbone.forward

        def recorded(inputs_embeds: torch.Tensor, **inputs: Any) -> Any:
            sizes.append(inputs_embeds.shape[:2].numel())
            return forward(inputs_embeds=inputs_embeds, **inputs)

        monkeypatch.setattr(model.backbone, "forward", recorded)
        return sizes

    return watch


def large_group(name: str, n: int, seed: int = 0) -> ResponseGroup:
    rng = random.Random(f"{name}{n}{seed}")
    group = random_group(rng, 1, images=2 * family(name).sees_images)
    return replace(group, prompt=group.messages, responses=random_responses(rng, n, 30))


@pytest.mark.parametrize("layout", ["isolated", "set"])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_group_larger_than_a_pass_is_scored_in_chunks(name: str, layout: str, computed: Any) -> None:
    model = reward_model(name, layout)
    group = large_group(name, 40)
    whole = pack(model, group)
    (expected,) = score(model, [group])
    prompt = int((whole.segments == 0).sum())
    longest = max(int((whole.segments == i + 1).sum()) for i in range(40))
    for budget in (prompt + longest, prompt + 150, whole.num_tokens - 1, whole.num_tokens):
        sizes = computed(model)
        (found,) = GroupScorer(model, max_tokens_per_batch=budget).score([group])
        assert found is not None
        assert_close(torch.tensor(found), expected, ROUNDING)
        assert len(sizes) == 1 if budget == whole.num_tokens else len(sizes) > 2
        # The prompt is read once: a chunk computes no more than what is left beside it.
        assert max(sizes) <= budget and max(sizes[1:], default=0) <= budget - prompt
        twice = whole.num_tokens - prompt - 40 if layout == "set" and len(sizes) > 1 else 0
        assert sum(sizes) == whole.num_tokens + twice, "`set` in chunks reads all but the comparisons twice"


@pytest.mark.parametrize("layout", ["isolated", "set"])
@pytest.mark.parametrize("name", FAMILIES)
def test_groups_that_share_a_prompt_read_it_once(name: str, layout: str, computed: Any) -> None:
    model = reward_model(name, layout)
    first = large_group(name, 5)
    second = replace(first, prompt=first.messages, responses=random_responses(random.Random(1), 3, 30))
    third = replace(first, prompt=first.messages, responses=[first.responses[0]])
    other = large_group(name, 4, seed=1)
    groups = [first, other, second, third]
    expected = [score(model, [group])[0] for group in groups]
    rows = [pack(model, group) for group in groups]
    prompt = int((rows[0].segments == 0).sum())
    sizes = computed(model)
    for found, one in zip(GroupScorer(model).score(groups), expected, strict=True):
        assert found is not None
        assert_close(torch.tensor(found), one, ROUNDING)
    assert sum(sizes) == sum(row.num_tokens for row in rows) - 2 * prompt


def test_the_same_words_under_another_picture_are_another_prompt(computed: Any) -> None:
    model = reward_model("qwen3_vl", "set")
    first = large_group("qwen3_vl", 3)
    second = replace(first, prompt=first.messages, images=list(first.images[::-1]))
    expected = [score(model, [group])[0] for group in (first, second)]
    assert (expected[0] - expected[1]).abs().max() > 10 * ROUNDING
    for found, one in zip(GroupScorer(model).score([first, second]), expected, strict=True):
        assert_close(torch.tensor(found), one, ROUNDING)


def test_256_responses_keep_the_memory_of_a_pass(computed: Any) -> None:
    """Best-of-N search: what a pass computes does not grow with N, for either layout."""
    for layout in ("isolated", "set"):
        model = reward_model("llama", layout)
        group = ResponseGroup(prompt="w" * 100, responses=random_responses(random.Random(2), 256, 40))
        (expected,) = score(model, [group])
        sizes = computed(model)
        (found,) = GroupScorer(model, max_tokens_per_batch=400).score([group])
        assert found is not None
        assert_close(torch.tensor(found), expected, ROUNDING)
        assert max(sizes) <= 400 and len(sizes) > 10


def test_chunks_where_the_kernel_has_no_gradients(computed: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: what counts is that scoring needs none, not the mode in which the scorer is called."""
    monkeypatch.setattr(model_module, "_has_kernel", lambda device_type, dtype, *, training: not training)
    model = reward_model("llama", "set", fresh=True)
    group = large_group("llama", 30)
    expected = GroupScorer(model).score([group])[0]
    sizes = computed(model)
    assert torch.is_grad_enabled()
    found = GroupScorer(model, max_tokens_per_batch=200).score([group])[0]
    assert_close(torch.tensor(found), torch.tensor(expected), ROUNDING)
    assert len(sizes) > 2 and max(sizes) <= 200


def test_the_over_length_policy_is_asked_about_single_responses() -> None:
    rng = random.Random(4)
    model = reward_model("llama", "set")
    responses = [*random_responses(rng, 6, 60), "x" * 300]
    group = ResponseGroup(prompt="p", responses=responses, id="long")
    with pytest.raises(OverLengthError, match="group 'long': a response of 300 tokens does not fit .* of 150"):
        GroupScorer(model, max_tokens_per_batch=150).score([group])
    assert GroupScorer(model, max_tokens_per_batch=150, over_length="drop_group").score([group]) == [None]
    scorer = GroupScorer(model, max_tokens_per_batch=150, over_length="truncate_responses")
    (result,) = scorer.score_detailed([group])
    assert result.truncated == (False,) * 6 + (True,)
    prompt = len(scorer.packer.renderer.render(group).prompt_ids)
    cut = replace(group, prompt=group.messages, responses=[*responses[:6], "x" * (150 - prompt - 2)])
    assert_close(torch.tensor(result.scores), score(model, [cut])[0], ROUNDING)


@pytest.mark.parametrize("seed", range(3))
def test_runs_and_chunks_are_filled_to_the_last_token(seed: int) -> None:
    """One token more than the budget begins a new one, as many as the budget do not."""
    rng = random.Random(seed)
    for layout, readouts in (("isolated", 1), ("set", 2)):
        packer = GroupScorer(reward_model("llama", layout)).packer
        sizes = [rng.randint(0, 5) for _ in range(20)]
        group = RenderedGroup(prompt_ids=torch.zeros(0, dtype=torch.long), response_ids=[[0] * size for size in sizes])
        lengths = [size + readouts for size in sizes]
        for budget in range(max(lengths), sum(lengths) + 1):
            expected: list[list[int]] = [[]]
            for i, length in enumerate(lengths):
                if sum(lengths[j] for j in expected[-1]) + length > budget:
                    expected.append([])
                expected[-1].append(i)
            assert list(_fill(lengths, budget)) == expected
            found = [[len(ids) for ids in part.response_ids] for part in _split(packer, group, budget)]
            assert found == [[sizes[i] for i in run] for run in expected]
    assert list(_fill([], 5)) == []


@pytest.mark.parametrize("layout", ["isolated", "set"])
def test_a_group_that_just_fills_a_pass_over_its_prompt_is_one(layout: str, computed: Any) -> None:
    """Two on one prompt, of which each takes exactly what the prompt leaves; a token less takes more passes."""
    model = reward_model("llama", layout)
    groups = [ResponseGroup(prompt="p", responses=[letter * 20, letter * 30]) for letter in "ab"]
    whole = pack(model, groups[0]).num_tokens
    sizes = computed(model)
    for budget, passes in ((whole, 3), (whole - 1, 5 if layout == "isolated" else 9)):
        sizes.clear()
        found = GroupScorer(model, max_tokens_per_batch=budget).score(groups)
        assert len(sizes) == passes and max(sizes) <= budget
        for scores, group in zip(found, groups, strict=True):
            assert_close(torch.tensor(scores), score(model, [group])[0], ROUNDING)


@pytest.mark.parametrize("layout", ["isolated", "set"])
def test_several_groups_larger_than_a_pass_on_one_prompt(layout: str) -> None:
    """What was collected of one is not shown to the next."""
    model = reward_model("llama", layout)
    groups = [ResponseGroup(prompt="p", responses=random_responses(random.Random(i), 9, 30)) for i in range(3)]
    groups.insert(1, ResponseGroup(prompt="p", responses=["small", "one"]))
    found = GroupScorer(model, max_tokens_per_batch=90).score(groups)
    for scores, group in zip(found, groups, strict=True):
        assert_close(torch.tensor(scores), score(model, [group])[0], ROUNDING)


def test_twins_share_their_score_bit_for_bit_over_a_shared_prompt() -> None:
    for layout in ("isolated", "set"):
        model = reward_model("llama", layout)
        responses = random_responses(random.Random(5), 30, 20)
        group = ResponseGroup(prompt="p", responses=[*responses, *responses[::-1]])
        (scores,) = GroupScorer(model, max_tokens_per_batch=120).score([group])
        assert scores is not None and scores[:30] == scores[:29:-1]


PROGRAM = """
import json, random, sys
from pathlib import Path
import torch
from mr_reward import GroupScorer, MultiResponseRewardModel, ResponseGroup
from mr_reward.worlds import tiny

torch.set_num_threads(1)
model = MultiResponseRewardModel.from_backbone(
    tiny.build_llama(0, hidden_size=256, num_layers=4), layout=sys.argv[1], processor=tiny.build_tokenizer()
)
rng = random.Random(0)
def text(length):
    return "".join(rng.choice("abcdefgh") for _ in range(length))
group = ResponseGroup(prompt=text(200), responses=[text(100) for _ in range(256)])
def resident(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(name))
scorer = GroupScorer(model, max_tokens_per_batch=int(sys.argv[2]))
scorer.score([ResponseGroup(prompt="a", responses=["b", "c"])])
Path("/proc/self/clear_refs").write_text("5")
before = resident("VmRSS")
(scores,) = scorer.score([group])
assert len(scores) == 256
print(json.dumps(resident("VmHWM") - before))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("layout", ["isolated", "set"])
def test_256_responses_within_bounded_memory(layout: str) -> None:
    """26,000 tokens: peak of one pass over all, and of passes of 2,048 tokens, in MB."""
    peaks = {}
    for budget in (2_048, 32_768):
        command = [sys.executable, "-W", "ignore", "-c", PROGRAM, layout, str(budget)]
        # What is freed goes back at once, so that the peak is of what is held; it varied threefold without.
        environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
        run = subprocess.run(command, check=True, capture_output=True, text=True, timeout=500, env=environment)
        peaks[budget] = json.loads(run.stdout.splitlines()[-1])
    assert peaks[2_048] < 60 and peaks[2_048] < peaks[32_768] / 5, peaks
