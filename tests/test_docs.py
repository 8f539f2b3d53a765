"""Commands and keys in the documents are those of the program."""

import re
import shlex
from pathlib import Path

import pytest
import yaml

from qwenvl_dist.__main__ import build_parser
from qwenvl_dist.config import Recipe, make_recipe
from tests.ranks import ROOT

OTHER_PROGRAMS = ("git", "source", "hf", "vi", "squeue", "tail")
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted(ROOT.glob("*/README.md"))]


def commands(path: Path) -> list[str]:
    """Return the command lines of a document's bash blocks, continuation lines joined."""
    blocks = re.findall(r"```bash\n(.*?)```", path.read_text(), flags=re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]


ALL = [(path, line) for path in DOCUMENTS for line in commands(path)]


@pytest.mark.parametrize(("path", "line"), ALL, ids=[line[:60] for _, line in ALL])
def test_a_documented_command_is_understood(path: Path, line: str) -> None:
    words = shlex.split(line, comments=True)
    if words[0] == "bash":
        assert (ROOT / words[1]).is_file()
        return
    if words[0] in OTHER_PROGRAMS:
        return
    if words[0] == "sbatch":
        (script,) = [word for word in words if word.endswith(".sbatch")]
        words = ["qwenvl-dist", "train", *words[words.index(script) + 1 :]]
        assert script == "slurm/train.sbatch" and (ROOT / script).is_file()
    if words[0] == "accelerate":
        from accelerate.commands.launch import launch_command_parser

        launched = launch_command_parser().parse_args(words[2:])
        assert (ROOT / launched.config_file).is_file()
        assert (launched.module, launched.training_script) == (True, "qwenvl_dist")
        words = ["qwenvl-dist", *launched.training_script_args]
    assert words[0] == "qwenvl-dist"
    args = build_parser().parse_args(words[1:])
    if hasattr(args, "recipe"):
        assert (ROOT / args.recipe).is_file()


def test_every_recipe_key_is_documented() -> None:
    text = (ROOT / "docs" / "recipes.md").read_text()
    documented = set(re.findall(r"`([a-z_]+\.[a-z_]+)`", text))
    keys = set()
    for section, field in Recipe.model_fields.items():
        default = getattr(Recipe.model_fields[section], "default", None)
        assert default is not None, field
        keys |= {f"{section}.{key}" for key in type(default).model_fields}
    assert keys == documented


@pytest.mark.parametrize("path", DOCUMENTS, ids=[path.name for path in DOCUMENTS])
def test_recipes_in_documents_are_understood(path: Path) -> None:
    for block in re.findall(r"```yaml\n(.*?)```", path.read_text(), flags=re.DOTALL):
        tree = yaml.safe_load(block)
        if set(tree) <= set(Recipe.model_fields):
            data = {"validation": "shards", **tree.get("data", {})}
            tree["data"] = data if "mixture" in data else {"train": "shards", **data}
            make_recipe(tree, path.name)


def test_links_in_documents_lead_somewhere() -> None:
    for path in DOCUMENTS:
        for target in re.findall(r"\]\(([^)#:]+)\)", path.read_text()):
            assert (path.parent / target).exists(), f"{path.name} links to {target}"


def test_every_check_is_documented() -> None:
    from qwenvl_dist.preflight.registry import CHECKS

    rows = [
        line for line in (ROOT / "docs" / "preflight.md").read_text().splitlines() if line.startswith("|")
    ]
    first_lines = [(check.look.__doc__ or "").splitlines()[0] for check in CHECKS]
    wanted = [
        f"| {check.group} | `{check.name}`{'*' * check.cheap} | {line} |"
        for check, line in zip(CHECKS, first_lines, strict=True)
    ]
    assert rows[2:] == wanted
