"""A published folder in diffusers: the same pictures as ours, and a refusal where it would draw others."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from published import build_alpha, build_sigma
from tiny_checkpoints import edit_json

from pixart import publish
from pixart.checkpoint.load import load_transformer
from pixart.checkpoint.save import save_transformer
from pixart.config import KVCompression
from pixart.few_step import FewStep
from pixart.pipeline.text_to_image import Pipeline

TOLERANCE = 1e-4  # of pixels from 0 to 1
PROMPT = "a large red circle on a White background"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where repositories are written, and where diffusers puts their code."""
    from diffusers.utils import dynamic_modules_utils

    root = tmp_path_factory.mktemp("published")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dynamic_modules_utils, "HF_MODULES_CACHE", str(root / "modules"))
        yield root


def write(folder: Path, model: str, *more: str) -> Path:
    words = [str(folder), "--model", model, "--no-previews", "--license", "mit", *more]
    assert publish.main(words) == 0
    return folder


@pytest.fixture(scope="module")
def embedded(folders: Path) -> Path:
    return write(folders / "embedded", "shapes")


def opened(folder: Path, **options: Any) -> Any:
    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(
        folder, trust_remote_code=True, torch_dtype=torch.float32, **options
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def apart(folder: Path, source: str | Path, **settings: Any) -> float:
    """How far the pixels of both lie apart at most, from 0 to 1."""
    ours = Pipeline.from_pretrained(source, device="cpu", dtype=torch.float32, cache_dir=None)
    states: list[torch.Tensor] = []
    ours(PROMPT, seed=3, callback=lambda step: states.append(step.latents), **settings)
    expected = (ours.vae.decode(states[-1]) / 2 + 0.5).clamp(0, 1)
    names = {"steps": "num_inference_steps", "negative": "negative_prompt"}
    theirs = opened(folder)
    drawn = theirs(
        PROMPT, generator=torch.Generator().manual_seed(3), output_type="pt",
        **{names.get(name, name): value for name, value in settings.items()},
    ).images  # fmt: skip
    assert drawn.shape == expected.shape and expected.std() > 0
    return float((drawn - expected).abs().max())


def test_the_embedded_model_draws_the_same_picture(embedded: Path) -> None:
    """With the steps and guidance of its own on both sides."""
    assert apart(embedded, "shapes", height=160, width=96) < TOLERANCE
    assert apart(embedded, "shapes", steps=3, guidance_interval=(0.0, 0.5)) < TOLERANCE


def test_without_our_kernels_too(embedded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *more: None if name == "pixart_kernels" else find(name, *more),
    )
    assert apart(embedded, "shapes", steps=4) < TOLERANCE


def compressed(folder: Path, changes: Any, **options: Any) -> None:
    """Open a pipeline's transformer anew, with merging weights that are random."""
    model = load_transformer(folder / "transformer", kv_compression=changes)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if ".sr." in name or "attn.norm" in name:
                tensor.add_(torch.randn(tensor.shape, generator=generator) * 0.1)
    for name, value in options.items():
        setattr(model, name, value)
    save_transformer(model, folder / "transformer", overwrite=True)


@pytest.mark.parametrize("kind", ["dense", "compressed"])
def test_a_published_layout_draws_the_same_picture(kind: str, folders: Path) -> None:
    source = build_sigma(folders / f"sigma {kind}", sample_size=16)
    if kind == "compressed":
        compressed(source, KVCompression([1], 2))
    folder = write(folders / f"of {kind}", str(source))
    assert apart(folder, source, steps=3, negative="blue") < TOLERANCE


def test_alpha_has_its_sizes_and_its_null_caption(folders: Path) -> None:
    source = build_alpha(folders / "alpha", vae_channels=(8, 8, 8, 8))
    compressed(source, KVCompression([0], 2), null_caption_stored=True)
    folder = write(folders / "of alpha", str(source))
    ours = Pipeline.from_pretrained(source, device="cpu", cache_dir=None)
    assert ours.shown_null_caption == "prompt-mask"
    assert apart(folder, source, steps=2, height=256, width=128) < TOLERANCE
    assert apart(folder, folder, steps=2, height=128, width=128) < TOLERANCE


@pytest.mark.parametrize(
    "few", [FewStep("lcm", (999, 499), also=((799,),)), FewStep("dmd", (400,))], ids=str
)
def test_a_distilled_model_is_drawn_as_it_says_on_both_sides(few: FewStep, folders: Path) -> None:
    source = build_sigma(folders / f"distilled {few.scheduler}", sample_size=16, num_layers=1)
    edit_json(source / "model_index.json", few_step=few.to_dict())
    folder = write(folders / f"of distilled {few.scheduler}", str(source))
    assert apart(folder, source) < TOLERANCE
    again = Pipeline.from_pretrained(folder, device="cpu", cache_dir=None)
    assert again.few_step == few
    assert f"{few.scheduler}, {len(few.timesteps)} step" in (folder / "README.md").read_text()
    if few.scheduler == "lcm":
        assert apart(folder, folder, steps=3) < TOLERANCE, "others are the scheduler's own"
        assert apart(folder, folder, steps=1) < TOLERANCE, "what it learned beside is found"
        assert apart(folder, source, steps=1, timesteps=[799]) < TOLERANCE


def test_ours_opens_what_it_published(embedded: Path) -> None:
    first = Pipeline.from_pretrained("shapes", device="cpu", cache_dir=None)
    again = Pipeline.from_pretrained(embedded, device="cpu", cache_dir=None)
    assert again.family == "sigma" and again.sampling == first.sampling
    assert again.opened.config == first.opened.config
    assert again(PROMPT, steps=2)[0].tobytes() == first(PROMPT, steps=2)[0].tobytes()


def test_without_trust_it_is_refused(embedded: Path) -> None:
    from diffusers import DiffusionPipeline, PixArtSigmaPipeline, PixArtTransformer2DModel

    with pytest.raises(ValueError, match="trust_remote_code=True"):
        DiffusionPipeline.from_pretrained(embedded)
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        PixArtSigmaPipeline.from_pretrained(embedded)
    # The transformer by itself, by diffusers' own class, which would drop the weights of compression.
    with pytest.raises(NotImplementedError, match="load the pipeline with trust_remote_code=True"):
        PixArtTransformer2DModel.from_pretrained(embedded / "transformer")


def test_diffusers_own_transformer_is_refused_by_the_pipeline(embedded: Path) -> None:
    from diffusers import PixArtTransformer2DModel

    pipe = opened(embedded)
    own = PixArtTransformer2DModel(num_attention_heads=1, num_layers=1, cross_attention_dim=72)
    with pytest.raises(ValueError, match="transformer must be a PixArtKVTransformer2DModel"):
        type(pipe)(**{**pipe.components, "transformer": own})


def test_two_of_them_in_one_process(embedded: Path) -> None:
    """diffusers runs the file a second time, and gives both pipelines what it defines."""
    first, second = opened(embedded), opened(embedded)
    for pipe in (first, second):
        pipe(PROMPT, num_inference_steps=2, output_type="latent")


def test_what_a_call_cannot_do_is_refused(embedded: Path) -> None:
    pipe = opened(embedded)
    for settings, said in (
        ({"height": 100}, "height and width must be multiples of 16, got 100"),
        ({"guidance_interval": (0.5, 0.2)}, "guidance_interval must be"),
        ({"max_sequence_length": 300}, "max_sequence_length must be from 1 to 40, got 300"),
        ({"generator": [torch.Generator()] * 2}, "generator must be one, or 1, got 2"),
        ({"latents": torch.zeros(1, 4, 2, 2)}, "latents must be"),
    ):
        with pytest.raises(ValueError, match=said):
            pipe(PROMPT, **settings)
    with pytest.raises(ValueError, match="prompt must be"):
        pipe()


def test_pictures_of_a_batch_have_their_own_seeds(embedded: Path) -> None:
    pipe = opened(embedded)
    seeds = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    both = pipe([PROMPT, "blue"], generator=seeds, num_inference_steps=2, output_type="pt").images
    second = pipe(
        "blue", generator=torch.Generator().manual_seed(2), num_inference_steps=2, output_type="pt"
    ).images
    assert (both[1] - second[0]).abs().max() < TOLERANCE
