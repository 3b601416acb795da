"""Training in several processes, each with a device and a share of the images, under `torchrun`.

There is no DistributedDataParallel: a step runs several networks backward, each through a part of the weights, and only
when all have added to the gradients are these averaged over the processes, once and explicitly. What a process needs to
know of the others is in `Processes`; with one process all of it does nothing.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Final

import torch
import torch.distributed as dist
from torch import Tensor, nn

from yolov8_nas.errors import InputError

BUCKET_BYTES: Final = 32 * 2**20
"""Gradients sent at once: few enough for a small buffer, enough for the connection's full speed."""

TIMEOUT: Final = timedelta(hours=4)
"""How long a process waits for the others: longer than the first one validates. Where one fails, torchrun ends all."""

RANK_VARIABLES: Final = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
"""What torchrun tells each process. LOCAL_RANK says that there is a torchrun: some clusters set the others anyhow."""


@dataclass(frozen=True)
class Processes:
    """The processes that train together, as one of them sees them.

    Attributes:
        device: The device of this process.
        rank: Number of this process, from 0.
        size: Number of processes.
        local_size: Number of processes on this machine.
    """

    device: torch.device
    rank: int = 0
    size: int = 1
    local_size: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the process that writes, validates and talks."""
        return self.rank == 0

    def average_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Replace every gradient by its mean over all processes, in the same bits on each.

        A parameter without a gradient counts as zero; where no process has one, it stays without.
        """
        if self.size == 1:
            return
        used = torch.tensor([p.grad is not None for p in parameters], dtype=torch.uint8, device=self.device)
        dist.all_reduce(used, dist.ReduceOp.MAX)
        chosen = [p for p, flag in zip(parameters, used.tolist(), strict=True) if flag]
        for parameter in chosen:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        for bucket in _buckets([p.grad for p in chosen if p.grad is not None]):
            flat = torch.cat([gradient.flatten() for gradient in bucket])
            dist.all_reduce(flat)
            flat /= self.size
            for gradient, mean in zip(bucket, torch.split(flat, [g.numel() for g in bucket]), strict=True):
                gradient.copy_(mean.view(gradient.shape))

    def mean(self, values: Mapping[str, float]) -> dict[str, float]:
        """Mean of each value over all processes."""
        if self.size == 1:
            return dict(values)
        total = torch.tensor(list(values.values()), dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return dict(zip(values, (total / self.size).tolist(), strict=True))

    def smallest(self, value: int) -> int:
        """The smallest of the processes' values."""
        if self.size == 1:
            return value
        least = torch.tensor(value, device=self.device)
        dist.all_reduce(least, dist.ReduceOp.MIN)
        return int(least)

    def copy_first(self, tensors: Sequence[Tensor]) -> None:
        """Give contiguous tensors the first process's values."""
        if self.size > 1:
            for tensor in tensors:
                dist.broadcast(tensor, 0)

    def agree(self, value: Any) -> Any:
        """The first process's value, of any kind that can be pickled."""
        if self.size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, 0, device=self.device)
        return values[0]

    @contextlib.contextmanager
    def first_alone(self) -> Iterator[None]:
        """Let the first process go through the section, then the first one of each machine, then the others.

        It writes files that the later ones find, wherever they have a disk in common with an earlier one.
        """
        turn = 0 if self.first else 1 if self.rank % self.local_size == 0 else 2
        for _ in range(turn):
            self.wait()
        yield
        for _ in range(2 - turn):
            self.wait()

    def wait(self) -> None:
        """Wait until all have come here."""
        if self.size > 1:
            dist.barrier()


@contextlib.contextmanager
def join() -> Iterator[Processes]:
    """Meet the processes that torchrun started, or be the only one where none did.

    What torchrun told is taken out of the environment: Ultralytics reads it when it is imported, takes the processes
    for its own trainer's and would wait in its validator for gathers that nobody else takes part in.

    Raises:
        InputError: There are more processes on this machine than GPUs.
        RuntimeError: Ultralytics has been imported before.
    """
    told = {name: int(os.environ.pop(name)) for name in RANK_VARIABLES if name in os.environ}
    local_rank = told.get("LOCAL_RANK", 0)
    size = told["WORLD_SIZE"] if "LOCAL_RANK" in told else 1
    gpus = torch.cuda.device_count()
    if gpus and local_rank >= gpus:
        raise InputError(
            f"{told['LOCAL_WORLD_SIZE']} processes on this machine, which has {gpus} GPUs; set supernet.processes to "
            f"{gpus} or less (torchrun: --nproc-per-node)"
        )
    device = torch.device("cuda", local_rank) if gpus else torch.device("cpu")
    if gpus:
        torch.cuda.set_device(device)
    if size == 1:
        yield Processes(device)
        return
    if "ultralytics" in sys.modules:
        raise RuntimeError("join() must come before the import of Ultralytics, which reads torchrun's environment")
    dist.init_process_group(
        "nccl" if gpus else "gloo",
        rank=told["RANK"],
        world_size=size,
        timeout=TIMEOUT,
        device_id=device if gpus else None,
    )
    yield Processes(device, told["RANK"], size, told["LOCAL_WORLD_SIZE"])
    dist.destroy_process_group()  # after a failure the processes are not in step any more, and end as they are


def launch(processes: int, module: str, arguments: Sequence[str], environment: Mapping[str, str]) -> int:
    """Run a module in several processes of this machine, and wait for their end.

    Where one process fails, torchrun ends the others. To end with the caller, however that ends, is up to the module.

    Args:
        processes: How many.
        module: Name of the module, which is run as `__main__` and calls `join`.
        arguments: Its arguments.
        environment: Variables beside those of this process.

    Returns:
        The exit status; 0 where all processes ended well.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1"]
    command += [f"--nproc-per-node={processes}", "-m", module, *arguments]
    with subprocess.Popen(command, env={"OMP_NUM_THREADS": "1", **os.environ, **environment}) as process:
        try:
            return process.wait()
        finally:
            process.terminate()  # without effect where it has ended; else torchrun ends its processes first


def _buckets(gradients: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Gradients in order, in lists of `BUCKET_BYTES` or one tensor more."""
    bucket: list[Tensor] = []
    for gradient in gradients:
        bucket.append(gradient)
        if sum(g.nbytes for g in bucket) >= BUCKET_BYTES:
            yield bucket
            bucket = []
    if bucket:
        yield bucket
