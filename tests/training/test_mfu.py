"""Which GPUs have a known peak, when there is no MFU, and what `train` logs where there is one."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from qwenvl_dist.config import Recipe, make_recipe
from qwenvl_dist.training import metrics, mfu


def recipe(**sections: Any) -> Recipe:
    return make_recipe({"data": {"train": "-"}, **sections}, "test")


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835.5),
        ("NVIDIA H200", 989.4),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("A100-PCIE-40GB", 312),
        ("NVIDIA A10", 125),
        ("NVIDIA L4", 121),
        ("NVIDIA L40", 181),
        ("NVIDIA L40S", 362),
        ("NVIDIA RTX A6000", 154.8),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("Tesla V100-SXM2-16GB", 125),
        ("Tesla T4", 65),
    ],
)
def test_a_known_gpu_has_its_data_sheet_s_peak(name: str, tflops: float) -> None:
    assert mfu.peak_flops(name) == pytest.approx(tflops * 1e12)


@pytest.mark.parametrize(
    "name",
    [
        "NVIDIA A10G",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA A100-SXM4-40GB MIG 3g.20gb",
        "NVIDIA RTX A600",
        "AMD Instinct MI300X",
    ],
)
def test_a_gpu_with_a_name_like_a_known_one_is_unknown(name: str) -> None:
    assert mfu.peak_flops(name) is None


@pytest.mark.parametrize(
    ("sections", "device", "name", "reason"),
    [
        ({}, "cpu", "", "no GPU"),
        ({}, "cuda", "Some GPU", "the peak of Some GPU is not known"),
        ({"model": {"dtype": "float32"}}, "cuda", "NVIDIA L4", "model.dtype is float32"),
        ({"model": {"train": ["merger"]}}, "cuda", "NVIDIA L4", "only adapters on the language"),
        (
            {"lora": {"target_modules": ["q_proj", "qkv"]}},
            "cuda",
            "NVIDIA L4",
            "only adapters on the language",
        ),
    ],
)
def test_without_a_figure_there_is_a_reason(
    monkeypatch: pytest.MonkeyPatch, sections: dict[str, Any], device: str, name: str, reason: str
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: name)
    peak, missing = mfu.usable_peak(recipe(**sections), torch.device(device))
    assert peak is None and reason in missing


def logged(monkeypatch: pytest.MonkeyPatch, names: tuple[str, str]) -> dict[str, Any]:
    """What rank 0 of two logs after a step of two micro-batches, 1.21e14 FLOPs on each rank, in a second."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: names[0])
    monkeypatch.setattr(metrics, "work_of", lambda _, batch: SimpleNamespace(flops=batch))
    monkeypatch.setattr(metrics, "peak_memory_gib", lambda: 1.0)
    other = (0.0, 121_000_000_000_000, mfu.peak_flops(names[1]), 0.5, "other-host")
    host = SimpleNamespace(gather=lambda value: [value, other], max=lambda *values: values)
    state: Any = SimpleNamespace(
        recipe=recipe(),
        topology=SimpleNamespace(is_main=True),
        host=host,
        accelerator=SimpleNamespace(device=torch.device("cuda"), log=lambda *_, **__: None),
        engine=SimpleNamespace(get_global_grad_norm=lambda: 1.0),
        progress=SimpleNamespace(step=1, consumed=8, bad_samples={}, adjusted={}),
        identity=SimpleNamespace(samples_per_epoch=8),
        batches=SimpleNamespace(
            layout=SimpleNamespace(steps=lambda _: 0), plan=SimpleNamespace(progress=lambda _: {})
        ),
        total_samples=8,
        pace=SimpleNamespace(take=lambda: 0.5),
    )
    history: Any = SimpleNamespace(metrics=lambda _: None)
    measured = metrics.Metrics(state, history)
    result: Any = SimpleNamespace(losses=torch.ones(2), target_tokens=4, samples=8)
    measured.add(result, [100_000_000_000_000, 21_000_000_000_000])  # type: ignore[list-item]
    measured._seconds.update(data_seconds=0.25, step_seconds=0.75)
    return measured.log_step(1e-4)


def test_train_logs_the_share_of_all_ranks_peaks(monkeypatch: pytest.MonkeyPatch) -> None:
    assert logged(monkeypatch, ("NVIDIA L4", "NVIDIA L4"))["mfu"] == pytest.approx(1.0)
    assert logged(monkeypatch, ("NVIDIA L4", "NVIDIA L40S"))["mfu"] == pytest.approx(242 / 483)


@pytest.mark.parametrize("names", [("NVIDIA L4", "Some GPU"), ("Some GPU", "NVIDIA L4")])
def test_train_logs_no_share_when_one_rank_s_gpu_is_unknown(
    monkeypatch: pytest.MonkeyPatch, names: tuple[str, str]
) -> None:
    assert "mfu" not in logged(monkeypatch, names)
