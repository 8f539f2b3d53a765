import os
import subprocess
import sys
from pathlib import Path

import pytest

from qwenvl_dist.config import Recipe, load_recipe
from qwenvl_dist.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
RECIPES = sorted((ROOT / "launch" / "recipes").glob("*.yaml"))
DATA = "data: {train: shards}\n"


def write(folder: Path, text: str | bytes) -> Path:
    path = folder / "recipe.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def load(folder: Path, text: str, *overrides: str) -> Recipe:
    return load_recipe(write(folder, text), overrides)


def error_of(folder: Path, text: str | bytes, *overrides: str) -> str:
    """The one line that a faulty recipe is answered with."""
    with pytest.raises(UserError) as caught:
        load_recipe(write(folder, text), overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message


# Each line names the key, the value, the rule and the remedy.
FAULTS = {
    "lora: {rank: eight}": 'lora.rank = "eight": must be a whole number; or leave rank out for 8',
    "lora: {rank: 0}": "lora.rank = 0: must be at least 1; or leave rank out for 8",
    "lora: {rank: 2.5}": "lora.rank = 2.5: must be a whole number; or leave rank out for 8",
    "lora: {rank: true}": "lora.rank = true: must be a whole number; or leave rank out for 8",
    "lora: {rank: '8'}": 'lora.rank = "8": must be a whole number; or leave rank out for 8',
    "lora: {dropout: 1.0}": "lora.dropout = 1.0: must be below 1; or leave dropout out for 0.1",
    "lora: {target_modules: q_proj}": 'lora.target_modules = "q_proj": must be a list, such as [a, b]; or leave',
    "lora: {rank_pattern: {q_proj: 0}}": "lora.rank_pattern.q_proj = 0: must be at least 1",
    "lora: {rank_pattern: {'q_(proj': 2}}": "holds 'q_(proj', which is no regular expression",
    "lora: {alpha_pattern: [8]}": "lora.alpha_pattern = [8]: ",
    "lora: {use_dora: 1}": "lora.use_dora = 1: must be true or false",
    "lora: {lora_bias: 1}": "lora.lora_bias = 1: must be true or false",
    "lora: {lora_bias: true, use_dora: true}": "lora_bias and use_dora are both true, which peft does not combine",
    "lora: {modules_to_save: merger}": 'lora.modules_to_save = "merger": must be a list, such as [a, b]',
    "optim: {lora_plus_ratio: 0}": "optim.lora_plus_ratio = 0: must be above 0",
    "lora: {target_modules: []}": "lora.target_modules = []: must name at least one module; to train without",
    "train: {global_batch_size: 8, grad_accum_steps: 2}": "global_batch_size is 8 and grad_accum_steps is 2: accumul",
    "train: {grad_accum_steps: null}": "grad_accum_steps is null and global_batch_size too; set one of them",
    "train: {global_batch_size: 0}": "train.global_batch_size = 0: must be at least 1",
    "lora: 3": "lora = 3: must be a section, with keys and values below it",
    "model: x": 'model = "x": must be a section, with keys and values below it',
    "model: {dtype: bflot16}": "model.dtype = \"bflot16\": must be 'bfloat16' or 'float32'; did you mean 'bfloat16'?",
    "model: {train: [visoin]}": "did you mean 'vision'?",
    "model: {train: vision}": 'model.train = "vision": must be a list, such as [a, b]; or leave train out for []',
    "model: {checkpointing: some}": 'model.checkpointing = "some": must be none, all, every_k or every_<n> such as',
    "optim: {learning_rate: -1}": "optim.learning_rate = -1: must be above 0; or leave learning_rate out for 0.0001",
    "optim: {learning_rate: fast}": 'optim.learning_rate = "fast": must be a number; or leave',
    "optim: {learning_rate: .nan}": "optim.learning_rate = NaN: must be a finite number; or leave",
    "optim: {learning_rate: .inf}": "optim.learning_rate = Infinity: must be a finite number; or leave",
    "optim: {betas: [0.9]}": "optim.betas.1 = [0.9]: must have one more value; or leave betas out",
    "optim: {schedule: cosin}": "must be 'cosine', 'linear' or 'constant'; did you mean 'cosine'?",
    "train: {max_steps: 0}": "train.max_steps = 0: must be at least 1; or leave max_steps out",
    "train: {resume: 3}": "train.resume = 3: must be text, in quotes if it looks like something else; or leave",
    "train: {seed: -1}": "train.seed = -1: must be at least 0; or leave seed out for 0",
    "tracking: {mode: off}": "tracking.mode = false: must be 'offline', 'local', 'online' or 'disabled'; or leave",
}  # fmt: skip
DATA_FAULTS = {
    "image_size: 100": "data.image_size = 100: must be a positive multiple of 28 pixels (one visual token), such as 84",
    "image_size: 0": "data.image_size = 0: must be a positive multiple of 28 pixels",
    "image_size: big": 'data.image_size = "big": must be the side of a square in pixels, such as 280, or a section',
    "image_size: null": "data.image_size = null: must be the side of a square in pixels, such as 280, or a section",
    "image_size: {min_pixels: 1}": "data.image_size.min_pixels = 1: must be at least 784; or leave min_pixels out",
    "image_size: {min_pixels: 9000, max_pixels: 1000}": "min_pixels 9000 is above max_pixels 1000; swap or widen them",
    "micro_batch_size: 0": "data.micro_batch_size = 0: must be at least 1; or leave micro_batch_size out for 4",
    "bad_sample_budget: 2": "data.bad_sample_budget = 2: must be at most 1; or leave bad_sample_budget out for 0.001",
    "ledger: 3": "data.ledger = 3: must be true or false; or leave ledger out for false",
    "train: 7": "data.train = 7: must be text",
    "mixture: [{train: a/x}]": "x has neither epochs nor weight: say one of them",
    "mixture: [{train: a/x, epochs: 1, weight: 2}]": "x has both epochs = 1 and weight = 2: say one of them",
    "mixture: [{train: a/x, epochs: 1}, {train: b/x/, epochs: 1}]": "2 entries are named x; give each",
    "mixture: [{train: a, epochs: 1}, {train: b, weight: 1}]": "b has a weight and a has epochs: all entries must",
    "mixture: [{train: a, epochs: 0}]": "data.mixture.0.epochs = 0: must be above 0",
    "mixture: [{train: a, epoch: 1}]": "unknown key 'data.mixture.0.epoch'; did you mean 'epochs'?",
    "mixture: [{epochs: 1, name: a}]": 'data.mixture.0 = {"epochs": 1, "name": "a"}: names no shards: give the entry',
    "mixture: [{train: 7, epochs: 1}]": "data.mixture.0.train = 7: must be text",
    "mixture: [{train: 'http://host/a b/', epochs: 1}]": 'data.mixture.0.name = "a b": must be letters, digits',
    "mixture: [{train: a, epochs: 1}]": "data.train is shards and data.mixture has 1 entries: a run takes one",
    "train: ''": "data.train is missing: name a folder made by `qwenvl-dist shards pack`",
}  # fmt: skip


@pytest.mark.parametrize("text", FAULTS)
def test_wrong_value_is_one_line_with_key_value_rule_and_remedy(tmp_path: Path, text: str) -> None:
    message = error_of(tmp_path, DATA + text + "\n")
    assert message.startswith(f"recipe {tmp_path / 'recipe.yaml'}: ") and FAULTS[text] in message


@pytest.mark.parametrize("text", DATA_FAULTS)
def test_wrong_data_value_is_one_line_with_key_value_rule_and_remedy(tmp_path: Path, text: str) -> None:
    assert DATA_FAULTS[text] in error_of(tmp_path, f"data:\n  train: shards\n  {text}\n".replace(
        "  train: shards\n  train:", "  train:"))  # fmt: skip


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("dta: {train: x}", "unknown key 'dta'; did you mean 'data'?"),
        (DATA + "lora: {rnak: 8}", "unknown key 'lora.rnak'; did you mean 'rank'?"),
        (DATA + "zzz: 1", "unknown key 'zzz'; known keys: model, lora, data, optim, train, eval, deepspeed, tracking"),
        ("data: {train: x, image_size: {min_pixel: 1}}", "'data.image_size.min_pixel'; did you mean 'min_pixels'?"),
        ("data: {train: x, int: 1}", "unknown key 'data.int'; "),
        ("data: {train: x, 1: 2}", "unknown key 'data.1'; known keys: train, mixture, validation, image_size"),
        (DATA + "lora: {rank: 0, rnak: 8}", "unknown key 'lora.rnak'; did you mean 'rank'?"),
    ],
)  # fmt: skip
def test_unknown_key_is_answered_with_the_near_match_or_the_known_keys(
    tmp_path: Path, text: str, expected: str
) -> None:
    assert expected in error_of(tmp_path, text)


