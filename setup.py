"""Packaging. The bounds here say what may work; `constraints.txt` says which versions were tested."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "mtbert" / "__init__.py").read_text(encoding="utf-8"))
assert VERSION

TUNE = ["ray[tune]>=2.60", "optuna>=5.0"]
# upgrad and dualproj project with quadprog, cagrad solves with cvxpy, fairgrad with SciPy
SURGERY = ["torchjd[quadprog-projector,cagrad,fairgrad]>=0.18"]
PARQUET = ["pyarrow>=18"]
SERVE = ["fastapi>=0.115", "uvicorn>=0.34"]
ONNX = ["onnx>=1.18", "onnxscript>=0.5"]
DEV = [
    "pytest>=9.0",
    "pytest-cov>=6",
    "pytest-xdist>=3.8",
    "hypothesis>=6.100",
    "ruff>=0.12",
    "mypy>=1.17",
    "types-PyYAML",
    "transformers>=5.20",
    "sentence-transformers>=5.2",
    "onnxruntime>=1.22",
]

setup(
    name="mtbert",
    version=VERSION[1],
    description="Multi-task BERT with sharded gradient surgery",
    license="Apache-2.0",
    packages=find_packages(include=["mtbert", "mtbert.*", "launch", "launch.*", "tune", "tune.*"]),
    package_data={"mtbert": ["templates/*"]},  # not configs/: what is installed without the checkout needs --config
    python_requires=">=3.10,<3.14",
    install_requires=[
        # narrow on purpose: the engine needs Tensor.grad_dtype of this torch and private names of this DeepSpeed
        "torch>=2.13,<2.14",
        "deepspeed>=0.19.8,<0.20",
        "torchjd>=0.18",
        "tokenizers>=0.23.3",
        "safetensors>=0.8",
        "huggingface_hub>=1.31",
        "filelock>=3.16",
        "pydantic>=2.10",
        "pyyaml>=6.0.1",
        "numpy>=2.1",
        "scipy>=1.14.1",
        "scikit-learn>=1.5.2",
        "submitit>=1.5.2",
        "tensorboard>=2.18",
        "matplotlib>=3.10",
        "jinja2>=3.1.5",
        "rich>=13.9",
    ],
    extras_require={
        "tune": TUNE,
        "surgery": SURGERY,
        "parquet": PARQUET,
        "serve": SERVE,
        "onnx": ONNX,
        "dev": DEV + TUNE + SURGERY + PARQUET + SERVE + ONNX,
        "browser": [*DEV, *TUNE, *SURGERY, *PARQUET, *SERVE, *ONNX, "playwright>=1.50"],
    },
    entry_points={"console_scripts": ["mtbert = mtbert.cli:main"]},
)
