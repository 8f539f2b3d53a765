"""What the report of a run says, and that it stands alone."""

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest

from qwenvl_dist.__main__ import main
from qwenvl_dist.config import make_recipe
from qwenvl_dist.report.charts import MOST_POINTS, Curve, draw
from qwenvl_dist.report.folder import RunFolder
from qwenvl_dist.report.page import report_page
from tests.report.made_run import HOSTILE, keys_of, write_bare_run, write_full_run


class Page(HTMLParser):
    """The parts of a page that the tests look at."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.words += data.split()

    @property
    def text(self) -> str:
        return " ".join(self.words)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory, scene_validation_shards: Path) -> Path:
    return write_full_run(tmp_path_factory.mktemp("report") / "run", scene_validation_shards)


@pytest.fixture(scope="module")
def page(full: Path) -> Page:
    assert main(["report", str(full)]) == 0
    return Page((full / "report.html").read_text())


def test_a_resumed_unfinished_run_is_told_whole(page: Page) -> None:
    for said in (
        "made run", "unfinished, step 50 of 60", "best CIDEr 5.000", "at step 40",
        "LoRA, rank 8, alpha 16, dropout 0.1", "32 samples: 4 × accumulation 4 × 2 ranks", "COCO Yes:",
        "2 ranks on 1 host, ZeRO-2, CPU", "Versions", "0.19.8", "marks a step from which the run was resumed",
        "1.23 MB", "damaged: state.pt has 9 bytes instead of 1234567",
    ):  # fmt: skip
        assert said in page.text, said
    titles = {tag["aria-label"].partition(".")[0] for tag in page.all("svg") if tag.get("role") == "img"}  # type: ignore[union-attr]
    assert titles >= {
        "Loss per target token",
        "Learning rate",
        "CIDEr of validation photos",
        "Samples per second",
        "Seconds before waiting for others, a step",
    }


def test_photos_stand_with_reference_before_and_after_worst_and_best_first(
    page: Page, scene_validation_shards: Path
) -> None:
    keys = keys_of(scene_validation_shards)
    by_score = sorted(range(12), key=lambda number: number * 7 % 12)
    pictures = [tag["alt"] for tag in page.all("img")]
    ranked = [*by_score[:6], *by_score[6:][::-1]]
    assert pictures == [f"Photo {keys[number]}: reference {number}" for number in ranked]
    assert page.text.count("before training") == 12
    assert page.text.index("Worst first") < page.text.index("Best first")
    assert "after reference 3 ✓" in page.text


def test_captions_are_text_and_never_markup(page: Page) -> None:
    assert HOSTILE in page.text
    assert not page.all("script") and not page.all("b")


def test_nothing_comes_from_outside(page: Page) -> None:
    for _, attributes in page.tags:
        for name in ("src", "href", "xlink:href", "srcset", "action"):
            value = attributes.get(name)
            assert value is None or value.startswith(("#", "data:")), value
    policy = next(tag["content"] for tag in page.all("meta") if tag.get("http-equiv"))
    assert policy is not None and policy.startswith("default-src 'none'")


def test_ids_are_unique_and_links_within_the_page_lead_somewhere(page: Page) -> None:
    ids = [tag["id"] for _, tag in page.tags if "id" in tag]
    assert len(ids) == len(set(ids))
    for _, tag in page.tags:
        for target in (tag.get("href"), tag.get("xlink:href")):
            if target and target.startswith("#"):
                assert target[1:] in ids
        if tag.get("aria-labelledby"):
            assert tag["aria-labelledby"] in ids


def test_a_run_killed_early_has_a_page(tmp_path: Path) -> None:
    run = write_bare_run(tmp_path / "run")
    out = tmp_path / "pages" / "early.html"
    assert main(["report", str(run), "--out", str(out)]) == 0
    page = Page(out.read_text())
    assert "step 3" in page.text and "None has been written yet" in page.text
    assert not page.all("img")


def test_a_run_that_has_not_made_a_step_has_a_page(tmp_path: Path, full: Path) -> None:
    shutil.copy(full / "recipe.yaml", tmp_path)
    assert "No step has been logged yet" in Page(report_page(RunFolder.read(tmp_path), 24)).text


def test_captions_without_scores_stand_in_their_order(full: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(full, run, symlinks=True)
    for file in (run / "generations").iterdir():
        rows = json.loads(file.read_text())
        file.write_text(json.dumps([{**row, "scores": {}} for row in rows]))
    page = Page(report_page(RunFolder.read(run), 5))
    assert [tag["alt"].rpartition(" ")[2] for tag in page.all("img")] == list("01234")  # type: ignore[union-attr]
    assert "Worst first" not in page.text and "shown are the first 5" in page.text


def test_photos_that_cannot_be_reached_leave_their_captions(full: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(full, run, symlinks=True)
    recipe = (run / "recipe.yaml").read_text()
    (run / "recipe.yaml").write_text(re.sub(r"(?m)^  validation: .*", "  validation: gone/away", recipe))
    page = Page(report_page(RunFolder.read(run), 24))
    assert not page.all("img") and page.text.count("before training") == 12
    assert "The photos themselves are not here: " in page.text


def test_a_relative_place_is_found_from_where_the_run_was_started(
    full: Path, tmp_path: Path, scene_validation_shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    shutil.copytree(full, run, symlinks=True)
    recipe = (run / "recipe.yaml").read_text()
    relative = f"  validation: {scene_validation_shards.name}"
    (run / "recipe.yaml").write_text(re.sub(r"(?m)^  validation: .*", relative, recipe))
    lines = (
        (run / "launches.jsonl").read_text().replace('"/"', json.dumps(str(scene_validation_shards.parent)))
    )
    (run / "launches.jsonl").write_text(lines)
    monkeypatch.chdir(tmp_path)
    assert len(Page(report_page(RunFolder.read(run), 24)).all("img")) == 12


@pytest.mark.parametrize(("name", "said"), [("nowhere", "no such folder"), ("empty", "holds neither")])
def test_a_folder_that_is_no_run_is_told_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, said: str
) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit) as exit_:
        main(["report", str(tmp_path / name)])
    assert exit_.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and said in error and str(tmp_path / name) in error


def test_a_curve_of_a_long_run_stays_small_and_keeps_its_mean() -> None:
    values = [float(step % 7) for step in range(100_000)]
    curve = Curve("loss", range(100_000), values)
    steps, thinned = curve.thinned()
    assert len(steps) <= MOST_POINTS
    assert thinned.mean() == pytest.approx(sum(values) / len(values), rel=1e-3)
    assert len(draw("long", [curve], "a long run", from_zero=True)) < 60_000


def test_a_gap_in_a_curve_is_left_out() -> None:
    steps, values = Curve("norm", [1, 2, 3], [1.0, None, 3.0]).thinned()
    assert steps.tolist() == [1, 3] and values.tolist() == [1.0, 3.0]


def test_the_sources_of_a_mixture_are_told_one_by_one(tmp_path: Path) -> None:
    run = write_bare_run(tmp_path / "run")
    assert "Sources" not in report_page(RunFolder.read(run), 0)
    entries = [
        {"name": "boxes", "train": "shards/boxes", "epochs": 0.5},
        {"name": "captions", "train": "shards/captions", "epochs": 2},
        {"name": "pages", "train": "shards/pages", "epochs": 1},
    ]
    (run / "recipe.yaml").write_text(make_recipe({"data": {"mixture": entries}}, "a test").to_yaml())
    with (run / "metrics.jsonl").open("a") as file:
        reached = {"boxes": {"samples": 1300, "epoch": 3.25}, "captions": {"samples": 5200, "epoch": 13.0}}
        file.write("\n" + json.dumps({"step": 9, "loss": 1.0, "sources": reached}) + "\n")
    text = Page(report_page(RunFolder.read(run), 0)).text
    for said in (
        "boxes 0.5 passes an epoch 1,300 3.25 shards/boxes",
        "captions 2 passes an epoch 5,200 13 shards/captions",
        "pages 1 pass an epoch",
        "training data mixture of boxes, captions, pages",
    ):
        assert said in text, said
