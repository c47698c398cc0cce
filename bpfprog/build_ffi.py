"""
Build bpfprog._ffi: the shared headers and the cdef files, read as they stand.
"""

from pathlib import Path

from cffi import FFI

HERE = Path(__file__).parent

# the headers' types, spelled for a reader that has no <linux/types.h>
KERNEL_TYPES = """
typedef unsigned char __u8; typedef unsigned short __u16, __be16;
typedef unsigned int __u32, __be32; typedef unsigned long long __u64;
"""
SOURCES = ("steps.c", "packet_steps.c")
HEADERS = ("abi.h", "packet.h")

ffibuilder = FFI()
ffibuilder.cdef(KERNEL_TYPES)
for name in (*HEADERS, "libbpf.cdef.h", "steps.cdef.h", "packet_steps.cdef.h"):
    ffibuilder.cdef((HERE / name).read_text(encoding="utf-8"))
ffibuilder.set_source(
    "bpfprog._ffi",
    "".join(f'#include "{name}"\n' for name in SOURCES),
    include_dirs=[str(HERE)],
    libraries=["bpf"],
    extra_compile_args=["-O2", "-Wall", "-Wextra", "-Wno-unused-parameter"],
    depends=[str(HERE / name) for name in (*HEADERS, *SOURCES)],
)

if __name__ == "__main__":
    ffibuilder.compile(verbose=True)
