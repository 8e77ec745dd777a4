"""Pictures from pictures, drawn by the embedded model: what is kept to the bit, sizes, and drawing again."""

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms
from pipelines import levels_apart

from pixart.pictures import open_rgb
from pixart.pipeline import drawing
from pixart.pipeline.request import Request
from pixart.pipeline.stages import stages_of
from pixart.pipeline.text_to_image import Pipeline
from pixart.pipeline.upscale import sizes_between
from pixart.sampler.guidance import Guidance
from pixart.sampler.loop import Cancelled, Progress

SHORT: dict[str, Any] = {"steps": 2, "batched": True, "tile": False}


@pytest.fixture(scope="module")
def pipe() -> Pipeline:
    return Pipeline.from_pretrained(device="cpu", cache_dir=None)


def photo(height: int, width: int, mode: str = "RGB") -> Image.Image:
    """Nothing in it is plain, and no side of it like another."""
    rows, columns = np.mgrid[:height, :width]
    levels = np.stack([rows * 3, columns * 2, rows + columns, 255 - rows], 2) % 256
    image = Image.fromarray(levels[..., :3].astype(np.uint8))
    if mode == "RGBA":
        image.putalpha(Image.fromarray(levels[..., 3].astype(np.uint8)))
    return image


def right_half(image: Image.Image) -> Image.Image:
    mask = Image.new("L", image.size)
    mask.paste(255, (image.width // 2, 0, *image.size))
    return mask


def draw(pipe: Pipeline, prompt: str = "a red circle", **settings: Any) -> Any:
    pictures = {
        name: settings.pop(name)
        for name in ("image", "mask")
        if not isinstance(settings.get(name), str | None)
    }
    names = {name: name for name in pictures}
    return pipe.draw(Request(prompt, **SHORT | names | settings), pictures=pictures)


def stored(name: str, folder: Path) -> Path:
    """A file of 90 x 70 pixels, upright, as cameras and print shops store them."""
    image, path = photo(90, 70), folder / f"{name}.png"
    if name == "turned":
        path = folder / "turned.jpg"
        exif = Image.Exif()
        exif[0x0112] = 6  # lies on its side
        image.rotate(90, expand=True).save(path, quality=95, exif=exif)
    elif name == "16 bits":
        Image.fromarray(np.arange(90 * 70, dtype=np.uint16).reshape(90, 70) * 10).save(path)
    elif name == "lab":
        path = folder / "lab.tif"
        to_lab = ImageCms.buildTransform(
            ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), "RGB", "LAB"
        )
        profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
        ImageCms.applyTransform(image, to_lab).save(path, icc_profile=profile)
    elif name == "alpha":
        photo(90, 70, "RGBA").save(path)
    else:
        image.convert({"grey": "L", "palette": "P", "cmyk": "CMYK"}[name]).save(
            path := folder / (f"{name}.tif" if name == "cmyk" else f"{name}.png")
        )
    return path


@pytest.mark.parametrize("name", ["turned", "16 bits", "lab", "alpha", "grey", "palette", "cmyk"])
def test_outside_the_mask_lie_the_files_own_pixels(
    pipe: Pipeline, name: str, tmp_path: Path
) -> None:
    path = stored(name, tmp_path)
    own = open_rgb(path, name)
    mask = right_half(own)
    drawn = draw(pipe, image=str(path), mask=mask)
    assert drawn.image.size == own.size == (70, 90)
    found, expected = np.asarray(drawn.image), np.asarray(own)
    np.testing.assert_array_equal(found[:, :35], expected[:, :35])
    assert levels_apart(found[:, 35:], expected[:, 35:]) > 20
    assert drawn.inputs[str(path)] == hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_soft_mask_mixes_and_a_faded_one_stays_within_it(pipe: Pipeline) -> None:
    own = photo(96, 96)
    mask = right_half(own)
    faded = np.asarray(draw(pipe, image=own, mask=mask, mask_blur=16).image)
    np.testing.assert_array_equal(faded[:, :48], np.asarray(own)[:, :48])
    hard = np.asarray(draw(pipe, image=own, mask=mask).image)
    assert levels_apart(faded[:, 64:], hard[:, 64:]) == 0
    assert levels_apart(faded[:, 48:64], hard[:, 48:64]) > 20
    turned = np.asarray(draw(pipe, image=own, mask=mask, invert_mask=True).image)
    np.testing.assert_array_equal(turned[:, 48:], np.asarray(own)[:, 48:])


def test_what_is_hidden_under_alpha_is_not_seen(pipe: Pipeline) -> None:
    one, other = photo(96, 96), photo(96, 96)
    alpha = Image.eval(right_half(one), lambda level: 255 - level)
    other.paste((255, 0, 255), (48, 0, 96, 96))
    for image in (one, other):
        image.putalpha(alpha)
    drawn = [draw(pipe, image=image, mask="alpha", strength=0.5).image for image in (one, other)]
    assert levels_apart(*drawn) == 0
    np.testing.assert_array_equal(
        np.asarray(drawn[0])[:, :48], np.asarray(one.convert("RGB"))[:, :48]
    )


@pytest.mark.parametrize("border", ["13,0,5,9", "0,40,0,0"])
def test_a_border_is_drawn_around_the_picture_itself(pipe: Pipeline, border: str) -> None:
    own = photo(77, 101)
    left, top, right, bottom = map(int, border.split(","))
    drawn = draw(pipe, image=own, outpaint=border)
    assert drawn.image.size == (101 + left + right, 77 + top + bottom)
    assert (drawn.request.height, drawn.request.width) == drawn.image.size[::-1]
    inside = drawn.image.crop((left, top, left + 101, top + 77))
    assert levels_apart(inside, own) == 0
    masked = draw(pipe, image=own, outpaint=border, mask=right_half(own)).image
    assert (
        levels_apart(masked.crop((left, top, left + 50, top + 77)), own.crop((0, 0, 50, 77))) == 0
    )
    assert levels_apart(masked, drawn.image) > 20


def test_a_picture_is_cut_to_the_bucket_of_its_aspect_or_drawn_as_large_as_it_is(
    pipe: Pipeline,
) -> None:
    own = photo(150, 300)
    cut = draw(pipe, image=own)
    assert (cut.request.fit, cut.request.strength) == ("crop", 0.6)
    assert cut.image.size == (192, 96) == cut.request.final_size[::-1]
    assert draw(pipe, image=own, size="128x64", fit="crop").image.size == (128, 64)
    exact = draw(pipe, image=own.crop((0, 0, 131, 67)), fit="exact")
    assert exact.image.size == (131, 67)


@pytest.mark.parametrize("fit", ["crop", "exact"])
def test_all_drawn_anew_is_a_picture_of_the_prompt_alone(pipe: Pipeline, fit: str) -> None:
    anew = draw(pipe, image=photo(128, 128), strength=1.0, fit=fit)
    assert levels_apart(anew.image, draw(pipe).image) == 0


@pytest.mark.parametrize(
    "settings",
    [
        {"strength": 0.5},
        {"mask": "mask", "mask_blur": 3},
        {"outpaint": "3,5,0,0", "scheduler": "euler-a"},
        {"strength": 0.5, "upscale": "1.5x", "tiles": 128},
        {"upscale": "160", "upscale_strength": 0.5},
    ],
    ids=str,
)
def test_a_picture_drawn_again_has_the_same_bits(pipe: Pipeline, settings: dict[str, Any]) -> None:
    own = photo(99, 131)
    pictures = {"image": own, "mask": right_half(own)}
    asked = Request("a star", image="image", steps=2, seed=3, **settings)
    first = pipe.draw(asked, pictures=pictures)
    again = pipe.draw(first.request, pictures=pictures)
    assert levels_apart(first.image, again.image) == 0
    assert (
        again.request == first.request == pipe.resolve(first.request, pictures=pictures)
        and first.inputs == again.inputs
    )
    assert first.image.size == first.request.final_size[::-1]
    assert {"encode", "denoise", "decode"} <= set(first.seconds)
    other = pipe.draw(replace(first.request, seed=4), pictures=pictures)
    assert levels_apart(first.image, other.image) > 0


def test_several_are_drawn_in_one_pass_where_they_share_their_picture(pipe: Pipeline) -> None:
    own = photo(96, 128)
    pictures = {"image": own}
    asked = [
        Request(text, seed=k, image="image", upscale="144", strength=0.7, **SHORT)
        for k, text in enumerate(("a red circle", "a blue star"))
    ]
    together = list(pipe.draw_many(asked, batch=2, pictures=pictures))
    alone = list(pipe.draw_many(asked, pictures=pictures))
    assert [one.batch for one in together] == [2, 2]
    assert all(levels_apart(a.image, b.image) <= 2 for a, b in zip(together, alone, strict=True))


def test_steps_of_both_stages_are_counted_in_one_and_either_can_be_cancelled(
    pipe: Pipeline,
) -> None:
    seen: list[Progress] = []
    asked = Request("a star", steps=4, upscale="2x", upscale_strength=0.5)
    pipe.draw(asked, callback=seen.append)
    assert [(one.step, one.total) for one in seen] == [(step, 6) for step in range(1, 7)]
    assert seen[3].latents.shape[2:] == (16, 16) and seen[4].latents.shape[2:] == (32, 32)
    for steps in (2, 5):
        seen.clear()
        with pytest.raises(Cancelled):
            pipe.draw(asked, callback=seen.append, cancel=lambda steps=steps: len(seen) == steps)
        assert len(seen) == steps
    seen.clear()
    pipe.draw(Request("a star", steps=10, image="a", strength=0.3), pictures={"a": photo(64, 64)},
              callback=seen.append)  # fmt: skip
    assert [one.total for one in seen] == [3] * 3


def test_windows_that_hold_the_picture_change_nothing(pipe: Pipeline) -> None:
    asked = Request("a star", **SHORT | {"steps": 3}, upscale="2x", upscale_strength=0.5)
    whole = pipe.draw(asked)
    assert whole.image.size == (256, 256)
    assert levels_apart(whole.image, pipe.draw(replace(asked, tiles=256)).image) == 0
    assert levels_apart(whole.image, pipe.draw(replace(asked, tiles=128)).image) > 0


def test_a_file_is_decoded_once_for_requests_that_share_it(
    pipe: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import pixart.pipeline.inputs as inputs

    opened: list[str] = []
    known = inputs.open_picture
    monkeypatch.setattr(
        inputs, "open_picture", lambda content, name: (opened.append(name), known(content, name))[1]
    )
    path = str(tmp_path / "a.png")
    photo(64, 64).save(path)
    request = Request("a star", image=path, strength=0.5, fit="exact", **SHORT)
    list(pipe.draw_many([request, replace(request, seed=1)]))
    assert opened == [path]


def test_pictures_are_given_by_call_in_memory_or_as_files(pipe: Pipeline, tmp_path: Path) -> None:
    own = photo(96, 96)
    own.save(tmp_path / "own.png")
    given = {"strength": 0.5, "seed": 2, **SHORT}
    [in_memory] = pipe("a star", image=own, **given)
    [from_file] = pipe("a star", image=tmp_path / "own.png", **given)
    assert levels_apart(in_memory, from_file) == 0
    with pytest.raises(ValueError, match="unknown setting 'strenght'; did you mean 'strength'"):
        pipe("a star", image=own, strenght=0.5)


SQUARE = photo(96, 96)
TOP_LINE = Image.new("L", (128, 192))
TOP_LINE.paste(255, (0, 0, 128, 1))
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"image": photo(3, 3)}, "image: must be at least 16 px a side to draw from, got 3x3"),
    ({"image": photo(40, 40), "fit": "exact"}, "image: must be 64 to 8192 px a side .* fit crop"),
    ({"image": SQUARE, "mask": right_half(photo(96, 95))},
     "mask: must be as large as the picture, 96x96, got 95x96"),
    ({"image": SQUARE, "mask": Image.new("L", (96, 96))}, "mask: must not be black all over"),
    ({"image": SQUARE, "mask": Image.new("L", (96, 96), 255), "invert_mask": True},
     "mask: must not be white all over"),
    ({"image": photo(192, 128), "mask": TOP_LINE, "fit": "crop", "size": "128"},
     "mask: must say what to draw within what fit crop leaves of the picture"),
    ({"image": SQUARE, "mask": "alpha"}, "image: must be transparent somewhere for mask alpha"),
    ({"image": SQUARE, "fit": "exact", "size": "128"}, "size must be left out with fit exact"),
    ({"image": SQUARE, "outpaint": "8,0,0,0", "height": 64}, "height must be left out"),
    ({"image": SQUARE, "outpaint": "8,0,0,0", "fit": "crop"}, "outpaint must .* without fit crop"),
    ({"image": SQUARE, "outpaint": "8192,0,0,0"}, "image: must be 64 to 8192 px a side"),
    ({"image": SQUARE, "strength": 0.1}, "strength must be above 0.25 to leave one of 2 steps"),
    ({"upscale": "2x", "upscale_strength": 0.1}, "upscale_strength must be above 0.25"),
    ({"upscale": "64"}, "upscale must make the picture larger, which has 128x128, got 64x64"),
    ({"upscale": 2}, "upscale must make the picture larger, .* got 0x0 for 2; 2x is a factor"),
    ({"upscale": "300x256"}, "upscale must be a multiple of 16 on both sides, .* try 304x256"),
    ({"upscale": "100x"}, "upscale must have up to 8192 px a side, got 12800x12800 for 100x"),
    ({"upscale": "large"}, "upscale must be 256, .* got 'large'"),
    ({"upscale": "2x", "tiles": 32}, "tiles must be at least 64 pixels, got 32"),
    ({"image": "nothing.png"}, "nothing.png: cannot be read .No such file"),
    ({"pag": 2.0, "pag_blocks": "6"}, "pag_blocks must be from 0 to 5 for this model, got 6"),
]  # fmt: skip


