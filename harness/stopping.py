"""How a run ends before its time: signals wait for the step's end, errors cost one step at most."""

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn
from tqdm import tqdm

from harness.errors import Stopped, UserError
from lora import lora_layers, trainable

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class StopOnSignal:
    """The first Ctrl-C, TERM or HUP lets the step end and saves; a second Ctrl-C stops at once.

    TERM is what batch systems and spot machines send, HUP what a closed terminal sends. Either may
    come more than once, so only Ctrl-C is understood as impatience. A run under nohup goes on
    without its terminal.
    """

    asked = 0  # the signal that came, 0 = none
    immediate = False

    def __enter__(self) -> "StopOnSignal":
        self.terminals = [fd for fd in (1, 2) if os.isatty(fd)]
        self.before = {}
        if threading.current_thread() is threading.main_thread():  # else no signals
            self.before = {number: signal.getsignal(number) for number in SIGNALS}
            if self.before[signal.SIGHUP] is signal.SIG_IGN:  # nohup
                del self.before[signal.SIGHUP]
            for number in self.before:
                signal.signal(number, self._ask)
        return self

    def __exit__(self, *error) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, _) -> None:
        if number == signal.SIGHUP:
            self._forget_terminal()
        if self.asked:
            return
        self.asked = number
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if self.immediate:
            raise Stopped(number)
        tqdm.write("stopping after this step; Ctrl-C stops at once, without saving it")

    def _forget_terminal(self) -> None:
        """Output to a closed terminal would fail, and with it the step that is to be saved."""
        for fd in self.terminals:
            os.dup2(os.open(os.devnull, os.O_WRONLY), fd)

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Inside, a signal stops at once, also one that came before: there is nothing to lose."""
        self.immediate = True
        try:
            self.check()
            yield
        finally:
            self.immediate = False

    def check(self) -> None:
        """Raise Stopped where a signal has come."""
        if self.asked:
            raise Stopped(self.asked)


class LastStep:
    """Saves a run as of its last complete step, whatever ends it in a later one.

    An error may come between two updates of a step, when the weights belong to no step at all. So
    `done` copies an adapter and its moments to the machine's memory at every step's end (12 bytes a
    weight; 0.4 GB for r=32 at 1.5B). In full training that would be the whole model three times:
    there the steps since the last checkpoint are lost where an update has begun, and the message
    says which.
    """

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, save: Callable[[int], None]
    ):
        """save(step) writes a checkpoint of the model and the optimizer as they are."""
        self.optimizer, self._save = optimizer, save
        self.parameters = list(trainable(model).values()) if lora_layers(model) else []
        self.step: int | None = None  # the last complete one
        self.saved: int | None = None  # the last one with a checkpoint
        self.intact = True  # whether the weights are those of self.step
        self.copies: list[tuple[torch.Tensor, dict[str, torch.Tensor]]] = []
        optimizer.register_step_pre_hook(self._weights_move)

    def save(self, step: int) -> None:
        """Checkpoint after a step."""
        self._save(step)
        self.saved = step

    def _weights_move(self, *_) -> None:
        """From here to the next `done` the weights belong to no step."""
        self.intact = False

    def done(self, step: int) -> None:
        """The step is complete and logged; 0 before the first one."""
        self.step, self.intact = step, True
        # clone: on the CPU the copy would otherwise be the tensor itself
        self.copies = []
        for parameter in self.parameters:
            weight = parameter.detach().to("cpu", copy=True)
            state = self.optimizer.state[parameter].items()
            moments = {key: value.to("cpu", copy=True) for key, value in state}
            self.copies.append((weight, moments))

    def __enter__(self) -> "LastStep":
        return self

    def __exit__(self, kind, error, traceback) -> None:
        if error is None or self.step is None:
            return
        note = self._rescue()
        if isinstance(error, UserError):
            raise UserError(f"{error}; {note}") from error
        what = "stopped" if isinstance(error, KeyboardInterrupt) else f"{kind.__name__}"
        print(f"{what}: {note}", file=sys.stderr)

    def _rescue(self) -> str:
        """Save the last complete step where it can be done; what to tell the user."""
        if self.saved != self.step and not (self.copies or self.intact):
            return self._lost()
        try:
            if self.saved != self.step:
                self._restore()
                self.save(self.step)
        except (OSError, UserError) as error:  # a full disk, say: the first error matters more
            return f"step {self.step} could not be saved ({error}); {self._lost()}"
        return f"saved as of step {self.step}, --resume=True goes on from there"

    def _restore(self) -> None:
        """Put the copies in place, without the GPU, which may be what failed."""
        for parameter, (weight, moments) in zip(self.parameters, self.copies, strict=True):
            parameter.data = weight
            self.optimizer.state[parameter] = moments

    def _lost(self) -> str:
        if self.saved is None:
            return f"steps 1 to {self.step} are lost: there is no checkpoint yet"
        goes_on = f"the run goes on from its checkpoint of step {self.saved} by --resume=True"
        if self.saved == self.step:
            return goes_on
        return f"steps {self.saved + 1} to {self.step} are lost: {goes_on}"
