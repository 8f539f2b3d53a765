"""`download model`, `download dataset`, `download images`."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from qwenvl_dist.errors import UserError

if TYPE_CHECKING:
    from qwenvl_dist.download.repository import HubFile, Repository

SOURCES = ("hf", "modelscope")


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add `download` with its sub-commands."""
    download = subparsers.add_parser(
        "download", help="fetch a model, a dataset or a list of pictures: pinned, checked"
    )
    actions = download.add_subparsers(dest="action", required=True, metavar="model|dataset|images")

    model = actions.add_parser(
        "model",
        help="a model's folder from the Hugging Face Hub or ModelScope",
        description="Fetch what loading a model takes: config, tokenizer, processor, safetensors weights. Started "
        "again it fetches what is missing or damaged. OUT/download.json has the commit and the hash of each file.",
    )
    _add_repository(model, "such as Qwen/Qwen2-VL-2B-Instruct")
    model.set_defaults(run=run)

    dataset = actions.add_parser(
        "dataset",
        help="a dataset's files, or one split of it, from the Hugging Face Hub or ModelScope",
        description="Without --split: the files as they lie in the repository, checked like a model's. With it: one "
        "split, loaded by the SDK and written as a folder of `datasets`.",
    )
    _add_repository(dataset, "such as modelscope/coco_2014_caption")
    dataset.add_argument(
        "--files",
        action="append",
        metavar="PATTERN",
        help="only files that match, such as 'data/*.parquet'; repeatable",
    )
    dataset.add_argument(
        "--split", metavar="NAME", help="load this split with datasets, or with ModelScope's MsDataset"
    )
    dataset.add_argument("--subset", metavar="NAME", help="with --split: the dataset's configuration")
    dataset.add_argument("--limit", type=int, metavar="N", help="with --split: only the first N rows")
    dataset.set_defaults(run=run)

    images = actions.add_parser(
        "images",
        help="the pictures of a list of URLs",
        description="Fetch pictures, N at a time. Started again it fetches those that are not there yet. What could "
        "not be had is in OUT/failed.jsonl, and makes the exit code 1.",
    )
    images.add_argument(
        "--urls", required=True, type=Path, metavar="FILE", help="a URL a line, or a CSV file"
    )
    images.add_argument(
        "--column", metavar="NAME", help="the column of a CSV file's URLs (default: image_path)"
    )
    images.add_argument("--out", required=True, type=Path, metavar="DIR", help="the folder to write")
    images.add_argument(
        "--connections", type=int, default=16, metavar="N", help="pictures at a time (default: 16)"
    )
    images.add_argument("--retries", type=int, default=5, metavar="N", help="after a first try (default: 5)")
    images.add_argument(
        "--timeout-seconds",
        type=float,
        default=30,
        metavar="S",
        help="without a byte, before the next try (default: 30)",
    )
    images.add_argument("--limit", type=int, metavar="N", help="only the first N pictures")
    images.add_argument("--json", action="store_true", help="print the result as one JSON object")
    images.set_defaults(run=run)


def _add_repository(parser: argparse.ArgumentParser, example: str) -> None:
    parser.add_argument("name", metavar="ID", help=example)
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="the folder to write")
    parser.add_argument("--source", choices=SOURCES, default="hf", help="(default: hf)")
    parser.add_argument(
        "--revision", metavar="REV", help="branch, tag or commit (default: the hub's default branch)"
    )
    parser.add_argument(
        "--connections", type=int, default=8, metavar="N", help="files at a time (default: 8)"
    )
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object")


def run(args: argparse.Namespace) -> int:
    """Run the sub-command and return the exit code."""
    for option, least in (("connections", 1), ("retries", 0), ("limit", 1)):
        value = getattr(args, option, None)
        if value is not None and value < least:
            raise UserError(f"--{option} {value}: must be at least {least}")
    try:
        return {"model": _run_model, "dataset": _run_dataset, "images": _run_images}[args.action](args)
    except KeyboardInterrupt:
        print("error: interrupted; the same command goes on where it stopped", file=sys.stderr, flush=True)
        os._exit(1)  # Python's own end would wait for the SDKs' threads, which have gigabytes before them


