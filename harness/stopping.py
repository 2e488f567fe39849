"""How a run ends early.

After a signal, the run finishes its step and saves. After an error, it saves its last complete step
if it still has that step's weights. With an adapter it always has them, so an error costs one step.
In full training an error during the update costs every step since the last checkpoint.
"""

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn
from tqdm import tqdm

from harness.errors import OnlyStateSaved, Stopped, UserError
from lora import lora_layers, trainable

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class StopOnSignal:
    """After the first Ctrl-C, TERM or HUP the run finishes its step, saves and stops.

    A second Ctrl-C stops it at once. Batch systems and spot machines send TERM, and a closed
    terminal sends HUP. Both may come more than once, so neither ever stops the run at once. A run
    under nohup ignores HUP and continues without its terminal.
    """

    asked = 0  # the first signal that came; 0 = none
    immediate = False

    def __enter__(self) -> "StopOnSignal":
        self.terminals = [fd for fd in (1, 2) if os.isatty(fd)]
        self.before = {}
        if (
            threading.current_thread() is threading.main_thread()
        ):  # Python allows handlers only there
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
        tqdm.write("stopping after this step; Ctrl-C stops now and loses this step")

    def _forget_terminal(self) -> None:
        """Send output to /dev/null. A write to a closed terminal would fail and lose the step."""
        for fd in self.terminals:
            os.dup2(os.open(os.devnull, os.O_WRONLY), fd)

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """While inside, stop at once on a signal, also on one that came before.

        It is for evals, which come after a checkpoint: there is nothing to lose.
        """
        self.immediate = True
        try:
            self.check()
            yield
        finally:
            self.immediate = False

    def check(self) -> None:
        """Raise Stopped if a signal has come."""
        if self.asked:
            raise Stopped(self.asked)


class LastStep:
    """Saves a run as of its last complete step if a later step fails.

    An error may come between two updates of a step, when the weights belong to no step. `done`
    therefore copies an adapter and its moments to CPU memory at the end of every step (12 bytes per
    weight; 0.4 GB for r=32 at 1.5B). In full training the copy would be three times the whole
    model, so none is made. If an update has begun there, the steps since the last checkpoint are
    lost, and the message names them.
    """

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, save: Callable[[int], None]
    ):
        """save(step) writes a checkpoint of the model and the optimizer as they are now."""
        self.optimizer, self._save = optimizer, save
        self._trained = list(trainable(model).values())
        self.parameters = self._trained if lora_layers(model) else []  # those with copies
        self.step: int | None = None  # the last complete step
        self.saved: int | None = None  # the step of the last checkpoint
        self.intact = True  # whether the weights are those of self.step
        self.copies: list[tuple[torch.Tensor, dict[str, torch.Tensor]]] = []
        optimizer.register_step_pre_hook(self._weights_move)

    def save(self, step: int) -> None:
        """Write a checkpoint after a step."""
        try:
            self._save(step)
        except OnlyStateSaved:
            self.saved = step
            raise
        self.saved = step

    def _weights_move(self, *_) -> None:
        """Called before every update. Until the next `done`, the weights belong to no step."""
        self.intact = False

    def done(self, step: int) -> None:
        """Note that the step is complete and logged. step=0 means before the first one.

        Call it before `save`, so that an error while saving does not lose the step. Raises
        UserError if a weight is not finite.
        """
        if not self._finite():
            raise UserError(f"the weights are not finite after step {step}: lower --lr")
        copies = []
        for parameter in self.parameters:
            weight = parameter.detach().to("cpu", copy=True)
            state = self.optimizer.state[parameter].items()
            moments = {key: value.to("cpu", copy=True) for key, value in state}
            copies.append((weight, moments))
        # All at once: an interruption while copying must leave the previous step's copies whole.
        self.step, self.copies, self.intact = step, copies, True

    def _finite(self) -> bool:
        """Whether all weights are finite. Poisoned ones must not replace the last good step."""
        return bool(torch.stack([p.detach().isfinite().all() for p in self._trained]).all())

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
        """Save the last complete step if possible. Return what to tell the user."""
        if self.saved is None or self.saved < self.step:
            if not (self.copies or self.intact):
                return self._lost()
            try:
                self._restore()
                self.save(self.step)
            except (OSError, UserError) as error:  # such as a full disk
                return f"step {self.step} could not be saved ({error}); {self._lost()}"
        return f"saved as of step {self.saved}, --resume=True continues from there"

    def _restore(self) -> None:
        """Put the copies in place of the parameters. It avoids the GPU, which may have failed."""
        for parameter, (weight, moments) in zip(self.parameters, self.copies, strict=True):
            parameter.data = weight
            self.optimizer.state[parameter] = moments

    def _lost(self) -> str:
        """Which steps are lost, and where resuming starts."""
        if self.step == 0:
            return "no step was complete, and there is no checkpoint"
        if self.saved is None:
            return f"steps 1 to {self.step} are lost: there is no checkpoint yet"
        return (
            f"steps {self.saved + 1} to {self.step} are lost: "
            f"--resume=True continues from the checkpoint of step {self.saved}"
        )
