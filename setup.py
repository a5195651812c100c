"""The four top-level folders are one package: `kernels/` is imported as `rigfuse.kernels`, and so on."""

from setuptools import find_packages, setup

packages = [f"rigfuse.{name}" for name in find_packages(include=["kernels*", "modules*", "train*", "bench*"])]
setup(packages=packages, package_dir={"rigfuse": "."})
