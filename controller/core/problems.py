"""
Problems: what is wrong with the input, as values with stable codes.

Rules of this file:

1. A code, once released, keeps its name and its meaning: alerts and scripts look for it.
2. An error keeps a route or a backend out; a warning only says that something was guessed.
"""

from dataclasses import dataclass
from enum import StrEnum


class Severity(StrEnum):
    """
    Whether a problem keeps something from being served.
    """

    ERROR = "error"
    WARNING = "warning"


class Code(StrEnum):
    """
    What kind of problem it is.
    """

    UNKNOWN_LABEL = "unknown-label"
    NO_HOST = "no-host"
    BAD_HOST = "bad-host"
    DUPLICATE_HOST = "duplicate-host"
    BAD_BOOL = "bad-bool"
    BAD_PORT = "bad-port"
    BAD_CLIENT_IP = "bad-client-ip"
    BAD_PROXY_PROTOCOL = "bad-proxy-protocol"
    BAD_HANDOFF = "bad-handoff"
    NO_PORT = "no-port"
    AMBIGUOUS_PORT = "ambiguous-port"
    UNKNOWN_NETWORK = "unknown-network"
    NO_NETWORK = "no-network"
    AMBIGUOUS_NETWORK = "ambiguous-network"
    NO_ADDRESS = "no-address"
    BAD_ROUTES_FILE = "bad-routes-file"
    BAD_COMPOSE_FILE = "bad-compose-file"
    ENGINE_UNREACHABLE = "engine-unreachable"
    TABLE_REFUSED = "table-refused"


_WARNINGS = {Code.AMBIGUOUS_NETWORK}


@dataclass(frozen=True, slots=True, order=True)
class Problem:
    """
    One thing that is wrong, and where.

    *container* is the container's name, or that of the file or engine; *label* is the label, or
    the key in a file; *value* is what stands there; *detail* says what would be right.
    """

    code: Code
    container: str
    label: str
    value: str
    detail: str

    @property
    def severity(self) -> Severity:
        """
        How bad it is; each code has one severity.
        """
        return Severity.WARNING if self.code in _WARNINGS else Severity.ERROR

    def fields(self) -> dict[str, str]:
        """
        Write the problem as logs, reports and `--json` show it.
        """
        return {
            "code": self.code.value,
            "severity": self.severity.value,
            "container": self.container,
            "label": self.label,
            "value": self.value,
            "detail": self.detail,
        }
