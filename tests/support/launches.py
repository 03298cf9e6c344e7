"""Launches of kernels as a GPU would get them, on a machine without one: specialised and made Triton IR, never run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest

from autopart.kernels import launch as module

CAPABILITY = 90
MOST = 2**31 - 1, 65535, 65535
"""Programs along each axis of a grid. Source: NVIDIA, CUDA C++ Programming Guide, table "Technical Specifications per
Compute Capability"."""


class Launch(NamedTuple):
    """A launch: the function's name, its grid of three axes, and its Triton IR."""

    name: str
    grid: tuple[int, ...]
    ir: str


class _Driver:
    """Stands for a GPU's driver."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", CAPABILITY, 32)


@contextmanager
def recorded(monkeypatch: pytest.MonkeyPatch, wide: bool = False) -> Iterator[list[Launch]]:
    """The launches within the block, which takes tensors of any device for those of a GPU. Results are not computed.

    wide  whether Python's floats are float64, as torch.compile passes them; else float32, as Triton's launcher does
    """
    triton = pytest.importorskip("triton")
    found: list[Launch] = []
    real = module.jitted

    def jitted(kernel: Any) -> Any:
        with monkeypatch.context() as inner:
            inner.setattr(module, "jitted", real)  # which calls itself for the functions that a function calls
            return _Recorder(real(kernel), found, wide)

    register = dict.fromkeys(("TRITON_INTERPRET", "AUTOPART_FORCE_TRITON"), "1")
    with monkeypatch.context() as patch:
        patch.setattr(module, "jitted", jitted)
        patch.setattr(module, "os", SimpleNamespace(environ=register))
        patch.setattr(triton.runtime.driver, "_active", _Driver())
        yield found


class _Recorder:
    def __init__(self, made: Any, found: list[Launch], wide: bool) -> None:
        self.made, self.found, self.wide = made, found, wide

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def run(*arguments: Any, **options: Any) -> None:
            caches = self.made.device_caches
            caches.clear()
            caches[0]  # which sets the compiler
            self.made.compile = self._ir
            made = self.made.run(*arguments, grid=grid, warmup=True, **options)
            self.found.append(Launch(self.made.fn.__name__, (*grid, 1, 1)[:3], made.ir))
            caches.clear()

        return run

    def _ir(self, source: Any, target: Any, options: Any) -> Any:
        from triton._C.libtriton import ir
        from triton.compiler import make_backend

        if self.wide:
            source.signature = {name: "fp64" if kind == "fp32" else kind for name, kind in source.signature.items()}
        backend, context = make_backend(target), ir.context()
        ir.load_dialects(context)
        backend.load_dialects(context)
        given = backend.parse_options(dict(options))
        functions, modules = backend.get_codegen_implementation(given), backend.get_module_map()
        return SimpleNamespace(ir=str(source.make_ir(target, given, functions, modules, context)))
