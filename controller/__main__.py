"""
The controller process: `python -m controller`, with its settings in the environment.
"""

import asyncio
import signal
import sys

import structlog
from pydantic import ValidationError

from controller.app import Controller
from controller.log import configure
from controller.privilege import drop_to, shut
from controller.settings import ControllerSettings

log = structlog.get_logger()


def main() -> int:
    """
    Run the controller until SIGTERM or SIGINT.
    """
    # first of all: nothing here needs a capability, least of all what reads an engine's answers
    drop_to(())
    # a router that somebody has got hold of is not to get at an engine through here
    shut()
    try:
        settings = ControllerSettings()
        configure("controller", settings.log_level)
        return asyncio.run(_run(Controller(settings)))
    except (ValidationError, ValueError) as err:
        print(f"sniroute controller: {err}", file=sys.stderr)
        return 2


async def _run(controller: Controller) -> int:
    loop = asyncio.get_running_loop()
    running = asyncio.create_task(controller.run(), name="controller")
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, running.cancel)
    try:
        await running
    except asyncio.CancelledError:
        log.info("controller stopped")
    return 0


if __name__ == "__main__":
    sys.exit(main())
