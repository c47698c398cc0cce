"""
Build bpfprog._ffi: abi.h and the cdef files, read as they stand.
"""

from pathlib import Path

from cffi import FFI

HERE = Path(__file__).parent

# abi.h's types, spelled for a reader that has no <linux/types.h>
KERNEL_TYPES = "typedef unsigned long long __u64; typedef unsigned int __u32;"

ffibuilder = FFI()
ffibuilder.cdef(KERNEL_TYPES)
for name in ("abi.h", "libbpf.cdef.h", "steps.cdef.h"):
    ffibuilder.cdef((HERE / name).read_text(encoding="utf-8"))
ffibuilder.set_source(
    "bpfprog._ffi",
    '#include "steps.c"',
    include_dirs=[str(HERE)],
    libraries=["bpf"],
    extra_compile_args=["-O2", "-Wall", "-Wextra", "-Wno-unused-parameter"],
    depends=[str(HERE / name) for name in ("abi.h", "steps.c")],
)

if __name__ == "__main__":
    ffibuilder.compile(verbose=True)
