#!/usr/bin/env python3
"""Time models and the attention layer, and write the figures with device, versions, date and commit.

    python benchmark.py --bench train --model eva_deit_tiny deit_tiny_patch16_224 --amp-dtype bfloat16 -b 256 \\
        --results-file results/train_step.csv
    python benchmark.py --bench layer --sides 14 28 56 112 128 --results-file results/layer.csv
    python benchmark.py --bench data -c configs/eva_deit_tiny.yaml --data-dir DIR --workers-list 1 2 4

The last takes the flags of train.py: the loader's throughput, alone and beside the training step.

A model may carry arguments: deit_tiny_patch16_224:patch_size=8. Each figure is a median after a warm-up. A training
step is forward, cross-entropy, backward and AdamW on one fixed batch of noise: no data loading is in it.
"""
import argparse
import ast
import sys

import timm
import torch

import evavit  # noqa: F401  registers the models
from evavit.layers import EvaAttention
from evavit.measure import median_seconds, origin, training_step, write_rows
from evavit.training import throughput
from evavit.training.errors import run_script


def parse_model(text):
    """'name:key=value:key=value' to a name and its arguments."""
    name, *pairs = text.split(':')
    if not timm.is_model(name):
        raise SystemExit(f'error: unknown model {name!r}; timm.list_models() lists the names')
    kwargs = {}
    for pair in pairs:
        key, _, value = pair.partition('=')
        try:
            kwargs[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            kwargs[key] = value
    return name, kwargs


def bench_model(text, args, device):
    """Rows for one model: eager and, with --torchcompile, compiled."""
    name, kwargs = parse_model(text)
    for compiled in (False, True) if args.torchcompile else (False,):
        torch._dynamo.reset()
        torch.manual_seed(0)
        model = timm.create_model(name, **kwargs).to(device).train(args.bench == 'train')
        batch = torch.randn(args.batch_size, *model.pretrained_cfg['input_size'], device=device)
        forward = torch.compile(model) if compiled else model
        dtype = getattr(torch, args.amp_dtype)
        if args.bench == 'train':
            run = training_step(model, forward, batch, dtype)
        else:
            amp = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)

            @torch.inference_mode()
            def run(amp=amp, forward=forward, batch=batch):
                with amp:
                    return forward(batch)

        if not run().isfinite().all():
            raise SystemExit(f'error: {name}: the {args.bench} step gives NaN or infinity; no figure is written')
        seconds, memory = median_seconds(run, device, args.repeats, args.warmup)
        yield {
            'bench': args.bench, 'model': text, 'batch_size': args.batch_size, 'amp_dtype': args.amp_dtype,
            'torchcompile': compiled, 'img_per_s': round(args.batch_size / seconds, 1), 'ms': round(1e3 * seconds, 2),
            'peak_memory_mib': round(memory / 2 ** 20),
        }


def bench_layer(side, args, device):
    """One row: forward and backward of EvaAttention on side × side tokens, with a fixed number of tokens a batch."""
    batch = max(1, args.tokens // side ** 2)
    layer = EvaAttention(192, 3).to(device).train()
    dtype = getattr(torch, args.amp_dtype)
    x = torch.randn(batch, side ** 2, 192, device=device, requires_grad=True)
    amp = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)

    def run():
        with amp:
            y = layer(x, (side, side))
        y.backward(torch.ones_like(y))

    seconds, memory = median_seconds(run, device, args.repeats, args.warmup)
    tokens = batch * side ** 2
    return {
        'bench': 'layer', 'tokens': side ** 2, 'batch_size': batch, 'amp_dtype': args.amp_dtype,
        'ms': round(1e3 * seconds, 2), 'us_per_token': round(1e6 * seconds / tokens, 5),
        'bytes_per_token': round(memory / tokens),
    }


def main():
    if sys.argv[1:3] == ['--bench', 'data']:
        return run_script(throughput.main, sys.argv[3:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--bench', choices=('train', 'infer', 'layer'), default='train')
    parser.add_argument('--model', nargs='+', default=['eva_deit_tiny'], help='names, with arguments after colons')
    parser.add_argument('-b', '--batch-size', type=int, default=64)
    parser.add_argument('--amp-dtype', choices=('float32', 'bfloat16', 'float16'), default='float32')
    parser.add_argument('--torchcompile', action='store_true', help='time the compiled model too')
    parser.add_argument('--sides', type=int, nargs='+', default=[14, 28, 56, 112, 128], help='layer: grid sides')
    parser.add_argument('--tokens', type=int, default=16384, help='layer: tokens a batch, at least one image')
    parser.add_argument('--repeats', type=int, default=20)
    parser.add_argument('--warmup', type=int, default=5)
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    parser.add_argument('--results-file', help='CSV file to append the rows to')
    args = parser.parse_args()
    device = torch.device(args.device)

    if args.bench == 'layer':
        rows = (bench_layer(side, args, device) for side in args.sides)
    else:
        rows = (row for text in args.model for row in bench_model(text, args, device))
    where = origin(device)
    for row in rows:
        print('  '.join(f'{key} {value}' for key, value in row.items()), flush=True)
        if args.results_file:
            write_rows(args.results_file, [row | where])


if __name__ == '__main__':
    try:
        sys.exit(main())
    except SystemExit as stop:
        if isinstance(stop.code, str):
            print(stop.code, file=sys.stderr)
            sys.exit(2)
        raise
