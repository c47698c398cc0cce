"""
Who may import whom.
"""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

CORE = "collections dataclasses difflib enum functools ipaddress json operator re struct typing"
CORE_MAY = {*CORE.split(), "controller.core", "google_crc32c"}
"""An allow-list, so that a new file is pure until someone argues otherwise."""

BPFPROG_MAY = {"bpfprog", "cffi"}
ROUTER_MAY = {
    *("controller.core", "controller.router", "controller.settings", "controller.log"),
    *("controller.privilege", "controller.__init__", "bpfprog"),
    *("structlog", "prometheus_client", "pyprctl", "pyroute2", "orjson", "cffi", "pydantic"),
}
CONTROLLER_MUST_NOT = {"bpfprog", "controller.router"}


def imports(path: Path) -> Iterator[str]:
    package = ".".join(path.relative_to(ROOT).parent.parts)
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: relative import in {package}"
            # "from controller import router" names a module just as well
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def within(module: str, packages: set[str]) -> bool:
    return any(module == package or module.startswith(package + ".") for package in packages)


def stdlib(module: str) -> bool:
    return module.partition(".")[0] in sys.stdlib_module_names


def may(path: Path, module: str) -> bool:
    """
    Tell whether the file at *path* may import *module*.
    """
    match path.relative_to(ROOT).parts:
        case ["controller", "core", *_]:
            return within(module, CORE_MAY)
        case ["controller", "router", *_]:
            return stdlib(module) or within(module, ROUTER_MAY)
        case ["bpfprog", *_]:
            return stdlib(module) or within(module, BPFPROG_MAY)
        case _:
            return not within(module, CONTROLLER_MUST_NOT)


FILES = sorted(path for name in ("bpfprog", "controller") for path in ROOT.glob(f"{name}/**/*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_file_imports_only_what_its_folder_may(path: Path) -> None:
    """
    The process that parses hostile bytes can not reach the engine, nor the other way round.
    """
    assert [] == [module for module in imports(path) if not may(path, module)]


@pytest.mark.parametrize(
    ("path", "module", "allowed"),
    [
        ("controller/core/x.py", "re", True),
        ("controller/core/x.py", "controller.core.routes.Route", True),
        ("controller/core/x.py", "asyncio", False),
        ("controller/core/x.py", "structlog", False),
        ("controller/core/x.py", "controller.settings", False),
        ("controller/router/x.py", "asyncio", True),
        ("controller/router/x.py", "bpfprog.splice.Splice", True),
        ("controller/router/x.py", "controller.core.wire", True),
        ("controller/router/x.py", "aiodocker", False),
        ("controller/router/x.py", "controller.app", False),
        ("controller/router/x.py", "controller.link", False),
        ("controller/app.py", "aiodocker", True),
        ("controller/app.py", "bpfprog", False),
        ("controller/app.py", "controller.router.server", False),
        ("bpfprog/x.py", "ctypes", True),
        ("bpfprog/x.py", "controller.core", False),
        ("bpfprog/x.py", "structlog", False),
    ],
)
def test_rules_say_what_they_mean(path: str, module: str, allowed: bool) -> None:  # noqa: FBT001 - a parameter of the test
    """
    The rules themselves allow and forbid what they should.
    """
    assert allowed == may(ROOT / path, module)
