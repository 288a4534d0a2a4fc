"""Models in an object store: the same bits and the same identity as on a disk, and a sentence for each way it can go wrong."""

from __future__ import annotations

import base64
import hashlib
import json
import multiprocessing
import pickle
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from components.checkpoints.identity import identify
from components.checkpoints.places import Located, parse_reference
from components.checkpoints.reference import open_checkpoint
from components.checkpoints.remote import locate
from components.checkpoints.safetensors import SafetensorsSource
from components.checkpoints.source import read_whole
from components.checkpoints.stores import is_transient
from components.checkpoints.windows import Windows
from components.errors import CheckpointError
from tests.components.checkpoints.test_adapters import make_adapter
from tests.components.checkpoints.tiny import edit_json, llama, rewrite, same_bits, save, save_tokenizer
from tests.components.conftest import Store, digest, send_digest

pytestmark = pytest.mark.service


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """family/aligned: a sharded bf16 model with a tokenizer; family/adapter over it, named by a relative path."""
    root = tmp_path_factory.mktemp("local") / "family"
    model = llama(0, torch.bfloat16)
    save(model, root / "aligned", shard="8KB")
    save_tokenizer(root / "aligned")
    make_adapter(model, root / "adapter", base=root / "aligned")
    edit_json(root / "adapter" / "adapter_config.json", base_model_name_or_path="../aligned")
    assert len(list((root / "aligned").glob("*.safetensors"))) > 3
    return root


@pytest.mark.parametrize("window", [256, 4096, 1 << 20])
def test_a_sharded_model_reads_bit_identical_through_any_window(window: int, local: Path, store: Store) -> None:
    url = store.upload(local / "aligned", "team/aligned")
    here, there = SafetensorsSource(local / "aligned"), SafetensorsSource(locate(url), windows=Windows(window=window))
    assert there.names() == here.names()
    assert there.aliases() == here.aliases()
    for name in here.names() if window > 256 else here.names()[:2]:
        assert there.spec(name) == here.spec(name)
        assert same_bits(read_whole(there, name), read_whole(here, name))
    name = here.names()[0]
    assert same_bits(there.read(name, 5, 40), here.read(name, 5, 40))
    assert there.read(name, 7, 7).numel() == 0


def test_opened_by_url(local: Path, store: Store) -> None:
    url = store.upload(local / "aligned", "team/aligned")
    opened = open_checkpoint(f"{url}/")
    assert (opened.kind, opened.where, opened.lasting_name, opened.path.name) == ("full", url, url, "aligned")
    assert digest(opened.source) == digest(SafetensorsSource(local / "aligned"))
    assert not list(opened.path.glob("*.safetensors"))
    names = {f.name for f in (local / "aligned").iterdir() if not f.name.endswith(".safetensors")}
    assert {f.name for f in opened.path.iterdir()} == names
    again = open_checkpoint(url)
    assert again.path == opened.path
    store.client.put_object(Bucket=store.bucket, Key="team/aligned/chat_template.jinja", Body=b"{{ 1 }}")
    changed = open_checkpoint(url)
    assert changed.path != opened.path
    assert (changed.path / "chat_template.jinja").read_text() == "{{ 1 }}"


@pytest.mark.multiproc
@pytest.mark.parametrize(("method", "count"), [("fork", 2), ("spawn", 1)])
def test_processes_read_what_the_parent_opened(method: str, count: int, local: Path, store: Store) -> None:
    source = open_checkpoint(store.upload(local / "aligned", "aligned")).source
    expected = digest(SafetensorsSource(local / "aligned"))
    assert digest(source) == expected  # the parent's connections and windows are open
    context = multiprocessing.get_context(method)
    queue = context.Queue()
    workers = [context.Process(target=send_digest, args=(source, queue)) for _ in range(count)]
    for worker in workers:
        worker.start()
    assert [queue.get(timeout=60) for _ in workers] == [expected] * count
    for worker in workers:
        worker.join()
    assert digest(source) == expected


def test_threads_share_a_source(local: Path, store: Store) -> None:
    from concurrent.futures import ThreadPoolExecutor

    source = SafetensorsSource(locate(store.upload(local / "aligned", "aligned")), windows=Windows(1000, 1, 3))
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: digest(source), range(4)))
    assert set(found) == {digest(SafetensorsSource(local / "aligned"))}


