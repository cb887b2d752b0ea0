"""`open_scorer`: the one way to a scorer, from a folder, a hub id, a URL or a loaded model; also one that offloads."""

from __future__ import annotations

import inspect
import logging
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from mr_reward.checkpoint.verify import weights_digest
from mr_reward.checkpoint.zero3 import outside_zero3, partitioned_weights
from mr_reward.errors import CheckpointError, ConfigurationError
from mr_reward.groups import GroupScores, ResponseGroup, Scorer
from mr_reward.model.model import MultiResponseRewardModel
from mr_reward.model.scorer import GroupScorer

logger = logging.getLogger(__name__)

# By the names that recipes and the command line take.
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Where the weights are between two calls. The third place, a server on other GPUs, is `mr_reward.serving`.
PLACEMENTS = ("resident", "offload")
_ADDRESS = re.compile(r"[\w.-]+:\d+/?")  # a URL without its scheme
_START_SECONDS = 120.0  # that a scoring server may take to come up


def open_scorer(
    source: str | os.PathLike[str] | MultiResponseRewardModel,
    *,
    device: torch.device | str | None = None,
    placement: str = "resident",
    token: str | None = None,
    expected_hash: str | None = None,
    attn_implementation: str | None = None,
    **options: Any,
) -> Scorer:
    """Open what scores groups: a model on this rank's device, or the server that has it.

    A model is loaded whole, also while a DeepSpeed ZeRO-3 configuration is alive. A server is waited for until it
    answers, for two minutes at most; what it scores with was decided when it was started.

    Args:
        source: folder or hub id of a reward model, a loaded model, or the URL of `mr-reward serve`.
        device: where to score; None for this rank's.
        placement: `resident` keeps the weights on the device; `offload` keeps them in CPU memory between calls.
        token: of the server; None for the environment variable MR_REWARD_TOKEN.
        expected_hash: `weights_digest` of the model that has to score; None for any.
        attn_implementation: attention backend of a checkpoint; None for the fastest that fits.
        **options: of `GroupScorer.from_pretrained`, for a loaded model of `GroupScorer`, for a URL of `RemoteScorer`.

    Returns:
        A `GroupScorer`, `OffloadedScorer` or `RemoteScorer`.

    Raises:
        CheckpointError: the checkpoint cannot be loaded, the model is partitioned by ZeRO-3, or it is another one than
            expected.
        ConfigurationError: `source` is something else, or an option does not exist or does not belong to it.
        ScoringServerError: the server cannot be reached, or refuses the token.

    Example:
        >>> scorer = open_scorer("outputs/rm", max_tokens_per_batch=8192)  # doctest: +SKIP
        >>> scorer = open_scorer("http://127.0.0.1:8765")  # doctest: +SKIP
    """
    if placement not in PLACEMENTS:
        raise ConfigurationError(f"placement is {placement!r}, expected one of {', '.join(PLACEMENTS)}")
    if is_url(source):
        local = {"device": device, "attn_implementation": attn_implementation}
        local["placement"] = None if placement == "resident" else placement
        options |= {name: value for name, value in local.items() if value is not None}
        return _open_server(str(source), token, expected_hash, options)
    if token is not None:
        raise ConfigurationError(f"got a token with {source!r:.100}, expected one with the URL of a server only")
    target = torch.device(device) if device is not None else default_device()
    home = torch.device("cpu") if placement == "offload" else target
    with outside_zero3():
        if isinstance(source, MultiResponseRewardModel):
            _check_loaded(source, attn_implementation)
            scorer = GroupScorer(source, device=home, **options)
        elif isinstance(source, str) and _ADDRESS.fullmatch(source) and not os.path.exists(source):
            raise ConfigurationError(
                f"{source} is no folder and no hub id; if a scoring server is meant, give http://{source}"
            )
        elif isinstance(source, str | os.PathLike):
            scorer = GroupScorer.from_pretrained(
                os.fspath(source), device=home, attn_implementation=attn_implementation, **options
            )
        else:
            raise ConfigurationError(
                f"the reward model is {type(source).__name__}, expected a folder, a hub id, the URL of a scoring "
                "server or a loaded MultiResponseRewardModel; pass the folder that save_pretrained wrote"
            )
    if expected_hash is not None and (found := weights_digest(scorer.model)) != expected_hash:
        raise CheckpointError(
            f"the weights have the checksum {found}, expected {expected_hash}; give the right folder"
        )
    need = scorer.memory(device=target)
    logger.info(
        "reward model: %.2f GB of weights %s %s, and about %.2f GB more in a forward pass of %d tokens",
        need.weights / 1e9,
        "on" if placement == "resident" else "on the CPU, in calls also on",
        target,
        need.activations / 1e9,
        scorer.max_tokens_per_batch,
    )
    return OffloadedScorer(scorer, target) if placement == "offload" else scorer