def test_further_faults_are_counted(tmp_path: Path) -> None:
    message = error_of(tmp_path, DATA + "lora: {rank: 0, alpha: -1}\noptim: {learning_rate: 0}\n")
    assert "lora.rank = 0: " in message and message.endswith("(and 2 more)")


def test_contradictory_sections_are_refused_with_both_sides_named(tmp_path: Path) -> None:
    nothing = error_of(tmp_path, DATA + "lora: null\n")
    assert "nothing would train: lora is null and model.train is empty; name parts of vision" in nothing
    ratio = error_of(tmp_path, DATA + "lora: null\nmodel: {train: [merger]}\noptim: {lora_plus_ratio: 16}\n")
    assert "optim.lora_plus_ratio is 16, but lora is null" in ratio and "drop the ratio" in ratio
    flex = error_of(
        tmp_path, "data: {train: shards, captions_mode: join}\nmodel: {attention: flex_attention}\n"
    )
    assert "flex_attention is for the mask of data.captions_mode = each" in flex and "auto" in flex
    both = error_of(tmp_path, DATA + "model: {train: [language]}\n")
    assert "model.train names `language` while lora is on" in both and "write `lora: null`" in both


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("data: {train: x\nlora: 3\n", "line 2: not valid YAML: expected ',' or '}'"),
        ("data:\n\ttrain: x\n", "line 2: not valid YAML: found character"),
        ("data: {train: x}\nlora: *b\n", "line 2: not valid YAML: found undefined alias 'b'"),
        ("data: {train: x}\n---\ndata: {train: y}\n", "line 2: not valid YAML: "),
        ("data: {[1]: 2}\n", "line 1: not valid YAML: [1] cannot be a key; correct that line"),
        ("data: !!python/object:os.system x\n", "line 1: not valid YAML: could not determine a constructor"),
        (b"data: \x00\n", "not valid YAML: unacceptable character #x0000"),
        (b"data: \xff\n", "byte 6 is not UTF-8; save the file as UTF-8"),
        ("- 1\n", "holds a list; it must be a mapping with sections such as data:"),
    ],
)
def test_bad_yaml_is_one_line_with_the_line_number(tmp_path: Path, text: str | bytes, expected: str) -> None:
    assert expected in error_of(tmp_path, text)


