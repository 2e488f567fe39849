"""Several processes share one run: torchrun --standalone --nproc_per_node=N train.py ...

Every process, or rank, holds the whole model. The ranks share a step's prompts, then its
micro-batches, and add up their gradients, so all make the update that one process would make.
Everything random is a function of (seed, step, row), never of the rank. The first rank alone
computes rewards, reads and writes the run folder, and prints. Without torchrun there is one rank,
and every function here returns what it is given.

Signals and errors end all ranks. The first rank then saves the last complete step.
"""

from __future__ import annotations

import io
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import nn

from harness.errors import UserError
from lora import trainable

T = TypeVar("T")
LAST_WORDS = "last words"  # what the first rank reported, if it has failed
PATIENCE = 3.0  # seconds for which another rank waits for them before it reports its own error


class Lost(UserError):
    """Another rank has ended, so this one cannot go on."""


def size() -> int:
    """The number of ranks."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """The number of this rank, from 0."""
    return dist.get_rank() if size() > 1 else 0


# ------------------------------------------------------------------------------- sharing the work


def share(items: Sequence[T]) -> Sequence[T]:
    """This rank's items: consecutive ones, as many as the others have, or one more or less."""
    n = len(items)
    return items[n * rank() // size() : n * (rank() + 1) // size()]


def deal(parts: list[list[T]]) -> list[list[T]]:
    """This rank's micro-batches of each mini-batch (see data.partition), dealt out in turn.

    They hold about equally many padded tokens. Each mini-batch is dealt from another rank on, so
    that no rank always has one more.
    """
    return [mini[(rank() - i) % size() :: size()] for i, mini in enumerate(parts)]


def add(tensors: list[torch.Tensor]) -> None:
    """Replace each tensor by its sum over the ranks."""
    if size() > 1:
        for work in [dist.all_reduce(tensor, async_op=True) for tensor in tensors]:
            _wait(work)


def gather(value: T) -> list[T]:
    """Every rank's value, in the order of the ranks. Tensors arrive on the CPU."""
    return [_from(source, value) for source in range(size())] if size() > 1 else [value]


def on_first(function: Callable[..., T], *args) -> T:
    """The result of function(*args), which the first rank alone computes."""
    if size() == 1:
        return function(*args)
    return _from(0, function(*args) if rank() == 0 else None)


def copy_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Give every rank the trainable weights and the optimiser's moments of the first one."""
    if size() > 1:
        weights = on_first(lambda: [weight.detach() for weight in trainable(model).values()])
        with torch.no_grad():
            for weight, value in zip(trainable(model).values(), weights, strict=True):
                weight.copy_(value)
        optimizer.load_state_dict(on_first(optimizer.state_dict))


def check_equal(parameters: list[nn.Parameter]) -> None:
    """Raise UserError unless the ranks' weights have the same sum."""
    if size() == 1:
        return
    sums = gather(float(sum(p.detach().sum(dtype=torch.float64) for p in parameters)))
    if len(set(sums)) > 1:
        raise UserError(f"the weights of the processes differ (their sums are {sums}): resume")


def _from(source: int, value: T) -> T:
    """A copy of the value of the rank `source`."""
    buffer, length = io.BytesIO(), torch.zeros(1, dtype=torch.int64)
    if rank() == source:
        torch.save(value, buffer)
        length += buffer.tell()
    _wait(dist.broadcast(length, source, async_op=True))
    data = torch.zeros(int(length), dtype=torch.uint8)
    if rank() == source:
        data = torch.frombuffer(buffer.getbuffer(), dtype=torch.uint8)
    _wait(dist.broadcast(data, source, async_op=True))
    return torch.load(io.BytesIO(data.numpy()), map_location="cpu", weights_only=False)


def _wait(work: dist.Work) -> None:
    """Wait in Python, where signals are heard. Raises Lost if another rank has ended."""
    while not work.is_completed():
        time.sleep(2e-4)
    try:
        work.wait()
    except RuntimeError as error:
        raise Lost(f"one of the {size()} processes has ended") from error


# -------------------------------------------------------------------------- beginning and ending


@contextmanager
def together() -> Iterator[None]:
    """Join the ranks that torchrun has started. Only the first one prints, except for errors."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield
        return
    own_gpu = torch.cuda.device_count() >= int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and own_gpu else "gloo"
    store, number, n = next(dist.rendezvous("env://"))
    forever = timedelta(days=365)  # a rank that ends is noticed without a time limit
    dist.init_process_group(backend, store=store, rank=number, world_size=n, timeout=forever)
    streams = sys.stdout, sys.stderr
    if number:
        sys.stdout = sys.stderr = open(os.devnull, "w")
    try:
        print(f"{n} processes share each step ({backend})")
        yield
        dist.destroy_process_group()
    except (UserError, KeyboardInterrupt) as error:
        if number and isinstance(error.__cause__, UserError):
            error = error.__cause__  # without LastStep's note, since this rank saves nothing
        if not _speaks(store, error):
            raise SystemExit(2 if isinstance(error, UserError) else 1) from None
        raise error from error.__cause__
    finally:
        sys.stdout, sys.stderr = streams


def _speaks(store: dist.Store, error: BaseException) -> bool:
    """Whether this rank reports its error. The first rank always does. Another rank leaves it to
    the first one, or to another that failed in the same way, unless its error is its own."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # this rank is ending already
    with suppress(RuntimeError):  # the store may have ended together with torchrun
        if rank() == 0:
            store.set(LAST_WORDS, str(error))
            return True
        deadline = time.monotonic() + PATIENCE
        while not (said := store.check([LAST_WORDS])) and time.monotonic() < deadline:
            time.sleep(0.05)
        follows = isinstance(error, Lost | KeyboardInterrupt)
        if said and (follows or str(error) in store.get(LAST_WORDS).decode()):
            return False
        return store.add(f"said: {error}", 1) == 1
    return True


def device(name: str) -> str:
    """The device of this rank for the setting `name`: each rank has a GPU of its own if it can."""
    if size() == 1 or name == "cpu" or not torch.cuda.is_available():
        return name
    if name not in ("auto", "cuda"):
        raise UserError(f"device={name}: each process uses its own GPU: use --device=cuda")
    return f"cuda:{int(os.environ['LOCAL_RANK']) % torch.cuda.device_count()}"


class Follower:
    """The run folder as all ranks but the first have it. It keeps and writes nothing."""

    def __init__(self, folder: Path):
        self.folder, self.history = folder, []

    def _nothing(self, *_) -> None:
        pass

    load_state = save_state = repair_weights = log = log_eval = _nothing
    compare_inputs = __enter__ = __exit__ = _nothing
