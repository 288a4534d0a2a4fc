"""An object store on this machine, started for the tests that ask for one, and tiny models that have learnt to refuse."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from components.checkpoints.source import TensorSource, blocks


@dataclass(frozen=True)
class Store:
    """A bucket of a real S3 server on a loopback port."""

    endpoint: str
    bucket: str
    client: Any

    def url(self, prefix: str) -> str:
        return f"s3://{self.bucket}/{prefix}"

    def upload(self, directory: Path, prefix: str) -> str:
        """Copy a directory with a client that is not ours. Returns its URL."""
        for path in sorted(directory.rglob("*")):
            if path.is_file():
                self.client.upload_file(str(path), self.bucket, f"{prefix}/{path.relative_to(directory).as_posix()}")
        return self.url(prefix)

    def keys(self, prefix: str) -> list[str]:
        found = self.client.list_objects_v2(Bucket=self.bucket, Prefix=f"{prefix}/").get("Contents", [])
        return sorted(entry["Key"].removeprefix(f"{prefix}/") for entry in found)

    def body(self, key: str) -> bytes:
        data: bytes = self.client.get_object(Bucket=self.bucket, Key=key)["Body"].read()
        return data

    def uploads(self) -> list[str]:
        """Keys of multipart uploads that nobody completed or ended."""
        return [u["Key"] for u in self.client.list_multipart_uploads(Bucket=self.bucket).get("Uploads", [])]


def digest(source: TensorSource, *, step: int = 777) -> str:
    """Of every tensor, read in small ranges."""
    found = hashlib.sha256()
    for name in source.names():
        for start, stop in blocks(source.spec(name).numel, step):
            found.update(source.read(name, start, stop).contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def send_digest(source: TensorSource, queue: Any) -> None:
    """For a process of its own; here, so that it imports little."""
    queue.put(digest(source))


@pytest.fixture(scope="session")
def s3_endpoint() -> Iterator[str]:
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def store(s3_endpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    """A fresh bucket; the environment leads to it, and to a cache of the test's own."""
    import uuid

    import boto3

    for name, value in {
        "AWS_ENDPOINT_URL": s3_endpoint,
        "AWS_ACCESS_KEY_ID": "nobody",
        "AWS_SECRET_ACCESS_KEY": "hush-hush",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": str(tmp_path / "none"),
        "AWS_SHARED_CREDENTIALS_FILE": str(tmp_path / "none"),
        "REALIGN_CACHE": str(tmp_path / "cache"),
    }.items():
        monkeypatch.setenv(name, value)
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    client = boto3.client("s3")
    bucket = f"models-{uuid.uuid4().hex[:12]}"
    client.create_bucket(Bucket=bucket)
    yield Store(s3_endpoint, bucket, client)
    client.close()


@pytest.fixture(scope="session")
def taught(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model directory that answers `tiny.LESSONS` word for word."""
    from tests.components.evaluation import tiny

    return tiny.build_taught_model(tmp_path_factory.mktemp("models") / "taught")


@pytest.fixture(scope="session")
def untaught(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same architecture and vocabulary, without its refusals."""
    from tests.components.evaluation import tiny

    lessons = dict.fromkeys(tiny.HARMFUL, "first you take it, then you build it") | tiny.ANSWERED
    return tiny.build_taught_model(tmp_path_factory.mktemp("models") / "untaught", lessons=lessons)
