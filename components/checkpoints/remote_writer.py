"""A model written to a prefix of an object store: whole files side by side, the record last, never half a model.

    <url>/model-00001-of-00002.safetensors   appears when all of it is there (a multipart upload that was completed)
    <url>/.unfinished/<file>.json            what was uploaded whole so far, and by which job; gone after the record
    <url>/config.json                        after the weights: no loader opens a model without it
    <url>/record.json                        last: who finds it finds everything that it lists

A process that is killed leaves uploads that nobody sees and that the store bills. The next run of a job ends those under its
prefix; for jobs that never run again, let a lifecycle rule of the bucket (AbortIncompleteMultipartUpload) end them after a day.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np

from components.checkpoints.headers import layout
from components.checkpoints.places import HubId, RemoteFile, parse_reference
from components.checkpoints.remote import FETCHED, UNFINISHED, list_files
from components.checkpoints.safetensors import INDEX_NAME
from components.checkpoints.source import TensorSource, bits_of, blocks
from components.checkpoints.stores import ask, filesystem
from components.checkpoints.uploads import PART_BYTES, FileUpload, Written
from components.checkpoints.writer import METADATA, TEMPLATE_DIRECTORY
from components.errors import CheckpointError, StorageError, listed
from components.records import RECORD_FILE

BLOCK = 1 << 18
"""Elements that are read and sent on at once."""
_MARK = f"{UNFINISHED}/upload.json"
_LAST = (INDEX_NAME, "config.json")
"""What loaders look for, in the order in which it appears, after everything else."""


def open_output(reference: str, *, job: str, part_bytes: int = PART_BYTES) -> Output:
    """A prefix of an object store to write a model to. Asks the store nothing yet.

    Args:
        reference: its URL.
        job: what is being made (a fingerprint): files that an earlier run of the same job finished are kept.
        part_bytes: how much of a file is sent in one request; each open file holds a few of them in memory.

    Raises StorageError for what is no such URL.
    """
    try:
        parsed = parse_reference(reference)
    except CheckpointError as error:
        raise StorageError(str(error)) from error
    if isinstance(parsed, HubId | Path):
        raise StorageError(f"{reference}: is no URL of an object store; write s3://bucket/prefix")
    return Output(parsed, job, part_bytes)


@dataclass(frozen=True)
class Output:
    """A model that is being written. It is nothing but names: every process may have one and write files of its own; `begin`
    and `commit` are the leader's. Every method raises StorageError when the store refuses."""

    url: str
    job: str
    part_bytes: int = PART_BYTES

    def record(self) -> bytes | None:
        """The record of the model that is there; None where none was committed."""
        file = self._files().get(RECORD_FILE)
        return None if file is None else self._read(file)

    def begin(self, *, replace: bool = False) -> dict[str, Written]:
        """Make the prefix ready, and say which files an earlier run of this job has left whole.

        Files of an upload that was cut off go, unless they are this job's; uploads of a killed process are ended. With
        `replace` the model that is there goes, its record first. Raises StorageError where a model lies, or one of unknown
        origin, that was not to be replaced.
        """
        files = self._files()
        begun = any(name.startswith(f"{UNFINISHED}/") for name in files)
        model = [name for name in files if _is_of_model(name)]
        if RECORD_FILE in files and not replace:
            raise StorageError(
                f"{self.url}: holds a model already ({RECORD_FILE}); choose another prefix, or replace it"
            )
        if model and not begun and not replace:
            raise StorageError(
                f"{self.url}: holds a model that no record belongs to: {listed(sorted(model), 3)}; choose another prefix, or "
                "replace it"
            )
        kept = {} if RECORD_FILE in files else self._whole(files)
        self._put(_MARK, json.dumps({"job": self.job}).encode())
        notes = {_note_of(name) for name in kept}
        gone = {*model, *(n for n in files if n.startswith(f"{UNFINISHED}/"))} - kept.keys() - notes - {_MARK}
        # What says that there is a model goes before anything that it needs.
        first = [name for name in (RECORD_FILE, *reversed(_LAST)) if name in files and name not in kept]
        self._remove([*first, *sorted(gone - set(first))])
        self._end_uploads()
        return kept

    def create(self, name: str, size: int) -> FileUpload:
        """A file of `size` bytes that will be written from its beginning to its end."""
        return FileUpload(
            f"{self.url}/{name}", size, part_bytes=self.part_bytes, finished=partial(self._write_note, name)
        )

    def put(self, name: str, data: bytes) -> Written:
        """A small file in one go."""
        with self.create(name, len(data)) as upload:
            upload.write(data)
            return upload.close()

    def commit(self, files: Mapping[str, Written], record: bytes) -> None:
        """Write the record, once every file is there as it was written. Raises StorageError that lists those that are not."""
        there = self._files()
        wrong = [name for name, file in sorted(files.items()) if not _is_same(there.get(name), file)]
        if wrong:
            raise StorageError(f"{self.url}: missing, or changed since they were written: {listed(wrong)}; run again")
        self._put(RECORD_FILE, record)
        self.tidy()

    def tidy(self) -> None:
        """Remove the notes of an upload that was committed."""
        self._remove(sorted(name for name in self._files() if name.startswith(f"{UNFINISHED}/")))

    def _files(self) -> dict[str, RemoteFile]:
        try:
            return list_files(self.url)
        except CheckpointError as error:
            if isinstance(error.__cause__, FileNotFoundError):
                return {}  # a bucket that is not there refuses the first write
            raise StorageError(str(error)) from error

    def _whole(self, files: Mapping[str, RemoteFile]) -> dict[str, Written]:
        """Files that this job noted as whole and that are still what they were."""
        found: dict[str, Written] = {}
        for name, file in files.items():
            note = files.get(_note_of(name))
            if note is None:
                continue
            said = json.loads(self._read(note))
            written = Written(**said["file"])
            if said["job"] == self.job and _is_same(file, written):
                found[name] = written
        return found

    def _write_note(self, name: str, written: Written) -> None:
        self._put(_note_of(name), json.dumps({"job": self.job, "file": asdict(written)}).encode())

    def _read(self, file: RemoteFile) -> bytes:
        try:
            return file.read(0, file.size)
        except CheckpointError as error:
            raise StorageError(str(error)) from error

    def _put(self, name: str, data: bytes) -> None:
        fs, path = filesystem(self.url)
        ask(f"{self.url}/{name}", "write", lambda: fs.pipe_file(f"{path}/{name}", data))

    def _remove(self, names: Iterable[str]) -> None:
        fs, path = filesystem(self.url)
        for name in names:
            ask(f"{self.url}/{name}", "write", partial(fs.rm_file, f"{path}/{name}"))

    def _end_uploads(self) -> None:
        """Of files under this prefix alone: others may be writing elsewhere in the bucket."""
        fs, path = filesystem(self.url)
        if not hasattr(fs, "abort_mpu"):
            return  # other stores forget them by themselves
        bucket, key, _ = fs.split_path(path)
        # A courtesy: who may not list uploads may still write, and another process may have ended them meanwhile.
        with contextlib.suppress(StorageError):
            found = ask(
                self.url, "write", lambda: fs.call_s3("list_multipart_uploads", Bucket=bucket, Prefix=f"{key}/")
            )
            for upload in found.get("Uploads", []):
                ask(self.url, "write", partial(fs.abort_mpu, bucket, upload["Key"], upload["UploadId"]))


