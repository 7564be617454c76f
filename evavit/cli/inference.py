"""Classify pictures: inference.py --data-dir PICTURES --checkpoint output/RUN --topk 5

PICTURES is a folder, with folders in it or not, a tar file or one picture. --checkpoint takes a file or the folder of a
run of train.py, or a folder of save_folder; --model NAME alone takes the weights that timm publishes. Flags and columns
are those of timm's inference.py.
"""

import contextlib
import csv
import functools
import importlib.util
import json
import logging
import os
import re
from collections import Counter
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional, Sequence, Set, Tuple

import timm
import torch
from PIL import Image
from timm.data import CustomDatasetInfo, DatasetInfoLabelMapper, ImageNetInfo, infer_imagenet_subset

from evavit.bench.results import check_place, check_replaced, place_of
from evavit.errors import UserError, encodable, first_line, printable, reason_of
from evavit.files import holds, remove_marked, replacing, replacing_in
from evavit.maps import attention_maps, attention_rollout, overlay_attention
from evavit.training import build, checks, contents, data, loop
from evavit.training.compilation import check_compilation
from evavit.training.config import InferenceConfig, parse_settings
from evavit.training.data.images import UNREADABLE
from evavit.training.data.pictures import DRAWN, MARK, SOFTWARE
from evavit.training.distributed import start_process
from evavit.training.sections import ResultsConfig
from evavit.training.stalls import Watchdog

log = logging.getLogger('evavit.inference')

PICTURE = re.compile('[0-9]{6,}_.*\\.png', re.DOTALL)  # of attention: a file's name as `AttentionPictures` gives it

ENDINGS = {'csv': '.csv', 'json': '.json', 'json-records': '.json', 'json-split': '.json', 'parquet': '.parquet'}
DECIMALS = 6  # of the outputs
MAPS_AT_ONCE = 8  # images whose attention is in memory together
Row = Dict[str, Any]


def main(argv: Optional[Sequence[str]] = None) -> None:
    config, given = parse_settings('inference', argv, __doc__)
    with Watchdog(config.run.stall_timeout) as watchdog:
        infer(config, given, watchdog)