def test_an_adapter_over_a_base_in_the_store(local: Path, store: Store) -> None:
    url = store.upload(local, "family")
    here = open_checkpoint(local / "adapter", base=local / "aligned")
    there = open_checkpoint(f"{url}/adapter", base=f"{url}/aligned")
    assert (there.kind, there.notes) == ("adapter", ())
    assert there.base is not None
    assert (there.where, there.base.where) == (f"{url}/adapter", f"{url}/aligned")
    assert digest(there.source) == digest(here.source)
    mixed = open_checkpoint(local / "adapter", base=f"{url}/aligned", base_declared_equal=True)
    assert digest(mixed.source) == digest(here.source)
    store.upload(_another(local), "family/other")
    with pytest.raises(
        CheckpointError, match=rf"{url}/adapter: the adapter was trained on \.\./aligned, not on {url}/other"
    ):
        open_checkpoint(f"{url}/adapter", base=f"{url}/other")
    store.upload(local / "aligned", "copies/aligned")
    assert open_checkpoint(f"{url}/adapter", base=store.url("copies/aligned")).notes == ()


def _another(local: Path) -> Path:
    path = local.parent / "other"
    if not path.is_dir():
        save(llama(1, torch.bfloat16), path)
    return path


def test_identity_names_the_stores_checksums(local: Path, store: Store) -> None:
    url = store.upload(local / "aligned", "aligned")
    here, there = identify(open_checkpoint(local / "aligned")), identify(open_checkpoint(url))
    weights = [name for name in here.files if name.endswith(".safetensors")]
    for name in here.files:
        if name in weights:
            head = store.client.head_object(Bucket=store.bucket, Key=f"aligned/{name}", ChecksumMode="ENABLED")
            assert there.files[name]["bytes"] == head["ContentLength"]
            assert there.files[name]["etag"] == head["ETag"].strip('"')
            assert "sha256" not in there.files[name]
        else:
            assert there.files[name] == here.files[name]
    assert identify(open_checkpoint(store.upload(local / "aligned", "moved"))).sha256 == there.sha256
    assert identify(open_checkpoint(store.upload(_another(local), "other"))).sha256 != there.sha256
    changed = json.loads(store.body("moved/config.json"))
    store.client.put_object(
        Bucket=store.bucket, Key="moved/config.json", Body=json.dumps({**changed, "rms_norm_eps": 1})
    )
    assert identify(open_checkpoint(store.url("moved"))).sha256 != there.sha256


def test_a_store_that_has_sha256_gives_the_identity_of_the_local_model(local: Path, store: Store) -> None:
    for path in sorted((local / "aligned").iterdir()):
        store.client.put_object(
            Bucket=store.bucket, Key=f"m/{path.name}", Body=path.read_bytes(), ChecksumAlgorithm="SHA256"
        )
    head = store.client.head_object(Bucket=store.bucket, Key="m/config.json", ChecksumMode="ENABLED")
    expected = hashlib.sha256((local / "aligned" / "config.json").read_bytes()).digest()
    assert head["ChecksumSHA256"] == base64.b64encode(expected).decode()
    assert identify(open_checkpoint(store.url("m"))) == identify(open_checkpoint(local / "aligned"))


def test_reading_ahead_fetches_each_byte_once_and_holds_few(local: Path, store: Store, monkeypatch: Any) -> None:
    from components.checkpoints import places

    asked: list[tuple[str, int, int]] = []
    real = places.RemoteFile._fetch
    monkeypatch.setattr(places.RemoteFile, "_fetch", lambda f, a, b: asked.append((f.name, a, b)) or real(f, a, b))
    model = locate(store.upload(_another(local), "m"))
    windows = Windows(window=4096, ahead=2, held=4)
    source = SafetensorsSource(model, windows=windows)
    asked.clear()
    placed = sorted(source.names(), key=lambda n: source._placed[n].offset)
    for name in placed:  # as they lie
        source.read(name)
    size = model.files["model.safetensors"].size
    fetched = sum(b - a for _, a, b in asked)
    assert fetched <= size
    assert all(b - a <= 4096 for _, a, b in asked)
    (state,) = windows._states.values()
    assert sum(w.end - w.begin for w in state.held.values()) <= 4 * 4096
    asked.clear()
    for name in reversed(placed[::2]):  # here and there: nothing between them
        source.read(name)
    wanted = sum(source.spec(name).nbytes for name in placed[::2])
    assert sum(b - a for _, a, b in asked) <= wanted + 4 * 4096


