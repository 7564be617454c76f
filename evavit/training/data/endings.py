"""By which endings of a name a file is an image, and which of them each program reads; all in lower case.

The lists are fixed, so that the same files are images wherever a program runs: Pillow's own list grows with its version
and with plugins. tests/training/data/test_endings.py holds them against it.
"""

import os
from typing import Tuple

from timm.data.readers.img_extensions import get_img_extensions

TRAINED_TOO = ('.webp', '.bmp')  # beside timm's png, jpg and jpeg
READ = (  # other endings of the formats that `decode` reads; inference takes them too
    *('.apng', '.gif', '.jfif', '.jpe', '.tif', '.tiff'),
    *('.j2c', '.j2k', '.jp2', '.jpc', '.jpf', '.jpx'),
    *('.pbm', '.pfm', '.pgm', '.pnm', '.ppm'),
)
PILLOW = (  # its other pictures; not what it keeps no picture in, such as .pdf, .mpg and .h5
    '.avif .avifs .blp .bw .cur .dcx .dds .dib .emf .eps .fit .fits .flc .fli .ftc .ftu .gbr .icb .icns .ico .iim .im '
    '.mpo .msp .palm .pcd .pcx .ps .psd .pxr .qoi .ras .rgb .rgba .sgi .tga .vda .vst .wmf .xbm .xpm'
)
CAMERAS = (
    '.3fr .arw .cr2 .cr3 .crw .dng .erf .heic .heics .heif .heifs .hif .iiq .kdc .mef .mos .mrw .nef .nrw .orf .pef '
    '.raf .raw .rw2 .rwl .sr2 .srf .srw .x3f'
)
PROGRAMS = (
    '.ai .bpg .cdr .dcm .djvu .exr .flif .hdr .jls .jng .jxl .jxr .kra .mng .pct .pict .psb .svg .svgz .wdp .xcf .xwd'
)
OTHERS = frozenset(f'{PILLOW} {CAMERAS} {PROGRAMS}'.split())  # of formats that nothing here reads


def image_endings() -> Tuple[str, ...]:
    """Endings of the images of a class folder: timm's and ours."""
    return tuple(dict.fromkeys((*get_img_extensions(), *TRAINED_TOO)))


def read_endings() -> Tuple[str, ...]:
    """Those of all formats that `decode` reads."""
    return tuple(dict.fromkeys((*image_endings(), *READ)))


def is_image(path: str) -> bool:
    """Whether a name is that of an image, of a format that is read or of another."""
    ending = os.path.splitext(path)[1].lower()
    return ending in read_endings() or ending in OTHERS
