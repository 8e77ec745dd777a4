"""Detectors: what is in pictures, with boxes and colours, into the file that GenEval and T2I-CompBench read.

    open_detector("checker", context)                                    the embedded world, exactly
    open_detector("facebook/mask2former-swin-small-coco-instance", ...)  the 80 classes of COCO, with masks
    open_detector("google/owlv2-base-patch16-ensemble", ...)             what the prompts name, boxes only

    detect(entries, detector, output, colours=pixart.evaluation.detecting.colours.ClipColours(context))

Networks are transformers' (4.57 and 5.x) from a folder, `--weights` or the hub's cache. None of them is the
detector of the papers (mmdet's Mask2Former, UniDet): what is made of their boxes has its own protocol id.
"""

from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pixart.evaluation.detecting.detections import (
    CHECKER,
    Detection,
    Mask,
    Picture,
    checked_picture,
    write_detections,
)
from pixart.evaluation.metric import Context
from pixart.evaluation.metrics.compbench import SPATIAL, spatial_objects
from pixart.evaluation.metrics.geneval import clauses_of
from pixart.evaluation.needs import MissingError, Need, find_snapshot, need_snapshot, open_snapshot
from pixart.evaluation.prompt_sets.files import read_prompts
from pixart.evaluation.store.entries import Entry, Prompt
from pixart.evaluation.store.folders import MissingPictures, find_pictures
from pixart.files import check_writable, listed, read_json
from pixart.libraries import importing, silenced
from pixart.pictures import open_rgb
from pixart.progress import counted
from pixart.weights import open_pretrained

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image

    from pixart.evaluation.detecting.colours import ClipColours

LEAST = 0.05  # confidence below which nothing is kept; every scorer asks for more
MOST = 100  # detections of a picture, as mmdet's
# GenEval's names of COCO's classes, where they differ from what networks of the hub call them.
NAMES = {"mouse": "computer mouse", "remote": "tv remote", "keyboard": "computer keyboard",
         "motorbike": "motorcycle", "aeroplane": "airplane", "sofa": "couch", "tvmonitor": "tv",
         "pottedplant": "potted plant", "diningtable": "dining table"}  # fmt: skip


class Detector:
    """id: "FAMILY:MODEL", which becomes part of every number made of it."""

    id: str
    asks_names = False  # whether it looks for the classes that a prompt names, and for no others
    has_colours = False

    def needs(self) -> Sequence[Need]:
        return ()

    def __call__(self, image: "Image", names: Sequence[str]) -> tuple[Detection, ...]:
        """What is in an RGB picture. names: the classes that the prompt asks for; a detector with classes of
        its own looks for those."""
        raise NotImplementedError


def open_detector(name: str, context: Context) -> Detector:
    """Nothing is loaded before it is called. ValueError for a network that is none of these."""
    if name == "checker":
        return CheckerDetector()
    folder = find_snapshot(name, context)
    kind = str(read_json(folder / "config.json").get("model_type")) if folder else name.lower()
    if "mask2former" in kind:
        return Mask2Former(name, context)
    if "owlv2" in kind:
        return Owl(name, context)
    if folder is None:
        return Mask2Former(name, context)
    raise ValueError(f"detector must be checker, a Mask2Former or an OWLv2, got {name} ({kind})")


def detect(
    entries: Sequence[Entry],
    detector: Detector,
    output: Path,
    *,
    colours: "ClipColours | None" = None,
) -> None:
    """Write what a detector finds in pictures as detections.jsonl. colours: who names the colour of each,
    where the detector does not. MissingError where weights are missing, PictureError for a picture that
    cannot be read."""

    def found() -> Iterator[tuple[str, Picture]]:
        for entry in counted(entries, "detect", len(entries)):
            names = wanted_names(entry.prompt) if detector.asks_names else ()
            image = open_rgb(entry.path, str(entry.path))
            seen = detector(image, names)
            if colours is not None:
                seen = colours(image, seen)
            yield entry.key, Picture(image.width, image.height, seen, detector.id)

    write_detections(output, found())


def detect_folder(
    name: str,
    images: Path,
    prompts: Path,
    output: Path,
    *,
    colours: bool = True,
    weights: Path | None = None,
    device: str | None = None,
) -> tuple[int, str]:
    """`detect` of a folder of pictures; how many there were, and the detector's id. MissingError with all that
    is missing, MissingPictures where pictures are."""
    from pixart.device import choose_device
    from pixart.evaluation.detecting.colours import ClipColours

    context = Context(choose_device(device), weights)
    detector = open_detector(name, context)
    clip = ClipColours(context) if colours and not detector.has_colours else None
    if needs := [*detector.needs(), *(clip.needs() if clip else ())]:
        raise MissingError("detect", needs)
    check_writable(output)
    found = find_pictures(images, read_prompts(prompts))
    if found.missing:
        raise MissingPictures(
            f"{images}: {len(found.missing)} of {len(found.entries)} pictures are missing "
            f"({listed(sorted(found.missing))}); draw them, or leave their prompts out"
        )
    detect(found.entries, detector, output, colours=clip)
    return len(found.entries), detector.id


def wanted_names(prompt: Prompt) -> list[str]:
    """The classes that GenEval's clauses name, or the objects of T2I-CompBench, each once. ValueError for a
    prompt that names none."""
    if prompt.category == SPATIAL and "include" not in prompt.meta:
        first, _, second = spatial_objects(prompt)
        names = [first, second]
    else:
        clauses = clauses_of(prompt)
        names = [one["class"] for one in (*clauses["include"], *clauses["exclude"])]
    return list(dict.fromkeys(names))


