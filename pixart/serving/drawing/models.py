"""One model with the LoRAs and ControlNets that orders choose by name: pipelines that share their parts."""

import gc
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from pixart.checkpoint.load import empty_model
from pixart.config import EMBEDDED, KVCompression
from pixart.device import free_memory, return_cached
from pixart.few_step import agreed
from pixart.lora.adapters import load_lora
from pixart.pipeline import fast, load
from pixart.pipeline.metadata import MODEL_OPTIONS
from pixart.pipeline.request import Request
from pixart.pipeline.text_to_image import Pipeline
from pixart.plans.plan import NAMES
from pixart.preprocess import parse_places
from pixart.releases import place_of
from pixart.serving.limits import MAX_WEIGHT, MOST_LORAS
from pixart.serving.options import Options

Loras = tuple[tuple[str, float], ...]
KEPT = 2  # pipelines beside the plain one, each with a transformer of its own where it has LoRAs
_WITHOUT = "drawn without the plan of this service"
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Models:
    """Opens the model as the options say, and on the way every LoRA and ControlNet, so that what does not
    fit is refused before anybody asks for it. Weights are read when they are first drawn with.

    loras, controls: places by name. Raises what `Pipeline.from_pretrained` does.
    """

    def __init__(
        self, options: Options, loras: Mapping[str, Path], controls: Mapping[str, str]
    ) -> None:
        self._options, self._loras, self._places = options, dict(loras), dict(controls)
        source = options.model or EMBEDDED
        encoder: Any = options.text_encoder_dtype
        self._compression = (
            KVCompression.parse(options.kv_compress) if options.kv_compress else None
        )
        self.plain = Pipeline.from_pretrained(
            source,
            transformer=options.transformer,
            control=tuple(controls.values()),
            preprocessors=parse_places(options.preprocessor_weights),
            device=options.device,
            dtype=_DTYPES[options.dtype] if options.dtype else None,
            text_encoder=options.text_encoder,
            text_encoder_memory=options.text_encoder_memory,
            text_encoder_dtype=_DTYPES.get(encoder, encoder),
            kv_compression=self._compression,
            quantize=options.quantize,
            plan=options.fast,
            cache_dir=None,  # what people ask for is nobody else's to find on the disk
        )
        self.plain.is_silent = True  # results have the remarks
        fast.with_plan(Request("a"), self.plain)  # refuses a model that none goes with
        self._plan, self.plain.plan = self.plain.plan, None  # each order has its own
        self._controls = dict(zip(controls, self.plain.controls.opened, strict=True))
        self.plain.controls = self.plain.controls.of(())
        self._source = load.find_source(source, options.transformer, None, options.text_encoder)
        self._few_steps = {}  # of the model with each
        for name, path in loras.items():
            tried = load_lora(empty_model(self.plain.opened.config), [(path, 1.0)])
            self._few_steps[name] = tried.config.few_step
        self.plain.weight_files = self._weight_files((), ())
        self._settle_memory()
        self._others: OrderedDict[tuple[Loras, tuple[str, ...]], Pipeline] = OrderedDict()
        self._drawing = self.plain

    @property
    def drawing(self) -> Pipeline:
        """The one whose weights are on the device."""
        return self._drawing

    def check(self, loras: Loras, controls: Sequence[str]) -> None:
        """ValueError for a name that is not on the lists."""
        if len(loras) > MOST_LORAS:
            raise ValueError(f"loras must be {MOST_LORAS} at most, got {len(loras)}")
        for name, weight in loras:
            _check_name("loras", name, self._loras)
            if not abs(weight) <= MAX_WEIGHT:
                raise ValueError(
                    f"loras must have weights from -{MAX_WEIGHT} to {MAX_WEIGHT}, got {weight}"
                )
        for name in controls:
            _check_name("controls", name, self._controls)

    def checker(self, loras: Loras, controls: Sequence[str]) -> Pipeline:
        """To resolve requests with, in any thread: it draws nothing and loads nothing. ValueError for LoRAs
        that were distilled for different things."""
        said = [(name, self._few_steps[name]) for name, weight in loras if weight]
        config = self.plain.opened.config
        config = replace(config, few_step=agreed(said) or config.few_step)
        opened = [self._controls[name] for name in controls]
        return replace(
            self.plain,
            opened=replace(self.plain.opened, config=config),
            controls=self.plain.controls.of(opened),
        )

    @property
    def fast(self) -> str | None:
        """What clients may know of the plan: its name, and of a file what it sets too."""
        name = self._options.fast
        if self._plan is None or name is None or name in NAMES:
            return None if self._plan is None else name
        return f"{Path(name).name} (plan {self._plan.digest()[:12]})"

    def settle_plan(
        self, pipe: Pipeline, loras: Loras, request: Request, wanted: bool
    ) -> list[str]:
        """Give a pipeline the plan, if that goes with the LoRAs and the request; else it has none, which is
        said."""
        pipe.plan = None
        if self._plan is None or not wanted:
            return []
        if loras and self._plan.model is not None:
            return [f"{_WITHOUT}, which was measured without LoRAs"]
        pipe.plan = self._plan
        try:
            fast.with_plan(request, pipe)
        except fast.NotWithPlan as error:
            pipe.plan = None
            return [f"{_WITHOUT} ({error})"]
        return []

    def take(self, loras: Loras, controls: tuple[str, ...]) -> Pipeline:
        """The pipeline to draw with; on a GPU the one before makes room for it, unless all have room."""
        pipe = self._find(loras, controls)
        if pipe is not self._drawing:
            self._drawing.make_room()
            self._drawing = pipe
        return pipe

    def _find(self, loras: Loras, controls: tuple[str, ...]) -> Pipeline:
        if not loras and not controls:
            return self.plain
        key = (loras, controls)
        if key not in self._others:
            self._others[key] = self._make(loras, controls)
            if len(self._others) > KEPT:
                self._others.popitem(last=False)
                _collect(self.plain.device)
        self._others.move_to_end(key)
        return self._others[key]

    def _make(self, loras: Loras, controls: tuple[str, ...]) -> Pipeline:
        """With the transformer of a pipeline that has the same LoRAs, or one opened anew."""
        plain = self.plain
        alike = (pipe for (names, _), pipe in self._others.items() if names == loras)
        like = next(alike, None) if loras else plain
        opened = like.opened if like else self._open(loras)
        pipe = replace(
            plain,
            opened=opened,
            controls=plain.controls.of([self._controls[name] for name in controls]),
            weight_files=self._weight_files(loras, controls),
        )
        pipe.captions.held = plain.captions.held  # T5 does not know of them
        return pipe

    def _open(self, loras: Loras) -> load.OpenedTransformer:
        """As `Pipeline.from_pretrained` does with the same LoRAs, so that pictures have the same bits."""
        dtype = self.plain.opened.dtype
        assert dtype is not None
        return load.open_denoiser(
            self._source,
            self._options.transformer,
            dtype,
            config=None,
            kv_compression=self._compression,
            ema=False,
            lora=self._adapters(loras),
            quantize=self._options.quantize,
        )

    def _adapters(self, loras: Loras) -> list[tuple[str | Path, float]]:
        return [(self._loras[name], weight) for name, weight in loras]

    def _weight_files(self, loras: Loras, controls: Sequence[str]) -> dict[str, list[Path]]:
        opened = [self._controls[name] for name in controls]
        return load.weight_files(self._source, self._adapters(loras), opened)

    def asked(
        self, loras: Loras, controls: Sequence[str], *, is_planned: bool = False
    ) -> dict[str, Any]:
        """The options of `pixart.generate` that open the same pipeline, as a picture is to carry them: of
        what lies on this machine the name alone, since pictures go to clients."""
        options = self._options
        places = parse_places(options.preprocessor_weights).items()
        return {
            **dict.fromkeys(MODEL_OPTIONS),
            "model": _shown(options.model or EMBEDDED),
            "transformer": _shown(options.transformer) if options.transformer else None,
            "lora": [f"{self._loras[name].name}:{weight}" for name, weight in loras],
            "control": [_shown(self._places[name]) for name in controls],
            "preprocessor_weights": [f"{name}={_shown(place)}" for name, place in places],
            "ema": False,
            "kv_compress": options.kv_compress,
            "dtype": options.dtype,
            "text_encoder": _shown(options.text_encoder) if options.text_encoder else None,
            "text_encoder_dtype": options.text_encoder_dtype,
            "quantize": options.quantize,
            "fast": self.fast if is_planned else None,
            "device": options.device,
            "cuda_graph": "auto",
        }

    def _settle_memory(self) -> None:
        """Decide once what memory there is to draw with, so that no picture's bits depend on what others have
        drawn: what is free but for weights still to come. T5 stays where it takes half of that at most: all of
        it, or what it is streamed through."""
        plain, device = self.plain, self.plain.device
        size = sum(tensor.numel() for tensor in plain.opened.tensors().values())
        copies = 1 + (KEPT if self._loras else 0)
        itemsize = (plain.opened.dtype or torch.float32).itemsize
        left = max(0, free_memory(device) - copies * size * itemsize)
        footprint = plain.text_encoder.footprint()
        is_streamed = self._options.text_encoder_memory == "stream"
        encoder = footprint.stream if is_streamed else footprint.resident
        plain.resident = 2 * encoder <= left
        plain.memory = left - encoder if plain.resident else left

    def let_go(self) -> None:
        """Of all that can be had again: after memory has run out."""
        self._others.clear()
        self._drawing.make_room()
        self._drawing = self.plain
        self.plain.forget_prompts()
        self.plain.text_encoder.release()
        _collect(self.plain.device)


def _collect(device: torch.device) -> None:
    gc.collect()  # a model may hold itself in a circle
    return_cached(device)


def _shown(place: str) -> str:
    """A path that is there without its folders; anything else is a release or a hub id."""
    path = Path(place).expanduser()
    return path.resolve().name if place_of(place) is None and path.exists() else place


def _check_name(what: str, name: str, known: Mapping[str, Any]) -> None:
    if name not in known:
        has = ", ".join(known) or "none"
        raise ValueError(f"{what} must be of this service, which has {has}; got {name[:100]!r}")
