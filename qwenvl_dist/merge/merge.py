"""Merge a checkpoint into its base: the one way through, from folders to a published folder."""

import contextlib
import fcntl
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from qwenvl_dist.errors import UserError
from qwenvl_dist.files import fsync
from qwenvl_dist.merge.adapter import write_peft_folder
from qwenvl_dist.merge.apply_lora import (
    TensorPlan,
    count_changed,
    make_plan,
    merged_rows,
    read_rows,
    round_rows,
    row_blocks,
    sum_of_squares,
)
from qwenvl_dist.merge.parallel import for_each
from qwenvl_dist.merge.safetensors_writer import SafetensorsWriter
from qwenvl_dist.merge.trained import Trained
from qwenvl_dist.merge.verify import Verified, verify_output
from qwenvl_dist.model.base_folder import DTYPE_BYTES, INDEX_FILE, BaseFolder, SafetensorsFile, write_header

REPORT_FILE = "merge_report.json"
DTYPES = {"bfloat16": "BF16", "float32": "F32"}
# Files beside the weights, by kind: of each the checkpoint's own are taken when it has one
_TOKENIZER = {
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "merges.txt",
    "special_tokens_map.json", "added_tokens.json",
}  # fmt: skip
_TEMPLATE = {"chat_template.json", "chat_template.jinja"}
_IMAGES = {"preprocessor_config.json", "video_preprocessor_config.json", "processor_config.json"}
_MODEL = {
    "config.json",
    "generation_config.json",
    "configuration.json",
    "LICENSE",
    "LICENSE.txt",
    "LICENSE.md",
}


@dataclass(frozen=True)
class MergeReport:
    """What a merge did."""

    tensors: int
    merged: int
    bytes: int  # of the weight files written
    seconds: float
    verified: Verified | None
    modules: list[dict[str, Any]]  # of each merged tensor: name, rank, scaling, relative_delta, changed


def merge(
    trained: Trained,
    base: BaseFolder,
    out: Path,
    *,
    dtype: str | None = None,
    verify: bool = False,
    allow_other_base: bool = False,
    progress: Callable[..., Any] | None = None,
) -> MergeReport:
    """Write the base with what was trained into `out`, which appears whole or not at all.

    Memory is bounded by the adapter and a few row blocks, whatever the size of the base.

    Args:
        trained: what `read_trained` found.
        base: the model it was trained on.
        out: a folder that does not exist or is empty.
        dtype: `bfloat16` or `float32` for all weights, None to keep the base's.
        verify: prove the output before it is published.
        allow_other_base: go on when the checkpoint was trained on a base with another fingerprint.
        progress: as `qwenvl_dist.logs.progress`.

    Raises:
        UserError: checkpoint and base do not fit, `out` is taken, or the disk is too small.
        CheckFailed: the proof failed; nothing is published.
    """
    started = time.monotonic()
    if not allow_other_base:
        check_base(trained, base)
    plans = make_plan(base, trained, DTYPES[dtype] if dtype else None)
    headers = {file.path.name: _header(file, plans) for file in base.files.values()}
    sizes = {name: len(header) + _data_bytes(base.files[name], plans) for name, header in headers.items()}
    _check_target(out, sum(sizes.values()))
    started_bytes = sum(sizes.values())
    modules: list[dict[str, Any]] = []
    with _published_folder(out) as partial:
        with _progress(progress, started_bytes >> 20, "merge, MiB") as advance:
            for file in base.files.values():
                with SafetensorsWriter(
                    partial / file.path.name, headers[file.path.name], sizes[file.path.name]
                ) as writer:
                    modules += _write_tensors(file, plans, writer, len(headers[file.path.name]), advance)
        _write_side_files(base, trained, partial, dtype, plans)
        verified = None
        if verify:
            with _progress(progress, started_bytes >> 20, "verify, MiB") as advance:
                verified = verify_output(base, plans, partial, advance)
        report = MergeReport(
            len(plans), len(modules), started_bytes, round(time.monotonic() - started, 3), verified, modules
        )
        (partial / REPORT_FILE).write_text(json.dumps(asdict(report), indent=1) + "\n", encoding="utf-8")
    return report


def check_base(trained: Trained, base: BaseFolder) -> None:
    """Refuse a base that is not the one the checkpoint was trained on."""
    if trained.base_fingerprint and trained.base_fingerprint != base.fingerprint():
        raise UserError(
            f"{base.path} is not the base that {trained.source} was trained on (its fingerprint differs); "
            "name that base, or give --allow-other-base"
        )


def write_adapter(trained: Trained, out: Path) -> None:
    """Write the adapter alone as a peft folder, float32, with the processor of its training in `processor/`."""
    if not trained.deltas or trained.adapter_config is None:
        raise UserError(
            f"{trained.source} holds no adapter: it trained the base's own parameters; use --out alone"
        )
    of_base = [name for name, parameter in trained.parameters.items() if not parameter.in_adapter]
    if of_base:
        raise UserError(
            f"{trained.source} also trained {len(of_base)} parameters of the base, such as "
            f"{of_base[0]}, which an adapter folder cannot hold; use --out alone"
        )
    write_peft_folder(out, trained.adapter_config, trained.deltas, trained.parameters)
    if trained.processor:  # pictures must keep the size they were trained at
        shutil.copytree(trained.processor, out / "processor")


def _header(file: SafetensorsFile, plans: dict[str, TensorPlan]) -> bytes:
    if all(plans[name].dtype == entry.dtype for name, entry in file.tensors.items()):
        return file.header  # nothing moves: keep the base's bytes
    entries = {name: (plans[name].dtype, entry.shape) for name, entry in file.tensors.items()}
    return write_header(entries, file.metadata)


