"""
Host names and patterns: what is one, and its one form.
"""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from controller.core.hostname import HostnameError, read_hostname, read_pattern

_label = st.from_regex(r"[a-zA-Z]([a-zA-Z0-9_-]{0,20}[a-zA-Z0-9_])?", fullmatch=True)
_name = st.lists(_label, min_size=1, max_size=6).map(".".join)


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("example.com", "example.com"),
        ("EXAMPLE.Com.", "example.com"),
        ("localhost", "localhost"),
        ("xn--bcher-kva.example", "xn--bcher-kva.example"),
        ("_dmarc.a_b.example", "_dmarc.a_b.example"),
        ("1.example", "1.example"),
        ("a" * 63 + ".example", "a" * 63 + ".example"),
        (".".join(["a" * 49] * 5) + ".abc.", ".".join(["a" * 49] * 5) + ".abc"),
    ],
)
def test_name_has_one_form(text: str, name: str) -> None:
    """
    Case and one trailing dot do not matter.
    """
    assert name == read_hostname(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        ".",
        "a..b",
        ".a",
        "a.b..",
        "-a.example",
        "a-.example",
        "a b.example",
        "a\x00.example",
        "a\n",
        "bücher.example",
        "a" * 64 + ".example",
        ".".join(["a" * 49] * 5) + ".abcd",
        "192.0.2.1",
        "192.0.2.1.",
        "1",
        "0x7f.1",
        "0x",
        "example.1",
        "2001:db8::1",
        "[2001:db8::1]",
        "*.example.com",
        "\u017f.example",
        "\u212a.example",
    ],
    ids=ascii,
)
def test_what_is_no_name_is_refused(text: str) -> None:
    """
    Empty, over-long, non-ASCII, address and wildcard are no host names.
    """
    with pytest.raises(HostnameError):
        read_hostname(text)


@pytest.mark.parametrize(
    ("text", "pattern"),
    [("*", "*"), ("*.Example.com.", "*.example.com"), ("A.example", "a.example")],
)
def test_pattern_has_one_form(text: str, pattern: str) -> None:
    """
    A pattern is a name, a wildcard before one, or the catch-all.
    """
    assert pattern == read_pattern(text)


@pytest.mark.parametrize(
    "text", ["", "*.", "**", "*a.example", "a.*.example", "*.*.example", "*.192.0.2.1", "a.*"]
)
def test_what_is_no_pattern_is_refused(text: str) -> None:
    """
    A wildcard stands only as the whole first label, before a name.
    """
    with pytest.raises(HostnameError):
        read_pattern(text)


@given(_name)
def test_normal_form_is_stable_and_blind_to_case_and_dot(name: str) -> None:
    """
    Reading a name twice changes nothing, nor do case and trailing dot.
    """
    normal = read_hostname(name)

    assert normal == read_hostname(normal)
    assert normal == read_hostname(name.swapcase() + ".")
    assert "*." + normal == read_pattern("*." + name)


@given(st.text())
def test_any_text_is_a_name_or_an_error(text: str) -> None:
    """
    Nothing but HostnameError ever comes out, and what is a name is ASCII and short.
    """
    try:
        name = read_hostname(text)
    except HostnameError:
        return

    assert name.isascii()
    assert 0 < len(name) <= 253