def _run_model(args: argparse.Namespace) -> int:
    from qwenvl_dist.download.repository import select_model
    from qwenvl_dist.download.snapshot import open_repository

    repository, files = open_repository(args.source, args.name, "model", args.revision)
    return _snapshot(args, repository, select_model(files, args.name))


def _run_dataset(args: argparse.Namespace) -> int:
    from qwenvl_dist.download.repository import select
    from qwenvl_dist.download.snapshot import open_repository

    if args.split is not None:
        return _run_split(args)
    for option in ("subset", "limit"):
        if getattr(args, option) is not None:
            raise UserError(
                f"--{option} goes with --split; without it files are fetched, which --files narrows down"
            )
    repository, files = open_repository(args.source, args.name, "dataset", args.revision)
    return _snapshot(args, repository, select(files, args.files or ["*"], args.name))


def _snapshot(args: argparse.Namespace, repository: Repository, files: list[HubFile]) -> int:
    from qwenvl_dist.download.snapshot import snapshot
    from qwenvl_dist.logs import get_logger

    report = snapshot(repository, files, args.out, revision=args.revision, connections=args.connections)
    get_logger(__name__).info(
        "%s: %s at %s, %d files, %d of them fetched now, %.2f GiB, all checked, %.1f s",
        args.out, args.name, report.commit or "the hashes in download.json", report.files, report.fetched,
        report.bytes / 2**30, report.seconds,
    )  # fmt: skip
    if args.json:
        print(json.dumps(vars(report)))
    return 0


def _run_split(args: argparse.Namespace) -> int:
    from qwenvl_dist.download.dataset import fetch_split
    from qwenvl_dist.logs import get_logger

    if args.files is not None:
        raise UserError("--files does not go with --split: a split is loaded whole")
    started = time.monotonic()
    rows = fetch_split(
        args.source,
        args.name,
        args.out,
        split=args.split,
        subset=args.subset,
        revision=args.revision,
        limit=args.limit,
    )
    seconds = time.monotonic() - started
    get_logger(__name__).info(
        "%s: %d rows of %s, split %s, %.1f s", args.out, rows, args.name, args.split, seconds
    )
    if args.json:
        print(json.dumps({"rows": rows, "seconds": seconds}))
    return 0


def _run_images(args: argparse.Namespace) -> int:
    from qwenvl_dist.download.images import FAILED_NAME, PATIENCE, count_pictures, fetch_images
    from qwenvl_dist.download.url_list import UrlList
    from qwenvl_dist.logs import get_logger, progress

    if not args.timeout_seconds > 0:
        raise UserError(f"--timeout-seconds {args.timeout_seconds:g}: must be above 0")
    column = args.column or ("image_path" if args.urls.suffix.lower() == ".csv" else None)
    urls = UrlList(args.urls, column)
    log = get_logger(__name__)
    started = time.monotonic()
    try:
        total = count_pictures(urls, args.limit)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"--urls {args.urls}: cannot be read ({getattr(error, 'strerror', None) or error})"
        ) from None
    with progress(total=total, description="download") as bar:
        report = fetch_images(
            urls,
            args.out,
            connections=args.connections,
            policy=replace(PATIENCE, timeout_seconds=args.timeout_seconds, retries=args.retries),
            limit=args.limit,
            advance=bar.advance,
        )
    for failure in report.examples:
        log.warning("%s: %s", failure["url"], failure["reason"])
    if report.failed:
        log.warning("%d pictures failed, named in %s", report.failed, args.out / FAILED_NAME)
    seconds = time.monotonic() - started
    log.info(
        "%s: %d pictures fetched (%.1f MiB), %d were there, %d failed, %.1f s",
        args.out, report.fetched, report.bytes / 2**20, report.kept, report.failed, seconds,
    )  # fmt: skip
    if args.json:
        result = {key: value for key, value in vars(report).items() if key != "examples"}
        print(json.dumps({**result, "seconds": seconds}))
    return 1 if report.failed else 0
