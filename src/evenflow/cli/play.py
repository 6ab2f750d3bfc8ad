"""`evenflow play`: a page on this machine alone, on which levers are moved and the step is simulated at once.

The standard library's server is enough: it listens on the loopback interface, serves one page and answers one
question. It answers no page of another site, which a browser could be made to let ask.
"""

import contextlib
import json
import re
import threading
import webbrowser
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from rich.console import Console

from evenflow.cli.played import Question, answer
from evenflow.cli.printing import print_line
from evenflow.errors import ConfigError, EvenflowError
from evenflow.foreign import parse_json
from evenflow.plain_data import read_as
from evenflow.schedules import catalog
from evenflow.view.assets import self_contained

_HOST = "127.0.0.1"
_MOST_BYTES = 2**16  # of a question
_FIRST = {"schedule": "zb-auto"}


def play(port: int, *, opens: bool) -> None:
    """Serve the playground until Ctrl-C; `port` 0 takes any that is free.

    Raises `ConfigError` for a port that cannot be had.
    """
    console = Console()
    with serving(port) as server:
        address = address_of(server)
        print_line(console, f"the playground is at {address} (Ctrl-C ends it)")
        if opens:  # from a thread: a browser in the terminal returns when it ends, and wants the page before
            threading.Thread(target=webbrowser.open, args=(address,), daemon=True).start()
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            console.print("ended")


def serving(port: int) -> ThreadingHTTPServer:
    """Return the server, which listens and does not answer yet. Raises `ConfigError` as `play` does."""
    if not 0 <= port <= 65535:
        raise ConfigError(f"--port {port}: there are 1 to 65535, and 0 for any that is free")
    try:
        return _Server(port)
    except OSError as error:
        raise ConfigError(
            f"--port {port}: {error.strerror or error}; name another one, or 0 for any that is free"
        ) from None


def address_of(server: ThreadingHTTPServer) -> str:
    """Where a browser finds it."""
    return f"http://{_HOST}:{server.server_address[1]}/"


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, port: int) -> None:
        self.searching = threading.Lock()  # searches would only slow one another down
        super().__init__((_HOST, port), _Answers)


class _Answers(BaseHTTPRequestHandler):
    """See the module."""

    protocol_version = "HTTP/1.1"
    server: _Server

    def do_GET(self) -> None:
        """Send the page."""
        if not self._is_ours():
            return
        if self.path != "/":
            self._send(HTTPStatus.NOT_FOUND, "text/plain", "there is one page: /")
            return
        names = [name for name in catalog.NAMES if name != "forward-only"]
        page = self_contained("play", title="Evenflow playground", data={"names": names, "first": _FIRST})
        self._send(HTTPStatus.OK, "text/html", page)

    def do_POST(self) -> None:
        """Answer a question."""
        if not self._is_ours():
            return
        length = self.headers.get("Content-Length", "")
        if not re.fullmatch("[0-9]{1,6}", length) or int(length) > _MOST_BYTES:
            self.close_connection = True
            self._send(HTTPStatus.BAD_REQUEST, "text/plain", "a question has a length, and a small one")
            return
        body = self.rfile.read(int(length))
        if self.path != "/simulate" or self.headers.get_content_type() != "application/json":
            self._send(HTTPStatus.NOT_FOUND, "text/plain", "questions go to /simulate, as application/json")
            return
        self._send(HTTPStatus.OK, "application/json", json.dumps(self._answered(body), allow_nan=False))

    def _answered(self, body: bytes) -> object:
        try:
            question = read_as(Question, parse_json(body.decode("utf-8", "replace")), _least)
            if question.schedule == catalog.AUTO:
                with self.server.searching:
                    return answer(question)
            return answer(question)
        except EvenflowError as error:
            return {"error": str(error)}

    def _is_ours(self) -> bool:
        """Whether the browser asks this very address, and not the name of another site that leads here."""
        name = re.sub(":[0-9]*$", "", self.headers.get("Host", "")).lower()
        if name in (_HOST, "localhost"):
            return True
        self.close_connection = True
        self._send(HTTPStatus.FORBIDDEN, "text/plain", f"ask for {_HOST}")
        return False

    def _send(self, status: HTTPStatus, kind: str, text: str) -> None:
        content = text.encode()
        with contextlib.suppress(ConnectionError):  # the page was closed meanwhile
            self.send_response(status)
            self.send_header("Content-Type", f"{kind}; charset=utf-8")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002  # as the server calls it
        """Say nothing: the page shows what went wrong."""


def _least(kind: type[int] | type[float], _place: str) -> float:
    return 1 if kind is int else 0
