"""Images are decoded, pickles loaded, archives unpacked and files written and removed in one place each: what is known
there of hostile files, full disks and files of the user's then holds in every program."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROGRAMS = [
    path
    for folder in ('', 'docs/make', 'evavit', 'examples', 'experiments', 'tools')
    for path in sorted((ROOT / folder).glob('**/*.py' if folder else '*.py'))
]
# What gives a name beside a file's or a folder's place: what is written there takes the place whole, or goes.
GIVE_A_PLACE = {'new_folder', 'replacing', 'replacing_in', 'saving', 'TemporaryDirectory'}
READS = {
    *('PIL.Image.open', 'numpy.load', 'pickle.load', 'pickle.loads', 'torch.load', 'torch.jit.load'),
    *('safetensors.safe_open', 'safetensors.torch.load_file', 'shutil.unpack_archive'),
    *('timm.models.load_checkpoint', 'timm.models.load_state_dict', 'yaml.load', 'yaml.safe_load'),
}
SHELLS = {'os.popen', 'os.system', 'subprocess.getoutput', 'subprocess.getstatusoutput'}  # a name may hold a command
CHANGES = {
    *('os.link', 'os.open', 'os.remove', 'os.rename', 'os.replace', 'os.rmdir', 'os.unlink', 'torch.save'),
    *(f'shutil.{name}' for name in ('copy', 'copy2', 'copyfile', 'copytree', 'move', 'rmtree')),
    'safetensors.torch.save_file',
}
METHODS = {
    *('extract', 'extractall', 'hardlink_to', 'rename', 'rmdir', 'savefig', 'symlink_to', 'touch', 'unlink'),
    *('write_bytes', 'write_text'),
}
FILES, GIVEN = 'the room of files', 'in a place that the caller has from the room of files'
ALLOWED = {  # (file, call): why it is there
    ('evavit/files.py', 'open'): FILES,
    ('evavit/files.py', 'os.link'): FILES,
    ('evavit/files.py', 'os.open'): FILES,
    ('evavit/files.py', 'os.replace'): FILES,
    ('evavit/files.py', 'os.rmdir'): FILES,
    ('evavit/files.py', 'shutil.copy2'): FILES,
    ('evavit/files.py', 'shutil.rmtree'): FILES,
    ('evavit/files.py', 'unlink'): FILES,
    ('evavit/errors.py', 'open'): 'nowhere, in the place of a closed standard output',
    ('evavit/errors.py', 'os.open'): 'nowhere, in the place of a broken standard output',
    ('evavit/export.py', 'rename'): 'in the temporary folder of an export',
    ('evavit/bench/results.py', 'os.open'): 'a folder, to lock it',
    ('evavit/models/_saved.py', 'safetensors.safe_open'): 'the metadata, after read_weights',
    ('evavit/hub.py', 'write_text'): GIVEN,
    ('evavit/models/_weights.py', 'safetensors.torch.save_file'): 'the room of weights, ' + GIVEN,
    ('evavit/models/_weights.py', 'timm.models.load_state_dict'): 'the room of weights',
    ('evavit/models/_weights.py', 'touch'): GIVEN,
    ('evavit/models/_weights.py', 'unlink'): GIVEN,
    ('evavit/training/checkpoint.py', 'os.replace'): "timm's saver, of a file that it has just written",
    ('evavit/training/checkpoint.py', 'unlink'): 'what the saver wrote, by its names',
    ('evavit/training/config.py', 'yaml.load'): 'the room of settings, with a safe loader',
    ('evavit/training/contents.py', 'safetensors.safe_open'): 'the room of checkpoints',
    ('evavit/training/contents.py', 'torch.load'): 'the room of checkpoints',
    ('evavit/training/data/decode.py', 'PIL.Image.open'): 'the room of images',
    ('evavit/training/data/hub.py', 'yaml.safe_load'): 'the description of a data set in its folder',
    ('evavit/training/data/device/decode.py', 'PIL.Image.open'): 'of bytes that the room of images passed on',
    ('evavit/training/metrics.py', 'open'): GIVEN,
    ('evavit/training/metrics.py', 'write_bytes'): GIVEN,
    ('docs/make/transfer.py', 'unlink'): 'a plot of this repository, without rows',
    ('examples/classify.py', 'PIL.Image.open'): 'an example that does without this package',
    ('experiments/export/run.py', 'torch.save'): 'in a temporary folder, for its size',
    ('tools/contract.py', 'extractall'): "timm's own release, filtered where Python can",
    ('tools/contract.py', 'unlink'): 'the report of the last call',
}
REMEDY = 'take what evavit/files.py, training/data/decode.py or the readers of weights have, or name it in ALLOWED'


class _Calls(ast.NodeVisitor):
    """(line, name) of the calls in a file that read a hostile format, or change the disk at a place of their own."""

    def __init__(self):
        self.found, self.places, self.imported = [], set(), {}

    def visit_Import(self, node):
        self.imported |= {alias.asname: alias.name for alias in node.names if alias.asname}

    def visit_ImportFrom(self, node):
        self.imported |= {alias.asname or alias.name: f'{node.module}.{alias.name}' for alias in node.names}

    def visit_FunctionDef(self, node):
        outer = set(self.places)
        self.generic_visit(node)
        self.places = outer

    def visit_With(self, node):
        for item in node.items:
            self._bind(item.context_expr, item.optional_vars)
        self.generic_visit(node)

    def visit_Assign(self, node):
        self.generic_visit(node)
        for target in node.targets:
            self._bind(node.value, target)

    def _bind(self, value, target):
        """A place that `GIVE_A_PLACE` gives, or one in it, as target = partial / 'train'; or no longer one."""
        made = isinstance(value, ast.Call) and ast.unparse(value.func).rpartition('.')[2] in GIVE_A_PLACE
        if isinstance(target, ast.Name):
            (self.places.add if made or self._in_a_place(value) else self.places.discard)(target.id)

    def _in_a_place(self, node):
        return any(isinstance(part, ast.Name) and part.id in self.places for part in ast.walk(node)) or any(
            isinstance(part, ast.Call) and ast.unparse(part.func) == 'open_own' for part in ast.walk(node)
        )

    def visit_Call(self, node):
        self.generic_visit(node)
        first, *rest = ast.unparse(node.func).split('.')
        name, method = '.'.join([self.imported.get(first, first), *rest]), getattr(node.func, 'attr', '')
        shell = any(word.arg == 'shell' and ast.unparse(word.value) != 'False' for word in node.keywords)
        moves = method == 'replace' and len(node.args) == 1 and not node.keywords  # a path's, of which a text's has two
        if name in READS or name in SHELLS or shell:
            self.found.append((node.lineno, name))
        elif name in CHANGES or method in METHODS or moves or self._opens_to_write(node, name, method):
            place = [*node.args, *(word.value for word in node.keywords), *([node.func.value] if method else [])]
            if not any(map(self._in_a_place, place)):
                self.found.append((node.lineno, name if name in CHANGES else method or name))

    @staticmethod
    def _opens_to_write(node, name, method):
        arguments = [*node.args, *(word.value for word in node.keywords if word.arg == 'mode')]
        modes = [part.value for part in arguments if isinstance(part, ast.Constant) and isinstance(part.value, str)]
        return (name == 'open' or method == 'open') and any(re.fullmatch('[rwaxbt+]*[wax+][bt+]*', m) for m in modes)


def calls(source):
    visitor = _Calls()
    visitor.visit(ast.parse(source))
    return visitor.found


@pytest.mark.parametrize(
    'line',
    [
        'from PIL import Image as I\nI.open(path)',
        'from torch import load\nload(path)',
        "open(path, 'w')",
        "open(path, mode='ab')",
        "Path(path).open('x')",
        'path.unlink()',
        'yaml.safe_load(text)',
        'shutil.rmtree(folder)',
        'torch.load(path, weights_only=True)',
        "zipfile.ZipFile(path).extractall('data')",
        'path.write_text(text)',
        'os.replace(path, other)',
        'path.replace(other)',
        'subprocess.run(command, shell=True)',
    ],
)
def test_a_direct_call_is_found(line):
    assert len(calls(f'def other():\n    with replacing(other) as path:\n        pass\n{line}')) == 1


def test_a_call_at_a_place_of_the_room_is_none():
    assert not calls("with replacing(path) as partial, open(partial, 'w') as file:\n    file.write('')")
    assert not calls("with new_folder(path) as folder:\n    target = folder / 'a'\n    target.write_text('')")
    assert not calls("open(open_own(path), 'a')\nopen(path)\nopen(path, 'rb')\ntext.replace('a', 'b')")


def test_files_are_opened_and_changed_in_their_rooms():
    found = {}
    for path in PROGRAMS:
        for line, call in calls(path.read_text(encoding='utf-8')):
            found.setdefault((path.relative_to(ROOT).as_posix(), call), []).append(line)
    others = [f'{file}:{lines[0]} calls {call}' for (file, call), lines in found.items() if (file, call) not in ALLOWED]
    assert not others, '\n'.join([*others, REMEDY])
    assert not ALLOWED.keys() - found.keys(), 'ALLOWED has lines of calls that are gone'
