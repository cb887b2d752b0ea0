"""The adapters, called as their trainers call them, against `MultiResponseReward`."""

from __future__ import annotations

import asyncio
import json
import random
import re
import sys
import threading
import time
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from http_server import running
from tiny_models import random_image, random_text, reward_model

from mr_reward import GroupScorer, MultiResponseReward
from mr_reward.errors import ConfigurationError, GroupAssemblyError, GroupError, MRRewardError, ScoringServerError
from mr_reward.groups import ResponseGroup
from mr_reward.integrations import verl
from mr_reward.integrations.ms_swift import register
from mr_reward.integrations.openrlhf import build_collecting_app, response_of
from mr_reward.integrations.verl import compute_score, compute_score_single
from mr_reward.serving import ServerLimits, build_app

N = 4
SAME = 1e-5  # the batches of a call differ, so the last bits do


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("integrations")
    reward_model("qwen3_vl", "set").save_pretrained(folder / "rm")
    rng = random.Random(2)
    (folder / "images").mkdir()
    for i in range(3):
        random_image(rng).save(folder / "images" / f"{i}.png")
    return folder


class Rows:
    """Five prompts with N responses each; the first and the last have the same text and other images."""

    def __init__(self, folder: Path, seed: int = 0) -> None:
        rng = random.Random(seed)
        texts = ["same", *(random_text(rng, shortest=3) for _ in range(3)), "same"]
        images: list[list[str]] = [["0.png"], [], ["1.png", "2.png"], [], ["1.png"]]
        self.prompts = [text for text in texts for _ in range(N)]
        self.images = [[str(folder / "images" / name) for name in names] for names in images for _ in range(N)]
        self.index = [i for i in range(len(texts)) for _ in range(N)]
        self.responses = [random_text(rng, shortest=1) for _ in self.prompts]

    def expected(self, folder: Path, reward: str = "centred") -> list[float]:
        judge = MultiResponseReward(folder / "rm", N, reward=reward)
        prompts = [[{"role": "user", "content": text}] for text in self.prompts]
        return [value or 0.0 for value in judge(prompts, self.responses, images=self.images)]


# verl


def test_verl_batch(folder: Path) -> None:
    """verl 0.9.1, verl/workers/reward_manager/batch.py: `BatchRewardManager.verify`, rows in any order."""
    rows = Rows(folder)
    order = random.Random(3).sample(range(len(rows.prompts)), len(rows.prompts))
    infos = [
        {"index": rows.index[i], "prompt": rows.prompts[i], "images": rows.images[i], "rollout_reward_scores": {}}
        for i in range(len(rows.prompts))
    ]
    given: dict[str, Any] = {"model": str(folder / "rm"), "num_generations": N}
    for reward in ("centred", "rank"):
        scores = compute_score(
            data_sources=["mine"] * len(order),
            solution_strs=[rows.responses[i] for i in order],
            ground_truths=[None] * len(order),
            extra_infos=[infos[i] for i in order],
            **given,
            reward=reward,
        )
        expected = rows.expected(folder, reward)
        assert [row["score"] for row in scores] == pytest.approx([expected[i] for i in order], abs=SAME)
        assert all(set(row) == {"score", "mr_reward_score"} for row in scores)
        raw = rows.expected(folder, "raw")
        assert [row["mr_reward_score"] for row in scores] == pytest.approx([raw[i] for i in order], abs=SAME)
    with running(build_app(GroupScorer.from_pretrained(folder / "rm"))) as url:
        scores = compute_score(["mine"] * N, rows.responses[:N], [None] * N, infos[:N], server=url, num_generations=N)
        assert [row["score"] for row in scores] == pytest.approx(rows.expected(folder)[:N], abs=SAME)
    with pytest.raises(GroupAssemblyError, match="prompt 0 has 3 rollouts in this call"):
        compute_score(["mine"] * 3, rows.responses[:3], [None] * 3, infos[:3], **given)
    with pytest.raises(GroupError, match="extra_info lacks prompt"):
        compute_score(["mine"], ["a"], [None], [{"index": 0}], **given)
    with pytest.raises(GroupError, match="either model or server"):
        compute_score(["mine"] * N, rows.responses[:N], [None] * N, infos[:N], num_generations=N)


