"""A pretended GPU on a machine without one: CPU numbers, and a tag on each storage that is "there".

Inside `pretended()`, tensors made or moved with device="cuda" are tagged and say so. An operator
on tagged and other tensors raises, as a GPU would refuse it. What the host would wait for and what
would be copied to the GPU is counted by the function of ours that asked; inside a capture both
raise. `load` loads a model on the CPU and tags it.
"""

import sys
import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from unittest import mock

import torch
import torch.utils.checkpoint
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _pop_mode_temporarily
from torch.utils._pytree import tree_leaves

ROOT = str(Path(__file__).resolve().parents[1])
GPU, CPU = torch.device("cuda", 0), torch.device("cpu")
WAITS = {
    "_local_scalar_dense",
    "nonzero",
    "masked_select",
    "bincount",
    "equal",
    "is_nonzero",
    "_unique2",
    "unique_consecutive",
}
# These may read from one device and write to another, or make a tensor of neither.
MOVES = {"copy_", "_to_copy", "detach", "alias", "lift_fresh", "set_"}
INDEXING = {"index", "index_put_", "index_put", "_index_put_impl_", "_unsafe_index"}


class Refused(RuntimeError):
    """The code does something that a GPU, or a capture on one, does not allow."""


class Pretended:
    """The pretended device: which tensors are on it, and what it was asked to do."""

    def __init__(self):
        self.storages: set[int] = set()
        self.capturing = False
        self.waits, self.uploads = Counter(), Counter()

    def has(self, tensor: torch.Tensor) -> bool:
        with torch._C.DisableTorchFunction():
            return tensor.untyped_storage()._cdata in self.storages

    def put(self, tensor: torch.Tensor) -> torch.Tensor:
        with torch._C.DisableTorchFunction():
            storage = tensor.untyped_storage()
        if storage._cdata not in self.storages:
            self.storages.add(storage._cdata)
            weakref.finalize(storage, self.storages.discard, storage._cdata)
        return tensor

    def note(self, counter: Counter, what: str) -> None:
        if self.capturing:
            raise Refused(f"in a capture: {what} in {_caller()}")
        counter[_caller()] += 1


def _caller() -> str:
    """The innermost function of this project on the stack, as file:function."""
    frame = sys._getframe(1)
    while frame:
        file = frame.f_code.co_filename
        if file.startswith(ROOT) and file != __file__ and "/.venv/" not in file:
            return f"{Path(file).name}:{frame.f_code.co_name}"
        frame = frame.f_back
    return "elsewhere"


class _Operators(TorchDispatchMode):
    """Refuses mixed devices, counts waits, and passes tags on to results."""

    def __init__(self, gpu: Pretended):
        super().__init__()
        self.gpu = gpu

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        gpu, name = self.gpu, op._schema.name.split("::")[1]
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        there = [gpu.has(x) for x in tensors]
        if any(there):
            if name == "copy_" and not all(there):
                gpu.note(gpu.uploads if there[0] else gpu.waits, "a copy")
            elif name in INDEXING:
                self.check_index(args)
            elif name not in MOVES and any(
                x.dim() for x, t in zip(tensors, there, strict=True) if not t
            ):
                raise Refused(f"{name} of tensors on two devices in {_caller()}")
            if name in WAITS:
                gpu.note(gpu.waits, name)
        elif gpu.capturing and name not in MOVES and any(x.numel() > 1 for x in tensors):
            raise Refused(f"in a capture: {name} on the CPU in {_caller()}")
        if op is torch.ops.aten.mm.dtype:  # bf16 into fp32, which only CUDA has
            op, args = torch.ops.aten.mm.default, (args[0].to(args[2]), args[1].to(args[2]))
        out = op(*args, **(kwargs or {}))
        if any(there) and name not in ("copy_", "_local_scalar_dense"):
            for x in tree_leaves(out):
                if isinstance(x, torch.Tensor):
                    gpu.put(x)
        return out

    def check_index(self, args) -> None:
        gpu = self.gpu
        index = [i for i in args[1] if i is not None]
        if not gpu.has(args[0]):
            raise Refused(f"a CPU tensor at indices on the GPU in {_caller()}")
        if any(i.dtype == torch.bool for i in index):
            gpu.note(gpu.waits, "an index by a mask")
        if not all(gpu.has(i) for i in index):
            gpu.note(gpu.uploads, "an index from the CPU")
        if len(args) > 2 and args[2].dim() and not gpu.has(args[2]):
            raise Refused(f"values from the CPU in {_caller()}")


def _is_gpu(device) -> bool:
    return device is not None and torch.device(device).type == "cuda"


