"""Merged weights against base + adapter, and against what DeepSpeed held in training."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qwenvl_dist.__main__ import main
from qwenvl_dist.checkpoints.zero import ZeroCheckpoint
from qwenvl_dist.errors import CheckFailed, UserError
from qwenvl_dist.merge import apply_lora
from qwenvl_dist.merge.merge import merge, write_adapter
from qwenvl_dist.merge.trained import find_checkpoint, read_trained
from qwenvl_dist.merge.verify import verify_output
from qwenvl_dist.model.base_folder import BaseFolder, write_header
from qwenvl_dist.model.names import runtime_name
from tests.merge.tiny import load, logits, write_manifest

LORA_CASES = ("lora-stage2", "lora-stage3", "lora-stage3-bf16", "rslora-patterns", "vision-lora", "lora-bias")


def peft_model(base: Path, adapter: Path) -> Any:
    """Load base + adapter and insist that every adapter tensor was used."""
    from peft import PeftModel
    from peft.utils import get_peft_model_state_dict

    model = PeftModel.from_pretrained(load(base), adapter)
    in_model, in_file = get_peft_model_state_dict(model), load_file(adapter / "adapter_model.safetensors")
    assert in_model.keys() == in_file.keys()
    assert all(torch.equal(in_model[name], in_file[name]) for name in in_file)
    return model


@pytest.mark.dist
@pytest.mark.parametrize("case", LORA_CASES)
def test_merged_logits_are_those_of_base_and_adapter(bases, steps, tmp_path: Path, case: str) -> None:
    trained = read_trained(steps / case)
    report = merge(trained, BaseFolder(bases["tied"]), tmp_path / "out", verify=True, verify_forward=True)
    write_adapter(trained, tmp_path / "adapter")
    assert len(trained.deltas) == {"vision-lora": 6, "lora-bias": 6}.get(case, 14)
    assert report.merged == len(trained.deltas) * (2 if case == "lora-bias" else 1)
    assert report.forward and all(each.error < 1e-5 < 1e-3 < each.change for each in report.forward.values())
    assert report.verified and report.verified.recomputed == report.merged
    assert report.verified.byte_equal == report.tensors - report.merged

    merged = logits(load(tmp_path / "out"))
    expected = logits(peft_model(bases["tied"], tmp_path / "adapter"))
    torch.testing.assert_close(merged, expected, rtol=1e-5, atol=1e-5)
    assert (merged - logits(load(bases["tied"]))).abs().max() > 1e-2  # the control: training did something


@pytest.mark.dist
@pytest.mark.parametrize("case", LORA_CASES)
def test_adapter_is_what_deepspeed_held(steps, tmp_path: Path, case: str) -> None:
    write_adapter(read_trained(steps / case), tmp_path / "adapter")
    written = load_file(tmp_path / "adapter/adapter_model.safetensors")
    truth = torch.load(steps / case / "truth.pt")
    assert {name.replace(".default", "") for name in truth} == written.keys()
    for name, state in truth.items():
        assert torch.equal(written[name.replace(".default", "")], state["fp32"])


@pytest.mark.dist
def test_both_stages_train_the_same_adapter(steps) -> None:
    two, three = ZeroCheckpoint(steps / "lora-stage2"), ZeroCheckpoint(steps / "lora-stage3")
    assert two.shapes == three.shapes
    for name in two.shapes:
        torch.testing.assert_close(two.fp32(name), three.fp32(name), rtol=1e-4, atol=1e-6)


@pytest.mark.dist
@pytest.mark.parametrize("case", ("full", "full-stage2", "lora-and-merger"))
def test_fully_trained_parameters_replace_the_base(bases, steps, tmp_path: Path, case: str) -> None:
    trained = read_trained(steps / case)
    report = merge(trained, BaseFolder(bases["tied"]), tmp_path / "out", verify=True, verify_forward=True)
    assert report.forward and all(each.error < 1e-5 < 1e-3 < each.change for each in report.forward.values())
    assert all(line["relative_delta"] > 0 and line["rounding_error"] == 0 for line in report.modules)
    written = load_file(tmp_path / "out/model.safetensors")
    base = load_file(bases["tied"] / "model.safetensors")
    checkpoint = ZeroCheckpoint(steps / case)
    replaced = {runtime_name(name): name for name in checkpoint.shapes if "lora_" not in name}
    assert replaced
    for name, tensor in written.items():
        if f"{runtime_name(name)}".removesuffix(".weight") in trained.deltas:
            continue
        trained_name = replaced.get(runtime_name(name))
        expected = checkpoint.fp32(trained_name) if trained_name else base[name]
        assert torch.equal(tensor, expected), name
    load(tmp_path / "out")
    if case == "lora-and-merger":
        name = "model.language_model.layers.0.self_attn.q_proj"
        delta = trained.deltas[name]
        expected = checkpoint.fp32(replaced[f"{name}.weight"]) + delta.scaling * delta.lora_b @ delta.lora_a
        (found,) = [tensor for other, tensor in written.items() if runtime_name(other) == f"{name}.weight"]
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)
        with pytest.raises(UserError, match="also trained"):
            write_adapter(trained, tmp_path / "adapter")


@pytest.mark.dist
def test_output_keeps_names_shards_and_untouched_bytes(bases, steps, tmp_path: Path) -> None:
    base = BaseFolder(bases["untied"])
    assert len(base.files) > 2
    merge(read_trained(steps / "lora-stage2"), base, tmp_path / "out")
    out = BaseFolder(tmp_path / "out")
    assert out.tensors == base.tensors
    assert (out.index or {})["weight_map"] == (base.index or {})["weight_map"]
    differing = set()
    for file in base.files:
        assert (out.path / file).stat().st_size == (base.path / file).stat().st_size
        before, after = load_file(base.path / file), load_file(out.path / file)
        differing |= {runtime_name(name) for name in before if not torch.equal(before[name], after[name])}
    trained = read_trained(steps / "lora-stage2")
    assert differing == {f"{module}.weight" for module in trained.deltas}


@pytest.mark.dist
def test_output_has_the_names_of_the_published_index(bases, steps, shared_data: Path, tmp_path: Path) -> None:
    """vLLM and SGLang read these; layers are counted the same, only fewer."""
    index = json.loads(
        (shared_data / "qwen2vl/Qwen2-VL-7B-Instruct/model.safetensors.index.json").read_text()
    )
    merge(
        read_trained(steps / "lora-stage2"),
        BaseFolder(bases["untied"]),
        tmp_path / "out",
        allow_other_base=True,
    )

    def kinds(names) -> set[str]:
        return {re.sub(r"(layers|blocks)\.\d+\.", r"\1.N.", name) for name in names}

    assert kinds(BaseFolder(tmp_path / "out").tensors) == kinds(index["weight_map"])


@pytest.mark.dist
@pytest.mark.parametrize("newer", (False, True))
def test_old_and_new_tensor_names_give_the_same_model(bases, steps, tmp_path: Path, newer: bool) -> None:
    base = tmp_path / "base"
    shutil.copytree(bases["tied"], base)
    tensors = load_file(base / "model.safetensors")
    renamed = {runtime_name(name) if newer else hub_name(name): tensor for name, tensor in tensors.items()}
    save_file(renamed, base / "model.safetensors", metadata={"format": "pt"})
    merge(read_trained(steps / "lora-stage2"), BaseFolder(base), tmp_path / "out")
    merge(read_trained(steps / "lora-stage2"), BaseFolder(bases["tied"]), tmp_path / "reference")
    written = load_file(tmp_path / "out/model.safetensors")
    assert written.keys() == renamed.keys()
    assert torch.equal(logits(load(tmp_path / "out")), logits(load(tmp_path / "reference")))


def hub_name(name: str) -> str:
    return runtime_name(name).replace("model.language_model.", "model.").replace("model.visual.", "visual.")


@pytest.mark.dist
def test_one_rounding_to_the_output_type(bases, steps, tmp_path: Path) -> None:
    trained = read_trained(steps / "lora-stage2")
    base = BaseFolder(bases["bf16"])
    merge(trained, base, tmp_path / "kept", verify=True)
    merge(trained, base, tmp_path / "wide", dtype="float32", verify=True)
    kept, wide = (
        load_file(tmp_path / "kept/model.safetensors"),
        load_file(tmp_path / "wide/model.safetensors"),
    )
    assert {tensor.dtype for tensor in kept.values()} == {torch.bfloat16}
    assert {tensor.dtype for tensor in wide.values()} == {torch.float32}
    assert all(torch.equal(wide[name].bfloat16(), kept[name]) for name in kept)
    config = json.loads((tmp_path / "wide/config.json").read_text())
    assert config.get("dtype", config.get("torch_dtype")) == "float32"
    load(tmp_path / "wide")


@pytest.mark.dist
def test_adapter_folder_merges_like_its_checkpoint(bases, steps, tmp_path: Path) -> None:
    write_adapter(read_trained(steps / "lora-stage3"), tmp_path / "adapter")
    base = BaseFolder(bases["tied"])
    merge(read_trained(tmp_path / "adapter"), base, tmp_path / "a")
    merge(read_trained(steps / "lora-stage3"), base, tmp_path / "b")
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()


@pytest.mark.dist
def test_processor_of_training_goes_with_the_model(bases, steps, tmp_path: Path) -> None:
    step = tmp_path / "step"
    shutil.copytree(steps / "lora-stage2", step)
    (step / "processor").mkdir()
    (step / "processor/preprocessor_config.json").write_text('{"min_pixels": 78400}')
    (step / "processor/chat_template.jinja").write_text("training")
    merge(read_trained(step), BaseFolder(bases["tied"]), tmp_path / "out")
    assert (tmp_path / "out/preprocessor_config.json").read_text() == '{"min_pixels": 78400}'
    assert (tmp_path / "out/chat_template.jinja").read_text() == "training"
    assert not (tmp_path / "out/chat_template.json").exists()  # the base's would contradict it
    assert (tmp_path / "out/vocab.json").exists()
    assert (tmp_path / "out/generation_config.json").exists()


@pytest.mark.dist
def test_report_accounts_for_every_tensor(bases, steps, tmp_path: Path) -> None:
    trained = read_trained(steps / "lora-stage2")
    merge(trained, BaseFolder(bases["bf16"]), tmp_path / "out")
    report = json.loads((tmp_path / "out/merge_report.json").read_text())
    out, base = BaseFolder(tmp_path / "out"), load_file(bases["bf16"] / "model.safetensors")
    data = (tmp_path / "out/model.safetensors").read_bytes()
    assert report["sha256"] == {
        name: hashlib.sha256(data[entry.begin : entry.end]).hexdigest() for name, entry in out.tensors.items()
    }
    merged = load_file(tmp_path / "out/model.safetensors")
    assert [line["name"] for line in report["modules"]] == [
        name for name in out.tensors if runtime_name(name).removesuffix(".weight") in trained.deltas
    ]
    for line in report["modules"]:
        name = line["name"]
        delta = trained.deltas[runtime_name(name).removesuffix(".weight")]
        weight, change = base[name].double(), delta.scaling * delta.lora_b.double() @ delta.lora_a.double()
        lost = merged[name].double() - (weight + change)
        assert line["relative_delta"] == pytest.approx((change.norm() / weight.norm()).item(), rel=1e-4)
        assert line["rounding_error"] == pytest.approx((lost.norm() / change.norm()).item(), rel=1e-3)
        assert line["changed"] == (merged[name] != base[name]).double().mean().item()
        assert 0 < line["rounding_error"] < 1 and 0 < line["changed"] <= 1


@pytest.mark.dist
def test_run_folder_means_its_best_else_its_newest(steps, tmp_path: Path) -> None:
    checkpoints = tmp_path / "run/checkpoints"
    for step in (90, 100, 110):
        folder = checkpoints / f"step-{step:08d}"
        shutil.copytree(steps / "lora-stage2", folder)
        if step != 110:  # never finished
            write_manifest(folder, "x", None)
    assert find_checkpoint(tmp_path / "run").name == "step-00000100"
    (checkpoints / "best").symlink_to("step-00000090")
    assert find_checkpoint(tmp_path / "run").name == "step-00000090"
    assert find_checkpoint(checkpoints / "step-00000110").name == "step-00000110"
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no finished checkpoint"):
        find_checkpoint(tmp_path / "empty")


@pytest.mark.dist
def test_other_base_is_refused_unless_allowed(bases, steps, tmp_path: Path) -> None:
    step = tmp_path / "step"
    shutil.copytree(steps / "lora-stage2", step)
    write_manifest(step, BaseFolder(bases["tied"]).fingerprint(), None)
    merge(read_trained(step), BaseFolder(bases["tied"]), tmp_path / "right")
    with pytest.raises(UserError, match="--allow-other-base"):
        merge(read_trained(step), BaseFolder(bases["untied"]), tmp_path / "wrong")
    assert not (tmp_path / "wrong").exists()
    merge(read_trained(step), BaseFolder(bases["untied"]), tmp_path / "wrong", allow_other_base=True)


@pytest.mark.dist
def test_a_checkpoint_that_differs_from_its_manifest_is_refused(bases, steps, tmp_path: Path) -> None:
    step = tmp_path / "step"
    shutil.copytree(steps / "lora-stage2", step)
    write_manifest(step, BaseFolder(bases["tied"]).fingerprint(), None)
    victim = max(step.rglob("*optim_states.pt"), key=lambda path: path.stat().st_size)
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 1
    victim.write_bytes(data)
    with pytest.raises(CheckFailed, match=f"{victim.name} has another checksum"):
        read_trained(step)


class _Touch:
    """Unpickled by Python's own rules, it makes a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return Path.touch, (self.mark,)


