"""The model card: README.md of a repository, with the header that the hub reads."""

import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from pixart import __version__
from pixart.checkpoint.config import is_compressed
from pixart.config import EMBEDDED, PixArtConfig
from pixart.evaluation.report.columns import command_of
from pixart.evaluation.report.folder import Evaluated
from pixart.evaluation.report.markdown import table
from pixart.evaluation.report.readme import fenced, number_table, words
from pixart.few_step import spelt
from pixart.files import read_json
from pixart.pipeline.directory import INDEX
from pixart.publishing.folder import PIPELINE_CLASS, needs_remote_code
from pixart.publishing.source import Base, Source
from pixart.training.stage import DRAWN

if TYPE_CHECKING:
    from pixart.pipeline.text_to_image import Pipeline

_PAPERS = {"sigma": ("Σ", "2403.04692"), "alpha": ("α", "2310.00426")}
# Of a training stage, what a reader of a card asks for.
_TRAINED = (
    "trains", "resolution", "aspect", "max_length", "kv_compress", "kv_norm", "kv_start", "prediction",
    "lora.rank", "batch.images", "batch.tokens", "optimizer.name", "optimizer.learning_rate",
    "timesteps", "min_snr", "ema", "data.captions", "data.caption_dropout",
)  # fmt: skip


@dataclass(frozen=True)
class Shown:
    """A preview. file: in the repository."""

    file: str
    prompt: str
    seed: int


@dataclass(frozen=True)
class Facts:
    """What a card is made of. name: of the repository or folder. folder: where it is written, and lies for
    now. results: evaluations of this very model."""

    name: str
    folder: Path
    license: str
    base: Base | None
    source: Source
    results: Sequence[Evaluated] = ()
    previews: Sequence[Shown] = ()


def model_card(pipe: "Pipeline", facts: Facts) -> str:
    """The text of README.md."""
    config = pipe.opened.config
    letter, paper = _PAPERS[pipe.family]
    title = facts.name.rpartition("/")[2] or facts.name
    parts = [
        header(pipe, facts),
        f"# {words(title)}",
        f"A PixArt-{letter} ([arXiv:{paper}](https://arxiv.org/abs/{paper})){_kind(config)}, published by "
        f"pixart-fast {__version__}.",
        *_previews(facts.previews),
        "## Draw with it",
        *_usage(config, facts),
        "## What it is",
        table(["", ""], [[name, words(value)] for name, value in _settings(pipe, facts)]),
        "## How it was made",
        *_made(facts),
        "## How good it is",
        *_measured(facts.results),
        "## Licence",
        f"`{facts.license}`, {_licensed(facts)}.",
    ]
    return "\n\n".join(parts) + "\n"


def header(pipe: "Pipeline", facts: Facts) -> str:
    """The YAML between two rules that the hub reads."""
    tags = ["pixart", f"pixart-{pipe.family}", "text-to-image"]
    if is_compressed(pipe.opened.config):
        tags.append("kv-compression")
    values: dict[str, Any] = {
        "license": facts.license,
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
        "tags": tags,
    }
    if facts.base is not None and facts.base.hub_id is not None:
        values["base_model"] = facts.base.hub_id
    text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
    return f"---\n{text}---"


def _kind(config: PixArtConfig) -> str:
    if not is_compressed(config) or config.kv_compression is None:
        return ""
    layers, ratio = config.kv_compression.layers, config.kv_compression.ratio
    return f" whose keys and values are merged {ratio}×{ratio} in {len(layers)} of {config.depth} blocks"


def _usage(config: PixArtConfig, facts: Facts) -> list[str]:
    code = (
        "import torch\nfrom diffusers import DiffusionPipeline\n\n"
        "pipe = DiffusionPipeline.from_pretrained(\n"
        f"    {facts.name!r}, trust_remote_code=True, torch_dtype=torch.float32\n)\n"
        f"image = pipe({_example(facts)!r}, generator=torch.Generator().manual_seed(0)).images[0]\n"
    )
    plain = (
        f"`{PIPELINE_CLASS}` and the transformer's class come with the repository, so `trust_remote_code=True` "
        "is needed and diffusers refuses without it. Both are short: read them first. They compute with "
        "`pixart_kernels` where that is installed, and in plain PyTorch elsewhere."
    )
    if needs_remote_code(config):
        plain += (
            " diffusers' own PixArt classes refuse this model, which they would draw without the weights that "
            "they do not know."
        )
    return [
        plain,
        f"```python\n{code}```",
        "With pixart-fast:",
        fenced(shlex.join(["pixart", "generate", _example(facts), "--model", facts.name])),
        "SGLang (`--backend diffusers`) and vLLM-Omni (`--diffusion-load-format diffusers`) say that they run "
        "what `DiffusionPipeline` opens. Not verified: this repository was run in neither, and whether "
        "vLLM-Omni hands `trust_remote_code` on is not known.",
    ]


