"""What hypothesis draws: the texts that a policy can write, and groups of them with media."""

from __future__ import annotations

import os
import random
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from tiny_models import FAMILIES, family, random_image, random_video

from mr_reward import ResponseGroup

# A longer run: MR_REWARD_EXAMPLES=20 pytest tests/reliability
TIMES = int(os.environ.get("MR_REWARD_EXAMPLES", "1"))
SEPARATORS = ("<|resp_sep|>", "<|resp_<|resp_sep|>sep|>", "<image>", "[INST]", "</s>", "<s>", "<|eot_id|>")


def tried(examples: int) -> Any:
    """Settings with so many examples, `MR_REWARD_EXAMPLES` times; a forward of a model may take its time.

    The short run tries the same examples every time, so that nobody's change fails for another's bug; the longer ones
    look for new ones.
    """
    slow = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture]
    return settings(max_examples=examples * TIMES, deadline=None, suppress_health_check=slow, derandomize=TIMES == 1)


def control_strings(name: str) -> list[str]:
    """Every added and special token of a family's tokenizer, and some of other families."""
    tokenizer = family(name).tokenizer
    tokens = {str(token) for token in tokenizer.added_tokens_decoder.values()}
    return sorted(tokens | set(tokenizer.all_special_tokens) | set(SEPARATORS))


ALL_CONTROL_STRINGS = sorted({token for name in FAMILIES for token in control_strings(name)})
# All of Unicode, lone surrogates included, with more of what has gone wrong somewhere.
characters = st.one_of(
    st.characters(codec=None),
    st.sampled_from("\0\n\r\t \u200b\u200e\u202e\u2028\ufeff\ufffd\ue000\ud800\udc00<|>/_"),
)


def texts(max_size: int = 24) -> st.SearchStrategy[str]:
    """A text of plain pieces and control strings, whole, cut and nested; now and then a huge one."""
    control = st.sampled_from(ALL_CONTROL_STRINGS)
    cut = st.tuples(control, st.integers(0, 12)).map(lambda drawn: drawn[0][: drawn[1]])
    nested = st.tuples(control, control, st.integers(1, 8)).map(
        lambda drawn: drawn[0][: drawn[2]] + drawn[1] + drawn[0][drawn[2] :]
    )
    pieces = st.one_of(st.text(characters, max_size=max_size), control, cut, nested)
    joined = st.lists(pieces, max_size=4).map("".join)
    huge = st.tuples(pieces.filter(bool), st.integers(100, 600)).map(lambda drawn: (drawn[0] * drawn[1])[: drawn[1]])
    return st.one_of(joined, joined, joined, st.just(""), huge)


@st.composite
def groups(draw: st.DrawFn, name: str, *, max_responses: int = 64, ranked: bool = False) -> ResponseGroup:
    """A group for a family: N from 1 on, small ones more often, duplicates included, media if the family sees them."""
    count = draw(st.one_of(st.integers(1, 6), st.integers(1, max_responses)))
    pool = draw(st.lists(texts(), min_size=1, max_size=min(count, 8)))
    # Numbered copies make many different responses from few draws; without a number they are duplicates.
    responses = [
        pool[i % len(pool)] + (f" {i}" if i >= len(pool) and draw(st.booleans()) else "") for i in range(count)
    ]
    rng = random.Random(draw(st.integers(0, 2**16)))
    images = videos = 0
    if family(name).sees_images:
        images = draw(st.sampled_from([0, 0, 1, 2]))
        # Molmo2 takes no images beside a video, and one video.
        videos = draw(st.sampled_from([0, 0, 1])) if not images or name != "molmo2" else 0
    prompt: list[dict[str, Any]] = [{"type": "image"}] * images + [{"type": "video"}] * videos
    prompt.append({"type": "text", "text": draw(texts())})
    return ResponseGroup(
        prompt=[{"role": "user", "content": prompt}],
        responses=responses,
        rankings=[1 + rng.randrange(2) * (i > 0) for i in range(count)] if ranked else None,
        images=[random_image(rng) for _ in range(images)],
        videos=[random_video(rng, 4) for _ in range(videos)],
        id=f"drawn {rng.randrange(1000)}",
    )
