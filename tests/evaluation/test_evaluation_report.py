"""The report of evaluated folders: what stands in it, what cannot break it, and that it is always the same."""

import json
import math
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import evaluated
import pytest

from pixart.evaluation.metric import Estimate, Score
from pixart.evaluation.protocols.protocol import load_protocol
from pixart.evaluation.protocols.published import with_paper
from pixart.evaluation.report import figures, gallery, numbers, write_report
from pixart.evaluation.report.columns import command_of
from pixart.evaluation.report.folder import open_evaluated
from pixart.evaluation.report.writing import file_name
from pixart.evaluation.store.entries import Entry, Prompt
from pixart.evaluation.store.parts import Row, ScoreStore

VOID = {"meta", "img", "br", "hr"}
INTERVAL = re.compile(r"\[[^\]]+, [^\]]+\]")


class Page(HTMLParser):
    """Elements with their attributes, and the text; every element must be closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text, self.open = "", []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return evaluated.build(tmp_path / "shapes-20")


def report(*folders: Path) -> Page:
    return Page(write_report(folders).read_text(encoding="utf-8"))


def test_the_same_results_give_the_same_bytes(folder: Path) -> None:
    def contents() -> dict[str, bytes]:
        write_report([folder])
        files = [folder / "report.html", folder / "README.md", *(folder / "plots").iterdir()]
        return {path.name: path.read_bytes() for path in files}

    first = contents()
    assert set(first) == {
        "report.html",
        "README.md",
        "clip-by-category.svg",
        "shapes-by-category.svg",
    }
    assert contents() == first


def test_a_row_has_our_number_its_interval_the_papers_and_why_they_differ(folder: Path) -> None:
    write_report([folder])
    results = evaluated.results_of(folder)["metrics"]["clip"]["values"]["clip"]
    ours = f"{results['value']:.3f} [{results['low']:.3f}, {results['high']:.3f}]"
    row = next(
        line
        for line in (folder / "README.md").read_text().splitlines()
        if line.startswith("| clip")
    )
    assert row == (
        f"| clip | {ours} | 0.2797 (PixArt-Σ, Table 6) | no, because 30 prompts, the paper has 30,000; "
        "another set of prompts | 30 |"
    )
    page = report(folder).text
    for words in (*ours.split(" ", 1), "0.2797", "PixArt-Σ, Table 6", "another set of prompts"):
        assert words in page


def test_no_number_is_shown_without_its_interval(folder: Path) -> None:
    write_report([folder])
    table = (folder / "README.md").read_text().split("## Numbers")[1].split("##")[0]
    rows = [line for line in table.splitlines() if line.startswith("| ")][2:]
    assert len(rows) == 4 and all(INTERVAL.search(row) for row in rows)
    for plot in (folder / "plots").glob("*.svg"):
        shown = [one for one in ElementTree.parse(plot).iter() if one.get("class") == "number"]
        assert shown and all(INTERVAL.search(one.text or "") for one in shown)


@pytest.mark.parametrize(
    "ends", [{"low": 0.3, "high": 0.2}, {"low": math.nan}, {"high": "0.3"}, {"value": math.nan}]
)
def test_an_interval_that_is_none_is_refused(ends: dict[str, object], folder: Path) -> None:
    results = evaluated.results_of(folder)
    results["metrics"]["clip"]["values"]["clip"] |= ends
    evaluated.write(folder, results)
    with pytest.raises(ValueError, match=r"metrics\.clip\.values\.clip(\.\w+)? must (be|have)"):
        write_report([folder])


@pytest.mark.parametrize("gone", ["low", "high", "n", "value"])
def test_a_number_without_interval_is_refused(gone: str, folder: Path) -> None:
    results = evaluated.results_of(folder)
    del results["metrics"]["clip"]["values"]["clip"][gone]
    evaluated.write(folder, results)
    with pytest.raises(
        ValueError, match=r"metrics\.clip\.values\.clip must have value, low, high and n"
    ):
        write_report([folder])


def test_an_interval_that_nobody_can_tell_is_infinite(folder: Path) -> None:
    results = evaluated.results_of(folder)
    results["metrics"]["clip"]["values"]["clip"] |= {"value": 0.25, "low": None, "high": None}
    results["metrics"]["fid-clean"]["values"]["fid-infinity"] |= {"value": None, "high": None}
    evaluated.write(folder, results)
    text = report(folder).text
    assert "0.2500 [−∞, ∞]" in text and "∞ [11.50, ∞]" in text


def test_texts_of_strangers_do_not_break_the_page(tmp_path: Path) -> None:
    folder = evaluated.hostile(tmp_path / "<b>x")
    page = report(folder)
    assert not page.all("script") and len(page.all("h1")) == 1
    assert all("broken" not in str(values.get("onerror", "")) for _, values in page.elements)
    readme = (folder / "README.md").read_text(encoding="utf-8")
    for text in (page.text, readme):
        assert not re.search("[\u202a-\u202e\u2066-\u2069]", text)
    outside = re.sub(r"^(`{3,}).*?^\1$", "", readme, flags=re.DOTALL | re.MULTILINE)
    assert "<script" not in outside
    for plot in (folder / "plots").glob("*.svg"):
        assert not [one for one in ElementTree.parse(plot).iter() if one.tag.endswith("script")]


def test_the_page_asks_for_nothing_but_pictures_of_the_folder(folder: Path) -> None:
    page = report(folder)
    assert not page.all("link") and not page.all("script")
    assert all(str(one["src"]).startswith("data:image/jpeg;base64,") for one in page.all("img"))
    for anchor in page.all("a"):
        target = str(anchor["href"])
        assert target.startswith("#") or (folder / target).is_file()


def test_the_best_the_worst_and_the_median_are_chosen_by_score_then_key() -> None:
    scores = {f"{number:02d}/0000": Score(float(number // 2)) for number in range(40)}
    chosen = gallery.choose(scores, higher_is_better=True)
    assert chosen["Best"][:3] == ["38/0000", "39/0000", "36/0000"]
    assert chosen["Worst"][:3] == ["00/0000", "01/0000", "02/0000"]
    assert chosen["Median"] == [
        f"{2 * half + odd:02d}/0000" for half in range(12, 6, -1) for odd in (0, 1)
    ]
    assert gallery.choose(scores, higher_is_better=False)["Best"] == chosen["Worst"]
    assert all(len(keys) == gallery.SHOWN for keys in chosen.values())
    assert gallery.tied(scores, chosen["Best"]) == 0
    flat = {key: Score(1.0) for key in scores}
    assert gallery.tied(flat, gallery.choose(flat, True)["Best"]) == 40


def test_a_picture_that_is_gone_is_told_and_the_report_is_written(folder: Path) -> None:
    shutil.rmtree(folder / "images")
    page = report(folder)
    assert not page.all("img") and "is not in this folder any more" in page.text


def test_every_picture_stands_with_score_and_prompt(folder: Path) -> None:
    page = report(folder)
    one = open_evaluated(folder)
    best = max(one.scores("clip").items(), key=lambda pair: pair[1].value)
    assert numbers.plain(best[1].value) in page.text
    alts = [str(image["alt"]) for image in page.all("img")]
    assert f"drawn for: {one.entry(best[0]).prompt.prompt}" in alts
    assert len(alts) == 2 * 3 * gallery.SHOWN


def test_missing_pictures_stand_in_the_report(tmp_path: Path) -> None:
    errors = [{"key": "00003/0000", "metric": "clip", "reason": "truncated"}]
    folder = evaluated.build(tmp_path / "one", errors=errors)
    page = report(folder)
    assert "00003/0000" in page.text and "truncated" in page.text
    assert "- 00003/0000: metric: clip, reason: truncated" in (folder / "README.md").read_text()
    text = report(evaluated.build(tmp_path / "two")).text
    assert "Missing or failed picturesNone." in text


def test_protocol_constants_notes_and_the_command_are_all_there(folder: Path) -> None:
    page, readme = report(folder).text, (folder / "README.md").read_text()
    for words in (
        "made/0123abcd",
        "dpm-solver++",
        "clip-tiny",
        "inception-clean-00",
        "jackknife over 50",
    ):
        assert words in page and words in readme
    assert "Biased below 10,000 pictures." in page and "Biased below 10,000 pictures." in readme
    command = "python -m pixart.evaluate run made --model shapes"
    assert command in page and f"```sh\n{command}\n```" in readme
    assert "--shard" not in page + readme


def test_a_command_is_told_even_where_nobody_kept_it(folder: Path) -> None:
    (folder / "run.json").unlink()
    told = command_of(open_evaluated(folder))
    assert told == "python -m pixart.evaluate run made --model shapes --output shapes-20"


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (
            ["/home/me/pixart/evaluate.py", "run", "shapes", "--shard", "3/4"],
            "python -m pixart.evaluate run shapes",
        ),
        (
            ["/usr/bin/pixart", "evaluate", "run", "shapes", "--shard=3/4"],
            "pixart evaluate run shapes",
        ),
        (
            ["/a/pixart/__main__.py", "evaluate", "run", "a b"],
            "python -m pixart evaluate run 'a b'",
        ),
    ],
)
def test_a_command_is_told_as_it_is_typed(words: list[str], told: str, folder: Path) -> None:
    (folder / "run.json").write_text(json.dumps({"command": words}))
    assert command_of(open_evaluated(folder)) == told


def test_several_folders_stand_side_by_side(tmp_path: Path) -> None:
    one = evaluated.build(tmp_path / "a", count=12)
    two = evaluated.build(
        tmp_path / "b", count=12, model="other", seed=1, protocol={"id": "made/ffffffff"}
    )
    before = (one / "results.json").read_bytes()
    path = write_report([one, two])
    assert path == tmp_path / "report" / "report.html"
    page = Page(path.read_text(encoding="utf-8"))
    heads = re.findall(r"\| metric \| (.*)", (path.parent / "README.md").read_text())
    assert heads == ["shapes | other | paper | same protocol? | n |"]
    assert "different protocols: made/0123abcd, made/ffffffff" in page.text
    assert len(page.all("img")) == 2 * 12
    for anchor in page.all("a"):
        target = str(anchor["href"])
        assert target.startswith("#") or (path.parent / target).is_file()
    assert not (one / "report.html").exists() and (one / "results.json").read_bytes() == before
    assert write_report([one, two], tmp_path / "there") == tmp_path / "there" / "report.html"


def test_a_papers_table_stands_beside_ours_with_what_says_no(folder: Path) -> None:
    evaluated.write(folder, with_paper(load_protocol("shapes"), evaluated.results_of(folder)))
    page, readme = report(folder), (folder / "README.md").read_text()
    rows = dict(
        re.findall(r"^\| (\w+) \| (.*) \|$", readme.split("## Beside the paper")[1], re.MULTILINE)
    )
    # Of each ten: 7, 7 and 6 are right, in the model card's per cent.
    assert rows["pair"] == "70 [40, 100] | 98 | no | not comparable | 10"
    assert "unseen one | not measured | 94.3" in readme
    told = "Not the same protocol in any column, because"
    assert told in page.text and told in readme and "30 prompts, the table has 1,500" in readme
    assert page.text.count("30 prompts, the table has 1,500") == 1
    assert "shapes, all keys and values merged" in page.text
    (plot,) = (folder / "plots").glob("shapes-by-category.svg")
    shown = [one for one in ElementTree.parse(plot).iter() if one.get("class") == "paper"]
    assert len(shown) == 3  # of one, pair and group


def test_plots_of_metrics_that_are_gone_are_taken_away(folder: Path) -> None:
    write_report([folder])
    results = evaluated.results_of(folder)
    del results["metrics"]["clip"]
    evaluated.write(folder, results)
    write_report([folder])
    assert [path.name for path in (folder / "plots").iterdir()] == ["shapes-by-category.svg"]
    results["metrics"] = {"fid-clean": results["metrics"]["fid-clean"]}
    evaluated.write(folder, results)
    write_report([folder])
    assert not (folder / "plots").exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"version": 2}, "version must be 1, got 2"),
        ({"protocol": None}, "protocol must be a JSON object, got None; score it again"),
        ({"metrics": []}, "metrics must be a JSON object"),
        ({"metrics": {"a": {}}}, r"metrics\.a must have values"),
        ({"metrics": {"a": {"values": {}}}}, r"metrics\.a\.values must have a number"),
    ],
)
def test_results_that_cannot_be_read_are_refused(
    change: dict[str, object], words: str, folder: Path
) -> None:
    evaluated.write(folder, evaluated.results_of(folder) | change)
    with pytest.raises(ValueError, match=words):
        write_report([folder])


def test_damaged_scores_are_refused(folder: Path) -> None:
    (part,) = (folder / "scores").glob("shapes-2/part-00001.jsonl")
    part.write_text(part.read_text().replace('"value": 1.0', '"value": 0.5'))
    with pytest.raises(ValueError, match="scores of shapes are damaged .*; score it again"):
        write_report([folder])
    ScoreStore(part.parent).write(1, [Row("nobody/0000", "", Score(1.0))])
    with pytest.raises(
        ValueError, match="shapes has a score of nobody/0000, which no prompt is of"
    ):
        write_report([folder])


def test_a_folder_without_results_says_how_to_make_them(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="score` makes it"):
        write_report([tmp_path])
    with pytest.raises(ValueError, match="must be given a folder"):
        write_report([])


@pytest.mark.parametrize(
    ("value", "low", "high", "told"),
    [
        (0.27966, 0.27712, 0.28211, "0.2797 [0.2771, 0.2821]"),
        (8.2314, 8.01, 8.45, "8.23 [8.01, 8.45]"),
        (98.0, 95.2, 100.0, "98.0 [95.2, 100.0]"),
        (12345.0, 11000.0, 13000.0, "12345 [11000, 13000]"),
        (-1.4142, -1.52, -1.31, "−1.41 [−1.52, −1.31]"),
        (0.0, 0.0, 0.0, "0.00 [0.00, 0.00]"),
        (1.0, 1.0, 1.0, "1.000 [1.000, 1.000]"),
        (-0.0001, -0.2, 0.2, "0.00 [−0.20, 0.20]"),
        (0.5, -math.inf, math.inf, "0.5000 [−∞, ∞]"),
    ],
)
def test_numbers_have_as_many_digits_as_their_interval_bears_out(
    value: float, low: float, high: float, told: str
) -> None:
    assert numbers.estimate(Estimate(value, low, high, 5, "made")) == told


@pytest.mark.parametrize(
    ("values", "low", "high"),
    [((0.27, 0.29), 0.27, 0.29), ((3.0, 9.5), 0.0, 10.0), ((-2.0, 1.0), -2.0, 1.0),
     ((-0.9, -0.1), -1.0, 0.0), ((math.inf, 2.0, 2.0), 1.8, 2.2), ((), -0.5, 0.5)],
)  # fmt: skip
def test_an_axis_has_round_ends_around_all_values(
    values: tuple[float, ...], low: float, high: float
) -> None:
    scale = figures.axis(values, 100)
    assert (scale.low, scale.high) == pytest.approx((low, high))
    assert scale(scale.low) == 0 and scale(scale.high) == 100 and scale(math.inf) == 100
    assert len(scale.ticks) >= 3


def test_a_bar_ends_where_its_number_is_and_its_line_where_the_interval_ends() -> None:
    drawn = figures.bars("t", {"a": (Estimate(4.0, 2.0, 8.0, 9, "made"),)}, ["one"])
    svg = ElementTree.fromstring(drawn)
    bar = next(one for one in svg.iter("rect"))
    plot = 360 - 2 * figures.MARGIN - 8 - round(figures.LETTER * len("4.0 [2.0, 8.0]"))
    assert float(bar.get("width", 0)) == pytest.approx(plot * 4 / 8)
    line = next(one for one in svg.iter("line") if one.get("class") == "whisker")
    ends = [float(line.get(name, 0)) - figures.MARGIN for name in ("x1", "x2")]
    assert ends == pytest.approx([plot * 2 / 8, plot])
    assert "a: 4.0 [2.0, 8.0]" in str(svg.get("aria-label"))


def test_files_of_figures_are_named_by_words_alone() -> None:
    assert file_name("hpsv2.1-by-category") == "hpsv2.1-by-category.svg"
    assert file_name("../../etc/passwd") == "etc-passwd.svg"
    assert file_name("<&>") == "plot.svg"


def test_links_to_pictures_hold_with_any_name(tmp_path: Path) -> None:
    path = tmp_path / "a b#?" / "0000.png"
    entry = Entry(Prompt("x", "words"), 0, path)
    assert gallery.link(entry.path, tmp_path / "report") == "../a%20b%23%3F/0000.png"


def test_settings_that_differ_are_marked(tmp_path: Path) -> None:
    one = evaluated.build(tmp_path / "a", count=6)
    two = evaluated.build(tmp_path / "b", count=6, protocol={"sampling": {"steps": 3}})
    write_report([one, two], tmp_path / "r")
    text = Page((tmp_path / "r" / "report.html").read_text()).text
    assert "sampling.steps differs203" in text and "size48x4848x48" in text
