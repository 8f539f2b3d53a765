"""Every kind of adapter that peft makes and the merge takes: the merged weights are those of peft's own merge."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from qwenvl_dist.errors import CheckFailed, UserError
from qwenvl_dist.merge import apply_lora
from qwenvl_dist.merge.adapter import LoraConfig
from qwenvl_dist.merge.merge import merge, write_adapter
from qwenvl_dist.merge.trained import read_trained
from qwenvl_dist.model.base_folder import BaseFolder
from tests.merge.tiny import TARGETS, load, logits, make_base

LAYER = "model.language_model.layers"
PATTERNS = {
    "rank_pattern": {"q_proj": 2, "layers.1.self_attn.[kv]_proj": 5, "proj": 3},
    "alpha_pattern": {rf"^{LAYER}.0.*up_proj": 3, "visual.blocks.0.mlp.fc1": 40},
}
VARIANTS: dict[str, dict[str, Any]] = {
    "rslora": {"use_rslora": True},
    "patterns": PATTERNS,
    "rslora-patterns": {"use_rslora": True, **PATTERNS},
    "dora": {"use_dora": True},
    "dora-rslora-patterns": {"use_dora": True, "use_rslora": True, **PATTERNS},
    "tower-and-merger": {"target_modules": ["qkv", "attn.proj", "fc2", "merger.mlp.0", "merger.mlp.2"], **PATTERNS},
    "saved-merger": {"modules_to_save": ["merger"]},
    "saved-in-targets": {"target_modules": [*TARGETS, "fc1", "mlp.0"], "modules_to_save": ["merger", "1.mlp.fc1"]},
    "saved-head": {"modules_to_save": ["lm_head", "embed_tokens"], "target_modules": ["q_proj"]},
    "adapted-head": {"target_modules": ["lm_head", "o_proj"], "use_dora": True},
    "embedding": {"target_modules": ["embed_tokens", "k_proj"], "rank_pattern": {"embed_tokens": 3}},
    "embedding-and-head": {"target_modules": ["embed_tokens", "lm_head"], "use_rslora": True},
    "bias": {"target_modules": ["q_proj", "v_proj", "fc1", "qkv"], "lora_bias": True, **PATTERNS},
    "bias-rslora": {"target_modules": ["q_proj", "merger.mlp.0"], "lora_bias": True, "use_rslora": True},
    "all-at-once": {
        "target_modules": [*TARGETS, "qkv"], "modules_to_save": ["merger", "language_model.norm"],
        "use_dora": True, "use_rslora": True, **PATTERNS,
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base whose head is its own."""
    return make_base(tmp_path_factory.mktemp("base") / "base", tied=False, max_shard_size="200KB")


def with_adapter(base: Path, variant: dict[str, Any], dtype: torch.dtype = torch.float32) -> Any:
    """A model with an adapter that is far from its beginning."""
    config = peft.LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": TARGETS, **variant})
    model = peft.get_peft_model(load(base, dtype), config, autocast_adapter_dtype=False)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator).to(dtype))
    return model


def adapter_folder(base: Path, folder: Path, name: str = "all-at-once") -> Path:
    with_adapter(base, VARIANTS[name]).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", VARIANTS)
def test_merged_weights_are_those_of_peft(base: Path, tmp_path: Path, name: str) -> None:
    model = with_adapter(base, VARIANTS[name])
    model.save_pretrained(tmp_path / "adapter")
    with_it = logits(model)
    theirs = model.merge_and_unload().state_dict()

    trained = read_trained(tmp_path / "adapter")
    report = merge(trained, BaseFolder(base), tmp_path / "out", verify=True, verify_forward=True)
    assert report.verified and report.verified.recomputed == report.merged
    assert report.forward and report.forward["image"].change > 1e-2
    assert all(each.error < 1e-5 for each in report.forward.values())
    assert report.merged == len(
        {f"{module}.weight" for module in trained.deltas}
        | {f"{module}.bias" for module, delta in trained.deltas.items() if delta.bias is not None}
        | trained.parameters.keys()
    )
    changes = [line["relative_delta"] for line in report.modules if "rank" in line]
    assert len(changes) == len(trained.deltas) and all(0 < change < 100 for change in changes)
    merged = load(tmp_path / "out")
    for key, tensor in merged.state_dict().items():
        torch.testing.assert_close(
            tensor, theirs[key], rtol=1e-5, atol=1e-6, msg=lambda m, k=key: f"{k}: {m}"
        )
    torch.testing.assert_close(logits(merged), with_it, rtol=1e-4, atol=1e-4)
    assert (with_it - logits(load(base))).abs().max() > 1e-2

    write_adapter(trained, tmp_path / "again")
    again = peft.PeftModel.from_pretrained(load(base), tmp_path / "again")
    assert torch.equal(logits(again), with_it)
    ours, first = (
        load_file(tmp_path / folder / "adapter_model.safetensors") for folder in ("again", "adapter")
    )
    assert ours.keys() == first.keys() and all(torch.equal(ours[key], first[key]) for key in ours)


