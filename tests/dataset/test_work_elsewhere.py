"""Work in workers of a cluster, with a cluster that ends batches in any order: its results, and its refusals."""

import json
import pickle
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pictures
import pytest
from test_prepare import SETTINGS, FakeText, encoders

from pixart.cluster import Cluster, LostItem
from pixart.dataset import chunks, cleaning, prepare, remote
from pixart.dataset.annotations import annotating, write_lines
from pixart.dataset.chunks import Chunk
from pixart.dataset.cleaning import measuring
from pixart.dataset.options import Prepare
from pixart.dataset.parts import write_checked
from pixart.dataset.prepare import Preparation, open_worker
from pixart.dataset.sources import open_source
from pixart.dataset.tar_shards import read_shards
from pixart.dataset.verify import settings_of, write_settings
from pixart.files import parse_json

Do = Callable[[Any], Any]


@pytest.fixture
def backwards(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cluster that ends the later of two batches first."""

    def run(
        items: Iterable[Any], open_worker: Callable[[], Do], cluster: Cluster, **_: Any
    ) -> Iterator[Any]:
        do = pickle.loads(pickle.dumps(open_worker))()
        iterator = iter(items)
        while pair := list(islice(iterator, 2)):
            yield from (pickle.loads(pickle.dumps(do(item))) for item in reversed(pair))

    monkeypatch.setattr(remote, "run_on_ray", run)


def squares() -> remote.Work:
    return lambda items: (item * item for item in items)


def test_results_come_in_the_order_of_the_items(backwards: None) -> None:
    work = remote.on_ray(squares, Cluster(), batch=3)
    assert list(work(iter(range(20)))) == [n * n for n in range(20)]


def test_what_is_done_is_not_lost_over_what_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*_: Any, **__: Any) -> Iterator[Any]:
        yield 0, ["first"]
        yield 2, ["third"]
        raise RuntimeError("lost")

    monkeypatch.setattr(remote, "run_on_ray", run)
    found = []
    with pytest.raises(RuntimeError, match="lost"):
        for result in remote.on_ray(squares, Cluster())([1]):
            found.append(result)
    assert found == ["first", "third"]


def open_widths() -> Any:
    return annotating(lambda image: {"width": image.width})


def open_measuring() -> Any:
    return measuring()


def test_lines_and_rejects_are_those_of_one_process(tmp_path: Path, backwards: None) -> None:
    source = pictures.folder(tmp_path / "source", 40)
    pictures.write(source / "1x.png", pictures.corrupt_png())
    pictures.write(source / "3x.txt", "of no picture")
    index = [{"path": f"{n % 40}.png", "prompt": "x"} for n in range(50)]  # ten twice
    pictures.write(source / "index.json", [*index, {"path": "1x.png"}, {"path": "1x.png"}])
    written = []
    for name, works in (
        ("here", (open_widths(), None)),
        (
            "there",
            (remote.on_ray(open_widths, Cluster()), remote.on_ray(open_measuring, Cluster())),
        ),
    ):
        folder = tmp_path / name
        folder.mkdir()
        write_lines(open_source(source), folder / "w.jsonl", works[0], lambda line: False)
        said = cleaning.clean(lambda: open_source(source), folder / "c.jsonl", work=works[1])
        assert said.startswith("40 pictures measured, 10 before, 2 rejected, 10 duplicates")
        written.append(
            {file.relative_to(folder): file.read_bytes() for file in folder.rglob("*.j*")}
        )
    assert written[0] == written[1] and len(written[0]) >= 4


def test_what_is_listed_twice_is_no_fault_where_its_first_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(batches: Iterable[Any], open_worker: Callable[[], Do], *_: Any, **__: Any) -> Any:
        _first, second = batches
        yield open_worker()(second)
        raise LostItem("items 1 to 16: lost")

    monkeypatch.setattr(remote, "run_on_ray", run)
    source = pictures.folder(tmp_path / "source", 18)
    index = [{"path": f"{n % 17}.png", "prompt": "x"} for n in range(19)]
    pictures.write(source / "index.json", index)
    work = remote.on_ray(open_measuring, Cluster())
    with pytest.raises(LostItem, match="items 1 to 16"):
        cleaning.clean(lambda: open_source(source), tmp_path / "c.jsonl", work=work)


def test_pictures_of_shards_are_sent_along(tmp_path: Path) -> None:
    import io
    import tarfile

    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, content in (("a.png", b"picture"), ("a.control.png", b"lines"), ("a.txt", b"x")):
            header = tarfile.TarInfo(name)
            header.size = len(content)
            tar.addfile(header, io.BytesIO(content))
    (sample,) = read_shards([str(tmp_path / "a.tar")])
    (tmp_path / "a.tar").unlink()
    there = pickle.loads(pickle.dumps(sample))
    assert there.read() == b"picture" and there.control.read() == b"lines"


def test_a_machine_that_does_not_see_the_source_or_the_output_is_refused(tmp_path: Path) -> None:
    source = pictures.folder(tmp_path / "source", 2)
    (sight,) = remote.sights_of(open_source(source))
    sight.check()
    pictures.write(source / "0.png", b"another")
    with pytest.raises(ValueError, match=r"source must be seen by all machines.*another file"):
        sight.check()
    (source / "0.png").unlink()
    with pytest.raises(ValueError, match=r"cannot read .*0\.png \(No such file.*shared disk"):
        sight.check()
    options = Prepare(str(source), tmp_path / "out", 64, device="cpu")
    with pytest.raises(ValueError, match="output must be seen by all machines.*shared disk"):
        open_worker(options, [], tmp_path / "out" / "work" / "claim.json")
    claim = pictures.write(tmp_path / "out" / "work" / "claim.json", "{}")
    with pytest.raises(ValueError, match="model must be the same on all machines.*shapes"):
        open_worker(options, ["other"], claim)


class Recorded:
    """Workers that do chunks in an order of the test's, two of them at the same time."""

    def __init__(self, preparation: Preparation, texts: list[str]) -> None:
        self.preparation, self.texts = preparation, texts
        self.waited: list[tuple[tuple[str, ...], tuple[str, ...]]] = []

    def work(self, chunks: Iterable[Chunk]) -> Iterator[str]:
        for chunk in list(chunks):
            self.waited.append((chunk.sharing, chunk.alike))
            self.preparation.do(chunk)
            yield chunk.file


def test_chunks_wait_for_those_before_that_have_what_they_have(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepare, "CHUNK", 2)
    monkeypatch.setattr(chunks, "PATIENCE", 0.01)
    source = tmp_path / "source"
    for number, text in enumerate(["a", "b", "c", "a", "d", "e"]):
        content = pictures.png(seed=0 if number == 5 else number) + bytes(number % 5)
        pictures.write(source / f"{number}.png", content)
        pictures.write(source / f"{number}.txt", text)
    (source / "5.png").write_bytes((source / "0.png").read_bytes())
    text = FakeText()
    preparation = Preparation(tmp_path / "out", encoders(text=text), SETTINGS)
    recorded = Recorded(preparation, text.encoded)
    report = preparation.run(lambda: open_source(source), workers=lambda claim: recorded.work)
    assert report["prepared"] == 6 and text.encoded == ["a", "b", "c", "d", "e"]
    first = preparation.parts(open_source(source))[0]
    (sharing, alike) = zip(*recorded.waited, strict=True)
    assert sharing == ((), (first,), ()) and alike[0] == () and first in alike[2]
    alone = Preparation(tmp_path / "alone", encoders(), SETTINGS)
    assert alone.run(lambda: open_source(source)) == report
    indices = [
        json.loads((tmp_path / name / "index-64.json").read_text()) for name in ("out", "alone")
    ]
    assert indices[0] == indices[1]


def test_chunks_that_are_listed_twice_are_done_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepare, "CHUNK", 2)
    source = pictures.folder(tmp_path / "source", 2)
    pictures.write(
        source / "index.json", [{"path": f"{n % 2}.png", "prompt": "x"} for n in range(6)]
    )
    preparation = Preparation(tmp_path / "out", encoders(), SETTINGS)
    recorded = Recorded(preparation, [])
    report = preparation.run(lambda: open_source(source), workers=lambda claim: recorded.work)
    assert recorded.waited == [((), ())]
    alone = Preparation(tmp_path / "alone", encoders(), SETTINGS)
    assert alone.run(lambda: open_source(source)) == report and report["prepared"] == 6


def test_where_a_run_goes_is_not_kept_nor_taken_from_a_folder(tmp_path: Path) -> None:
    """A folder of somebody's must lead no `verify` to a cluster of theirs."""
    options = Prepare("source", tmp_path, 64, engine="ray", address="other:1", workers=3)
    write_settings(options)
    file = tmp_path / "work" / "prepare-64.json"
    kept = parse_json(file.read_text(), "settings")["options"]
    assert not kept.keys() & {"engine", "address", "workers", "dry_run", "json"}
    with settings_of(tmp_path, 64, "cpu") as made_by:
        assert made_by == replace(options, engine="here", address=None, workers=None, device="cpu")

    write_checked(file, {"folder": str(tmp_path), "options": {**kept, "engine": "ray"}})
    with (
        pytest.raises(ValueError, match="damaged, or of an earlier version"),
        settings_of(tmp_path, 64, "cpu"),
    ):
        pass
