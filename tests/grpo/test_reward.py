"""`MultiResponseReward` in a single process, with a fake scorer."""

from __future__ import annotations

import inspect
import logging
import math
import pickle
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from reward_worker import WholeGroupScorer, call, make_rows
from transformers.integrations import deepspeed as hf_deepspeed

import mr_reward.grpo.reward as reward_module
from mr_reward.checkpoint.zero3 import outside_zero3
from mr_reward.errors import ConfigurationError, GroupAssemblyError, MRRewardError, PeerRankError
from mr_reward.groups import GroupScores
from mr_reward.grpo.exchange import Exchange
from mr_reward.grpo.reward import REWARD_TRANSFORMS, MultiResponseReward
from mr_reward.grpo.telemetry import COLUMN_KEYS, METRIC_KEYS, GroupLog
from mr_reward.scorers.opening import default_device, open_scorer


class FixedScorer(WholeGroupScorer):
    """Gives the number that a response ends with."""

    def _score(self, group: Any) -> GroupScores:
        result = super()._score(group)
        if result.scores is None:
            return result
        return GroupScores(scores=tuple(float(r.split()[-1]) for r in group.responses), truncated=result.truncated)


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, dict[str, Any]]]:
    """What `open_scorer` was called with; it gives a `FixedScorer`."""
    calls: list[tuple[Any, dict[str, Any]]] = []

    def build(model: Any, **options: Any) -> WholeGroupScorer:
        calls.append((model, options))
        return FixedScorer()

    monkeypatch.setattr(reward_module, "open_scorer", build)
    return calls


def _transform(name: str, *scores: float) -> list[float]:
    return REWARD_TRANSFORMS[name](scores)


def test_transforms() -> None:
    assert _transform("raw", 1.0, 3.0) == [1.0, 3.0]
    assert _transform("centred", 1.0, 3.0, 5.0) == [-2.0, 0.0, 2.0]
    assert _transform("centred", 0.0, 0.0, 3.0) == [-1.0, -1.0, 2.0]  # the mean, not the median
    assert _transform("rank", 5.0, 1.0, 3.0) == [1.0, 0.0, 0.5]
    assert _transform("rank", 2.0, 1.0, 2.0, 0.0) == pytest.approx([5 / 6, 1 / 3, 5 / 6, 0.0])
    sigmoid = [1 / (1 + math.exp(-x)) for x in (1.0, 3.0)]
    assert _transform("win_rate", 3.0, 2.0, 0.0)[0] == pytest.approx(sum(sigmoid) / 2)
    assert _transform("win_rate", 1e6, -1e6) == [1.0, 0.0]
    assert _transform("rank", 2.0, 2.0) == _transform("win_rate", 2.0, 2.0) == [0.5, 0.5]
    assert [_transform(name, 7.0) for name in ("centred", "raw", "rank", "win_rate")] == [[0.0], [7.0], [0.5], [0.5]]


@pytest.mark.parametrize("name", REWARD_TRANSFORMS)
def test_twins_get_the_same_reward_whatever_the_order(name: str) -> None:
    first = _transform(name, 0.1, 0.7, 0.1, 0.3)
    assert first[0] == first[2]
    assert _transform(name, 0.3, 0.1, 0.1, 0.7) == pytest.approx([first[3], first[0], first[2], first[1]])


