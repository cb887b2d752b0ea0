"""What holds for every group that a policy and a data set can make up; hypothesis looks for one where it does not.

`MR_REWARD_EXAMPLES=20 pytest tests/reliability/test_properties.py --hypothesis-show-statistics` tries 20 times as
many.
"""

from __future__ import annotations

import copy
import functools
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import trl
from hypothesis import given
from hypothesis import strategies as st
from random_groups import groups, texts, tried
from tiny_models import FAMILIES, LAYOUTS, ROUNDING, family, reward_model

from mr_reward import GroupScorer, MultiResponseReward, MultiResponseRewardModel, ResponseGroup
from mr_reward.data.groups_file import ScoredGroup, load_preferences, read_scored, save_preferences, write_scored
from mr_reward.errors import GroupError, MRRewardError, OverLengthError
from mr_reward.groups import GroupScores
from mr_reward.grpo.reward import REWARD_TRANSFORMS
from mr_reward.model.rows import OVER_LENGTH_POLICIES, Packer
from mr_reward.scorers.wire import WireGroup, dump, from_wire, to_wire

each_family = pytest.mark.parametrize("name", FAMILIES)


@each_family
@given(data=st.data())
@tried(25)
def test_n_in_is_n_out_or_a_counted_drop(name: str, data: st.DataObject) -> None:
    """In any layout, within any budget, under any policy."""
    drawn = data.draw(st.lists(groups(name), min_size=1, max_size=3))
    layout, policy = data.draw(st.sampled_from(LAYOUTS)), data.draw(st.sampled_from(OVER_LENGTH_POLICIES))
    budget = data.draw(st.one_of(st.just(16384), st.integers(1, 2000)))
    scorer = GroupScorer(reward_model(name, layout), max_tokens_per_batch=budget, over_length=policy)
    try:
        results = scorer.score_detailed(drawn)
    except OverLengthError as error:
        # Only if some group is too long indeed, counted here by hand with two readout tokens a response at most.
        rendered = [scorer.packer.renderer.render(group) for group in drawn]
        lengths = [len(one.prompt_ids) + sum(len(ids) + 2 for ids in one.response_ids) for one in rendered]
        assert policy != "drop_group" and max(lengths) > min(budget, scorer.model.context_tokens or budget), error
        return
    assert len(results) == len(drawn)
    for group, result in zip(drawn, results, strict=True):
        assert len(result.truncated) == group.num_responses
        if result.scores is None:
            assert policy == "drop_group" and result.drop_reason
            continue
        assert len(result.scores) == group.num_responses and all(map(math.isfinite, result.scores))
        assert policy == "truncate_responses" or not any(result.truncated)
        by_text: dict[str, set[float]] = {}
        for text, score in zip(group.responses, result.scores, strict=True):
            by_text.setdefault(text, set()).add(score)
        assert all(len(scores) == 1 for scores in by_text.values()), "duplicates share their score bit for bit"


@each_family
@given(data=st.data())
@tried(40)
def test_spans_hold_the_responses_and_nothing_else(name: str, data: st.DataObject) -> None:
    group, layout = data.draw(groups(name)), data.draw(st.sampled_from(LAYOUTS))
    renderer = family(name).renderer()
    rendered = renderer.render(group)
    budget = data.draw(st.integers(1, 3000))
    packer = Packer(renderer, layout=layout, max_tokens=budget, over_length="truncate_responses")
    try:
        row = packer.pack(group)
    except OverLengthError:
        fixed = sum(packer._fixed_lengths(rendered))
        assert len(rendered.prompt_ids) + fixed > budget, "only what cannot be cut may be too long"
        return
    assert row is not None and row.num_tokens <= budget
    ids = row.input_ids[0].tolist()
    segments = row.segments[0].tolist()
    (spans,), (truncated,), (sites,) = row.spans, row.truncated, row.score_sites.tolist()
    assert len(spans) == len(sites) == group.num_responses
    covered = 0
    for index, ((start, end), expected) in enumerate(zip(spans, rendered.response_ids, strict=True), start=1):
        assert start >= covered and ids[start:end] == list(expected)[: end - start]
        assert truncated[index - 1] == (end - start < len(expected))
        assert set(segments[start:end]) <= {index} and segments[sites[index - 1]] == index
        covered = end
    control = {*family(name).tokenizer.added_tokens_decoder, *family(name).tokenizer.all_special_ids}
    for start, end in spans:
        assert not control & set(ids[start:end]), "no text of a response becomes a control token"


