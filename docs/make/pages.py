"""What the programs of this folder share: rows of results/, tables in Markdown, pages with tables
between markers, plots that know their data."""

import csv
import hashlib
import math
from pathlib import Path
from typing import Any, Dict, Iterable, List, Sequence

from evavit.files import replacing

ROOT = Path(__file__).resolve().parents[2]

Row = Dict[str, str]


def read_results(name: str) -> List[Row]:
    """The rows of a file in results/; none where there is no such file."""
    path = ROOT / 'results' / name
    if not path.exists():
        return []
    with open(path, newline='') as stream:
        return list(csv.DictReader(stream))


def pick(rows: Iterable[Row], **wanted) -> List[Row]:
    """The rows that have these values in these columns."""
    return [row for row in rows if all(row[key] == str(value) for key, value in wanted.items())]


def origins(rows: Iterable[Row]) -> str:
    """Where rows were measured and with what: each device with its versions once, its commits and its days."""
    found: Dict[str, List[Row]] = {}
    for row in rows:
        found.setdefault(f'{row["device"]}, torch {row["torch"]}, timm {row["timm"]}', []).append(row)
    texts = []
    for what, here in sorted(found.items()):
        commits, days = (sorted({row[column] for row in here}) for column in ('commit', 'date'))
        span = ' to '.join(dict.fromkeys([days[0], days[-1]]))
        texts.append(f'{what}, commit{"s" * (len(commits) > 1)} {", ".join(commits)}, {span}')
    return '; '.join(texts) + '.'


def standard_error(row: Row) -> float:
    """Of top-1 in percent, from the number of pictures alone: another run would add its own."""
    share = float(row['top1']) / 100
    return 100 * math.sqrt(share * (1 - share) / int(row['images']))


def line(cells: Iterable[object]) -> str:
    """A row of a table in Markdown."""
    return f'| {" | ".join(map(str, cells))} |'


def table(columns: Sequence[str], rows: Iterable[Iterable[object]]) -> str:
    """A table in Markdown."""
    return '\n'.join([line(columns), '|' + '---|' * len(columns), *map(line, rows)])


def digest(data: object) -> str:
    """Of what a plot shows; it stands in the picture's metadata."""
    return 'data ' + hashlib.sha256(repr(data).encode()).hexdigest()[:16]


def plot_is_fresh(plot: Path, data: object) -> bool:
    """Whether a plot was drawn from these data."""
    return plot.exists() and digest(data) in plot.read_text(encoding='utf-8')


def pyplot(salt: str) -> Any:
    """matplotlib.pyplot without a display, for a plot that is the same file from the same numbers."""
    import matplotlib

    matplotlib.use('Agg')
    matplotlib.rcParams['svg.hashsalt'] = salt
    import matplotlib.pyplot as plt

    return plt


def save_plot(figure: Any, path: Path, data: object = None, **options: Any) -> None:
    """A figure of Matplotlib as a file of the kind that its name ends with; with the digest of what it shows.

    Args:
        figure: Of Matplotlib.
        path: The file, which is replaced whole.
        data: What `plot_is_fresh` compares.
        options: Of Matplotlib's `savefig`.
    """
    about = {'Software': None} if path.suffix == '.png' else {'Date': None}
    if data is not None:
        about['Description'] = digest(data)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial:
        figure.savefig(partial, format=path.suffix[1:] or 'png', metadata=about, **options)


def replace(text: str, marker: str, generated: str) -> str:
    """The text with what stands between <!-- marker --> and <!-- /marker --> replaced."""
    begin, end = f'<!-- {marker} -->', f'<!-- /{marker} -->'
    if text.count(begin) != 1 or text.count(end) != 1:
        raise SystemExit(f'error: a page needs one {begin} and one {end}')
    return f'{text.split(begin)[0]}{begin}\n{generated}\n{end}{text.split(end)[1]}'


def update(page: str, tables: Dict[str, str], check: bool, remedy: str) -> bool:
    """Put tables into a page, each between its markers; with check only say which are stale. Whether all are fresh.

    Args:
        page: Path from the root of the repository.
        tables: The markers' name to the table.
        check: Write nothing.
        remedy: The command that mends a stale page.
    """
    path = ROOT / page
    text = path.read_text(encoding='utf-8')
    stale = {marker: generated for marker, generated in tables.items() if replace(text, marker, generated) != text}
    for marker in tables:
        state = 'up to date' if marker not in stale else f'stale; run {remedy}' if check else 'written'
        print(f'{page}: {marker} {state}')
    if stale and not check:
        for marker, generated in stale.items():
            text = replace(text, marker, generated)
        with replacing(path) as partial:
            partial.write_text(text, encoding='utf-8')
    return not stale or not check