class _Functions(TorchFunctionMode):
    """Answers questions about the device, and makes and moves tensors."""

    ASKS = {
        torch.Tensor.device.__get__: lambda t: GPU if t else CPU,
        torch.Tensor.is_cuda.__get__: bool,
        torch.Tensor.is_cpu.__get__: lambda t: not t,
        torch.Tensor.get_device: lambda t: 0 if t else -1,
    }

    def __init__(self, gpu: Pretended):
        super().__init__()
        self.gpu = gpu

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs, gpu = dict(kwargs or {}), self.gpu
        if function in self.ASKS:
            return self.ASKS[function](gpu.has(args[0]))
        if function is torch.Tensor.cpu:
            return self.move(args[0], CPU)
        if function is torch.Tensor.to:
            return self.to(*args, **kwargs)
        if function is torch.Tensor.numpy and gpu.has(args[0]):
            raise Refused(f"numpy of a tensor on the GPU in {_caller()}")
        if function is torch.Tensor.tolist and gpu.has(args[0]):
            gpu.note(gpu.waits, "tolist")
            with torch._C._DisableTorchDispatch():
                return function(args[0])
        if _is_gpu(kwargs.get("device")):
            kwargs["device"] = CPU
            if function in (torch.tensor, torch.as_tensor):
                gpu.note(gpu.uploads, "a tensor of Python numbers")
            return gpu.put(function(*args, **kwargs))
        return function(*args, **kwargs)

    def to(self, tensor, *args, device=None, dtype=None, copy=False, **kwargs):
        for x in args:
            if isinstance(x, torch.dtype):
                dtype = x
            elif isinstance(x, str | torch.device):
                device = x
            elif isinstance(x, torch.Tensor):
                device, dtype = (GPU if self.gpu.has(x) else CPU), x.dtype
        if device is None:
            return tensor.to(dtype=dtype, copy=copy)
        return self.move(tensor, torch.device(device), dtype, copy)

    def move(self, tensor, device, dtype=None, copy=False):
        gpu, dtype = self.gpu, dtype or tensor.dtype
        if gpu.has(tensor) == _is_gpu(device):
            return tensor.to(dtype=dtype, copy=copy)
        gpu.note(gpu.uploads if _is_gpu(device) else gpu.waits, "a move")
        out = tensor.to(dtype=dtype, copy=True)
        if _is_gpu(device):
            return gpu.put(out)
        gpu.storages.discard(out.untyped_storage()._cdata)
        return out


class Capture:
    """Replaces a CUDA graph: runs the step at each replay, under the rules of a capture."""

    def __init__(self, gpu: Pretended):
        self.gpu, self.captured, self.replayed = gpu, 0, 0

    def __call__(self, step, pool):
        slots = step.__self__
        state = [slots.row, slots.token, slots.over, slots.done]
        state += [*slots.cache.keys, *slots.cache.values]
        state += [x for x in vars(slots.rows).values() if torch.is_tensor(x)]
        before = [x.clone() for x in state]
        self.run(step)
        for mine, value in zip(state, before, strict=True):  # nothing runs in a capture
            mine.copy_(value)
        self.captured += 1
        return _Graph(self, step, slots.n, slots.cache.shape)

    def run(self, step):
        self.gpu.capturing = True
        try:
            step()
        finally:
            self.gpu.capturing = False


class _Graph:
    def __init__(self, capture: Capture, step, n: int, columns: int):
        self.capture, self.step, self.shape = capture, step, (n, columns)

    def replay(self):
        self.capture.run(self.step)
        self.capture.replayed += 1


def put(gpu: Pretended, model: torch.nn.Module) -> torch.nn.Module:
    """Tag a model's weights, and what belongs to those in 4 bits."""
    for tensor in (*model.parameters(), *model.buffers()):
        gpu.put(tensor)
        state = getattr(tensor, "quant_state", None)
        while state is not None:
            for part in (state.absmax, state.code, state.offset):
                if torch.is_tensor(part):
                    gpu.put(part)
            state = state.state2
    return model


def load(gpu: Pretended, function, *args, **kwargs) -> torch.nn.Module:
    """Load a model on the CPU as if nobody pretended, and tag it.

    Loading under the modes would leave computed buffers (rotary frequencies) unwritten.
    """
    with torch.overrides._pop_mode_temporarily(), _pop_mode_temporarily():
        model = function(*args, **kwargs)
    return put(gpu, model)


@contextmanager
def pretended() -> Iterator[Pretended]:
    """Within this context, the machine seems to have one GPU."""
    gpu = Pretended()
    with ExitStack() as stack:
        patch = lambda *a: stack.enter_context(mock.patch.object(*a))  # noqa: E731
        patch(torch.cuda, "mem_get_info", lambda d=None: (24 * 10**9, 24 * 10**9))
        patch(torch.cuda, "memory_reserved", lambda d=None: 0)
        patch(torch.utils.checkpoint, "_infer_device_type", lambda *a: "cpu")
        # Checkpointing compares devices, and in the backward pass the modes are not active.
        checks = torch.utils.checkpoint._allowed_determinism_checks_to_fns
        stack.enter_context(mock.patch.dict(checks, {"default": lambda x: (x.shape, x.dtype)}))
        stack.enter_context(_Operators(gpu))
        stack.enter_context(_Functions(gpu))
        yield gpu