@each_family
@pytest.mark.parametrize("layout", ["isolated", "set"])
@given(data=st.data())
@tried(12)
def test_order_and_company_do_not_matter(name: str, layout: str, data: st.DataObject) -> None:
    """Any permutation gives the permuted scores, alone or in a batch with other groups, padded or packed."""
    group = data.draw(groups(name, max_responses=24))
    others = data.draw(st.lists(groups(name, max_responses=6), max_size=2))
    order = data.draw(st.permutations(range(group.num_responses)))
    place = data.draw(st.integers(0, len(others)))
    scorer = GroupScorer(reward_model(name, layout))
    expected = scorer.score([group])[0]
    moved = scorer.score([*others[:place], group.select(order), *others[place:]])[place]
    assert expected is not None and moved is not None
    assert moved == pytest.approx([expected[i] for i in order], abs=ROUNDING)


@each_family
@given(data=st.data())
@tried(12)
def test_isolated_scores_are_those_of_each_response_alone(name: str, data: st.DataObject) -> None:
    group = data.draw(groups(name, max_responses=12))
    scorer = GroupScorer(reward_model(name, "isolated"))
    together = scorer.score([group])[0]
    alone = [scorer.score([group.select([i])])[0] for i in range(group.num_responses)]
    assert together == pytest.approx([scores[0] for scores in alone if scores], abs=ROUNDING)


@given(data=st.data())
@tried(60)
def test_rewards_come_back_row_by_row(data: st.DataObject) -> None:
    """Through the reward function, in every shape in which TRL hands completions over."""
    size, count = data.draw(st.integers(1, 12)), data.draw(st.integers(1, 4))
    kind = data.draw(st.sampled_from(sorted(REWARD_TRANSFORMS)))
    shape = data.draw(st.sampled_from(["text", "chat", "blocks", "several turns", "no content"]))
    reward = MultiResponseReward(
        _model_that_shows_tools() if shape == "several turns" else reward_model("llama"),
        size,
        device="cpu",
        reward=kind,
        max_tokens_per_batch=data.draw(st.sampled_from([16384, 64])),
    )
    prompts = [data.draw(texts()) for _ in range(count) for _ in [0]]
    answers = [data.draw(texts()) for _ in range(size * count)]
    completions: list[Any] = [_completion(answer, shape) for answer in answers]
    chat = [[{"role": "user", "content": prompt}] for prompt in prompts for _ in range(size)]
    given_prompts: list[Any] = [prompt for prompt in prompts for _ in range(size)] if shape == "text" else chat
    extra: dict[str, Any] = {}
    rewards = reward(
        prompts=given_prompts,
        completions=completions,
        trainer_state=SimpleNamespace(global_step=1),
        log_extra=extra.__setitem__,
        log_metric=lambda name, value: None,
    )
    assert len(rewards) == size * count
    assert all(len(column) == size * count for column in extra.values())
    for start in range(0, size * count, size):
        values, texts_of_group = rewards[start : start + size], answers[start : start + size]
        if None in values:
            assert values == [None] * size, "a group is dropped as a whole"
            continue
        assert all(math.isfinite(value or 0.0) for value in values)
        for text in set(texts_of_group) if shape != "no content" else ():
            duplicates = [value for value, other in zip(values, texts_of_group, strict=True) if other == text]
            assert len(set(duplicates)) == 1
        if kind == "centred":
            assert sum(value or 0.0 for value in values) == pytest.approx(0.0, abs=1e-4)


