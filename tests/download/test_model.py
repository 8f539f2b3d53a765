"""`download model` and `download dataset`, against hubs on localhost that speak the file APIs and fail on command."""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from qwenvl_dist.download import hub
from qwenvl_dist.download.repository import HubFile, select, select_model
from qwenvl_dist.errors import UserError
from tests.hub_server import COMMIT, HubServer
from tests.ranks import ROOT

WEIGHTS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
NEEDED = ["config.json", *WEIGHTS, "model.safetensors.index.json", "tokenizer.json"]


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A model's files, one of 30 MB (the Hub's client writes 10 at a time), with others that no one needs."""
    folder = tmp_path / "repository"
    (folder / "onnx").mkdir(parents=True)
    for number, name in enumerate(WEIGHTS):
        (folder / name).write_bytes(bytes(range(number, number + 200)) * (2000 if number else 150_000))
    for name in ("config.json", "model.safetensors.index.json", "tokenizer.json"):
        (folder / name).write_text(json.dumps({"name": name}))
    for name in ("pytorch_model.bin", "onnx/model.onnx", "modeling.py", "consolidated.safetensors"):
        (folder / name).write_bytes(b"not needed" * 500)
    return folder


@pytest.fixture
def server(repository: Path) -> Iterator[HubServer]:
    with HubServer(repository) as server:
        yield server


def download(
    server: HubServer,
    *words: str | Path,
    code: int = 0,
    before: Callable[[], None] | None = None,
    **environment: str,
) -> subprocess.CompletedProcess[str]:
    """Run `qwenvl-dist download` against the server and insist on the exit code."""
    done = subprocess.run(
        [sys.executable, "-m", "qwenvl_dist", "download", *map(str, words)],
        capture_output=True, text=True, timeout=120, cwd=ROOT, env=variables_of(server, **environment),
        preexec_fn=before,
    )  # fmt: skip
    assert done.returncode == code, done.stderr[-4000:]
    return done


def variables_of(server: HubServer, **environment: str) -> dict[str, str]:
    home = server.folder.parent / "home"
    return {
        **os.environ, "HF_ENDPOINT": server.url, "HF_HOME": str(home), "MODELSCOPE_ENDPOINT": server.url,
        "MODELSCOPE_CACHE": str(home / "ms"), "HF_HUB_OFFLINE": "0", "HOME": str(home), "PYTHONPATH": python_path(),
        "HF_HUB_DISABLE_TELEMETRY": "1", **environment,
    }  # fmt: skip


def python_path() -> str:
    return os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))


def files_of(folder: Path) -> list[str]:
    return sorted(
        str(path.relative_to(folder))
        for path in folder.rglob("*")
        if path.is_file() and not path.is_relative_to(folder / ".cache") and path.name != "download.json"
    )


def assert_whole(repository: Path, out: Path) -> None:
    assert files_of(out) == NEEDED
    assert all((out / name).read_bytes() == (repository / name).read_bytes() for name in NEEDED)


def test_a_model_arrives_pinned_checked_and_without_what_is_not_needed(
    server: HubServer, repository: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    for _ in range(2):  # half of it; the first is a HEAD, which has no half
        server.fail(WEIGHTS[0], "short", 1)
    server.fail(WEIGHTS[1], "503", 1)
    done = download(server, "model", "lab/tiny", "--out", out, "--json")
    assert_whole(repository, out)
    report = json.loads(done.stdout.splitlines()[-1])
    assert (report["commit"], report["files"], report["fetched"]) == (COMMIT, 5, 5)
    record = json.loads((out / "download.json").read_text())
    assert (record["source"], record["repository"], record["commit"]) == ("hf", "lab/tiny", COMMIT)
    assert record["complete"] and [entry["name"] for entry in record["files"]] == NEEDED
    assert sum(entry["sha256"] is not None for entry in record["files"]) == 2
    ranges = [r.range for r in server.requests if r.name == WEIGHTS[0] and r.range and r.method == "GET"]
    assert any(first > 0 for first, _ in ranges), "what had arrived was asked for again"
    assert not server.count("pytorch_model.bin")

    # again: nothing is fetched but what is damaged, whatever its size says
    before = server.counts()
    damaged = out / WEIGHTS[1]
    damaged.write_bytes(b"x" + damaged.read_bytes()[1:])
    (out / "config.json").unlink()
    report = json.loads(download(server, "model", "lab/tiny", "--out", out, "--json").stdout.splitlines()[-1])
    assert report["fetched"] == 2
    assert_whole(repository, out)
    assert server.counts()[WEIGHTS[0]] == before[WEIGHTS[0]]

    # the branch moved on: the folder stays what it is
    server.commit = "f" * 40
    message = download(server, "model", "lab/tiny", "--out", out, code=2).stderr
    assert f"holds commit {COMMIT}" in message and f"pass --revision {COMMIT}" in message


def test_bytes_that_are_not_the_hubs_are_never_accepted(server: HubServer, tmp_path: Path) -> None:
    out = tmp_path / "out"
    server.fail(WEIGHTS[0], "wrong")
    message = download(server, "model", "lab/tiny", "--out", out, code=1).stderr
    assert f"{WEIGHTS[0]} has another sha256 than on the hub, fetched 2 times" in message
    assert not json.loads((out / "download.json").read_text())["complete"]
    server.heal()
    download(server, "model", "lab/tiny", "--out", out)
    assert_whole(server.folder, out)


def test_a_wrong_size_is_found(server: HubServer, tmp_path: Path) -> None:
    server.lies["tokenizer.json"] = 7
    message = download(server, "model", "lab/tiny", "--out", tmp_path / "out", code=1).stderr
    assert "tokenizer.json has 26 bytes, the hub has 7" in message


@pytest.mark.parametrize(
    ("words", "variables", "message"),
    [
        (["lab/other"], {}, "lab/other: no such model on http://127.0.0.1:"),
        (["lab/tiny", "--revision", "v9"], {}, "lab/tiny: has no revision 'v9'"),
        (["lab/tiny/x"], {}, "lab/tiny/x: "),
        (["lab/tiny"], {"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE is set"),
        (["lab/tiny", "--connections", "0"], {}, "--connections 0: must be at least 1"),
    ],
)
def test_a_mistake_is_one_line(
    server: HubServer, tmp_path: Path, words: list[str], variables: dict[str, str], message: str
) -> None:
    done = download(server, "model", *words, "--out", tmp_path / "out", code=2, **variables)
    assert message in done.stderr and done.stderr.startswith("error: ")
    assert len(done.stderr.strip().splitlines()) == 1


def test_terms_that_must_be_accepted_are_named(server: HubServer, tmp_path: Path) -> None:
    server.gated = True
    message = download(server, "model", "lab/tiny", "--out", tmp_path / "out", code=2).stderr
    assert "lab/tiny: its owner wants terms accepted" in message


def test_a_folder_with_other_things_is_left_alone(server: HubServer, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.tex").write_text("mine")
    message = download(server, "model", "lab/tiny", "--out", out, code=2).stderr
    assert "holds other data (thesis.tex)" in message and files_of(out) == ["thesis.tex"]


def test_a_datasets_files_can_be_narrowed_down(server: HubServer, tmp_path: Path) -> None:
    out = tmp_path / "out"
    download(
        server,
        "dataset",
        "lab/tiny",
        "--files",
        "onnx/*",
        "--files",
        "*.py",
        "--revision",
        "v1",
        "--out",
        out,
    )
    assert files_of(out) == ["modeling.py", "onnx/model.onnx"]
    message = download(
        server, "dataset", "lab/tiny", "--files", "*.csv", "--out", tmp_path / "b", code=2
    ).stderr
    assert "no file matches *.csv; it holds config.json" in message
    message = download(server, "dataset", "lab/tiny", "--limit", "3", "--out", tmp_path / "c", code=2).stderr
    assert "--limit goes with --split" in message


def test_one_split_is_written_as_a_folder_of_datasets(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    folder = tmp_path / "repository"
    (folder / "data").mkdir(parents=True)
    rows = {"caption": [f"caption {i}" for i in range(7)], "image_id": list(range(7))}
    datasets.Dataset.from_dict(rows).to_parquet(folder / "data" / "train-00000-of-00001.parquet")
    out = tmp_path / "split"
    with HubServer(folder) as server:
        download(server, "dataset", "lab/tiny", "--split", "train", "--limit", "5", "--out", out)
        assert datasets.load_from_disk(out)["caption"] == rows["caption"][:5]
        assert (
            "is there already"
            in download(server, "dataset", "lab/tiny", "--split", "train", "--out", out, code=2).stderr
        )
        (tmp_path / "file").write_text("")
        words = ["--split", "train", "--out", tmp_path / "file" / "out"]
        message = download(server, "dataset", "lab/tiny", *words, code=2).stderr
        assert "out: cannot be written (" in message.splitlines()[-1] and "Traceback" not in message
        message = download(
            server, "dataset", "lab/tiny", "--split", "dev", "--out", tmp_path / "b", code=2
        ).stderr
        assert "lab/tiny: " in message and "dev" in message and not (tmp_path / "b").exists()


def test_modelscope_brings_the_same_files(server: HubServer, repository: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    server.fail(WEIGHTS[0], "reset", 1)
    download(server, "model", "lab/tiny", "--source", "modelscope", "--out", out)
    assert_whole(repository, out)
    record = json.loads((out / "download.json").read_text())
    assert record["commit"] is None and all(len(entry["sha256"]) == 64 for entry in record["files"])
    (repository / "config.json").write_text("{}")
    message = download(server, "model", "lab/tiny", "--source", "modelscope", "--out", out, code=2).stderr
    assert "holds other files of lab/tiny" in message
    message = download(
        server,
        "model",
        "lab/tiny",
        "--source",
        "modelscope",
        "--revision",
        "v9",
        "--out",
        tmp_path / "b",
        code=2,
    ).stderr
    assert "no such model on ModelScope at v9" in message


@pytest.mark.parametrize(("kind", "more"), [("model", []), ("dataset", ["--split", "train"])])
def test_a_missing_sdk_is_one_line_with_the_remedy(
    server: HubServer, tmp_path: Path, kind: str, more: list[str]
) -> None:
    hidden = tmp_path / "hidden"
    hidden.mkdir()
    for name in ("modelscope", "modelscope_hub"):
        (hidden / f"{name}.py").write_text("raise ImportError('No module named modelscope')")
    path = os.pathsep.join([str(hidden), python_path()])
    words = [kind, "lab/tiny", "--source", "modelscope", *more, "--out", tmp_path / "out"]
    done = download(server, *words, code=2, PYTHONPATH=path)
    assert "pip install 'qwenvl-dist[modelscope]'" in done.stderr and len(done.stderr.splitlines()) == 1


def test_a_split_of_modelscope_goes_through_msdataset(server: HubServer, tmp_path: Path) -> None:
    """Its real class needs another version of `datasets`; a stand-in shows what it is asked and what becomes of it."""
    pytest.importorskip("datasets")
    package = tmp_path / "sdk" / "modelscope" / "msdatasets"
    package.mkdir(parents=True)
    (package.parent / "__init__.py").write_text("")
    (package / "__init__.py").write_text(
        "from datasets import Dataset\n"
        "class MsDataset:\n"
        "    @staticmethod\n"
        "    def load(dataset_name, subset_name=None, split=None, version='master'):\n"
        "        MsDataset.asked = [dataset_name, subset_name, split, version]\n"
        "        return MsDataset()\n"
        "    def to_hf_dataset(self):\n"
        "        return Dataset.from_dict({'asked': MsDataset.asked})\n"
    )
    out = tmp_path / "out"
    words = [
        "modelscope/coco",
        "--source",
        "modelscope",
        "--split",
        "train",
        "--subset",
        "coco",
        "--out",
        out,
    ]
    download(server, "dataset", *words, PYTHONPATH=os.pathsep.join([str(tmp_path / "sdk"), python_path()]))
    import datasets

    assert datasets.load_from_disk(out)["asked"][:] == ["modelscope/coco", "coco", "train", "master"]


def most_bytes() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (5_000_000, 5_000_000))


def test_a_disk_that_takes_no_more_is_one_line(server: HubServer, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = download(server, "model", "lab/tiny", "--out", out, code=2, before=most_bytes)
    assert "cannot be written (File too large); free some room" in done.stderr.splitlines()[-1]
    assert WEIGHTS[0] not in files_of(out)
    assert server.count(WEIGHTS[0]) < 4, "no use in asking again"
    download(server, "model", "lab/tiny", "--out", out)
    assert_whole(server.folder, out)


def test_a_file_that_the_hub_lists_and_has_not_is_named_at_once(server: HubServer, tmp_path: Path) -> None:
    server.fail("config.json", "404")
    message = download(server, "model", "lab/tiny", "--out", tmp_path / "out", code=1).stderr
    assert "answers 404 for a file that it lists" in message and "tried" not in message


def test_ctrl_c_ends_a_download_at_once(server: HubServer, tmp_path: Path) -> None:
    server.fail(WEIGHTS[0], "", 1)  # the question for its size is answered
    server.fail(WEIGHTS[0], "stall")
    words = [
        sys.executable,
        "-m",
        "qwenvl_dist",
        "download",
        "model",
        "lab/tiny",
        "--out",
        str(tmp_path / "out"),
    ]
    with subprocess.Popen(
        words, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=variables_of(server),
        # A shell that starts the tests in the background has them ignore SIGINT, and a child inherits that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL) and None,
    ) as process:  # fmt: skip
        try:
            deadline = time.monotonic() + 60
            while not server.count(WEIGHTS[0]):
                assert time.monotonic() < deadline and process.poll() is None
                time.sleep(0.1)
            time.sleep(0.5)
            process.send_signal(signal.SIGINT)
            error = process.communicate(timeout=10)[1]
        finally:
            process.kill()  # else the end of this block would wait for it
    assert process.returncode == 1 and "Traceback" not in error
    assert error.splitlines()[-1] == "error: interrupted; the same command goes on where it stopped"
    server.heal()
    download(server, "model", "lab/tiny", "--out", tmp_path / "out")
    assert_whole(server.folder, tmp_path / "out")


def test_what_a_model_needs() -> None:
    def files(*names: str) -> list[HubFile]:
        return [HubFile(name, 1) for name in names]

    chosen = select_model(
        files("config.json", "model.safetensors", "vocab.json", "x/config.json", "a.bin"), "id"
    )
    assert [file.name for file in chosen] == ["config.json", "model.safetensors", "vocab.json"]
    with pytest.raises(UserError, match="no safetensors weights"):
        select_model(files("config.json", "pytorch_model.bin"), "id")
    with pytest.raises(UserError, match=r"has no config\.json"):
        select_model(files("model.safetensors"), "id")
    with pytest.raises(UserError, match="outside of itself"):
        select(files("../../.bashrc"), ["*"], "id")


def test_a_full_disk_is_known_before_the_download(
    server: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qwenvl_dist.download import snapshot

    class Small:
        free = 1000

    monkeypatch.setattr(snapshot.shutil, "disk_usage", lambda path: Small)
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    repository = hub.HubRepository("lab/tiny", "model")
    with pytest.raises(UserError, match=r"GiB are to be fetched, 0\.0 GiB are free"):
        snapshot.snapshot(repository, repository.files(), tmp_path / "out")
