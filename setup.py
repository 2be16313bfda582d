"""Lists the packages, so that a new subpackage needs no entry anywhere. Everything else stands in `pyproject.toml`."""

from setuptools import find_packages, setup

setup(
    packages=[
        *find_packages(include=["spd_lens", "spd_lens.*"]),
        "spd_lens.analysis",  # the folder analysis/, through package-dir in pyproject.toml
        *(f"spd_lens.analysis.{name}" for name in find_packages("analysis")),
    ]
)
