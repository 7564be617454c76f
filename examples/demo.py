#!/usr/bin/env python3
"""A page to try a model on: python examples/demo.py --checkpoint output/RUN

Give a picture: the page shows what it is, and where the model looks from the patch that you click, with softmax beside
EVA on the same weights, and measures time and memory as the side of the image grows. --checkpoint takes a file, the
folder of a run or of save_folder, --model NAME the weights that timm publishes; without either it is the model of
`make quickstart`. The model's other flags are those of inference.py (--convert, --img-size, --class-map, --topk,
--device). Needs Gradio: pip install '.[demo]'.
"""

import argparse
import copy
import functools
import html
import math
import os
import sys
import time
from pathlib import Path
from typing import Any, Dict, Iterator, List, NamedTuple, Optional, Tuple

import timm
import torch
from PIL import Image
from torch import nn

import evavit
from evavit.arguments import Parser
from evavit.bench.clocks import median_seconds, peak_bytes
from evavit.cli.inference import choose_weights, class_namer
from evavit.errors import SMALLER, UserError, first_line, printable, run_script
from evavit.layers import GridAttention
from evavit.layers.reformer import ReformerAttention
from evavit.layers.softmax import SoftmaxAttention
from evavit.models import ConvertedModel
from evavit.training import build, checks, contents, data
from evavit.training.config import options_of, parse_settings
from evavit.training.data.decode import BadImageError, is_turned, read_file
from evavit.training.distributed import start_process

QUICKSTART = Path(__file__).resolve().parents[1] / 'output' / 'quickstart'
TAKEN = {'device', 'class_map', 'label_type', 'topk'}  # of the flags of inference.py, beside those of the model
COLOURS = ('#00798c', '#d1495b')
TOPK = 3  # classes, unless --topk says otherwise
SHOWN = 448  # pixels of a picture on the page, at least: a model may take 32
GROWTH = (1, 1.5, 2, 3, 4, 6, 8, 12, 16)  # sides to measure, over the model's own
MOST_TOKENS, MOST_SECONDS, PATIENCE = 16_384, 2.0, 30.0  # of an image; of one pass; of all, after which none follows
PATCH, CLASS, MEAN = 'the patch you click', 'class token', 'mean of all patches'


class Picture(NamedTuple):
    images: torch.Tensor  # `(1, C, height, width)`, as the model takes it
    seen: Image.Image  # the same to look at, enlarged
    note: str = ''  # what the page says beside the prediction


class Cost(NamedTuple):
    side: int
    attention: str
    milliseconds: float
    mebibytes: float