def infer(config: InferenceConfig, given: Set[str], watchdog: Watchdog) -> None:
    """Classify the pictures that the settings name; `given` are those that flags or a YAML file gave."""
    check_compilation(config.machine.torchcompile, config.machine.torchcompile_mode)
    formats = check_formats(config)
    process = start_process(config.machine.device, watchdog, alone='inference.py')
    class_names = choose_weights(config, given)
    dataset = data.open_pictures(config.data.data_dir, checks.image_channels(config.model))
    names = picture_names(dataset, config.results, formats)
    model: Any = build.build_model(config.model, config.model.num_classes, new_head=False)
    if not model.num_classes:
        raise UserError(
            f'{config.model.model} has no classifier; train one (configs/linear_probe.yaml), or give another'
        )
    data_config = contents.finish_model(model, config)
    name_class = class_namer(config, model, class_names)
    check_columns(config.results, formats, name_class is not None, model.num_classes)
    base = results_base(config, model, data_config)
    for form in formats:
        check_place(Path(f'{base}{ENDINGS[form]}'))
        check_replaced(Path(f'{base}{ENDINGS[form]}'), functools.partial(_are_own, results=config.results))
    pictures: Optional[AttentionPictures] = None
    if config.results.include_attention:
        folder = Path(f'{base}{ENDINGS[formats[0]]}{DRAWN}')  # of these results alone
        pictures = AttentionPictures(model, config.results.include_attention, folder, data_config, names)
        pictures.check_replaced()
        pictures.try_out()

    about = build.model_line(model, data_config['input_size'])
    log.info(f'{config.model.model}: {about}; on {process.device}')
    machine, batch_size = config.machine, config.batch.batch_size
    machine.workers = min(machine.workers, -(-len(dataset) // batch_size))
    loader = data.eval_loader(
        dataset, data_config, batch_size=batch_size, machine=machine, device=process.device, watchdog=process.watchdog
    )
    model, compilation = loop.place_model(model, machine, process.device)
    line = loop.ProgressLine(len(loader), config.run.log_interval, process.primary)
    line.live = line.live and config.results.no_console_results
    rows: List[Row] = []
    seen = turned = 0
    with contextlib.ExitStack() as stack:
        if pictures is not None:
            pictures.begin(stack)
        batches = loop.predictions(model, loader, machine, process, compilation)
        for step, (images, output, target) in enumerate(batches, 1):
            for name, why in dataset.bad.news():
                log.warning(f'warning: {name} is not a readable image ({why}); left out')
            readable = target != UNREADABLE
            numbers = [seen + i for i in readable.nonzero().flatten().tolist()]
            seen += len(target)
            turned += int(target[readable].sum())
            found = best_classes(output[readable].float(), [names[n] for n in numbers], config.results, name_class)
            if pictures is not None and found:
                drawn = pictures.draw(images[readable], numbers)
                found = [{**row, 'attention': file} for row, file in zip(found, drawn, strict=True)]
            if not config.results.no_console_results:
                for row in found:
                    print(printable(shown(row, config.results)), flush=True)
            rows += found
            line.show(step, 'pictures', f'{len(rows)} classified')
        if turned:
            log.warning(
                f'warning: {turned} of {len(dataset)} pictures have an EXIF orientation, which is not applied, as in '
                f'training: the model sees them as they are stored; rotate the files first (mogrify -auto-orient FILES)'
            )
        if not rows:
            raise UserError(f'none of the {len(dataset)} pictures in {config.data.data_dir} can be read')

        def write_tables() -> List[Path]:
            return [write_results(rows, base, form, config.results) for form in formats]

        files = write_tables() if pictures is None else pictures.put(stack, write_tables)
    bad = len(dataset) - len(rows)
    where = f'; attention in {pictures.folder}' if pictures is not None else ''
    log.info(f'{len(rows)} pictures classified, {bad} not readable; results in {", ".join(map(str, files))}{where}')


def choose_weights(config: InferenceConfig, given: Set[str]) -> Optional[List[str]]:
    """Complete the settings from the checkpoint or its folder; without one the weights are those that timm publishes.
    Returns the names of the classes, if any; UserError where there is no model or are no weights."""
    class_names = contents.complete_from_checkpoint(config, given)
    contents.check_source(config)
    name = config.model.model or ''
    if not config.weights.checkpoint:
        if ':' not in name and timm.is_model(name) and not build.has_weights(name):
            raise UserError(
                f'no weights: timm publishes none for {name}; give --checkpoint, a file or a folder of a run or of '
                f'save_folder'
            )
        config.model.pretrained = True  # as in timm's script
    return class_names


def picture_names(dataset: Any, results: ResultsConfig, formats: Sequence[str]) -> List[str]:
    """Names of the pictures for the results; UserError where they have to be different and are not."""
    names = [encodable(name) for name in dataset.dataset.filenames(basename=not results.fullname)]
    if len(set(names)) < len(names):
        (twice, _), *_ = Counter(names).most_common(1)
        several = f'there are several pictures {twice}; add --fullname'
        if 'json' in formats:
            raise UserError(f'--results-format json: {several}')
        log.warning(f'warning: {printable(several)}')
    return names


def check_formats(config: InferenceConfig) -> List[str]:
    """The forms to write, of the flag, the name of the file, or CSV; UserError where one cannot be written."""
    name, formats = config.run.results_file, config.results.results_format
    if not formats:
        ending = Path(name or '').suffix or '.csv'
        formats = [form for form in ('csv', 'json', 'parquet') if ENDINGS[form] == ending]
        if not formats:
            raise UserError(f'--results-file {name}: the name must end in .csv, .json or .parquet')
    formats = list(dict.fromkeys(formats))
    if len(clash := [form for form in formats if ENDINGS[form] == '.json']) > 1:
        raise UserError(f'--results-format {" ".join(formats)}: {", ".join(clash)} go into one file; give one of them')
    if 'parquet' in formats and importlib.util.find_spec('pyarrow') is None:
        raise UserError('--results-format parquet needs pyarrow: pip install pyarrow')
    return formats


def check_columns(results: ResultsConfig, formats: Sequence[str], named: bool, classes: int) -> None:
    """UserError where two columns of the results would have one name, and the second one would replace the first."""
    given = (
        (results.index_col, results.include_index or not named),
        (results.label_col, named),
        (results.output_col or results.output_type, not results.exclude_output),
    )
    lists = [name for name, used in given if used]
    for form in formats:
        separate = range(min(results.topk, classes) if results.results_separate_col or form == 'csv' else 1)
        names = [f'{name}_{i}' for name in lists for i in separate] if len(separate) > 1 else lists
        every = [results.filename_col, *names, *['attention'] * bool(results.include_attention)]
        twice, count = Counter(every).most_common(1)[0]
        if count > 1:
            raise UserError(
                f'{count} columns of the results would be called {twice}: give --filename-col, --index-col, '
                f'--label-col and --output-col names of their own'
            )


def results_base(config: InferenceConfig, model: Any, data_config: Dict[str, Any]) -> Path:
    """Folder and name of the results, without an ending; by default the model's name and its image size, as in timm."""
    architecture = re.sub(r'[^\w.]+', '_', model.pretrained_cfg['architecture'])  # of a repository of the Hub: any text
    name = config.run.results_file or f'{architecture}-{data_config["input_size"][-1]}'
    base = Path(config.results.results_dir or '', name)
    if config.run.results_file and base.suffix in ENDINGS.values():
        base = base.with_suffix('')
    try:
        base.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f'--results-dir {base.parent}: cannot be made ({reason_of(error)})') from error
    return base


def _are_own(names: List[str], rows: Sequence[Row], results: ResultsConfig) -> bool:
    """Whether a table is one of results, of other flags too: no other columns, the lists of a row of one length, and
    outputs as they are written here, of which one is not short unless each row has a picture of attention. Names,
    numbers of classes and short numbers may be anybody's."""
    for row in rows:
        lists = [cell for cell in row.values() if isinstance(cell, list)]
        plain = [value for cell in row.values() for value in (cell if isinstance(cell, list) else [cell])]
        if len({len(cell) for cell in lists}) > 1 or any(isinstance(value, (list, dict)) for value in plain):
            return False
    outputs = {results.output_col or results.output_type, 'prob', 'logit'}
    known = {results.filename_col, results.index_col, results.label_col, 'attention'} | outputs
    kinds = {name: name if name in known else re.sub(r'_\d+$', '', name) for name in names}
    cells = [row[name] for row in rows for name, kind in kinds.items() if kind in outputs]
    values = [value for cell in cells for value in (cell if isinstance(cell, list) else [cell])]
    numbers = [float(value) for value in values]
    as_written = [str(value) for value in values] == [repr(round(number, DECIMALS)) for number in numbers]
    drawn = bool(rows) and all(f'{DRAWN}/' in str(row.get('attention')) for row in rows)
    long = any(number != round(number, 4) for number in numbers)
    return known.issuperset(kinds.values()) and as_written and (drawn or long)


def class_namer(
    config: InferenceConfig, model: Any, class_names: Optional[List[str]]
) -> Optional[Callable[[int], str]]:
    """From a class number to its name: of --class-map, the checkpoint, the folder, or ImageNet's; None without."""
    if config.results.label_type == 'none':
        return None
    published: Dict[str, Any] = getattr(model, 'pretrained_cfg', None) or {}
    names: Any = published.get('label_names')
    source = f'{config.model.model}: label_names in its config.json'
    if class_names:  # of a run, whose model may have more classes
        source = str(config.weights.checkpoint)
        names = [*class_names, *map(str, range(len(class_names), model.num_classes))]
    if config.data.class_map:
        learnt, whose = names, source
        source = f'--class-map {config.data.class_map}'
        labels = data.read_class_map(config.data.class_map, config.data.data_dir)
        names = sorted(labels, key=labels.__getitem__)
        for label, name in enumerate(learnt if isinstance(learnt, list) else ()):
            if isinstance(name, str) and labels.get(name, label) != label:
                raise UserError(
                    f'{source}: {name} is class {labels[name]} of it, and class {label} of {whose}; leave the map out, '
                    f'or put its names in that order'
                )
    try:
        if isinstance(names, (list, tuple)) and not (len(set(names)) == len(names) == model.num_classes):
            raise UserError(
                f'{source}: {len(set(names))} different names for {model.num_classes} classes; give --class-map FILE '
                f'with a name for each, or --label-type none'
            )
        if names:
            words = published.get('label_descriptions') if names is published.get('label_names') else None
            if words is not None and not all(isinstance(word, str) for word in dict(words).values()):
                raise TypeError('label_descriptions hold more than texts')
            info: Any = CustomDatasetInfo(names, words)
        else:
            subset = infer_imagenet_subset({'num_classes': model.num_classes})
            if subset is None:
                log.warning(f'nothing says what the {model.num_classes} classes are called; give --class-map FILE')
                return None
            if config.weights.checkpoint:
                log.info(f'{model.num_classes} classes without names: taken for those of {subset}')
            info = ImageNetInfo(subset)
    except (TypeError, ValueError) as error:
        raise UserError(f'{config.model.model}: the names of its classes are damaged: {first_line(error)}') from error
    mapper = DatasetInfoLabelMapper(info, config.results.label_type)
    return lambda number: encodable(mapper(number))


def best_classes(
    logits: torch.Tensor, names: Sequence[str], results: ResultsConfig, name_class: Optional[Callable[[int], str]]
) -> List[Row]:
    """For each picture of `(B, classes)` its name and lists of its most likely classes: numbers, names and outputs, as
    asked for. UserError where a model gives no numbers."""
    for name, finite in zip(names, logits.isfinite().all(-1).tolist(), strict=True):
        if not finite:
            raise UserError(f'{name}: the output of the model is not finite; check its weights, or leave --amp out')
    output = logits.softmax(-1) if results.output_type == 'prob' else logits
    best = output.topk(min(results.topk, output.shape[-1]))
    rows = []
    for name, numbers, values in zip(names, best.indices.tolist(), best.values.tolist(), strict=True):
        row: Row = {results.filename_col: name}
        if results.include_index or name_class is None:
            row[results.index_col] = numbers
        if name_class is not None:
            row[results.label_col] = [name_class(number) for number in numbers]
        if not results.exclude_output:
            row[results.output_col or results.output_type] = [round(value, DECIMALS) for value in values]
        rows.append(row)
    return rows


def shown(row: Row, results: ResultsConfig) -> str:
    """A row for the terminal: picture.jpg: tabby 91.3 %, lynx 4.1 %"""
    names = row.get(results.label_col) or row[results.index_col]
    values = row.get(results.output_col or results.output_type)
    form = '{} {:.1%}' if results.output_type == 'prob' else '{} {:.4g}'
    best = names if values is None else map(form.format, names, values)
    return f'{row[results.filename_col]}: {", ".join(map(str, best))}'


def columns(row: Row, separate: bool) -> Row:
    """A row with plain values: a list of one becomes its value, a longer one a column for each where `separate`."""
    flat: Row = {}
    for name, value in row.items():
        if not isinstance(value, list) or len(value) == 1:
            flat[name] = value[0] if isinstance(value, list) else value
        elif separate:
            flat |= {f'{name}_{i}': one for i, one in enumerate(value)}
        else:
            flat[name] = value
    return flat


def write_results(rows: Sequence[Row], base: Path, form: str, results: ResultsConfig) -> Path:
    """Write the rows in one form, whole or not at all. A cell of CSV holds no list: there columns are always apart."""
    path = place_of(Path(f'{base}{ENDINGS[form]}'), functools.partial(_are_own, results=results))
    table = [columns(row, results.results_separate_col or form == 'csv') for row in rows]
    try:
        with replacing(os.path.realpath(path)) as partial:  # of a link the file that it leads to
            if form == 'parquet':
                import pyarrow
                import pyarrow.parquet

                pyarrow.parquet.write_table(pyarrow.Table.from_pylist(table), str(partial))
                return path
            with open(partial, 'w', encoding='utf-8', errors='backslashreplace', newline='') as file:
                if form == 'csv':
                    writer = csv.DictWriter(file, fieldnames=list(table[0]))
                    writer.writeheader()
                    writer.writerows(table)
                elif form == 'json':
                    key = results.filename_col
                    json.dump({row.pop(key): row for row in table}, file, indent=4, ensure_ascii=False)
                elif form == 'json-records':
                    file.writelines(json.dumps(row, ensure_ascii=False) + '\n' for row in table)
                else:
                    split = dict(columns=list(table[0]), data=[list(row.values()) for row in table])
                    json.dump(split, file, indent=4, ensure_ascii=False)
    except OSError as error:
        raise UserError(f'{path}: cannot be written ({reason_of(error)})') from error
    return path


class AttentionPictures:
    """Draws over each picture, as the model saw it, where what the classifier reads has looked.

    That is the class token where the classifier reads it, else the mean over the tokens of the grid.

    Args:
        model: The model, not compiled.
        how: 'last' for the last layer, as a mean over its heads, or 'rollout' through all layers.
        folder: Where the pictures go.
        data_config: From `data.resolve_input`.
        names: Those of all pictures in the results.
    """

    def __init__(self, model: Any, how: str, folder: Path, data_config: Dict[str, Any], names: Sequence[str]):
        self.model, self.how, self.folder = model, how, folder
        self.files = [f'{number:06d}_{Path(name).name[-50:]}.png' for number, name in enumerate(names)]
        self.work = folder
        self.input_size: Tuple[int, ...] = data_config['input_size']
        self.mean, self.std = (torch.tensor(data_config[name]).view(-1, 1, 1) for name in ('mean', 'std'))
        self.reads_class = getattr(model, 'cls_token', None) is not None and model.global_pool == 'token'

    def check_replaced(self) -> None:
        """UserError where the folder is none or a link, or a file in it that has a picture's name is not of an earlier
        run, which its content tells."""
        advice = 'take it away, or give another --results-file'
        if self.folder.is_symlink() or (self.folder.exists() and not self.folder.is_dir()):
            raise UserError(f'{self.folder} is a link or no folder, where the pictures of attention go; {advice}')
        for file in map(self.folder.joinpath, self.files if self.folder.exists() else ()):
            if os.path.lexists(file) and not holds(file, *MARK):
                raise UserError(f'{file} is there, and no picture of an earlier run; {advice}')

    def begin(self, stack: contextlib.ExitStack) -> None:
        """Make a place for what is drawn. When the stack is closed, it comes to the folder; after a failure it goes."""
        with self._told():
            self.work = stack.enter_context(replacing_in(self.folder, make=True))

    def put(self, stack: contextlib.ExitStack, write_tables: Callable[[], List[Path]]) -> List[Path]:
        """Put the pictures and the tables into the place of those of earlier runs. Wherever this is stopped, no table
        stands beside pictures of another run."""
        with self._told():
            remove_marked(self.folder, PICTURE, *MARK)
        tables = write_tables()
        with self._told():
            stack.close()
        return tables

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(f'{self.folder}: cannot be written ({reason_of(error)})') from error

    def try_out(self) -> None:
        """UserError where the model has no such maps, before any picture is read."""
        self._weights(torch.zeros(1, *self.input_size))

    def _weights(self, images: torch.Tensor) -> torch.Tensor:
        """`(B, H, W)`"""
        try:
            if self.how == 'rollout':
                one = attention_rollout(attention_maps(self.model, images))
            else:
                (one,) = attention_maps(self.model, images, layer=-1, query='class' if self.reads_class else 'mean')
        except ValueError as error:
            raise UserError(f'--include-attention {self.how}: {error}') from error
        weights = one.grid.mean(1)
        if self.how == 'rollout' and not self.reads_class:
            weights = weights[:, one.num_prefix_tokens :].mean(1, keepdim=True)
        weights = weights[:, 0]
        if (weights < 0).any():
            raise UserError(
                f'--include-attention {self.how}: {one.name} has weights below 0, which no brightness can show'
            )
        return weights

    def draw(self, images: torch.Tensor, numbers: Sequence[int]) -> List[str]:
        """Write a PNG for each image `(B, C, height, width)`, whose numbers among all pictures are given; returns their
        names, with the folder's."""
        from PIL import PngImagePlugin  # an import that Pillow would note

        drawn: List[str] = []
        about = PngImagePlugin.PngInfo()
        about.add_text('Software', SOFTWARE)
        with self._told():
            for some in images.split(MAPS_AT_ONCE):
                for image, weights in zip(some.float().cpu(), self._weights(some).cpu(), strict=True):
                    pixels = (image * self.std + self.mean).clamp(0, 1).mul(255).round().to(torch.uint8)
                    picture = Image.fromarray(pixels.permute(1, 2, 0).squeeze(-1).numpy())
                    file = self.files[numbers[len(drawn)]]
                    overlay_attention(picture, weights).save(self.work / file, format='PNG', pnginfo=about)
                    drawn.append(f'{self.folder.name}/{file}')
        return drawn
