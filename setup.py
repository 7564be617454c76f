"""What pyproject.toml cannot say: configs/ lies at the top of the repository and is installed as evavit/configs."""

from setuptools import find_namespace_packages, setup
from setuptools.command.editable_wheel import editable_wheel


class PathToClone(editable_wheel):
    """An editable install as a path to the clone, where configs/ is found as it lies. setuptools would else install a
    finder, which comes after Python's own: in the folder above a clone called evavit, `import evavit` would then take
    the clone itself for an empty package."""

    def finalize_options(self) -> None:
        self.distribution.packages.remove('evavit.configs')
        self.distribution.package_dir = {'': '.'}
        super().finalize_options()


setup(
    packages=[*find_namespace_packages(include=['evavit', 'evavit.*']), 'evavit.configs'],
    package_dir={'evavit.configs': 'configs'},
    cmdclass={'editable_wheel': PathToClone},
)
