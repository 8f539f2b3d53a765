"""qwenvl-dist evaluate: loss, captions and scores over packed shards, alone or on every rank of a launcher."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwenvl_dist.commands import generation_options as options
from qwenvl_dist.data.captions import DEFAULT_JOIN
from qwenvl_dist.errors import UserError

if TYPE_CHECKING:
    from qwenvl_dist.evaluate.captioner import Captioner
    from qwenvl_dist.evaluate.run import Load, ShardEvaluation

ROWS_SHOWN = 8
DEFAULT_SCORES = "Bleu,METEOR,ROUGE_L,CIDEr"
PATIENCE_SECONDS = 7 * 86400.0  # a rank may be done long before the others


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add `evaluate MODEL --shards DIR --out DIR`."""
    parser = subparsers.add_parser(
        "evaluate",
        help="loss, captions and their scores over packed shards",
        description="Measure a model on packed shards: mean token loss, captions, BLEU, METEOR, ROUGE-L and CIDEr, "
        "the share that equals the reference. Writes predictions.json (COCO results format), captions.json (each "
        "photo with its scores), evaluation.json and comparison.html; with --adapter and --merged also for the bare "
        "MODEL and for the merged one. Under `accelerate launch` the ranks share the samples.",
    )
    parser.add_argument("model", metavar="MODEL", help="a base, a merged model's folder, or a hub id")
    parser.add_argument(
        "--shards", metavar="DIR", required=True, help="a folder that `shards pack` wrote, or a URL"
    )
    parser.add_argument("--out", metavar="DIR", type=Path, required=True, help="folder for the results")
    parser.add_argument(
        "--merged", metavar="DIR", type=Path, help="a model merged from MODEL and an adapter, to compare with"
    )
    parser.add_argument(
        "--task",
        choices=("captions", "grounding"),
        default="captions",
        help="grounding: precision and recall of boxes at IoU 0.5 instead of caption scores (default: captions)",
    )
    parser.add_argument("--limit", metavar="N", type=int, help="only the first N samples")
    parser.add_argument("--workers", metavar="N", type=int, default=0, help="loader processes (default: 0)")
    parser.add_argument(
        "--max-length",
        metavar="N",
        type=int,
        default=8192,
        help="tokens a sample may have, for the loss (default: 8192)",
    )
    parser.add_argument(
        "--scores",
        metavar="LIST",
        default=DEFAULT_SCORES,
        help="which scores, all of which need Java, or `none` (default: %(default)s)",
    )
    parser.add_argument(
        "--scored",
        choices=("first", "whole"),
        default="first",
        help="of an answer: its first caption, or the whole text (default: first)",
    )
    parser.add_argument(
        "--caption-mark",
        metavar="TEXT",
        help="what separates captions (default: what --shards were packed with)",
    )
    options.add_to(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print a table of the first samples and the numbers, or one JSON object; rank 0 alone does."""
    options.check(args)
    kinds = _kinds(args.scores)
    if args.task == "grounding" and (args.scores, args.scored, args.caption_mark) != (
        DEFAULT_SCORES,
        "first",
        None,
    ):
        raise UserError(
            "--scores, --scored and --caption-mark are for captions; they do not go with --task grounding"
        )
    if args.caption_mark is not None and not args.caption_mark.strip():
        raise UserError("--caption-mark: is empty; name what separates captions, such as &&")
    from qwenvl_dist.data.index import Manifest
    from qwenvl_dist.distributed import host_ranks_or_one
    from qwenvl_dist.evaluate.results import PAGE
    from qwenvl_dist.evaluate.run import Scoring, ShardEvaluation, evaluate, models_to_compare

    manifest = Manifest.load(args.shards)  # its faults come up before the model is loaded
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"--out {args.out}: cannot be made ({error.strerror}); name another folder"
        ) from error
    if args.merged is not None and not (args.merged / "config.json").is_file():
        raise UserError(
            f"--merged {args.merged}: has no config.json; name a folder that `qwenvl-dist merge --out` wrote"
        )

    def load(model: str, adapter: Path | None) -> Captioner:
        return options.load(args, model, adapter, max_length=args.max_length, trained_as=args.merged)

    with host_ranks_or_one(PATIENCE_SECONDS) as host:
        work = ShardEvaluation(
            args.shards, limit=args.limit, batch_size=args.batch_size, workers=args.workers, host=host
        )
        if args.task == "grounding":
            return _run_grounding(args, work, load)
        numbers, rows = evaluate(
            work,
            models_to_compare(load, args.model, args.adapter, args.merged),
            args.out,
            title=_title(args),
            max_new_tokens=args.max_new_tokens,
            scoring=Scoring(kinds, args.scored, args.caption_mark or manifest.captions.mark or DEFAULT_JOIN),
        )
        if host.rank != 0:
            return 0
    options.print_table(rows[:ROWS_SHOWN], str(args.shards), args.json)
    for which in ("best", "worst"):
        for entry in numbers.get(which, ()):
            options.say(_extreme(which, entry), args.json)
    options.print_numbers(numbers, args.json)
    options.say(f"all of it, with pictures: {args.out / PAGE}", args.json)
    return 0


def _run_grounding(args: argparse.Namespace, work: ShardEvaluation, load: Load) -> int:
    from qwenvl_dist.evaluate.grounding import evaluate_grounding
    from qwenvl_dist.evaluate.results import PAGE
    from qwenvl_dist.evaluate.run import models_to_compare

    numbers = evaluate_grounding(
        work,
        models_to_compare(load, args.model, args.adapter, args.merged),
        args.out,
        title=_title(args),
        max_new_tokens=args.max_new_tokens,
    )
    if work.host.rank == 0:
        options.print_numbers(numbers, args.json)
        options.say(f"all of it, with pictures: {args.out / PAGE}", args.json)
    return 0


def _kinds(text: str) -> tuple[str, ...]:
    known = ("Bleu", "METEOR", "ROUGE_L", "CIDEr")
    kinds = () if text == "none" else tuple(part.strip() for part in text.split(","))
    for kind in kinds:
        if kind not in known:
            raise UserError(f"--scores {text}: {kind!r} is none of {', '.join(known)}; name some, or none")
    return kinds


def _title(args: argparse.Namespace) -> str:
    after = [str(each) for each in (args.adapter, args.merged) if each is not None]
    return f"{args.model}, before and after {' and '.join(after)}" if after else args.model


def _extreme(which: str, entry: dict[str, Any]) -> str:
    name = next(name for name in entry if name not in ("image_id", "key", "caption"))
    caption = "".join(c if c.isprintable() else " " for c in entry["caption"])
    return f"{which}: {entry['key']}  {name} {entry[name]:.3f}  {caption}"
