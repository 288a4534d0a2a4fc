"""Models written to an object store: whole or not at all, whatever ends the writer."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from components.checkpoints.reference import open_checkpoint
from components.checkpoints.remote_writer import Output, open_output, publish, write_shard
from components.checkpoints.safetensors import INDEX_NAME, SafetensorsSource
from components.checkpoints.source import TensorSource, read_whole
from components.checkpoints.uploads import LEAST_PART, FileUpload, Written
from components.checkpoints.writer import json_bytes, plan_shards, shard_index
from components.errors import CheckpointError, StorageError
from tests.components.checkpoints.tiny import llama, same_bits, save, save_tokenizer
from tests.components.conftest import Store

pytestmark = pytest.mark.service
RECORD = b'{"fingerprint": "f"}'


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sharded model with a tokenizer; one of its shards takes three parts to upload."""
    path = tmp_path_factory.mktemp("local") / "model"
    save(llama(0, torch.bfloat16, vocab_size=90_000), path, shard="6MB")
    save_tokenizer(path)
    assert max(f.stat().st_size for f in path.glob("*.safetensors")) > LEAST_PART
    return path


def _output(store: Store, prefix: str = "out", job: str = "job-1") -> Output:
    return open_output(store.url(prefix), job=job, part_bytes=LEAST_PART)


def _same(a: TensorSource, b: TensorSource) -> bool:
    return a.names() == b.names() and all(same_bits(read_whole(a, n), read_whole(b, n)) for n in a.names())


def test_a_published_directory_reads_back_bit_identical(local: Path, store: Store) -> None:
    output = _output(store)
    assert output.record() is None
    publish(local, output, RECORD)
    assert output.record() == RECORD
    for path in local.iterdir():
        assert store.body(f"out/{path.name}") == path.read_bytes()
    assert store.keys("out") == sorted([*(p.name for p in local.iterdir()), "record.json"])
    assert store.uploads() == []
    assert _same(open_checkpoint(output.url).source, SafetensorsSource(local))
    store.client.put_object(Bucket=store.bucket, Key="out/.unfinished/upload.json", Body=b"{}")  # killed right after
    publish(local, output, RECORD)  # nothing left to do
    assert store.keys("out") == sorted([*(p.name for p in local.iterdir()), "record.json"])
    with pytest.raises(
        StorageError, match=r"holds a model already \(record\.json\); choose another prefix, or replace it"
    ):
        publish(local, output, b"another record")


def test_streamed_shards_are_what_a_local_writer_writes(local: Path, store: Store, tmp_path: Path) -> None:
    from components.checkpoints.writer import CheckpointWriter

    source = SafetensorsSource(local)
    specs = {name: source.spec(name) for name in source.names()}
    plan = plan_shards(specs, 6_000_000)
    output = _output(store)
    assert output.begin() == {}
    written = {name: write_shard(output, name, source, names) for name, names in plan.items()}
    written[INDEX_NAME] = output.put(INDEX_NAME, json_bytes(shard_index(plan, specs)))
    with pytest.raises(CheckpointError, match="is still being uploaded, or its upload was cut off"):
        open_checkpoint(output.url)
    written["config.json"] = output.put("config.json", (local / "config.json").read_bytes())
    output.commit(written, RECORD)
    with CheckpointWriter(tmp_path, specs, max_shard_bytes=6_000_000) as writer:
        for name in source.names():
            writer.write_whole(name, read_whole(source, name))
        files = writer.finish()
    assert len(files) > 2
    for file in files:
        assert store.body(f"out/{file.name}") == file.read_bytes()
        assert written[file.name].sha256 == hashlib.sha256(file.read_bytes()).hexdigest()
        head = store.client.head_object(Bucket=store.bucket, Key=f"out/{file.name}")
        assert (written[file.name].bytes, written[file.name].etag) == (head["ContentLength"], head["ETag"].strip('"'))
    assert _same(open_checkpoint(output.url).source, source)


_WRITER = """
import sys, time
from components.checkpoints.remote_writer import open_output
output = open_output(sys.argv[1], job="job-1", part_bytes=5 << 20)
output.begin()
output.put("model-00001-of-00002.safetensors", b"first")
upload = output.create("model-00002-of-00002.safetensors", 12 << 20)
upload.write(b"2" * (11 << 20))
upload._wait()
print("half", flush=True)
time.sleep(600)
"""


@pytest.mark.multiproc
def test_a_writer_that_is_killed_leaves_no_half_file_and_the_next_goes_on(store: Store) -> None:
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    command = [sys.executable, "-c", _WRITER, store.url("out")]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd=Path(__file__).parents[3], env=dict(os.environ)
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"half\n"
        process.kill()
    assert process.returncode == -signal.SIGKILL
    assert names[0] in store.keys("out")
    assert names[1] not in store.keys("out")
    assert store.uploads() == [f"out/{names[1]}"]
    output = _output(store)
    assert output.record() is None
    with pytest.raises(CheckpointError, match="its upload was cut off; run the upload again"):
        open_checkpoint(output.url)
    store.client.create_multipart_upload(Bucket=store.bucket, Key="outside/model.safetensors")
    kept = output.begin()
    assert set(kept) == {names[0]}
    assert kept[names[0]].sha256 == hashlib.sha256(b"first").hexdigest()
    assert store.uploads() == ["outside/model.safetensors"]  # somebody else's
    second = output.put(names[1], b"2" * 100)
    output.commit({**kept, names[1]: second}, RECORD)
    assert store.keys("out") == [*names, "record.json"]