@pytest.mark.dist
@pytest.mark.parametrize("pattern", ("*rank_1_*optim_states.pt", "mp_rank_00_model_states.pt"))
def test_a_checkpoint_that_would_run_something_is_refused_and_not_run(
    bases, steps, tmp_path: Path, pattern: str
) -> None:
    step = tmp_path / "step"
    shutil.copytree(steps / "lora-stage2", step)
    (file,) = (step / "zero").glob(pattern)
    content = torch.load(file, weights_only=False)
    torch.save({**content, "note": _Touch(tmp_path / "mark")}, file)
    with pytest.raises(UserError, match="refused, nothing was run"):
        merge(read_trained(step), BaseFolder(bases["tied"]), tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step"]


def test_fingerprint_notices_one_changed_tensor(bases, tmp_path: Path) -> None:
    shutil.copytree(bases["tied"], tmp_path / "base")
    before = BaseFolder(tmp_path / "base").fingerprint()
    assert before == BaseFolder(bases["tied"]).fingerprint()
    tensors = load_file(tmp_path / "base/model.safetensors")
    next(tensor for name, tensor in tensors.items() if name.endswith("k_proj.bias")).add_(1e-3)
    save_file(tensors, tmp_path / "base/model.safetensors", metadata={"format": "pt"})
    assert before != BaseFolder(tmp_path / "base").fingerprint()


def spoil_adapter(source: Path, folder: Path, change) -> Path:
    """Write an adapter folder of a checkpoint with its tensors or config changed."""
    write_adapter(read_trained(source), folder)
    tensors = load_file(folder / "adapter_model.safetensors")
    config = json.loads((folder / "adapter_config.json").read_text())
    change(tensors, config)
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


Q0 = "base_model.model.model.language_model.layers.0.self_attn.q_proj"
SPOILED = {
    "not-finite": (lambda t, c: t[f"{Q0}.lora_A.weight"].view(-1)[5].fill_(float("nan")), "NaN"),
    "overflow": (lambda t, c: t[f"{Q0}.lora_A.weight"].fill_(3e38), "not finite"),
    "zero-size": (lambda t, c: t.update({f"{Q0}.lora_A.weight": torch.empty(0)}), "without gathering"),
    "lone-side": (lambda t, c: t.pop(f"{Q0}.lora_A.weight"), "only lora_B"),
    "lost-module": (lambda t, c: [t.pop(f"{Q0}.lora_{side}.weight") for side in "AB"], "incomplete"),
    "unmatched": (
        lambda t, c: t.update({f"{Q0}x.lora_{s}.weight": t[f"{Q0}.lora_{s}.weight"].clone() for s in "AB"}),
        "no tensor for 1 of 15",
    ),
    "wrong-shape": (
        lambda t, c: t.update({f"{Q0}.lora_A.weight": t[f"{Q0}.lora_A.weight"][:, :-1].contiguous()}),
        "another size",
    ),
    "wrong-rank": (lambda t, c: c.update(r=5), "rank 5"),
    "foreign-tensor": (lambda t, c: t.update({"something": torch.ones(2)}), "not a LoRA tensor"),
    "dora": (lambda t, c: c.update(use_dora=True), "due are .*magnitude_vector"),
    "modules-to-save": (lambda t, c: c.update(modules_to_save=["lm_head"]), "modules_to_save names lm_head"),
    "bias": (lambda t, c: c.update(bias="all"), "bias"),
    "pissa": (lambda t, c: c.update(init_lora_weights="pissa"), "init_lora_weights"),
    "of-tomorrow": (lambda t, c: c.update(use_newest_thing={"x": 1}), "use_newest_thing"),
    "other-method": (lambda t, c: c.update(peft_type="LOHA"), "LOHA"),
    "tied-head": (
        lambda t, c: t.update(
            {
                "base_model.model.lm_head.lora_A.weight": torch.ones(4, 64),
                "base_model.model.lm_head.lora_B.weight": torch.ones(300, 4),
            }
        ),
        "ties",
    ),
}


@pytest.mark.dist
@pytest.mark.parametrize("case", SPOILED)
def test_unsound_adapters_are_refused(bases, steps, tmp_path: Path, case: str) -> None:
    change, message = SPOILED[case]
    adapter = spoil_adapter(steps / "lora-stage2", tmp_path / "adapter", change)
    with pytest.raises(UserError, match=message):
        merge(read_trained(adapter), BaseFolder(bases["tied"]), tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter"]


@pytest.mark.dist
def test_adapter_without_config_is_refused(steps, tmp_path: Path) -> None:
    shutil.copytree(steps / "lora-stage2", tmp_path / "step")
    (tmp_path / "step/adapter_config.json").unlink()
    with pytest.raises(UserError, match=r"no adapter_config\.json"):
        read_trained(tmp_path / "step")


@pytest.mark.dist
def test_taken_output_is_refused_and_untouched(bases, steps, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    merge(read_trained(steps / "lora-stage2"), BaseFolder(bases["tied"]), tmp_path / "out")  # empty is free
    before = sorted((path, path.stat().st_mtime_ns) for path in (tmp_path / "out").iterdir())
    with pytest.raises(UserError, match="not empty"):
        merge(read_trained(steps / "lora-stage2"), BaseFolder(bases["tied"]), tmp_path / "out")
    assert before == sorted((path, path.stat().st_mtime_ns) for path in (tmp_path / "out").iterdir())


@pytest.mark.dist
@pytest.mark.parametrize("where", ("untouched", "merged"))
def test_verify_finds_one_flipped_bit(bases, steps, tmp_path: Path, where: str) -> None:
    trained, base = read_trained(steps / "lora-stage2"), BaseFolder(bases["tied"])
    merge(trained, base, tmp_path / "out")
    plans = apply_lora.make_plan(base, trained, None)
    verify_output(base, plans, tmp_path / "out", lambda count: None)
    entry = next(plan.entry for plan in plans.values() if plan.merged == (where == "merged"))
    with (tmp_path / "out/model.safetensors").open("r+b") as file:
        file.seek(entry.end - 3)
        byte = file.read(1)[0]
        file.seek(entry.end - 3)
        file.write(bytes([byte ^ 1]))
    with pytest.raises(CheckFailed, match="differ"):
        verify_output(base, plans, tmp_path / "out", lambda count: None)


@pytest.mark.dist
def test_blocks_of_any_size_cover_every_row(bases, steps, tmp_path: Path, monkeypatch) -> None:
    trained, base = read_trained(steps / "lora-stage2"), BaseFolder(bases["tied"])
    merge(trained, base, tmp_path / "whole")
    monkeypatch.setattr(apply_lora, "BLOCK_ELEMENTS", 150)
    merge(trained, base, tmp_path / "blocks", verify=True)
    whole, blocks = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "blocks"))
    for name in whole:
        torch.testing.assert_close(blocks[name], whole[name], rtol=1e-6, atol=1e-7)


COMMAND = """
import sys
import argparse
from qwenvl_dist.commands import merge
parser = argparse.ArgumentParser()
merge.add_parser(parser.add_subparsers())
args = parser.parse_args(sys.argv[1:])
sys.exit(args.run(args))
"""


@pytest.mark.dist
def test_command_prints_the_contract_json(bases, steps, tmp_path: Path) -> None:
    process = subprocess.run(
        [
            *(
                sys.executable,
                "-c",
                COMMAND,
                "merge",
                str(steps / "lora-stage3"),
                "--base",
                str(bases["tied"]),
            ),
            *(
                "--out",
                str(tmp_path / "out"),
                "--adapter-out",
                str(tmp_path / "adapter"),
                "--verify",
                "--verify-forward",
                "--json",
            ),
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert process.returncode == 0, process.stderr
    result = json.loads(process.stdout.splitlines()[-1])
    assert {"tensors", "merged", "bytes", "seconds", "peak_rss_gib"} <= result.keys()
    assert result["merged"] == 14
    assert result["forward"].keys() == {"image", "text"}
    assert json.loads((tmp_path / "out/merge_report.json").read_text())["forward"] == result["forward"]
    assert result["bytes"] == (tmp_path / "out/model.safetensors").stat().st_size
    load(tmp_path / "out")


@pytest.mark.dist
def test_command_says_what_was_proved(
    bases, steps, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [
        "merge",
        str(steps / "lora-stage2"),
        "--base",
        str(bases["tied"]),
        "--out",
        str(tmp_path / "out"),
    ]
    assert main([*arguments, "--verify", "--verify-forward"]) == 0
    said = capsys.readouterr().err
    assert "14 of 57 tensors merged" in said and "14 merged ones equal to a second computation" in said
    assert "text prompt: the adapter moves the base's logits by" in said


def test_damaged_bases_are_refused(bases, tmp_path: Path) -> None:
    shutil.copytree(bases["tied"], tmp_path / "cut")
    file = tmp_path / "cut/model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(UserError, match="cut off"):
        BaseFolder(tmp_path / "cut")
    file.write_bytes(b"\0" * 4)
    with pytest.raises(UserError, match="safetensors"):
        BaseFolder(tmp_path / "cut")
    shutil.copytree(bases["untied"], tmp_path / "shard")
    next((tmp_path / "shard").glob("model-00002-*")).unlink()
    with pytest.raises(UserError, match="does not exist"):
        BaseFolder(tmp_path / "shard")


def test_written_header_is_read_by_safetensors(tmp_path: Path) -> None:
    header = write_header({"a": ("F32", (2, 3)), "b": ("BF16", ()), "c": ("I64", (0, 2))}, {"format": "pt"})
    (tmp_path / "x.safetensors").write_bytes(header + bytes(26))
    tensors = load_file(tmp_path / "x.safetensors")
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == {
        "a": (2, 3),
        "b": (),
        "c": (0, 2),
    }


def test_base_folder_imports_no_torch() -> None:
    code = "import sys, qwenvl_dist.model.base_folder; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env={**os.environ}, timeout=60).returncode == 0
