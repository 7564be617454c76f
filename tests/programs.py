"""Programs outside of the package, as modules: docs/make, examples, experiments, tools."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[1]


def load_program(path: str) -> ModuleType:
    """The program at a path from the root of the repository, fresh; it can import the programs beside it."""
    file = ROOT / path
    spec = importlib.util.spec_from_file_location('program_' + path.replace('/', '_').removesuffix('.py'), file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    sys.path.insert(0, str(file.parent))
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(file.parent))
    return module
