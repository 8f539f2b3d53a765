"""The memory that a step takes: the peak of the process or GPU and, exactly, the tensors that the step makes."""

from __future__ import annotations

import contextlib
import ctypes
import weakref
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class TensorBytes(TorchDispatchMode):
    """Counts the bytes of tensors made inside the block that are still alive, `now` and at their `peak`.

    A number of the computation alone, equal in every run; what kernels use inside themselves is not in it. Works on
    every device, and in the backward pass.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._alive: set[int] = set()  # addresses of storages

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation and count the storages that only its outputs have."""
        kwargs = kwargs or {}
        given = {storage._cdata for storage in _storages((args, kwargs))}
        outputs = func(*args, **kwargs)
        for storage in _storages(outputs):
            address = storage._cdata
            if address not in given and address not in self._alive:
                size = storage.nbytes()
                self._alive.add(address)
                self.now += size
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._release, address, size)
        return outputs

    def _release(self, address: int, size: int) -> None:
        self._alive.discard(address)
        self.now -= size


def _storages(tree: Any) -> list[torch.UntypedStorage]:
    return [leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def reset_peak() -> None:
    """Forget earlier peaks of the process or GPU."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # else what earlier steps have freed still counts (glibc)
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_gib() -> float:
    """Return the largest memory held since `reset_peak`: of the GPU, or without one of the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    status = Path("/proc/self/status").read_text()
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM"))) / 2**20