def test_groups_rewards_and_logs(built: list[Any], caplog: pytest.LogCaptureFixture) -> None:
    reward = MultiResponseReward("folder", 3)
    completions = ["a 1", "aa 2", "aaa 3", "b 4", "b 4", "bb 4", "c 5", "drop", "c 7"]
    with caplog.at_level(logging.WARNING):
        result = call(reward, ["p"] * 6 + ["q"] * 3, completions)
    assert result["rewards"] == [-1.0, 0.0, 1.0, 0.0, 0.0, 0.0, None, None, None]
    assert caplog.messages == ["step 13 group 2 gets no reward: too long"]
    assert result["extra"] == {
        "mr_reward_group": [0, 0, 0, 1, 1, 1, 2, 2, 2],
        "mr_reward_score": [1.0, 2.0, 3.0, 4.0, 4.0, 4.0, None, None, None],
        "mr_reward_rank": [3, 2, 1, 1, 1, 1, None, None, None],
        "mr_reward_slot": [0, 1, 2, 0, 0, 1, 0, 1, 2],
        "mr_reward_duplicate_of": [-1, -1, -1, -1, 0, -1, -1, -1, -1],
        "mr_reward_truncated": [False] * 9,
    }
    assert tuple(result["extra"]) == COLUMN_KEYS
    metrics = result["metrics"]
    assert tuple(metrics) == METRIC_KEYS
    assert metrics.pop("mr_reward/ms_per_group") >= 0
    assert list(metrics.values()) == pytest.approx(
        [3.0, 0.5, 0.5, 0.0, 1.0, 0.0, 1 / 9, 0.0, 1.0, math.nan], nan_ok=True
    )


def test_duplicates_are_named_by_the_slot_that_they_share(built: list[Any]) -> None:
    extra = call(MultiResponseReward("folder", 7), ["p"] * 7, ["a 1", "a 1", "b 2", "b 2", "c 2", "b 2", "a 1"])[
        "extra"
    ]
    assert extra["mr_reward_slot"] == [0, 0, 1, 1, 2, 1, 0]
    assert extra["mr_reward_duplicate_of"] == [-1, 0, -1, 1, -1, 1, 0]
    assert extra["mr_reward_rank"] == [2, 2, 1, 1, 1, 1, 2]


class Clock:
    """Stands in for the module `time`; a scorer that knows it takes as long as it says."""

    now = 100.0

    def perf_counter(self) -> float:
        return self.now


