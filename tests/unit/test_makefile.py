"""
What `make` does before it does what was asked.
"""

import pytest
from harness.tools import REPOSITORY, run


@pytest.mark.parametrize(
    ("arguments", "looks"), [("", True), ("--engine tcp://192.0.2.1:2375", False)]
)
def test_run_looks_for_an_engine_unless_one_is_named(arguments: str, *, looks: bool) -> None:
    """
    `make run` says that there is no engine here, but not to who named one elsewhere.
    """
    plan = run("make", "-n", "-C", REPOSITORY, "run", f"ARGS={arguments}")

    assert f"sniroute run --listen :443 {arguments}".rstrip() in plan
    assert looks == ("find_engines" in plan)
