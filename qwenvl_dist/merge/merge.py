"""Merge a checkpoint into its base: the one way through, from folders to a published folder."""

import contextlib
import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qwenvl_dist.errors import UserError
from qwenvl_dist.files import file_state
from qwenvl_dist.merge.adapter import write_peft_folder
from qwenvl_dist.merge.apply_lora import make_plan
from qwenvl_dist.merge.forward import ForwardComparison, compare_forward
from qwenvl_dist.merge.partial import partial_output
from qwenvl_dist.merge.side_files import write_side_files
from qwenvl_dist.merge.trained import Trained
from qwenvl_dist.merge.verify import Verified, verify_output
from qwenvl_dist.merge.write import FilePlan, plan_files, write_files
from qwenvl_dist.model.base_folder import BaseFolder

REPORT_FILE = "merge_report.json"
ARITHMETIC = 1  # to be raised when the same inputs give other bytes: a killed merge of before does not go on
DTYPES = {"bfloat16": "BF16", "float32": "F32"}


@dataclass(frozen=True)
class MergeReport:
    """What a merge did; `merge_report.json` holds it."""

    tensors: int
    merged: int
    bytes: int  # of the weight files
    seconds: float
    files_from_earlier_start: list[str]
    base: str  # fingerprint
    verified: Verified | None
    forward: dict[str, ForwardComparison] | None  # by prompt
    modules: list[dict[str, Any]]  # a line for each merged tensor, see `apply_lora.Change.line`
    sha256: dict[str, str]  # of each tensor's bytes


def merge(
    trained: Trained,
    base: BaseFolder,
    out: Path,
    *,
    dtype: str | None = None,
    verify: bool = False,
    verify_forward: bool = False,
    allow_other_base: bool = False,
    progress: Callable[..., Any] | None = None,
) -> MergeReport:
    """Write the base with what was trained into `out`, which appears whole or not at all.

    Memory is bounded by the adapter and a few row blocks, whatever the size of the base. After a kill the same call
    goes on with the weight files that are finished.

    Args:
        trained: what `read_trained` found.
        base: the model it was trained on.
        out: a folder that does not exist or is empty.
        dtype: `bfloat16` or `float32` for all weights, None to keep the base's.
        verify: prove every tensor of the output before it is published.
        verify_forward: before that, compare its logits with those of base + adapter.
        allow_other_base: go on when the checkpoint was trained on a base with another fingerprint.
        progress: as `qwenvl_dist.logs.progress`.

    Raises:
        UserError: checkpoint and base do not fit, `out` is taken, or the disk is too small.
        CheckFailed: the proof failed; nothing is published.
    """
    started = time.monotonic()
    fingerprint = base.fingerprint()
    if not allow_other_base:
        check_base(trained, base, fingerprint)
    plans = make_plan(base, trained, DTYPES[dtype] if dtype else None)
    files = plan_files(base, plans)
    size = sum(file.size for file in files)
    with partial_output(out, _key(trained, base, fingerprint, dtype)) as partial:
        kept = sorted(partial.done)
        missing = [file for file in files if file.name not in partial.done]
        _check_space(partial.model, missing)
        with _progress(progress, sum(file.size for file in missing), "merge") as advance:
            write_files(missing, partial.model, partial.mark_done, advance)
        write_side_files(base, trained.processor, partial.model, dtype, files)
        verified = None
        if verify:
            with _progress(progress, size, "verify") as advance:
                verified = verify_output(base, plans, partial.model, advance)
        forward = compare_forward(base, plans, partial.model) if verify_forward else None
        records = {record["name"]: record for lines in partial.done.values() for record in lines}
        report = MergeReport(
            tensors=len(plans),
            merged=sum(plan.merged for plan in plans.values()),
            bytes=size,
            seconds=round(time.monotonic() - started, 3),
            files_from_earlier_start=kept,
            base=fingerprint,
            verified=verified,
            forward=forward,
            modules=[_without_hash(records[name]) for name, plan in plans.items() if plan.merged],
            sha256={name: records[name]["sha256"] for name in plans},
        )
        text = json.dumps(asdict(report), indent=1)
        (partial.model / REPORT_FILE).write_text(text + "\n", encoding="utf-8")
    return report


def check_base(trained: Trained, base: BaseFolder, fingerprint: str | None = None) -> None:
    """Refuse a base that is not the one the checkpoint was trained on."""
    if trained.base_fingerprint and trained.base_fingerprint != (fingerprint or base.fingerprint()):
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


def _key(trained: Trained, base: BaseFolder, fingerprint: str, dtype: str | None) -> str:
    """Return a hash of all that decides the bytes of the output."""
    parts = {
        "arithmetic": ARITHMETIC,
        "base": [fingerprint, [file_state(file.path) for file in base.files.values()]],
        "trained": trained.fingerprint(),
        "dtype": dtype,
    }
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _without_hash(record: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in record.items() if key != "sha256"}


def _check_space(folder: Path, files: list[FilePlan]) -> None:
    size, free = sum(file.size for file in files), shutil.disk_usage(folder).free
    if free < size:
        raise UserError(
            f"{folder.parent.parent} has {free / 1e9:.1f} GB free, the merged model takes {size / 1e9:.1f} GB more"
        )


@contextlib.contextmanager
def _progress(
    progress: Callable[..., Any] | None, total: int, description: str
) -> Iterator[Callable[[int], None]]:
    """Yield a function that counts bytes; shown in MiB."""
    if progress is None:
        yield lambda count: None
        return
    done = shown = 0
    with progress(None, total >> 20, f"{description}, MiB") as bar:

        def advance(count: int) -> None:
            nonlocal done, shown
            done += count
            bar.advance((done >> 20) - shown)
            shown = done >> 20

        yield advance
