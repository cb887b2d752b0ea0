"""The only file with collectives: small objects from every rank to every rank, and failures that reach all ranks."""

from __future__ import annotations

from datetime import timedelta
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from mr_reward.errors import PeerRankError


class Exchange:
    """Exchanges picklable objects between all ranks, over a gloo group of its own.

    The group is made on first use, by all ranks together; NCCL traffic of the training is not touched. In a single
    process, or without `torch.distributed`, everything is the identity and no group is made. Send strings and numbers,
    never images. `timeout` covers the slowest rank's scoring, not a failing one's: `fail_together` reports failures at
    once, and a process that dies closes its connections.
    """

    def __init__(self, *, timeout: timedelta = timedelta(minutes=30)) -> None:
        self._timeout = timeout
        self._group: dist.ProcessGroup | None = None

    @property
    def rank(self) -> int:
        """This process's global rank; 0 without `torch.distributed`."""
        return dist.get_rank() if self._is_distributed() else 0

    def all_gather_objects(self, obj: Any) -> list[Any]:
        """The objects of all ranks, rank 0 first; anything that can be pickled. Every rank has to call this."""
        world_size = dist.get_world_size() if self._is_distributed() else 1
        if world_size == 1:
            return [obj]
        gathered: list[Any] = [None] * world_size
        try:
            if self._group is None:
                self._group = dist.new_group(backend="gloo", timeout=self._timeout, group_desc="mr_reward")
            # Unlike a plain collective, it says who did not come.
            dist.monitored_barrier(self._group, self._timeout, wait_all_ranks=True)
            dist.all_gather_object(gathered, obj, group=self._group)
        except RuntimeError as error:
            raise PeerRankError(
                f"rank {self.rank} waited for the other {world_size - 1} ranks in the reward and lost one: it "
                f"died, or did not come within {self._timeout} (ddp_timeout); read that rank's log for the first "
                f"error (out of memory, for instance). The exchange said: {error}"
            ) from error
        return gathered

    def spread_weights(self, module: nn.Module) -> None:
        """Give all ranks the weights of rank 0, one after the other, through CPU memory. Every rank has to call this.

        Behind a `fail_together`, which has seen that all are there.
        """
        if not self._is_distributed() or dist.get_world_size() == 1:
            return
        for tensor in module.state_dict().values():
            there = tensor.detach().cpu().flatten()
            dist.broadcast(there.view(torch.uint8), 0, group=self._group)
            with torch.no_grad():
                tensor.copy_(there.view(tensor.shape))

    def fail_together(self, description: str) -> Phase:
        """Work ("scoring") that succeeds on all ranks or raises on all ranks; every rank has to enter and leave it.

        >>> with Exchange().fail_together("adding") as phase:
        ...     phase.payload = 1 + 1
        >>> phase.gathered
        [2]
        """
        return Phase(self, description)

    @staticmethod
    def _is_distributed() -> bool:
        return dist.is_available() and dist.is_initialized()


class Phase:
    """What `Exchange.fail_together` returns. Set `payload` inside the block, read `gathered` after it.

    Leaving the block gathers every rank's payload or failure in one collective, so no rank waits for one that has
    failed. The rank that failed raises its own exception, with a note that names rank and work; the others raise
    `PeerRankError`. As this is done in `__exit__`, nothing has to catch exceptions that nobody knows.
    """

    def __init__(self, exchange: Exchange, description: str) -> None:
        self._exchange = exchange
        self._description = description
        self.at: str | None = None  # what this rank is working on right now ("step 12 group 3"), for messages
        self.payload: Any = None
        self.gathered: list[Any] = []  # of all ranks, rank 0 first; filled when the block ends well

    def __enter__(self) -> Phase:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if exc is not None and not isinstance(exc, Exception):
            return  # Ctrl-C or sys.exit: this process ends now, and the others notice the closed connection
        failure = None
        if exc is not None:
            where = f" at {self.at}" if self.at else ""
            said = " ".join([str(exc), *getattr(exc, "__notes__", [])])
            failure = f"rank {self._exchange.rank}{where}: {type(exc).__name__}: {said}"
            exc.add_note(f"mr_reward: failed while {self._description}, {failure}")
        records = self._exchange.all_gather_objects((failure, None if failure else self.payload))
        if exc is not None:
            return  # Python raises it further
        failures = [other for other, _ in records if other is not None]
        if failures:
            raise PeerRankError(
                f"rank {self._exchange.rank} stops because {len(failures)} of {len(records)} ranks failed while "
                f"{self._description}; fix the cause below, this rank had none of its own.\n" + "\n".join(failures)
            )
        self.gathered = [payload for _, payload in records]