def test_an_error_in_the_middle_ends_the_upload(store: Store) -> None:
    output = _output(store)
    output.begin()
    before = store.keys("out")

    def write_some() -> None:
        with output.create("model.safetensors", 12 << 20) as upload:
            upload.write(bytes(11 << 20))
            raise RuntimeError("the reader broke")

    with pytest.raises(RuntimeError, match="the reader broke"):
        write_some()
    assert store.keys("out") == before
    assert store.uploads() == []
    with output.create("short.safetensors", 10) as upload:
        upload.write(b"123")
        with pytest.raises(AssertionError, match="short"):
            upload.close()
    assert store.keys("out") == before


def test_commit_wants_every_file_as_it_was_written(store: Store) -> None:
    output = _output(store)
    output.begin()
    files = {name: output.put(name, name.encode()) for name in ("a.safetensors", "b.safetensors", "config.json")}
    store.client.put_object(Bucket=store.bucket, Key="out/b.safetensors", Body=b"other bytes..")
    store.client.delete_object(Bucket=store.bucket, Key="out/a.safetensors")
    with pytest.raises(StorageError, match=r"since they were written: a\.safetensors; b\.safetensors; run again"):
        output.commit(files, RECORD)
    assert output.record() is None


def test_only_what_this_job_left_is_kept(store: Store) -> None:
    first = _output(store, job="job-1")
    first.begin()
    first.put("model.safetensors", b"1")
    first.put("tokenizer.json", b"{}")
    (kept,) = [_output(store, job="job-1").begin()]
    assert set(kept) == {"model.safetensors", "tokenizer.json"}
    store.client.put_object(Bucket=store.bucket, Key="out/tokenizer.json", Body=b"changed")
    assert set(_output(store, job="job-1").begin()) == {"model.safetensors"}
    assert _output(store, job="job-2").begin() == {}
    assert store.keys("out") == [".unfinished/upload.json"]


def test_replacing_takes_the_old_model_away_and_nothing_else(local: Path, store: Store) -> None:
    output = _output(store)
    publish(local, output, RECORD)
    store.client.put_object(Bucket=store.bucket, Key="out/notes.txt", Body=b"mine")
    replacing = _output(store, job="job-2")
    assert replacing.begin(replace=True) == {}
    assert replacing.record() is None
    assert store.keys("out") == [".unfinished/upload.json", "notes.txt"]
    files = {"model.safetensors": replacing.put("model.safetensors", b"new")}
    replacing.commit(files, b"new record")
    assert store.keys("out") == ["model.safetensors", "notes.txt", "record.json"]


def test_a_model_without_a_record_is_nobodys_to_remove(local: Path, store: Store) -> None:
    store.upload(local, "out")
    with pytest.raises(
        StorageError, match=r"holds a model that no record belongs to: .*; choose another prefix, or replace"
    ):
        _output(store).begin()
    assert store.keys("out") == sorted(p.name for p in local.iterdir())
    assert _output(store).begin(replace=True) == {}


def test_who_may_not_write_is_told_so(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    deny = {"Effect": "Deny", "Principal": "*", "Action": "s3:PutObject", "Resource": f"arn:aws:s3:::{store.bucket}/*"}
    policy = json.dumps({"Version": "2012-10-17", "Statement": [deny]})
    store.client.put_bucket_policy(Bucket=store.bucket, Policy=policy)
    with pytest.raises(StorageError, match=r"does not let you write it .* AWS_PROFILE"):
        _output(store).begin()
    with pytest.raises(StorageError, match="there is no such bucket; make it"):
        open_output("s3://no-such-bucket-anywhere/x", job="j").begin()
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(StorageError, match="no credentials for the store"):
        _output(store).begin()
    for reference in ("owner/name@main", "/local/path", "hf://owner/name", "s3://key:secret@bucket/x"):
        with pytest.raises(StorageError) as caught:
            open_output(reference, job="j")
        assert "secret" not in str(caught.value)


@given(sizes=st.lists(st.integers(0, 7 << 20), min_size=1, max_size=4))
@settings(max_examples=8, deadline=None)
def test_any_pieces_make_the_same_file(sizes: list[int], tmp_path_factory: pytest.TempPathFactory) -> None:
    """Against a store in memory that fsspec brings along: how a file is cut into writes and parts changes nothing."""
    data = b"".join(bytes([i + 1]) * size for i, size in enumerate(sizes))
    seen: list[Written] = []
    with FileUpload("memory://bucket/file", len(data), part_bytes=LEAST_PART, finished=seen.append) as upload:
        position = 0
        for size in sizes:
            upload.write(data[position : position + size])
            position += size
        upload.close()
    import fsspec

    assert fsspec.filesystem("memory").cat_file("/bucket/file") == data
    assert (seen[0].bytes, seen[0].sha256) == (len(data), hashlib.sha256(data).hexdigest())
