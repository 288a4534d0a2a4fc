"""A proxy before a real server that loses answers: what was asked is done, and whoever asked is told 504."""

from __future__ import annotations

import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

_OWN = ("host", "content-length", "accept-encoding")


class LossyProxy:
    """Loses the next answers to each path (a part of it) that is in `losing`, once for each time that it is there."""

    def __init__(self, behind: str) -> None:
        self.behind = behind
        self.losing: list[str] = []
        self.uri = ""

    def answer(self, method: str, path: str, headers: dict[str, str], body: bytes | None) -> tuple[int, bytes, str]:
        request = urllib.request.Request(self.behind + path, data=body, method=method, headers=headers)
        try:
            with urllib.request.urlopen(request) as reply:
                done = reply.status, reply.read(), reply.headers.get("Content-Type", "")
        except urllib.error.HTTPError as error:
            done = error.code, error.read(), error.headers.get("Content-Type", "")
        lost = next((one for one in self.losing if one in path), None)
        if lost is None:
            return done
        self.losing.remove(lost)
        return 504, b"gateway timeout", "text/plain"


@contextmanager
def lossy_proxy(behind: str) -> Iterator[LossyProxy]:
    """One that runs before the server at `behind`."""
    proxy = LossyProxy(behind)

    class Handler(BaseHTTPRequestHandler):
        def pass_on(self) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            headers = {key: value for key, value in self.headers.items() if key.lower() not in _OWN}
            body = self.rfile.read(length) if length else None
            status, content, kind = proxy.answer(self.command, self.path, headers, body)
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = pass_on  # noqa: N815

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listening:
        proxy.uri = f"http://127.0.0.1:{listening.server_address[1]}"
        threading.Thread(target=listening.serve_forever, daemon=True).start()
        yield proxy
        listening.shutdown()
