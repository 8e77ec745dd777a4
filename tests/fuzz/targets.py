"""What reads files of others: for each reader a sample, how to damage it, and how it is read."""

import json
import logging
import random
import tarfile
import warnings
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from evaluation_targets import PAIRS
from mutations import (
    Mutation,
    damaged_bytes,
    damaged_json,
    damaged_json_lines,
    damaged_png,
    damaged_safetensors,
    damaged_tar,
    damaged_text,
    damaged_zip,
)
from PIL import Image
from preference_targets import PREFERENCE
from safetensors.torch import save_file
from scaling_targets import SCALING
from tiny_checkpoints import SIGMA, build, official, save_official

GOLDEN = Path(__file__).parent.parent / "golden"
SHALLOW = replace(SIGMA, depth=1)
BY_SUFFIX: dict[str, tuple[Mutation, ...]] = {
    ".json": (damaged_json, damaged_json, damaged_text, damaged_bytes),
    ".jsonl": (damaged_json_lines, damaged_json_lines, damaged_text, damaged_bytes),
    ".safetensors": (damaged_safetensors, damaged_safetensors, damaged_bytes),
    ".png": (damaged_png, damaged_png, damaged_bytes),
    ".npz": (damaged_zip, damaged_zip, damaged_bytes),
    ".pth": (damaged_zip, damaged_zip, damaged_bytes),
    ".tar": (damaged_tar, damaged_tar, damaged_bytes),
    ".yaml": (damaged_text,),
    ".txt": (damaged_text, damaged_bytes),
    ".csv": (damaged_text, damaged_bytes),
}


@dataclass(frozen=True)
class Target:
    """make(folder): write the sample, which lies in that folder alone, and return what is read.
    read(place): read it, and check what came of it where that must be the same or nothing."""

    make: Callable[[Path], Path]
    read: Callable[[Path], object]


def mutations_for(path: Path, content: bytes) -> tuple[Mutation, ...]:
    is_zip = content[:2] == b"PK"
    if path.suffix == ".pth" and not is_zip:
        return (damaged_bytes,)
    return BY_SUFFIX.get(path.suffix, (damaged_bytes,))


def _checkpoint(name: str, write: Callable[[Path], object]) -> Target:
    def make(folder: Path) -> Path:
        write(folder / name)
        return folder / name

    def read(place: Path) -> object:
        from pixart.checkpoint.load import load_transformer

        return load_transformer(place)

    return Target(make, read)


def _write_pixart(path: Path) -> None:
    from pixart.checkpoint.save import save_transformer

    save_transformer(build(SHALLOW), path)


def _write_legacy(path: Path) -> None:
    torch.save({"state_dict": official(SHALLOW)}, path, _use_new_zipfile_serialization=False)


def _write_diffusers(path: Path) -> None:
    from pixart.checkpoint.save import save_transformer

    save_transformer(build(SHALLOW), path, format="diffusers", max_shard_size=300_000)


def _make_lora(folder: Path) -> Path:
    path, name = folder / "lora.safetensors", "transformer.transformer_blocks.0.attn1.to_q"
    tensors = {
        f"{name}.lora_A.weight": torch.ones(4, 72),
        f"{name}.lora_B.weight": torch.ones(72, 4),
    }
    save_file(tensors, path, {"note": json.dumps({"lora_alpha": 4, "r": 4})})
    return path


def _read_lora(place: Path) -> object:
    from pixart.lora.adapters import load_lora, merge_lora

    return merge_lora(load_lora(build(SHALLOW), [(place, 1.0)]))


def _picture_of_ours(name: str) -> Target:
    def make(folder: Path) -> Path:
        path = folder / name
        path.write_bytes((GOLDEN / "pictures" / name).read_bytes())
        return path

    def read(place: Path) -> object:
        from pixart.pipeline.pictures import read_metadata

        return read_metadata(place)

    return Target(make, read)


