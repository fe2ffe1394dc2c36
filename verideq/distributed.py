"""Several processes that do one thing together: the sums and objects that they share. ``torchrun`` starts them.

In training each takes its part of every batch. What couples the samples of a batch (its mean loss, the statistics of
batch norm and of the penalties) is summed over all of them, with gradients, so that the step is that of one process on
the whole batch, up to the order of summation.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce

from verideq.errors import InputError, VerideqError

Result = TypeVar("Result")


@dataclass(frozen=True)
class World:
    """The processes of a run.

    Args:
        rank: of this one, from 0.
        size: how many there are.
        device: that its messages travel from.
    """

    rank: int = 0
    size: int = 1
    device: str = "cpu"

    @property
    def leads(self) -> bool:
        """Whether this process writes the files and the progress."""
        return self.rank == 0

    def part(self, count: int) -> slice:
        """This process's share of `count` things.

        Raises:
            InputError: they cannot be shared out evenly.
        """
        if count % self.size:
            raise InputError(f"a batch of {count} cannot be shared by {self.size} processes; make batch_size divisible")
        each = count // self.size
        return slice(self.rank * each, (self.rank + 1) * each)

    def total(self, x: Tensor) -> Tensor:
        """The sum over the processes, with gradients."""
        return x if self.size == 1 else all_reduce(x)  # type: ignore[no-untyped-call]  # torch's

    def var_mean(self, values: Tensor, axes: list[int]) -> tuple[Tensor, Tensor]:
        """Biased variance and mean over the samples of all processes."""
        if self.size == 1:
            return torch.var_mean(values, axes, correction=0)
        count = self.size * values.numel() / values.shape[1]
        mean = self.total(values.sum(axes)) / count
        shape = [1, -1, *[1] * (values.dim() - 2)]
        return self.total((values - mean.view(shape)).square().sum(axes)) / count, mean

    def means(self, values: dict[str, float]) -> dict[str, float]:
        """The mean of every number over the processes."""
        if self.size == 1:
            return values
        summed = torch.tensor(list(values.values()), dtype=torch.float64, device=self.device)
        dist.all_reduce(summed)
        return dict(zip(values, (summed / self.size).tolist(), strict=True))

    def most(self, value: int) -> int:
        """The largest number of any process."""
        if self.size == 1:
            return value
        largest = torch.tensor(value, device=self.device)
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        return int(largest)

    @torch.no_grad()
    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Replace every gradient by its sum over the processes, in one message."""
        if self.size == 1:
            return
        gradients = [p.grad for p in parameters if p.grad is not None]
        flat = torch.cat([g.flatten() for g in gradients])
        dist.all_reduce(flat)
        for gradient, summed in zip(gradients, torch.split(flat, [g.numel() for g in gradients]), strict=True):
            gradient.copy_(summed.view_as(gradient))

    def lead(self, work: Callable[[], Result]) -> Result:
        """Let the leading process do something, and have its result in all of them.

        Raises:
            VerideqError: in every process what was raised in the leading one.
        """
        if self.size == 1:
            return work()
        box: list[Any] = [None]
        if self.leads:
            try:
                box = [work()]
            except VerideqError as error:
                box = [error]
        dist.broadcast_object_list(box, 0)
        if isinstance(box[0], VerideqError):
            raise box[0]
        return cast(Result, box[0])

    def collect(self, mine: Result) -> list[Result]:
        """What every process has, in the order of their ranks, in the leading one; nothing in the others."""
        if self.size == 1:
            return [mine]
        found: list[Result | None] = [None] * self.size
        dist.gather_object(mine, found if self.leads else None, 0)
        return cast(list[Result], found) if self.leads else []

    def wait(self) -> None:
        """Until every process is here."""
        if self.size > 1:
            dist.barrier()


ALONE = World()


@contextmanager
def joined(device: torch.device) -> Iterator[tuple[World, torch.device]]:
    """The processes that ``torchrun`` started, joined while the block runs; one process alone without it.

    Args:
        device: where to compute: ``gloo`` carries the messages between CPUs, ``nccl`` those between GPUs.

    Returns:
        the processes, and the device of this one: of several GPUs its own.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield ALONE, device
        return
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield World(dist.get_rank(), dist.get_world_size(), str(device)), device
    finally:
        dist.destroy_process_group()