@pytest.mark.parametrize(
    ("text", "line", "key"),
    [
        ("data: {train: x}\noptim: {}\ndata: {train: y}\n", 3, "data"),
        ("data:\n  train: x\n  seed: 1\n  train: y\n", 4, "train"),
    ],
)
def test_duplicate_key_is_refused_on_any_level(tmp_path: Path, text: str, line: int, key: str) -> None:
    assert f"line {line}: not valid YAML: key {key!r} stands twice" in error_of(tmp_path, text)


@pytest.mark.parametrize("override", ["optim.learning_rate 2", "=3", "optim.=3", ".x=3", "a b=3", "x"])
def test_override_without_key_path_and_value_is_refused(tmp_path: Path, override: str) -> None:
    expected = f"override {override!r}: must look like key.path=value, for instance optim.learning_rate=2e-4"
    assert error_of(tmp_path, DATA, override) == expected


MIXED = "data: {mixture: [{train: a, epochs: 1}, {train: b, epochs: 2}]}\nlora: {rank: 4}\n"


def test_an_entry_of_a_list_is_set_by_its_number(tmp_path: Path) -> None:
    recipe = load(tmp_path, MIXED, "data.mixture.1.epochs=0.5", "data.mixture.0={train: c, epochs: 3}")
    assert [(each.name, each.epochs) for each in recipe.data.mixture] == [("c", 3.0), ("b", 0.5)]


