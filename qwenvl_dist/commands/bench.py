"""`qwenvl-dist bench`: how fast the parts are, each beside the usual way of doing it, measured in the same run."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add `bench` with its sub-commands, one function each."""
    bench = subparsers.add_parser(
        "bench",
        help="measure throughput beside the usual ways",
        description="Measure a part of the toolkit and the usual way beside it, in short rounds that take turns.",
    )
    kinds = bench.add_subparsers(dest="kind", required=True, metavar="KIND")
    _add_data(kinds)
    _add_step(kinds)
    _add_merge(kinds)


def print_result(report: dict, as_json: bool) -> None:
    """Print the report as the last line of stdout, when asked for."""
    sys.stderr.flush()
    if as_json:
        print(json.dumps(report))


def _require_at_least_one(args: argparse.Namespace, *names: str) -> None:
    """Raise UserError for an option below 1; one that was left out is None."""
    from qwenvl_dist.errors import UserError

    for name in names:
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} {value}: must be at least 1")


def _add_data(kinds: argparse._SubParsersAction) -> None:
    data = kinds.add_parser(
        "data",
        help="images per second, from JPEG bytes to batches in the training process",
        description="Images per second of each stage of the data stream, and of the hub's processors, of a plain "
        "webdataset pipeline and of Dataset.map on the same samples.",
    )
    data.add_argument("--shards", type=Path, required=True, metavar="DIR", help="a folder of `shards pack`")
    data.add_argument("--base", required=True, help="folder in hub layout, or hub id: its processor is used")
    data.add_argument("--workers", type=int, metavar="N", help="loader processes (default: one a core)")
    data.add_argument("--image-size", default="280", metavar="SIDE|MIN,MAX", help="as in data.image_size")
    data.add_argument("--batch-size", type=int, default=4, metavar="N", help="samples a batch (default: 4)")
    data.add_argument(
        "--seconds", type=float, default=60, metavar="S", help="for all paths together (default: 60)"
    )
    data.add_argument("--rounds", type=int, default=5, metavar="N", help="turns of each path (default: 5)")
    data.add_argument(
        "--resize", choices=("fast", "exact"), default="fast", help="as in data.resize (default: fast)"
    )
    data.add_argument("--json", action="store_true", help="print one JSON object on the last line of stdout")
    data.set_defaults(run=run_data)


def run_data(args: argparse.Namespace) -> int:
    """Measure the data stream and its rivals."""
    from qwenvl_dist.commands.generation_options import parse_image_size
    from qwenvl_dist.errors import UserError

    _require_at_least_one(args, "workers", "batch_size", "rounds")
    if not args.seconds > 0:
        raise UserError(f"--seconds {args.seconds:g}: must be above 0")
    image_size = parse_image_size(args.image_size)

    from qwenvl_dist.bench.data import measure, table
    from qwenvl_dist.data.parallel import available_cores

    report = measure(
        args.shards,
        args.base,
        workers=args.workers or available_cores(),
        image_size=image_size,
        batch_size=args.batch_size,
        seconds=args.seconds,
        rounds=args.rounds,
        exact_resize=args.resize == "exact",
    )
    table(report)
    print_result(report, args.json)
    return 0


def _add_step(kinds: argparse._SubParsersAction) -> None:
    step = kinds.add_parser(
        "step",
        help="samples per second of a training step, and its share of the machine's matrix rate",
        description="The training step of `train` under its DeepSpeed engine, on real batches, beside the matrix "
        "products of the same shapes and, with --compare, beside a transformers Trainer on the same samples.",
    )
    step.add_argument("--base", required=True, help="folder in hub layout, or hub id")
    step.add_argument(
        "--photos", type=int, default=64, metavar="N", help="pictures to generate (default: 64)"
    )
    step.add_argument("--batch-size", type=int, default=4, metavar="N", help="samples a step (default: 4)")
    step.add_argument("--steps", type=int, default=8, metavar="N", help="steps to measure (default: 8)")
    step.add_argument(
        "--shards", type=Path, metavar="DIR", help="take these samples instead of generated ones"
    )
    step.add_argument(
        "--features",
        metavar="DIR",
        help="train on these features, which `shards encode` made of --shards (that --compare trains on)",
    )
    step.add_argument("--image-size", type=int, default=280, metavar="SIDE", help="pixels (default: 280)")
    step.add_argument("--compare", choices=("trainer",), help="alternate with a transformers Trainer")
    step.add_argument(
        "--captions",
        choices=("join", "each"),
        default="join",
        help="as in data.captions_mode; each is measured beside separate samples (default: join)",
    )
    step.add_argument(
        "--checkpointing",
        default="all,every_2,none",
        metavar="MODES",
        help="measure the memory of a step under each of these as model.checkpointing "
        "(default: all,every_2,none)",
    )
    step.add_argument("--json", action="store_true", help="print one JSON object on the last line of stdout")
    step.add_argument(
        "overrides",
        nargs="*",
        metavar="key.path=value",
        help="other recipe keys, such as model.fast_path=false",
    )
    step.set_defaults(run=run_step)


