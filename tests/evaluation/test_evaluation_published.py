"""A paper's numbers beside ours: which row, what makes a protocol another, and the table."""

from dataclasses import replace
from typing import Any

import pytest

from pixart.config import KVCompression
from pixart.evaluation.protocols.protocol import (
    Column,
    Protocol,
    Row,
    Stated,
    Table,
    Use,
    load_protocol,
)
from pixart.evaluation.protocols.published import (
    Used,
    kv_words,
    paper_table,
    row_of,
    same_protocol,
    table_text,
    with_paper,
)

STATED = Stated("coco", 30_000, 1, "256x256", "ddim", 50, 7.5, "mplug")
COLUMN = Column("FID", "fid", higher_is_better=False, constants={"resize": "clean"})
TABLE = Table("a paper", (COLUMN,), (Row("theirs", {"FID": 10.0}),), "theirs", STATED)
PROTOCOL = Protocol("a", "a table", "coco", 30_000, (Use("fid"),), paper=TABLE)
SAME = {"fid": {"resize": "clean", "judge": "mplug"}}


def answer(**other: Any) -> tuple[bool, list[str]]:
    used = Used(replace(STATED, **other), "mine", constants=SAME)
    return same_protocol(PROTOCOL, COLUMN, TABLE.rows[0], used)


def test_the_same_settings_are_the_same_protocol() -> None:
    assert answer() == (True, [])


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("set", "mjhq", "the prompts are mjhq, the table's are coco"),
        ("count", 500, "500 prompts, the table has 30,000"),
        ("images_per_prompt", 4, "4 pictures of a prompt, the table has 1"),
        ("size", "512x512", "the pictures are 512x512, the table's are 256x256"),
        ("scheduler", "euler", "the sampler is euler, the table's is ddim"),
        ("steps", 20, "20 steps, the table has 50"),
        ("guidance", 4.5, "guidance 4.5, the table has 7.5"),
    ],
)
def test_every_setting_that_is_another_is_a_reason(name: str, value: object, reason: str) -> None:
    assert answer(**{name: value}) == (False, [reason])


def test_another_judge_and_another_constant_of_the_metric_are_reasons() -> None:
    used = Used(STATED, "mine", constants={"fid": {"resize": "tf", "judge": "checker"}})
    same, because = same_protocol(PROTOCOL, COLUMN, TABLE.rows[0], used)
    assert not same
    assert because == [
        "the judge is checker, the table's is mplug",
        "resize of fid is tf, the table's is clean",
    ]


def test_pictures_that_are_missing_are_a_reason() -> None:
    metrics = {"fid": {"constants": SAME["fid"], "values": {}}}
    protocol = {"set": "coco", "prompts": 30_000, "images_per_prompt": 1, "size": "256x256"}
    whole = {"protocol": protocol, "model": "mine", "metrics": metrics}
    part = {**whole, "metrics": {"fid": {**metrics["fid"], "left_out": 1_200}}}
    for results, because in (
        (whole, []),
        (part, ["1,200 pictures are missing or cannot be scored"]),
    ):
        used = Used.of(results)
        assert same_protocol(PROTOCOL, COLUMN, TABLE.rows[0], used) == (not because, because)


def test_what_a_paper_leaves_open_is_no_difference_unless_the_file_says_so() -> None:
    protocol = replace(PROTOCOL, paper=replace(TABLE, stated=Stated()), differs=("a sentence",))
    used = Used(replace(STATED, steps=1), "mine", constants=SAME)
    column = replace(COLUMN, differs=("another",))
    assert same_protocol(protocol, column, TABLE.rows[0], used) == (
        False,
        ["another", "a sentence"],
    )


@pytest.mark.parametrize(
    ("model", "models", "reason"),
    [
        ("sigma-512", (), "the weights of 'theirs' are not published"),
        ("sigma-512", ("PixArt-alpha/PixArt-Sigma-XL-2-512-MS",), None),
        ("alpha-256", ("PixArt-XL-2-256x256",), None),
        (
            "alpha-256",
            ("PixArt-alpha/PixArt-alpha",),
            "the weights are alpha-256, those of 'theirs' are",
        ),
        ("mine", (), None),
        ("sigma-512", ("anything",), "the weights are sigma-512"),
    ],
)
def test_a_published_checkpoint_must_be_the_tables(
    model: str, models: tuple[str, ...], reason: str | None
) -> None:
    row = Row("theirs", {"FID": 10.0}, models=models)
    _, because = same_protocol(PROTOCOL, COLUMN, row, Used(STATED, model, constants=SAME))
    assert [one.startswith(reason or "-") for one in because] == [True] * (reason is not None)


