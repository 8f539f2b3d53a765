"""Each rank's slices, read by itself, against transformers' own loading of the whole model."""

import json
import os
import shutil
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qwenvl_dist.model.names import LM_HEAD, runtime_name
from tests.model.test_forward import rewrite, split_in_two, weights
from tests.ranks import run_ranks

pytestmark = pytest.mark.dist
TIMEOUT = 200
WORDS = 20011  # many and odd: most of the bytes, and no world size divides them
STATED = "model.embed_tokens.weight"


@pytest.fixture(scope="module")
def wide_base(scenes_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The scenes' base with a large vocabulary."""
    folder = shutil.copytree(scenes_base, tmp_path_factory.mktemp("wide") / "base")
    tensors = weights(folder)
    hidden = tensors[STATED].shape[1]
    tensors[STATED] = torch.randn(WORDS, hidden, generator=torch.Generator().manual_seed(0)).bfloat16()
    rewrite(folder, tensors)
    edit_config(folder, vocab_size=WORDS)
    return folder


@pytest.fixture
def base(wide_base: Path, tmp_path: Path) -> Path:
    return shutil.copytree(wide_base, tmp_path / "base")


def edit_config(folder: Path, **values: Any) -> None:
    """Set keys wherever the config holds them, in its text part too."""
    config = json.loads((folder / "config.json").read_text())
    for section in (config, config.get("text_config", {})):
        section.update({key: value for key, value in values.items() if key in section})
    (folder / "config.json").write_text(json.dumps(config))


def with_newer_names(folder: Path) -> None:
    rewrite(folder, {runtime_name(name): tensor for name, tensor in weights(folder).items()})


def with_own_head(folder: Path) -> None:
    tensors = weights(folder)
    rewrite(folder, {**tensors, LM_HEAD: tensors[STATED].flip(0).contiguous()})
    edit_config(folder, tie_word_embeddings=False)


def with_the_tied_head_written_too(folder: Path) -> None:
    tensors = weights(folder)
    rewrite(folder, {**tensors, LM_HEAD: tensors[STATED].clone()})


def with_float32_files(folder: Path) -> None:
    rewrite(folder, {name: tensor.float() for name, tensor in weights(folder).items()})


KINDS = {
    "tied": lambda folder: None,
    "newer-names": with_newer_names,
    "own-head": with_own_head,
    "split": split_in_two,
    "head-twice": with_the_tied_head_written_too,
    "float32-files": with_float32_files,
}


def start_zero3(dtype: str) -> Any:
    """Join the ranks and register ZeRO-3 as accelerate does; the returned object keeps it registered."""
    import deepspeed
    from transformers.integrations import HfDeepSpeedConfig

    deepspeed.init_distributed("gloo", timeout=timedelta(seconds=TIMEOUT), verbose=False)
    bf16 = {"enabled": dtype == "bfloat16"}
    return HfDeepSpeedConfig(
        {"train_micro_batch_size_per_gpu": 1, "bf16": bf16, "zero_optimization": {"stage": 3}}
    )


def bytes_read() -> int:
    """Bytes that this process has read by system calls, from the page cache too."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("rchar")))


def run_comparison(folders: list[str], dtype: str) -> None:
    """Load each base whole and in slices; every tensor, buffers too, must have the same bits."""
    import deepspeed
    import torch.distributed as dist

    from qwenvl_dist.config import ModelConfig
    from qwenvl_dist.model.load import load_model

    config = ModelConfig.model_validate({"dtype": dtype, "attention": "sdpa"})
    whole = {folder: load_model(Path(folder), config) for folder in folders}
    registered = start_zero3(dtype)
    world = int(os.environ["WORLD_SIZE"])
    for folder, stock in whole.items():
        before = bytes_read()
        ours: Any = load_model(Path(folder), config)
        read = bytes_read() - before
        stored = sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))
        assert read < stored / world + 200_000, f"{read} of {stored} bytes on one of {world} ranks"
        names = dict(stock.named_parameters())
        assert names.keys() == dict(ours.named_parameters()).keys()
        assert (ours.lm_head.weight is ours.model.get_input_embeddings().weight) == (LM_HEAD not in names)
        for name, parameter in ours.named_parameters():
            assert parameter.numel() == 0 and parameter.ds_tensor.numel() == -(-parameter.ds_numel // world)
            with deepspeed.zero.GatheredParameters([parameter]):
                assert parameter.dtype == names[name].dtype
                assert torch.equal(parameter, names[name]), name
        buffers = dict(stock.named_buffers())
        for name, buffer in ours.named_buffers():
            assert torch.equal(buffer, buffers.pop(name)), name
        assert not buffers and not ours.training
    del registered
    dist.destroy_process_group()


@pytest.mark.parametrize(("world", "dtype"), [(2, "bfloat16"), (3, "float32")])
def test_slices_have_the_bits_of_stock_loading(
    wide_base: Path, tmp_path: Path, world: int, dtype: str
) -> None:
    folders = []
    for name, change in KINDS.items():
        folder = shutil.copytree(wide_base, tmp_path / name)
        change(folder)
        folders.append(str(folder))
    run_ranks(
        "tests.model.test_zero3_load:run_comparison", world, timeout=TIMEOUT, folders=folders, dtype=dtype
    )


def run_refusals(faults: dict[str, str]) -> None:
    from qwenvl_dist.config import ModelConfig
    from qwenvl_dist.errors import UserError
    from qwenvl_dist.model.load import load_model

    registered = start_zero3("bfloat16")
    for folder, expected in faults.items():
        try:
            load_model(Path(folder), ModelConfig())
        except UserError as error:
            assert str(error).startswith(f"model.base = {folder}: ") and "\n" not in str(error)
            assert expected in str(error), str(error)
        else:
            raise AssertionError(f"{folder} was loaded")
    del registered


def test_files_that_do_not_hold_the_model_are_refused(scenes_base: Path, tmp_path: Path) -> None:
    layer = "model.layers.1.mlp.up_proj.weight"
    tensors = load_file(scenes_base / "model.safetensors")
    changes = {
        "missing": {**tensors, layer: None},
        "mismatched": {**tensors, layer: tensors[layer][:-1].contiguous()},
        "unexpected": {**tensors, layer.replace("1", "2"): torch.zeros(2, 2)},
        "another-head": {**tensors, LM_HEAD: tensors[STATED].flip(0).contiguous()},
        "integers": {**tensors, layer: tensors[layer].to(torch.int16)},
    }
    where = "model.language_model.layers"
    expected = {
        "missing": f"1 missing keys in its weights, first {where}.1.mlp.up_proj.weight",
        "mismatched": f"1 mismatched keys in its weights, first {where}.1.mlp.up_proj.weight",
        "unexpected": f"1 unexpected keys in its weights, first {where}.2.mlp.up_proj.weight",
        "another-head": "config.json ties lm_head.weight to the embedding",
        "integers": "a tensor of type I16",
        "cut": "it was cut off",
    }
    for name in expected:
        folder = shutil.copytree(scenes_base, tmp_path / name)
        file = folder / "model.safetensors"
        if name in changes:
            save_file({key: value for key, value in changes[name].items() if value is not None}, file)
        else:
            file.write_bytes(file.read_bytes()[:-1])
    faults = {str(tmp_path / name): text for name, text in expected.items()}
    run_ranks("tests.model.test_zero3_load:run_refusals", 1, timeout=TIMEOUT, faults=faults)
