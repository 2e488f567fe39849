"""The state files of a run: the newest checkpoint and the one before it.

    state.safetensors           weights and moments after the newest checkpoint's step
    state.previous.safetensors  the same after the checkpoint before it
    state.unused.safetensors    the newest one, if a resume continued from the one before it

A state names its step, the number of logged rows, and a checksum of all of it. Resuming uses the
newest state that is intact. States of older runs have no checksum.
"""

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from harness.adapters import save_tensors
from harness.errors import UserError
from harness.files import temporary_for
from harness.runfiles import PREVIOUS, STATE, UNUSED, read_numbers
from lora import trainable

MOMENTS = ("exp_avg", "exp_avg_sq", "step")  # AdamW's state of a parameter


def write(
    folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, step: int, logged: int
) -> None:
    """Write the state after a step. The state before it is kept as the previous one.

    Raises UserError if a weight or moment is not finite, or if the disk is full. The states on disk
    then stay as they are.
    """
    tensors = {}
    for name, parameter in trainable(model).items():
        tensors[f"weight:{name}"] = parameter
        for moment, value in optimizer.state[parameter].items():
            tensors[f"{moment}:{name}"] = value
    tensors = {name: t.detach().contiguous().cpu() for name, t in sorted(tensors.items())}
    _refuse_not_finite(tensors.items(), f"step {step} is not saved")
    numbers = {"steps_done": str(step), "logged": str(logged)}
    numbers["checksum"] = _checksum(tensors.items(), numbers)
    save_tensors(tensors, folder / STATE, numbers, before=lambda: _keep_previous(folder))


def _keep_previous(folder: Path) -> None:
    """Give the newest state a second name, so that replacing it does not delete it."""
    state, previous = folder / STATE, folder / PREVIOUS
    if not state.exists():
        return
    second = temporary_for(previous)
    try:
        os.link(state, second)
    except OSError:  # a file system without hard links
        os.replace(state, previous)
        return
    os.replace(second, previous)
    second.unlink(missing_ok=True)  # if a crash had left both with the same name already


def choose(folder: Path, step: int = 0) -> tuple[Path, dict[str, str]] | None:
    """The state to resume from and its numbers: the newest intact one, or that of `step`.

    Returns None if there is no state. Prints which state is damaged if another one is used. Raises
    UserError if all of them are damaged or none is of that step.
    """
    paths = [path for path in (folder / STATE, folder / PREVIOUS) if path.exists()]
    faults, steps = [], []
    for path in paths:
        try:
            numbers = read_numbers(path)
            steps.append(numbers["steps_done"])
            if step and int(numbers["steps_done"]) != step:
                continue
            _verify(path, numbers)
        except UserError as error:
            faults.append(str(error))
            continue
        if faults:
            print(f"{faults[0]}: continuing from the checkpoint before it, of step {steps[-1]}")
        return path, numbers
    if faults:
        raise UserError(
            f"{faults[0]}: there is no other checkpoint: start a new run in another --out_dir"
        )
    if paths:
        raise UserError(f"resume_step={step}: the checkpoints are of step {' and '.join(steps)}")
    return None


def make_newest(path: Path) -> None:
    """Make the chosen state the newest one. A newer one, damaged or not, is set aside."""
    state = path.with_name(STATE)
    if path == state:
        return
    if state.exists():
        os.replace(state, path.with_name(UNUSED))
    os.replace(path, state)


def restore(
    path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, updates_per_step: int
) -> int:
    """Restore weights and moments in place. Return the number of steps done.

    Raises UserError if the state does not have exactly the tensors of this run, or if it counts
    another number of updates.
    """
    done = int(read_numbers(path)["steps_done"])
    adam = isinstance(optimizer, torch.optim.Adam | torch.optim.AdamW)
    moments = MOMENTS if adam and done else ()
    wanted = {}
    for name, parameter in trainable(model).items():
        values = {"weight": parameter, **dict.fromkeys(moments, parameter)}
        if "step" in values:
            values["step"] = torch.tensor(float(done * updates_per_step))
        wanted |= {f"{kind}:{name}": value for kind, value in values.items()}
    try:
        with safe_open(path, "pt") as file:
            saved = {name: file.get_tensor(name) for name in file.keys()}
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: not a state of this run ({error})") from error
    _compare(path, saved, wanted)
    with torch.no_grad():
        for name, parameter in trainable(model).items():
            parameter.copy_(saved[f"weight:{name}"])
            if moments:
                optimizer.state[parameter] = {
                    m: saved[f"{m}:{name}"].to("cpu" if m == "step" else parameter.device)
                    for m in moments
                }
    return done


def _compare(path: Path, saved: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    """Compare names, types and shapes, and the values of the update counts."""
    for name in sorted(set(saved) ^ set(wanted)):
        what = "is missing" if name in wanted else "has no place in it"
        raise UserError(f"{path}: not a state of this run: {name} {what}")
    for name, value in saved.items():
        here = wanted[name]
        if value.dtype != here.dtype or value.shape != here.shape:
            raise UserError(
                f"{path}: not a state of this run: {name} is {value.dtype} {tuple(value.shape)}, "
                f"not {here.dtype} {tuple(here.shape)}"
            )
        if name.startswith("step:") and value.item() != here.item():
            raise UserError(
                f"{path}: not a state of this run: {name} counts {value.item():g} updates, "
                f"not {here.item():g}"
            )


def _verify(path: Path, numbers: dict[str, str]) -> None:
    """Raises UserError if the checksum does not fit or a value is not finite."""
    try:
        with safe_open(path, "pt") as file:
            names = sorted(file.keys())
            if "checksum" in numbers:  # older runs lack it
                others = {key: numbers[key] for key in ("steps_done", "logged")}
                tensors = ((name, file.get_tensor(name)) for name in names)
                if _checksum(tensors, others) != numbers["checksum"]:
                    raise UserError(f"{path}: damaged: its checksum does not fit")
            _refuse_not_finite(((name, file.get_tensor(name)) for name in names), str(path))
    except (OSError, SafetensorError, KeyError) as error:
        raise UserError(f"{path}: damaged ({error})") from error


def _refuse_not_finite(tensors: Iterable[tuple[str, Tensor]], what: str) -> None:
    for name, tensor in tensors:
        if not tensor.isfinite().all():
            raise UserError(f"{what}: {name} is not finite")


def _checksum(tensors: Iterable[tuple[str, Tensor]], numbers: dict[str, str]) -> str:
    """SHA-256 of the numbers and of the name, type, shape and bytes of each tensor, in order."""
    digest = hashlib.sha256(json.dumps(numbers, sort_keys=True).encode())
    for name, tensor in tensors:
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
