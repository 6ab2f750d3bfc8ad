"""Torch's own settings around a call: which kernels may run, what is made by default.

`with sdpa_kernel(…)`, `set_default_dtype` inside a forward: a function that is called by itself must be
called under what was set then; a module that stays whole sets it again itself.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

_Setting = tuple[Callable[[], Any], Callable[[Any], Any]]  # how to ask for it, how to set it


_NEWER = "told by the newer names"


def _precision() -> str:
    """Which kernels multiply matrices in fp32: torch refuses to say where a program used the newer names."""
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:
        return _NEWER


def _set_precision(precision: str) -> None:
    if precision != _NEWER:
        torch.set_float32_matmul_precision(precision)


def _attribute(backend: Any, name: str) -> _Setting:  # backend: one of the modules of torch.backends
    return functools.partial(getattr, backend, name), functools.partial(setattr, backend, name)


_SETTINGS: Mapping[str, _Setting] = {
    "the default type": (torch.get_default_dtype, torch.set_default_dtype),
    "flash attention": (torch.backends.cuda.flash_sdp_enabled, torch.backends.cuda.enable_flash_sdp),
    "memory-efficient attention": (
        torch.backends.cuda.mem_efficient_sdp_enabled,
        torch.backends.cuda.enable_mem_efficient_sdp,
    ),
    "plain attention": (torch.backends.cuda.math_sdp_enabled, torch.backends.cuda.enable_math_sdp),
    "cuDNN's attention": (torch.backends.cuda.cudnn_sdp_enabled, torch.backends.cuda.enable_cudnn_sdp),
    "the order of attention kernels": (
        torch._C._get_sdp_priority_order,  # noqa: SLF001 (what sdpa_kernel itself calls)
        torch._C._set_sdp_priority_order,  # noqa: SLF001
    ),
    "deterministic algorithms": (torch.get_deterministic_debug_mode, torch.set_deterministic_debug_mode),
    "oneDNN": _attribute(torch.backends.mkldnn, "enabled"),
    "cuDNN": _attribute(torch.backends.cudnn, "enabled"),
    "cuDNN's deterministic kernels": _attribute(torch.backends.cudnn, "deterministic"),
    "cuDNN's search for kernels": _attribute(torch.backends.cudnn, "benchmark"),
    "the precision of matmuls": (_precision, _set_precision),
    "sums of matmuls in fp16": (
        torch._C._get_cublas_allow_fp16_reduced_precision_reduction,  # noqa: SLF001 (backends.cuda.matmul's)
        torch._C._set_cublas_allow_fp16_reduced_precision_reduction,  # noqa: SLF001
    ),
    "sums of matmuls in bf16": (
        torch._C._get_cublas_allow_bf16_reduced_precision_reduction,  # noqa: SLF001
        torch._C._set_cublas_allow_bf16_reduced_precision_reduction,  # noqa: SLF001
    ),
}

Settings = Mapping[str, Any]
_ASKING = [ask for ask, _ in _SETTINGS.values()]


def settings_now() -> list[Any]:
    """All settings as they are, in one order."""
    return [ask() for ask in _ASKING]


def changed_since(before: list[Any]) -> Settings:
    """The settings that are other than they were, as they are."""
    now = settings_now()
    if now == before:
        return {}
    return {name: new for name, old, new in zip(_SETTINGS, before, now, strict=True) if new != old}


@contextlib.contextmanager
def _set(settings: Settings) -> Iterator[None]:
    before = {name: _SETTINGS[name][0]() for name in settings}
    try:
        for name, value in settings.items():
            _SETTINGS[name][1](value)
        yield
    finally:
        for name, value in before.items():
            _SETTINGS[name][1](value)


class Under:
    """A torch function that is called under settings of its own."""

    def __init__(self, function: Callable[..., Any], settings: Settings) -> None:
        functools.update_wrapper(self, function, updated=())
        self.function, self.settings = function, settings

    def __call__(self, *args: Any, **kwargs: Any) -> Any:  # as the function
        with _set(self.settings):
            return self.function(*args, **kwargs)


def bare(function: Callable[..., Any]) -> Callable[..., Any]:
    """A torch function without the settings that it is called under."""
    return function.function if isinstance(function, Under) else function
