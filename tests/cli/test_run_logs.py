"""What the library logs, on a console that somebody watches."""

import io
import logging

from rich.console import Console

from evenflow.cli.run_logs import logged_status

LOGGER = logging.getLogger("evenflow")


def test_messages_are_shown_as_they_are_and_warnings_stay():
    before = LOGGER.level, list(LOGGER.handlers)
    console = Console(file=io.StringIO(), force_terminal=True, width=80)
    with logged_status(console, "recording"):
        LOGGER.debug("never shown")
        LOGGER.info("measuring [/x]")
        LOGGER.warning("not planned [/y]")
        console.print("then")
    shown = console.file.getvalue()
    assert "measuring [/x]" in shown
    assert "not planned [/y]" in shown
    assert "never shown" not in shown
    assert (LOGGER.level, list(LOGGER.handlers)) == before


def test_a_quiet_console_shows_nothing():
    console = Console(file=io.StringIO(), quiet=True)
    with logged_status(console, "recording"):
        LOGGER.warning("not planned")
    assert console.file.getvalue() == ""
