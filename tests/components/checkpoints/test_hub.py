"""Models of the hub, from a cache laid out as the hub's library lays it out, with no network."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch

from components.checkpoints.hub import hub_snapshot, only
from components.checkpoints.identity import identify
from components.checkpoints.places import HubId
from components.checkpoints.reference import open_checkpoint
from components.errors import CheckpointError
from tests.components.checkpoints.test_adapters import make_adapter
from tests.components.checkpoints.tiny import edit_json, llama, save, save_tokenizer

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The hub's cache with one repository, some-org/chat, whose main branch is at COMMIT; offline."""
    from huggingface_hub import constants

    root = tmp_path / "hub"
    repo = root / "models--some-org--chat"
    snapshot = repo / "snapshots" / COMMIT
    save(llama(0, torch.bfloat16), snapshot, shard="8KB")
    save_tokenizer(snapshot)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(COMMIT)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(root))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return root


@pytest.mark.parametrize("reference", ["hf://some-org/chat@main", "hf://some-org/chat", "some-org/chat@main"])
def test_a_branch_is_resolved_to_its_commit_and_noted(reference: str, hub: Path) -> None:
    opened = open_checkpoint(reference)
    assert opened.where == f"hf://some-org/chat@{COMMIT}"
    assert opened.path == hub / "models--some-org--chat" / "snapshots" / COMMIT
    assert opened.notes == (
        f"some-org/chat of the hub at commit {COMMIT}, which main was when it was opened; write @{COMMIT} to stay with it",
    )
    assert identify(opened) == identify(open_checkpoint(opened.path))


def test_a_commit_is_itself(hub: Path) -> None:
    opened = open_checkpoint(f"some-org/chat@{COMMIT}")
    assert opened.notes == (f"some-org/chat of the hub at commit {COMMIT}",)
    assert opened.source.names()
    assert opened.lasting_name == str(opened.path.resolve())


def test_what_is_not_in_the_cache(hub: Path) -> None:
    for reference in ("hf://some-org/other@main", "some-org/chat@v2"):
        with pytest.raises(
            CheckpointError, match=r"the hub cannot be reached \(or HF_HUB_OFFLINE is set\) .*directory"
        ):
            open_checkpoint(reference)
    shard = sorted((hub / "models--some-org--chat" / "snapshots" / COMMIT).glob("*.safetensors"))[0]
    shard.unlink()
    with pytest.raises(CheckpointError, match=rf"^hf://some-org/chat@{COMMIT}: missing shard {shard.name}"):
        open_checkpoint("some-org/chat@main")


def test_an_adapter_names_its_base_by_hub_id(hub: Path, tmp_path: Path) -> None:
    make_adapter(llama(0, torch.bfloat16), tmp_path / "adapter", base=tmp_path)
    edit_json(tmp_path / "adapter" / "adapter_config.json", base_model_name_or_path="some-org/chat")
    opened = open_checkpoint(tmp_path / "adapter", base="some-org/chat@main")
    assert opened.notes == ()
    assert opened.base is not None
    assert opened.base.where == f"hf://some-org/chat@{COMMIT}"
    shutil.copytree(opened.base.path, tmp_path / "copy")
    with pytest.raises(CheckpointError, match="trained on some-org/chat, not on"):
        open_checkpoint(tmp_path / "adapter", base=tmp_path / "copy")


class _Refusing(BaseHTTPRequestHandler):
    """A hub that answers every question with a status and an error code, `status/code`, which the repository's owner names."""

    def do_GET(self) -> None:
        status, code = self.path.split("/")[3].split("-")
        self.send_response(int(status))
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def do_HEAD(self) -> None:
        self.do_GET()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def refusing_hub() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Refusing)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.mark.service
@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (
            "403-GatedRepo",
            r"access is granted on request; ask for it at huggingface\.co/403-GatedRepo/chat and set HF_TOKEN",
        ),
        ("404-RepoNotFound", r"no such model on the hub, or a private one; .* HF_TOKEN"),
        ("404-RevisionNotFound", r"the repository has no such revision; give a commit"),
        ("400-Odd", r"(the hub cannot be reached|cannot be fetched from the hub)"),
    ],
)
def test_what_the_hub_refuses_has_a_remedy(
    answer: str, said: str, hub: Path, refusing_hub: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", refusing_hub)
    with pytest.raises(CheckpointError, match=rf"^hf://{answer}/chat@v1: {said}"):
        hub_snapshot(HubId(f"{answer}/chat", "v1"))


def test_patterns_take_names_literally() -> None:
    import fnmatch

    assert fnmatch.fnmatchcase("a[1]*?.safetensors", only("a[1]*?.safetensors"))
    assert not fnmatch.fnmatchcase("a1xy.safetensors", only("a[1]*?.safetensors"))
