"""Protocols: shipped files, what is refused, and what makes an id."""

import json
import re
from dataclasses import fields
from pathlib import Path

import pytest

import pixart
from pixart.config import KVCompression
from pixart.evaluation.metrics import METRICS
from pixart.evaluation.protocols.protocol import Protocol, Sampling, Use, load_protocol, shipped
from pixart.evaluation.running.record import protocol_of
from pixart.evaluation.store.entries import Prompt

MINIMAL = "title: mine\nset: lines\ncount: 3\nmetrics: [{name: clip}]\n"


def mine(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize("name", shipped())
def test_every_shipped_protocol_loads_under_its_files_name(name: str) -> None:
    assert load_protocol(name).name == name


def test_a_file_of_ones_own_is_named_after_itself(tmp_path: Path) -> None:
    assert load_protocol(mine(tmp_path, MINIMAL)).name == "mine"


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        (MINIMAL + "metrcs: []\n", r"metrcs is unknown; did you mean 'metrics'\?"),
        (MINIMAL + "sampling: {stps: 3}\n", r"sampling.stps is unknown; did you mean 'steps'\?"),
        (MINIMAL.replace("3", "three"), "count must be a whole number, got 'three'"),
        (MINIMAL.replace("3", "true"), "count must be a whole number, got True"),
        (MINIMAL.replace("3", "0"), "count must be from 1 to 10,000,000, got 0"),
        (MINIMAL + "size: 512\n", "size must be text; put it in quotes, got 512"),
        (
            MINIMAL + "size: 9000x1\n",
            "size must be WIDTHxHEIGHT, each 1 to 8192 pixels, got '9000x1'",
        ),
        (MINIMAL + "sampling: {guidance: .inf}\n", "sampling.guidance must be a finite number"),
        (MINIMAL + "seed_rule: random\n", "seed_rule must be one of prompt, category, same"),
        (MINIMAL.replace("[{name: clip}]", "[]"), "metrics must name one at least"),
        (MINIMAL.replace("[{name: clip}]", "[clip]"), r"metrics\[0\] must be a mapping of fields"),
        (MINIMAL.replace("title: mine", ""), "title must be given"),
        ("- a\n", "it must be a mapping of fields"),
    ],
)
def test_a_wrong_file_is_refused_in_one_line_with_file_and_field(
    tmp_path: Path, text: str, rule: str
) -> None:
    path = mine(tmp_path, text)
    with pytest.raises(ValueError, match=rule) as error:
        load_protocol(path)
    assert str(error.value).startswith(f"{path}: ")
    assert "\n" not in str(error.value)


def test_an_unknown_name_is_refused_with_the_nearest() -> None:
    with pytest.raises(ValueError, match="did you mean 'shapes'"):
        load_protocol("shape")


def small(**fields: object) -> Protocol:
    values = {"name": "a", "title": "", "set": "lines", "count": 2, "metrics": (Use("clip"),)}
    return Protocol(**{**values, **fields})  # type: ignore[arg-type]


def prompts(*categories: str) -> list[Prompt]:
    return [Prompt(f"{k}", "text", category=one) for k, one in enumerate(categories)]


@pytest.mark.parametrize(
    ("rule", "seeds"),
    [
        ("prompt", [5, 6, 7, 8, 9, 10]),
        ("category", [5, 6, 5, 6, 7, 8]),
        ("same", [5, 6, 5, 6, 5, 6]),
    ],
)
def test_seeds_follow_the_rule(rule: str, seeds: list[int]) -> None:
    protocol = small(seed=5, seed_rule=rule, images_per_prompt=2)
    found = list(protocol.seeds(prompts("a", "b", "a")))
    assert [seed for _, _, seed in found] == seeds
    assert [sample for _, sample, _ in found] == [0, 1] * 3


def test_what_the_command_line_gave_instead_is_listed() -> None:
    changed = small(sampling=Sampling(steps=20)).changed(
        count=2, size="64", steps=3, guidance=2, metrics=["shapes"]
    )
    assert changed.changes == (
        "size None → 64x64",
        "steps 20 → 3",
        "guidance None → 2.0",
        "metrics clip → shapes",
    )


DECIDING = {
    "set": "coco",
    "count": 3,
    "metrics": (Use("clip", {"long": "mean"}),),
    "images_per_prompt": 2,
    "prompt_seed": 1,
    "seed": 1,
    "seed_rule": "same",
    "size": "64x64",
    "sampling": Sampling(steps=3),
    "reference": "set",
}
SAYING = {
    "title": "other words",
    "differs": ("in nothing that is computed",),
    "paper": load_protocol("shapes").paper,
}


def test_every_field_either_decides_a_number_or_says_what_it_is() -> None:
    names = {one.name for one in fields(Protocol)}
    assert names == {*DECIDING, *SAYING, "name", "changes"}


@pytest.mark.parametrize("name", DECIDING)
def test_what_decides_a_number_changes_the_id(name: str) -> None:
    assert small(**{name: DECIDING[name]}).id("a", {}) != small().id("a", {})


@pytest.mark.parametrize("one", [one.name for one in fields(Sampling)])
def test_every_sampling_setting_changes_the_id(one: str) -> None:
    value = {
        "scheduler": "ddim",
        "steps": 3,
        "guidance": 1.0,
        "guidance_interval": (0.0, 0.5),
        "negative": "blur",
    }[one]
    assert small(sampling=Sampling(**{one: value})).id("a", {}) != small().id("a", {})


