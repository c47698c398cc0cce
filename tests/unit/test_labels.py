"""
Labels: golden files of what each set of labels comes to.
"""

from pathlib import Path

import pytest

from controller.core.labels import Reading, is_labelled, read_labels

GOLDEN = sorted((Path(__file__).parent / "labels").glob("*.txt"))


def show(reading: Reading) -> list[str]:
    return [
        f"route{f'[{spec.name}]' if spec.name else ''} {' '.join(spec.hosts)}"
        f" port={spec.port or '-'} network={spec.network or '-'}"
        + (f" client-ip={spec.client_ip}" if spec.client_ip else "")
        + (f" proxy-protocol={spec.proxy_protocol}" if spec.proxy_protocol != "off" else "")
        + (f" handoff={spec.handoff}" if spec.handoff != "auto" else "")
        for spec in reading.specs
    ] + [f"{p.code} {p.label}={p.value}: {p.detail}" for p in reading.problems]


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_labels_come_to_what_the_golden_file_says(path: Path) -> None:
    """
    The labels above the rule come to the routes and problems below it.
    """
    above, _, below = path.read_text().partition("---\n")
    labels = dict(line.split("=", 1) for line in above.splitlines())

    assert below.splitlines() == show(read_labels("web", labels))


def test_every_problem_names_the_container() -> None:
    """
    A problem tells whose label it is.
    """
    reading = read_labels("web", {"sniroute.host": "..", "sniroute.x": "1"})

    assert ["web", "web"] == [problem.container for problem in reading.problems]


def test_only_our_prefix_makes_a_container_ours() -> None:
    """
    Labels of others, and none at all, are not ours.
    """
    assert is_labelled({"sniroute.host": ""})
    assert not is_labelled({"sniroute": "", "x.sniroute.host": ""})
    assert not is_labelled(None)
