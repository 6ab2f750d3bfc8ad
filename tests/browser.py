"""A headless Chromium for tests of pages: what its console says wrong and what it asks for is kept."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest


class Window:
    """A page in the browser; `page` is playwright's."""

    def __init__(self, page) -> None:
        self.page = page
        self.faults: list[str] = []
        self.requests: list[str] = []
        page.on("console", lambda told: told.type in ("error", "warning") and self.faults.append(told.text))
        page.on("pageerror", lambda error: self.faults.append(str(error)))
        page.on("request", lambda request: self.requests.append(request.url))

    def over_lane(self, seconds: float, lane: int) -> tuple[float, float]:
        """Where a moment of a lane is on the screen; lanes are counted from the top of all ranks."""
        return tuple(
            self.page.evaluate(
                """([seconds, lane]) => {
                    const over = document.querySelector(".lanes .u-over").getBoundingClientRect();
                    const [from, until] = drawn.view;
                    const share = (seconds - from) / (until - from);
                    return [over.left + over.width * share, over.top + drawn.middles[lane]];
                }""",
                [seconds, lane],
            )
        )

    def hover(self, seconds: float, lane: int) -> str:
        """What the tip says there; nothing where it is hidden."""
        self.page.mouse.move(*self.over_lane(seconds, lane))
        tip = self.page.locator(".tip")
        return tip.inner_text() if tip.is_visible() else ""


@contextmanager
def window() -> Iterator[Window]:
    """A window of a browser of its own; the test is skipped where there is none."""
    browser = pytest.importorskip("chromium", reason="needs playwright")
    if browser.chromium() is None:
        pytest.skip("needs Chromium (Debian: apt install chromium)")
    with browser.page(1300, 900) as page:
        yield Window(page)
