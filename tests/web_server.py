"""A web server of one's own whose certificate this process trusts, and which answers whatever a test wants."""

from __future__ import annotations

import contextlib
import datetime
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import IPv4Address
from pathlib import Path

Answer = Callable[[BaseHTTPRequestHandler], None]


@contextmanager
def serving(answers: dict[str, Answer], folder: Path) -> Iterator[tuple[str, Path]]:
    """Serve on 127.0.0.1 over HTTPS.

    Args:
        answers: What answers a GET, by path.
        folder: Gets the certificate.

    Yields:
        The address, and the file with the certificate.
    """

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self.close_connection = True
            with contextlib.suppress(ConnectionError, ssl.SSLError):  # whoever asked has heard enough
                answers[self.path.partition("?")[0]](self)

        def log_message(self, *_: object) -> None:
            pass

    file = folder / "certificate.pem"
    file.write_bytes(certificate())
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(file)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"https://127.0.0.1:{server.server_port}", file
    finally:
        server.shutdown()


def redirect(to: str, code: int = 302) -> Answer:
    """An answer that leads elsewhere."""

    def answer(request: BaseHTTPRequestHandler) -> None:
        request.send_response(code)
        request.send_header("Location", to)
        request.send_header("Content-Length", "0")
        request.end_headers()

    return answer


def endless(headers: dict[str, str], code: int = 200) -> Answer:
    """An answer without an end, or one of 300 MB, which is as good as one here."""

    def answer(request: BaseHTTPRequestHandler) -> None:
        request.send_response(code)
        for name, value in {"Transfer-Encoding": "chunked", **headers}.items():
            request.send_header(name, value)
        request.end_headers()
        piece = b"100000\r\n" + bytes(2**20) + b"\r\n"
        for _ in range(300):
            request.wfile.write(piece)

    return answer


def headed(headers: dict[str, str], body: bytes = b"", code: int = 200) -> Answer:
    """An answer with these headers."""

    def answer(request: BaseHTTPRequestHandler) -> None:
        request.send_response(code)
        for name, value in headers.items():
            request.send_header(name, value)
        request.end_headers()
        request.wfile.write(body)

    return answer


def certificate() -> bytes:
    """A key and a certificate for 127.0.0.1 that it has signed itself."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "127.0.0.1")])
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(IPv4Address("127.0.0.1"))]), critical=False)
        .sign(key, hashes.SHA256())
    )
    pem, raw = serialization.Encoding.PEM, serialization.PrivateFormat.TraditionalOpenSSL
    return key.private_bytes(pem, raw, serialization.NoEncryption()) + made.public_bytes(pem)
