"""A web server with a certificate that the test trusts."""

from __future__ import annotations

import re
import ssl
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from web_server import certificate


class Files(BaseHTTPRequestHandler):
    """Sends files with an ETag, and parts of them where `ranges` is set."""

    content: dict[str, bytes] = {}  # noqa: RUF012 - of the server, not of a request
    ranges = True
    headers_of: dict[str, str] = {"ETag": '"1"'}  # noqa: RUF012

    def do_GET(self) -> None:
        content = self.content.get(self.path)
        if content is None:
            return self.send_error(404)
        span = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        start, end = (int(span[1]), int(span[2]) + 1) if span and self.ranges else (0, len(content))
        self.send_response(206 if span and self.ranges else 200)
        if span and self.ranges:
            self.send_header("Content-Range", f"bytes {start}-{end - 1}/{len(content)}")
        for name, value in self.headers_of.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content[start:end])))
        self.end_headers()
        return self.wfile.write(content[start:end]) and None

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def https(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of a web server whose certificate this process trusts."""
    trusted = tmp_path / "certificate.pem"
    trusted.write_bytes(certificate())
    server = ThreadingHTTPServer(("127.0.0.1", 0), Files)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(trusted)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("SSL_CERT_FILE", str(trusted))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    yield f"https://127.0.0.1:{server.server_port}"
    server.shutdown()