def test_the_time_of_a_group_by_the_clock(built: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """In milliseconds, over all groups of all ranks, dropped ones too; of the scoring alone."""
    clock = Clock()
    monkeypatch.setattr(reward_module, "time", clock)
    score = FixedScorer.score_detailed

    def slow(self: Any, groups: Any) -> Any:
        clock.now += 0.5 * len(groups)
        return score(self, groups)

    monkeypatch.setattr(FixedScorer, "score_detailed", slow)
    reward = MultiResponseReward("folder", 2)
    completions = ["1", "2", "3", "4", "drop", "5"]
    assert call(reward, ["p"] * 6, completions)["metrics"]["mr_reward/ms_per_group"] == 500.0

    def gather(self: Any, own: Any) -> list[Any]:
        """A second rank with a group of its own, which took it 2.5 seconds."""
        _, payload = own
        if isinstance(payload[0], dict):
            return [own, (None, ({3: GroupScores(scores=(1.0, 0.0), truncated=(False, False))}, 2.5, []))]
        return [own, (None, (payload[0][:2], *payload[1:]))]

    monkeypatch.setattr(Exchange, "all_gather_objects", gather)
    assert call(reward, ["p"] * 6, completions)["metrics"]["mr_reward/ms_per_group"] == (1.5 + 2.5) * 1000 / 4


def test_after_a_call_that_failed_nothing_of_it_is_left(built: list[Any], tmp_path: Path) -> None:
    """No metric, no group, no line in a file; and the next call is as if it had not been."""
    reward = MultiResponseReward("folder", 2, group_log=GroupLog(tmp_path))
    good = call(reward, ["p", "p"], ["1", "2"])
    assert [one.group.responses for one in reward.last_scored] == [("1", "2")]
    files = {path.name: path.read_text() for path in tmp_path.iterdir()}
    for completions, error in ((["text", "2"], ValueError), ([[{"role": "assistant", "content": 3}]] * 2, TypeError)):
        logged: dict[str, Any] = {}
        with pytest.raises((error, MRRewardError)):
            reward(["q", "q"], completions, log_metric=logged.__setitem__, log_extra=logged.__setitem__)
        assert logged == {} and {path.name: path.read_text() for path in tmp_path.iterdir()} == files
        if error is ValueError:  # the other one fails before anything is scored
            assert reward.last_scored == []
    again = call(reward, ["p", "p"], ["1", "2"])
    assert again["rewards"] == good["rewards"] and again["extra"] == good["extra"]
    reward([], [])
    assert reward.last_scored == [], "a rank without a group has scored none"


class Trainer:
    """What a reward asks of a GRPOTrainer."""

    num_generations, num_generations_eval, tools = 2, 4, None

    def __init__(self, evaluating: bool, **args: int) -> None:
        self.model = torch.nn.Linear(1, 1).train(not evaluating)
        self.args = SimpleNamespace(**args)

    def log_metric(self, name: str, value: float) -> None:
        pass


@pytest.mark.parametrize(
    ("evaluating", "args", "every", "expected"),
    [
        # Four updates an generation: what is scored after 12 steps serves 13 to 16.
        (False, {"steps_per_generation": 4, "num_iterations": 2, "gradient_accumulation_steps": 2}, 16, "step_00013"),
        (False, {"steps_per_generation": 4, "num_iterations": 2, "gradient_accumulation_steps": 2}, 17, None),
        (False, {"steps_per_generation": 1, "num_iterations": 1, "gradient_accumulation_steps": 4}, 13, "step_00013"),
        (False, {"steps_per_generation": 1, "num_iterations": 1, "gradient_accumulation_steps": 4}, 2, None),
        (False, {}, 13, "step_00013"),  # a trainer without iterations
        (
            True,
            {"steps_per_generation": 1, "num_iterations": 1, "gradient_accumulation_steps": 1},
            5,
            "eval_step_00012",
        ),
    ],
)
def test_groups_are_logged_under_the_steps_that_they_serve(
    evaluating: bool, args: dict[str, int], every: int, expected: str | None, built: list[Any], tmp_path: Path
) -> None:
    reward = MultiResponseReward("folder", 2, num_generations_eval=4, group_log=GroupLog(tmp_path, every=every))
    trainer, state = Trainer(evaluating, **args), SimpleNamespace(global_step=12)
    reward(["p"] * 4, list("1234"), trainer_state=state, log_metric=trainer.log_metric)
    names = [path.name.partition(".")[0] for path in tmp_path.iterdir()]
    assert names == ([] if expected is None else [expected])
    assert len(reward.last_scored) == (1 if evaluating else 2), "an evaluation has groups of its own size"


def test_the_win_rate_over_a_reference(built: list[Any], caplog: pytest.LogCaptureFixture) -> None:
    """Ties half; a prompt without one and a group that does not fit with it are left out; the rewards stay."""
    reward = MultiResponseReward("folder", 2)
    prompts = ["p", "p", "q", "q", "r", "r", "s", "s"]
    completions = ["a 1", "a 3", "a 2", "b 2", "a 1", "a 9", "a 0", "a 1"]
    plain = call(reward, prompts, completions)
    turns = [{"role": "assistant", "content": "x 2"}]
    references = ["x 2", "x 2", turns, turns, None, None, "drop", "drop"]
    found = call(reward, prompts, completions, reference_response=references)
    assert found["rewards"] == plain["rewards"] and found["extra"] == plain["extra"]
    assert tuple(plain["metrics"]) == METRIC_KEYS
    assert tuple(found["metrics"]) == (*METRIC_KEYS, "mr_reward/win_rate")
    assert found["metrics"]["mr_reward/win_rate"] == (0.5 + 0.5) / 2
    assert caplog.messages == ["step 13 group 3 is not compared with its reference: too long"]
    won = call(reward, prompts[:2], completions[:2], reference_response=["x 0", "x 0"])
    assert won["metrics"]["mr_reward/win_rate"] == 1.0
    assert [scored.group.responses for scored in reward.last_scored] == [("a 1", "a 3")]
    none = call(reward, prompts[:2], completions[:2], reference_response=[None, None])
    assert math.isnan(none["metrics"]["mr_reward/win_rate"])
    assert call(reward, ["p", "p"], ["a 1", "b 2"], reference_response=[3, 3])["error"] == "GroupError"


def test_metrics_that_are_undefined_are_nan_but_logged(built: list[Any]) -> None:
    dropped = call(MultiResponseReward("folder", 2), ["p", "p"], ["drop", "drop cut"])["metrics"]
    assert tuple(dropped) == METRIC_KEYS
    assert dropped["mr_reward/dropped_groups"] == dropped["mr_reward/truncated_responses"] == 1.0
    assert math.isnan(dropped["mr_reward/score_mean"])
    assert math.isnan(dropped["mr_reward/score_length_correlation"])
    assert tuple(call(MultiResponseReward("folder", 2), [], [])["metrics"]) == METRIC_KEYS


def test_scorer_gets_whole_groups_with_images_and_names(built: list[Any]) -> None:
    prompts, completions = make_rows(12, 4)
    reward = MultiResponseReward("folder", 4)
    reward._scorer = WholeGroupScorer()
    reward(prompts, completions)
    (groups,) = reward._scorer.calls
    assert [group.id for group in groups] == ["group 0", "group 1", "group 2"]
    assert [len(group.images) for group in groups] == [1, 1, 1]
    assert groups[2].responses == tuple(completion[0]["content"] for completion in completions[8:])
    assert groups[0].messages == groups[1].messages != groups[2].messages
    call(reward, prompts, completions)
    assert reward._scorer.calls[1][0].id == "step 13 group 0"


def test_works_without_what_trl_adds(built: list[Any]) -> None:
    assert MultiResponseReward("folder", 2, reward="raw")(["p", "p"], ["1", "2"]) == [1.0, 2.0]
    assert MultiResponseReward("folder", 1)(["p", "q"], ["1", "2"]) == [0.0, 0.0]


def test_wrong_num_generations_is_refused(built: list[Any]) -> None:
    reward = MultiResponseReward("folder", 4)
    with pytest.raises(GroupAssemblyError, match="got 6 rows"):
        reward(["p"] * 6, ["1"] * 6)
    with pytest.raises(GroupAssemblyError, match="row 2 .* has another prompt"):
        reward(["p", "p", "q", "q"], ["1"] * 4)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (("folder", 0), {}, "num_generations is 0, expected a whole number from 1 on"),
        (("folder", 4.0), {}, "num_generations is 4.0"),
        (("folder", True), {}, "num_generations is True"),
        (("folder", 4), {"reward": "centered"}, "'centered', expected one of centred, raw, rank, win_rate"),
        (("folder", 4), {"over_length": "drop"}, "'drop', expected one of error, drop_group"),
    ],
)
def test_bad_options_are_refused_before_anything_is_loaded(
    built: list[Any], arguments: Any, options: Any, message: str
) -> None:
    with pytest.raises(ConfigurationError, match=message):
        MultiResponseReward(*arguments, **options)
    assert built == []


