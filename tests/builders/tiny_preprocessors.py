"""Networks of preprocessors with random weights: HED's file, a depth network, a person detector, ViTPose."""

from pathlib import Path

import torch
from torch import Tensor

PEOPLE = ("person", "dog", "bicycle")
# Of ControlNetHED.pth: channels in and out of each convolution by block.
HED_CONVOLUTIONS = {
    "block1": ((3, 64), (64, 64)),
    "block2": ((64, 128), (128, 128)),
    "block3": ((128, 256), (256, 256), (256, 256)),
    "block4": ((256, 512), (512, 512), (512, 512)),
    "block5": ((512, 512), (512, 512), (512, 512)),
}


def hed_tensors(seed: int = 0) -> dict[str, Tensor]:
    """Under the published names and in the published shapes, in fp16 as they lie there."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=generator) * scale).half()

    tensors = {"norm": random(1, 3, 1, 1, scale=10.0) + 120}
    for block, convolutions in HED_CONVOLUTIONS.items():
        for number, (before, after) in enumerate(convolutions):
            scale = (2 / (9 * before)) ** 0.5  # keeps the size of what comes through a rectifier
            tensors[f"{block}.convs.{number}.weight"] = random(after, before, 3, 3, scale=scale)
            tensors[f"{block}.convs.{number}.bias"] = random(after, scale=0.1)
        width = convolutions[-1][1]
        tensors[f"{block}.projection.weight"] = random(1, width, 1, 1, scale=width**-0.5 / 20)
        tensors[f"{block}.projection.bias"] = random(1)
    return tensors


def build_depth(folder: Path, kind: str = "relative") -> Path:
    """Depth Anything; kind: "relative", or "metric" for metres."""
    from transformers import (
        DepthAnythingConfig,
        DepthAnythingForDepthEstimation,
        Dinov2Config,
        DPTImageProcessor,
    )

    backbone = Dinov2Config(
        hidden_size=16, num_hidden_layers=4, num_attention_heads=2, mlp_ratio=2, image_size=28,
        patch_size=14, out_indices=[1, 2, 3, 4], reshape_hidden_states=False,
    )  # fmt: skip
    config = DepthAnythingConfig(
        backbone_config=backbone, reassemble_hidden_size=16, neck_hidden_sizes=[4, 4, 8, 8],
        fusion_hidden_size=8, head_hidden_size=4, depth_estimation_type=kind,
        max_depth=20 if kind == "metric" else 1,
    )  # fmt: skip
    torch.manual_seed(0)
    model = DepthAnythingForDepthEstimation(config)
    model.head.conv3.bias.data.fill_(1.0)  # above the rectifier
    model.save_pretrained(folder)
    DPTImageProcessor(
        size={"height": 28, "width": 28}, ensure_multiple_of=14, keep_aspect_ratio=True
    ).save_pretrained(folder)
    return folder


def build_person_detector(folder: Path, names: tuple[str, ...] = PEOPLE) -> Path:
    from transformers import (
        RTDetrConfig,
        RTDetrForObjectDetection,
        RTDetrImageProcessor,
        RTDetrResNetConfig,
    )

    backbone = RTDetrResNetConfig(
        embedding_size=8, hidden_sizes=[8, 8, 8, 8], depths=[1, 1, 1, 1], layer_type="basic",
        out_features=["stage2", "stage3", "stage4"],
    )  # fmt: skip
    config = RTDetrConfig(
        backbone_config=backbone, encoder_hidden_dim=16, encoder_in_channels=[8, 8, 8], d_model=16,
        decoder_in_channels=[16, 16, 16], encoder_ffn_dim=16, encoder_attention_heads=2,
        decoder_attention_heads=2, decoder_ffn_dim=16, decoder_layers=1, num_queries=5,
        num_denoising=0, id2label=dict(enumerate(names)),
        label2id={name: place for place, name in enumerate(names)},
    )  # fmt: skip
    torch.manual_seed(0)
    RTDetrForObjectDetection(config).save_pretrained(folder)
    RTDetrImageProcessor(size={"height": 64, "width": 64}).save_pretrained(folder)
    return folder


def build_pose(folder: Path, joints: int = 17) -> Path:
    from transformers import (
        VitPoseBackboneConfig,
        VitPoseConfig,
        VitPoseForPoseEstimation,
        VitPoseImageProcessor,
    )

    backbone = VitPoseBackboneConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=[32, 24],
        patch_size=[8, 8], out_indices=[1],
    )  # fmt: skip
    config = VitPoseConfig(backbone_config=backbone, num_labels=joints, scale_factor=2)
    torch.manual_seed(0)
    VitPoseForPoseEstimation(config).save_pretrained(folder)
    VitPoseImageProcessor(size={"height": 32, "width": 24}).save_pretrained(folder)
    return folder
