"""Each example in docs/data.md packs as it stands there, and the shards train."""

import re
import shlex
from pathlib import Path

import pytest

from qwenvl_dist.__main__ import main
from qwenvl_dist.data.formats import READERS
from qwenvl_dist.data.index import Manifest
from tests.made_shards import jpeg
from tests.ranks import ROOT, run_ranks
from tests.training.runs import TIMEOUT, ledger, losses, read_lines, write_recipe

pytestmark = pytest.mark.dist

STEPS = 2


def examples() -> list[tuple[str, str, list[list[str]]]]:
    """Return language and content of each example, and the commands below it."""
    text = (ROOT / "docs" / "data.md").read_text()
    part = text[text.index("## What can be packed") : text.index("### To add a format")]
    found = []
    for section in part.split("\n### ")[1:]:
        (language, content), *rest = re.findall(r"```(\w+)\n(.*?)```", section, flags=re.DOTALL)
        commands = [
            shlex.split(line) for block, lines in rest if block == "bash" for line in lines.splitlines()
        ]
        assert content.count("\n") <= 7, section
        found.append((language, content, commands))
    return found


def input_of(words: list[str]) -> Path:
    return Path(next(words[n + 1] for n, word in enumerate(words) if word in ("--input", "--captions")))


def test_every_example_packs_and_trains(
    tmp_path: Path, scenes_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("photos").mkdir()
    for number, name in enumerate("ab"):
        Path("photos", f"{name}.jpg").write_bytes(jpeg(number))
    packed: dict[str, Path] = {}
    for language, content, commands in examples():
        if language == "python":
            exec(content, {})
        else:
            input_of(commands[0]).write_text(content)
        for program, *words in commands:
            assert program == "qwenvl-dist" and main(words) == 0
            if words[1] == "pack":
                out = Path(words[words.index("--out") + 1])
                packed[out.name] = out.absolute()
                source = words[words.index("--source") + 1]
                assert Manifest.load(out).packing["source"] == source in READERS
            elif words[1] == "index":
                packed["wds"] = Path(words[2]).absolute()
    assert len(packed) == len(READERS) + 3  # two are read from two places, one is indexed

    recipes = [
        write_recipe(
            tmp_path / f"{name}.yaml", scenes_base, shards, tmp_path / "runs" / name,
            train={"max_steps": STEPS, "epochs": 50, "grad_accum_steps": 1, "checkpoint_every_steps": STEPS},
            data={"workers": 0},
        )
        for name, shards in packed.items()
    ]  # fmt: skip
    run_ranks("tests.training.runs:run_several", 1, timeout=TIMEOUT, recipes=[str(path) for path in recipes])
    for name, shards in packed.items():
        run = tmp_path / "runs" / name
        assert len(losses(run)) == STEPS, name
        keys = [key for step in ledger(run).values() for key in step]
        assert len(keys) == STEPS * 2 and len(set(keys)) == min(4, Manifest.load(shards).samples), name
        assert read_lines(run / "bad_samples.jsonl") == [], name
