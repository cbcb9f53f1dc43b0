import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent


def version() -> str:
    """``__version__`` of the package, read without importing it (which would import torch)."""
    source = (ROOT / "torchao_mx" / "__init__.py").read_text(encoding="utf-8")
    return re.search(r'^__version__ = "(.+)"$', source, re.MULTILINE).group(1)


DEMO = [
    "matplotlib",  # curves.png
    "tqdm",  # progress bars
]

setup(
    name="torchao_mx",
    version=version(),
    description="Training in microscaling formats (MXFP4, MXFP8, NVFP4), as configs for torchao",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author="torchao_mx contributors",
    license="BSD-3-Clause",
    packages=find_packages(include=["torchao_mx", "torchao_mx.*"]),
    package_data={"torchao_mx": ["py.typed"]},
    python_requires=">=3.10",
    entry_points={"console_scripts": ["torchao-mx = torchao_mx.hf.cli:main"]},  # with the hf extra
    install_requires=[
        # The tested versions; test/test_private_apis.py lists the private names that a newer release needs.
        "torch>=2.11,<2.14",  # 2.14 needs Triton 3.8
        "torchao>=0.17,<0.19",  # QATConfig's handler and prototype.mx_formats, which we extend
        # Compiles and launches the kernels; torch's CPU wheels come without it.
        "triton>=3.6,<3.8; sys_platform == 'linux'",
        "numpy",  # torch warns without it; Triton's interpreter computes with it
    ],
    extras_require={
        "hf": [  # torchao_mx.hf
            # The last 4.x; and 5.x from the first that registers experts implementations to the last whose
            # add_adapter accepts a released PEFT.
            "transformers>=4.57.6,!=5.0.*,!=5.1.*,!=5.2.*,!=5.3.*,!=5.4.*,!=5.5.*,!=5.6.*,!=5.7.*,<5.24",
            "peft>=0.20",  # imported only by the demo; also tested: target_parameters on packed experts
            "safetensors",
            "tqdm",
        ],
        "demo": DEMO,
        "test": [
            *DEMO,  # the demo is tested too
            "expecttest",  # reprs and messages
            "hypothesis",  # random shapes and bit patterns
            "numpy<2.4",  # Triton 3.7's interpreter fails with a newer one
            "parameterized",  # the grids
            "pytest",
            "pytest-xdist",  # pytest -n
        ],
        "bench": ["matplotlib"],  # plots of the JSON results
    },
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3 :: Only",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
)