@pytest.mark.parametrize(
    ("layers", "words"),
    [((14, 15, 16), "14-16:2:conv"), ((3, 5, 6), "3,5-6:2:conv"), ((7,), "7:2:conv")],
)
def test_compression_in_words_is_read_back(layers: tuple[int, ...], words: str) -> None:
    compression = KVCompression(layers)
    assert kv_words(compression) == words
    assert KVCompression.parse(words) == compression


def test_no_compression_is_no_words() -> None:
    assert kv_words(None) == kv_words(KVCompression((1, 2), ratio=1)) == ""


@pytest.mark.parametrize(
    ("compression", "size", "row"),
    [
        (None, "512x512", "(a) none, 512 px"),
        (KVCompression(tuple(range(1, 15))), "512x512", "(a) shallow blocks 1-14"),
        (KVCompression(tuple(range(7, 21))), "512x512", "(a) middle blocks 7-20"),
        (KVCompression(tuple(range(14, 28))), "512x512", "(a) deep blocks 14-27"),
        (KVCompression(tuple(range(14, 28)), 2, "average"), "512x512", "(b) token pooling, mean"),
        (None, "1024x1024", "(c) 1024 px, ratio 1"),
        (KVCompression(tuple(range(14, 28))), "1024x1024", "(c) 1024 px, ratio 4"),
        (KVCompression(tuple(range(14, 28)), 3), "1024x1024", "(c) 1024 px, ratio 9"),
    ],
)
def test_a_model_stands_beside_the_row_of_its_compression_and_size(
    compression: KVCompression | None, size: str, row: str
) -> None:
    table = load_protocol("sigma-table-3").paper
    assert table is not None
    used = Used(Stated(size=size), "runs/mine", kv_words(compression))
    assert row_of(table, used).name == row


@pytest.mark.parametrize(
    ("steps", "scheduler", "row"), [(50, "ddim", "50 steps"), (1, "dmd", "1 step")]
)
def test_a_model_stands_beside_the_row_of_its_steps(steps: int, scheduler: str, row: str) -> None:
    table = load_protocol("mobile").paper
    assert table is not None
    done = Stated(set="coco", size="512x512", steps=steps, scheduler=scheduler)
    assert row_of(table, Used(done, "mine")).name == f"MobileDiffusion, {row}"


def results(protocol: Protocol, **metrics: Any) -> dict[str, Any]:
    return {
        "protocol": protocol.record(id=f"{protocol.name}/12345678", prompts=protocol.count),
        "model": "mine",
        "metrics": metrics,
    }


def estimate(value: float, half: float) -> dict[str, Any]:
    return {"value": value, "low": value - half, "high": value + half, "n": 5, "notes": []}


def metric(value: float, half: float, **constants: str) -> dict[str, Any]:
    return {"constants": constants, "values": {"fid": estimate(value, half)}}


@pytest.mark.parametrize(
    ("value", "half", "verdict"),
    [
        (9.0, 0.1, "better"),
        (11.0, 0.1, "worse"),
        (9.0, 1.5, "inconclusive"),
        (9.9, 0.01, "inconclusive"),
    ],
)
def test_a_number_of_the_same_protocol_has_a_verdict(
    value: float, half: float, verdict: str
) -> None:
    protocol = replace(PROTOCOL, paper=replace(TABLE, stated=Stated()))
    found = paper_table(protocol, results(protocol, fid=metric(value, half, resize="clean")))
    assert found is not None and found["columns"][0]["verdict"] == verdict


def test_a_number_of_another_protocol_is_not_comparable() -> None:
    found = paper_table(PROTOCOL, results(PROTOCOL, fid=metric(9.0, 0.1)))
    assert found is not None
    assert found["columns"][0]["verdict"] == "not comparable"
    assert not found["columns"][0]["same_protocol"]


def test_an_interval_whose_ends_are_not_known_decides_nothing() -> None:
    protocol = replace(PROTOCOL, paper=replace(TABLE, stated=Stated()))
    ours = {**estimate(9.0, 0.1), "low": None, "high": None}
    table = paper_table(
        protocol,
        results(protocol, fid={"constants": {"resize": "clean"}, "values": {"fid": ours}}),
    )
    assert table is not None
    assert table["columns"][0]["ours"] == {"value": 9.0, "low": None, "high": None, "n": 5}
    assert table["columns"][0]["verdict"] == "inconclusive"
    assert "9 [?, ?]" in table_text(table)