def test_sources_travel_without_their_connections(local: Path, store: Store) -> None:
    source = open_checkpoint(store.upload(local / "aligned", "m")).source
    expected = digest(source)
    raw = pickle.dumps(source)
    assert b"hush-hush" not in raw
    assert digest(pickle.loads(raw)) == expected


def test_what_is_wrong_is_said_with_the_url(local: Path, store: Store, tmp_path: Path) -> None:
    url = store.upload(local / "aligned", "m")
    with pytest.raises(
        CheckpointError, match=rf"{store.url('nothing')}: is not there; look at bucket and prefix, and at AWS_E"
    ):
        open_checkpoint(store.url("nothing"))
    with pytest.raises(CheckpointError, match="is not there"):
        open_checkpoint("s3://no-such-bucket-anywhere/m")
    with pytest.raises(CheckpointError, match="is a file, not a model directory"):
        open_checkpoint(f"{url}/config.json")
    shards = sorted(f.name for f in (local / "aligned").glob("*.safetensors"))
    store.client.delete_object(Bucket=store.bucket, Key=f"m/{shards[0]}")
    whole = store.body(f"m/{shards[1]}")
    store.client.put_object(Bucket=store.bucket, Key=f"m/{shards[1]}", Body=whole[:-10])
    store.client.put_object(Bucket=store.bucket, Key=f"m/{shards[2]}", Body=b"abc")
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(url)
    said = str(caught.value)
    assert said.startswith(f"{url}: missing shard {shards[0]}")
    assert f"{shards[1]}: truncated" in said
    assert f"{shards[2]}: not a safetensors file (3 bytes)" in said
    assert str(tmp_path) not in said
    store.client.delete_object(Bucket=store.bucket, Key="m/config.json")
    with pytest.raises(CheckpointError, match=rf"{url}: no config\.json"):
        open_checkpoint(url)
    quantised = store.upload(_another(local), "quantised")
    store.client.put_object(Bucket=store.bucket, Key="quantised/quantize_config.json", Body=b"{}")
    with pytest.raises(CheckpointError, match=rf"^{quantised}: weights are quantised \(GPTQ"):
        open_checkpoint(quantised)
    store.client.put_object(Bucket=store.bucket, Key="pickled/config.json", Body=b"{}")
    store.client.put_object(Bucket=store.bucket, Key="pickled/pytorch_model.bin", Body=b"x")
    with pytest.raises(CheckpointError, match=r"pickled: only pickle weights \(pytorch_model\.bin\)"):
        open_checkpoint(store.url("pickled"))


def test_an_object_that_changes_under_a_reader_is_noticed(local: Path, store: Store, tmp_path: Path) -> None:
    url = store.upload(_another(local), "m")
    opened, late = open_checkpoint(url), SafetensorsSource(locate(url), windows=Windows(window=100, ahead=0, held=2))
    name = late.names()[0]
    before = late.read(name, 0, 10)
    rewritten = tmp_path / "model.safetensors"
    rewritten.write_bytes((_another(local) / "model.safetensors").read_bytes())
    rewrite(rewritten, model__norm__weight=torch.zeros(32).bfloat16())
    store.client.upload_file(str(rewritten), store.bucket, "m/model.safetensors")
    with pytest.raises(CheckpointError, match=rf"{url}/model\.safetensors: has changed since it was opened"):
        late.read(name, 500, 900)
    assert same_bits(late.read(name, 0, 10), before)
    with pytest.raises(CheckpointError, match="has changed since it was opened"):
        identify(opened)


