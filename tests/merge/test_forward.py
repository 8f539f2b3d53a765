"""The comparison of logits finds a merge that is wrong, and one that changed nothing."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from qwenvl_dist.errors import CheckFailed
from qwenvl_dist.merge import apply_lora
from qwenvl_dist.merge.forward import compare_forward
from qwenvl_dist.merge.merge import merge
from qwenvl_dist.merge.trained import Trained, read_trained
from qwenvl_dist.model.base_folder import BaseFolder
from tests.merge.test_variants import with_adapter
from tests.merge.tiny import make_base


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    folder = tmp_path_factory.mktemp("adapter")
    make_base(folder / "base", tied=True, dtype="bfloat16")
    with_adapter(folder / "base", {}).save_pretrained(folder / "adapter")
    return read_trained(folder / "adapter")


@pytest.fixture(scope="module")
def base(trained: Trained) -> BaseFolder:
    return BaseFolder(trained.source.parent / "base")


@pytest.mark.parametrize("block", (1 << 18, 150))
def test_rounding_shows_and_is_small(
    trained: Trained, base: BaseFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int
) -> None:
    monkeypatch.setattr(apply_lora, "BLOCK_ELEMENTS", block)
    exact = merge(trained, base, tmp_path / "wide", dtype="float32", verify_forward=True).forward
    rounded = merge(trained, base, tmp_path / "narrow", verify_forward=True).forward
    assert exact and rounded
    for prompt in ("image", "text"):
        assert exact[prompt].error < 1e-5 < 1e-3 < rounded[prompt].error < 0.1 * rounded[prompt].change
        assert exact[prompt].change == pytest.approx(rounded[prompt].change)
        assert exact[prompt].control == pytest.approx(exact[prompt].change, rel=1e-4)


def test_another_sign_is_found(trained: Trained, base: BaseFolder, tmp_path: Path) -> None:
    deltas = {module: replace(delta, scaling=-delta.scaling) for module, delta in trained.deltas.items()}
    merge(replace(trained, deltas=deltas), base, tmp_path / "negative")
    plans = apply_lora.make_plan(base, trained, None)
    with pytest.raises(CheckFailed, match="what was trained is lost"):
        compare_forward(base, plans, tmp_path / "negative")


def test_a_merge_that_changes_nothing_is_found(trained: Trained, base: BaseFolder, tmp_path: Path) -> None:
    deltas = {
        module: replace(delta, lora_b=torch.zeros_like(delta.lora_b))
        for module, delta in trained.deltas.items()
    }
    with pytest.raises(CheckFailed, match="the very logits of the base"):
        merge(replace(trained, deltas=deltas), base, tmp_path / "out", verify_forward=True)
    assert not (tmp_path / "out").exists() and not (tmp_path / ".out.partial").exists()
