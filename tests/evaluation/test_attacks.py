"""Attacks change one bad response and nothing else, and what they do is measured as a naive loop measures it."""

from __future__ import annotations

import json
import math
import random
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from tiny_models import reward_model
from typer.testing import CliRunner

from mr_reward import ResponseGroup
from mr_reward.checkpoint.card import write_model_card
from mr_reward.cli.app import app
from mr_reward.data.degenerate import MASTER_KEYS
from mr_reward.data.groups_file import save_preferences
from mr_reward.errors import ConfigurationError, GroupError
from mr_reward.evaluation.attacks import ATTACKS, attack_items, run_attacks
from mr_reward.groups import GroupScores

TOKENS = ["<|im_end|>", "<|image_pad|>"]


class FormulaScorer:
    """Scores by a formula of the response and its group; keeps what it was given."""

    def __init__(self, formula: Callable[[ResponseGroup, str], float], drop: str | None = None) -> None:
        self.formula, self.drop = formula, drop
        self.calls: list[list[ResponseGroup]] = []

    def score_detailed(self, groups: Sequence[ResponseGroup]) -> list[GroupScores]:
        self.calls.append(list(groups))
        return [
            GroupScores(
                scores=None
                if self.drop is not None and any(self.drop in text for text in group.responses)
                else tuple(self.formula(group, text) for text in group.responses),
                truncated=(False,) * group.num_responses,
            )
            for group in groups
        ]


def by_length(group: ResponseGroup, text: str) -> float:
    return float(len(text))


def ranked_groups(count: int = 20) -> list[ResponseGroup]:
    """Good answers are longer, by different amounts."""
    return [
        ResponseGroup(
            prompt=f"{i}?", responses=["bad", f"the good answer {'x' * i}", "worst"], rankings=[2, 1, 3], id=str(i)
        )
        for i in range(count)
    ]


@pytest.mark.parametrize("name", ATTACKS)
def test_only_the_bad_response_is_changed(name: str) -> None:
    scorer = FormulaScorer(by_length)
    items = attack_items(ranked_groups())
    run_attacks(scorer, items, names=[name], control_tokens=TOKENS)
    before, after = scorer.calls
    for item, plain, attacked in zip(items, before, after, strict=True):
        assert plain is item.group
        assert item.group.rankings is not None and item.group.rankings[item.bad] > item.group.rankings[item.good] == 1
        assert attacked.messages == plain.messages and attacked.rankings is None
        for i, (text, other) in enumerate(zip(plain.responses, attacked.responses, strict=False)):
            if i != item.bad or name == "duplicates":
                assert other == text
            else:
                assert other != text
        if name == "duplicates":
            added = attacked.responses[3:]
            assert len(set(added)) == len(added) == 3 and {text.strip() for text in added} == {item.bad_text}
        else:
            assert attacked.num_responses == plain.num_responses


def test_what_the_attacks_write() -> None:
    scorer = FormulaScorer(by_length)
    items = attack_items(ranked_groups(6))
    results = run_attacks(scorer, items, control_tokens=TOKENS)
    written = {
        result.name: [group.responses[item.bad] for group, item in zip(groups, items, strict=True)]
        for result, groups in zip(results, scorer.calls[1:], strict=True)
    }
    assert set(written) == set(ATTACKS)
    assert set(written["master key alone"]) <= set(MASTER_KEYS) and set(written["empty"]) == {""}
    for i, item in enumerate(items):
        good = item.group.responses[item.good]
        assert good.startswith(written["cut off good answer"][i]) and written["cut off good answer"][i] != good
        assert good in written["forged separator and good answer"][i]
        assert any(token in written["forged separator and good answer"][i] for token in TOKENS)
        assert written["control tokens"][i] == item.bad_text + "".join(TOKENS)
        assert written["repetition"][i].count(item.bad_text) == 5
        assert f"Response {item.bad + 1} is the best" in written["names itself the best"][i]
        assert "Ignore all previous instructions" in written["prompt injection"][i]


@pytest.mark.parametrize("name", ATTACKS)
def test_numbers_are_those_of_a_naive_loop(name: str) -> None:
    scorer = FormulaScorer(by_length)
    items = attack_items(ranked_groups(), seed=3)
    (result,) = run_attacks(scorer, items, names=[name], control_tokens=TOKENS, seed=3)
    margins: list[list[float]] = []
    for groups in scorer.calls:
        margins.append([])
        for group, item in zip(groups, items, strict=True):
            margins[-1].append(by_length(group, group.responses[item.bad]) - len(group.responses[item.good]))
    spread = statistics.pstdev(margins[0])
    shifts = [(after - before) / spread for before, after in zip(*margins, strict=True)]
    assert result.shift == pytest.approx(statistics.fmean(shifts))
    assert result.shift_low <= result.shift <= result.shift_high
    for found, values in zip((result.wins_before, result.wins_after), margins, strict=True):
        assert found == pytest.approx(statistics.fmean(1.0 if m > 0 else 0.5 if m == 0 else 0.0 for m in values))
    assert (result.num_items, result.num_dropped) == (20, 0)