def test_who_may_not_read_is_told_what_to_set(local: Path, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    url = store.upload(_another(local), "m")
    deny = {"Effect": "Deny", "Principal": "*", "Action": "s3:GetObject", "Resource": f"arn:aws:s3:::{store.bucket}/*"}
    policy = json.dumps({"Version": "2012-10-17", "Statement": [deny]})
    store.client.put_bucket_policy(Bucket=store.bucket, Policy=policy)
    with pytest.raises(
        CheckpointError, match=r"does not let you read it .* AWS_PROFILE, or AWS_ACCESS_KEY_ID"
    ) as caught:
        open_checkpoint(url)
    assert "hush-hush" not in str(caught.value)
    monkeypatch.setenv("AWS_PROFILE", "nobody-has-this")
    with pytest.raises(CheckpointError, match="the profile that AWS_PROFILE names"):
        open_checkpoint(url)
    monkeypatch.delenv("AWS_PROFILE")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(CheckpointError, match="no credentials for the store; set AWS_PROFILE, or AWS_ACCESS_KEY_ID"):
        open_checkpoint(url)


def test_a_store_that_is_not_there(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    from components.checkpoints import stores

    waits: list[float] = []
    monkeypatch.setattr(stores.time, "sleep", waits.append)
    monkeypatch.setitem(stores._S3_OPTIONS, "config_kwargs", {"retries": {"total_max_attempts": 1}})
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(
        CheckpointError, match=r"cannot be reached; look at AWS_ENDPOINT_URL \(http://127\.0\.0\.1:9\)"
    ) as caught:
        open_checkpoint(store.url("m"))
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://user:secret@127.0.0.1:9")
    assert "secret" not in stores.explain(caught.value, store.url("m"), "read")
    assert len(waits) == stores.ATTEMPTS - 1


def test_transient_errors_are_tried_again(local: Path, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    from components.checkpoints import places, stores

    monkeypatch.setattr(stores, "FIRST_WAIT", 0.001)
    url = store.upload(_another(local), "m")
    real = places.RemoteFile._fetch
    calls: Counter[tuple[str, int, int]] = Counter()

    def flaky(file: places.RemoteFile, start: int, stop: int) -> bytes:
        calls[file.name, start, stop] += 1
        if calls[file.name, start, stop] % 3:
            raise OSError(5, "the store hiccups")
        return real(file, start, stop)

    monkeypatch.setattr(places.RemoteFile, "_fetch", flaky)
    assert digest(open_checkpoint(url).source) == digest(SafetensorsSource(_another(local)))
    monkeypatch.setattr(places.RemoteFile, "_fetch", lambda f, a, b: (_ for _ in ()).throw(TimeoutError("slow")))
    with pytest.raises(CheckpointError, match=r"the store failed \(TimeoutError: slow\); run again"):
        SafetensorsSource(locate(url))


def test_which_errors_pass() -> None:
    import errno

    from botocore.exceptions import ConnectionClosedError, NoCredentialsError, ReadTimeoutError

    passing = [
        TimeoutError(), ConnectionResetError(), OSError(errno.EBUSY, "SlowDown"), OSError(errno.EIO, "InternalError"),
        ReadTimeoutError(endpoint_url="x"), ConnectionClosedError(endpoint_url="x"),
    ]  # fmt: skip
    lasting = [FileNotFoundError(), PermissionError(), OSError(errno.EINVAL, "InvalidArgument"), NoCredentialsError()]
    assert all(is_transient(e) for e in passing)
    assert not any(is_transient(e) for e in lasting)


def test_references(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from components.checkpoints.places import HubId

    monkeypatch.chdir(tmp_path)
    assert parse_reference("models/chat-7b") == Path("models/chat-7b")
    assert parse_reference(tmp_path) == tmp_path
    assert parse_reference("file:///a%20b/c") == Path("/a b/c")
    assert parse_reference("s3://bucket/some/prefix/") == "s3://bucket/some/prefix"
    assert parse_reference("hf://owner/name@v1.0/x") == HubId("owner/name", "v1.0/x")
    assert parse_reference("hf://owner/name") == HubId("owner/name", None)
    assert parse_reference("owner/name@abc123") == HubId("owner/name", "abc123")
    (tmp_path / "owner" / "name@abc123").mkdir(parents=True)
    assert parse_reference("owner/name@abc123") == Path("owner/name@abc123")
    for reference, match in {
        "s3://key:secret@bucket/x": "must hold no credentials",
        "https://host/model?X-Amz-Signature=s": "cannot be listed; give s3://",
        "hf://name": "write hf://owner/name@revision",
        "nonsense://bucket/x": "no way to nonsense://",
    }.items():
        with pytest.raises(CheckpointError, match=match) as caught:
            locate(reference)
        assert "secret" not in str(caught.value)
        assert "Signature" not in str(caught.value)
    assert isinstance(locate("models/chat-7b"), Located)