@pytest.mark.parametrize("given", [np.zeros((64, 64, 3), np.uint8), b"bytes", 3, [photo(64, 64)]])
def test_what_is_no_picture_is_named_wherever_it_is_given(pipe: Pipeline, given: Any) -> None:
    refused = (
        r"^{} must be a file or a PIL.Image.Image, got .+; Image.fromarray makes one of an array$"
    )
    own = photo(64, 64)
    for named, settings in (("image", {"image": given}), ("mask", {"image": own, "mask": given})):
        with pytest.raises(ValueError, match=refused.format(named)):
            pipe("a red circle", **settings)
    with pytest.raises(ValueError, match=refused.format("q")):
        pipe.resolve(Request("a red circle", image="q"), pictures={"q": given})
    with pytest.raises(ValueError, match="^pictures must be names with pictures, got a list$"):
        pipe.resolve(Request("a red circle", image="q"), pictures=[own])  # type: ignore[arg-type]


def test_a_picture_that_is_changed_after_it_was_given_is_drawn_as_it_was(pipe: Pipeline) -> None:
    request = Request("a red circle", image="image", mask="mask", **SHORT)
    own, mask = photo(64, 64), right_half(photo(64, 64))
    expected = pipe.draw(request, pictures={"image": own, "mask": mask})
    drawing = pipe.draw_many([request], pictures={"image": own, "mask": mask})
    for image in (own, mask):
        image.paste(0, (0, 0, 64, 32))
    drawn = next(iter(drawing))
    np.testing.assert_array_equal(np.asarray(drawn.image), np.asarray(expected.image))
    assert drawn.inputs == expected.inputs