@pytest.mark.parametrize(
    ("text", "override", "expected"),
    [
        (DATA, "lora.rnak=3", "unknown key 'lora.rnak'; did you mean 'rank'?"),
        (DATA, "lora.rank=", 'lora.rank = "": must be a whole number'),
        (DATA, "lora.target_modules=[q_proj", "override 'lora.target_modules=[q_proj' line 1: not valid YAML"),
        (DATA, "lora.rank.x=3", 'lora.rank = {"x": 3}: must be a whole number'),
        ("data: {train: x, image_size: 280}", "data.image_size.min_pixels=3136", "holds the value 280, not a section"),
        (MIXED, "data.mixture.0.epochs=0", "data.mixture.0.epochs = 0: must be above 0"),
        (MIXED, "data.mixture.2.epochs=1", "there is no entry 2, the recipe's list has entries 0 to 1"),
        (DATA, "data.mixture.0.epochs=1", "there is no entry 0, the recipe's list has no entries"),
        (MIXED, "data.mixture.a.epochs=1", ", not a section"),
        (MIXED, "lora.0=1", "'lora' holds the value {'rank': 4}, not a list"),
    ],
)  # fmt: skip
def test_override_is_checked_like_the_file(tmp_path: Path, text: str, override: str, expected: str) -> None:
    assert expected in error_of(tmp_path, text, override)


def test_unreadable_recipe_is_one_line(tmp_path: Path) -> None:
    for path in (tmp_path / "none.yaml", tmp_path):
        with pytest.raises(UserError, match=r"cannot be read \(.*\); give the path of a YAML file"):
            load_recipe(path)


def test_exponent_without_a_dot_is_a_float_in_files_and_overrides(tmp_path: Path) -> None:
    assert load(tmp_path, DATA + "optim: {learning_rate: 1e-4}\n").optim.learning_rate == 1e-4
    for text, value in (("2e-4", 2e-4), ("1E-3", 1e-3), ("1.5e-5", 1.5e-5), ("1e+0", 1.0), (".5e-3", 5e-4)):
        assert load(tmp_path, DATA, f"optim.learning_rate={text}").optim.learning_rate == value


def test_override_values_are_yaml_and_later_ones_win(tmp_path: Path) -> None:
    recipe = load(
        tmp_path,
        DATA + "train: {max_steps: 5}\n",
        "train.max_steps=null",
        "lora.target_modules=[q_proj, v_proj]",
        "data.train=a=b",
        "data.image_size.min_pixels=3136",
        "data.seed=1",
        "data.seed=2",
        "tracking.name=run 7",
    )
    assert recipe.train.max_steps is None and recipe.lora is not None and recipe.data.seed == 2
    assert recipe.lora.target_modules == ("q_proj", "v_proj")
    assert (recipe.data.train, recipe.tracking.name) == ("a=b", "run 7")
    assert not isinstance(recipe.data.image_size, int) and recipe.data.image_size.min_pixels == 3136


def test_null_section_takes_defaults(tmp_path: Path) -> None:
    recipe = load(tmp_path, DATA + "optim:\ntrain:\nmodel:\n")
    assert recipe == load(tmp_path, DATA)


