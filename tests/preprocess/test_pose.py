"""Poses: OpenPose's skeleton from COCO's joints, and tiny random networks end to end."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny_preprocessors import build_person_detector, build_pose

from pixart.files import CheckpointError
from pixart.preprocess import open_preprocessor, pose
from pixart.preprocess.pose import LIMBS, PALETTE, draw_skeletons, of_coco

# COCO's order: nose, eyes, ears, shoulders, elbows, wrists, hips, knees, ankles, each left then right.
STANDING = [(256, 60), (264, 52), (248, 52), (276, 58), (236, 58), (300, 120), (212, 120), (330, 190),
            (182, 190), (340, 260), (172, 260), (286, 270), (226, 270), (290, 370), (222, 370),
            (294, 460), (218, 460)]  # fmt: skip


def test_joints_are_openposes_in_its_order() -> None:
    joints = of_coco(STANDING, [1.0] * 17)
    assert joints[0] == (256, 60)  # nose
    assert joints[1] == (256, 120)  # the neck, between the shoulders
    # Right shoulder, elbow and wrist: the picture's left, of somebody who faces us.
    assert [joints[place] for place in (2, 3, 4)] == [(212, 120), (182, 190), (172, 260)]
    assert [joints[place] for place in (11, 12, 13)] == [(286, 270), (290, 370), (294, 460)]
    assert joints[14:] == [(248, 52), (264, 52), (236, 58), (276, 58)]
    scores = [1.0] * 17
    scores[5] = 0.1  # without a left shoulder there is no neck
    assert of_coco(STANDING, scores)[1] is None and of_coco(STANDING, scores)[5] is None


def test_skeletons_have_openposes_colours() -> None:
    pixels = np.asarray(draw_skeletons((512, 512), [of_coco(STANDING, [1.0] * 17)]))
    for joint, place in enumerate(of_coco(STANDING, [1.0] * 17)):
        x, y = map(int, place or ())
        assert tuple(pixels[y, x]) == PALETTE[joint]
    # In the middle of limbs, at 0.6 of the brightness: the right forearm is OpenPose's limb 4.
    assert LIMBS[3] == (3, 4) and tuple(pixels[225, 177]) == (153, 153, 0)
    assert LIMBS[9] == (1, 11) and tuple(pixels[195, 271]) == (0, 153, 153)
    assert (pixels.any(-1).mean()) < 0.1
    # 4 px of radius at 512 px: a joint's disk is 9 px across.
    assert pixels[460, 214:223].any(-1).all() and not pixels[464:, 210:226].any(-1)[2:].any()


def test_what_is_not_seen_is_not_drawn() -> None:
    nobody = of_coco(STANDING, [0.0] * 17)
    assert not np.asarray(draw_skeletons((64, 48), [nobody])).any()
    assert draw_skeletons((3, 2), []).size == (3, 2)


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pose")
    return {
        "pose": build_pose(folder / "pose"),
        "person": build_person_detector(folder / "person"),
    }


def test_people_are_found_and_drawn(
    places: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (120, 160, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    preprocessor = open_preprocessor("pose", places)
    assert preprocessor.identity.count(" ") == 2
    # Random networks are sure of nothing, and of everything.
    monkeypatch.setattr(pose, "LEAST_PERSON", 0.999)
    assert not np.asarray(preprocessor(image)).any()
    monkeypatch.setattr(pose, "LEAST_PERSON", 0.0)
    monkeypatch.setattr(pose, "LEAST_JOINT", -1e9)
    drawn = preprocessor(image)
    assert drawn.size == (160, 120) and np.asarray(drawn).any()


def test_networks_of_something_else_are_refused(places: dict[str, Path], tmp_path: Path) -> None:
    other = build_person_detector(tmp_path / "person", ("cat", "dog"))
    with pytest.raises(CheckpointError, match="a detector with the class 'person'"):
        open_preprocessor("pose", places | {"person": other})
    hands = build_pose(tmp_path / "pose", joints=21)
    with pytest.raises(CheckpointError, match="must find COCO's 17 joints, it finds 21"):
        open_preprocessor("pose", places | {"pose": hands})


def test_pose_without_scipy_says_what_to_install(
    places: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pose, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="pip install scipy"):
        open_preprocessor("pose", places)
