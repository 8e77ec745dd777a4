"""The guide's pictures: a sheet for each feature, strips of labelled pictures from input to result."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from bench.studies.editing.cases import SIDE
from bench.studies.editing.studio import Studio
from pixart.files import written_aside
from pixart.pipeline.request import Request
from pixart.sampler.loop import Progress
from pixart.shapes.following import sample_outlined

Cell = tuple[str, Image.Image]
Strip = tuple[str, Sequence[Cell]]  # a title, and pictures over their labels

GAP, LINE = 8, 18  # pixels
PAPER, INK, FRAME = (255, 255, 255), (60, 60, 60), (200, 200, 200)
COLOURS = 128  # of a sheet: the noise of a decoded ground is not worth its bytes
SEED = 7


def draw_sheets(studio: Studio, folder: Path, names: Sequence[str]) -> None:
    """FOLDER/img2img.png and the others."""
    for name in names:
        whole = sheet(SHEETS[name](studio))
        with written_aside(folder / f"{name}.png") as aside:
            whole.save(aside, "PNG", optimize=True)


def sheet(strips: Sequence[Strip]) -> Image.Image:
    """Strips below each other, in few colours."""
    made = [_strip(title, cells) for title, cells in strips]
    height = sum(one.height for one in made)
    whole = Image.new("RGB", (max(one.width for one in made), height), PAPER)
    top = 0
    for one in made:
        whole.paste(one, (0, top))
        top += one.height
    return whole.quantize(COLOURS, dither=Image.Dither.NONE)


def _strip(title: str, cells: Sequence[Cell]) -> Image.Image:
    height = max(picture.height for _, picture in cells)
    width = sum(picture.width + GAP for _, picture in cells) + GAP
    font = ImageFont.load_default(12)
    top = GAP + LINE * bool(title)
    strip = Image.new("RGB", (max(width, round(font.getlength(title)) + 2 * GAP),
                              top + height + LINE + GAP // 2), PAPER)  # fmt: skip
    pen, left = ImageDraw.Draw(strip), GAP
    pen.text((GAP, GAP // 2), title, INK, font)
    for label, picture in cells:
        right, bottom = left + picture.width, top + picture.height
        strip.paste(picture.convert("RGB"), (left, top))
        pen.rectangle((left - 1, top - 1, right, bottom), outline=FRAME)
        pen.text((left, bottom + 2), label, INK, font)
        left = right + GAP
    return strip


def _draw(studio: Studio, caption: str, **changes: Any) -> Image.Image:
    """A picture of the caption."""
    [picture] = _edit(studio, {}, [{"prompt": caption, **changes}])
    return picture


def _edit(
    studio: Studio, pictures: Mapping[str, Image.Image], asked: Sequence[Mapping[str, Any]]
) -> list[Image.Image]:
    return studio.draw([Request(**{"seed": SEED, **one}) for one in asked], pictures)


def img2img(studio: Studio) -> list[Strip]:
    """A thing moved, and a thing changed, at rising strength."""
    strips: list[Strip] = []
    for before, after in (
        ("a large red circle on the left on white", "a large red circle on the right on white"),
        (
            "a large blue star in the center on gray",
            "a large orange triangle in the center on gray",
        ),
    ):
        base = _draw(studio, before)
        strengths = (0.3, 0.6, 0.8, 1.0)
        asked = [{"prompt": after, "image": "image", "strength": one} for one in strengths]
        drawn = _edit(studio, {"image": base}, asked)
        named = zip((f"--strength {one}" for one in strengths), drawn, strict=True)
        strips.append((after, [("--image", base), *named]))
    return strips


def inpaint(studio: Studio) -> list[Strip]:
    """A thing added in a half, and a thing recoloured in a box."""
    strips: list[Strip] = []
    for before, after, box in (
        (
            "a large red star on the left on gray",
            "a large red star on the left and a small yellow circle on the right on gray",
            (64, 0, 127, 127),
        ),
        (
            "a large purple cross left of a small cyan circle on black",
            "a large purple cross left of a small orange circle on black",
            (66, 35, 124, 93),
        ),
    ):
        base, mask = _draw(studio, before), Image.new("L", (SIDE, SIDE))
        ImageDraw.Draw(mask).rectangle(box, fill=255)
        asked = {"prompt": after, "image": "image", "mask": "mask"}
        hard, soft = _edit(
            studio, {"image": base, "mask": mask}, [asked, {**asked, "mask_blur": 8}]
        )
        strips.append(
            (
                after,
                [("--image", base), ("--mask", mask), ("result", hard), ("--mask-blur 8", soft)],
            )
        )
    return strips


def outpaint(studio: Studio) -> list[Strip]:
    """A picture that goes on to one side and to two, and half a picture that goes on with a thing."""
    base = _draw(studio, "a large green square in the center on white", seed=3)
    places = {"0,0,64,0": "on the left", "32,0,32,0": "in the center"}
    asked = [
        {"prompt": f"a large green square {place} on white", "image": "image", "outpaint": border}
        for border, place in places.items()
    ]
    one, two = _edit(studio, {"image": base}, asked)
    half = _draw(studio, "a large blue star on the left on gray").crop((0, 0, SIDE // 2, SIDE))
    after = "a large blue star on the left and a small red circle on the right on gray"
    more = {"prompt": after, "image": "half", "outpaint": "0,0,64,0"}
    [whole] = _edit(studio, {"half": half}, [more])
    first = [("--image", base), ("--outpaint 0,0,64,0", one), ("--outpaint 32,0,32,0", two)]
    return [("", first), (after, [("--image", half), ("--outpaint 0,0,64,0", whole)])]


def upscale(studio: Studio) -> list[Strip]:
    """The middle of a picture at twice its side: resized, and drawn anew."""
    caption = "a large orange star above a small blue circle on white"
    base = _draw(studio, caption)
    [large] = _edit(
        studio, {"image": base}, [{"prompt": caption, "image": "image", "upscale": "2x"}]
    )
    resized = base.resize(large.size, Image.Resampling.LANCZOS)
    box = (64, 0, 192, 128)
    parts = ((f"resized to {large.width} px", resized), ("--upscale 2x", large))
    cut = ((name, one.crop(box).resize((256, 256))) for name, one in parts)
    return [(caption, [("--image, 128 px", base), *cut])]


def preview(studio: Studio) -> list[Strip]:
    """What --preview shows after some of the steps, enlarged, and the picture."""
    caption = "a large yellow star right of a small red cross on gray"
    steps = (1, 2, 4, 8, 14, 20)
    seen: list[Cell] = []

    def look(progress: Progress) -> None:
        if progress.step in steps:
            [small] = studio.pipe.preview(progress.predicted)
            large = small.resize((SIDE, SIDE), Image.Resampling.NEAREST)
            seen.append((f"step {progress.step}", large))

    drawn = studio.pipe.draw(Request(caption, seed=SEED, steps=max(steps)), callback=look)
    return [(caption, [*seen, ("the picture", drawn.image)])]


def guidance(studio: Studio) -> list[Strip]:
    """One seed at rising guidance, with and without what tames it."""
    caption = "a small purple star left of a large yellow cross on gray"
    ways: Mapping[str, Mapping[str, Any]] = {
        "classifier-free": {},
        "--guidance-rescale 0.7": {"guidance_rescale": 0.7},
        "--apg": {"apg": True},
        "--pag 3": {"pag": 3.0},
    }
    scales = (2.0, 4.5, 8.0, 16.0)
    strips: list[Strip] = []
    for name, changes in ways.items():
        asked = [{"prompt": caption, "guidance": one, **changes} for one in scales]
        drawn = _edit(studio, {}, asked)
        labels = (f"--guidance {one:g}" for one in scales)
        strips.append((name, list(zip(labels, drawn, strict=True))))
    return strips


def control(studio: Studio) -> list[Strip]:
    """Outlines, and what captions that tell neither shape nor place are drawn as by them: the first of the
    study's, where things are at places that the model knows."""
    strips: list[Strip] = []
    for one in list(sample_outlined(4, 0, SIDE)):
        outline = Image.fromarray(one.outline)
        asked = [{"prompt": one.caption, "control_image": ("outline",), "control_scale": (scale,)}
                 for scale in (1.0, 0.5)]  # fmt: skip
        drawn = _edit(studio, {"outline": outline}, [{"prompt": one.caption}, *asked])
        labels = ("without", "--control-scale 1", "--control-scale 0.5")
        named = zip(labels, drawn, strict=True)
        strips.append((one.caption, [("--control-image", outline), *named]))
    return strips


SHEETS: dict[str, Callable[[Studio], list[Strip]]] = {
    "img2img": img2img,
    "inpaint": inpaint,
    "outpaint": outpaint,
    "upscale": upscale,
    "preview": preview,
    "guidance": guidance,
    "control": control,
}
