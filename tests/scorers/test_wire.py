"""The results on the wire: nothing of `GroupScores` gets lost, and the version before understands it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import httpx2
import pytest
from http_server import running
from tiny_models import reward_model

from mr_reward import GroupScorer, ResponseGroup
from mr_reward.groups import GroupScores
from mr_reward.scorers import RemoteScorer
from mr_reward.scorers.wire import WireResult, dump
from mr_reward.serving import build_app

GROUP = ResponseGroup(prompt="2 + 2?", responses=["4", "5"])


@pytest.mark.parametrize(
    "scored",
    [
        GroupScores(scores=(1.5, -2.0), truncated=(False, True), order_spread=0.25, order_flip_rate=0.5),
        GroupScores(scores=(1.0, 1.0), truncated=(False, False), order_flip_rate=0.0),
        GroupScores(scores=None, truncated=(False, False), drop_reason="over the token budget"),
    ],
)
def test_every_field_comes_back(scored: GroupScores) -> None:
    row = json.loads(dump(WireResult.of("7", scored)))
    assert row == {"id": "7", **scored.to_dict()} and set(row) == {"id", *(field.name for field in fields(scored))}
    assert WireResult.model_validate(row).scored(GROUP) == scored


@pytest.mark.parametrize(
    "row",
    [
        {"scores": [1.0], "truncated": [False, False]},
        {"scores": [1.0, 2.0], "truncated": [False]},
        {"scores": None, "truncated": [False, False]},
        {"scores": ["1", "2"]},
        {"scores": {"a": 1.0}},
        {"scores": [1.0, 2.0], "order_spread": "much"},
        {"scores": [1.0, 2.0], "order_flip_rate": [0.5]},
        {"truncated": [False, False]},
    ],
)
def test_what_is_no_result_is_a_value_error(row: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        WireResult.model_validate({"id": "0", **row}).scored(GROUP)


def test_the_flip_rate_arrives() -> None:
    scorer = GroupScorer(reward_model("llama", "causal"), num_orders=4)
    groups = [ResponseGroup(prompt="?", responses=["a", "bb", "ccc"]), GROUP]
    with running(build_app(scorer)) as url:
        remote = RemoteScorer(url, deadline=30.0)
        found = remote.score_detailed(groups)
        remote.close()
    expected = scorer.score_detailed(groups)
    assert [one.order_flip_rate for one in found] == [one.order_flip_rate for one in expected]
    assert all(one.order_flip_rate is not None for one in found)


# Version 0.1.0, whose messages refuse keys that they do not know.
OLD_REQUEST = {
    "request_id": "1f",
    "groups": [
        {
            "id": "0",
            "name": None,
            "messages": [{"role": "user", "content": [{"type": "text", "text": "2 + 2?"}]}],
            "responses": ["4", "5"],
            "images": [],
            "videos": [],
        }
    ],
}
OLD_RESULT = {
    "id": "0",
    "scores": [1.5, -2.0],
    "truncated": [False, True],
    "order_spread": 0.25,
    "order_flip_rate": None,
    "drop_reason": None,
}
OLD_HEALTH = {
    "status": "ok",
    "version": "0.1.0",
    "model_hash": "00ff00ff00ff00ff",
    "layout": "set",
    "options": {"max_tokens_per_batch": 16384, "num_orders": 1, "over_length": "drop_group"},
    "max_groups": 256,
    "max_request_bytes": 67108864,
    "pending_groups": 0,
}


def test_a_client_of_the_version_before_understands_the_server() -> None:
    scorer = GroupScorer(reward_model("llama"))
    with running(build_app(scorer)) as url:
        health = httpx2.get(url + "/health").json()
        answer = httpx2.post(url + "/v1/score", json=OLD_REQUEST).json()
    assert set(health) == set(OLD_HEALTH) and set(health["options"]) == set(OLD_HEALTH["options"])  # type: ignore[call-overload]
    assert set(answer) == {"request_id", "model_hash", "options", "results"} and answer["request_id"] == "1f"
    assert set(answer["results"][0]) == set(OLD_RESULT)
    assert answer["results"][0]["scores"] == pytest.approx(scorer.score([GROUP])[0], abs=1e-6)


def test_a_server_of_the_version_before_is_understood() -> None:
    async def old(scope: dict[str, Any], receive: Callable[..., Any], send: Callable[..., Any]) -> None:
        if scope["type"] != "http":
            return
        answer: dict[str, Any] = OLD_HEALTH
        if scope["path"] == "/v1/score":
            request = json.loads((await receive())["body"])
            assert {**request, "request_id": "1f"} == OLD_REQUEST
            same = {key: OLD_HEALTH[key] for key in ("model_hash", "options")}
            answer = {**same, "request_id": request["request_id"], "results": [OLD_RESULT]}
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": json.dumps(answer).encode()})

    with running(old) as url:
        remote = RemoteScorer(url, deadline=10.0)
        (found,) = remote.score_detailed([GROUP])
        remote.close()
    assert found == GroupScores(scores=(1.5, -2.0), truncated=(False, True), order_spread=0.25)