@pytest.mark.parametrize("four", [np.int64(4), np.uint8(4), torch.tensor(4)])
def test_whole_numbers_of_numpy_and_torch_are_numbers(built: list[Any], four: Any, tmp_path: Path) -> None:
    """As they come out of a table or a sweep."""
    reward = MultiResponseReward("folder", four, num_generations_eval=four)
    assert reward(["p"] * 4, list("1234")) == MultiResponseReward("folder", 4)(["p"] * 4, list("1234"))
    assert type(reward.num_generations) is type(reward.num_generations_eval) is int
    assert GroupLog(tmp_path, every=four).every == 4


def test_a_model_that_is_neither_folder_nor_reward_model_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="model is Linear, expected a folder"):
        MultiResponseReward(torch.nn.Linear(1, 1), 4)  # type: ignore[arg-type]


def test_options_reach_the_scorer(built: list[Any]) -> None:
    MultiResponseReward("folder", 4, dtype=torch.bfloat16, max_tokens_per_batch=99, num_orders=3, placement="offload")
    assert built == [
        (
            "folder",
            {
                "device": None,
                "dtype": torch.bfloat16,
                "max_tokens_per_batch": 99,
                "over_length": "drop_group",
                "num_orders": 3,
                "attn_implementation": None,
                "placement": "offload",
            },
        )
    ]


