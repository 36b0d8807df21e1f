"""Reading one image file by documented rules, taken as it is, converted without loss, or refused; and scaling."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

# The mode of each image that is taken, and the mode in which its pixels are read without loss.
_MODES = {"1": "L", "L": "L", "P": "RGB", "RGB": "RGB", "LA": "LA", "PA": "RGBA", "RGBA": "RGBA"}


def read_image(path: Path) -> NDArray[np.uint8]:
    """Read one image file as uint8 [c, h, w], c 1 or 3; raises ValueError with the reason when it is refused.

    Taken: 8-bit grey and RGB as they are; 1-bit and palette images, without loss (a palette of greys becomes grey);
    alpha only where every pixel is opaque. EXIF orientation is applied. Refused: 16-bit, CMYK, float and other modes,
    images of several frames, what PIL cannot read.

    >>> read_image(Path("photos/cat/1.png")).shape  # doctest: +SKIP
    (3, 32, 32)
    """
    if path.stat().st_size == 0:
        raise ValueError("the file is empty (0 bytes)")
    try:
        with warnings.catch_warnings():
            # What PIL only warns of is decided here: the rest would be lines without a file's name.
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            return _decode(path)
    except UnidentifiedImageError:
        raise ValueError("the file is no image of a known format") from None
    except ValueError:
        raise
    # PIL's plugins raise nearly anything on damaged files, and each such file must be listed, not end the run.
    except Exception as problem:
        raise ValueError(f"the image cannot be read ({problem})") from None


def scale(images: NDArray[np.uint8], size: tuple[int, int]) -> NDArray[np.uint8]:
    """Return uint8 images [n, c, h, w] scaled to (height, width), bilinear; those that have this size as they are.

    >>> scale(np.zeros((2, 3, 480, 640), np.uint8), (32, 32)).shape
    (2, 3, 32, 32)
    """
    if images.shape[2:] == size:
        return images
    planes = [Image.fromarray(plane) for plane in images.reshape(-1, *images.shape[2:])]
    scaled = [np.asarray(plane.resize((size[1], size[0]), Image.Resampling.BILINEAR)) for plane in planes]
    return np.stack(scaled).reshape(*images.shape[:2], *size)


def _decode(path: Path) -> NDArray[np.uint8]:
    with Image.open(path) as image:
        if image.mode not in _MODES or _is_deep(image):
            depth = " with 16 bits a channel" if image.mode in _MODES else ""
            raise ValueError(f"mode {image.mode}{depth}; allowed: 8-bit grey or RGB, 1-bit, palette, opaque alpha")
        # An MPO file is a JPEG photograph with previews behind it.
        if getattr(image, "n_frames", 1) > 1 and image.format != "MPO":
            raise ValueError(f"{getattr(image, 'n_frames', 1)} frames; allowed: one")
        return _pixels(ImageOps.exif_transpose(image))


def _is_deep(image: Image.Image) -> bool:
    """Whether PIL would silently cut channels of 16 bits down to 8, as it does for colour PNG, TIFF and PPM."""
    for tile in getattr(image, "tile", []):
        values = tile[3] if isinstance(tile[3], tuple) else (tile[3],)
        if any(isinstance(value, str) and ";16" in value for value in values):
            return True
        if tile[0].startswith("ppm") and any(isinstance(value, int) and value > 255 for value in values):
            return True
    return False


def _pixels(image: Image.Image) -> NDArray[np.uint8]:
    mode = _MODES[image.mode]
    if image.has_transparency_data and not mode.endswith("A"):
        mode += "A"
    pixels = np.asarray(image.convert(mode)).reshape(image.height, image.width, -1)
    if mode.endswith("A"):
        if pixels[..., -1].min() < 255:
            raise ValueError(f"mode {image.mode} with transparent pixels; allowed: opaque ones only")
        pixels = pixels[..., :-1]
    if image.mode.startswith("P") and (pixels == pixels[..., :1]).all():
        pixels = pixels[..., :1]
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))
