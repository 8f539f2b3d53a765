"""Answers with ms-swift's `loss: false` or OpenAI's `weight: 0`: read, and not learned."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from made_coco import jpeg

from qwenvl_dist.__main__ import main
from qwenvl_dist.config import make_recipe
from qwenvl_dist.data.chat import IGNORE, ChatEncoder, EncodedChat, TooLong
from qwenvl_dist.data.draw import CaptionDraw
from qwenvl_dist.data.formats import READERS, PackInput, parse_sample_json
from qwenvl_dist.data.index import Manifest, RawSample, load_shard_index, parse_shard_index
from qwenvl_dist.data.plan import Place, RunPlan
from qwenvl_dist.data.prompts import PromptEncoder
from qwenvl_dist.data.sizes import ImageSizeRule
from qwenvl_dist.data.source import PlannedSample, ShardSet, Slot
from qwenvl_dist.data.stream import SampleEncoder
from qwenvl_dist.data.verify import verify
from qwenvl_dist.errors import UserError
from qwenvl_dist.planning.samples import look_at
from tests.made_shards import record as plain_record
from tests.made_shards import write_shards

IMAGE = {"type": "image"}


def text(words: str) -> dict[str, str]:
    return {"type": "text", "text": words}


def user(*parts: dict) -> dict[str, Any]:
    return {"role": "user", "content": list(parts)}


def answer(words: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": [text(words)], **more}


def masked(words: str) -> dict[str, Any]:
    return answer(words, loss=False)


# As a shard has it: of three answers the last and, where a test says so, another is learned.
QUESTIONS = (user(IMAGE, text("What?")), user(text("And its colour?")), user(text("Sure?")))
WORDS = ("A circle.", "It is red.", "Yes.")


def conversation(*learned: bool) -> list[dict[str, Any]]:
    answers = [answer(words) if one else masked(words) for words, one in zip(WORDS, learned, strict=False)]
    return [turn for pair in zip(QUESTIONS, answers, strict=False) for turn in pair]


def answers_of(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [message for message in messages if message["role"] == "assistant"]


def read(source: str, folder: Path, record: Any) -> list[dict[str, Any]]:
    path = folder / "in.json"
    path.write_text(json.dumps([record]))
    (sample,) = READERS[source](PackInput(path))
    return parse_sample_json(sample.to_json(), len(sample.images))["messages"]


def turns(names: tuple[str, str], roles: tuple[str, str], **members: list[Any]) -> list[dict[str, Any]]:
    """Two questions with their answers; a member has one value for each answer."""
    said = [(roles[0], "<image>What?"), (roles[1], "Hm."), (roles[0], "And?"), (roles[1], "A bus.")]
    found: list[dict[str, Any]] = [dict(zip(names, pair, strict=True)) for pair in said]
    for name, values in members.items():
        for turn, value in zip(found[1::2], values, strict=True):
            turn[name] = value
    return found


def swift(**members: list[Any]) -> list[dict[str, Any]]:
    return turns(("role", "content"), ("user", "assistant"), **members)


def sharegpt(**members: list[Any]) -> list[dict[str, Any]]:
    return turns(("from", "value"), ("human", "gpt"), **members)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "a.jpg").write_bytes(jpeg(1))
    return tmp_path


# --- how it is written ---

EXPECTED = [
    user(IMAGE, text("What?")),
    {"role": "assistant", "content": [text("Hm.")], "loss": False},
    user(text("And?")),
    {"role": "assistant", "content": [text("A bus.")]},
]


@pytest.mark.parametrize(
    "members",
    [
        {"loss": [False, True]},
        {"loss": [0, 1]},
        {"loss": [False, None]},
        {"weight": [0, 1]},
        {"weight": [0.0, 1.0]},
        {"weight": [0, None]},
        {"loss": [False, None], "weight": [1, 1]},
        {"loss_scale": [0.0, 1.0]},
    ],
    ids=str,
)
def test_either_spelling_in_every_form_of_turns(folder: Path, members: dict[str, list[Any]]) -> None:
    pictures = {"images": ["a.jpg"]}
    assert read("messages", folder, {"messages": swift(**members), **pictures}) == EXPECTED
    assert read("messages", folder, {"conversations": sharegpt(**members), **pictures}) == EXPECTED
    assert read("messages", folder, {"conversation": swift(**members), **pictures}) == EXPECTED
    assert read("llava", folder, {"conversations": sharegpt(**members), "image": "a.jpg"}) == EXPECTED
    assert read("llava", folder, {"conversations": swift(**members), "image": "a.jpg"}) == EXPECTED
    article = sharegpt(**members)
    article[0]["value"] = "<|vision_start|>a.jpg<|vision_end|>What?"
    assert read("conversations", folder, {"conversations": article}) == EXPECTED
    pairs = [
        {"human": question["content"], "assistant": said["content"], **{n: said[n] for n in members}}
        for question, said in (swift(**members)[:2], swift(**members)[2:])
    ]
    assert read("messages", folder, {"conversation": pairs, **pictures}) == EXPECTED


@pytest.mark.parametrize("form", ["turns", "columns", "pairs"])
def test_in_rows_of_a_table(folder: Path, form: str) -> None:
    rows: dict[str, Any] = {
        "turns": {"messages": swift(loss=[False, None])},
        "columns": {"conversations": {name: [turn.get(name) for turn in sharegpt(loss=[False, None])]
                                      for name in ("from", "value", "loss")}},
        "pairs": {"texts": [{"user": "What?", "assistant": "Hm.", "loss": False},
                            {"user": "And?", "assistant": "A bus.", "loss": True}]},
    }  # fmt: skip
    path = folder / "t.parquet"
    pq.write_table(pa.Table.from_pylist([{"image": jpeg(1), **rows[form]}]), path)
    (sample,) = READERS["huggingface"](PackInput(path))
    assert sample.messages == EXPECTED


def test_a_row_without_the_member_that_others_have_is_all_learned(folder: Path) -> None:
    said = sharegpt(loss=[False, None])
    columns = {name: [turn.get(name) for turn in said] for name in ("from", "value", "loss")}
    path = folder / "t.parquet"
    rows = [{"image": jpeg(1), "conversations": each} for each in (columns, {**columns, "loss": None})]
    pq.write_table(pa.Table.from_pylist(rows), path)
    first, second = READERS["huggingface"](PackInput(path))
    assert first.messages == EXPECTED
    assert second.messages == [{"role": m["role"], "content": m["content"]} for m in EXPECTED]


def test_what_changes_nothing_leaves_nothing_behind(folder: Path) -> None:
    plain = swift()
    plain.insert(0, {"role": "system", "content": "Be brief."})
    said: list[dict[str, Any]] = json.loads(json.dumps(plain))
    for turn, more in zip(
        said, [{"loss": False}, {"weight": 0, "loss": None}, {"loss": True}, {"loss": 0}, {"weight": 1}],
        strict=True,
    ):  # fmt: skip
        turn.update(more)
    pictures = {"images": ["a.jpg"]}
    found = read("messages", folder, {"messages": said, **pictures})
    assert found == read("messages", folder, {"messages": plain, **pictures})
    assert all(set(message) == {"role", "content"} for message in found)


@pytest.mark.parametrize(
    ("members", "words"),
    [
        ({"weight": [0.5, 1]}, ["messages[1] 'weight' 0.5", "true, false, 1 or 0", "drop 'weight'"]),
        ({"loss": ["no", True]}, ["messages[1] 'loss' \"no\"", "drop 'loss'"]),
        ({"loss": [True, []]}, ["messages[3] 'loss' []"]),
        ({"loss_scale": [1, 2.0]}, ["messages[3] 'loss_scale' 2.0"]),
        ({"loss": [False, 0]}, ["nothing to learn", "drop it"]),
        ({"loss": [False, None], "weight": [None, 0]}, ["nothing to learn"]),
    ],
    ids=str,
)
def test_something_in_between_and_nothing_to_learn_are_one_line(
    folder: Path, members: dict[str, list[Any]], words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    path = folder / "in.jsonl"
    path.write_text(json.dumps({"messages": swift(**members), "images": ["a.jpg"]}))
    given = ["shards", "pack", "--source", "messages", "--input", str(path), "--out", str(folder / "out")]
    with pytest.raises(SystemExit) as left:
        main(given)
    assert left.value.code == 2 and not (folder / "out").exists()
    (line,) = capsys.readouterr().err.splitlines()
    assert all(word in line for word in [f"{path}: line 1 has ", *words]), line
    with pytest.raises(
        UserError, match=r"conversations\[" if "messages[" in words[0] else "nothing to learn"
    ):
        read("llava", folder, {"conversations": sharegpt(**members), "image": "a.jpg"})


def test_a_share_of_a_users_turn_is_refused_too(folder: Path) -> None:
    said = swift()
    said[0]["weight"] = 0.5
    with pytest.raises(UserError, match=r"messages\[0\] 'weight' 0.5"):
        read("messages", folder, {"messages": said, "images": ["a.jpg"]})


# --- in shards ---


def test_packed_through_either_reader_it_is_the_same_sample_and_good(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    article = sharegpt(weight=[0, 1])
    article[0]["value"] = "<|vision_start|>a.jpg<|vision_end|>What?"
    found = []
    for source, record in (
        ("messages", {"messages": swift(loss=[False, True]), "images": ["a.jpg"]}),
        ("conversations", {"conversations": article}),
    ):
        path, out = folder / f"{source}.json", folder / source
        path.write_text(json.dumps([record]))
        assert main(["shards", "pack", "--source", source, "--input", str(path), "--out", str(out)]) == 0
        assert verify(out).bad == []
        raw = ShardSet(out).read(Place(0, 0))
        found.append((raw.key, json.loads(raw.json)["messages"], raw.images))
        index = load_shard_index(next(out.glob("*.idx")))
        assert index.caption_lengths.tolist() == [len("Hm.") + len("A bus.")]
        assert index.learned_lengths.tolist() == [len("A bus.")]
    assert found[0] == found[1] and found[0][1] == EXPECTED
    capsys.readouterr()
    assert main(["shards", "show", str(folder / "messages")]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert line.endswith("  A bus.")


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        (conversation(False, True), None),
        ([user(text("?")), answer("x", loss=True)], None),
        ([user(text("?")), answer("x", loss=None, weight=1)], None),
        ([{**user(text("?")), "loss": False, "weight": 0}, answer("x")], None),
        (conversation(False, False), "every message of the assistant has 'loss' false, so nothing to learn"),
        ([user(text("?")), answer("x", loss="no")], "messages[1] has 'loss' \"no\": it must be true or false"),
        ([user(text("?")), answer("x", loss=1)], "messages[1] has 'loss' 1: it must be true or false"),
        ([user(text("?")), answer("x", weight=0)], "messages[1] has 'weight' 0: in a shard 'loss' false says"),
        ([user(text("?")), answer("x", loss_scale=2)], "messages[1] has 'loss_scale' 2: in a shard 'loss'"),
    ],
)  # fmt: skip
def test_verify_tells_a_shards_own_spelling_from_others(
    tmp_path: Path, messages: list[dict[str, Any]], reason: str | None
) -> None:
    members = {"json": json.dumps({"messages": messages}).encode()}
    if IMAGE in messages[0]["content"]:
        members = {"jpg": jpeg(1), **members}
    faults = verify(write_shards(tmp_path / "out", [[members]])).bad
    if reason is None:
        assert faults == []
    else:
        assert len(faults) == 1 and faults[0].reason.startswith(f"json: {reason}")


@pytest.mark.parametrize(
    "said",
    [
        swift(loss=[False, None]), swift(weight=[0, 1]), sharegpt(weight=[0, 1]), conversation(False, True),
        # The form of a shard, the spelling of another program.
        [{**m, **({"weight": 0} if m["role"] == "assistant" else {})} for m in conversation(True)]
        + conversation(True, True)[2:],
    ],
    ids=["swift", "openai", "sharegpt", "ours", "parts"],
)  # fmt: skip
def test_shards_of_another_program(tmp_path: Path, said: list[dict[str, Any]]) -> None:
    name = "conversations" if "from" in said[0] else "messages"
    members = {"jpg": jpeg(1), "json": json.dumps({name: said}).encode()}
    folder = write_shards(tmp_path / "wds", [[members, members]])
    for path in [*folder.glob("*.idx"), folder / "manifest.json"]:
        path.unlink()
    assert main(["shards", "index", str(folder)]) == 0
    assert verify(folder).bad == []
    raw = ShardSet(folder).read(Place(0, 1))
    first, last = answers_of(parse_sample_json(raw.json, 1)["messages"])
    assert first["loss"] is False and "loss" not in last
    assert load_shard_index(next(folder.glob("*.idx"))).learned_lengths[0] == len(last["content"][0]["text"])


def test_a_foreign_conversation_that_teaches_nothing_is_named_or_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    samples = [
        {"jpg": jpeg(1), "json": json.dumps({"messages": swift(loss=values)}).encode()}
        for values in ([False, True], [False, False])
    ]
    folder = write_shards(tmp_path / "wds", [samples])
    for path in [*folder.glob("*.idx"), folder / "manifest.json"]:
        path.unlink()
    with pytest.raises(SystemExit) as left:
        main(["shards", "index", str(folder)])
    *_, line = capsys.readouterr().err.splitlines()
    assert left.value.code == 2 and "s00-01" in line and "nothing to learn" in line
    assert main(["shards", "index", str(folder), "--skip-bad"]) == 0
    assert Manifest.load(folder).samples == 1


def test_the_plan_counts_only_what_is_learned(tmp_path: Path) -> None:
    long = "word " * 80
    found = []
    for name, first in (("all", answer(long)), ("last", masked(long))):
        messages = [user(IMAGE, text("?")), first, user(text("And?")), answer("A bus.")]
        members = {"jpg": jpeg(1), "json": json.dumps({"messages": messages}).encode()}
        shards = write_shards(tmp_path / name, [[members] * 4])
        found.append(look_at(make_recipe({"data": {"train": str(shards)}}, "test"), 1))
    (both, all_samples), (last, masked_samples) = found
    assert np.array_equal(all_samples.text, masked_samples.text)
    assert last.target_tokens_per_sample < 5 < 80 < both.target_tokens_per_sample
    # By all words, learned or not, samples are dealt into micro-batches, and all are in the sequence. Those that are
    # not learned are estimated as prompts are, with other characters a token.
    assert last.tokens_per_sample == pytest.approx(both.tokens_per_sample, rel=0.15)


def test_lengths_that_cannot_be_are_damage_and_an_index_without_them_is_as_ever(tmp_path: Path) -> None:
    members = {"json": json.dumps({"messages": [*conversation(False, True)[2:], masked("x")]}).encode()}
    folder = write_shards(tmp_path / "out", [[members] * 2])
    index = load_shard_index(next(folder.glob("*.idx")))
    assert index.unlearned_lengths is not None and index.unlearned_lengths.tolist() == [1, 1]
    for lengths in ([1], [1, -1], [1, 100]):
        damaged = replace(index, unlearned_lengths=np.array(lengths)).to_bytes()
        with pytest.raises(UserError, match="damaged"):
            parse_shard_index(damaged, "a")
    plain = write_shards(tmp_path / "plain", [[{"json": plain_record("?", "x", images=0)}] * 2])
    assert b"unlearned" not in next(plain.glob("*.idx")).read_bytes()


# --- ids and labels ---


def assert_learned(encoded: EncodedChat, processor: Any, *words: str) -> None:
    """Compare the stretches of labels with the answers and their ends."""
    kept = encoded.labels != IGNORE
    edges = np.flatnonzero(np.diff(kept, prepend=False, append=False))
    runs = [encoded.labels[a:b].tolist() for a, b in zip(edges[::2], edges[1::2], strict=True)]
    assert runs == [processor.tokenizer(word + "<|im_end|>")["input_ids"] for word in words]
    assert np.array_equal(encoded.labels[kept], encoded.input_ids[kept])


@pytest.mark.parametrize(
    "learned",
    [(True, True, True), (False, True, True), (True, False, True), (True, True, False), (False, False, True),
     (True, False, False)],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("long_system", [False, True], ids=["kept head", "whole"])
def test_ids_stay_and_labels_differ_in_those_turns_alone(
    real_processor: Any, learned: tuple[bool, ...], long_system: bool
) -> None:
    chat = ChatEncoder(real_processor, 8192)
    system = [{"role": "system", "content": [text("word " * 400)]}] if long_system else []
    plain = chat.encode([*system, *conversation(True, True, True)], [(1, 4, 6)])
    for _ in range(2):  # the second time from what is kept
        found = chat.encode([*system, *conversation(*learned)], [(1, 4, 6)])
        assert np.array_equal(found.input_ids, plain.input_ids)
        assert np.array_equal(found.position_ids, plain.position_ids)
        assert_learned(found, real_processor, *(w for w, one in zip(WORDS, learned, strict=True) if one))
    assert bool(chat._heads) != long_system  # both ways were taken


def test_a_kept_beginning_is_of_one_mask(real_processor: Any) -> None:
    chat, grids = ChatEncoder(real_processor, 8192), [(1, 4, 6)]
    masks = [(True, True, True), (False, True, True), (True, False, True), (False, False, True)]
    for learned in [*masks, *reversed(masks)]:
        alone = ChatEncoder(real_processor, 8192).encode(conversation(*learned), grids)
        assert np.array_equal(chat.encode(conversation(*learned), grids).labels, alone.labels), learned
    assert len({key[0] for key in chat._heads}) == 1 and len(chat._heads) == len(masks)


def test_the_template_gets_role_and_content_alone(scenes_processor: Any) -> None:
    chat = ChatEncoder(scenes_processor, 512)
    chat.template = "{% for m in messages %}{{ m.keys() | list }}{% endfor %}"
    assert chat.render([user(text("?")), masked("x")]) == "['role', 'content']" * 2


def test_a_template_that_hides_a_turn_is_not_trusted_with_a_mask(scenes_processor: Any) -> None:
    chat = ChatEncoder(scenes_processor, 512)
    chat.template = (
        "{% for m in messages[:1] + messages[2:] %}"
        "<|im_start|>{{ m.role }}\n{{ m.content[0].text }}<|im_end|>\n{% endfor %}"
    )
    said = [
        user(text("a")),
        masked("a circle"),
        user(text("b")),
        answer("a square"),
        user(text("c")),
        answer("a"),
    ]
    with pytest.raises(ValueError, match="chat template makes 1 turns of the assistant out of 2"):
        chat.encode(said, [])
    chat.encode([message | {"loss": True} for message in said], [])


# --- max_length and several captions ---

LONG = " ".join(f"word{number}" for number in range(60))


def test_the_last_learned_answer_is_cut_not_the_one_before(real_processor: Any) -> None:
    said = [user(IMAGE, text("x")), masked(LONG), user(text("more")), answer(LONG)]
    whole = ChatEncoder(real_processor, 8192).encode(said, [(1, 4, 4)])
    cut = ChatEncoder(real_processor, len(whole.input_ids) - 10).encode(said, [(1, 4, 4)])
    (full,), (rest,) = ([e.labels[e.labels != IGNORE].tolist()] for e in (whole, cut))
    assert rest == full[:-11] + full[-1:] and cut.cut == 10
    with pytest.raises(TooLong):  # the unlearned one is no reserve
        ChatEncoder(real_processor, len(whole.input_ids) - len(full)).encode(said, [(1, 4, 4)])


def test_what_teaches_nothing_behind_the_last_learned_answer_goes_first(real_processor: Any) -> None:
    taught = [user(IMAGE, text("x")), answer("A circle, red.")]
    said = [*taught, user(text("more")), masked(LONG)]
    whole = ChatEncoder(real_processor, 8192).encode(said, [(1, 4, 4)])
    alone = ChatEncoder(real_processor, 8192).encode(taught, [(1, 4, 4)])
    for length in (len(whole.input_ids) - 1, len(alone.input_ids)):
        cut = ChatEncoder(real_processor, length).encode(said, [(1, 4, 4)])
        assert cut.cut == len(whole.input_ids) - len(alone.input_ids)
        for name in ("input_ids", "labels", "position_ids"):
            assert np.array_equal(getattr(cut, name), getattr(alone, name))
    shorter = ChatEncoder(real_processor, len(alone.input_ids) - 2).encode(said, [(1, 4, 4)])
    assert (shorter.labels != IGNORE).sum() == (alone.labels != IGNORE).sum() - 2
    # A picture there keeps its tokens: then the words of the answer go.
    said = [*taught, user(IMAGE, text("more")), masked("no")]
    grids = [(1, 4, 4), (1, 4, 4)]
    whole = ChatEncoder(real_processor, 8192).encode(said, grids)
    cut = ChatEncoder(real_processor, len(whole.input_ids) - 2).encode(said, grids)
    assert cut.cut == 2 and (cut.labels != IGNORE).sum() == (alone.labels != IGNORE).sum() - 2
    with pytest.raises(TooLong):
        ChatEncoder(real_processor, len(whole.input_ids) - 1, may_cut=False).encode(said, grids)


def test_only_a_learned_last_answer_is_split_into_captions(real_processor: Any) -> None:
    chat = ChatEncoder(real_processor, 8192)
    question, more = user(text("x")), user(text("more"))
    joined = "A circle.&&A red one."
    plain = [question, answer("Hm."), more, masked(joined)]
    assert chat.encode_each(plain, [], "&&").segments is None
    assert_learned(chat.encode_each(plain, [], "&&"), real_processor, "Hm.")
    assert chat.encode_each([question, answer("Hm."), more, answer(joined)], [], "&&").segments is None
    each = chat.encode_each([question, masked("Hm."), more, answer(joined)], [], "&&")
    assert each.segments is not None and each.segments.max() == 2
    learned = each.input_ids[each.labels != IGNORE].tolist()
    assert learned == real_processor.tokenizer("A circle.<|im_end|>A red one.<|im_end|>")["input_ids"]

    def drawn(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        draw = CaptionDraw(RunPlan([1], seed=0, window=1), "&&")
        raw = RawSample("k", {"json": json.dumps({"messages": messages}).encode()})
        (sample,) = draw([PlannedSample(Slot(0, 0, Place(0, 0), None), "s", raw=raw)])
        assert sample.raw is not None
        return json.loads(sample.raw.json)["messages"]

    assert drawn(plain) == plain
    chosen = drawn([question, masked("Hm."), more, answer(joined)])
    assert chosen[1] == masked("Hm.") and chosen[3]["content"][0]["text"] in joined.split("&&")


# --- what a model is asked ---


def test_the_reference_is_the_last_learned_answer_and_later_pictures_stay_away(scenes_processor: Any) -> None:
    rule = ImageSizeRule.of(56, scenes_processor)
    encoder = PromptEncoder(SampleEncoder(scenes_processor, rule, 512))
    said = [
        user(IMAGE, text("a red circle")), masked("a blue square"),
        user(text("a circle")), masked("a"), answer("a red circle"),
        user(IMAGE, text("a square")), masked("a square"),
    ]  # fmt: skip
    members = {"0.jpg": jpeg(1), "1.jpg": jpeg(2), "json": json.dumps({"messages": said}).encode()}
    prompt = encoder.encode(RawSample("k", members))
    assert prompt.asked is not None
    assert (prompt.asked.reference, prompt.asked.prompt) == ("a red circle", "a circle")
    alone = encoder.prompt(said[:4], [jpeg(1)], prompt.asked)
    assert len(prompt.grids) == 1 and prompt.input_ids.tolist() == alone.input_ids.tolist()
    assert np.array_equal(prompt.pixels, alone.pixels)
