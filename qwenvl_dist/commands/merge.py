"""`qwenvl-dist merge`: a checkpoint and its base become full weights, or a peft adapter, or both."""

import argparse
import json
import sys
from pathlib import Path

READ_AHEAD_BYTES = 1 << 30  # of the base, into memory that the system takes back when it needs it


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Describe the command line."""
    parser = subparsers.add_parser(
        "merge",
        help="merge a checkpoint into its base",
        description="Merge a checkpoint into its base, in float32 with one rounding, row block by row block.",
    )
    parser.add_argument(
        "checkpoint",
        type=Path,
        metavar="CHECKPOINT",
        help="a step folder, a run folder (its best, else newest checkpoint) or a peft adapter folder",
    )
    parser.add_argument(
        "--base", required=True, help="folder in hub layout, or hub id, of the model it was trained on"
    )
    parser.add_argument("--out", type=Path, help="folder for the merged model; must not exist or be empty")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), help="of the output; default: the base's")
    parser.add_argument(
        "--adapter-out", type=Path, metavar="DIR", help="also write the adapter as a peft folder"
    )
    parser.add_argument("--verify", action="store_true", help="read the output again and prove it")
    parser.add_argument(
        "--verify-forward",
        action="store_true",
        help="compare the output's logits with those of base + adapter and of the base, reading weights as it goes",
    )
    parser.add_argument(
        "--allow-other-base",
        action="store_true",
        help="go on although BASE is not what the checkpoint was trained on",
    )
    parser.add_argument(
        "--json", action="store_true", help="print the result as JSON on the last line of stdout"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Merge, and say what was done."""
    import resource

    from qwenvl_dist.errors import UserError
    from qwenvl_dist.logs import progress
    from qwenvl_dist.model.base_folder import BaseFolder
    from qwenvl_dist.model.load import resolve_base

    if args.out is None and (args.verify or args.verify_forward):
        raise UserError("--verify and --verify-forward read the merged model: give --out DIR")
    if args.out is None and args.adapter_out is None:
        raise UserError("nothing to write: give --out DIR, --adapter-out DIR or both")
    base = BaseFolder(resolve_base(args.base))
    if args.out is not None:
        base.read_ahead(READ_AHEAD_BYTES)  # while torch is imported, which takes seconds

    from qwenvl_dist.merge.merge import check_base, merge, write_adapter
    from qwenvl_dist.merge.trained import find_checkpoint, read_trained

    folder = find_checkpoint(args.checkpoint)
    trained = read_trained(folder)
    if not args.allow_other_base:
        check_base(trained, base)
    result: dict = {"checkpoint": str(folder)}
    if args.out is not None:
        report = merge(
            trained,
            base,
            args.out,
            dtype=args.dtype,
            verify=args.verify,
            verify_forward=args.verify_forward,
            allow_other_base=True,  # checked above
            progress=progress,
        )
        result |= {
            "tensors": report.tensors,
            "merged": report.merged,
            "bytes": report.bytes,
            "seconds": report.seconds,
            "files_from_earlier_start": len(report.files_from_earlier_start),
        }
        if report.verified is not None:
            result["verified"] = vars(report.verified)
        if report.forward is not None:
            result["forward"] = {prompt: vars(each) for prompt, each in report.forward.items()}
    if args.adapter_out is not None:
        write_adapter(trained, args.adapter_out)
        result["adapter"] = str(args.adapter_out)
    result["peak_rss_gib"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 3)

    if args.json:
        print(json.dumps(result))
        return 0
    if args.out is not None:
        if result["files_from_earlier_start"]:
            print(
                f"went on after {result['files_from_earlier_start']} files of an earlier start",
                file=sys.stderr,
            )
        print(
            f"{args.out}: {result['merged']} of {result['tensors']} tensors merged from {folder}, "
            f"{result['bytes'] / 1e9:.2f} GB in {result['seconds']:.1f} s, "
            f"peak memory {result['peak_rss_gib']:.2f} GiB",
            file=sys.stderr,
        )
        if "verified" in result:
            counts = result["verified"]
            print(
                f"verified: {counts['byte_equal']} tensors byte-equal to the base, "
                f"{counts['recomputed']} merged ones equal to a second computation, "
                f"{counts['converted']} converted",
                file=sys.stderr,
            )
        for prompt, each in result.get("forward", {}).items():
            print(
                f"{prompt} prompt: the adapter moves the base's logits by {each['change']:.2g}, the merged model's "
                f"differ from base + adapter by {each['error']:.2g}, from the base by {each['control']:.2g}",
                file=sys.stderr,
            )
    if args.adapter_out is not None:
        print(
            f"{args.adapter_out}: {len(trained.deltas)} modules' adapter for peft, float32", file=sys.stderr
        )
    return 0