def run_step(args: argparse.Namespace) -> int:
    """Measure the training step."""
    import tempfile

    from qwenvl_dist.config import make_recipe
    from qwenvl_dist.errors import UserError

    _require_at_least_one(args, "photos", "batch_size", "steps")
    if args.captions == "each" and args.compare:
        raise UserError("--compare trainer takes joined captions; leave out --captions each, or --compare")
    if args.features and (args.captions == "each" or (args.compare and not args.shards)):
        raise UserError(
            "--features takes joined captions, and with --compare the --shards that the features were made of"
        )
    modes = [mode for mode in args.checkpointing.split(",") if mode]
    with tempfile.TemporaryDirectory() as scratch:
        shards = args.shards or Path(scratch) / "shards"
        recipe = make_recipe(
            {
                "model": {"base": args.base},
                "data": {
                    "train": str(args.features or shards),
                    "image_size": args.image_size,
                    "micro_batch_size": args.batch_size,
                    "captions_mode": args.captions,
                },
                "train": {"grad_accum_steps": 1, "epochs": 1_000_000, "output_dir": scratch},
                "tracking": {"mode": "disabled"},
            },
            "bench step",
            args.overrides,
        )
        for mode in modes:
            make_recipe({"model": {"checkpointing": mode}, "data": {"train": "-"}}, "--checkpointing")

        from qwenvl_dist.bench import step
        from qwenvl_dist.startup import StartUp

        startup = StartUp()
        startup.mark("imports")
        if args.shards is None and args.features is None:
            step.write_pictures(Path(scratch), args.photos, args.image_size)
            startup.leave_out()
        report = step.measure(recipe, args.steps, args.compare == "trainer", modes, startup, args.shards)
    for key, value in report.items():
        print(f"{key:32} {value}", file=sys.stderr)
    print_result(report, args.json)
    return 0


def _add_merge(kinds: argparse._SubParsersAction) -> None:
    merge = kinds.add_parser(
        "merge",
        help="seconds and memory of a merge, beside `cp -r` of the base and peft's way",
        description="Copy the base, merge into it, and merge the way peft does, in turns, each in a process of its own "
        "that begins with the base out of the page cache.",
    )
    merge.add_argument("--base", required=True, help="folder in hub layout, or hub id")
    merge.add_argument(
        "--checkpoint", type=Path, metavar="DIR", help="as merge takes it (default: a random adapter)"
    )
    merge.add_argument("--rank", type=int, default=8, metavar="N", help="of the random adapter (default: 8)")
    merge.add_argument("--rounds", type=int, default=1, metavar="N", help="turns of each way (default: 1)")
    merge.add_argument(
        "--without-peft", action="store_true", help="leave out peft's way, which holds the model in memory"
    )
    merge.add_argument(
        "--scratch", type=Path, metavar="DIR", help="where to write, as large as BASE (default: beside BASE)"
    )
    merge.add_argument("--json", action="store_true", help="print one JSON object on the last line of stdout")
    merge.set_defaults(run=run_merge)


def run_merge(args: argparse.Namespace) -> int:
    """Measure a merge and its rivals."""
    from qwenvl_dist.errors import UserError
    from qwenvl_dist.model.load import resolve_base

    _require_at_least_one(args, "rank", "rounds")
    base = resolve_base(args.base)
    scratch = args.scratch or base.resolve().parent
    if not scratch.is_dir():
        raise UserError(f"--scratch {scratch}: is not a folder; name one on the disk to measure")

    from qwenvl_dist.bench.merge import measure, table

    report = measure(base, args.checkpoint, args.rank, args.rounds, not args.without_peft, scratch)
    print(table(report), file=sys.stderr)
    print_result(report, args.json)
    return 0