def test_null_lora_means_no_adapter(tmp_path: Path) -> None:
    recipe = load(tmp_path, DATA + "lora: null\nmodel: {train: [language, merger]}\n")
    assert recipe.lora is None and recipe.model.train == ("language", "merger")


def test_defaults_are_the_articles_run(tmp_path: Path) -> None:
    recipe = load(tmp_path, DATA)
    assert recipe.lora is not None
    assert (recipe.lora.rank, recipe.lora.alpha, recipe.lora.dropout) == (8, 16, 0.1)
    assert recipe.lora.target_modules == (
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    )  # fmt: skip
    assert recipe.to_dict()["data"] == {
        "train": "shards", "mixture": [], "validation": None, "image_size": 280, "resize": "fast",
            "captions_mode": None, "caption_mark": None, "max_length": 8192,
        "over_length": "cut", "max_visual_tokens": None, "micro_batch_visual_tokens": None,
        "micro_batch_size": 4, "workers": 2, "seed": 0, "shuffle_window": 64,
        "length_grouping": True, "ledger": False, "bad_sample_budget": 0.001,
        "cache_dir": None, "cache_gib": 100.0, "read_timeout_seconds": 60.0, "read_retries": 5,
    }  # fmt: skip
    optim, train = recipe.optim, recipe.train
    assert (optim.learning_rate, optim.warmup_ratio, optim.schedule) == (1e-4, 0.03, "cosine")
    assert (optim.weight_decay, optim.max_grad_norm) == (0.0, 1.0)
    assert (train.epochs, train.max_steps, train.grad_accum_steps) == (10, None, 4)
    assert (train.log_every_steps, train.eval_every_steps, train.checkpoint_every_steps) == (10, 500, 500)
    assert (train.keep_checkpoints, train.resume, train.seed) == (3, "auto", 0)
    assert recipe.deepspeed.config is None
    assert (recipe.tracking.trackers, recipe.tracking.mode) == (("swanlab",), "offline")
    assert recipe.tracking.project == "Qwen2-VL-finetune"


@pytest.mark.parametrize(
    ("checkpointing", "every"), [("none", 0), ("all", 1), ("every_k", 5), ("every_3", 3), ("every_1", 1)]
)
def test_checkpointing_names_how_often_a_layer_is_recomputed(
    tmp_path: Path, checkpointing: str, every: int
) -> None:
    recipe = load(tmp_path, DATA + f"model: {{checkpointing: {checkpointing}, checkpointing_k: 5}}\n")
    assert recipe.model.checkpoint_every == every


def test_accumulation_follows_from_the_global_batch_and_the_world(tmp_path: Path) -> None:
    assert load(tmp_path, DATA).grad_accum_steps(7) == 4
    recipe = load(tmp_path, DATA + "train: {grad_accum_steps: 2}\n", "train.grad_accum_steps=null",
                  "train.global_batch_size=48", "data.micro_batch_size=2")  # fmt: skip
    assert [recipe.grad_accum_steps(world) for world in (1, 2, 3, 24)] == [24, 12, 8, 1]
    for world, remedy in {5: "5 x 2 = 10; take 40 or 50, or", 25: "25 x 2 = 50; take 50, or"}.items():
        with pytest.raises(UserError, match=r"global_batch_size = 48: must be a multiple of ranks") as caught:
            recipe.grad_accum_steps(world)
        assert remedy in str(caught.value)


def test_resolved_recipe_reads_back_as_the_same_recipe(tmp_path: Path) -> None:
    for text in (
        DATA,
        DATA + "lora: null\nmodel: {train: [vision]}\noptim: {learning_rate: 1e-7, betas: [0.9, 0.95]}\n",
        DATA + "train: {global_batch_size: 96}\n",
        "data: {train: 'öl: x', image_size: {min_pixels: 3136, max_pixels: 50176}}\ntracking: {name: '1e-4'}\n",
    ):
        recipe = load(tmp_path, text)
        assert load(tmp_path, recipe.to_yaml()) == recipe


