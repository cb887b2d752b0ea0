"""Groups of every kind that a page has to show."""

from __future__ import annotations

from PIL import Image, ImageDraw

from mr_reward import ResponseGroup
from mr_reward.data.groups_file import ScoredGroup
from mr_reward.groups import GroupScores
from mr_reward.worlds.handwriting import make_groups

HOSTILE = [
    "<script>document.title='owned'</script>",
    "<img src=x onerror=\"document.title='owned'\">",
    "</div></td></table></details></main></body></html><h1>owned</h1>",
    "{{7*7}} {% raw %} ${7*7}",
    "javascript:document.title='owned'",
    "&lt;b&gt; \" ' ` \x00\x1b[31m \ud800 \u202eevil\u202c \u200b",
    "]]><!-- " + "A" * 3000,
]
ARABIC = ["الإجابة هي ٤٢", "42 هو الجواب (four) الصحيح", "התשובה היא 42", "answer: 42"]


def picture(text: str, size: tuple[int, int] = (96, 64), colour: str = "steelblue") -> Image.Image:
    image = Image.new("RGB", size, colour)
    ImageDraw.Draw(image).text((8, 8), text, fill="white")
    return image


def scored(group: ResponseGroup, scores: list[float] | None, **more: object) -> ScoredGroup:
    result: dict[str, object] = {
        "scores": None if scores is None else tuple(scores),
        "truncated": (False,) * group.num_responses,
    }
    training = {key: more.pop(key) for key in ("rewards", "step") if key in more}
    return ScoredGroup(group=group, result=GroupScores(**{**result, **more}), **training)  # type: ignore[arg-type]


def handwriting(count: int = 1) -> list[ScoredGroup]:
    groups = make_groups("test", count, num_digits=2, seed=3)
    return [scored(group, [float(-rank) for rank in group.rankings or ()]) for group in groups]


def every_kind() -> dict[str, list[ScoredGroup]]:
    """Name of a page -> its groups."""
    many = ResponseGroup(prompt="Sixteen?", responses=[f"answer number {i} " * (i + 1) for i in range(16)], id="16")
    images = [picture("first"), picture("second", (40, 120), "darkred"), picture("large", (1600, 900), "darkgreen")]
    turns = [
        {"role": "system", "content": "Compare carefully."},
        {
            "role": "user",
            "content": [{"type": "image"}, {"type": "text", "text": "and"}, {"type": "image"}, {"type": "image"}],
        },
    ]
    frames = [picture(str(i)) for i in range(6)]
    return {
        "handwriting": handwriting(),
        "several_images": [
            scored(ResponseGroup(prompt=turns, responses=["left", "right", "right"], images=images, id="i"), [1, 2, 2])
        ],
        "video": [
            scored(ResponseGroup(prompt="What happens?", responses=["it counts", ""], videos=[frames]), [0.5, -0.5])
        ],
        "sixteen": [scored(many, [float(i) for i in range(16)], truncated=(False,) * 15 + (True,))],
        "right_to_left": [scored(ResponseGroup(prompt="ما الجواب؟", responses=ARABIC, id="עברית"), [3, 2, 1, 0])],
        "hostile": [scored(ResponseGroup(prompt=HOSTILE[0], responses=HOSTILE, id=HOSTILE[1]), list(range(7)))],
        "step": [
            *handwriting(5),
            scored(ResponseGroup(prompt="p", responses=["a", "b"], id="flat"), [1.0, 1.0]),
            scored(ResponseGroup(prompt="p", responses=["a", "b"], id="gone"), None, drop_reason="over the budget"),
            scored(many, [float(i) for i in range(16)]),
        ],
    }