@pytest.mark.parametrize("settings, reason", REFUSED, ids=[reason for _, reason in REFUSED])
def test_what_cannot_be_drawn_is_refused_in_one_line_before_anything_runs(
    pipe: Pipeline, settings: dict[str, Any], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Pipeline, "prepare", lambda *_: pytest.fail("encoded text"))
    with pytest.raises(ValueError, match=reason) as error:
        draw(pipe, **settings)
    assert "\n" not in str(error.value)


def test_a_damaged_file_is_named_before_anything_runs(
    pipe: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Pipeline, "prepare", lambda *_: pytest.fail("encoded text"))
    path = tmp_path / "half.png"
    photo(96, 96).save(path)
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(ValueError, match="half.png: cannot be read"):
        draw(pipe, image=str(path))


def test_a_picture_is_made_larger_by_at_most_twice_at_once() -> None:
    assert sizes_between((128, 128), (512, 512), 16) == [(256, 256), (512, 512)]
    assert sizes_between((128, 128), (256, 256), 16) == [(256, 256)]
    assert sizes_between((128, 128), (128, 128), 16) == [(128, 128)]
    assert sizes_between((128, 192), (1024, 1536), 16) == [(256, 384), (512, 768), (1024, 1536)]
    assert sizes_between((130, 97), (400, 304), 16) == [(224, 176), (400, 304)]


