"""Counts how often the host reads a value from a tensor. On a GPU each such read waits for all earlier work."""

from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

READS = frozenset({"item", "tolist", "numpy", "cpu", "nonzero", "__int__", "__float__", "__bool__", "__index__", "__array__"})
"""Methods of a tensor that copy values to the host."""


class HostReads:
    """Inside the block, counts reads of this thread: by methods of tensors, and by torch's own code below Python."""

    def __init__(self) -> None:
        self.count = 0
        self._methods = _Methods(self)
        self._operators = _Operators(self)

    def __enter__(self) -> "HostReads":
        self._methods.__enter__()
        self._operators.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._operators.__exit__(*error)
        self._methods.__exit__(*error)


class _Methods(TorchFunctionMode):
    """Counts the methods that do not become operators on a CPU, such as `tolist`."""

    def __init__(self, reads: HostReads) -> None:
        super().__init__()
        self._reads = reads

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = self._reads.count
        result = func(*args, **(kwargs or {}))
        if getattr(func, "__name__", "") in READS:
            self._reads.count = before + 1  # one read, also if operators below have been counted
        return result


class _Operators(TorchDispatchMode):
    def __init__(self, reads: HostReads) -> None:
        super().__init__()
        self._reads = reads

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            self._reads.count += 1
        return func(*args, **(kwargs or {}))