def _data_bytes(file: SafetensorsFile, plans: dict[str, TensorPlan]) -> int:
    return sum(_nbytes(plans[name]) for name in file.tensors)


def _nbytes(plan: TensorPlan) -> int:
    return plan.entry.nbytes // DTYPE_BYTES[plan.entry.dtype] * DTYPE_BYTES[plan.dtype]


def _write_tensors(
    file: SafetensorsFile,
    plans: dict[str, TensorPlan],
    writer: SafetensorsWriter,
    offset: int,
    advance: Callable[[int], None],
) -> list[dict[str, Any]]:
    """Write all tensors of a file; return a line of the report for each merged one."""
    places = []
    for name in file.tensors:
        places.append((plans[name], offset))
        offset += _nbytes(plans[name])
    source = os.open(file.path, os.O_RDONLY)
    try:
        lines = for_each(
            places,
            lambda place: _write_tensor(place[0], source, writer, place[1]),
            lambda place: advance(_nbytes(place[0])),
        )
    finally:
        os.close(source)
    return [line for line in lines if line is not None]


def _write_tensor(
    plan: TensorPlan, source: int, writer: SafetensorsWriter, offset: int
) -> dict[str, Any] | None:
    """Write one tensor from `offset` of the output on."""
    if plan.copied:
        writer.copy(source, plan.entry.begin, offset, plan.entry.nbytes)
        return None
    changed, squared, moved = 0, 0.0, 0.0
    is_dora = plan.delta is not None and plan.delta.magnitude is not None
    for begin, end in row_blocks(plan):
        base_rows = read_rows(source, plan.entry, plan.columns, begin, end)
        rows = round_rows(plan, merged_rows(plan, base_rows, begin, end))
        writer.write(_bytes(rows), offset)
        offset += rows.numel() * rows.element_size()
        if plan.merged:
            changed += count_changed(base_rows, rows)
            squared += sum_of_squares(base_rows)
        if is_dora:  # LoRA's own change needs no pass over the weight
            moved += sum_of_squares(rows.float() - base_rows.float())
    if not plan.merged:
        return None
    line: dict[str, Any] = {"name": plan.name, "shape": list(plan.entry.shape)}
    if plan.delta is not None:
        line["rank"] = plan.delta.lora_a.shape[0]
        line["scaling"] = plan.delta.scaling
        norm = moved**0.5 if is_dora else plan.delta.norm()
        line["relative_delta"] = norm / squared**0.5 if squared else None
    line["changed"] = changed / max(1, plan.rows * plan.columns)
    return line


def _bytes(rows: torch.Tensor) -> memoryview:
    return rows.contiguous().view(torch.uint8).reshape(-1).numpy().data


def _write_side_files(
    base: BaseFolder, trained: Trained, out: Path, dtype: str | None, plans: dict[str, TensorPlan]
) -> None:
    """Put config, generation config, tokenizer, chat template and processor beside the weights."""
    own = (
        {path.name: path for path in trained.processor.iterdir() if path.is_file()}
        if trained.processor
        else {}
    )
    for kind in (_TOKENIZER, _TEMPLATE, _IMAGES, _MODEL):
        if kind is _MODEL or not own.keys() & kind:
            for name in sorted(kind):
                if (base.path / name).is_file():
                    shutil.copyfile(base.path / name, out / name)
    for name, path in own.items():
        shutil.copyfile(path, out / name)
    if dtype:
        _set_config_dtype(out / "config.json", dtype)
    if base.index is not None:
        index = json.loads((base.path / INDEX_FILE).read_text(encoding="utf-8"))
        index.setdefault("metadata", {})["total_size"] = sum(map(_nbytes, plans.values()))
        (out / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _set_config_dtype(path: Path, dtype: str) -> None:
    config = json.loads(path.read_text(encoding="utf-8"))
    for section in [config, *(value for value in config.values() if isinstance(value, dict))]:
        for key in ("torch_dtype", "dtype"):
            if key in section:
                section[key] = dtype
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _check_target(out: Path, size: int) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists and is not empty; remove it or name another folder")
    out.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(out.parent).free
    if free < size:
        raise UserError(
            f"{out.parent} has {free / 1e9:.1f} GB free, the merged model takes {size / 1e9:.1f} GB"
        )


@contextlib.contextmanager
def _published_folder(out: Path) -> Iterator[Path]:
    """Yield a new hidden folder beside `out`; it becomes `out` when the block ends well.

    When not, it is removed. What a killed merge left there is removed first;
    a merge that still runs is not disturbed.
    """
    partial = out.parent / f".{out.name}.partial"
    partial.mkdir(exist_ok=True)
    lock = os.open(partial, os.O_RDONLY)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"another merge into {out} is running; wait for it") from error
        for left_over in partial.iterdir():
            left_over.unlink()
        try:
            yield partial
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        for path in partial.iterdir():
            fsync(path)
        os.fsync(lock)
        partial.rename(out)
        fsync(out.parent)
    finally:
        os.close(lock)


@contextlib.contextmanager
def _progress(
    progress: Callable[..., Any] | None, total: int, description: str
) -> Iterator[Callable[[int], None]]:
    """Yield a function that counts bytes; shown in MiB."""
    if progress is None:
        yield lambda count: None
        return
    done = shown = 0
    with progress(None, total, description) as bar:

        def advance(count: int) -> None:
            nonlocal done, shown
            done += count
            bar.advance((done >> 20) - shown)
            shown = done >> 20

        yield advance
