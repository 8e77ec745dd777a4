"""`statistics` against captions counted by hand, and its sources."""

import json
import math
import random
import sys
import types
from collections import Counter
from pathlib import Path
from typing import Any

import pictures
import pytest

from pixart import data
from pixart.dataset.nouns import open_nouns
from pixart.dataset.samples import Sample
from pixart.dataset.statistics import Mean, Statistician
from pixart.shapes.caption import describe
from pixart.shapes.scene import sample_scene

# Each with its nouns, counted by hand, and its words. dog: 11 times, in 10 captions; cat: 10 times.
CAPTIONS: list[tuple[str, str, int]] = [
    ("A dog runs on the beach.", "dog beach", 6),
    ("Two dogs chase a dog", "dog dog", 5),
    ("a cat", "cat", 2),
    ("The cat, the cat and the mouse", "cat cat mouse", 7),
    ("three mice under a tree", "mouse tree", 5),
    ("a dog-house in a garden", "garden", 5),
    ("child's dog", "child dog", 2),
    ("Children play with a ball", "child ball", 5),
    ("a red ball", "ball", 3),
    ("DOG", "dog", 1),
    ("sunset over the sea", "sea", 4),
    ("the sea", "sea", 2),
    ("a boat on the sea", "boat sea", 5),
    ("boats", "boat", 1),
    ("a dog in a boat", "dog boat", 5),
    ("dogs", "dog", 1),
    ("a café by the sea", "café sea", 5),
    ("cafe\u0301 at night", "café", 3),
    ("cats on a wall", "cat wall", 4),
    ("wall", "wall", 1),
    ("a tree and a tree and trees", "tree tree tree", 7),
    ("very quiet", "", 2),
    ("blue", "", 1),
    ("a dog", "dog", 2),
    ("the dog's ball", "dog ball", 3),
    ("cat; cat", "cat cat", 2),
    ("a cat/mouse game", "cat mouse", 3),
    ("a garden wall", "garden wall", 3),
    ("garden", "garden", 1),
    ("many boats in many colours", "boat", 5),
    ("a beach", "beach", 2),
    ("beach, sea, dog", "beach sea dog", 3),
    ("mouse", "mouse", 1),
    ("a cat sits by a cat", "cat cat", 6),
    ("a cat sleeps", "cat", 3),
    ("on a tree", "tree", 3),
    ("the ball of the child", "ball child", 5),
    ("a  wide   space", "", 3),
    ("café", "café", 1),
    ("a dog!", "dog", 2),
]
WORDS = """# nouns, and their other forms
dog, dogs
cat, cats
mouse, mice
child, children
tree, trees
boat, boats
ball
beach
sea
garden
wall
cafe\u0301
"""
# Added up by hand from the list above.
TOTAL, DISTINCT, VALID, PAIRS, LENGTH = 58, 12, 1, 52, 130


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = pictures.folder(tmp_path / "source", len(CAPTIONS))
    for number, (text, _, _) in enumerate(CAPTIONS):
        pictures.write(folder / f"{number}.txt", text)
    return folder


@pytest.fixture
def words(tmp_path: Path) -> str:
    return f"words:{pictures.write(tmp_path / 'nouns.txt', WORDS)}"


def rows(capsys: pytest.CaptureFixture[str], *arguments: object) -> list[dict[str, Any]]:
    assert data.main(["statistics", *map(str, arguments), "--json"]) == 0
    found: list[dict[str, Any]] = json.loads(capsys.readouterr().out)["data"]
    return found