@functools.cache
def _model_that_shows_tools() -> MultiResponseRewardModel:
    model = reward_model("llama", fresh=True)
    model.processor = copy.deepcopy(model.processor)
    model.processor.chat_template = (Path(trl.__file__).parent / "chat_templates" / "qwen2_5.jinja").read_text()
    return model


def _completion(answer: str, shape: str) -> Any:
    if shape == "text":
        return answer
    content: Any = {"blocks": [{"type": "text", "text": answer}], "no content": None}.get(shape, answer)
    turns: list[dict[str, Any]] = [{"role": "assistant", "content": content}]
    if shape == "several turns":
        turns = [
            {"role": "assistant", "content": "first", "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]},
            {"role": "tool", "content": "42"},
            *turns,
        ]
    return turns


@given(data=st.data())
@tried(100)
def test_files_give_back_every_text(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("files")
    drawn = data.draw(st.lists(groups("llama", max_responses=8, ranked=True), min_size=1, max_size=4))
    save_preferences(drawn, folder / "ranked.jsonl")
    for group, found in zip(drawn, load_preferences(folder / "ranked.jsonl"), strict=True):
        assert (found.messages, found.responses, found.rankings) == (group.messages, group.responses, group.rankings)
    scored = [
        ScoredGroup(
            group=group,
            result=GroupScores(
                scores=tuple(data.draw(st.floats(-1e6, 1e6)) for _ in group.responses),
                truncated=(False,) * group.num_responses,
            ),
        )
        for group in drawn
    ]
    write_scored(scored, folder / "scored.jsonl")
    for one, read in zip(scored, read_scored(folder / "scored.jsonl"), strict=True):
        assert read.scores == one.scores and read.group.responses == one.group.responses


@given(data=st.data())
@tried(100)
def test_what_a_client_sends_arrives(data: st.DataObject) -> None:
    group = data.draw(groups(data.draw(st.sampled_from(FAMILIES)), max_responses=8))
    sent = json.loads(dump(to_wire(group, "0")))
    found = from_wire(WireGroup.model_validate(sent), max_pixels=10**6)
    assert (found.messages, found.responses) == (group.messages, group.responses)
    for image, other in zip(found.images, group.images, strict=True):
        assert image.convert("RGB").tobytes() == other.tobytes()


json_values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-5, 5), st.floats(), st.text(max_size=5)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(st.sampled_from(["role", "content", "type", "text", "image", "user", "path"]), inner),
    ),
    max_leaves=12,
)


@given(prompt=json_values, responses=json_values, rankings=json_values, images=json_values, videos=json_values)
@tried(400)
def test_whatever_is_no_group_is_refused_by_name(
    prompt: Any, responses: Any, rankings: Any, images: Any, videos: Any
) -> None:
    """No exception but ours, and what is accepted can be rendered or is refused by ours."""
    try:
        group = ResponseGroup(prompt=prompt, responses=responses, rankings=rankings, images=images, videos=videos)
    except MRRewardError as error:
        assert str(error)
        return
    try:
        family("qwen3_vl").renderer().render(group)
    except MRRewardError as error:
        assert str(error)


@given(rankings=st.lists(st.one_of(st.integers(-1, 9), st.floats(), st.booleans(), st.none()), max_size=8))
@tried(200)
def test_rankings_are_ranks_or_refused(rankings: list[Any]) -> None:
    """Accepted are dense ranks and those of a competition; which response is better never changes."""
    try:
        group = ResponseGroup(prompt="p", responses=[f"r{i}" for i in range(len(rankings))], rankings=rankings)
    except GroupError:
        return
    assert group.rankings is not None and min(group.rankings) == 1
    for i, first in enumerate(rankings):
        for j, second in enumerate(rankings):
            assert (first < second) == (group.rankings[i] < group.rankings[j])