def test_recipes_are_shipped() -> None:
    assert RECIPES


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_shipped_recipe_loads_and_its_resolved_form_is_the_same(path: Path, tmp_path: Path) -> None:
    recipe = load_recipe(path)
    assert load(tmp_path, recipe.to_yaml()) == recipe


# --- the command line, in processes of its own ---


def run(*arguments: str, code: str | None = None) -> subprocess.CompletedProcess[str]:
    program = ["-c", code] if code else ["-m", "qwenvl_dist"]
    variables = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, *program, *arguments], cwd=ROOT, env=variables, capture_output=True, text=True, timeout=60
    )  # fmt: skip


HELP = """
import contextlib, io, sys
import qwenvl_dist.config
from qwenvl_dist.__main__ import COMMANDS, main
heavy = {"torch", "transformers", "accelerate", "deepspeed", "peft", "webdataset"}
assert not heavy & sys.modules.keys(), f"config imports {heavy & sys.modules.keys()}"
for words in [[], *([name] for name in COMMANDS), *(["shards", a] for a in ("pack", "verify", "show"))]:
    out = io.StringIO()
    try:
        with contextlib.redirect_stdout(out):
            main([*words, "--help"])
    except SystemExit as end:
        assert end.code == 0, (words, end.code)
    assert out.getvalue().startswith("usage: "), words
    assert not heavy & sys.modules.keys(), f"{words} --help imports {heavy & sys.modules.keys()}"
"""


def test_config_and_the_help_of_every_command_import_nothing_heavy() -> None:
    ended = run(code=HELP)
    assert ended.returncode == 0, ended.stderr


def test_dry_run_prints_the_resolved_recipe_and_imports_nothing_heavy(tmp_path: Path) -> None:
    recipe = write(tmp_path, DATA)
    ended = run("train", str(recipe), "optim.learning_rate=2e-4", "--dry-run")
    assert (ended.returncode, ended.stderr) == (0, "")
    assert load(tmp_path, ended.stdout) == load(tmp_path, DATA, "optim.learning_rate=2e-4")
    code = (
        "import sys; from qwenvl_dist.__main__ import main\n"
        "main(sys.argv[1:]); assert 'torch' not in sys.modules"
    )
    assert run("train", str(write(tmp_path, DATA)), "--dry-run", code=code).returncode == 0


@pytest.mark.parametrize(
    ("text", "overrides", "expected"),
    [
        (DATA, ["lora.rnak=8"], "unknown key 'lora.rnak'; did you mean 'rank'?"),
        (DATA + "lora: {rank: 0}\n", [], "lora.rank = 0: must be at least 1"),
        ("data: {train: x\n", [], "not valid YAML"),
        (None, [], "cannot be read"),
    ],
)
def test_wrong_recipe_ends_with_code_2_and_one_line(
    tmp_path: Path, text: str | None, overrides: list[str], expected: str
) -> None:
    recipe = tmp_path / "none.yaml" if text is None else write(tmp_path, text)
    ended = run("train", str(recipe), *overrides, "--dry-run")
    assert ended.returncode == 2 and not ended.stdout
    assert ended.stderr.startswith("error: recipe ") and expected in ended.stderr
    assert len(ended.stderr.splitlines()) == 1


def test_overrides_may_stand_behind_an_option(tmp_path: Path) -> None:
    ended = run("train", str(write(tmp_path, DATA)), "--dry-run", "train.epochs=3", "lora.rank=4")
    assert ended.returncode == 0, ended.stderr
    assert "epochs: 3" in ended.stdout and "rank: 4" in ended.stdout
    assert run("train", str(write(tmp_path, DATA)), "--dry-runn").returncode == 2


def test_wrong_command_line_ends_with_code_2_and_no_traceback() -> None:
    for arguments in ((), ("train",), ("no-such-command",), ("train", "x.yaml", "--no-such-option")):
        ended = run(*arguments)
        assert ended.returncode == 2 and "Traceback" not in ended.stderr, arguments
