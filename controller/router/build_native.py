"""
Build controller.router._native from the C files in native/.
"""

from pathlib import Path

from cffi import FFI

HERE = Path(__file__).parent
NATIVE = HERE / "native"
ABI = HERE.parent.parent / "bpfprog"

ffibuilder = FFI()
ffibuilder.cdef("struct hello; struct pipe; struct counts;")
ffibuilder.cdef((NATIVE / "native.cdef.h").read_text(encoding="utf-8"))
ffibuilder.set_source(
    "controller.router._native",
    '#include "native.c"',
    include_dirs=[str(NATIVE), str(ABI)],
    libraries=["ssl", "crypto", "seccomp"],
    extra_compile_args=["-O2", "-Wall", "-Wextra", "-Wno-unused-parameter"],
    depends=[str(ABI / "abi.h"), str(ABI / "packet.h"), *map(str, NATIVE.iterdir())],
)

if __name__ == "__main__":
    ffibuilder.compile(verbose=True)
