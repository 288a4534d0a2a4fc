"""A real MLflow server on a free loopback port, for tests: it can be killed and started again on its port and store."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

ADMIN = ("admin", "the-admins-password")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class MlflowServer:
    """`authenticated`: with basic-auth, ADMIN in it, and others that read by default."""

    def __init__(self, root: Path, *, authenticated: bool = False) -> None:
        self.root, self.authenticated = root, authenticated
        self.port = free_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> MlflowServer:
        store = ["--backend-store-uri", f"sqlite:///{self.root}/server.db"]
        store += ["--artifacts-destination", str(self.root / "artifacts")]
        command = [sys.executable, "-m", "mlflow", "server", *store, "--host", "127.0.0.1", "--port", str(self.port)]
        command += ["--workers", "1", *(["--app-name", "basic-auth"] if self.authenticated else [])]
        environment = {k: v for k, v in os.environ.items() if not k.startswith("MLFLOW_TRACKING_")}
        environment["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] = "false"
        if self.authenticated:
            environment["MLFLOW_AUTH_CONFIG_PATH"] = str(self._auth_config())
            environment["MLFLOW_FLASK_SERVER_SECRET_KEY"] = "for tests only"
        with (self.root / "log").open("a") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True, env=environment)
        for _ in range(480):
            assert self.process.poll() is None, (self.root / "log").read_text()
            try:
                urllib.request.urlopen(f"{self.uri}/health", timeout=2).close()
            except (urllib.error.URLError, OSError):
                time.sleep(0.25)
            else:
                return self
        self.kill()
        raise AssertionError("the server did not start: " + (self.root / "log").read_text())

    def kill(self) -> None:
        """As a power cut would."""
        if self.process is not None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait(timeout=20)
            self.process = None

    def _auth_config(self) -> Path:
        path = self.root / "auth.ini"
        path.write_text(
            "[mlflow]\ndefault_permission = READ\n"
            f"database_uri = sqlite:///{self.root}/auth.db\n"
            f"admin_username = {ADMIN[0]}\nadmin_password = {ADMIN[1]}\n"
            "authorization_function = mlflow.server.auth:authenticate_request_basic_auth\n"
            # Hashing a password takes a quarter of a second on a busy machine, at each request.
            "auth_cache_ttl_seconds = 600\n"
        )
        return path


@contextlib.contextmanager
def losing_an_answer(uri: str, path: str) -> Iterator[str]:
    """The address of a proxy before a server, which answers 504 to the first POST to `path` after the server has done it."""
    lost: list[str] = []

    class Proxy(BaseHTTPRequestHandler):
        def pass_on(self) -> None:
            content = self.rfile.read(int(self.headers.get("Content-Length") or 0)) or None
            kept = {k: v for k, v in self.headers.items() if k.lower() not in ("host", "accept-encoding")}
            asked = urllib.request.Request(uri + self.path, data=content, method=self.command, headers=kept)
            try:
                answer = urllib.request.urlopen(asked, timeout=60)
            except urllib.error.HTTPError as error:
                answer = error
            with answer:
                status, said = answer.status, answer.read()
            if self.command == "POST" and self.path.endswith(path) and not lost:
                lost.append(self.path)
                status, said = 504, b"gateway timeout"
            self.send_response(status)
            self.send_header("Content-Type", answer.headers.get("Content-Type", ""))
            self.end_headers()
            self.wfile.write(said)

        def log_message(self, *_: object) -> None:
            pass

    for verb in ("GET", "POST", "PUT", "PATCH", "DELETE"):
        setattr(Proxy, f"do_{verb}", Proxy.pass_on)
    with ThreadingHTTPServer(("127.0.0.1", 0), Proxy) as proxy:
        Thread(target=proxy.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{proxy.server_address[1]}"
        proxy.shutdown()
    assert lost, f"nobody asked for {path}"


PASSWORD = "one-of-the-users"


def create_user(uri: str, name: str) -> None:
    """Somebody with PASSWORD. Only the administrator may; the caller's environment is left as it was."""
    before = {key: os.environ.get(key) for key in ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD")}
    from mlflow.server.auth.client import AuthServiceClient

    os.environ["MLFLOW_TRACKING_USERNAME"], os.environ["MLFLOW_TRACKING_PASSWORD"] = ADMIN
    try:
        AuthServiceClient(uri).create_user(name, PASSWORD)
    finally:
        for key, value in before.items():
            os.environ.pop(key) if value is None else os.environ.update({key: value})
