"""One split of a dataset through the SDK that knows its format, as a folder of Hugging Face's `datasets`."""

from __future__ import annotations

import importlib
import shutil
from pathlib import Path
from typing import Any

from qwenvl_dist.download.modelscope import sdk_module
from qwenvl_dist.download.waiting import heard
from qwenvl_dist.errors import CheckFailed, UserError

UNFINISHED_SUFFIX = ".unfinished"


def fetch_split(
    source: str,
    name: str,
    out: Path,
    *,
    split: str,
    subset: str | None = None,
    revision: str | None = None,
    limit: int | None = None,
) -> int:
    """Load a split and write it to `out`; return how many rows it has.

    Args:
        source: `hf` (`datasets.load_dataset`) or `modelscope` (`MsDataset.load`). Both keep what they fetched in their
            own caches, and go on from there when started again.
        name: the dataset's id.
        out: a folder that does not exist yet. It appears whole.
        split: such as `train`.
        subset: the dataset's configuration, where it has several.
        revision: branch, tag or commit.
        limit: only the first rows.
    """
    if out.exists():
        raise UserError(f"{out}: is there already; --out must be a new folder")
    dataset = (
        _load_hub(name, split, subset, revision)
        if source == "hf"
        else _load_modelscope(name, split, subset, revision)
    )
    if limit is not None:
        dataset = dataset.select(range(min(limit, len(dataset))))
    unfinished = out.with_name(out.name + UNFINISHED_SUFFIX)
    try:
        shutil.rmtree(unfinished, ignore_errors=True)
        out.parent.mkdir(parents=True, exist_ok=True)
        dataset.save_to_disk(unfinished)
        unfinished.rename(out)
    except OSError as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise UserError(
            f"{out}: cannot be written ({error.strerror or error}); free some room or choose another --out"
        ) from None
    return len(dataset)


def _load_hub(name: str, split: str, subset: str | None, revision: str | None) -> Any:
    try:
        datasets = importlib.import_module("datasets")
    except ImportError as error:
        raise UserError(
            f"--split needs the datasets package ({error}): pip install 'qwenvl-dist[datasets]'"
        ) from None
    return _run(name, lambda: datasets.load_dataset(name, subset, split=split, revision=revision))


def _load_modelscope(name: str, split: str, subset: str | None, revision: str | None) -> Any:
    dataset_class = sdk_module("modelscope.msdatasets").MsDataset
    version = {} if revision is None else {"version": revision}
    loaded = _run(name, lambda: dataset_class.load(name, subset_name=subset, split=split, **version))
    return loaded.to_hf_dataset()


def _run(name: str, action: Any) -> Any:
    try:
        return heard(action)
    except Exception as error:  # the SDKs raise whatever a layer below them does
        text = " ".join(str(error).split())[:300] or type(error).__name__
        if isinstance(error, (ValueError, FileNotFoundError)):  # no such dataset, subset or split
            raise UserError(f"{name}: {text}") from None
        raise CheckFailed(f"{name}: {text}") from None