def test_dora_is_rounded_once(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", tied=True, dtype="bfloat16")
    with_adapter(base, VARIANTS["dora"]).save_pretrained(tmp_path / "adapter")
    trained = read_trained(tmp_path / "adapter")
    for dtype in ("float32", None):
        merge(trained, BaseFolder(base), tmp_path / str(dtype), dtype=dtype, verify=True)
    wide, narrow = (load_file(tmp_path / str(dtype) / "model.safetensors") for dtype in ("float32", None))
    assert all(torch.equal(wide[name].bfloat16(), narrow[name]) for name in narrow)


def test_blocks_of_any_size_give_the_same_rows(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = read_trained(adapter_folder(base, tmp_path / "adapter"))
    for elements in (1 << 18, 200):
        monkeypatch.setattr(apply_lora, "BLOCK_ELEMENTS", elements)
        merge(trained, BaseFolder(base), tmp_path / f"out-{elements}")
    for file in BaseFolder(base).files:
        whole, parts = (load_file(tmp_path / f"out-{elements}" / file) for elements in (1 << 18, 200))
        for name, tensor in whole.items():
            torch.testing.assert_close(parts[name], tensor, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    "name", ["layers.0.self_attn.q_proj.weight", "visual.merger.mlp.0.weight", "model.norm.weight"]
)
def test_verify_finds_a_changed_value(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    trained = read_trained(adapter_folder(base, tmp_path / "adapter"))
    whole = merge.__globals__["write_side_files"]

    def spoil(base: BaseFolder, trained: Any, out: Path, *more: Any) -> None:
        whole(base, trained, out, *more)
        [file] = {file for key, file in BaseFolder(out).index["weight_map"].items() if key.endswith(name)}  # type: ignore[index]
        tensors = load_file(out / file)
        [key] = [key for key in tensors if key.endswith(name)]
        tensors[key].view(-1)[3] *= 1.001
        save_file(tensors, out / file, metadata={"format": "pt"})

    monkeypatch.setitem(merge.__globals__, "write_side_files", spoil)
    with pytest.raises(CheckFailed, match=name):
        merge(trained, BaseFolder(base), tmp_path / "out", verify=True)
    assert not (tmp_path / "out").exists()


PREFIX = f"base_model.model.{LAYER}.0.self_attn.q_proj"
MERGER = "base_model.model.model.visual.merger.mlp.0.weight"
Change = Callable[[dict[str, torch.Tensor], dict[str, Any]], Any]
SPOILED: dict[str, tuple[Change, str]] = {
    "lost-magnitude": (lambda t, c: t.pop(f"{PREFIX}.lora_magnitude_vector"), "has only lora_A, lora_B; "),
    "unexpected-magnitude": (lambda t, c: c.update(use_dora=False), "use_dora = false and lora_bias = false due are"),
    "short-magnitude": (
        lambda t, c: t.update({f"{PREFIX}.lora_magnitude_vector": torch.ones(3)}),
        "64 rows and a magnitude vector of",
    ),
    "broken-magnitude": (lambda t, c: t[f"{PREFIX}.lora_magnitude_vector"].fill_(float("inf")), "NaN or infinity"),
    "lost-copy": (lambda t, c: t.pop(MERGER), "modules_to_save names model.visual.merger.mlp.0.weight"),
    "lost-copies": (lambda t, c: c["modules_to_save"].append("lm_head"), "modules_to_save names lm_head.weight"),
    "unnamed-copy": (lambda t, c: c["modules_to_save"].remove("merger"), "is not a LoRA tensor"),
    "copy-of-nothing": (
        lambda t, c: t.update({MERGER.replace("mlp.0", "mlp.7"): torch.ones(2)}),
        "has no tensor for 1 of",
    ),
    "copy-of-another-size": (lambda t, c: t.update({MERGER: torch.ones(4, 4)}), "a base of another size"),
    "broken-copy": (lambda t, c: t[MERGER].view(-1)[7:8].fill_(float("nan")), "1 values that are not finite"),
    "other-ranks": (lambda t, c: c.update(rank_pattern={}), "the config says rank 4"),
}  # fmt: skip

BIASED = {"target_modules": ["q_proj"], "lora_bias": True}
SPOILED_BIAS: dict[str, tuple[Change, str]] = {
    "lost-bias": (
        lambda t, c: t.pop(f"{PREFIX}.lora_B.bias"),
        "lora_bias = true due are lora_A, lora_B, lora_bias",
    ),
    "unexpected-bias": (lambda t, c: c.update(lora_bias=False), "lora_bias = false due are"),
    "short-bias": (
        lambda t, c: t.update({f"{PREFIX}.lora_B.bias": torch.ones(3)}),
        "64 rows and a bias of lora_B",
    ),
    "no-bias-in-base": (
        lambda t, c: (
            [t.update({name.replace("q_proj", "o_proj"): t.pop(name)}) for name in list(t)]
            and c.update(target_modules=["o_proj"])
        ),
        "lora_bias trained a bias for .*o_proj, which has none",
    ),
}


@pytest.mark.parametrize("case", SPOILED_BIAS)
def test_unsound_biases_are_refused(base: Path, tmp_path: Path, case: str) -> None:
    folder = tmp_path / "adapter"
    with_adapter(base, BIASED).save_pretrained(folder)
    change, message = SPOILED_BIAS[case]
    refused(base, folder, change, message)


@pytest.mark.parametrize("case", SPOILED)
def test_unsound_variants_are_refused(base: Path, tmp_path: Path, case: str) -> None:
    refused(base, adapter_folder(base, tmp_path / "adapter"), *SPOILED[case])


def refused(base: Path, folder: Path, change: Change, message: str) -> None:
    """Spoil an adapter folder and see its merge refused, with nothing left behind."""
    tensors = load_file(folder / "adapter_model.safetensors")
    config = json.loads((folder / "adapter_config.json").read_text())
    change(tensors, config)
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=message):
        merge(read_trained(folder), BaseFolder(base), folder.parent / "out")
    assert sorted(path.name for path in folder.parent.iterdir()) == ["adapter"]


def test_dora_of_an_embedding_is_refused(base: Path, tmp_path: Path) -> None:
    with_adapter(base, {"target_modules": ["embed_tokens"], "use_dora": True}).save_pretrained(
        tmp_path / "adapter"
    )
    with pytest.raises(UserError, match="an embedding under DoRA, not supported"):
        read_trained(tmp_path / "adapter")


def test_a_copy_of_one_end_of_a_tied_base_is_refused(base: Path, tmp_path: Path) -> None:
    folder = adapter_folder(base, tmp_path / "adapter", "saved-head")
    tied = make_base(tmp_path / "tied", tied=True)
    with pytest.raises(UserError, match=r"the adapter trains lm_head.weight, which .* ties"):
        merge(read_trained(folder), BaseFolder(tied), tmp_path / "out")


def test_names_match_as_peft_matches_them(base: Path) -> None:
    raw = {"r": 4, "lora_alpha": 6, **VARIANTS["all-at-once"], "exclude_modules": ["0.mlp.up_proj"]}
    model = peft.get_peft_model(load(base), peft.LoraConfig(**raw), autocast_adapter_dtype=False)
    config = LoraConfig(raw, Path("adapter"))
    for name, module in load(base).named_modules():
        if not isinstance(module, torch.nn.Linear):
            continue
        theirs = model.get_submodule(
            f"base_model.model.{name.replace('merger.', 'merger.modules_to_save.default.')}"
        )
        targeted = any(name.endswith(f".{target}") for target in raw["target_modules"])
        assert isinstance(theirs, peft.tuners.lora.Linear) == (targeted and not config.excludes(name)), name
        if isinstance(theirs, peft.tuners.lora.Linear):
            assert theirs.r["default"] == config.rank(name) and theirs.scaling["default"] == config.scaling(
                name
            )


def test_patterns_hold_for_the_names_of_training(base: Path, tmp_path: Path) -> None:
    """An adapter of an older transformers, whose patterns call its modules as the hub does."""
    pattern = {"alpha_pattern": {f"{LAYER}.0.self_attn.q_proj": 50}}
    folder = tmp_path / "adapter"
    with_adapter(base, pattern).save_pretrained(folder)
    merge(read_trained(folder), BaseFolder(base), tmp_path / "newer")
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file(
        {name.replace(LAYER, "model.layers"): tensor for name, tensor in tensors.items()},
        folder / "adapter_model.safetensors",
    )
    config = json.loads((folder / "adapter_config.json").read_text())
    config["alpha_pattern"] = {"model.layers.0.self_attn.q_proj": 50}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    trained = read_trained(folder)
    merge(trained, BaseFolder(base), tmp_path / "older")
    for file in BaseFolder(base).files:
        older, newer = (load_file(tmp_path / which / file) for which in ("older", "newer"))
        assert all(torch.equal(older[name], newer[name]) for name in newer)
    with pytest.raises(UserError, match=r"alpha_pattern of the adapter call .*q_proj by another name"):
        write_adapter(trained, tmp_path / "again")