def test_a_larger_picture_keeps_what_the_smaller_one_shows(pipe: Pipeline) -> None:
    """Whatever its prompt says: all but the finest is held."""
    [small] = pipe("a large red circle on white", seed=1, steps=8)
    asked = Request("a large blue star on black", steps=10, seed=2)
    of_it = replace(asked, image="small", upscale="2x", upscale_strength=0.6)
    larger = pipe.draw(of_it, pictures={"small": small})
    free = pipe.draw(
        replace(asked, image="small", size="256x256", strength=0.6), pictures={"small": small}
    )

    def far(picture: Image.Image) -> float:
        shrunk = np.asarray(picture.resize((128, 128), Image.Resampling.BOX), np.float64)
        return float(np.abs(shrunk - np.asarray(small, np.float64)).mean())

    assert far(larger.image) < 6 < 40 < far(free.image)
    assert larger.request.guidance == 1 and larger.request.upscale_guidance is None


def test_guidance_of_a_larger_picture_is_its_own(pipe: Pipeline) -> None:
    asked = Request("a star", steps=4, guidance=3.0, apg=True, upscale="2x", upscale_strength=0.5)
    resolved = pipe.resolve(asked)
    assert (resolved.guidance, resolved.upscale_guidance) == (3.0, 1.0)
    first, second = stages_of(resolved, 16)
    assert first.guidance.apg and second.guidance == Guidance(1.0)
    guided = pipe.resolve(replace(asked, upscale_guidance=2.0))
    assert stages_of(guided, 16)[1].guidance == replace(first.guidance, scale=2.0)
    with pytest.raises(ValueError, match="upscale_guidance must be left out where upscale begins"):
        replace(asked, image="in.png", apg=None, upscale_guidance=2.0)


@pytest.mark.parametrize(
    ("more", "stages"),
    [
        ({}, ["denoise", "decode"]),
        ({"image": photo(128, 128), "strength": 0.6}, ["encode", "denoise", "decode"]),
        ({"upscale": "2x"}, ["denoise", "decode", "encode", "denoise", "decode"]),
    ],
)
def test_a_cpu_gives_back_what_a_stage_took_before_the_next(
    pipe: Pipeline, monkeypatch: pytest.MonkeyPatch, more: dict[str, Any], stages: list[str]
) -> None:
    done: list[str] = []

    def note(of: Any, name: str, stage: str) -> None:
        work = getattr(of, name)

        def noted(*args: Any, **kwargs: Any) -> Any:
            done.append(stage)
            return work(*args, **kwargs)

        monkeypatch.setattr(of, name, noted)

    note(drawing, "return_cached", "given back")
    note(drawing, "sample", "denoise")
    note(drawing, "decode", "decode")
    note(pipe.vae, "encode", "encode")
    draw(pipe, **more)
    assert done == [one for stage in stages for one in ("given back", stage)]
