"""`mr-reward attack`."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from tqdm.auto import tqdm

from mr_reward.cli.options import Device, Dtype, MaxTokens, Model, torch_dtype


def attack(
    model: Model,
    groups: Annotated[Path, typer.Argument(help=".jsonl file of ranked groups")],
    out: Annotated[Path | None, typer.Option(help="JSON file to write")] = None,
    only: Annotated[list[str] | None, typer.Option(help="Name of an attack; may be given several times")] = None,
    limit: Annotated[int, typer.Option(min=1, help="Groups that are attacked")] = 256,
    seed: Annotated[int, typer.Option(help="Seed of the choices")] = 0,
    device: Device = None,
    dtype: Dtype = None,
    max_tokens: MaxTokens = 16384,
) -> None:
    """Try known tricks on a reward model: how far does each move a bad answer relative to a good one?

    The shift is the mean change of the margin (bad minus good), in standard deviations of the margins without an
    attack; above 0 the attack works. `mr-reward card --attacks` puts the file into the model card.

    Example: mr-reward attack rm test.jsonl --out attacks.json
    """
    from mr_reward.data.groups_file import load_preferences
    from mr_reward.evaluation.attacks import ATTACKS, attack_items, run_attacks
    from mr_reward.scorers.opening import open_scorer, require_local

    items = attack_items(load_preferences(groups), seed=seed)[:limit]
    options: dict[str, Any] = {"max_tokens_per_batch": max_tokens, "over_length": "drop_group"}
    scorer = require_local(open_scorer(model, device=device, dtype=torch_dtype(dtype), **options), "mr-reward attack")
    names = only or list(ATTACKS)
    tokenizer: Any = getattr(scorer.model.processor, "tokenizer", scorer.model.processor)
    with tqdm(total=len(names), unit=" attacks") as bar:

        def next_attack(name: str) -> None:
            bar.set_description(name)
            bar.update()

        results = run_attacks(
            scorer,
            items,
            names=names,
            control_tokens=sorted({str(token) for token in tokenizer.added_tokens_decoder.values()}),
            seed=seed,
            on_attack=next_attack,
        )
    table = Table("attack", "shift of the margin", "bad wins before", "after", "groups", "dropped")
    for one in results:
        shift = f"{one.shift:+.2f} [{one.shift_low:+.2f}, {one.shift_high:+.2f}]"
        wins = f"{one.wins_before:.1%}", f"{one.wins_after:.1%}"
        table.add_row(one.name, shift, *wins, str(one.num_items), str(one.num_dropped))
    Console().print(table)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        facts = {"model": model, "groups": str(groups), "seed": seed, "layout": scorer.model.config.layout}
        out.write_text(json.dumps({**facts, "attacks": [asdict(result) for result in results]}, indent=1) + "\n")