class OffloadedScorer:
    """A `GroupScorer` whose weights are on its device only while it scores.

    Between calls the device holds nothing of the reward model, so a policy's optimizer step or a colocated vLLM that
    wakes from sleep mode has the memory. Each call pays one copy of the weights to the device; none is copied back,
    they do not change. The copies in CPU memory are pinned if the device is a GPU. Scores equal those of the scorer
    itself bit for bit. With the CPU as device the weights are copied all the same: the way to test it without a GPU.

    Args:
        scorer: a scorer whose model is on the CPU.
        device: where to score.

    Example:
        >>> scorer = OffloadedScorer(GroupScorer.from_pretrained("rm"), "cuda:0")  # doctest: +SKIP
    """

    def __init__(self, scorer: GroupScorer, device: torch.device | str) -> None:
        self.scorer = scorer
        self._device = torch.device(device)
        self._is_cuda = self._device.type == "cuda"
        # Weights that are tied are one object here, and stay so.
        self._tensors = [*scorer.model.parameters(), *scorer.model.buffers()]
        self._at_home = [tensor.data.pin_memory() if self._is_cuda else tensor.data for tensor in self._tensors]
        self._return()

    @property
    def model(self) -> MultiResponseRewardModel:
        """The model; on the CPU between calls."""
        return self.scorer.model

    def score_detailed(self, groups: Sequence[ResponseGroup]) -> list[GroupScores]:
        """As `GroupScorer.score_detailed`."""
        if not groups:
            return []
        with self._on_device():
            return self.scorer.score_detailed(groups)

    @contextmanager
    def _on_device(self) -> Iterator[None]:
        try:
            for tensor, home in zip(self._tensors, self._at_home, strict=True):
                tensor.data = home.to(self._device, non_blocking=True, copy=True)
            yield
        finally:
            self._return()

    def _return(self) -> None:
        for tensor, home in zip(self._tensors, self._at_home, strict=True):
            tensor.data = home
        if self._is_cuda:
            torch.cuda.empty_cache()  # give the blocks back: others on this GPU cannot use this process's cache


def default_device() -> torch.device:
    """The device of this rank: `cuda:LOCAL_RANK` if CUDA is available, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def is_url(source: Any) -> bool:
    """Whether a source is a scoring server's; other schemes than HTTP are refused later, with a reason."""
    return isinstance(source, str) and "://" in source


def require_local(scorer: Scorer, purpose: str) -> GroupScorer:
    """The scorer, for what needs the model itself and not only its scores."""
    if not isinstance(scorer, GroupScorer):
        raise ConfigurationError(
            f"{purpose} needs the model itself, got {type(scorer).__name__}; give the folder or hub id"
        )
    return scorer


def scored_by(scorer: Scorer) -> tuple[str, dict[str, Any]]:
    """What decides the scores: `weights_digest` of the model, and the options; equal here and over HTTP."""
    if hasattr(scorer, "connect"):  # a RemoteScorer, whose packages are an extra
        health = scorer.connect()
        return health.model_hash, health.options
    local: Any = getattr(scorer, "scorer", scorer)
    options = {"max_tokens_per_batch": local.max_tokens_per_batch, "num_orders": local.num_orders}
    return weights_digest(local.model), {**options, "over_length": local.packer.over_length}


def _open_server(url: str, token: str | None, expected_hash: str | None, options: dict[str, Any]) -> Scorer:
    from mr_reward.scorers import RemoteScorer  # through the folder: it names the extra if a package is missing

    local = [name for name in options if name not in inspect.signature(RemoteScorer).parameters]
    if local:
        raise ConfigurationError(
            f"{', '.join(local)} cannot be given with the URL of a scoring server, where `mr-reward serve` decides "
            "about it; leave it out, and start the server with it"
        )
    scorer = RemoteScorer(url, token=token, expected_hash=expected_hash, **options)
    scorer.connect(min(_START_SECONDS, options.get("deadline", _START_SECONDS)))
    return scorer


def _check_loaded(model: MultiResponseRewardModel, attn_implementation: str | None) -> None:
    """A model with empty weights would score nonsense, or wait for ranks that own no group."""
    if names := partitioned_weights(model):
        raise CheckpointError(
            f"{len(names)} weights of the reward model are partitioned over the ranks ({names[0]}, ...): it was "
            "loaded while a DeepSpeed ZeRO-3 configuration was alive, expected whole weights on every rank; "
            "pass the folder itself, or load the model inside mr_reward.checkpoint.zero3.outside_zero3()"
        )
    if attn_implementation is not None:
        raise ConfigurationError(
            f"got attn_implementation={attn_implementation!r} with a loaded model, expected a folder; choose the "
            "backend when you load the model"
        )