def _example(facts: Facts) -> str:
    return facts.previews[0].prompt if facts.previews else "a cactus with a happy face"


def _settings(pipe: "Pipeline", facts: Facts) -> Iterable[tuple[str, str]]:
    config, compression = pipe.opened.config, pipe.opened.config.kv_compression
    index = read_json(facts.folder / INDEX)
    count = sum(tensor.numel() for tensor in pipe.opened.tensors().values())
    yield (
        "transformer",
        (
            f"{config.depth} blocks of width {config.hidden_size} ({config.num_heads} heads of "
            f"{config.head_dim}), {count / 1e6:.1f} M parameters"
        ),
    )
    yield "native size", f"{pipe.native} × {pipe.native} pixels"
    yield "captions", f"at most {config.model_max_length} tokens"
    if compression is not None and is_compressed(config):
        layers = ", ".join(map(str, compression.layers))
        norm = "with a LayerNorm" if compression.norm == "layer" else "without a norm"
        yield (
            "keys and values",
            (
                f"merged {compression.ratio}×{compression.ratio} in blocks {layers} ({compression.sampling}, "
                f"{norm})"
            ),
        )
    else:
        yield "keys and values", "not merged"
    if config.qk_norm:
        yield "queries and keys", "normed"
    yield "predicts", str(pipe.solver(None).config.prediction_type)
    yield (
        "drawn with",
        (
            f"{_walk(pipe, index)}, guidance {index['guidance']:g} "
            f"from {index['guidance_start']:g} to {index['guidance_end']:g} of the trajectory"
        ),
    )


def _walk(pipe: "Pipeline", index: Mapping[str, Any]) -> str:
    few_step = pipe.few_step
    if few_step is None:
        return f"{type(pipe.solver(None)).__name__}, {index['steps']} steps"
    count = len(few_step.timesteps)
    at = f"timestep{'s' * (count > 1)} {spelt(few_step.timesteps)}"
    others = "".join(f"; {len(one)} from {spelt(one)}" for one in few_step.also)
    return f"{few_step.scheduler}, {count} step{'s' * (count > 1)} from {at}, for which it was distilled{others}"


def _made(facts: Facts) -> list[str]:
    source, base = facts.source, facts.base
    rows = [["base", words(_based(base))]]
    if source.step is not None:
        rows.append(["stage, step", f"{words(source.stage)}, {source.step:,}"])
    rows += [[words(name), words(value)] for name, value in _trained(source.settings)]
    rows += [["data", words(text)] for text in _data(source)]
    lines = [table(["", ""], rows)]
    if source.step is None and base is not None:
        lines.append("How the base itself was trained, its own card says.")
    return lines


def _based(base: Base | None) -> str:
    return "not told" if base is None else base.name


def _trained(settings: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    for name in _TRAINED:
        value = settings.get(name)
        if value not in (None, "", [], False):
            yield name, str(value)


def _data(source: Source) -> Iterable[str]:
    """The data by name, and by a digest: the folder of whoever trained says nothing to others."""
    for name in ("data.source", "data.prior"):
        place = source.settings.get(name)
        if place == DRAWN:
            yield "drawn scenes of the embedded world"
        elif isinstance(place, str) and place:
            digest = source.data_digests.get(name)
            known = f", sha256 {digest}" if isinstance(digest, str) else ""
            yield f"{Path(place).name}{known}"


def _measured(results: Sequence[Evaluated]) -> list[str]:
    if not results:
        return ["Not measured."]
    parts = []
    for one in results:
        parts += [
            f"{words(str(one.protocol.get('id') or one.protocol.get('name') or one.name))}, "
            f"{one.results.get('pictures', 0):,} pictures, each number with its 95 % interval:",
            number_table([one], [one.name]),
            fenced(command_of(one)),
        ]
    return parts


def _previews(previews: Sequence[Shown]) -> list[str]:
    if not previews:
        return []
    pictures = " ".join(f"![{words(one.prompt)}]({one.file})" for one in previews)
    told = "; ".join(f"“{words(one.prompt)}”, seed {one.seed}" for one in previews)
    return [
        pictures,
        f"*Drawn with this repository, none picked: {told}. Each file carries its request: `pixart generate "
        "--from-image FILE` draws it again.*",
    ]


def _licensed(facts: Facts) -> str:
    if facts.base is not None and facts.base.license == facts.license:
        return f"as that of the base, {words(facts.base.name)}"
    return "as whoever published it says"


def world_prompts() -> list[str]:
    """Captions of the embedded world: the first of each set that its card measures."""
    from pixart.evaluation.prompt_sets.shapes import shapes_prompts

    return [prompt.prompt for prompt in shapes_prompts(3)]


def is_of_embedded_world(source: Source) -> bool:
    """Whether a model draws the embedded world and nothing else."""
    told = (source.settings.get("data.source"), source.settings.get("pipeline"))
    return source.pipeline == EMBEDDED or DRAWN in told
