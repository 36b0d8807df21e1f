"""Draw a folder of pets, as JPEGs of different sizes: `python draw_pets.py FOLDER`. An equal seed, equal pictures."""

import argparse
import random
from collections.abc import Callable
from pathlib import Path

from PIL import Image, ImageDraw, ImageFilter

Colour = tuple[int, int, int]


def main() -> None:
    """Draw as many images of each pet as are asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--images", type=int, default=30, help="of each pet")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    for name, draw in PETS.items():
        folder = given.folder / name
        folder.mkdir(parents=True)
        for number in range(given.images):
            chance = random.Random(f"{given.seed} {name} {number}")
            picture(draw, chance).save(folder / f"{name}-{number:03d}.jpg", quality=90)


def picture(draw: Callable[[ImageDraw.ImageDraw, random.Random], None], chance: random.Random) -> Image.Image:
    """Return one pet on a background of its own, 180 to 280 pixels high and wide."""
    image = Image.new("RGB", (256, 256), colour(chance, (150, 160, 150), 60))
    canvas = ImageDraw.Draw(image)
    for _ in range(6):
        x, y, size = chance.randrange(256), chance.randrange(256), chance.randrange(20, 90)
        canvas.ellipse((x - size, y - size, x + size, y + size), colour(chance, (150, 160, 150), 60))
    draw(canvas, chance)
    image = image.rotate(chance.uniform(-15, 15), resample=Image.Resampling.BICUBIC, fillcolor=(140, 140, 140))
    width, height = chance.randrange(180, 281), chance.randrange(180, 281)
    return image.resize((width, height)).filter(ImageFilter.GaussianBlur(chance.uniform(0, 1.5)))


def cat(canvas: ImageDraw.ImageDraw, chance: random.Random) -> None:
    """A head with pointed ears."""
    x, y, r = place(chance)
    fur = colour(chance, (90, 90, 100), 40)
    for side in (-1, 1):
        canvas.polygon([(x + side * r, y - 1.7 * r), (x + side * 0.2 * r, y - 0.8 * r), (x + side * r, y)], fur)
    face(canvas, x, y, r, fur)


def dog(canvas: ImageDraw.ImageDraw, chance: random.Random) -> None:
    """A head with hanging ears."""
    x, y, r = place(chance)
    fur = colour(chance, (150, 100, 50), 40)
    face(canvas, x, y, r, fur)
    dark: Colour = (fur[0] // 2, fur[1] // 2, fur[2] // 2)
    for side in (-1, 1):
        canvas.ellipse((x + side * r - 0.4 * r, y - 0.7 * r, x + side * r + 0.4 * r, y + 1.2 * r), dark)


def fish(canvas: ImageDraw.ImageDraw, chance: random.Random) -> None:
    """A body with a tail, swimming to the left or to the right."""
    x, y, r = place(chance)
    scales, side = colour(chance, (220, 110, 60), 40), chance.choice((-1, 1))
    canvas.polygon([(x + side * r, y), (x + side * 2 * r, y - 0.8 * r), (x + side * 2 * r, y + 0.8 * r)], scales)
    canvas.ellipse((x - 1.4 * r, y - 0.7 * r, x + 1.4 * r, y + 0.7 * r), scales)
    eye(canvas, x - side * 0.8 * r, y - 0.2 * r, r)


PETS = {"cat": cat, "dog": dog, "fish": fish}


def face(canvas: ImageDraw.ImageDraw, x: float, y: float, r: float, fur: Colour) -> None:
    """A round head with two eyes and a nose."""
    canvas.ellipse((x - r, y - r, x + r, y + r), fur)
    for side in (-1, 1):
        eye(canvas, x + side * 0.4 * r, y - 0.2 * r, r)
    canvas.ellipse((x - 0.15 * r, y + 0.2 * r, x + 0.15 * r, y + 0.45 * r), (20, 20, 20))


def eye(canvas: ImageDraw.ImageDraw, x: float, y: float, r: float) -> None:
    """White, with a pupil."""
    canvas.ellipse((x - 0.2 * r, y - 0.2 * r, x + 0.2 * r, y + 0.2 * r), (240, 240, 240))
    canvas.ellipse((x - 0.1 * r, y - 0.1 * r, x + 0.1 * r, y + 0.1 * r), (10, 10, 10))


def place(chance: random.Random) -> tuple[float, float, float]:
    """Return where the pet is, and its radius."""
    return chance.uniform(100, 156), chance.uniform(110, 150), chance.uniform(45, 65)


def colour(chance: random.Random, middle: Colour, spread: int) -> Colour:
    """Return a colour near another one."""
    red, green, blue = (min(255, max(0, value + chance.randint(-spread, spread))) for value in middle)
    return red, green, blue


if __name__ == "__main__":
    main()
