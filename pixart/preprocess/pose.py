"""Poses: a detector of people, ViTPose (arXiv:2204.12484) for the joints of each, and their skeletons in the
colours that ControlNets of poses were trained on. Both networks are transformers'.

The skeleton is OpenPose's of 18 joints (arXiv:1812.08008, its COCO model): limbs in its order, so that those
drawn later lie above, in its palette at 0.6 of the brightness, and the joints in full colours. ViTPose has
COCO's 17 joints; the neck is the middle of the shoulders, as in OpenPose's training data.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from pixart.files import CheckpointError
from pixart.libraries import importing, silenced
from pixart.weights import errors_naming, open_pretrained

if TYPE_CHECKING:
    from PIL.Image import Image

PERSON = "person"  # as detectors of COCO's or Objects365's classes name it
LEAST_PERSON, LEAST_JOINT = 0.3, 0.3  # confidence below which none is drawn
# OpenPose's joints from COCO's: nose, neck (None), right shoulder, elbow, wrist, the left ones, right hip,
# knee, ankle, the left ones, right and left eye, right and left ear.
JOINTS = (0, None, 6, 8, 10, 5, 7, 9, 12, 14, 16, 11, 13, 15, 2, 1, 4, 3)
SHOULDERS = (5, 6)
LIMBS = ((1, 2), (1, 5), (2, 3), (3, 4), (5, 6), (6, 7), (1, 8), (8, 9), (9, 10), (1, 11), (11, 12),
         (12, 13), (1, 0), (0, 14), (14, 16), (0, 15), (15, 17))  # fmt: skip
PALETTE = (
    (255, 0, 0), (255, 85, 0), (255, 170, 0), (255, 255, 0), (170, 255, 0), (85, 255, 0),
    (0, 255, 0), (0, 255, 85), (0, 255, 170), (0, 255, 255), (0, 170, 255), (0, 85, 255),
    (0, 0, 255), (85, 0, 255), (170, 0, 255), (255, 0, 255), (255, 0, 170), (255, 0, 85),
)  # fmt: skip
LIMB_BRIGHTNESS = 0.6
# Radius of joints and half the width of limbs, where the shorter side has 512 px, as in training.
THICKNESS, DRAWN_AT = 4, 512

Joint = tuple[float, float] | None  # x, y in pixels; None where it is not seen


@dataclass(frozen=True)
class PoseNetworks:
    """Of each a processor and a model."""

    person_processor: Any
    person: Any
    pose_processor: Any
    pose: Any


def open_pose(pose: Path, person: Path, device: torch.device | str = "cpu") -> PoseNetworks:
    """The networks of two folders. CheckpointError for folders of anything else."""
    if find_spec("scipy") is None:
        raise ModuleNotFoundError("preprocessor pose needs: pip install scipy")
    try:
        with importing():
            from transformers import (
                AutoImageProcessor,
                AutoModelForObjectDetection,
                VitPoseForPoseEstimation,
            )
    except ImportError as error:
        raise ModuleNotFoundError(
            "preprocessor pose needs: pip install 'transformers>=4.48'"
        ) from error
    opened: list[Any] = []
    for kind, folder in ((AutoModelForObjectDetection, person), (VitPoseForPoseEstimation, pose)):
        model = open_pretrained(kind, folder, may_hold_more=True).to(device)
        with errors_naming(folder), silenced():
            opened += [AutoImageProcessor.from_pretrained(folder, local_files_only=True), model]
    networks = PoseNetworks(*opened)
    if PERSON not in networks.person.config.id2label.values():
        raise CheckpointError(f"{person}: must be a detector with the class {PERSON!r}")
    if networks.pose.config.num_labels != len(JOINTS) - 1:
        raise CheckpointError(
            f"{pose}: must find COCO's 17 joints, it finds {networks.pose.config.num_labels}"
        )
    return networks


@torch.inference_mode()
def draw_pose(networks: PoseNetworks, image: "Image") -> "Image":
    """The skeletons of the people in an RGB picture, on black. Black where there are none."""
    boxes = _people(networks, image)
    people = _joints(networks, image, boxes) if boxes else []
    return draw_skeletons(image.size, people)


def draw_skeletons(size: tuple[int, int], people: Sequence[Sequence[Joint]]) -> "Image":
    """18 joints of each, in OpenPose's order, as a picture of (width, height)."""
    from PIL import Image, ImageDraw

    image = Image.new("RGB", size)
    draw = ImageDraw.Draw(image)
    radius = max(1.0, THICKNESS * min(size) / DRAWN_AT)
    for limb, colour in zip(LIMBS, PALETTE, strict=False):
        dark = tuple(int(channel * LIMB_BRIGHTNESS) for channel in colour)
        for joints in people:
            start, end = (joints[joint] for joint in limb)
            if start and end:
                draw.polygon(_ellipse(start, end, radius), dark)
    for joint, colour in enumerate(PALETTE):
        for joints in people:
            if place := joints[joint]:
                x, y = place
                draw.ellipse((x - radius, y - radius, x + radius, y + radius), colour)
    return image


