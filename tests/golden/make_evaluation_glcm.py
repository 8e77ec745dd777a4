"""Scores of grey-level co-occurrence by scikit-image, as Diffusion-4K's eval.py calls it (github.com/
zhang0jhon/diffusion-4k, commit 302ff1b): evaluation/glcm.json.

See reference_environment.py; beside what stands there: scikit-image==0.26.0.
"""

import numpy as np
from reference_environment import versions, write
from skimage.feature import graycomatrix
from skimage.measure import shannon_entropy

KINDS = ("ramp", "waves", "checks", "noise", "flat")


def levels(kind: str, size: int = 128) -> np.ndarray:
    """As in tests/evaluation/test_evaluation_texture.py."""
    rows, columns = np.mgrid[:size, :size]
    made = {
        "ramp": rows + columns // 2,
        "waves": (rows * rows + 3 * columns * rows) // 97,
        "checks": 255 * ((rows // 8 + columns // 8) % 2),
        "noise": np.random.RandomState(3).randint(0, 256, (size, size)),
        "flat": 0 * rows + 77,
    }
    return (made[kind] % 256).astype(np.uint8)


def scores(grey: np.ndarray) -> tuple[float, float]:
    """(The score of the paper's code, entropy in bits of each matrix), means over patches of 64."""
    found = []
    for top in range(0, len(grey), 64):
        for left in range(0, len(grey), 64):
            patch = grey[top : top + 64, left : left + 64] // 4
            angles = [0, np.pi / 4, np.pi / 2, np.pi * 3 / 4]
            matrix = graycomatrix(patch, [1, 2, 3, 4], angles, levels=64, normed=True)
            shares = matrix.reshape(64 * 64, 16)
            logs = np.log2(np.where(shares > 0, shares, 1))
            found.append((shannon_entropy(matrix), -(shares * logs).sum(axis=0).mean()))
    first, second = np.mean(found, axis=0).tolist()
    return first, second


def main() -> None:
    values = {kind: scores(levels(kind)) for kind in KINDS}
    write("glcm", {"made_by": versions("scikit-image", "numpy"), "scores": values})


if __name__ == "__main__":
    main()
