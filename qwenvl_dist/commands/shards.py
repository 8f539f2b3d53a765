"""`shards pack`, `shards index`, `shards encode`, `shards verify`, `shards show`."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from itertools import groupby
from pathlib import Path
from typing import Any

from qwenvl_dist.commands import grounding
from qwenvl_dist.data.captions import CAPTIONS_MODES, PackedCaptions
from qwenvl_dist.data.formats import (
    DEFAULT_JOIN,
    DEFAULT_PROMPT,
    READERS,
    PackInput,
    SampleReader,
    TextRules,
    is_learned,
)

EXAMPLES_SHOWN = 3
CAPTION_SOURCES, WITH_COLUMNS = ("coco", "csv"), ("csv", "huggingface")
ENCODE_PATIENCE_SECONDS = 7 * 86400.0  # a rank may be done long before the others


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add `shards` with its sub-commands."""
    shards = subparsers.add_parser("shards", help="pack, index, encode, verify and look at WebDataset shards")
    actions = shards.add_subparsers(dest="action", required=True, metavar="pack|index|encode|verify|show")

    pack = actions.add_parser("pack", help="pictures and captions -> shards, indexes and a manifest")
    pack.add_argument(
        "--source",
        required=True,
        choices=(*READERS, "grounding"),
        help="the form of the input: docs/data.md shows each",
    )
    pack.add_argument(
        "--captions",
        "--input",
        dest="input",
        metavar="FILE",
        help="the annotations, a file or URL",
    )
    pack.add_argument(
        "--images", metavar="DIR",
        help="where pictures lie that the input names by a relative path, a folder or URL (default: beside the input; "
        "coco and grounding need it)",
    )  # fmt: skip
    pack.add_argument(
        "--out", required=True, metavar="DIR", help="the folder to write, or a URL such as s3://"
    )
    _add_text_rules(pack)
    pack.add_argument(
        "--image-column",
        metavar="NAME",
        help="of csv (default: image_path) and huggingface (default: image, images, ...)",
    )
    pack.add_argument(
        "--text-column", metavar="NAME",
        help="of csv (default: caption) and huggingface (default: messages, conversations, caption, text, ...)",
    )  # fmt: skip
    pack.add_argument("--split", metavar="NAME", help="of huggingface, where there are several")
    pack.add_argument(
        "--samples-per-shard", type=int, default=1000, metavar="N", help="(default: %(default)s)"
    )
    grounding.add_to(pack)
    _add_workers(pack)
    pack.add_argument(
        "--skip-bad",
        action="store_true",
        help="leave out records and pictures that cannot be used, and name them in the manifest",
    )
    pack.add_argument(
        "--part", metavar="I/N",
        help="write only the shards I, I + N, ... and no manifest, so that N processes on any machines share the work; "
        "the same command without --part then checks all shards and adds the manifest",
    )  # fmt: skip
    pack.set_defaults(run=run)

    index = actions.add_parser(
        "index",
        help="index shards of another program in place, without packing again",
        description="Write an index beside each tar of a folder and a manifest, which is all that training needs. The "
        "tars stay as they are; their text (jpg + txt, jpg + json) becomes messages when it is read.",
    )
    index.add_argument("folder", metavar="DIR", help="the folder that holds the .tar files")
    index.add_argument(
        "--text-member", metavar="EXTENSION", help="which member is the text (default: txt, else json)"
    )
    index.add_argument(
        "--caption-field", metavar="NAME",
        help="of json, a caption or a list of them (default: caption, captions or text; or the json's conversation)",
    )  # fmt: skip
    _add_text_rules(index)
    _add_workers(index)
    index.add_argument(
        "--skip-bad",
        action="store_true",
        help="leave samples that cannot be used out of the index, and name them",
    )
    index.set_defaults(run=run)

    encode = actions.add_parser(
        "encode",
        help="pictures -> features of a frozen vision tower (one process, or under accelerate launch)",
        description="Write shards that hold the vision features of a base instead of the pictures, for training that "
        "leaves the tower as it is. Started again it goes on where it stopped.",
    )
    encode.add_argument("shards", metavar="SHARDS", help="a folder that `shards pack` wrote, or a URL")
    encode.add_argument("--base", required=True, help="folder in hub layout, or hub id")
    encode.add_argument("--out", required=True, type=Path, metavar="DIR", help="the folder to write")
    encode.add_argument(
        "--image-size", default="280", metavar="SIDE|MIN,MAX", help="as in data.image_size (default: 280)"
    )
    encode.add_argument(
        "--resize", choices=("fast", "exact"), default="fast", help="as in data.resize (default: fast)"
    )
    encode.add_argument(
        "--dtype", choices=("bfloat16", "float32"), default="bfloat16",
        help="what the tower computes in; features are bfloat16 (default: bfloat16)",
    )  # fmt: skip
    encode.add_argument(
        "--batch-size", type=int, default=16, metavar="N", help="samples at a time (default: 16)"
    )
    encode.set_defaults(run=run)

    verify = actions.add_parser("verify", help="check every byte; exit code 1 if anything is bad")
    verify.add_argument("folder", metavar="DIR", help="a folder or URL")
    _add_workers(verify)
    verify.add_argument("--json", action="store_true", help="print the result as one JSON object")
    verify.set_defaults(run=run)

    show = actions.add_parser("show", help="print what is inside, a line a sample")
    show.add_argument("folder", metavar="DIR", help="a folder or URL")
    show.add_argument("--limit", type=int, metavar="N", help="stop after N samples")
    show.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the sub-command and return the exit code."""
    return {
        "pack": _run_pack,
        "index": _run_index,
        "encode": _run_encode,
        "verify": _run_verify,
        "show": _run_show,
    }[args.action](args)


def _run_pack(args: argparse.Namespace) -> int:
    """Pack, and say what was done."""
    from qwenvl_dist.data.pack import pack
    from qwenvl_dist.data.parallel import available_cores
    from qwenvl_dist.logs import get_logger, progress

    log = get_logger(__name__)
    started = time.monotonic()
    part = _parse_part(args.part)
    if args.source == "grounding":
        reader, packing = grounding.read(args)
        captions = PackedCaptions()  # boxes are learned as they are
    else:
        grounding.refuse(args)
        packing, captions = _packing(args), PackedCaptions(args.join, args.captions_mode)
        reader = open_input(args)
        len(reader)  # looks at everything
        lost = reader.rules.line_breaks_lost
        if lost and args.source not in CAPTION_SOURCES:
            log.warning(
                "%d answers have line breaks inside, which become spaces as in captions; --keep-white-space keeps them",
                lost,
            )
    with progress(total=len(reader) if part is None else None, description="pack") as bar:
        report = pack(
            reader,
            args.out,
            samples_per_shard=args.samples_per_shard,
            workers=available_cores() if args.workers is None else args.workers,
            skip_bad=args.skip_bad,
            packing=packing,
            captions=captions,
            part=part,
            advance=bar.advance,
        )
    for bad in report.skipped[:EXAMPLES_SHOWN]:
        log.warning("left out %s: %s", bad.key, bad.reason)
    if len(report.skipped) > EXAMPLES_SHOWN and part is None:
        log.warning("left out %d samples, all named in %s", len(report.skipped), f"{args.out}/manifest.json")
    num_shards = len(report.manifest.shards)
    if part is not None:
        log.info(
            "%s: part %s, %d shards, %d of them kept from an earlier run, %.1f s",
            args.out, args.part, num_shards, report.shards_kept, time.monotonic() - started,
        )  # fmt: skip
        return 0
    if not report.shards_written:
        log.info(
            "%s: nothing to do, all %d shards are there (%d samples)",
            args.out,
            num_shards,
            report.manifest.samples,
        )
        return 0
    kept = f", {report.shards_kept} kept from an earlier run" if report.shards_kept else ""
    seconds = time.monotonic() - started
    log.info(
        "%s: %d samples in %d shards%s, %.1f s", args.out, report.manifest.samples, num_shards, kept, seconds
    )
    return 0


def open_input(args: argparse.Namespace) -> SampleReader:
    """Return the reader of what `shards pack` is to read."""
    from qwenvl_dist.errors import UserError

    for option, value, sources in (
        ("--image-column", args.image_column, WITH_COLUMNS),
        ("--text-column", args.text_column, WITH_COLUMNS),
        ("--split", args.split, ("huggingface",)),
    ):
        if value is not None and args.source not in sources:
            raise UserError(f"{option} is for --source {' and '.join(sources)}; drop it")
    rules = TextRules(args.prompt, args.join, args.keep_white_space)
    return READERS[args.source](
        PackInput(
            args.input, args.images, rules, args.skip_bad,
            split=args.split, image_column=args.image_column, text_column=args.text_column,
        )
    )  # fmt: skip


def _packing(args: argparse.Namespace) -> dict[str, Any]:
    """Return what the manifest notes of the command, for people."""
    notes = {"source": args.source, "prompt": args.prompt, "join": args.join}
    return {**notes, "keep_white_space": True} if args.keep_white_space else notes


def _parse_part(text: str | None) -> tuple[int, int] | None:
    from qwenvl_dist.errors import UserError

    if text is None:
        return None
    number, _, count = text.partition("/")
    if not (number.isdecimal() and count.isdecimal() and int(number) < int(count)):
        raise UserError(f"--part {text}: must be I/N with I from 0 to N - 1, such as 0/4")
    return int(number), int(count)


def _run_index(args: argparse.Namespace) -> int:
    """Index in place, and say what was done."""
    from qwenvl_dist.data.parallel import available_cores
    from qwenvl_dist.data.reindex import reindex
    from qwenvl_dist.logs import get_logger, progress

    log = get_logger(__name__)
    started = time.monotonic()
    with progress(total=None, description="index") as bar:
        report = reindex(
            args.folder,
            member=args.text_member,
            caption_field=args.caption_field,
            rules=TextRules(args.prompt, args.join, args.keep_white_space),
            mode=args.captions_mode,
            workers=available_cores() if args.workers is None else args.workers,
            skip_bad=args.skip_bad,
            advance=bar.advance,
        )
    for bad in report.skipped[:EXAMPLES_SHOWN]:
        log.warning("left out %s: %s", bad.key, bad.reason)
    if len(report.skipped) > EXAMPLES_SHOWN:
        log.warning("left out %d samples, all named in %s/manifest.json", len(report.skipped), args.folder)
    manifest = report.manifest
    what = "indexed" if report.is_new else "nothing to do, it is indexed so:"
    log.info(
        "%s: %s %d samples in %d shards, %.1f s",
        args.folder, what, manifest.samples, len(manifest.shards), time.monotonic() - started,
    )  # fmt: skip
    return 0


def _run_encode(args: argparse.Namespace) -> int:
    """Encode on this rank's share, and say what was done."""
    from qwenvl_dist.commands.generation_options import parse_image_size
    from qwenvl_dist.distributed import host_ranks
    from qwenvl_dist.errors import UserError
    from qwenvl_dist.logs import get_logger

    if args.batch_size < 1:
        raise UserError(f"--batch-size {args.batch_size}: must be at least 1")
    image_size = parse_image_size(args.image_size)
    log = get_logger(__name__)
    started = time.monotonic()
    with host_ranks(ENCODE_PATIENCE_SECONDS) as host:
        from qwenvl_dist.training.encode import encode

        report = encode(
            args.shards, args.base, args.out, host,
            image_size=image_size, resize=args.resize, dtype=args.dtype, batch_size=args.batch_size,
        )  # fmt: skip
    for bad in report.bad[:EXAMPLES_SHOWN] if host.rank == 0 else ():
        log.warning("no features of %s: %s", bad.key, bad.reason)
    if report.bad:
        log.info(
            "%d bad samples, carried without features and named in %s/manifest.json",
            len(report.bad),
            args.out,
        )
    log.info(
        "%s: %d samples in %d shards, %d of them kept from an earlier start, %.1f s",
        args.out, report.manifest.samples, len(report.manifest.shards), report.shards_kept, time.monotonic() - started,
    )  # fmt: skip
    return 0


