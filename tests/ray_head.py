"""A real Ray cluster on loopback, as an operator starts it: a head with the Jobs API and token authentication, and nodes."""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from tests.mlflow_server import free_port

_BEFORE = ("RAY_ADDRESS", "RAY_JOB_ID")
"""Variables of another cluster's driver."""
_STARTS = 4


@dataclass
class RayHead:
    """A cluster that is up. Its processes end with the test."""

    directory: Path
    """Of logs."""
    cpus: int
    temporary: str
    """Ray's own, with a short name: sockets lie in it."""
    token: str = field(default_factory=lambda: secrets.token_hex(16))
    gcs: int = field(default_factory=free_port)
    port: int = field(default_factory=free_port)
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @property
    def address(self) -> str:
        """Of the Jobs API."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def environment(self) -> dict[str, str]:
        """Of whoever belongs to the cluster, or talks to it."""
        kept = {key: value for key, value in os.environ.items() if key not in _BEFORE}
        told = {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": self.token,
            "DS_ACCELERATOR": "cpu",
            "RAY_USAGE_STATS_ENABLED": "0",
        }
        return {**kept, **told, "PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"}

    def start(self) -> None:
        """Returns when the Jobs API answers."""
        self._node(
            "--head", f"--port={self.gcs}", "--include-dashboard=true", "--dashboard-host=127.0.0.1",
            f"--dashboard-port={self.port}", f"--dashboard-agent-listen-port={free_port()}", f"--num-cpus={self.cpus}",
            f"--ray-client-server-port={free_port()}", f"--temp-dir={self.temporary}",
        )  # fmt: skip
        request = urllib.request.Request(f"{self.address}/api/jobs/", headers={"Authorization": f"Bearer {self.token}"})
        ends = time.monotonic() + 120
        while True:
            try:
                with urllib.request.urlopen(request, timeout=10):
                    return
            except (urllib.error.URLError, OSError):
                assert time.monotonic() < ends, (self.directory / "node-0.log").read_text()[-3000:]
                assert self.processes[0].poll() is None, (self.directory / "node-0.log").read_text()[-3000:]
                time.sleep(0.5)

    def add_node(self, cpus: int, *, resources: str = "{}") -> subprocess.Popen[bytes]:
        """A node of its own, a raylet with its own object store and workers, which has joined. Ray gives half a minute to come
        up, and a busy machine needs more: it is then started again."""
        for _ in range(_STARTS):
            process = self._node(
                f"--address=127.0.0.1:{self.gcs}", f"--num-cpus={cpus}", f"--dashboard-agent-listen-port={free_port()}",
                f"--resources={resources}",
            )  # fmt: skip
            log = self.directory / f"node-{len(self.processes) - 1}.log"
            while process.poll() is None:
                if "Ray runtime started" in log.read_text(errors="replace"):
                    return process
                time.sleep(0.2)
        raise AssertionError(log.read_text()[-3000:])

    def _node(self, *options: str) -> subprocess.Popen[bytes]:
        log = (self.directory / f"node-{len(self.processes)}.log").open("wb")
        command = [
            sys.executable,
            "-m",
            "ray.scripts.scripts",
            "start",
            "--block",
            "--node-ip-address=127.0.0.1",
            *options,
        ]
        command += ["--object-store-memory=100000000", f"--metrics-export-port={free_port()}", "--disable-usage-stats"]
        process = subprocess.Popen(command, env=self.environment, stdout=log, stderr=log, start_new_session=True)
        self.processes.append(process)
        return process

    @staticmethod
    def kill(process: subprocess.Popen[bytes]) -> None:
        """A node with all that runs on it, at once."""
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def stop(self) -> None:
        """Nodes before their head."""
        for process in reversed(self.processes):
            self.kill(process)


@contextmanager
def ray_head(directory: Path, cpus: int = 2) -> Iterator[RayHead]:
    """A cluster of one node."""
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp", ignore_cleanup_errors=True) as temporary:
        head = RayHead(directory, cpus, temporary)
        try:
            head.start()
            yield head
        finally:
            head.stop()