@pytest.mark.parametrize("name", SAYING)
def test_what_only_says_something_does_not_change_the_id(name: str) -> None:
    assert small(**{name: SAYING[name]}).id("a", {}) == small().id("a", {})


def test_prompts_metrics_model_and_reference_change_the_id() -> None:
    metric = {"version": "1", "constants": {"resize": "clean"}}
    ids = [
        small().id("a", {}),
        small().id("b", {}),
        small().id("a", {"clip": metric}),
        small().id("a", {"clip": metric | {"version": "2"}}),
        small().id("a", {"clip": metric | {"constants": {"resize": "tf"}}}),
        small().id("a", {}, {"dtype": "bf16"}),
        small().id("a", {}, None, "digest"),
    ]
    assert len(set(ids)) == len(ids)
    assert all(re.fullmatch(r"a/[0-9a-f]{8}", one) for one in ids)


def test_the_order_of_metrics_identities_is_none_of_the_id() -> None:
    one, other = {"version": "1"}, {"version": "2"}
    assert small().id("a", {"x": one, "y": other}) == small().id("a", {"y": other, "x": one})


def test_a_change_back_has_the_id_of_the_file() -> None:
    protocol = load_protocol("shapes")
    assert protocol.changed(steps=3).changed(steps=20).id("a", {}) == protocol.id("a", {})


@pytest.mark.parametrize("name", shipped())
def test_a_shipped_table_says_where_it_is_from_and_has_numbers_of_every_row(name: str) -> None:
    table = load_protocol(name).paper
    if table is None:
        assert name == "dpg"
        return
    assert re.search(r"arXiv:\d{4}\.\d{5}|README", table.source)
    for row in table.rows:
        assert row.values
        if row.kv_compress:
            KVCompression.parse(row.kv_compress)


# Of the tables: rows, numbers of the column, and the range of what such a number can be.
@pytest.mark.parametrize(
    ("name", "column", "count", "least", "most"),
    [
        ("alpha-table-2", "FID-30K", 9, 6.61, 27.5),
        ("alpha-table-3", "color", 9, 0.3765, 0.6886),
        ("alpha-table-3", "complex", 9, 0.2898, 0.4117),
        ("sigma-table-3", "FID", 15, 5.512, 9.415),
        ("sigma-table-3", "CLIP", 15, 0.273, 0.277),
        ("sigma-table-6", "FID", 8, 7.38, 17.03),
        ("sigma-table-6", "CLIP", 8, 0.2748, 0.2913),
        ("sigma-dmd", "FID", 5, 9.273, 108.66),
        ("scalability", "FID", 3, 17.9, 18.9),
        ("scalability-tifa", "TIFA", 8, 0.78, 0.84),
        ("mobile", "FID", 3, 8.23, 11.67),
        ("geneval", "overall", 4, 0.43, 0.61),
        ("hps", "mean", 22, 23.55, 27.86),
        ("shapes", "pair", 2, 93.3, 98.0),
    ],
)
def test_a_column_has_as_many_numbers_as_the_paper_and_their_range(
    name: str, column: str, count: int, least: float, most: float
) -> None:
    table = load_protocol(name).paper
    assert table is not None
    values = [row.values[column] for row in table.rows if column in row.values]
    assert (len(values), min(values), max(values)) == (count, least, most)


def test_the_mean_of_the_preference_table_is_that_of_its_styles() -> None:
    table = load_protocol("hps").paper
    assert table is not None
    for row in table.rows:
        styles = [row.values[one] for one in ("animation", "concept art", "painting", "photo")]
        # Each was rounded to two digits, and so was the mean.
        assert abs(sum(styles) / 4 - row.values["mean"]) <= 0.01 + 1e-9


def test_the_card_of_the_embedded_model_has_the_protocols_numbers() -> None:
    table = load_protocol("shapes").paper
    assert table is not None
    card = (Path(pixart.__file__).parent / "assets/shapes/README.md").read_text()
    rows = re.findall(
        r"\| 300 × ([a-z, ]+), 128 px \| \*\*([\d.]+) %\*\*.* ([\d.]+) \| [\d.]+ \|", card
    )
    right = [float(one) for _, one, _ in rows]
    clean = [float(one) for _, _, one in rows]
    order = ["one", "pair", "group", "unseen one", "unseen pair"]
    for k, row in enumerate(table.rows):
        assert [row.values[one] for one in order] == right[5 * k : 5 * k + 5]
        assert [row.values[f"{one}, clean"] for one in order] == clean[5 * k : 5 * k + 5]


@pytest.mark.parametrize("name", shipped())
def test_what_a_folder_keeps_is_the_whole_protocol(name: str) -> None:
    protocol = load_protocol(name).changed(count=7)
    kept = json.loads(json.dumps(protocol.record(id=f"{name}/12345678", prompts=7)))
    assert protocol_of(kept) == protocol
    assert protocol_of(kept).changes == protocol.changes


@pytest.mark.parametrize("name", shipped())
def test_metrics_of_a_shipped_protocol_are_known_and_its_columns_are_of_them(name: str) -> None:
    protocol = load_protocol(name)
    names = {one.name for one in protocol.metrics}
    assert names <= METRICS.keys()
    if protocol.paper is not None:
        assert {one.metric for one in protocol.paper.columns} <= names | {""}