class Demo:
    """What the page does, without the page.

    Args:
        model: The model, in evaluation; on its device.
        data_config: From `data.resolve_input`.
        name_class: Gives a class's name for its number, None where classes have none.
        topk: Classes to show.
        window_size: Of the conversion, where the model is a ViT with softmax attention.
    """

    def __init__(self, model: Any, data_config: Dict[str, Any], name_class: Any, topk: int, window_size: int) -> None:
        self.model, self.data_config, self.name_class, self.topk = model, data_config, name_class, topk
        self.device = next(model.parameters()).device
        self.transform = timm.data.create_transform(**data_config)
        self.window_size = window_size
        self.models, self.about = self._pair()
        if not model.num_classes:
            self.about += ' It has no classifier, so there are no classes to show.'
        empty = torch.zeros(1, *data_config['input_size'], device=self.device)
        try:
            maps = evavit.attention_maps(model, empty, query='mean')
            self.layers, self.heads, self.no_maps = len(maps), max(one.rows.shape[1] for one in maps), ''
        except ValueError as error:
            self.layers, self.heads, self.no_maps = 1, 1, first_line(error)
        has_class = getattr(model, 'cls_token', None) is not None
        self.queries = [PATCH, *[CLASS] * has_class, MEAN]
        self.first_query = CLASS if has_class and getattr(model, 'global_pool', '') == 'token' else MEAN

    def _pair(self) -> Tuple[Dict[str, Any], str]:
        """The model and its twin with the other attention and the same weights, softmax first; what the page says."""
        model = self.model
        if isinstance(model, ConvertedModel):
            name = model.conversion['attention'].replace('eva', 'EVA')
            about = f'The model is converted to {name}. Softmax has the same weights.'
            return {'softmax': evavit.revert_vit(model), name: model}, about
        attentions = [part for part in model.modules() if isinstance(part, GridAttention)]
        own = [part for part in attentions if not isinstance(part, SoftmaxAttention)]  # pyramids end with softmax
        if own:
            name = type(own[0]).__name__.removesuffix('Attention').replace('Eva', 'EVA')
            biases = ' and no relative position biases' * any('rel_pos' in key for key in own[0].state_dict())
            about = f'The model was trained with {name}. Softmax has its weights, but no training of its own{biases}.'
            return {'softmax': with_softmax(model), name: model}, about
        try:
            converted: Any = evavit.convert_vit(model, window_size=self.window_size)
        except ValueError as error:
            return {'softmax' if attentions else 'model': model}, f'No EVA beside it: {first_line(error)}.'
        window, cells = self.window_size, converted.conversion['partition_grid']
        about = 'The model has softmax attention. EVA is its conversion, without any training: windows of '
        about += f'{window} × {window} patches, {cells} × {cells} cells.'
        return {'softmax': model, 'EVA': converted}, about

    def read(self, path: Optional[str]) -> Picture:
        """The picture in a file. UserError, one line, where it holds none."""
        if not path:
            raise UserError('Give a picture.')
        channels = self.data_config['input_size'][0]
        try:
            picture: Any = read_file(path, 'L' if channels == 1 else 'RGB')
        except BadImageError as error:
            raise UserError(f'{Path(path).name} is not a readable picture: {str(error).rstrip(".")}.') from None
        image: Any = self.transform(picture)
        mean, std = (torch.tensor(self.data_config[name]).view(-1, 1, 1) for name in ('mean', 'std'))
        pixels = (image * std + mean).clamp(0, 1).mul(255).round().to(torch.uint8)
        seen = Image.fromarray(pixels.permute(1, 2, 0).squeeze(-1).numpy()).convert('RGB')
        larger = max(1, -(-SHOWN // min(seen.size)))
        seen = seen.resize((seen.width * larger, seen.height * larger), Image.Resampling.NEAREST)
        note = 'Its EXIF orientation is not applied: the model sees it as it is stored. Rotate the file first.'
        return Picture(image.unsqueeze(0), seen, note if is_turned(picture) else '')

    @torch.no_grad()
    def predict(self, picture: Picture) -> List[Dict[str, float]]:
        """For each model the most likely classes with their probabilities; empty without a classifier."""
        found = []
        for model in self.models.values() if self.model.num_classes else ():
            best = model(picture.images.to(self.device)).float().softmax(-1)[0].topk(min(self.topk, model.num_classes))
            names: Dict[str, float] = {}
            for number, value in zip(best.indices.tolist(), best.values.tolist(), strict=True):
                name = self.name_class(number) if self.name_class else f'class {number}'
                names[f'{name} ({number})' if name in names else name] = value
            found.append(names)
        return found

    def look(
        self, picture: Picture, layer: int, head: int, query: str, place: Optional[Tuple[float, float]] = None
    ) -> List[Image.Image]:
        """For each model the picture under its attention.

        Args:
            picture: From `read`.
            layer: From 1.
            head: From 1; 0 for the mean over all.
            query: PATCH, CLASS or MEAN.
            place: (y, x) of the patch on the picture, each in 0 … 1.

        Raises:
            UserError: one line: no patch was clicked, no such head, or a model without such maps.
        """
        if self.no_maps:
            raise UserError(f'No attention to show: {self.no_maps}.')
        height, width = picture.images.shape[-2:]
        asked: Any = {CLASS: 'class', MEAN: 'mean'}.get(query)
        mark = None
        if query == PATCH:
            if place is None:
                raise UserError('Click on a patch of the picture.')
            asked = min(int(place[0] * height), height - 1), min(int(place[1] * width), width - 1)
            width, height = picture.seen.size
            mark = min(int(place[0] * height), height - 1), min(int(place[1] * width), width - 1)
        drawn = []
        try:
            for model in self.models.values():
                (one,) = evavit.attention_maps(model, picture.images.to(self.device), layer=layer - 1, query=asked)
                weights = one.grid[0, :, 0]
                if head > len(weights):
                    raise UserError(f'Layer {layer} has {len(weights)} heads; choose one of them, or 0 for their mean.')
                weights = weights[head - 1] if head else weights.mean(0)
                drawn.append(evavit.overlay_attention(picture.seen, weights, mark=mark))
        except ValueError as error:
            raise UserError(f'No attention to show: {first_line(error)}.') from error
        return drawn

    def at_side(self, side: int) -> Dict[str, Any]:
        """Copies of the models for images of this side. A conversion of the page's own is made anew, so that its cells
        stay as small as they were."""
        copies = {}
        for name, model in self.models.items():
            if isinstance(model, ConvertedModel) and model is not self.model:
                copies[name] = evavit.convert_vit(copies['softmax'], window_size=self.window_size)
                continue
            copies[name] = copy.deepcopy(model)
            if hasattr(model, 'set_input_size'):  # others, such as convolutions, take any size
                copies[name].set_input_size((side, side))
        return copies

    def cost(self) -> Iterator[Cost]:
        """Milliseconds and memory of an image in each model, of larger and larger images until one takes long."""
        channels, *size = self.data_config['input_size']
        plain = hasattr(self.model, 'patch_embed') and not hasattr(self.model, 'stages')
        patch = self.model.patch_embed.patch_size[0] if plain else math.gcd(32, max(size))
        sides = sorted({max(1, round(max(size) * factor / patch)) * patch for factor in GROWTH})
        start = time.monotonic()
        for side in sides:
            if (side // patch) ** 2 > MOST_TOKENS:
                return
            images = torch.randn(1, channels, side, side, device=self.device)
            calls = [functools.partial(model, images) for model in self.at_side(side).values()]
            with torch.no_grad():
                seconds = median_seconds(calls, self.device, repeats=3, warmup=1)
                memory = [peak_bytes(call, self.device) for call in calls]
            for name, each, most in zip(self.models, seconds, memory, strict=True):
                yield Cost(side, name, 1e3 * each, most / 2**20)
            if max(seconds) > MOST_SECONDS or time.monotonic() - start > PATIENCE:
                return


def with_softmax(model: nn.Module) -> nn.Module:
    """A model of this package on softmax attention, with the weights that this has a place for."""
    twin = copy.deepcopy(model)
    for holder in list(twin.modules()):
        for name, attn in holder.named_children():
            if isinstance(attn, GridAttention):
                softmax = SoftmaxAttention(
                    attn.qkv.in_features,
                    attn.num_heads,
                    num_prefix_tokens=attn.num_prefix_tokens,
                    rotate_half=attn.rotate_half,
                    qkv_bias=attn.qkv.bias is not None,
                    qk_norm=attn.qk_norm,
                    scale_norm=not isinstance(attn.norm, nn.Identity),
                    proj_bias=attn.proj.bias is not None,
                ).to(attn.qkv.weight)
                state = attn.state_dict()
                if isinstance(attn, ReformerAttention):  # its queries, at length 1, are the keys of logits q·k
                    for part in {'qkv.weight', 'qkv.bias'} & state.keys():
                        q, v = state[part].chunk(2)
                        state[part] = torch.cat([q, q, v])
                    softmax.qk_norm, softmax.k_norm = True, nn.RMSNorm(attn.head_dim, elementwise_affine=False)
                softmax.load_state_dict({key: state[key] for key in softmax.state_dict()})
                setattr(holder, name, softmax.eval())
    return twin


def load(flags: List[str], window_size: int) -> Tuple[Demo, str]:
    """The model that flags of inference.py name, and a line on it. UserError as there."""
    config, given = parse_settings('inference', flags, __doc__)
    table = options_of('inference')
    for name in sorted(given - TAKEN):
        if table[name].section not in ('model', 'weights'):
            raise UserError(
                f'{table[name].flag}: not a flag of demo.py, whose pictures come from the page; leave it out'
            )
    if not given & {'checkpoint', 'model'}:
        if not QUICKSTART.is_dir():
            raise UserError(
                f'no model: give --checkpoint or --model NAME, or train a small one with make quickstart ({QUICKSTART})'
            )
        config.weights.checkpoint = str(QUICKSTART)
    device = start_process(config.machine.device, alone='demo.py').device
    class_names = choose_weights(config, given)
    checks.image_channels(config.model)
    model: Any = build.build_model(config.model, config.model.num_classes, new_head=False)
    contents.load_checkpoint(model, config.weights)
    data_config = data.resolve_input(config.model, model)
    build.try_model(model, data_config['input_size'], config.model, classifier=bool(model.num_classes))
    name_class = class_namer(config, model, class_names) if model.num_classes else None
    topk = config.results.topk if 'topk' in given else TOPK
    demo = Demo(model.to(device).eval(), data_config, name_class, topk, window_size)
    source = config.weights.checkpoint or f'the weights that timm publishes for {config.model.model}'
    about = build.model_line(model, data_config['input_size'])
    return demo, f'{model.pretrained_cfg["architecture"]}, {about}, from {source}, on {device}'


def cost_table(costs: List[Cost]) -> str:
    """Markdown: a row for each side."""
    names = list(dict.fromkeys(one.attention for one in costs))
    lines = [
        '| side, px | ' + ' | '.join(f'{name}, ms | {name}, MiB' for name in names) + ' |',
        '|' + '---:|' * (1 + 2 * len(names)),
    ]
    for side in dict.fromkeys(one.side for one in costs):
        row = [one for one in costs if one.side == side]
        lines.append(f'| {side} | ' + ' | '.join(f'{r.milliseconds:.1f} | {r.mebibytes:.1f}' for r in row) + ' |')
    return '\n'.join(lines)


def build_page(demo: Demo, line: str) -> Any:
    """The page as Gradio's Blocks."""
    os.environ['GRADIO_ANALYTICS_ENABLED'] = 'False'  # read when it is imported
    try:
        import gradio as gr
        import pandas as pd
    except ImportError as error:
        raise UserError(
            f"the page needs Gradio ({error.name} is missing): in the clone, pip install '.[demo]'"
        ) from error

    count = len(demo.models)

    def said(text: str = '') -> str:
        return f'<p role="alert">{html.escape(printable(text))}</p>' if text else ''

    def upload(path: Optional[str], layer: int, head: int) -> list:
        """State, picture, place, query, maps, predictions and message."""
        try:
            picture = demo.read(path)
        except UserError as error:
            return [None, None, None, demo.first_query, *[None] * 2 * count, said(str(error))]
        maps, message = look(picture, layer, head, demo.first_query, None)
        return [
            picture,
            picture.seen,
            None,
            demo.first_query,
            *maps,
            *(demo.predict(picture) or [None] * count),
            message,
        ]

    def look(picture: Any, layer: int, head: int, query: str, place: Any) -> Tuple[list, str]:
        try:
            if picture is None:
                raise UserError('Give a picture.')
            return demo.look(picture, int(layer), int(head), query, place), said(picture.note)
        except UserError as error:
            return [None] * count, said(str(error))

    def change(*chosen: Any) -> list:
        maps, message = look(*chosen)
        return [*maps, message]

    def click(picture: Any, layer: int, head: int, event: gr.SelectData) -> list:
        x, y = event.index
        place = (y / picture.seen.height, x / picture.seen.width) if picture else None
        return [place, PATCH, *change(picture, layer, head, PATCH, place)]

    def measure() -> Iterator[list]:
        costs: List[Cost] = []
        for one in demo.cost():
            costs.append(one)
            if len(costs) % count == 0:
                rows = pd.DataFrame([c._asdict() for c in costs])
                yield [rows, rows, cost_table(costs)]

    def picture_box(name: str, label: str) -> Any:
        return gr.Image(
            label=label, elem_id=name, interactive=False, format='png', buttons=['fullscreen'], height=SHOWN
        )

    with gr.Blocks(title='evavit', analytics_enabled=False, fill_width=True) as page:
        gr.Markdown('# What it is, and where the model looks')
        gr.HTML(f'<p>{html.escape(printable(line))}</p><p>{html.escape(printable(demo.about))}</p>', padding=False)
        picture, place = gr.State(None), gr.State(None)
        with gr.Row():
            with gr.Column(scale=1, min_width=320):
                file = gr.File(label='A picture (JPEG, PNG, WebP, …)', elem_id='file', height=140)
                message = gr.HTML(elem_id='message', padding=False)
                query = gr.Radio(demo.queries, value=demo.first_query, label='Attention of', elem_id='query')
                layer = gr.Slider(1, demo.layers, value=demo.layers, step=1, label='Layer', elem_id='layer')
                head = gr.Slider(0, demo.heads, value=0, step=1, label='Head (0: mean of all)', elem_id='head')
            with gr.Column(scale=1, min_width=320):
                seen = picture_box('seen', 'What the model sees: click on a patch')
        with gr.Row():
            maps, labels = [], []
            for name in demo.models:
                with gr.Column(min_width=320):
                    maps.append(picture_box(f'map-{name}', name))
                    labels.append(gr.Label(label=f'{name}: what it is', visible=bool(demo.model.num_classes)))
        gr.Markdown('## Time and memory of an image, as its side grows')
        colours = dict(zip(demo.models, COLOURS, strict=False))  # Gradio's own legend is cut off
        swatches = (f'<span style="color: {colour}">■</span> {name}' for name, colour in colours.items())
        gr.HTML(f'<p>{" ".join(swatches)}</p>', padding=False)
        button = gr.Button('Measure on this machine', variant='primary', elem_id='measure')
        with gr.Row():
            axes = dict(x='side', color='attention', color_map=colours, color_title=' ', x_title='side, px', height=280)
            times = gr.LinePlot(y='milliseconds', y_title='ms', label='Time of a pass', **axes)
            memory = gr.LinePlot(y='mebibytes', y_title='MiB', label='Memory of a pass, without the weights', **axes)
        table = gr.Markdown(elem_id='costs')

        alone: Dict[str, Any] = dict(concurrency_id='model', concurrency_limit=1, api_visibility='private')
        chosen = [picture, layer, head]
        file.change(upload, [file, layer, head], [picture, seen, place, query, *maps, *labels, message], **alone)
        for box in (seen, *maps):
            box.select(click, chosen, [place, query, *maps, message], **alone)
        for control in (layer, head):
            control.change(change, [*chosen, query, place], [*maps, message], trigger_mode='always_last', **alone)
        query.input(change, [*chosen, query, place], [*maps, message], **alone)
        button.click(measure, None, [times, memory, table], **alone)
    return page


def launch(page: Any, host: str, port: int, **kwargs: Any) -> Any:
    """Serve the page, which asks nothing of the network: no fonts, no analytics, no tunnel."""
    import gradio as gr

    fonts = dict(font=['system-ui', 'sans-serif'], font_mono=['ui-monospace', 'monospace'])
    return page.launch(
        server_name=host,
        server_port=port,
        share=False,
        ssr_mode=False,
        max_file_size='64mb',
        theme=gr.themes.Default(**fonts),
        footer_links=[],
        quiet=True,
        css='#message p { color: #b42318; font-weight: 600 }',
        **kwargs,
    )


def main(argv: Optional[List[str]] = None) -> None:
    parser = Parser(
        prog='demo.py',
        description=__doc__,
        epilog='python inference.py --help lists the flags of the model',
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument('--host', default='127.0.0.1', help='address to listen on (127.0.0.1: this machine alone)')
    parser.add_argument('--port', type=int, default=7860, help='port to listen on (7860)')
    parser.add_argument('--window-size', type=int, default=7, help='of the conversion of a softmax ViT (7)')
    args, flags = parser.parse_known_args(argv)
    if args.window_size < 1:
        raise UserError(f'--window-size {args.window_size}: must be at least 1')
    demo, line = load(flags, args.window_size)
    page = build_page(demo, line)
    try:
        launch(page, args.host, args.port, prevent_thread_lock=True)
    except OSError as error:
        reason = first_line(error).split('. ')[0]
        raise UserError(f'--host {args.host} --port {args.port}: {reason}; give another --port') from error
    print(f'{line}\nhttp://{args.host}:{args.port}', flush=True)
    page.block_thread()


if __name__ == '__main__':
    sys.exit(run_script(main, no_memory=SMALLER))
