from pathlib import Path

from setuptools import find_packages, setup

DEPENDENCIES = [
    "torch>=2.10",
    'triton>=3.6; platform_system == "Linux"',
    "safetensors>=0.4.5",
    "numpy>=1.26",
    "pillow>=10.3",
    "tqdm>=4.66",
    "transformers>=4.45",
    "sentencepiece>=0.2",
    "diffusers>=0.32",
    "huggingface_hub>=0.25",
    "tyro>=0.9",
    "pyyaml>=6",
]
EXTRAS: dict[str, list[str]] = {
    # webdataset: tar shards; torchao: 8-bit optimizer states; matplotlib: curves; peft: LoRA, also
    # where pictures are drawn with one.
    "train": ["webdataset>=0.2.86", "torchao>=0.14", "matplotlib>=3.9", "peft>=0.18"],
    "eval": [],
    "ui": [],
    "quant": ["bitsandbytes>=0.45", "accelerate>=1.0"],
    # ninja builds the CUDA extensions of the libraries that the benchmarks compare with.
    "bench": ["pytest-benchmark>=5", "ninja>=1.11", "matplotlib>=3.9"],
    "dev": [
        "pytest>=8",
        "pytest-benchmark>=5",
        "ruff>=0.9",
        "mypy>=1.13",
        "build>=1.2",
        "types-PyYAML",
        "types-tqdm",
        "protobuf",
        "came-pytorch",
        "webdataset",
        "peft",
        "accelerate",
        "matplotlib",
    ],
}

setup(
    name="pixart-fast",
    version="0.1.0",
    description="PixArt-Σ and PixArt-α on fused kernels: run, convert and train, with KV compression",
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    install_requires=DEPENDENCIES,
    extras_require=EXTRAS,
    packages=[*find_packages(include=["pixart*"]), *find_packages("kernels")],
    # kernels/ is a source root: the import name `kernels` is Hugging Face's, and transformers
    # imports whatever answers to it.
    package_dir={"pixart_kernels": "kernels/pixart_kernels"},
    package_data={
        "pixart": [
            "py.typed",
            "assets/**/*",
            "training/recipes/*.yaml",
            "training/launch.sh",
        ],
        "pixart_kernels": ["py.typed"],
    },
)