def colliding(folder: Path, seed: int) -> tuple[list[dict[str, Any]], list[str], dict[tuple[Any, ...], list[int]]]:
    """Rows of several files that each number theirs from 0: infos, responses, and the rows of each prompt."""
    rng = random.Random(seed)
    pictures = [str(folder / "images" / f"{i}.png") for i in range(2)]
    # Two texts and two images under each index; a prompt without an image too.
    prompts = [(text, images) for text in ("P?", "Q?") for images in ([], pictures[:1], pictures[1:])]
    infos = [
        {"index": index, "prompt": text, "images": images}
        for index in range(2)
        for text, images in prompts
        for _ in range(N)
    ]
    rng.shuffle(infos)
    rows: dict[tuple[Any, ...], list[int]] = {}
    for i, info in enumerate(infos):
        rows.setdefault((info["index"], info["prompt"], tuple(info["images"])), []).append(i)
    return infos, [random_text(rng, shortest=1) for _ in infos], rows


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_two_prompts_of_one_index_are_two_groups(folder: Path, collecting: str, seed: int) -> None:
    """verl's scripts number the rows of each file from 0: in a batch, and at the server that collects."""
    infos, responses, rows = colliding(folder, seed)
    scorer = GroupScorer.from_pretrained(folder / "rm")
    expected = [0.0] * len(infos)
    for own in rows.values():
        info = infos[own[0]]
        group = ResponseGroup(prompt=info["prompt"], responses=[responses[i] for i in own], images=info["images"])
        (scores,) = scorer.score([group])
        assert scores is not None
        for i, score in zip(own, scores, strict=True):
            expected[i] = score - sum(scores) / N
    none = [None] * len(infos)
    found = compute_score(["mine"] * len(infos), responses, none, infos, model=str(folder / "rm"), num_generations=N)
    assert [row["score"] for row in found] == pytest.approx(expected, abs=SAME)

    async def one(i: int) -> float:
        info = infos[i] | {"images": [Path(image).name for image in infos[i]["images"]]}
        return await compute_score_single("mine", responses[i], None, info, server=collecting)

    async def all_of_them() -> list[float]:
        return list(await asyncio.gather(*map(one, range(len(infos)))))

    assert asyncio.run(all_of_them()) == pytest.approx(expected, abs=SAME)


def test_a_batch_that_is_no_whole_groups_of_one_prompt_names_its_rows(folder: Path) -> None:
    """Also where the number of rows of an index is right: P P P Q are no four rollouts of one prompt."""
    infos = [{"index": 0, "prompt": prompt} for prompt in "PPQP"]
    given: dict[str, Any] = {"model": str(folder / "rm"), "num_generations": 4}
    message = r"prompt 0 has 3 rollouts in this call, rows 0, 1, 3 \(the id 0 stands at 2 different prompts\)"
    with pytest.raises(GroupAssemblyError, match=message):
        compute_score(["mine"] * 4, list("abcd"), [None] * 4, infos, **given)
    pictures = [{"index": 0, "prompt": "P", "images": [str(folder / "images" / f"{i}.png")]} for i in (0, 1)]
    with pytest.raises(GroupAssemblyError, match=r"prompt 0 has 1 rollouts in this call, rows 0 \("):
        compute_score(["mine"] * 2, list("ab"), [None] * 2, pictures, **{**given, "num_generations": 2})
    for size in (0, 2.0, True, "2"):
        with pytest.raises(ConfigurationError, match="num_generations is .*expected a whole number from 1 on"):
            compute_score(["mine"] * 4, list("abcd"), [None] * 4, infos, **{**given, "num_generations": size})


# The endpoint that collects


@pytest.fixture(scope="module")
def collecting(folder: Path) -> Iterator[str]:
    scorer = GroupScorer.from_pretrained(folder / "rm")
    app = build_collecting_app(scorer, num_generations=N, deadline=3.0, media_root=folder / "images")
    with running(app) as url:
        yield url


async def openrlhf_post(url: str, query: str, prompt: str, label: Any) -> dict[str, Any]:
    """OpenRLHF 0.11.2, openrlhf/utils/agent.py: `_fetch_rewards_via_http` with one query, one try."""
    async with httpx2.AsyncClient(timeout=180) as session:
        response = await session.post(
            url + "/get_reward", json={"query": [query], "prompts": [prompt], "labels": [label]}
        )
        response.raise_for_status()
        return dict(response.json())


