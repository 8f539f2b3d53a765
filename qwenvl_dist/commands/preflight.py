"""`qwenvl-dist preflight`: look for what goes wrong an hour into a run, in a minute before it."""

from __future__ import annotations

import argparse
import json
import sys
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qwenvl_dist.preflight.checks import Finding

DEFAULT_TIMEOUT_SECONDS = 120
_COLORS = {"ok": "32", "warn": "33", "fail": "31", "skipped": "2"}


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add `preflight RECIPE [key.path=value ...]`."""
    parser = subparsers.add_parser(
        "preflight",
        help="check environment, storage, data, model, network, a step and a checkpoint before a run",
        description="Check everything that a run needs, in about a minute: alone, or on every rank under the launcher "
        "that will start the run. Each check says ok, warn or fail, what it saw and what helps. "
        "Exit code 1 when one fails.",
    )
    parser.add_argument("recipe", help="YAML file; see launch/recipes/")
    parser.add_argument(
        "overrides", nargs="*", metavar="key.path=value", help="set single keys of the recipe"
    )
    parser.add_argument(
        "--only", action="append", default=[], metavar="NAME",
        help="make this check or group of checks, with what they need; may be given several times",
    )  # fmt: skip
    parser.add_argument(
        "--skip", action="append", default=[], metavar="NAME", help="leave out this check or group of checks"
    )
    parser.add_argument(
        "--shards",
        type=int,
        default=2,
        metavar="N",
        help="shards that each rank verifies (default: %(default)s)",
    )
    parser.add_argument(
        "--timeout", type=int, default=DEFAULT_TIMEOUT_SECONDS, metavar="SECONDS",
        help="after which a rank that does not answer is named (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--list", action="store_true", help="name all checks and what they look for")
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object on the last line of stdout"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Make the checks; exit code 1 when one fails."""
    from qwenvl_dist.config import load_recipe
    from qwenvl_dist.errors import UserError

    if args.shards < 0:
        raise UserError(f"--shards {args.shards}: must be at least 0")
    if args.timeout < 10:
        raise UserError(f"--timeout {args.timeout}: must be at least 10 seconds")
    recipe = load_recipe(args.recipe, args.overrides)
    if args.list:
        from qwenvl_dist.preflight.registry import CHECKS

        for check in CHECKS:
            print(f"{check.group:12} {check.name:22} {(check.look.__doc__ or '').splitlines()[0]}")
        return 0
    train = recipe.train.model_copy(update={"timeout_seconds": args.timeout})
    recipe = recipe.model_copy(update={"train": train})

    from qwenvl_dist.preflight.registry import choose

    checks = choose(args.only, args.skip)
    from qwenvl_dist.guard import Guard, Launchers
    from qwenvl_dist.preflight.joined import on_all_ranks

    guard = Guard()
    guard.watch(Launchers().gone)
    began = time.perf_counter()
    findings: list[Finding] = []
    with guard:
        try:
            for finding in on_all_ranks(recipe, checks, args.shards, guard):
                findings.append(finding)
                if not args.json and _is_main():
                    print(line(finding, sys.stdout.isatty()), flush=True)
        finally:
            seconds = time.perf_counter() - began
            failed = [finding.name for finding in findings if str(finding.status) == "fail"]
            if _is_main():
                _end(args.json, findings, failed, seconds, complete=len(findings) == len(checks))
    return int(bool(failed))


def _is_main() -> bool:
    from qwenvl_dist.logs import rank

    return rank() == 0


def line(finding: Finding, colored: bool) -> str:
    """Return a finding for a person: status, name, value, and the remedy below."""
    status = str(finding.status)
    word = f"\033[{_COLORS[status]}m{status:7}\033[0m" if colored else f"{status:7}"
    text = f"{word} {finding.name:22} {finding.value}"
    return text + (f"\n{'':8}{'':22} -> {finding.remedy}" if finding.remedy else "")


def _end(as_json: bool, findings: list[Finding], failed: list[str], seconds: float, complete: bool) -> None:
    if as_json:
        report = {
            "ok": complete and not failed,
            "complete": complete,
            "failed": failed,
            "seconds": round(seconds, 2),
            "checks": [finding.to_json() for finding in findings],
        }
        print(json.dumps(report, ensure_ascii=False), flush=True)
        return
    counts = {status: sum(str(f.status) == status for f in findings) for status in _COLORS}
    told = [f"{count} {status}" for status, count in counts.items() if count]
    end = "" if complete else "; broken off"
    made = f"{len(findings)} checks in {seconds:.1f} s"
    print(f"\n{': '.join(filter(None, [made, ', '.join(told)]))}{end}", flush=True)