def test_forty_captions_are_counted_as_by_hand(
    source: Path, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (row,) = rows(capsys, source, "--nouns", words)
    assert row["images"] == row["captions"] == 40 and row["rejected"] == 0
    assert row["words_per_caption"] == LENGTH / 40
    assert (row["total_nouns"], row["distinct_nouns"]) == (TOTAL, DISTINCT)
    assert row["valid_nouns"] == VALID and row["valid_share"] == VALID / DISTINCT
    assert (row["image_noun_pairs"], row["pairs_per_image"]) == (PAIRS, PAIRS / 40)
    assert row["nouns_per_image"] == TOTAL / 40
    assert row["score"] is None and row["tokens_per_caption"] is None


def test_the_counts_by_hand_are_those_of_the_list_beside_them() -> None:
    nouns = Counter(noun for _, named, _ in CAPTIONS for noun in named.split())
    assert nouns["dog"] == 11 and nouns["cat"] == 10
    assert nouns.total() == TOTAL and len(nouns) == DISTINCT
    assert sum(n > 10 for n in nouns.values()) == VALID
    assert sum(len(set(named.split())) for _, named, _ in CAPTIONS) == PAIRS
    assert sum(length for _, _, length in CAPTIONS) == LENGTH


def test_each_caption_has_its_nouns(words: str) -> None:
    found = open_nouns(words)([text for text, _, _ in CAPTIONS])
    assert found == [named.split() for _, named, _ in CAPTIONS]


def test_captions_of_one_name_are_counted_apart_and_pairs_are_of_an_image(
    tmp_path: Path, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = pictures.folder(tmp_path / "p", 3)
    lines = [
        {"path": "0.png", "captions": {"synth.1": "a dog and a cat", "synth.2": "a dog"}},
        {"path": "1.png", "captions": {"synth.1": "a sea"}},
    ]
    synth = pictures.write(tmp_path / "synth.jsonl", "\n".join(map(json.dumps, lines)))
    place = f"{folder}+{synth}"
    found = rows(capsys, place, "--nouns", words, "--captions", "prompt", "synth", "synth.2")
    prompt, group, second = found
    assert [row["name"] for row in found] == ["prompt", "synth", "synth.2"]
    assert (prompt["images"], prompt["total_nouns"]) == (3, 0)
    assert (group["images"], group["uncaptioned"], group["captions"]) == (2, 1, 3)
    assert (group["total_nouns"], group["image_noun_pairs"]) == (4, 3)
    assert (second["images"], second["image_noun_pairs"]) == (1, 1)
    (together,) = rows(capsys, place, "--nouns", words)
    assert (together["images"], together["captions"], together["image_noun_pairs"]) == (3, 6, 3)
    assert data.main(["statistics", place, "--captions", "long"]) == 2
    said = capsys.readouterr().err
    assert "captions must be of prompt, synth.1, synth.2 in p, got 'long'" in said


def test_scores_have_a_mean_and_its_interval(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = [5 + number / 7 for number in range(12)]
    lines = [{"path": f"{n}.png", "score": value} for n, value in enumerate(values)]
    scores = pictures.write(tmp_path / "scores.jsonl", "\n".join(map(json.dumps, lines)))
    (row,) = rows(capsys, f"{source}+{scores}")
    mean = sum(values) / 12
    deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / 11)
    assert row["scored"] == 12 and row["score"] == pytest.approx(mean, rel=1e-12)
    assert row["score_margin"] == pytest.approx(1.959964 * deviation / math.sqrt(12), rel=1e-9)
    assert data.main(["statistics", f"{source}+{scores}"]) == 0
    assert "5.79 ± 0.29" in capsys.readouterr().out
    assert data.main(["statistics", f"{source}+{scores}", "--score", "beauty"]) == 2
    assert "score must be a number of" in capsys.readouterr().err


def test_what_clean_measured_gives_scores_and_no_captions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = pictures.folder(tmp_path / "source", 3)
    (tmp_path / "judges_of_statistics.py").write_text(
        "def size(image):\n    return image.width / 8\ndef fails(image):\n    return 1 / 0\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    output = tmp_path / "clean.jsonl"
    scorers = [
        f"{name}=judges_of_statistics:{of}" for name, of in (("aesthetic", "size"), ("no", "fails"))
    ]
    words = [word for one in scorers for word in ("--scorer", one)]
    assert data.main(["clean", str(source), "--output", str(output), *words]) == 0
    capsys.readouterr()
    assert data.main(["statistics", f"{source}+{output}", "--json"]) == 0
    row = json.loads(capsys.readouterr().out)["data"][0]
    assert (row["images"], row["captions"], row["scored"], row["rejected"]) == (3, 3, 3, 0)
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert row["score"] == pytest.approx(sum(line["width"] / 8 for line in lines) / 3)
    # As annotations they are refused, and a hash beside a caption is nobody's business.
    annotated = tmp_path / "hashed.jsonl"
    names = [json.loads(line)["path"] for line in output.read_text().splitlines()]
    hashed = [{"path": name, "captions": {"long": "a cat"}, "phash": "0"} for name in names]
    annotated.write_text("\n".join(map(json.dumps, hashed)) + "\n")
    assert data.main(["statistics", f"{source}+{annotated}", "--captions", "long"]) == 0
    capsys.readouterr()
    assert data.main(["statistics", f"{source}+{output}", "--score", "no"]) == 2
    assert "score must be a number" in capsys.readouterr().err


def test_a_mean_of_one_number_has_no_interval() -> None:
    mean = Mean()
    mean.add(3.0)
    assert (mean.mean, mean.margin) == (3.0, None)


def test_data_sets_stand_side_by_side_and_prepared_ones_are_read_from_their_source(
    tmp_path: Path, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    raw = pictures.folder(tmp_path / "raw", 3)
    for number, text in enumerate(("a dog", "a cat", "a dog")):
        pictures.write(raw / f"{number}.txt", text)
    pictures.write(raw / "2.png", pictures.corrupt_png())  # rejected by prepare, unseen here
    index = [{"path": f"raw/{n}.png", "caption": ["a sea", "a boat"]} for n in range(2)]
    pictures.write(tmp_path / "index.jsonl", "\n".join(map(json.dumps, index)))
    out = tmp_path / "out"
    prepare = ["prepare", str(raw), str(out), "--resolution", "64", "--device", "cpu"]
    assert data.main(prepare) == 0
    capsys.readouterr()
    places = (raw, tmp_path / "index.jsonl", out)
    first, second, third = rows(capsys, *places, "--nouns", words)
    assert (first["images"], first["total_nouns"]) == (3, 3)
    assert (second["images"], second["captions"], second["image_noun_pairs"]) == (2, 4, 4)
    assert (third["images"], third["total_nouns"], third["rejected"]) == (2, 2, 0)
    assert data.main(["statistics", *map(str, places)]) == 0
    head, images, *_ = capsys.readouterr().out.splitlines()
    assert head.split() == ["raw", "index.jsonl", "out"] and images.split() == ["images", *"322"]
    (raw / "0.txt").unlink()
    (gone,) = rows(capsys, out)
    assert (gone["images"], gone["uncaptioned"]) == (1, 1)
    for file in out.glob("work/prepare-*.json"):
        file.unlink()
    assert data.main(["statistics", str(out)]) == 2
    assert "holds features, not captions" in capsys.readouterr().err


def test_tokens_are_those_that_the_text_encoder_reads(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from pixart.text import TextEncoder

    folder = pictures.folder(tmp_path / "p", 2)
    texts = ["a red star", "a red star " * 100]
    for number, text in enumerate(texts):
        pictures.write(folder / f"{number}.txt", text)
    shapes = Path(data.__file__).parent / "assets" / "shapes"
    (row,) = rows(capsys, folder, "--tokenizer", "shapes")
    assert rows(capsys, folder, "--tokenizer", shapes / "tokenizer") == [row]
    encoder = TextEncoder.from_pretrained(shapes, max_length=1000, cache_dir=None)
    lengths = encoder.encode([text.strip() for text in texts]).mask.sum(1)
    assert row["tokens_per_caption"] == lengths.float().mean()
    assert row["over_120_tokens"] == row["over_300_tokens"] == 0.5
    assert data.main(["statistics", str(folder), "--tokenizer", str(folder)]) == 2


def test_nouns_of_the_grammar_are_all_that_it_names() -> None:
    """Against a list written by hand, with the plurals that the grammar has."""
    forms = {f"{shape}s": shape for shape in ("circle", "square", "triangle", "star")}
    forms |= {shape: shape for shape in forms.values()} | {"crosses": "cross", "cross": "cross"}
    others = ("background", "picture", "drawing", "corner", "middle", "center")
    forms |= {noun: noun for noun in others}
    rng = random.Random(0)
    scenes = [sample_scene(rng, kind) for kind in ("one", "pair", "group") for _ in range(100)]
    captions = [describe(scene, rng) for scene in scenes]
    expected = [
        [forms[w] for w in text.replace(",", "").split() if w in forms] for text in captions
    ]
    assert open_nouns("shapes")(captions) == expected and all(expected)
    assert set(sum(expected, [])) >= set(others)
    assert open_nouns("shapes")(["Crosses in the centre, on white"]) == [["cross", "center"]]


def test_a_function_finds_nouns_and_its_faults_are_one_line(
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    code = "def long(text):\n    return [w for w in text.split() if len(w) > 5]\n"
    code += "def text(caption):\n    return caption\ndef broken(caption):\n    return 1 / 0\n"
    pictures.write(tmp_path / "nouns_of_mine.py", code)
    monkeypatch.syspath_prepend(tmp_path)
    (row,) = rows(capsys, source, "--nouns", "nouns_of_mine:long")
    assert row["total_nouns"] == sum(len(w) > 5 for text, *_ in CAPTIONS for w in text.split())
    for name, said in (("broken", "ZeroDivisionError"), ("text", "must give a list of nouns")):
        assert data.main(["statistics", str(source), "--nouns", f"nouns_of_mine:{name}"]) == 2
        error = capsys.readouterr().err.strip()
        assert said in error and "\n" not in error


class StubOfSpacy(types.ModuleType):
    """What `spacy:` asks of spaCy: words in capitals are nouns, their lemma is lower-cased."""

    parts = ("tagger", "lemmatizer")

    def load(self, model: str, exclude: list[str]) -> Any:
        if model != "tiny":
            raise OSError("[E050] Can't find\nmodel")

        def pipe(texts: list[str]) -> Any:
            for text in texts:
                yield [
                    types.SimpleNamespace(
                        text=w, lemma_=w.rstrip("S"), pos_="NOUN" if w.isupper() else "VERB"
                    )
                    for w in text.split()
                ]

        return types.SimpleNamespace(pipe=pipe, pipe_names=self.parts)


def test_spacy_finds_nouns_and_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "spacy", StubOfSpacy("spacy"))
    assert open_nouns("spacy:tiny")(["a DOGS b", "c"]) == [["dog"], []]
    with pytest.raises(ValueError, match="need that model.*python -m spacy download other"):
        open_nouns("spacy:other")
    monkeypatch.setattr(StubOfSpacy, "parts", ("tok2vec",))
    with pytest.raises(ValueError, match="need a tagger and a lemmatizer, it has tok2vec"):
        open_nouns("spacy:tiny")
    monkeypatch.setitem(sys.modules, "spacy", None)
    with pytest.raises(ValueError, match="spaCy, which is not here: pip install spacy"):
        open_nouns("spacy:tiny")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("ice cream\n", "nouns.txt:1 must be a noun and its forms"),
        ("dog, dogs\ndogs\n", "nouns.txt:2 must not give 'dogs' to 'dogs', it is a form of 'dog'"),
        ("# nothing\n", "must list nouns"),
        (b"\xff", "must be UTF-8, byte 0 is not"),
    ],
)
def test_a_list_that_is_none_is_refused(tmp_path: Path, content: str | bytes, said: str) -> None:
    file = pictures.write(tmp_path / "nouns.txt", content)
    with pytest.raises(ValueError, match=said):
        open_nouns(f"words:{file}")


def test_bad_input_is_one_line_and_code_2(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    cases = [
        ((), "data must be one or more"),
        ((source, "--nouns", "spacy"), "nouns must be spacy:MODEL"),
        ((source, "--nouns", "words:nowhere"), "must be listed in a file"),
        ((f"{source}x+c.txt",), "must have .jsonl files behind a +"),
        ((f"{source}+{tmp_path}/absent.jsonl",), "there is none"),
        ((tmp_path / "absent",), "source must be a folder"),
        ((empty,), "must hold captioned pictures"),
    ]
    for arguments, said in cases:
        assert data.main(["statistics", *map(str, arguments)]) == 2, arguments
        error = capsys.readouterr().err.strip()
        assert said in error and "\n" not in error


def test_memory_grows_with_distinct_nouns_alone() -> None:
    """5,000 captions of 2 kB: a fifth of them would be more than is allowed."""
    import tracemalloc

    def item(number: int) -> Sample:
        text = f"dog {number} " + "x" * 2000
        return Sample(str(number), str(number), "", bytes, {"prompt": text})

    tracemalloc.start()
    counts = Statistician(nouns=lambda texts: [["dog"] for _ in texts]).count(
        "made", map(item, range(5_000)), {}
    )
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert counts.of_names[0].pairs == 5_000 and most < 2_000_000