def label_of(rows: Rows, i: int) -> str:
    images = [Path(image).name for image in rows.images[i]]
    return json.dumps({"id": rows.index[i], "prompt": rows.prompts[i], "images": images})


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_openrlhf_posts_each_rollout_by_itself(folder: Path, collecting: str, seed: int) -> None:
    """All at once, in random order, prompt and response as one text with the policy's control tokens."""
    rows = Rows(folder, seed)
    order = random.Random(seed).sample(range(len(rows.prompts)), len(rows.prompts))

    async def all_of_them() -> list[dict[str, Any]]:
        posts = []
        for i in order:
            prompt = f"<|im_start|>user\n{rows.prompts[i]}<|im_end|>\n<|im_start|>assistant\n"
            posts.append(
                openrlhf_post(collecting, f"{prompt}{rows.responses[i]}<|im_end|>", prompt, label_of(rows, i))
            )
        return list(await asyncio.gather(*posts))

    answers = asyncio.run(all_of_them())
    expected = rows.expected(folder)
    for key in ("rewards", "scores"):
        assert [answer[key][0] for answer in answers] == pytest.approx([expected[i] for i in order], abs=SAME)
    assert all(answer["extra_logs"] == {} for answer in answers)


def test_without_a_label_the_prompt_text_names_the_group(folder: Path, collecting: str) -> None:
    rows = Rows(folder)
    chosen = range(N, 2 * N)  # a prompt without images

    async def posts() -> list[dict[str, Any]]:
        pairs = [(rows.prompts[i], rows.responses[i]) for i in chosen]
        return list(await asyncio.gather(*(openrlhf_post(collecting, p + r, p, "42") for p, r in pairs)))

    found = [answer["rewards"][0] for answer in asyncio.run(posts())]
    assert found == pytest.approx(rows.expected(folder)[N : 2 * N], abs=SAME)


