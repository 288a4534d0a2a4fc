"""A fusion of models in an object store: the bytes that it has of the same models on a disk."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from components.checkpoints.reference import open_checkpoint
from components.checkpoints.remote_writer import Output
from components.errors import CheckpointError, StorageError
from components.fusion import store_job
from components.fusion.job import fuse
from components.fusion.making import CARD_FILE
from components.fusion.recipe import Recipe, settings_of
from components.fusion.store_job import fuse_to_store
from components.records import RECORD_FILE
from tests.components.checkpoints.tiny import llama, perturbed, save, save_tokenizer
from tests.components.conftest import Store

pytestmark = [pytest.mark.service, pytest.mark.multiproc]


def _recipe(root: str, *finetunes: str) -> Recipe:
    merge, fusion = settings_of("ties", {"scale": 0.7}, {"max_shard_bytes": 12_000})
    models = {name: f"{root}/{name}" for name in finetunes}
    return Recipe(aligned=f"{root}/aligned", finetunes=models, merge=merge, fusion=fusion)


@pytest.fixture
def family(tmp_path: Path) -> Path:
    save(llama(0, torch.bfloat16), tmp_path / "in" / "aligned", shard="20KB")
    save_tokenizer(tmp_path / "in" / "aligned")
    for seed, name in enumerate(("zh", "hi"), start=2):
        save(perturbed(llama(0, torch.bfloat16), seed, scale=0.004), tmp_path / "in" / name)
    return tmp_path / "in"


def test_from_the_store(store: Store, family: Path, tmp_path: Path) -> None:
    url = store.upload(family, "family")
    here = fuse(_recipe(str(family), "zh", "hi"), tmp_path / "here")
    there = fuse(_recipe(url, "zh", "hi"), tmp_path / "there", processes=2)
    files = sorted(p.name for p in Path(here.place).glob("*.safetensors*"))
    assert len(files) > 3
    for name in files:
        assert (Path(there.place) / name).read_bytes() == (Path(here.place) / name).read_bytes()
    inputs = there.record["inputs"]["zh"]["files"]
    head = store.client.head_object(Bucket=store.bucket, Key="family/zh/model.safetensors")
    assert inputs[f"{url}/zh/model.safetensors"] == [head["ContentLength"], head["ETag"].strip('"')]
    assert str(tmp_path) not in json.dumps(there.record["inputs"])

    shutil.rmtree(tmp_path / "cache")
    assert not fuse(_recipe(url, "zh", "hi"), tmp_path / "there").made
    store.upload(family / "hi", "family/zh")
    with pytest.raises(StorageError, match="holds something else"):
        fuse(_recipe(url, "zh", "hi"), tmp_path / "there")


def test_into_the_store_with_no_copy_here(store: Store, family: Path, tmp_path: Path) -> None:
    recipe = _recipe(str(family), "zh", "hi")
    here = Path(fuse(recipe, tmp_path / "here").place)
    url = store.url("fused")
    there = fuse_to_store(recipe, url, processes=2)
    assert there.made
    assert store.keys("fused") == sorted(p.name for p in here.iterdir())
    for name in (p.name for p in here.iterdir() if p.name not in (RECORD_FILE, CARD_FILE)):
        assert store.body(f"fused/{name}") == (here / name).read_bytes(), name
    record = json.loads(store.body(f"fused/{RECORD_FILE}"))
    assert record == there.record
    for name, said in record["outputs"].items():
        head = store.client.head_object(Bucket=store.bucket, Key=f"fused/{name}")
        assert (head["ContentLength"], head["ETag"].strip('"')) == (said["bytes"], said["etag"])
        assert hashlib.sha256(store.body(f"fused/{name}")).hexdigest() == said["sha256"]
    assert not fuse_to_store(recipe, url).made
    with pytest.raises(StorageError, match=r"holds something else; .*--overwrite"):
        fuse_to_store(_recipe(str(family), "zh"), url)
    assert fuse_to_store(_recipe(str(family), "zh"), url, overwrite=True).made
    assert open_checkpoint(url).source.names() == open_checkpoint(here).source.names()


def test_what_was_sent_whole_is_not_sent_again(
    store: Store, family: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, url = _recipe(str(family), "zh", "hi"), store.url("fused")
    original = store_job.write_shard
    sent: list[str] = []

    def cut(output: Output, file_name: str, *rest: Any) -> Any:
        if len(sent) == 2:
            raise KeyboardInterrupt
        sent.append(file_name)
        return original(output, file_name, *rest)

    monkeypatch.setattr(store_job, "write_shard", cut)
    with pytest.raises(KeyboardInterrupt):
        fuse_to_store(recipe, url)
    assert RECORD_FILE not in store.keys("fused")
    with pytest.raises(CheckpointError, match="is still being uploaded"):
        open_checkpoint(url)
    first = list(sent)
    sent.clear()
    monkeypatch.setattr(
        store_job, "write_shard", lambda output, name, *rest: (sent.append(name), original(output, name, *rest))[1]
    )
    fuse_to_store(recipe, url)
    assert sent
    assert not set(sent) & set(first)
    here = Path(fuse(recipe, tmp_path / "here").place)
    for file in here.glob("*.safetensors*"):
        assert store.body(f"fused/{file.name}") == file.read_bytes()
