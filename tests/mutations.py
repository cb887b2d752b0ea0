"""The deliberate bugs that `mutation_check.py` tries: a line of the package, what it becomes, who has to notice."""

from __future__ import annotations

from typing import NamedTuple


class Mutation(NamedTuple):
    """A bug.

    Args:
        name: what is wrong.
        file: below `mr_reward`.
        line: text that occurs once in it.
        bug: what it becomes.
        tests: that have to notice.
    """

    name: str
    file: str
    line: str
    bug: str
    tests: str


MUTATIONS = [
    Mutation(
        "mask: a token sees the one after it",
        "layouts.py",
        "device=segments.device).tril()",
        "device=segments.device).tril(1)",
        "tests/test_layouts.py",
    ),
    Mutation(
        "mask: a response sees the one before",
        "layouts.py",
        "mask = mask & ((key == PROMPT_SEGMENT) | (key == query))",
        "mask = mask & ((key == PROMPT_SEGMENT) | (key == query) | (key == query - 1))",
        "tests/test_layouts.py",
    ),
    Mutation(
        "mask: comparisons see no summaries",
        "layouts.py",
        "(kinds == TokenKind.COMPARISON)[:, :, None] & (kinds == TokenKind.SUMMARY)[:, None, :]",
        "(kinds == TokenKind.COMPARISON)[:, :, None] & (kinds == 9)[:, None, :]",
        "tests/test_layouts.py",
    ),
    Mutation(
        "mask: padding is seen",
        "layouts.py",
        "& (query != PADDING_SEGMENT) & (key != PADDING_SEGMENT)",
        "& (query != PADDING_SEGMENT)",
        "tests/test_layouts.py",
    ),
    Mutation(
        "positions are not reset",
        "layouts.py",
        'first = running if layout == "causal" else 0',
        "first = running",
        "tests/test_layouts.py tests/model/test_invariances.py",
    ),
    Mutation(
        "span shifted by one",
        "layouts.py",
        "spans.append((len(segments) + before, len(segments) + before + length))",
        "spans.append((len(segments) + before + 1, len(segments) + before + length + 1))",
        "tests/test_layouts.py",
    ),
    Mutation(
        "score read one token early",
        "layouts.py",
        "score_sites.append(len(segments) - 1)",
        "score_sites.append(len(segments) - 2)",
        "tests/test_layouts.py",
    ),
    Mutation(
        "readout tokens exchanged",
        "head.py",
        "kinds == TokenKind.SUMMARY, summary, inputs_embeds",
        "kinds == TokenKind.SUMMARY, comparison, inputs_embeds",
        "tests/model/test_invariances.py tests/model/test_from_backbone.py",
    ),
    Mutation(
        "head in bfloat16",
        "head.py",
        "F.linear(hidden.float(), self.dense.weight.float(), self.dense.bias.float())",
        "F.linear(hidden.bfloat16().float(), self.dense.weight.float(), self.dense.bias.float())",
        "tests/model/test_from_backbone.py tests/model/test_invariances.py",
    ),
    Mutation(
        "exchange: a comparison misses one summary",
        "group_plan.py",
        "seen = real[:, None] & real[:, :, None] & ~torch.eye(real.shape[1], dtype=torch.bool)",
        "seen = real[:, None] & real[:, :, None] & torch.ones_like(real[0]).diag().logical_not().tril()",
        "tests/attention/test_group_attention.py",
    ),
    Mutation(
        "exchange: the groups of a batch see each other's place",
        "group_plan.py",
        "summaries = summaries + cached.prompt",
        "summaries = summaries.roll(1, 0) + cached.prompt",
        "tests/attention/test_group_attention.py",
    ),
    Mutation(
        "prompt cut by one token for its responses",
        "group_plan.py",
        "prompts.append(RaggedSequence(start + length, sum(size for _, size in responses), start, length))",
        "prompts.append(RaggedSequence(start + length, sum(size for _, size in responses), start, length - 1))",
        "tests/attention/test_group_attention.py",
    ),
    Mutation(
        "two groups of a batch swap scores",
        "packing.py",
        "score_sites[i, : len(row.score_sites)] = torch.tensor(row.score_sites) + start",
        "score_sites[i, : len(row.score_sites)] = torch.tensor(row.score_sites)",
        "tests/model/test_rows.py tests/model/test_invariances.py",
    ),
    Mutation(
        "budget is not kept",
        "packing.py",
        "(len(batches[-1]) + 1) * sizes[-1] <= max_tokens",
        "(len(batches[-1]) + 1) * sizes[-1] <= 2 * max_tokens",
        "tests/model/test_rows.py",
    ),
    Mutation(
        "tie ignored: the first of the best takes all",
        "losses.py",
        "best = mask & (rankings == best_rank)",
        "best = mask & (rankings == best_rank); best = best & (best.cumsum(-1) == 1)",
        "tests/training/test_losses.py",
    ),
    Mutation(
        "padding takes part in the softmax",
        "losses.py",
        "log_probs = scores.masked_fill(~mask, -torch.inf).log_softmax(dim=-1)",
        "log_probs = scores.log_softmax(dim=-1)",
        "tests/training/test_losses.py",
    ),
    Mutation(
        "Plackett-Luce: those ranked better stay in the draw",
        "losses.py",
        "candidates = rankings.unsqueeze(-2) >= rankings.unsqueeze(-1)",
        "candidates = rankings.unsqueeze(-2) > rankings.unsqueeze(-1)",
        "tests/training/test_losses.py",
    ),
    Mutation(
        "pairs: tied pairs count",
        "losses.py",
        "(rankings.unsqueeze(-1) < rankings.unsqueeze(-2))",
        "(rankings.unsqueeze(-1) <= rankings.unsqueeze(-2))",
        "tests/training/test_losses.py",
    ),
    Mutation(
        "duplicates are scored apart",
        "scoring.py",
        "unique = list(dict.fromkeys(group.responses))\n            if len",
        "unique = list(group.responses)\n            if len",
        "tests/model/test_scorer.py tests/grpo/test_reward.py",
    ),
    Mutation(
        "orders are not undone",
        "scoring.py",
        "over_orders[slot].append(score)",
        "over_orders[len(over_orders) - 1 - slot].append(score)",
        "tests/model/test_scorer.py",
    ),
    Mutation(
        "a group merged with its neighbour",
        "grpo/groups.py",
        "chunk = rows[start : start + num_generations]",
        "chunk = rows[start : start + num_generations - 1] + rows[start + num_generations :][:1]",
        "tests/grpo/test_groups.py",
    ),
    Mutation(
        "owner wrong",
        "grpo/groups.py",
        "owner = min(group.holders, key=lambda rank: (load[rank], rank))",
        "owner = max(range(num_ranks), key=lambda rank: (load[rank], rank))",
        "tests/grpo/test_groups.py",
    ),
    Mutation(
        "rows of another rank come back",
        "grpo/reward.py",
        "start = sum(len(rows) for rows in rows_by_rank[:rank])",
        "start = sum(len(rows) for rows in rows_by_rank[: max(0, rank - 1)])",
        "tests/grpo/test_reward_distributed.py",
    ),
    Mutation(
        "centred around the median",
        "grpo/reward.py",
        "mean = statistics.fmean(scores)",
        "mean = statistics.median(scores)",
        "tests/grpo/test_reward.py",
    ),
    Mutation(
        "one failing rank leaves the others alone",
        "grpo/exchange.py",
        "failures = [other for other, _ in records if other is not None]",
        "failures = []",
        "tests/grpo/test_reward_distributed.py -k test_one_failing_rank",
    ),
    Mutation(
        "control tokens are encoded",
        "encoding.py",
        '"split_special_tokens": True',
        '"split_special_tokens": False',
        "tests/templates/test_rendering.py",
    ),
    Mutation(
        "added tokens that are not special are encoded",
        "encoding.py",
        "self._without_control_tokens(piece) if self._controls(ids) else ids",
        "ids",
        "tests/templates/test_rendering.py",
    ),
    Mutation(
        "a prompt's text is counted for placeholders",
        "rendering.py",
        "validate(images=images, videos=videos, **options)",
        "validate(images=images, text=text, videos=videos, **options)",
        "tests/templates/test_rendering.py",
    ),
    Mutation(
        "template changed",
        "rendering.py",
        "group.messages, add_generation_prompt=True)\n        return",
        "group.messages, add_generation_prompt=False)\n        return",
        "tests/templates/test_rendering.py tests/checkpoint/test_checkpoint.py",
    ),
    Mutation(
        "a changed template is accepted",
        "integrity.py",
        "if found != trained_with:",
        "if found is None:",
        "tests/checkpoint/test_checkpoint.py",
    ),
    Mutation(
        "missing weights are accepted",
        "integrity.py",
        '("missing_keys", "missing weights"),',
        "",
        "tests/checkpoint/test_checkpoint.py",
    ),
    Mutation(
        "non-finite scores go on",
        "scoring.py",
        "if not all(map(math.isfinite, scores)):",
        "if any(map(math.isnan, scores)) and False:",
        "tests/model/test_scorer.py",
    ),
    Mutation(
        "competition ranks are refused",
        "groups.py",
        "if ranks not in (dense, competition):",
        "if ranks != dense:",
        "tests/test_groups.py tests/data/test_preferences.py",
    ),
    Mutation(
        "flip rate: a tie counts as a flip",
        "metrics.py",
        "float(not np.any((a >= a.max() - atol) & (b >= b.max() - atol)))",
        "float(int(a.argmax()) != int(b.argmax()))",
        "tests/test_metrics.py",
    ),
    Mutation(
        "resume: a torn line is kept",
        "cli/score.py",
        'if not content.endswith(b"\\n"):',
        "if not content:",
        "tests/cli/test_score.py",
    ),
    Mutation(
        "a changed weight is not noticed",
        "checksums.py",
        "if _sha256(folder / name) != digest:",
        "if False:",
        "tests/checkpoint/test_checksums.py",
    ),
    Mutation(
        "a save goes over the earlier model",
        "checksums.py",
        "        yield unfinished\n",
        "        yield folder\n",
        "tests/checkpoint/test_checksums.py",
    ),
    Mutation(
        "shards may lie elsewhere",
        "integrity.py",
        "outside = sorted(file for file in files if Path(file).name != file)",
        "outside: list[str] = []",
        "tests/checkpoint/test_checkpoint.py",
    ),
    Mutation(
        "pickles are loaded",
        "integrity.py",
        '{**options, "use_safetensors": True,',
        '{**options, "use_safetensors": False,',
        "tests/supply_chain",
    ),
    Mutation(
        "rows name files anywhere",
        "data/media_files.py",
        "if not any(_is_inside(path, folder) for folder in roots.allowed):",
        "if False:",
        "tests/data/test_preferences.py",
    ),
    Mutation(
        "the deadline of a stalled rank is lost",
        "grpo/reward.py",
        "Exchange(timeout=timedelta(seconds=timeout))",
        "Exchange()",
        "tests/grpo/test_reward_distributed.py -k test_a_stalled_rank",
    ),
    Mutation(
        "nobody says which rank stalled",
        "grpo/exchange.py",
        "            dist.monitored_barrier(self._group, self._timeout, wait_all_ranks=True)\n",
        "",
        "tests/grpo/test_reward_distributed.py -k test_a_stalled_rank",
    ),
    Mutation(
        "out of memory, and nobody says what to lower",
        "out_of_memory.py",
        'error.add_note(f"mr_reward: out of memory; {advice}")',
        "pass",
        "tests/reliability/test_faults.py -k test_without_memory",
    ),
    Mutation(
        "a full disk under torch's writer is not named",
        "training/saving.py",
        'for words in ("inline_container", "iostream error")',
        'for words in ("inline_container",)',
        "tests/training/test_resume.py -k test_torch_without_room",
    ),
    Mutation(
        "a second video is left to the processor",
        "backbones/molmo2.py",
        "if videos > 1:",
        "if False:",
        "tests/backbones/test_molmo2.py",
    ),
    Mutation(
        "attack: the good response is changed",
        "evaluation/attacks.py",
        "responses[item.bad] = ATTACKS[name]",
        "responses[item.good] = ATTACKS[name]",
        "tests/evaluation/test_attacks.py",
    ),
    Mutation(
        "attack: margin the wrong way round",
        "evaluation/attacks.py",
        "result.scores[item.bad] - result.scores[item.good]",
        "result.scores[item.good] - result.scores[item.bad]",
        "tests/evaluation/test_attacks.py",
    ),
]
