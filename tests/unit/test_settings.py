"""
Settings: every field means the same as a flag, in the environment, and on the way to a child.
"""

from typing import Any

import pytest
from harness.values import OTHER
from pydantic import ValidationError

from controller.core.routes import HANDOFFS
from controller.settings import (
    CommonSettings,
    ControllerSettings,
    HandoffChoice,
    RouterSettings,
    RunSettings,
)

BAD: dict[str, tuple[Any, ...]] = {
    "log_level": ("loud", ""),
    "engine": ("", ",", []),
    "listen": ("", ",", []),
    "relist_interval": (0, -1, "soon", "inf", "nan", 1e9),
    "handoff": ("packets", "SOCKMAP "),
    "packet_idle": (0, "inf"),
    "hello_timeout": (0, -1, "inf", "nan", 1e9),
    "hello_limit": (0, 4095, 256 * 1024 + 1, "much"),
    "connect_timeout": (0, "inf", "nan", 1e9),
    "drain": (-1, "inf", "nan", 1e9),
    "backlog_limit": (65535, "1GiB"),
    "receive_buffer": (131071, "1GiB"),
    "workers": (0, 17, "auto"),
    "max_connections": (-1, 1.5, "all"),
    "access_log": ("perhaps",),
    "replace": ("perhaps",),
    "client_ip": ("on",),
    "transparent_timeout": (0, "inf"),
    "transparent_mark": (0, 2**32),
    "transparent_mask": (0, 2**32),
    "transparent_table": (0, 2**32),
    "transparent_priority": (1, 32766),
}


@pytest.fixture(autouse=True)
def no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """
    Settings of the one who runs the tests do not count.
    """
    for name in RunSettings.model_fields:
        monkeypatch.delenv(f"SNIROUTE_{name.upper()}", raising=False)


def test_every_field_is_tried() -> None:
    """
    A new field gets a value here, which differs from its default.
    """
    defaults = RunSettings().model_dump()

    assert set(RunSettings.model_fields) == set(OTHER)
    assert not [name for name, value in OTHER.items() if value == defaults[name]]


@pytest.mark.parametrize("values", [{}, OTHER], ids=["defaults", "others"])
def test_settings_come_back_from_the_environment(
    values: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    A child that reads the environment we write has exactly our settings.
    """
    settings = RunSettings(**values)
    for name, value in settings.environment().items():
        monkeypatch.setenv(name, value)

    assert settings == RunSettings()


@pytest.mark.parametrize("name", OTHER)
def test_each_field_comes_back_alone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """
    Each field is read from its own variable, and changes nothing else.
    """
    written = RunSettings(**{name: OTHER[name]}).environment()[f"SNIROUTE_{name.upper()}"]
    monkeypatch.setenv(f"SNIROUTE_{name.upper()}", written)

    assert RunSettings(**{name: OTHER[name]}) == RunSettings()


@pytest.mark.parametrize(
    ("settings", "name"),
    [(ControllerSettings, "engine"), (RouterSettings, "listen")],
    ids=["engine", "listen"],
)
@pytest.mark.parametrize(
    "value",
    ["/a, /b", ["/a", "/b"], ["/a,/b"], ("/a", "/b,")],
    ids=["commas", "repeated", "commas in a flag", "both"],
)
def test_a_list_is_repeated_or_comma_separated(
    settings: type[CommonSettings], name: str, value: object
) -> None:
    """
    Both ways to write a list mean the same, together too.
    """
    assert getattr(settings(**{name: value}), name) == ("/a", "/b")


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in BAD.items() for value in values]
)
def test_a_bad_value_is_refused_by_name(name: str, value: object) -> None:
    """
    A value out of bounds is refused, and the error tells which field it is.
    """
    with pytest.raises(ValidationError) as refused:
        RunSettings(**{name: value})

    assert [(name,)] == [error["loc"] for error in refused.value.errors()]


@pytest.mark.parametrize("engine", ["dokcer", "ssh://192.0.2.1/x", "run/docker.sock", "AUTO"])
def test_an_engine_that_is_none_is_refused(engine: str) -> None:
    """
    A mistyped engine is an error that quotes it, also beside a good one.
    """
    with pytest.raises(ValidationError) as refused:
        RunSettings(engine=f"auto,{engine}")

    (error,) = refused.value.errors()
    assert error["loc"] == ("engine",)
    assert error["msg"].startswith(repr(engine))


def test_sizes_may_have_units() -> None:
    """
    Sizes are read as people write them.
    """
    assert RouterSettings(backlog_limit="2MiB").backlog_limit == 2 * 1024 * 1024


def test_settings_do_not_change() -> None:
    """
    Settings are a value.
    """
    with pytest.raises(ValidationError, match="frozen"):
        RouterSettings().drain = 1


def test_the_router_and_a_backend_may_ask_for_the_same_hand_offs() -> None:
    """
    What is a hand-off for `--handoff` is one for a label, in the same order.
    """
    assert HANDOFFS == tuple(HandoffChoice)
