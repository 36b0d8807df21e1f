"""One image file: what is taken, what is converted without loss, and what is refused with its mode named."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nss.images import read_image

GREY = np.array([[0, 50, 100], [150, 200, 255]], np.uint8)
COLOUR = np.stack([GREY, GREY[::-1], 255 - GREY], axis=-1)


def deep_png(path: Path, colour_type: int, channels: int) -> Path:
    """Write a PNG of 2 x 1 pixels with 16 bits a channel, which PIL cannot write in colour."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", 2, 1, 16, colour_type, 0, 0, 0)
    pixels = zlib.compress(b"\0" + b"\xff\xff" * 2 * channels)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b""))
    return path


def saved(path: Path, image: Image.Image, **options: object) -> Path:
    image.save(path, **options)
    return path


def with_alpha(pixels: np.ndarray, alpha: int) -> Image.Image:
    planes = pixels if pixels.ndim == 3 else pixels[..., None]
    layer = np.full((*GREY.shape, 1), 255, np.uint8)
    layer[0, 0] = alpha
    return Image.fromarray(np.concatenate([planes, layer], axis=-1), "RGBA" if pixels.ndim == 3 else "LA")


@pytest.mark.parametrize("ending", ["png", "bmp", "tif", "pgm"])
def test_grey_is_taken_as_it_is(tmp_path: Path, ending: str) -> None:
    assert read_image(saved(tmp_path / f"a.{ending}", Image.fromarray(GREY))).tolist() == [GREY.tolist()]


@pytest.mark.parametrize("ending", ["png", "bmp", "tif", "ppm", "webp"])
def test_colour_is_taken_as_it_is_channels_first(tmp_path: Path, ending: str) -> None:
    image = read_image(saved(tmp_path / f"a.{ending}", Image.fromarray(COLOUR), lossless=True))
    assert (image.dtype, image.shape) == (np.uint8, (3, 2, 3))
    np.testing.assert_array_equal(image, COLOUR.transpose(2, 0, 1))


def test_one_bit_becomes_0_and_255(tmp_path: Path) -> None:
    image = Image.fromarray(GREY >= 128)
    assert image.mode == "1"
    assert read_image(saved(tmp_path / "a.png", image)).tolist() == [[[0, 0, 0], [255, 255, 255]]]


def test_a_palette_keeps_its_colours(tmp_path: Path) -> None:
    image = Image.fromarray(np.array([[0, 1, 1]], np.uint8), "L")
    image.putpalette([10, 20, 30, 40, 50, 60])
    assert read_image(saved(tmp_path / "a.png", image)).tolist() == [[[10, 40, 40]], [[20, 50, 50]], [[30, 60, 60]]]


def test_a_palette_of_greys_becomes_grey(tmp_path: Path) -> None:
    image = Image.fromarray(np.array([[0, 1, 1]], np.uint8), "L")
    image.putpalette([10, 10, 10, 40, 40, 40])
    assert read_image(saved(tmp_path / "a.png", image)).tolist() == [[[10, 40, 40]]]


@pytest.mark.parametrize("pixels", [GREY, COLOUR])
def test_alpha_is_dropped_where_every_pixel_is_opaque(tmp_path: Path, pixels: np.ndarray) -> None:
    image = read_image(saved(tmp_path / "a.png", with_alpha(pixels, 255)))
    np.testing.assert_array_equal(image, np.atleast_3d(pixels).transpose(2, 0, 1))


@pytest.mark.parametrize(("pixels", "mode"), [(GREY, "LA"), (COLOUR, "RGBA")])
def test_a_pixel_that_is_not_opaque_is_refused(tmp_path: Path, pixels: np.ndarray, mode: str) -> None:
    with pytest.raises(ValueError, match=f"mode {mode} with transparent pixels"):
        read_image(saved(tmp_path / "a.png", with_alpha(pixels, 254)))


