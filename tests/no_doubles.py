"""Tensors that stand for those on a device without float64, as MPS is."""

from typing import Any

import torch


class NoDoubles(torch.Tensor):
    """On the CPU in truth; it refuses to become float64 before it was brought there.

    >>> torch.ones(2).as_subclass(NoDoubles).cpu().double().sum()
    tensor(2., dtype=torch.float64)
    """

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_function__(func, types, args, kwargs or {})
        if func is torch.Tensor.cpu:
            return result.as_subclass(torch.Tensor)
        if isinstance(result, cls) and result.dtype == torch.float64:
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype.")
        return result
