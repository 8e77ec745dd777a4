"""Inception-v3 of 2015 as FID uses it (arXiv:1512.00567, 1706.08500): from pictures to 2,048 features.

The network is TensorFlow's, whose average pools leave the padding out of the mean, and whose last block
has a maximum in the place of an average pool. Names of weights are those of pytorch-fid's file.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

SIDE, WIDTH = 299, 2048


class Convolution(nn.Module):
    """Without bias, batch norm, ReLU. padding: None keeps the size."""

    def __init__(
        self,
        width: int,
        out: int,
        kernel: int | tuple[int, int],
        stride: int = 1,
        padding: int | None = None,
    ) -> None:
        super().__init__()
        height, across = (kernel, kernel) if isinstance(kernel, int) else kernel
        keeping = (height // 2, across // 2) if padding is None else (padding, padding)
        self.conv = nn.Conv2d(width, out, (height, across), stride, keeping, bias=False)
        self.bn = nn.BatchNorm2d(out, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)), inplace=True)


Step = tuple[str, int, int | tuple[int, int]]  # name, channels, kernel
Path = list["Step | list[Step]"]  # a list forks the end of a path


class Mixed(nn.ModuleDict):
    """Paths side by side, joined by channels; the last one pools. pooled: channels of the convolution
    after the pool, 0 to halve the size: no convolution there, and stride 2 without padding at the end
    of each path."""

    def __init__(self, width: int, paths: list[Path], pooled: int, maximum: bool = False) -> None:
        super().__init__()
        self.halves, self.maximum = not pooled, maximum
        self.paths = [[_names(step) for step in path] for path in paths]
        for path in paths:
            at = width
            for place, fork in enumerate(path):
                ends = self.halves and place == len(path) - 1
                options = {"stride": 2, "padding": 0} if ends else {}
                for name, out, kernel in fork if isinstance(fork, list) else [fork]:
                    self[name] = Convolution(at, out, kernel, **options)
                at = out
        if pooled:
            self["branch_pool"] = Convolution(width, pooled, 1)

    def forward(self, x: Tensor) -> Tensor:
        joined = []
        for path in self.paths:
            y = x
            for names in path:
                y = torch.cat([self[name](y) for name in names], 1)
            joined.append(y)
        if self.halves:
            return torch.cat([*joined, F.max_pool2d(x, 3, 2)], 1)
        # TensorFlow's mean is over the pixels that are there.
        pool = (
            F.max_pool2d(x, 3, 1, 1)
            if self.maximum
            else F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
        )
        return torch.cat([*joined, self["branch_pool"](pool)], 1)


def _names(step: "Step | list[Step]") -> list[str]:
    return [name for name, *_ in step] if isinstance(step, list) else [step[0]]


def _a(width: int, pooled: int) -> Mixed:
    threes: Path = [
        (f"branch3x3dbl_{k}", out, size) for k, out, size in ((1, 64, 1), (2, 96, 3), (3, 96, 3))
    ]
    fives: Path = [("branch5x5_1", 48, 1), ("branch5x5_2", 64, 5)]
    return Mixed(width, [[("branch1x1", 64, 1)], fives, threes], pooled)


def _b(width: int) -> Mixed:
    threes: Path = [("branch3x3dbl_1", 64, 1), ("branch3x3dbl_2", 96, 3), ("branch3x3dbl_3", 96, 3)]
    return Mixed(width, [[("branch3x3", 384, 3)], threes], 0)


def _c(width: int, c: int) -> Mixed:
    once: Path = [("branch7x7_1", c, 1), ("branch7x7_2", c, (1, 7)), ("branch7x7_3", 192, (7, 1))]
    twice: Path = [
        ("branch7x7dbl_1", c, 1),
        ("branch7x7dbl_2", c, (7, 1)),
        ("branch7x7dbl_3", c, (1, 7)),
    ]
    twice += [("branch7x7dbl_4", c, (7, 1)), ("branch7x7dbl_5", 192, (1, 7))]
    return Mixed(width, [[("branch1x1", 192, 1)], once, twice], 192)


def _d(width: int) -> Mixed:
    sevens: Path = [("branch7x7x3_1", 192, 1), ("branch7x7x3_2", 192, (1, 7))]
    sevens += [("branch7x7x3_3", 192, (7, 1)), ("branch7x7x3_4", 192, 3)]
    return Mixed(width, [[("branch3x3_1", 192, 1), ("branch3x3_2", 320, 3)], sevens], 0)


def _e(width: int, maximum: bool) -> Mixed:
    def fork(name: str) -> list[Step]:
        return [(f"{name}a", 384, (1, 3)), (f"{name}b", 384, (3, 1))]

    once: Path = [("branch3x3_1", 384, 1), fork("branch3x3_2")]
    twice: Path = [("branch3x3dbl_1", 448, 1), ("branch3x3dbl_2", 384, 3), fork("branch3x3dbl_3")]
    return Mixed(width, [[("branch1x1", 320, 1)], once, twice], 192, maximum)


def network() -> nn.Sequential:
    """From (B, 3, 299, 299), levels from -1 to 1, to (B, 2048); untrained."""
    parts: dict[str, nn.Module] = {
        "Conv2d_1a_3x3": Convolution(3, 32, 3, 2, 0), "Conv2d_2a_3x3": Convolution(32, 32, 3, 1, 0),
        "Conv2d_2b_3x3": Convolution(32, 64, 3), "pool_1": nn.MaxPool2d(3, 2),
        "Conv2d_3b_1x1": Convolution(64, 80, 1), "Conv2d_4a_3x3": Convolution(80, 192, 3, 1, 0),
        "pool_2": nn.MaxPool2d(3, 2),
        "Mixed_5b": _a(192, 32), "Mixed_5c": _a(256, 64), "Mixed_5d": _a(288, 64), "Mixed_6a": _b(288),
        "Mixed_6b": _c(768, 128), "Mixed_6c": _c(768, 160), "Mixed_6d": _c(768, 160),
        "Mixed_6e": _c(768, 192), "Mixed_7a": _d(768), "Mixed_7b": _e(1280, maximum=False),
        "Mixed_7c": _e(2048, maximum=True),
        "pool_3": nn.AdaptiveAvgPool2d(1), "flat": nn.Flatten(),
    }  # fmt: skip
    whole = nn.Sequential()
    for name, part in parts.items():
        whole.add_module(name, part)
    return whole.eval().requires_grad_(False)