def _run_verify(args: argparse.Namespace) -> int:
    """Verify, name what is bad, a line for each kind of fault in a shard."""
    from qwenvl_dist.data.index import Manifest
    from qwenvl_dist.data.parallel import available_cores
    from qwenvl_dist.data.verify import verify
    from qwenvl_dist.errors import UserError
    from qwenvl_dist.logs import get_logger, progress

    log = get_logger(__name__)
    try:
        total = Manifest.load(args.folder).samples
    except UserError:
        total = None  # verify says what is wrong with it
    workers = available_cores() if args.workers is None else args.workers
    with progress(total=total, description="verify") as bar:
        report = verify(args.folder, workers, bar.advance)
    for (shard, reason), faults in groupby(report.bad, key=lambda fault: (fault.shard, fault.reason)):
        keys = [fault.key for fault in faults if fault.key is not None]
        log.warning("%s: %s%s", shard, reason, _shorten_keys(keys))
    summary = f"{args.folder}: {report.samples} samples in {report.shards} shards"
    log.info("%s, %s", summary, f"{len(report.bad)} faults" if report.bad else "all good")
    if args.json:
        print(json.dumps(report.to_json()))
    return 1 if report.bad else 0


def _run_show(args: argparse.Namespace) -> int:
    """Print shard, key, picture sizes, bytes and the text of each sample, as wide as the terminal."""
    try:
        _show(args.folder, args.limit)
        sys.stdout.flush()
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _show(place: str, limit: int | None) -> None:
    from rich.cells import cell_len, set_cell_size

    from qwenvl_dist.data.formats import parse_sample_json
    from qwenvl_dist.data.index import BadSample, Manifest, ShardReader, read_shard_index
    from qwenvl_dist.data.storage import open_storage

    width = shutil.get_terminal_size((160, 24)).columns
    shown = 0
    storage = open_storage(place)
    for entry in Manifest.load(storage).shards:
        if limit is not None and shown >= limit:
            return
        index = read_shard_index(storage, entry.name)
        reader = ShardReader(storage.open(entry.name), index)
        for i, key in enumerate(index.keys[: None if limit is None else limit - shown]):
            try:
                text = _text_of(parse_sample_json(reader.read_member(i, "json")))
            except BadSample as error:
                text = f"BAD: {error.reason}"
            except ValueError as error:
                text = f"BAD: json: {error}"
            sizes = " ".join(f"{w}x{h}" for w, h in index.images(i).tolist()) or "no image"
            num_bytes = sum(member.size for member in index.members(i).values())
            line = f"{entry.name}  {key}  {sizes:>9}  {num_bytes:>8}  {text}"
            line = "".join(character if character.isprintable() else " " for character in line)
            print(line if cell_len(line) <= width else set_cell_size(line, width - 1) + "…")
            shown += 1
        reader.close()


