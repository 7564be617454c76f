"""What pyproject.toml cannot say: configs/ lies at the top of the repository and is installed as evavit/configs."""

from setuptools import find_namespace_packages, setup

setup(
    packages=[*find_namespace_packages(include=['evavit', 'evavit.*']), 'evavit.configs'],
    package_dir={'evavit.configs': 'configs'},
)