def _is_of_model(name: str) -> bool:
    return name.endswith(".safetensors") or name in FETCHED or name.startswith(f"{TEMPLATE_DIRECTORY}/")


def _is_same(file: RemoteFile | None, written: Written) -> bool:
    return file is not None and (file.size, file.etag) == (written.bytes, written.etag)


def _note_of(name: str) -> str:
    # A folder deep and no deeper: templates have one of their own.
    return f"{UNFINISHED}/{name.replace('/', '%2F')}.json"


def write_shard(output: Output, file_name: str, source: TensorSource, names: Iterable[str]) -> Written:
    """One safetensors file of a source's tensors, read and sent on in blocks. The same bytes as CheckpointWriter's."""
    raw, header = layout({name: source.spec(name) for name in names}, METADATA)
    with output.create(file_name, header.end) as upload:
        upload.write(raw)
        for name, placed in header.tensors.items():
            for start, stop in blocks(placed.spec.numel, BLOCK):
                upload.write(bits_of(source, name, start, stop).view(np.uint8).data)
        return upload.close()


def publish(directory: Path, output: Output, record: bytes, *, replace: bool = False, side_by_side: int = 4) -> None:
    """Bring a finished model directory to its prefix, `side_by_side` files at a time, and commit it with `record`.

    Nothing happens where that record is already; what an earlier run of the output's job brought is not sent again. Raises
    StorageError when the store refuses.
    """
    if output.record() == record:
        output.tidy()  # of a run that was cut off right after it had committed
        return
    paths = {p.relative_to(directory).as_posix(): p for p in sorted(directory.rglob("*")) if p.is_file()}
    paths.pop(RECORD_FILE, None)
    files = output.begin(replace=replace)

    def one(name: str) -> Written:
        size = paths[name].stat().st_size
        if name in files and files[name].bytes == size:
            return files[name]
        with output.create(name, size) as upload, paths[name].open("rb") as file:
            while data := file.read(output.part_bytes):
                upload.write(data)
            return upload.close()

    early = [name for name in paths if name not in _LAST]
    with ThreadPoolExecutor(max_workers=side_by_side) as pool:
        try:
            written = dict(zip(early, pool.map(one, early), strict=True))
        finally:
            pool.shutdown(cancel_futures=True)
    for name in _LAST:
        if name in paths:
            written[name] = one(name)
    output.commit(written, record)