def test_verl_reward_loop_from_several_threads(folder: Path, collecting: str) -> None:
    """verl 0.9.1, verl/experimental/reward_loop: workers of their own, each awaits the function for one rollout."""
    rows = Rows(folder, 7)
    found: dict[int, float] = {}

    def worker(mine: list[int]) -> None:
        async def one(i: int) -> None:
            images = [Path(image).name for image in rows.images[i]]
            found[i] = await compute_score_single(
                data_source="mine",
                solution_str=rows.responses[i],
                ground_truth=None,
                extra_info={"index": f"t{rows.index[i]}", "prompt": rows.prompts[i], "images": images},
                server=collecting,
            )

        async def all_of_mine() -> None:
            await asyncio.gather(*map(one, mine))

        asyncio.run(all_of_mine())

    order = random.Random(9).sample(range(len(rows.prompts)), len(rows.prompts))
    threads = [threading.Thread(target=worker, args=(order[i::3],)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert [found[i] for i in range(len(rows.prompts))] == pytest.approx(rows.expected(folder), abs=SAME)


def test_a_group_that_never_gets_whole_is_told_in_time(collecting: str) -> None:
    info = {"index": "alone", "prompt": "?"}
    started = time.perf_counter()
    with pytest.raises(ScoringServerError, match=f"1 of {N} rollouts came within 3 s; give"):
        asyncio.run(compute_score_single("mine", "a", None, info, server=collecting))
    assert time.perf_counter() - started < 20
    assert httpx2.get(collecting + "/health").json()["waiting_rollouts"] == 0


def test_rollouts_of_one_id_with_other_prompts_are_told(collecting: str) -> None:
    """They are no group, however many there are, and each says why."""

    async def posts() -> list[Any]:
        infos = [{"index": "mixed", "prompt": f"prompt {min(i, 2)}"} for i in range(N)]  # one, one and two
        calls = (compute_score_single("mine", "a", None, info, server=collecting) for info in infos)
        return await asyncio.gather(*calls, return_exceptions=True)

    found = [str(one) for one in asyncio.run(posts())]
    told = rf"[12] of {N} rollouts came within 3 s \(more of this id came with another prompt or image\)"
    assert all(re.search(told, text) for text in found), found
    assert httpx2.get(collecting + "/health").json()["waiting_rollouts"] == 0


def test_a_trainer_that_hangs_up_and_asks_again_counts_once(folder: Path, collecting: str) -> None:
    rows = Rows(folder)
    info = {"index": "again", "prompt": rows.prompts[N]}

    async def scenario() -> list[float]:
        given_up = asyncio.create_task(
            compute_score_single("mine", rows.responses[N], None, info, server=collecting, timeout=0.5)
        )
        with pytest.raises(ScoringServerError):
            await given_up
        for _ in range(100):
            if httpx2.get(collecting + "/health").json()["waiting_rollouts"] == 0:
                break
            await asyncio.sleep(0.05)
        tasks = [
            compute_score_single("mine", rows.responses[i], None, info, server=collecting) for i in range(N, 2 * N)
        ]
        return list(await asyncio.gather(*tasks))

    assert asyncio.run(scenario()) == pytest.approx(rows.expected(folder)[N : 2 * N], abs=SAME)


@pytest.mark.parametrize("error", [TypeError, KeyError, ValueError, RuntimeError])
def test_a_failure_of_the_scorer_reaches_every_rollout_at_once(error: type[Exception]) -> None:
    """Also one that is a bug: all that wait get it, and not at the deadline."""
    scorer = GroupScorer(reward_model("llama"))

    def fail(groups: Any) -> Any:
        raise error("a bug")

    scorer.score_detailed = fail  # type: ignore[method-assign]
    info = {"index": "a", "prompt": "?"}
    with running(build_collecting_app(scorer, num_generations=N, deadline=60.0)) as url:

        async def posts() -> list[Any]:
            calls = (compute_score_single("mine", str(i), None, info, server=url) for i in range(N))
            return await asyncio.gather(*calls, return_exceptions=True)

        started = time.perf_counter()
        found = asyncio.run(posts())
        assert time.perf_counter() - started < 20
        assert [type(one) for one in found] == [ScoringServerError] * N
        assert all(error.__name__ in str(one) for one in found), found
        assert httpx2.get(url + "/health").json()["waiting_rollouts"] == 0


def test_a_group_that_is_scored_too_slowly_is_not_said_to_lack_rollouts() -> None:
    scorer = GroupScorer(reward_model("llama"))
    original = scorer.score_detailed
    scorer.score_detailed = lambda groups: (time.sleep(1.5), original(groups))[1]  # type: ignore[method-assign]
    info = {"index": "a", "prompt": "?"}
    with running(build_collecting_app(scorer, num_generations=1, deadline=0.5)) as url:
        with pytest.raises(ScoringServerError, match="all 1 rollouts came, but were not scored within"):
            asyncio.run(compute_score_single("mine", "a", None, info, server=url))


def label_with(kind: str, medium: Any) -> dict[str, Any]:
    """A label whose prompt carries a medium in a block of its own."""
    return {"prompt": [{"role": "user", "content": [{"type": kind, kind: medium}]}]}


def test_bad_posts_are_refused(collecting: str, tmp_path: Path) -> None:
    elsewhere = str(tmp_path / "image.png")
    random_image(random.Random(0)).save(elsewhere)
    for body, message in (
        ({"query": ["ab"], "prompts": ["x"], "labels": [""]}, "does not hold its prompt"),
        ({"query": ["ab"], "prompts": [], "labels": [""]}, "expected as many of each"),
        ({"query": []}, "query"),
        ({"query": ["ab"], "prompts": ["a"], "labels": [{"images": ["../rm/config.json"]}]}, "is no file in"),
        ({"query": ["ab"], "prompts": ["a"], "labels": [{"images": ["/etc/hostname"]}]}, "is no file in"),
        ({"query": ["ab"], "prompts": ["a"], "labels": [label_with("image", elsewhere)]}, "is no file in"),
        ({"query": ["ab"], "prompts": ["a"], "labels": [label_with("video", [elsewhere] * 2)]}, "is no file in"),
    ):
        answer = httpx2.post(collecting + "/get_reward", json=body)
        assert answer.status_code == 422 and message in answer.json()["error"], answer.text
    assert httpx2.post(collecting + "/get_reward", content=b"{").status_code == 422
    assert httpx2.get(collecting + "/health").json()["waiting_rollouts"] == 0


def test_a_request_may_be_as_large_as_the_limit() -> None:
    scorer = GroupScorer(reward_model("llama"))
    body = json.dumps({"query": ["ab"], "prompts": ["a"], "labels": [None]}).encode()
    app = build_collecting_app(scorer, num_generations=1, limits=ServerLimits(max_request_bytes=len(body)))
    with running(app) as url:
        statuses = [httpx2.post(url + "/get_reward", content=sent).status_code for sent in (body, body + b" ")]
    assert statuses == [200, 413]


def test_verl_opens_a_model_once_and_cuts_what_is_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes no missing reward, so a group is not to be dropped."""
    opened: list[Any] = []
    monkeypatch.setattr(verl, "open_scorer", lambda *given, **options: opened.append((given, options)) or object())
    verl._scorer.cache_clear()
    found = [verl._scorer(*given) for given in (("a", None), ("b", None), ("a", None), (None, "http://a"))]
    assert found[0] is found[2] and len({id(one) for one in found}) == 3
    assert opened == [
        (("a",), {"over_length": "truncate_responses"}),
        (("b",), {"over_length": "truncate_responses"}),
        (("http://a",), {}),
    ]
    verl._scorer.cache_clear()


def test_settings_are_checked() -> None:
    scorer = GroupScorer(reward_model("llama"))
    for options in ({"num_generations": 0}, {"num_generations": True}, {"reward": "best"}, {"deadline": 0.0}):
        with pytest.raises(ConfigurationError):
            build_collecting_app(scorer, **{"num_generations": 2, **options})  # type: ignore[arg-type]


def test_the_response_is_what_stands_behind_the_prompt() -> None:
    assert response_of("<bos>Q? A</s></s>", "Q?", ["</s>"]) == " A"
    assert response_of("Q?", "Q?", ["</s>"]) == ""
    assert response_of("Q? say </s> twice", "Q?", ["</s>"]) == " say </s> twice"
    assert response_of("<s>Q? You ask: Q?", "Q?", ["</s>"]) == " You ask: Q?", "a response may repeat the prompt"
    assert response_of("Q? A</s><pad><pad>", "Q?", ["</s>", "<pad>"]) == " A"


# ms-swift


def test_ms_swift(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ms-swift 4.6.0: `orms` of swift/rewards/orm.py, called as swift/rl_core/grpo_algorithm.py does."""

    class ORM:
        def __init__(self, args: Any = None, **kwargs: Any) -> None:
            self.args = args

    orm = types.ModuleType("swift.rewards.orm")
    orm.ORM, orm.orms = ORM, {}  # type: ignore[attr-defined]
    for name, module in {"swift": types.ModuleType("swift"), "swift.rewards": types.ModuleType("r")}.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setitem(sys.modules, "swift.rewards.orm", orm)
    register(folder / "rm")
    arguments = types.SimpleNamespace(num_generations=N, num_generations_eval=None)
    reward_func = orm.orms["multi_response_reward"](args=arguments)  # type: ignore[attr-defined]
    rows = Rows(folder)
    columns = {
        "messages": [
            [
                {"role": "user", "content": "<image>" * len(images) + prompt},
                {"role": "assistant", "content": response},
            ]
            for prompt, images, response in zip(rows.prompts, rows.images, rows.responses, strict=True)
        ],
        "images": [[{"bytes": None, "path": image} for image in images] for images in rows.images],
        "trainer_state": None,
    }
    assert reward_func(rows.responses, **columns) == pytest.approx(rows.expected(folder), abs=SAME)
    tools = [[{"type": "function", "function": {"name": "add", "parameters": {}}}]] * len(rows.prompts)
    with pytest.raises(
        MRRewardError, match="tools|template"
    ):  # the tiny template cannot write them: they came through
        reward_func(rows.responses, **{**columns, "tools": tools})
    reward_func(rows.responses, **{**columns, "trainer_state": types.SimpleNamespace(global_step=7)})
    assert reward_func.reward.last_scored[0].group.id == "step 8 group 0"
    arguments.num_generations_eval = 3
    assert orm.orms["multi_response_reward"](args=arguments).reward.num_generations_eval == 3  # type: ignore[attr-defined]
    with pytest.raises(MRRewardError, match="ms-swift passed no messages"):
        reward_func(rows.responses)