def test_default_device_follows_local_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert default_device() == torch.device("cuda:3")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert default_device() == torch.device("cpu")


def test_is_a_named_picklable_sync_function_for_trl(built: list[Any]) -> None:
    reward = MultiResponseReward("folder", 2, reward="rank", max_tokens_per_batch=99)
    assert reward.__name__ == "multi_response_reward"
    assert not isinstance(reward, torch.nn.Module)
    assert not inspect.iscoroutinefunction(reward.__call__)
    copy = pickle.loads(pickle.dumps(reward))
    assert built[1] == built[0]
    assert copy(["p", "p"], ["1", "2"]) == [0.0, 1.0]


def test_a_model_based_reward_pickles_the_model(built: list[Any]) -> None:
    model = torch.nn.Linear(2, 1)
    pickle.loads(pickle.dumps(MultiResponseReward(model, 2)))  # type: ignore[arg-type]
    assert torch.equal(built[1][0].weight, model.weight)


def test_failures_in_a_single_process_are_not_wrapped_but_named(built: list[Any]) -> None:
    reward = MultiResponseReward("folder", 1)
    with pytest.raises(ValueError, match="could not convert") as caught:
        call(reward, ["p"] * 10, ["text"] * 10)
    note = "mr_reward: failed while scoring, rank 0 at step 13 groups 0, 1, 2, 3, 4, 5, 6, 7 and 2 more: ValueError"
    assert caught.value.__notes__[0].startswith(note)


def test_phases_let_ctrl_c_pass_without_a_collective(monkeypatch: pytest.MonkeyPatch) -> None:
    exchange = Exchange()
    monkeypatch.setattr(exchange, "all_gather_objects", lambda obj: pytest.fail("a collective"))
    with pytest.raises(KeyboardInterrupt), exchange.fail_together("scoring"):
        raise KeyboardInterrupt


def test_phases_report_all_ranks_that_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    exchange = Exchange()
    monkeypatch.setattr(exchange, "all_gather_objects", lambda obj: [obj, ("rank 1: A", None), ("rank 2: B", None)])
    with pytest.raises(PeerRankError, match="2 of 3 ranks failed while scoring.*\nrank 1: A\nrank 2: B"):
        with exchange.fail_together("scoring"):
            pass


def test_zero3_config_is_hidden_and_restored() -> None:
    class Config:
        config: dict[str, Any] = {}

        def is_zero3(self) -> bool:
            return True

    config = Config()
    hf_deepspeed.set_hf_deepspeed_config(config)
    try:
        assert hf_deepspeed.is_deepspeed_zero3_enabled()
        with outside_zero3():
            assert not hf_deepspeed.is_deepspeed_zero3_enabled()
        assert hf_deepspeed.is_deepspeed_zero3_enabled()
        with pytest.raises(ConfigurationError, match="model is int, expected a folder, a hub id, the URL"):
            open_scorer(3)
        assert hf_deepspeed.is_deepspeed_zero3_enabled()
    finally:
        hf_deepspeed.unset_hf_deepspeed_config()
    with outside_zero3():
        assert not hf_deepspeed.is_deepspeed_zero3_enabled()


def test_the_light_import_stays_light() -> None:
    code = "import sys, mr_reward; assert not {'torch', 'trl', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