def test_settings_that_were_left_to_the_model_are_compared_as_it_took_them() -> None:
    done = results(PROTOCOL, fid=metric(9.0, 0.1, resize="clean"))
    done["protocol"]["resolved"] = {"steps": 20, "size": "256x256"}
    found = paper_table(PROTOCOL, done)
    assert found is not None
    assert "20 steps, the table has 50" in found["columns"][0]["because"]
    assert not any("pictures are" in one for one in found["columns"][0]["because"])


def test_results_get_the_papers_number_in_the_metrics_unit_and_by_category() -> None:
    protocol = load_protocol("shapes")
    values = {"shapes": estimate(0.9, 0.01)}
    done = results(protocol, shapes={"values": values, "categories": {"pair": values}})
    found = with_paper(protocol, done)
    paper = found["metrics"]["shapes"]["paper"]["pair/shapes"]
    assert paper["value"] == pytest.approx(0.98)
    assert paper["because"] == ["300 prompts, the table has 1,500"]
    ours = {one["name"]: one["ours"] for one in found["paper"]["columns"]}
    assert ours["pair"]["value"] == pytest.approx(90) and ours["one"] is None


def test_a_protocol_without_a_table_leaves_results_as_they_are() -> None:
    protocol = load_protocol("dpg")
    done = results(protocol)
    assert paper_table(protocol, done) is None and with_paper(protocol, done) == done


def test_the_text_has_every_row_ours_and_one_answer_for_columns_that_share_it() -> None:
    protocol = load_protocol("alpha-table-3")
    category = {"compbench": estimate(0.5, 0.01)}
    done = results(
        protocol,
        compbench={"values": {}, "categories": dict.fromkeys(("color", "shape"), category)},
    )
    table = paper_table(protocol, done)
    assert table is not None
    text = table_text(table)
    assert "> PixArt-α" in text and "ours: mine" in text and "0.5 [0.49, 0.51]" in text
    assert text.count("same protocol? no") == 1 and "every column: same protocol? no" in text


def test_a_table_of_many_columns_is_turned_to_fit_a_terminal() -> None:
    protocol = load_protocol("shapes")
    values = {"shapes": estimate(0.9, 0.01)}
    done = results(protocol, shapes={"values": values, "categories": {"pair": values}})
    table = paper_table(protocol, done)
    assert table is not None
    lines = table_text(table).splitlines()[1:]
    body = lines[: lines.index("")]
    assert max(map(len, body)) <= 100 and len(body) == 1 + len(table["columns"])
    assert "> shapes" in body[0] and body[2].split()[:2] == ["pair", "98"]


def test_several_models_stand_in_one_table_each_beside_its_row() -> None:
    protocol = load_protocol("sigma-table-3")
    tables = []
    for name, compression in (("dense", None), ("deep", KVCompression(tuple(range(14, 28))))):
        done = results(protocol, clip={"values": {"clip": estimate(0.27, 0.01)}})
        done["model"] = name
        done["protocol"]["kv_compress"] = kv_words(compression)
        table = paper_table(protocol, done)
        assert table is not None
        tables.append(table)
    text = table_text(*tables)
    assert "> (a) none, 512 px" in text and "> (a) deep blocks 14-27" in text
    assert "deep beside '(a) deep blocks 14-27', every column: same protocol? no" in text
    assert "? not read in the paper itself" in text


@pytest.mark.parametrize(
    ("ours", "theirs", "same"),
    [
        ("blip-vqa-1:blip-vqa-capfilt-large", "Salesforce/blip-vqa-capfilt-large", True),
        ("chat-1:blip-vqa-capfilt-large", "Salesforce/blip-vqa-capfilt-base", False),
        ("checker-1", "mplug-large", False),
    ],
)
def test_a_judge_is_known_by_its_name(ours: str, theirs: str, same: bool) -> None:
    column = replace(COLUMN, stated=Stated(judge=theirs), constants={})
    used = Used(STATED, "mine", constants={"fid": {"judge": ours}})
    assert same_protocol(PROTOCOL, column, TABLE.rows[0], used)[0] is same
