#!/usr/bin/env python3
"""Which library makes batches fastest? python experiments/loaders/run.py --data-dir data/photos --results-file FILE.csv

    python tools/build_photos.py data/photos --images 512

Images a second from JPEG files to normalised batches of 224 pixels on the GPU; nothing is trained. All crop at random,
resize with a bicubic filter and antialias, flip, do two operations of RandAugment at magnitude 9, and erase.

cpu: train.py's own path with timm's transforms. cuda: its --augment-device cuda.
torchvision: nvJPEG decodes a batch; torchvision.transforms.v2 takes image by image, since a call has one set of draws.
kornia: the same decoder, crops and resizing, then kornia's RandAugment and erasing of the batch, in floating point.
dali: NVIDIA DALI decodes the crop alone; its RandAugment has operations and magnitudes of its own.

A library that is not installed is left out with a line (pip install kornia nvidia-dali-cuda130).
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch
import torchvision
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from evavit.arguments import Parser
from evavit.bench.loader import LEAST, Repeated
from evavit.bench.results import ORIGIN, check_writable, origin, store_rows
from evavit.errors import UserError, run_script
from evavit.training import data
from evavit.training.config import parse_settings
from evavit.training.distributed import start_process

MEAN, STD, SIDE = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), 224
AA = 'rand-m9-n2'
COLUMNS = ('contender', 'batch_size', 'workers', 'images_per_second', 'version', *ORIGIN)


class Files(Dataset):
    """The bytes of the pictures, again and again."""

    def __init__(self, folder):
        self.paths = sorted(map(str, (folder / 'train').rglob('*.jpg')))
        if not self.paths:
            raise UserError(f'--data-dir {folder}: no *.jpg in train, which these contenders decode')

    def __len__(self):
        return LEAST

    def __getitem__(self, index):
        return torch.frombuffer(bytearray(Path(self.paths[index % len(self.paths)]).read_bytes()), dtype=torch.uint8)


def decoded(args, device):
    """Lists of pictures on the device."""
    loader = DataLoader(Files(args.data_dir), args.batch_size, num_workers=args.workers, collate_fn=list)
    for files in loader:
        yield torchvision.io.decode_jpeg(files, mode=torchvision.io.ImageReadMode.RGB, device=device)


def ours(place):
    def batches(args, process):
        flags = ['--model', 'eva_deit_tiny', '--aa', AA, '--reprob', '0.25', '-b', str(args.batch_size)]
        flags += ['--augment-device', place, '--workers', str(args.workers)]
        settings, _ = parse_settings('train', [*flags, '--data-dir', str(args.data_dir)])
        opened, _, _ = data.open_training_sets(settings.data, in_chans=3, batch_size=args.batch_size, seed=0)
        loader = data.train_loader(
            Repeated(opened, LEAST),
            settings.augment,
            dict(input_size=(3, SIDE, SIDE), mean=MEAN, std=STD, interpolation='bicubic', crop_pct=1.0),
            batch_size=args.batch_size,
            machine=settings.machine,
            seed=0,
            process=process,
        )
        return data.epoch_batches(loader, settings.batch, seed=0, process=process, epoch=0)

    return batches


def torchvision_batches(args, process):
    bicubic = torchvision.transforms.InterpolationMode.BICUBIC
    each = v2.Compose(
        [
            v2.RandomResizedCrop(SIDE, interpolation=bicubic, antialias=True),
            v2.RandomHorizontalFlip(),
            v2.RandAugment(num_ops=2, magnitude=9),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(MEAN, STD),
            v2.RandomErasing(p=0.25, value='random'),
        ]
    )
    for images in decoded(args, process.device):
        yield torch.stack([each(image) for image in images])


def kornia_batches(args, process):
    import kornia.augmentation as K

    bicubic = torchvision.transforms.InterpolationMode.BICUBIC
    crop = v2.RandomResizedCrop(SIDE, interpolation=bicubic, antialias=True)
    each = torch.nn.Sequential(
        K.RandomHorizontalFlip(),
        K.auto.RandAugment(n=2, m=9),
        K.Normalize(torch.tensor(MEAN), torch.tensor(STD)),
        K.RandomErasing(p=0.25),
    ).to(process.device)
    for images in decoded(args, process.device):
        yield each(torch.stack([crop(image) for image in images]).float() / 255)


def dali_batches(args, process):
    from nvidia.dali import fn, pipeline_def, types
    from nvidia.dali.auto_aug import rand_augment

    gpu = process.device.type == 'cuda'

    @pipeline_def(enable_conditionals=True, batch_size=args.batch_size, num_threads=args.workers, seed=0)
    def pipeline():
        files, _ = fn.readers.file(file_root=str(args.data_dir / 'train'), random_shuffle=True)
        images = fn.decoders.image_random_crop(files, device='mixed' if gpu else 'cpu', output_type=types.RGB)
        images = fn.resize(images, size=(SIDE, SIDE), interp_type=types.INTERP_CUBIC, antialias=True)
        images = fn.flip(images, horizontal=fn.random.coin_flip())
        images = rand_augment.rand_augment(images, n=2, m=9, fill_value=128)
        scaled = dict(mean=[255 * value for value in MEAN], std=[255 * value for value in STD])
        images = fn.crop_mirror_normalize(images, dtype=types.FLOAT, output_layout='CHW', **scaled)
        if fn.random.coin_flip(probability=0.25, dtype=types.DALIDataType.BOOL):
            corner, size = fn.random.uniform(range=(0, 0.7), shape=2), fn.random.uniform(range=(0.14, 0.5), shape=2)
            images = fn.erase(images, anchor=corner, shape=size, axes=(1, 2), normalized=True)
        return images

    made = pipeline(device_id=process.device.index or 0 if gpu else None, prefetch_queue_depth=2)
    made.build()
    while True:
        (images,) = made.run()
        yield torch.from_dlpack(images.as_tensor())


CONTENDERS = dict(
    cpu=ours('cpu'), cuda=ours('cuda'), torchvision=torchvision_batches, kornia=kornia_batches, dali=dali_batches
)


def rate(batches, args, process):
    """Images a second, the median over --repeats passes of --seconds, after as many batches as may lie ready."""
    batches = iter(batches)
    for _ in range(args.held):
        next(batches)
    rates = []
    for _ in range(args.repeats):
        wait(process)
        began, done = time.perf_counter(), 0
        while time.perf_counter() - began < args.seconds:
            images = next(batches)
            done += len(images[0] if isinstance(images, (tuple, list)) else images)
        wait(process)
        rates.append(done / (time.perf_counter() - began))
    return statistics.median(rates)


def wait(process):
    if process.device.type == 'cuda':
        torch.cuda.synchronize(process.device)


def version(contender):
    if contender == 'dali':
        import nvidia.dali

        return f'nvidia-dali {nvidia.dali.__version__}'
    return f'{contender} {__import__(contender).__version__}' if contender in ('torchvision', 'kornia') else ''


def main(argv=None):
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--data-dir', type=Path, required=True, help='what tools/build_photos.py wrote')
    parser.add_argument('--results-file', type=Path, metavar='CSV', help='rows of the same measurement are replaced')
    parser.add_argument('--contenders', nargs='+', default=list(CONTENDERS), choices=list(CONTENDERS))
    parser.add_argument('-b', '--batch-size', type=int, default=256)
    parser.add_argument('--workers', type=int, default=14, help='loading processes, or threads of DALI (14)')
    parser.add_argument('--held', type=int, default=32, help='batches before the clock runs (32)')
    parser.add_argument('--seconds', type=float, default=3, help='of each pass (3)')
    parser.add_argument('--repeats', type=int, default=3, help='passes; the median counts (3)')
    parser.add_argument('--device', help='cuda, cpu (default: cuda where there is one)')
    args = parser.parse_args(argv)
    for name in ('batch_size', 'repeats'):
        if getattr(args, name) < 1:
            raise UserError(f'--{name.replace("_", "-")} {getattr(args, name)}: at least 1')
    for name in ('workers', 'held', 'seconds'):
        if getattr(args, name) < 0:
            raise UserError(f'--{name} {getattr(args, name)}: at least 0')
    if not (args.data_dir / 'train').is_dir():
        raise UserError(f'--data-dir {args.data_dir}: no folder train in it; tools/build_photos.py makes one')
    if args.results_file:
        check_writable(args.results_file)
    process = start_process(args.device)
    for contender in args.contenders:
        if contender == 'cuda' and process.device.type != 'cuda':
            print(f'{contender}: needs a GPU', flush=True)
            continue
        try:
            found = dict(
                contender=contender,
                batch_size=args.batch_size,
                workers=args.workers,
                images_per_second=round(rate(CONTENDERS[contender](args, process), args, process), 1),
                version=version(contender),
                **origin(process.device),
            )
        except ImportError as error:
            print(f'{contender}: not installed ({error})', flush=True)
            continue
        print(f'{contender}: {found["images_per_second"]:,.0f} images a second', flush=True)
        if args.results_file:
            store_rows(args.results_file, [found], COLUMNS, ('contender', 'batch_size', 'workers', 'device'))


if __name__ == '__main__':
    sys.exit(run_script(main))