def of_coco(points: Sequence[Sequence[float]], scores: Sequence[float]) -> list[Joint]:
    """OpenPose's 18 joints from COCO's 17, (x, y) each, with their confidences."""
    seen: list[Joint] = [
        (float(point[0]), float(point[1])) if score >= LEAST_JOINT else None
        for point, score in zip(points, scores, strict=True)
    ]
    left, right = (seen[joint] for joint in SHOULDERS)
    neck = ((left[0] + right[0]) / 2, (left[1] + right[1]) / 2) if left and right else None
    return [neck if joint is None else seen[joint] for joint in JOINTS]


def _people(networks: PoseNetworks, image: "Image") -> list[list[float]]:
    """Left, top, width and height in pixels of each person."""
    processor, model = networks.person_processor, networks.person
    inputs = processor(images=image, return_tensors="pt").to(model.device)
    (found,) = processor.post_process_object_detection(
        model(**inputs), threshold=LEAST_PERSON, target_sizes=[(image.height, image.width)]
    )
    names = [model.config.id2label[label] for label in found["labels"].tolist()]
    corners = found["boxes"].tolist()
    return [
        [left, top, right - left, bottom - top]
        for name, (left, top, right, bottom) in zip(names, corners, strict=True)
        if name == PERSON and right > left and bottom > top
    ]


def _joints(networks: PoseNetworks, image: "Image", boxes: list[list[float]]) -> list[list[Joint]]:
    processor, model = networks.pose_processor, networks.pose
    inputs = processor(image, boxes=[boxes], return_tensors="pt").to(model.device)
    if model.config.backbone_config.num_experts > 1:  # of ViTPose+, the first is COCO's
        inputs["dataset_index"] = torch.zeros(len(boxes), dtype=torch.long, device=model.device)
    (found,) = processor.post_process_pose_estimation(model(**inputs), boxes=[boxes])
    return [of_coco(one["keypoints"].tolist(), one["scores"].reshape(-1).tolist()) for one in found]


def _ellipse(
    start: tuple[float, float], end: tuple[float, float], radius: float
) -> list[tuple[float, float]]:
    """The outline of an ellipse from one joint to another, 2 radius wide."""
    x, y = (start[0] + end[0]) / 2, (start[1] + end[1]) / 2
    along, up = (end[0] - start[0]) / 2, (end[1] - start[1]) / 2
    length = math.hypot(along, up) or 1.0
    # Across the limb, `radius` long.
    across = (-up / length * radius, along / length * radius)
    angles = [math.radians(degrees) for degrees in range(0, 360, 5)]
    return [
        (
            x + along * math.cos(angle) + across[0] * math.sin(angle),
            y + up * math.cos(angle) + across[1] * math.sin(angle),
        )
        for angle in angles
    ]
