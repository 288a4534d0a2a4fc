"""A fusion of models in an object store: the bytes that it has of the same models on a disk."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from components.checkpoints.reference import open_checkpoint
from components.checkpoints.remote_writer import open_output, publish
from components.checkpoints.source import read_whole
from components.errors import StorageError
from components.fusion.job import fuse
from components.fusion.recipe import Recipe, settings_of
from components.records import RECORD_FILE
from tests.components.checkpoints.tiny import llama, perturbed, same_bits, save, save_tokenizer
from tests.components.conftest import Store

pytestmark = [pytest.mark.service, pytest.mark.multiproc]


def _recipe(root: str, *finetunes: str) -> Recipe:
    merge, fusion = settings_of("ties", {"scale": 0.7}, {"max_shard_bytes": 12_000})
    models = {name: f"{root}/{name}" for name in finetunes}
    return Recipe(aligned=f"{root}/aligned", finetunes=models, merge=merge, fusion=fusion)


def test_from_the_store_and_back(store: Store, tmp_path: Path) -> None:
    save(llama(0, torch.bfloat16), tmp_path / "in" / "aligned", shard="20KB")
    save_tokenizer(tmp_path / "in" / "aligned")
    for seed, name in enumerate(("zh", "hi"), start=2):
        save(perturbed(llama(0, torch.bfloat16), seed, scale=0.004), tmp_path / "in" / name)
    url = store.upload(tmp_path / "in", "family")
    here = fuse(_recipe(str(tmp_path / "in"), "zh", "hi"), tmp_path / "here")
    there = fuse(_recipe(url, "zh", "hi"), tmp_path / "there", processes=2)
    files = sorted(p.name for p in here.directory.glob("*.safetensors*"))
    assert len(files) > 3
    for name in files:
        assert (there.directory / name).read_bytes() == (here.directory / name).read_bytes()
    inputs = there.record["inputs"]["zh"]["files"]
    head = store.client.head_object(Bucket=store.bucket, Key="family/zh/model.safetensors")
    assert inputs[f"{url}/zh/model.safetensors"] == [head["ContentLength"], head["ETag"].strip('"')]
    assert str(tmp_path) not in json.dumps(there.record["inputs"])

    shutil.rmtree(tmp_path / "cache")
    assert not fuse(_recipe(url, "zh", "hi"), tmp_path / "there").made
    store.upload(tmp_path / "in" / "hi", "family/zh")
    with pytest.raises(StorageError, match="holds something else"):
        fuse(_recipe(url, "zh", "hi"), tmp_path / "there")

    output = open_output(store.url("fused"), job=there.record["fingerprint"])
    record = (there.directory / RECORD_FILE).read_bytes()
    publish(there.directory, output, record)
    assert output.record() == record
    fused = open_checkpoint(output.url).source
    local = open_checkpoint(here.directory).source
    assert all(same_bits(read_whole(fused, n), read_whole(local, n)) for n in local.names())
