"""`mr-reward serve`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from mr_reward.cli.options import Device, Dtype, MaxTokens, Model, NumOrders, OverLength, torch_dtype
from mr_reward.errors import ConfigurationError

_TOKEN_VARIABLE = "MR_REWARD_TOKEN"


def serve(
    model: Model,
    host: Annotated[str, typer.Option(help="Address to listen at; one that others can reach needs a token")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(help="Port to listen at; 0 for a free one")] = 8765,
    token_file: Annotated[
        Path | None, typer.Option(help=f"File with the token of the clients; else the variable {_TOKEN_VARIABLE}")
    ] = None,
    device: Device = None,
    dtype: Dtype = None,
    max_tokens: MaxTokens = 16384,
    over_length: OverLength = "drop_group",
    num_orders: NumOrders = 1,
    max_groups: Annotated[int, typer.Option(help="Groups of a request")] = 256,
    max_request_mb: Annotated[float, typer.Option(help="Size of a request")] = 64.0,
    max_megapixels: Annotated[float, typer.Option(help="Size of an image or frame")] = 50.0,
    max_pending: Annotated[
        int, typer.Option(help="Groups that may wait, without --collect; beyond, clients come again")
    ] = 4096,
    max_wait_ms: Annotated[float, typer.Option(help="How long a forward pass waits for more requests")] = 5.0,
    collect: Annotated[
        int | None,
        typer.Option(min=1, help="For OpenRLHF and verl's reward loop: collect groups of so many single rollouts"),
    ] = None,
    reward: Annotated[str, typer.Option(help="With --collect: centred, raw, rank or win_rate")] = "centred",
    deadline: Annotated[float, typer.Option(help="With --collect: seconds to wait for a group")] = 170.0,
    media: Annotated[
        Path | None, typer.Option(help="With --collect: folder whose images labels may name; else none")
    ] = None,
    reuse_port: Annotated[bool, typer.Option("--reuse-port", help="Several servers may share the port")] = False,
) -> None:
    """Score groups for others: MultiResponseReward(server="http://127.0.0.1:8765", num_generations=8).

    Example: mr-reward serve rm --device cuda:1 --dtype bfloat16

    Example: mr-reward serve rm --collect 8 --port 5000
    """
    from mr_reward.scorers.opening import open_scorer, require_local
    from mr_reward.serving import ServerLimits
    from mr_reward.serving import serve as run_server
    from mr_reward.serving.server import check_access, run_app

    token = token_file.read_text().strip() if token_file is not None else os.environ.get(_TOKEN_VARIABLE) or None
    check_access(host, token)
    if collect is not None:
        check_access(host, None)  # these trainers send no token
        if reuse_port:
            raise ConfigurationError("--collect and --reuse-port: a group has to come to one server; run one only")
    limits = ServerLimits(
        max_groups=max_groups,
        max_request_bytes=int(max_request_mb * 1024**2),
        max_pixels=int(max_megapixels * 1e6),
        max_pending=max_pending,
        max_wait=max_wait_ms / 1000,
    )
    options: dict[str, Any] = {"over_length": over_length, "num_orders": num_orders}
    options |= {"max_tokens_per_batch": max_tokens, "dtype": torch_dtype(dtype)}
    scorer = require_local(open_scorer(model, device=device, **options), "mr-reward serve")
    if collect is not None:
        from mr_reward.integrations.openrlhf import build_collecting_app

        app = build_collecting_app(
            scorer, num_generations=collect, reward=reward, deadline=deadline, media_root=media, limits=limits
        )
        run_app(app, host=host, port=port)
        return
    run_server(scorer, host=host, port=port, token=token, limits=limits, reuse_port=reuse_port)
