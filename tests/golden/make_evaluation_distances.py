"""Distances of two small sets by the implementations that papers use: evaluation/distances.json.

See reference_environment.py; beside what stands there: prdc==0.2 scikit-learn.
"""

import numpy as np
import torch
from reference_environment import let_torchvision_import, versions, write

SIZES, WIDTH = (150, 130), 24
KID = {"kid_subsets": 20, "kid_subset_size": 60, "kid_degree": 3, "kid_gamma": None, "kid_coef0": 1}


def sets() -> tuple[np.ndarray, np.ndarray]:
    """Ours and the real ones, by a generator whose numbers never change."""
    rng = np.random.RandomState(11)
    axes = rng.normal(size=(WIDTH, WIDTH)) / (1 + np.arange(WIDTH))
    ours = 1.1 * rng.normal(size=(SIZES[0], WIDTH)) @ axes.T + 0.1
    return ours, rng.normal(size=(SIZES[1], WIDTH)) @ axes.T


def main() -> None:
    let_torchvision_import()
    from prdc import compute_prdc
    from torch_fidelity.metric_fid import fid_statistics_to_metric
    from torch_fidelity.metric_kid import kid_features_to_metric
    from torch_fidelity.metric_prc import prc_features_to_metric

    ours, real = sets()
    tensors = torch.from_numpy(ours), torch.from_numpy(real)
    statistics = [
        {"mu": rows.mean(axis=0), "sigma": np.cov(rows, rowvar=False)} for rows in (ours, real)
    ]
    kid = kid_features_to_metric(*tensors, **KID, rng_seed=2020, verbose=False)
    found = {
        "fid": fid_statistics_to_metric(*statistics, False)["frechet_inception_distance"],
        "kid": kid["kernel_inception_distance_mean"],
        "kid_deviation": kid["kernel_inception_distance_std"],
        # In 0.4 its second set is the real one; in 0.3 it was the first.
        "precision_recall": prc_features_to_metric(
            *tensors, prc_neighborhood=3, prc_batch_size=64, save_cpu_ram=True, verbose=False
        ),
        "density_coverage": {
            name: float(value) for name, value in compute_prdc(real, ours, nearest_k=5).items()
        },
    }
    made = {"made_by": versions("torch-fidelity", "prdc", "numpy")}
    write("distances", {**made, "subsets": KID, "values": found})


if __name__ == "__main__":
    main()