def _make_prompts(folder: Path) -> Path:
    lines = [
        {"prompt": "a red circle", "seed": 3, "size": "128", "name": "one"},
        {"prompt": "a blue star", "negative": "green", "guidance": 2.5, "steps": 8},
        {"prompt": "a", "image": "x.png", "mask": "alpha", "strength": 0.5, "outpaint": "8,0,8,0"},
        {"image": "~/x.png", "upscale": "2k", "upscale_strength": 0.3, "tiles": 64},
        {
            "prompt": "b",
            "control_image": ["a.png", "b.png"],
            "control_scale": [1, 0.5],
            "apg": True,
            "control_interval": [[0, 1], [0, 0.5]],
            "pag": 3,
            "pag_blocks": "1-2",
            "apg_eta": 0.1,
        },
    ]
    (folder / "prompts.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder / "prompts.jsonl"


def _read_prompts(place: Path) -> object:
    """With what is known without a model and without the pictures."""
    from pixart.generation.prompts import naming, read_prompts
    from pixart.pipeline.request import Request

    read = []
    for line in read_prompts(place):
        own = {name: value for name, value in line.values.items() if name != "name"}
        with naming(line.place):
            read.append(Request.from_dict(own))
            assert Request.from_dict(read[-1].to_dict()) == read[-1], "another request"
    return read


def _source_of_pictures(setting: str, suffix: str) -> Target:
    """A picture to draw from, and one that says what of another is drawn: as a command looks at them
    before it opens a model."""

    def make(folder: Path) -> Path:
        path = folder / f"{setting}.{suffix}"
        image = Image.linear_gradient("L").resize((40, 24)).convert("RGB")
        image.save(path, exif=Image.Exif())
        return path

    def read(place: Path) -> object:
        from pixart.generation.sources import Sources
        from pixart.pipeline.request import Request

        request = Request("a", image=str(place))
        if setting == "mask":
            with TemporaryDirectory() as folder:
                image = Path(folder) / "image.png"
                Image.new("RGB", (40, 24), "red").save(image)
                request = Request("a", image=str(image), mask=str(place), mask_blur=2)
                return _looked_at(request, Sources())
        return _looked_at(request, Sources())

    return Target(make, read)


def _looked_at(request: Any, sources: Any) -> object:
    """With the canvas that would be drawn on: of a picture that has passed, none fails."""
    from pixart.pipeline.editing import make_canvas
    from pixart.pipeline.inputs import Inputs

    sources.check(request)
    inputs = Inputs()
    height, width = inputs.size(request.image)
    assert height * width < 1 << 24, "more than the sample has by far"
    canvas = make_canvas(replace(request, fit="exact", height=height, width=width), inputs)
    assert canvas.pixels.shape == (height, width, 3), "other sizes"
    return sources.digests(request)


def _make_recipe(folder: Path) -> Path:
    import pixart.training

    source = Path(pixart.training.__file__).parent / "recipes" / "alpha.yaml"
    (folder / "recipe.yaml").write_bytes(source.read_bytes())
    return folder / "recipe.yaml"


def _read_recipe(place: Path) -> object:
    from pixart.training.recipe import load_recipe

    return load_recipe(str(place))


def _png(size: int = 24, **options: Any) -> bytes:
    packed = BytesIO()
    Image.linear_gradient("L").resize((size, size)).convert("RGB").save(packed, "PNG", **options)
    return packed.getvalue()


def _make_tar(folder: Path) -> Path:
    with tarfile.open(folder / "shard.tar", "w") as tar:
        for key in ("a", "b"):
            for suffix, content in (
                ("png", _png()),
                ("txt", b"a red circle"),
                ("json", json.dumps({"captions": {"long": "a large red circle"}}).encode()),
            ):
                member = tarfile.TarInfo(f"{key}.{suffix}")
                member.size = len(content)
                tar.addfile(member, BytesIO(content))
    return folder / "shard.tar"


def _read_samples(place: Path) -> object:
    """As prepare reads them: what is wrong with one is its own rejection."""
    from pixart.dataset.images import ImageError, decode
    from pixart.dataset.samples import Rejected
    from pixart.dataset.sources import open_source

    read = []
    for item in open_source(place):
        if not isinstance(item, Rejected):
            try:
                read.append(decode(item.read()).size)
            except (ImageError, OSError):
                continue
    return read


def _picture(suffix: str) -> Target:
    """kinds of picture that are read, each with what is rare in it: a palette, a profile, EXIF."""

    def make(folder: Path) -> Path:
        from PIL import ImageCms

        path = folder / f"picture.{suffix}"
        image = Image.linear_gradient("L").resize((40, 24)).convert("RGB")
        profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
        if suffix in ("png", "jpg", "webp", "tiff"):
            exif = Image.Exif()
            exif[0x0112] = 6
            image.save(path, icc_profile=profile, exif=exif.tobytes())
        else:
            image.quantize(16).save(path)
        return path

    def read(place: Path) -> object:
        from pixart.pictures import head_of, open_picture, to_srgb

        head_of(place, place.name)
        image = open_picture(place, place.name)
        try:
            return to_srgb(image)
        except ValueError as error:  # says nothing of the file, which its callers know
            raise ValueError(f"{place.name}: {error}") from error

    return Target(make, read)


def _cache(folder: Path) -> Any:
    from pixart.text.cache import PromptCache

    return PromptCache(folder, {"encoder": "tiny"})


def _make_cache_entry(folder: Path) -> Path:
    from pixart.text.cache import Encoded

    _cache(folder).write("a red circle", False, Encoded(torch.ones(5, 8), 5, ""))
    return folder


def _read_cache_entry(place: Path) -> object:
    """It is what was written, or it is made anew."""
    _cache(place).holds("a red circle", False, torch.float32)
    read = _cache(place).read("a red circle", False, torch.float32)
    assert read is None or torch.equal(read.features, torch.ones(5, 8)), "other features"
    return read


def _make_state(folder: Path) -> Path:
    from pixart.training.state import save_state

    tensors = {"model": {"weight": torch.arange(6.0).reshape(2, 3)}}
    progress = {"stage": "base", "averaged": False}
    for step in (1, 2):
        save_state(folder, step, tensors, progress)
    return folder


def _read_state(place: Path) -> object:
    """Of two states the newest that is whole."""
    from pixart.training.state import latest_state, load_tensors, read_progress

    state = latest_state(place)
    if state is None:
        return None
    read_progress(state)
    tensors = {"model": {"weight": torch.empty(2, 3)}}
    load_tensors(state, tensors)
    assert torch.equal(tensors["model"]["weight"].reshape(-1), torch.arange(6.0)), "other numbers"
    return tensors


def _make_prepared(folder: Path) -> Path:
    from pixart.dataset.features import FORMAT, ShardStore

    store = ShardStore(folder / "features")
    tensors = {"p.mean": torch.ones(4, 4, 4), "p.std": torch.ones(4, 4, 4), "c": torch.ones(3, 8)}
    store.add(tensors)
    shard = store.shard_of("c")
    sample = {"path": "a.png", "size": [32, 32], "bucket": [32, 32], "image": [shard, "p"],
              "control": [shard, "p"], "captions": {"prompt": [shard, "c"]}}  # fmt: skip
    index = {"format": FORMAT, "vae": {"scaling_factor": 0.13}, "control": "canny",
             "samples": [sample, sample]}  # fmt: skip
    (folder / "index-32.json").write_text(json.dumps(index))
    return folder


def _read_prepared(place: Path) -> object:
    from pixart.dataset.features import PreparedFeatures, ShardStore

    ShardStore(place / "features").refresh()
    features = PreparedFeatures(place, 32)
    return [
        (
            [features.moments(place) for place in (entry.image, entry.control)],
            [features.caption(entry, name) for name in entry.captions],
        )
        for entry in features.entries
    ]


def _make_index(folder: Path) -> Path:
    (folder / "a.png").write_bytes(_png())
    lines = [{"path": "a.png", "prompt": "a red circle", "captions": {"long": ["a", "b"]}}] * 2
    (folder / "index.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder / "index.jsonl"


def _make_folder(folder: Path) -> Path:
    for name in ("a", "b"):
        (folder / f"{name}.png").write_bytes(_png())
        (folder / f"{name}.txt").write_text("a red circle")
    return folder


def _make_log(folder: Path) -> Path:
    lines = [{"step": step, "loss": 1.0 / step} for step in (1, 2, 3)]
    (folder / "log.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    return folder / "log.jsonl"


def _read_log(place: Path) -> object:
    """For a plot, and to be taken up."""
    from pixart.training.plot import read_curve
    from pixart.training.progress import Progress, read_log

    curve = read_curve([values for _, values in read_log(place)], "loss")
    Progress(place.parent, "base", quiet=True).start(2, 3)
    return curve


def _make_statistics(folder: Path) -> Path:
    import numpy as np

    place = folder / "real.npz"
    name, features = "inception-clean-0123", np.arange(24, dtype=np.float32).reshape(6, 4) % 7
    kept = {"features": features, "keys": np.array(list("abcdef")), "extractor": np.array(name)}
    np.savez_compressed(place, mu=np.zeros(4), sigma=np.eye(4), n=np.array(6), **kept)
    return place


def _read_statistics(place: Path) -> object:
    from pixart.evaluation.distances.reference import read_statistics

    return read_statistics(place)


_SMALL_T5: dict[str, Any] = {
    "vocab_size": 8,
    "d_model": 32,
    "d_kv": 16,
    "num_heads": 2,
    "d_ff": 32,
    "num_layers": 1,
}


def _make_gguf(folder: Path) -> Path:
    import numpy as np
    from gguf import GGMLQuantizationType as Type
    from t5_files import is_matrix, random_t5, save_gguf

    packed = {}
    for name, one in random_t5(**_SMALL_T5).items():
        blocks = np.ones((one.shape[0], 34 * one.shape[-1] // 32), np.uint8)
        packed[name] = (blocks, Type.Q8_0) if is_matrix(name, one) else (one.numpy(), Type.F32)
    return save_gguf(folder / "t5.gguf", packed)


def _make_t5_fp8(folder: Path) -> Path:
    from t5_files import random_t5, save_with_metadata

    return save_with_metadata(folder / "t5.safetensors", random_t5(**_SMALL_T5))


def _read_t5(place: Path) -> object:
    from pixart.text.networks import check_encoder
    from pixart.text.stored import read_weights
    from pixart.text.t5 import T5Shape

    weights = read_weights([place])
    check_encoder(place, weights)
    dense = {name: one.dense(torch.float32).shape for name, one in weights.tensors.items()}
    try:
        return T5Shape.seen_in(dense)
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from error


TARGETS: dict[str, Target] = {
    "safetensors": _checkpoint("model.safetensors", _write_pixart),
    "pth": _checkpoint("model.pth", lambda path: save_official(path, official(SHALLOW))),
    "pth-legacy": _checkpoint("model.pth", _write_legacy),
    "diffusers": _checkpoint("folder", _write_diffusers),
    "lora": Target(_make_lora, _read_lora),
    "request-png": _picture_of_ours("v3-plain.png"),
    "request-jpg": _picture_of_ours("v3-jpg.jpg"),
    "prompts": Target(_make_prompts, _read_prompts),
    "request-v6": _picture_of_ours("v6-settings.png"),
    **{
        f"image-{suffix}": _source_of_pictures("image", suffix) for suffix in ("png", "jpg", "webp")
    },
    "mask": _source_of_pictures("mask", "png"),
    "recipe": Target(_make_recipe, _read_recipe),
    "tar": Target(_make_tar, _read_samples),
    "index": Target(_make_index, _read_samples),
    "folder": Target(_make_folder, _read_samples),
    **{f"picture-{s}": _picture(s) for s in ("png", "jpg", "webp", "gif", "tiff", "bmp", "avif")},
    "cache-entry": Target(_make_cache_entry, _read_cache_entry),
    "state": Target(_make_state, _read_state),
    "prepared": Target(_make_prepared, _read_prepared),
    "log": Target(_make_log, _read_log),
    "statistics": Target(_make_statistics, _read_statistics),
    "gguf": Target(_make_gguf, _read_t5),
    "t5-fp8": Target(_make_t5_fp8, _read_t5),
    **{name: Target(*pair) for name, pair in {**PAIRS, **PREFERENCE, **SCALING}.items()},
}


@contextmanager
def silence() -> Any:
    """Readers warn of what they pass over, thousands of times here."""
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


def damage(target: str, seed: int, folder: Path) -> str:
    """Damage one file of a sample in place. Returns its name and how, for people."""
    rng = random.Random(f"{target}/{seed}")
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    chosen = rng.choice(files)
    content = chosen.read_bytes()
    mutation = rng.choice(mutations_for(chosen, content))
    try:
        changed = mutation(rng, content)
    except (ValueError, LookupError, KeyError):  # of what it had damaged itself
        mutation, changed = damaged_bytes, damaged_bytes(rng, content)
    chosen.write_bytes(changed)
    return f"{chosen.relative_to(folder)} by {mutation.__name__}"