def test_a_transparent_colour_is_refused_where_a_pixel_has_it(tmp_path: Path) -> None:
    path, image = tmp_path / "a.png", Image.fromarray(COLOUR)
    unused, used = (1, 2, 3), tuple(COLOUR[0, 0].tolist())
    np.testing.assert_array_equal(read_image(saved(path, image, transparency=unused)), COLOUR.transpose(2, 0, 1))
    with pytest.raises(ValueError, match="mode RGB with transparent pixels"):
        read_image(saved(path, image, transparency=used))


def test_a_palette_with_a_transparent_entry_is_refused_where_a_pixel_has_it(tmp_path: Path) -> None:
    image = Image.fromarray(np.array([[0, 1]], np.uint8), "L")
    image.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    with pytest.raises(ValueError, match="mode P with transparent pixels"):
        read_image(saved(tmp_path / "a.png", image, transparency=1))


def test_the_orientation_in_exif_is_applied(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 90 degrees clockwise to see it upright
    image = read_image(saved(tmp_path / "a.png", Image.fromarray(GREY), exif=exif))
    assert image.tolist() == [[[150, 0], [200, 50], [255, 100]]]


@pytest.mark.parametrize(
    ("name", "image", "mode"),
    [
        ("a.png", Image.fromarray(GREY.astype(np.uint16) * 257), "I;16"),
        ("a.tif", Image.fromarray(GREY.astype(np.int32)), "I"),
        ("a.tif", Image.fromarray(GREY.astype(np.float32)), "F"),
        ("a.jpg", Image.new("CMYK", (3, 2)), "CMYK"),
        ("a.tif", Image.new("LAB", (3, 2)), "LAB"),
    ],
)
def test_a_mode_that_would_lose_something_is_refused_by_name(
    tmp_path: Path, name: str, image: Image.Image, mode: str
) -> None:
    with pytest.raises(ValueError, match=f"^mode {mode}; allowed: 8-bit grey or RGB"):
        read_image(saved(tmp_path / name, image))


@pytest.mark.parametrize(("colour_type", "channels"), [(2, 3), (4, 2), (6, 4)])
def test_a_png_with_16_bits_a_channel_is_refused_though_pil_would_cut_it(
    tmp_path: Path, colour_type: int, channels: int
) -> None:
    path = deep_png(tmp_path / "a.png", colour_type, channels)
    with Image.open(path) as image:
        assert image.mode in ("RGB", "LA", "RGBA")
    with pytest.raises(ValueError, match=r"mode (RGB|LA|RGBA) with 16 bits a channel"):
        read_image(path)


def test_a_ppm_with_16_bits_a_channel_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.ppm").write_bytes(b"P6 2 1 65535\n" + bytes(12))
    with pytest.raises(ValueError, match="mode RGB with 16 bits"):
        read_image(tmp_path / "a.ppm")


def test_an_image_of_several_frames_is_refused(tmp_path: Path) -> None:
    frames = [Image.fromarray(GREY), Image.fromarray(255 - GREY)]
    path = saved(tmp_path / "a.gif", frames[0], save_all=True, append_images=frames[1:])
    with pytest.raises(ValueError, match="2 frames; allowed: one"):
        read_image(path)


def test_an_image_too_large_to_be_meant_is_refused_unread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(tmp_path / "a.png", Image.fromarray(GREY))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 5)
    with pytest.raises(ValueError, match=r"cannot be read .*exceeds limit of 5 pixels"):
        read_image(path)


def test_a_file_that_is_no_whole_image_is_refused_with_the_reason(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"empty \(0 bytes\)"):
        read_image(path)
    path.write_text("a text")
    with pytest.raises(ValueError, match="no image of a known format"):
        read_image(path)
    saved(path, Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40), np.uint8)))
    path.write_bytes(path.read_bytes()[:-700])
    with pytest.raises(ValueError, match=r"cannot be read .*truncated"):
        read_image(path)