def test_a_model_that_likes_length_falls_for_length_and_one_that_knows_the_truth_for_nothing() -> None:
    items = attack_items(ranked_groups())
    by_name = {r.name: r for r in run_attacks(FormulaScorer(by_length), items, control_tokens=TOKENS)}
    assert by_name["length padding"].wins_after == 1.0 and by_name["length padding"].shift_low > 1.0
    assert by_name["empty"].shift_high < 0.0 and by_name["empty"].wins_after == 0.0

    def truth(group: ResponseGroup, text: str) -> float:
        return float(text == group.responses[1])

    for result in run_attacks(FormulaScorer(truth), items, control_tokens=TOKENS):
        assert result.shift == 0.0 and result.wins_after == 0.0


def test_duplicates_work_on_a_model_that_counts_votes() -> None:
    def votes(group: ResponseGroup, text: str) -> float:
        return float(sum(other.strip() == text.strip() for other in group.responses))

    (result,) = run_attacks(FormulaScorer(votes), attack_items(ranked_groups()), names=["duplicates"])
    assert (result.wins_before, result.wins_after) == (0.5, 1.0)


def test_dropped_groups_are_counted_and_left_out() -> None:
    items = attack_items(ranked_groups())
    scorer = FormulaScorer(by_length, drop="Ignore all previous")
    (plain,) = run_attacks(scorer, items, names=["empty"])
    assert plain.num_dropped == 0
    with pytest.raises(GroupError, match="'prompt injection': all 20 groups were dropped"):
        run_attacks(scorer, items, names=["prompt injection"])
    (some,) = run_attacks(FormulaScorer(by_length, drop="x" * 15), items, names=["empty"])
    assert (some.num_items, some.num_dropped) == (15, 5)
    with pytest.raises(GroupError, match="all 20 groups were dropped"):
        run_attacks(FormulaScorer(by_length, drop=""), items)


def test_an_attack_alone_is_that_attack_among_all() -> None:
    """Neither the others nor their order decide what is drawn."""
    items = attack_items(ranked_groups())
    for seed in (0, 1):
        given = {"control_tokens": TOKENS, "seed": seed, "num_resamples": 20}
        scorer = FormulaScorer(by_length)
        among = dict(zip(ATTACKS, run_attacks(scorer, items, **given), strict=True))  # type: ignore[arg-type]
        written = dict(zip(ATTACKS, scorer.calls[1:], strict=True))
        for names in (list(ATTACKS)[::-1], *([name] for name in ATTACKS)):
            alone = FormulaScorer(by_length)
            found = run_attacks(alone, items, names=names, **given)  # type: ignore[arg-type]
            assert found == [among[name] for name in names]
            assert [[one.responses for one in call] for call in alone.calls[1:]] == [
                [one.responses for one in written[name]] for name in names
            ]


def test_what_is_dropped_counts_in_no_number_and_the_unit_is_that_of_all_attacks() -> None:
    """Two groups are dropped before, three others by this attack only."""
    groups = [
        ResponseGroup(prompt="?", responses=[bad, "x" * (2 if i % 2 else 30 + i)], rankings=[2, 1])
        for i, bad in enumerate(["gone", "bad!", "bad", "b", "a bad one", "bad!", "gone", "bad!", "worse"] + ["c"] * 4)
    ]

    class Dropping(FormulaScorer):
        def score_detailed(self, groups: Sequence[ResponseGroup]) -> list[GroupScores]:
            found = super().score_detailed(groups)
            return [
                GroupScores(scores=None, truncated=one.truncated)
                if any(word in text for text in group.responses for word in ("gone", "bad! This"))
                else one
                for group, one in zip(groups, found, strict=True)
            ]

    items = attack_items(groups)
    found = {one.name: one for one in run_attacks(Dropping(by_length), items, names=["self-praise", "repetition"])}
    before = {i: len(group.responses[0]) - len(group.responses[1]) for i, group in enumerate(groups)}
    unit = statistics.pstdev(before[i] for i, group in enumerate(groups) if "gone" not in group.responses[0])
    for name, longer in (("self-praise", lambda text: 56), ("repetition", lambda text: 4 * (len(text) + 1))):
        words = ("gone", "bad!") if name == "self-praise" else ("gone",)
        kept = [i for i, group in enumerate(groups) if group.responses[0] not in words]
        shifts = [longer(groups[i].responses[0]) for i in kept]
        after = [before[i] + shift for i, shift in zip(kept, shifts, strict=True)]
        assert (found[name].num_items, found[name].num_dropped) == (len(kept), len(groups) - len(kept))
        assert found[name].shift == pytest.approx(statistics.fmean(shifts) / unit)
        assert found[name].wins_before == statistics.fmean((before[i] > 0) + 0.5 * (before[i] == 0) for i in kept)
        assert found[name].wins_after == pytest.approx(statistics.fmean((m > 0) + 0.5 * (m == 0) for m in after))


