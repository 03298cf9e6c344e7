"""Compile a Triton kernel for a GPU that need not be present; read its registers and shared memory off the binary."""

import re
import subprocess
import tempfile
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from autopart.kernels.launch import jitted

_ALIGNED = [["tt.divisibility", 16]]


class Usage(NamedTuple):
    """Resources of one compiled kernel.

    registers  of a thread
    spills     bytes of a thread in stack and local memory; 0 where every value stays in registers
    shared     bytes of shared memory of a thread block
    warps      of a thread block
    """

    registers: int
    spills: int
    shared: int
    warps: int


def compile_kernel(
    kernel: Any,
    signature: Mapping[str, str],
    constexprs: Mapping[str, Any],
    capability: int,
    num_warps: int = 4,
    aligned: Collection[str] = (),
) -> Usage:
    """Compile a `jit` function ahead of time.

    signature   argument -> its Triton type (``"*bf16"``, ``"i32"``), of each argument that is no constexpr
    constexprs  argument -> its value, of the other arguments
    capability  compute capability of the GPU; 90 for 9.0
    aligned     arguments that the launcher would find divisible by 16

    Names that the kernel lacks are ignored. Raises RuntimeError where the kernel is interpreted, or where cuobjdump
    reports no resources.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = jitted(kernel)
    if not isinstance(kernel, triton.JITFunction):
        raise RuntimeError("only a kernel decorated without TRITON_INTERPRET=1 can be compiled")
    constexprs = {name: value for name, value in constexprs.items() if name in kernel.arg_names}
    types = {name: "constexpr" if name in constexprs else signature[name] for name in kernel.arg_names}
    attrs = {(place,): _ALIGNED for place, name in enumerate(kernel.arg_names) if name in aligned}
    source = ASTSource(kernel, types, dict(constexprs), attrs)
    options = {"num_warps": num_warps, "enable_fp_fusion": True}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    registers, spills = _registers_and_spills(compiled.asm["cubin"])
    return Usage(registers, spills, compiled.metadata.shared, num_warps)


def compile_kernels(kernels: Iterable[Any], *arguments: Any, **options: Any) -> dict[str, Usage]:
    """The resources of several `jit` functions by name, less ``_kernel``. Arguments as `compile_kernel`."""
    return {
        kernel.__name__.removesuffix("_kernel"): compile_kernel(kernel, *arguments, **options) for kernel in kernels
    }


def _registers_and_spills(cubin: bytes) -> tuple[int, int]:
    """Registers, and bytes of stack and local memory, of the one kernel in ``cubin``: as Triton's cuobjdump reports."""
    from triton import knobs

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        command = [knobs.nvidia.cuobjdump.path, "-res-usage", str(path)]
        report = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", report)
    if found is None:
        raise RuntimeError(f"cuobjdump reported no resource usage:\n{report}")
    registers, stack, local = map(int, found.groups())
    return registers, stack + local