class CheckerDetector(Detector):
    id = CHECKER
    has_colours = True

    def __call__(self, image: "Image", names: Sequence[str]) -> tuple[Detection, ...]:
        return checked_picture(image).detections


class _Network(Detector):
    family: str

    def __init__(self, name: str, context: Context) -> None:
        self.name, self.context = name, context

    @property
    def id(self) -> str:  # type: ignore[override]
        return f"{self.family}:{self.name.rstrip('/').rpartition('/')[2]}"

    def needs(self) -> Sequence[Need]:
        return need_snapshot(self.name, self.context)

    def folder(self) -> Path:
        return open_snapshot("detector", self.name, self.context)


class Mask2Former(_Network):
    """Instances with masks (arXiv:2112.01527), put together as mmdet does: of all queries and classes the
    100 likeliest pairs, a pair's confidence being that of its class times the mean of its mask's
    probabilities where they are above a half, and the box around those pixels."""

    family = "hf-mask2former"

    @cached_property
    def _opened(self) -> tuple[Any, Any]:
        with importing():
            from transformers import AutoImageProcessor, Mask2FormerForUniversalSegmentation
        folder = self.folder()
        with silenced():
            processor = AutoImageProcessor.from_pretrained(folder, local_files_only=True)
        kind = Mask2FormerForUniversalSegmentation
        return processor, open_pretrained(kind, folder, may_hold_more=True).to(self.context.device)

    def __call__(self, image: "Image", names: Sequence[str]) -> tuple[Detection, ...]:
        import torch

        processor, model = self._opened
        inputs = processor(images=image, return_tensors="pt").to(self.context.device)
        with torch.inference_mode():
            outputs = model(**inputs)
        masks = _whole(outputs.masks_queries_logits, inputs, (image.height, image.width))
        classes = outputs.class_queries_logits[0].softmax(-1)[:, :-1]  # the last is "nothing"
        found = []
        scores, places = classes.flatten().topk(min(MOST, classes.numel()))
        for score, place in zip(scores.tolist(), places.tolist(), strict=True):
            query, label = divmod(place, classes.shape[1])
            mask = masks[query] > 0
            if not mask.any():
                continue
            confidence = score * float(masks[query][mask].sigmoid().mean())
            if confidence < LEAST:
                continue
            name = model.config.id2label[label]
            pixels = mask.cpu().numpy()
            found.append(
                Detection(NAMES.get(name, name), confidence, _around(mask), mask=Mask.of(pixels))
            )
        return tuple(sorted(found, key=lambda one: -one.score))


class Owl(_Network):
    """OWLv2 (arXiv:2306.09683): boxes of any words, here the classes that a prompt asks for."""

    family = "hf-owlv2"
    asks_names = True

    @cached_property
    def _opened(self) -> tuple[Any, Any]:
        with importing():
            from transformers import Owlv2ForObjectDetection, Owlv2Processor
        folder = self.folder()
        with silenced():
            processor = Owlv2Processor.from_pretrained(folder, local_files_only=True)
        model = open_pretrained(Owlv2ForObjectDetection, folder, may_hold_more=True)
        return processor, model.to(self.context.device)

    def __call__(self, image: "Image", names: Sequence[str]) -> tuple[Detection, ...]:
        import torch

        if not names:
            raise ValueError(
                "names must be of classes, one at least, for a detector without its own"
            )
        processor, model = self._opened
        texts = [f"a photo of a {name}" for name in names]
        inputs = processor(text=texts, images=image, return_tensors="pt").to(self.context.device)
        with torch.inference_mode():
            outputs = model(**inputs)
        scores, labels = outputs.logits[0].sigmoid().max(-1)
        # Boxes are shares of a square that the picture is the upper left of.
        side = max(image.size)
        found = []
        for place in scores.topk(min(MOST, len(scores))).indices.tolist():
            if (score := float(scores[place])) < LEAST:
                continue
            x, y, width, height = (outputs.pred_boxes[0, place] * side).tolist()
            corners = (x - width / 2, y - height / 2, x + width / 2, y + height / 2)
            found.append(Detection(names[int(labels[place])], score, _within(corners, image)))
        return tuple(found)


def _whole(masks: "torch.Tensor", inputs: Any, size: tuple[int, int]) -> "torch.Tensor":
    """(queries, height, width): the masks' numbers at the picture's own size, without the padding."""
    from torch.nn.functional import interpolate

    padded = inputs["pixel_values"].shape[-2:]
    masks = interpolate(masks.float(), padded, mode="bilinear", align_corners=False)
    seen = inputs["pixel_mask"][0].bool() if "pixel_mask" in inputs else None
    if seen is not None:
        masks = masks[..., : int(seen.any(1).sum()), : int(seen.any(0).sum())]
    return interpolate(masks, size, mode="bilinear", align_corners=False)[0]


def _around(mask: "torch.Tensor") -> tuple[float, float, float, float]:
    rows, columns = mask.any(1).nonzero()[:, 0], mask.any(0).nonzero()[:, 0]
    corners = (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
    left, top, right, bottom = map(float, corners)
    return left, top, right, bottom


def _within(corners: Sequence[float], image: "Image") -> tuple[float, float, float, float]:
    """The part of a box that lies in the picture."""
    left, right = (min(max(corners[k], 0.0), float(image.width)) for k in (0, 2))
    top, bottom = (min(max(corners[k], 0.0), float(image.height)) for k in (1, 3))
    return left, top, right, bottom
