"""A server on loopback that answers the SDKs' own clients with what a test has scripted."""

from __future__ import annotations

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Server(ThreadingHTTPServer):
    """Answers every request with what is scripted: `parts`, and then the `end` of the answer.

    The end is "complete", "cut" (the connection is dropped), "hang" (nothing more comes until the test is over) or
    "drop" (the connection is dropped with no answer at all).
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.over = threading.Event()
        threading.Thread(target=self.serve_forever, daemon=True).start()
        self.script()

    def script(self, *parts: bytes, end: str = "complete", status: int = 200, kind: str = "text/event-stream") -> None:
        self.parts, self.end, self.status, self.kind = parts, end, status, kind
        self.requests: list[str] = []
        self.over.set()  # for what was asked before
        self.over = threading.Event()

    def finish(self) -> None:
        self.over.set()
        self.shutdown()
        self.server_close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that has gone is no error."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def do_POST(self) -> None:
        script, over = self.server, self.server.over
        self.rfile.read(int(self.headers["content-length"]))
        script.requests.append(self.path)
        if script.end == "drop":
            self.close_connection = True
            return
        self.send_response(script.status)
        self.send_header("content-type", script.kind)
        self.send_header("transfer-encoding", "chunked")
        self.end_headers()
        for part in script.parts:
            self.wfile.write(b"%x\r\n%s\r\n" % (len(part), part))
        self.wfile.flush()
        if script.end == "complete":
            self.wfile.write(b"0\r\n\r\n")
            return
        self.close_connection = True
        if script.end == "hang":
            over.wait(30)

    def log_message(self, *_: object) -> None:
        """Be quiet."""