def _text_of(record: dict) -> str:
    """Return the assistant's text that is learned."""
    answers = filter(is_learned, record["messages"])
    return " ".join(
        part["text"] for message in answers for part in message["content"] if part["type"] == "text"
    )


def _shorten_keys(keys: list[str]) -> str:
    if not keys:
        return ""
    more = f" and {len(keys) - EXAMPLES_SHOWN} more" if len(keys) > EXAMPLES_SHOWN else ""
    return f": {', '.join(keys[:EXAMPLES_SHOWN])}{more}"


def _add_text_rules(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--prompt",
        default=DEFAULT_PROMPT,
        help="the user's text where the input has none (default: %(default)r)",
    )
    parser.add_argument(
        "--join", default=DEFAULT_JOIN, help="between a picture's captions (default: %(default)r)"
    )
    parser.add_argument(
        "--captions-mode", choices=CAPTIONS_MODES,
        help="how a recipe that does not say it itself (data.captions_mode) learns a picture's captions: as one text, "
        "each by itself, or one drawn an epoch (default: join); the manifest alone says it, and can be made to say "
        "another by the same command again",
    )  # fmt: skip
    parser.add_argument(
        "--keep-white-space", action="store_true",
        help="keep line breaks and runs of spaces inside answers, which else become one space as in captions",
    )  # fmt: skip


def _add_workers(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--workers", type=int, metavar="N", help="processes (default: one a core)")
