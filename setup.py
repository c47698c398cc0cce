"""
The two cffi modules: setuptools can not name them in pyproject.toml.
"""

from setuptools import setup

setup(
    cffi_modules=["bpfprog/build_ffi.py:ffibuilder", "controller/router/build_native.py:ffibuilder"]
)
