"""Installs the package `megatron_exp` and the command `megatron-exp`. The other folders are doors and stay in the checkout."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r'^__version__ = "(.+)"$', (ROOT / "megatron_exp/__init__.py").read_text(encoding="utf-8"), re.MULTILINE).group(1)

REQUIREMENTS = [
    "duckdb>=1.1",
    "gigatoken>=0.10,<0.11",  # beta; only its in-memory batch encoder is used, so every new release is tried first
    "jinja2>=3.1",
    "matplotlib>=3.9",
    "megatron-core>=0.16.1,<0.17",  # what everything is tested with; its checkpoints were unsafe before 0.15.3 (CVE-2026-24152)
    "numba>=0.61",
    "numpy>=2",
    "orjson>=3.10",
    "psutil>=6",  # ours, and megatron-core's checkpoint writer imports it without declaring it
    "pyarrow>=17",
    "pydantic>=2.8",
    "pyyaml>=6",
    "rich>=13",
    "safetensors>=0.4.5",  # weights without code, and mapped: one tensor at a time
    "scipy>=1.14",
    "sentencepiece>=0.2",
    "tensorboard>=2.18",
    "tokenizers>=0.21",
    "torch>=2.10",  # earlier loaders execute code from a crafted checkpoint (CVE-2026-24747)
    "typer>=0.19",
    "xxhash>=3.5",
    "zstandard>=0.23",
]

EXTRAS = {
    "cuda": ["transformer-engine[pytorch]>=2.9,<2.12"],  # the range megatron-core 0.16.1 is developed against
    "hf": ["transformers>=4.48"],
    "wandb": ["wandb>=0.18"],
    "dev": [
        "axe-core-python>=0.1",  # the accessibility checks of a report in a browser; brings axe-core's script and nothing else
        "hypothesis>=6.100",
        "mypy>=1.13",
        "pytest>=8.3",
        "pytest-xdist>=3.6",
        "ruff>=0.9",
        "types-PyYAML>=6",
    ],
}

setup(
    name="megatron-exp",
    version=VERSION,
    description="Many controlled pretraining experiments in one training run, on megatron-core",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=find_packages(include=["megatron_exp", "megatron_exp.*"]),
    package_data={
        "megatron_exp": ["py.typed"],
        **{f"megatron_exp.{part}": ["templates/*"] for part in ("cluster", "display", "inspection", "report")},
    },
    install_requires=REQUIREMENTS,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["megatron-exp = megatron_exp.cli.main:entry"]},
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
