"""The reward endpoint of OpenRLHF: `--reward.remote_url http://host:port/get_reward`.

OpenRLHF 0.11.2 (`openrlhf/utils/agent.py`, `SingleTurnAgentExecutor`) posts each rollout by itself as soon as it is
written: `{"query": [prompt + response], "prompts": [prompt], "labels": [label]}`, and reads `rewards`, `scores` and
`extra_logs` of the answer. It waits 180 seconds and asks up to five times. The endpoint holds each post until the
group is whole.

Also what `mr_reward.integrations.verl.compute_score_single` talks to.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request, Response
from pydantic import BaseModel, Field

from mr_reward.errors import MRRewardError, shown
from mr_reward.groups import ResponseGroup
from mr_reward.integrations.collector import GroupCollector
from mr_reward.model.scorer import GroupScorer
from mr_reward.scorers.wire import explain
from mr_reward.serving.batcher import Batcher
from mr_reward.serving.server import ServerLimits

logger = logging.getLogger(__name__)


class _Label(BaseModel):
    """What a label may hold to say more than the trainer does."""

    id: str | int | None = None
    prompt: str | list[dict[str, Any]] | None = None
    images: list[str] = Field(default_factory=list)


class _Post(BaseModel):
    query: list[str] = Field(min_length=1)
    prompts: list[str]
    labels: list[Any]


def build_collecting_app(
    scorer: GroupScorer,
    *,
    num_generations: int,
    reward: str = "centred",
    deadline: float = 170.0,  # seconds that a rollout waits for its group; below the trainer's own 180
    media_root: Path | None = None,
    limits: ServerLimits | None = None,
) -> FastAPI:
    """The endpoint as an ASGI application: `POST /get_reward` and `GET /health`.

    A label that is a JSON object may name the group (`id`), give the prompt as chat messages (`prompt`) and the paths
    of its images (`images`); without one the group is named by the prompt's text, which is then what is judged, chat
    template and all. With `id` two groups of one prompt are kept apart. Nothing else may use the scorer at the same
    time. Images may not lie outside of `media_root`; without one they are refused.
    """
    limits = limits or ServerLimits()
    batcher = Batcher(scorer.score_detailed, max_wait=limits.max_wait, max_pending=limits.max_pending)
    collector = GroupCollector(batcher, num_generations=num_generations, reward=reward, deadline=deadline)
    tokenizer = getattr(scorer.model.processor, "tokenizer", scorer.model.processor)
    endings = [token for token in (tokenizer.eos_token, tokenizer.pad_token, *_CHAT_ENDINGS) if token]

    app = FastAPI(lifespan=batcher.running, openapi_url=None, docs_url=None, redoc_url=None)

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> Response:  # a bug; uvicorn logs it
        return _answer({"error": f"{type(error).__name__} in the server; its log has the details"}, 500)

    @app.get("/health")
    def health() -> Response:
        return _answer({"status": "ok", "waiting_rollouts": collector.num_waiting, "num_generations": num_generations})

    @app.post("/get_reward")
    async def get_reward(request: Request) -> Response:
        if int(request.headers.get("content-length") or limits.max_request_bytes + 1) > limits.max_request_bytes:
            return _answer({"error": f"a request may have {limits.max_request_bytes} bytes"}, 413)
        try:
            post = _Post.model_validate(json.loads(await request.body()))
            rollouts = _read(post, endings, media_root)
        except (MRRewardError, ValueError) as error:  # pydantic's own is a ValueError
            return _answer({"error": f"{type(error).__name__}: {explain(error)}"}, 422)
        try:
            rewards = await _together(collector, rollouts, request)
        except MRRewardError as error:
            logger.warning("%s", error)
            return _answer({"error": f"{type(error).__name__}: {error}"}, 422)
        return _answer({"rewards": rewards, "scores": rewards, "extra_logs": {}})

    return app


# With which a policy of another family than the reward model may end its turn.
_CHAT_ENDINGS = ("<|im_end|>", "<|endoftext|>", "<|eot_id|>", "</s>", "<end_of_turn>")


def response_of(query: str, prompt: str, endings: Sequence[str]) -> str:
    """The response in what OpenRLHF sends: prompt and response as one text, control tokens included.

    >>> response_of("<s>2 + 2? 4</s>", "2 + 2?", ["</s>"])
    ' 4'
    """
    place = query.find(prompt)
    if place < 0:
        raise ValueError(
            f"the query {query[:80]!r} does not hold its prompt {prompt[:80]!r}; the policy's tokenizer does not "
            "give the prompt back as it was, or cut it"
        )
    response = query[place + len(prompt) :]
    while ending := next((token for token in endings if response.endswith(token)), None):
        response = response.removesuffix(ending)
    return response


def _read(post: _Post, endings: Sequence[str], media_root: Path | None) -> list[ResponseGroup]:
    if not len(post.query) == len(post.prompts) == len(post.labels):
        raise ValueError(
            f"got {len(post.query)} queries, {len(post.prompts)} prompts and {len(post.labels)} labels, expected "
            "as many of each"
        )
    rollouts = []
    for query, prompt, label in zip(post.query, post.prompts, post.labels, strict=True):
        told = _read_label(label)
        rollout = ResponseGroup(
            prompt=told.prompt if told.prompt is not None else prompt,
            responses=[response_of(query, prompt, endings)],
            id=str(told.id) if told.id is not None else prompt,
            images=told.images,
        )
        # Of the whole group: blocks of the prompt may name files too.
        images = [_image(str(image), media_root) for image in rollout.images]
        videos = [[_image(str(frame), media_root) for frame in video] for video in rollout.videos]
        rollouts.append(replace(rollout, prompt=rollout.messages, images=images, videos=videos))
    return rollouts


def _image(name: str, root: Path | None) -> Path:
    if root is None:
        raise ValueError(
            f"the label names the image {shown(name)}, but the server was started without a folder of images"
        )
    path = (root / name).resolve()
    if not path.is_relative_to(root.resolve()) or not path.is_file():
        raise ValueError(f"the image {shown(name)} is no file in the server's folder of images")
    return path


def _read_label(label: Any) -> _Label:
    """What a label says; one that is no object is the trainer's own and says nothing here."""
    if isinstance(label, str) and label.lstrip().startswith("{"):
        try:
            label = json.loads(label)
        except ValueError:
            return _Label()
    return _Label.model_validate(label) if isinstance(label, dict) else _Label()


async def _together(collector: GroupCollector, rollouts: Sequence[ResponseGroup], request: Request) -> list[float]:
    """Rewards of a post; if the trainer hangs up, its rollouts are taken back."""

    async def until_disconnected() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    rewards = asyncio.gather(*(collector.reward(rollout) for rollout in rollouts))
    gone = asyncio.ensure_future(until_disconnected())
    both: list[asyncio.Future[Any]] = [rewards, gone]
    try:
        await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
        if not rewards.done():
            rewards.cancel()
            await asyncio.wait([rewards])
            raise MRRewardError("the trainer hung up before its groups were whole")
        return rewards.result()
    finally:
        gone.cancel()


def _answer(content: dict[str, Any], status: int = 200) -> Response:
    return Response(json.dumps(content), status, media_type="application/json")
