"""What an evaluation can score with: reward models, baselines, files of scores, sequence classifiers."""

from __future__ import annotations

import random
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import random_group, reward_model
from transformers import LlamaConfig, LlamaForSequenceClassification

from mr_reward import GroupScorer, ResponseGroup
from mr_reward.errors import ConfigurationError, GroupError, OverLengthError
from mr_reward.evaluation.judges import (
    Alone,
    Baseline,
    ClassifierScorer,
    RewardModel,
    load_scorer,
)
from mr_reward.groups import GroupScores
from mr_reward.worlds import tiny
from mr_reward.worlds.handwriting import make_groups


def test_a_group_that_loses_any_response_alone_is_dropped_with_the_reason() -> None:
    class Short:
        name, order_free = "short", True

        def score_detailed(self, groups: Sequence[ResponseGroup]) -> list[GroupScores]:
            return [
                GroupScores(
                    scores=None if len(group.responses[0]) > 5 else (float(len(group.responses[0])),),
                    truncated=(len(group.responses[0]) > 2,),
                    drop_reason=f"{group.responses[0]} is long" if len(group.responses[0]) > 5 else None,
                )
                for group in groups
            ]

    texts = [["a", "bbb", "c"], ["dddddd", "e"], ["f", "gggggg", "hhhhhhh"], ["ii"]]
    found = Alone(Short()).score_detailed([ResponseGroup(prompt="?", responses=own) for own in texts])
    assert [one.scores for one in found] == [(1.0, 3.0, 1.0), None, None, (2.0,)]
    assert [one.drop_reason for one in found] == [None, "dddddd is long", "gggggg is long", None]
    assert found[0].truncated == (False, True, False) and found[3].truncated == (False,)


def test_two_runs_of_one_name_give_the_same_scores() -> None:
    """What decides the scores, or whether a group is dropped, is in the name, by which a run is resumed."""

    def name(layout: str = "set", changed: bool = False, **options: Any) -> str:
        tiny_model = reward_model("llama", layout, fresh=True)
        with torch.no_grad():
            tiny_model.head.out.weight += float(changed)
        return RewardModel(GroupScorer(tiny_model, **{"over_length": "drop_group", **options}), "rm").name

    names = [
        name(),
        name(changed=True),
        name(layout="isolated"),
        name(over_length="truncate_responses"),
        name(max_tokens_per_batch=300),
        name(layout="causal"),
        name(layout="causal", num_orders=3),
    ]
    assert len(set(names)) == len(names) and name() == names[0]
    assert names[0].startswith("rm ") and names[0].endswith(" over_length=drop_group"), "as it was in version 0.1.0"


def test_baselines() -> None:
    group = ResponseGroup(prompt="?", responses=["aa", "b", ""], id="x")
    (longest,) = Baseline("longest").score_detailed([group])
    (shortest,) = Baseline("shortest").score_detailed([group])
    assert longest.scores == (2.0, 1.0, 0.0) and shortest.scores == (-2.0, -1.0, -0.0)
    (one,), (two,) = (Baseline("random").score_detailed([group.select(order)]) for order in ([0, 1, 2], [2, 1, 0]))
    assert one.scores == tuple(reversed(two.scores or ())) and len(set(one.scores or ())) == 3
    (other,) = Baseline("random").score_detailed([ResponseGroup(prompt="?", responses=["aa", "b", ""], id="y")])
    assert not set(other.scores or ()) & set(one.scores or ()), "the same response elsewhere has another number"


def test_a_sequence_classifier(tmp_path: Path) -> None:
    """Batched by length with padding; the same as one response at a time."""
    torch.manual_seed(0)
    tokenizer = tiny.build_tokenizer()
    config = LlamaConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        vocab_size=len(tokenizer),
        num_labels=1,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForSequenceClassification(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    rng = random.Random(0)
    groups = [random_group(rng, rng.randint(2, 5), longest=20, id=str(i)) for i in range(8)]
    found = load_scorer(f"classifier:{tmp_path}", device="cpu", max_tokens_per_batch=300).score_detailed(groups)
    plain = LlamaForSequenceClassification.from_pretrained(tmp_path).eval()
    longest = [0] * len(groups)  # row of each group
    for i, (group, result) in enumerate(zip(groups, found, strict=True)):
        for response, score in zip(group.responses, result.scores or (), strict=True):
            turns = [{"role": t["role"], "content": t["content"][0]["text"]} for t in group.messages]
            turns.append({"role": "assistant", "content": response})
            ids = tokenizer.apply_chat_template(turns, return_tensors="pt", return_dict=True)["input_ids"]
            longest[i] = max(longest[i], ids.shape[1])
            with torch.no_grad():
                assert plain(input_ids=ids).logits.item() == pytest.approx(score, abs=1e-5)
    limit = statistics.median_low(longest)
    for budget, context in ((limit, 2048), (10**6, limit)):  # by the budget, and by the positions
        config.max_position_embeddings = context
        config.save_pretrained(tmp_path)
        options = {"device": "cpu", "max_tokens_per_batch": budget}
        kept = load_scorer(f"classifier:{tmp_path}", **options).score_detailed(groups)
        assert min(longest) < max(longest)
        for length, one, result in zip(longest, kept, found, strict=True):
            fits = length <= limit
            assert (one.scores is not None) is fits and ("do not fit" in str(one.drop_reason)) is not fits
            assert one.scores is None or one.scores == pytest.approx(result.scores, abs=1e-5)
        with pytest.raises(OverLengthError, match="do not fit .* raise max_tokens_per_batch"):
            load_scorer(f"classifier:{tmp_path}", over_length="error", **options).score_detailed(groups)
        with pytest.raises(ConfigurationError, match="reads whole responses; choose 'drop_group'"):
            load_scorer(f"classifier:{tmp_path}", over_length="truncate_responses", **options)
    with pytest.raises(GroupError, match="has images or videos"):
        ClassifierScorer(str(tmp_path)).score_detailed(make_groups("test", 1))
    call = [{"role": "assistant", "tool_calls": [{"function": {"name": "add", "arguments": {}}}]}]
    with pytest.raises(GroupError, match="a response has tool calls or results, a sequence classifier reads one turn"):
        ClassifierScorer(str(tmp_path)).score_detailed([ResponseGroup(prompt="2 + 2?", responses=["4", call])])
    config.num_labels = 2
    LlamaForSequenceClassification(config).save_pretrained(tmp_path)
    with pytest.raises(ConfigurationError, match="has 2 labels, expected a reward model with one"):
        ClassifierScorer(str(tmp_path))