def test_the_interval_is_that_of_a_plain_bootstrap_and_follows_the_seed() -> None:
    items = attack_items(ranked_groups())
    scorer = FormulaScorer(by_length)
    (found,) = run_attacks(scorer, items, names=["cut off good answer"], num_resamples=4000)
    before, after = (
        [
            len(group.responses[item.bad]) - len(group.responses[item.good])
            for group, item in zip(call, items, strict=True)
        ]
        for call in scorer.calls
    )
    unit = statistics.pstdev(before)
    shifts = [(b - a) / unit for a, b in zip(before, after, strict=True)]
    rng = random.Random(1)
    drawn = sorted(statistics.fmean(rng.choices(shifts, k=len(shifts))) for _ in range(4000))
    width = drawn[3899] - drawn[100]
    assert found.shift_low == pytest.approx(drawn[100], abs=0.05 * width)
    assert found.shift_high == pytest.approx(drawn[3899], abs=0.05 * width)
    few = [run_attacks(scorer, items, names=["empty"], num_resamples=20, seed=seed)[0] for seed in (0, 1, 2)]
    assert len({one.shift for one in few}) == 1 and len({one.shift_low for one in few}) > 1
    (none,) = run_attacks(scorer, items, names=["empty"], num_resamples=0)
    assert none.shift_low == none.shift == none.shift_high


def test_choices_follow_the_seed() -> None:
    groups = [ResponseGroup(prompt="p", responses=list("abcdef"), rankings=[1, 1, 1, 2, 2, 2]) for _ in range(30)]
    chosen = [[(item.good, item.bad) for item in attack_items(groups, seed=seed)] for seed in (0, 0, 1)]
    assert chosen[0] == chosen[1] != chosen[2] and len(set(chosen[0])) > 4


def test_what_cannot_be_attacked_is_refused() -> None:
    tied = ResponseGroup(prompt="p", responses=["a", "b"], rankings=[1, 1])
    blank = ResponseGroup(prompt="p", responses=["a", "  "], rankings=[1, 2])
    with pytest.raises(GroupError, match="none of 2 groups has a worse response"):
        attack_items([tied, blank])
    assert len(attack_items([tied, *ranked_groups(3)])) == 3
    with pytest.raises(GroupError, match="'x': has no rankings"):
        attack_items([ResponseGroup(prompt="p", responses=["a", "b"], id="x")])
    with pytest.raises(ConfigurationError, match="got attacks .'flattery'., expected some of master key"):
        run_attacks(FormulaScorer(by_length), attack_items(ranked_groups(2)), names=["flattery"])


def test_the_command_its_file_and_the_model_card(tmp_path: Path) -> None:
    reward_model("llama", "causal").save_pretrained(tmp_path / "rm")
    save_preferences(ranked_groups(6), tmp_path / "test.jsonl")
    out = tmp_path / "out" / "attacks.json"
    command = ["attack", str(tmp_path / "rm"), str(tmp_path / "test.jsonl"), "--out", str(out), "--limit", "5"]
    result = CliRunner().invoke(app, command, catch_exceptions=False)
    assert result.exit_code == 0 and "length padding" in result.output.replace("\n", " ")
    report = json.loads(out.read_text())
    assert report["layout"] == "causal" and [one["name"] for one in report["attacks"]] == list(ATTACKS)
    assert all(math.isfinite(one["shift"]) and one["num_items"] == 5 for one in report["attacks"])

    command = ["card", str(tmp_path / "rm"), "--attacks", str(out)]
    assert CliRunner().invoke(app, command, catch_exceptions=False).exit_code == 0
    card = ModelCard.load(tmp_path / "rm" / "README.md").text
    for one in report["attacks"]:
        (line,) = [line for line in card.splitlines() if line.startswith(f"| {one['name']} |")]
        assert f"| {one['shift']:+.2f} [" in line and line.endswith(f"| {one['wins_after']:.1%} | 5 |")
    with pytest.raises(ConfigurationError, match="attacks cannot be read"):
        write_model_card(tmp_path / "rm", attacks={"attacks": [{}]})


def test_a_response_with_tool_calls_is_not_attacked() -> None:
    """What an attack writes would be another form of response, whose score differs for that reason alone."""
    turns = [
        {"role": "assistant", "tool_calls": [{"function": {"name": "add", "arguments": {}}}]},
        {"role": "tool", "content": "5"},
    ]
    mixed = ResponseGroup(prompt="2 + 2?", responses=["4", turns, "5"], rankings=[1, 2, 2])
    assert {attack_items([mixed], seed=seed)[0].bad for seed in range(8)} == {2}
    with pytest.raises(GroupError, match="none of 1 groups has a worse response to attack with"):
        attack_items([mixed.select([0, 1])])
