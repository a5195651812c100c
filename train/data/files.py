"""Files of sensors: a picture or a LiDAR scan is plausible, or it is a `BadFile` that says why."""

from pathlib import Path

import numpy as np
from PIL import Image

_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF")  # Pillow knows others, some of which start programs (EPS)
_PLAIN = ("1", "L", "P", "RGB", "RGBX", "YCbCr", "HSV")  # modes whose conversion to RGB is exact, or well defined
_WITH_ALPHA = ("LA", "PA", "RGBA", "RGBa")
_ROW = 5 * 4  # bytes of a LiDAR point: x, y, z, intensity, ring as float32
_MOST_POINTS = 10_000_000  # of a scan
_FARTHEST = 1000.0  # metres from the LiDAR
_BRIGHTEST = 255.0


class BadFile(Exception):
    """A sensor's file that is missing, cannot be read, or holds what no such sensor gives.

    Args:
        file: its path, or what should have been there. It is the exception's only argument.
        reason: what is wrong with it.
    """

    def __init__(self, file: str | Path, reason: str = "is missing"):
        super().__init__(str(file))
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.args[0]} {self.reason}"


def read_picture(path: Path, size: tuple[int, int], draft: tuple[int, int] | None = None) -> Image.Image:
    """A camera's picture in RGB, at the size that the file has.

    Args:
        path: of a JPEG, PNG, WebP, BMP or TIFF file.
        size: (width, height) that the tables give; the file's sides must be in the same proportion.
        draft: (width, height) that is enough: a much larger JPEG is decoded at a part of its size.

    Raises:
        BadFile: missing, broken, of another shape than `size`, or in a mode without a sure way to RGB: partly
            transparent, CMYK, LAB, 32-bit, or 16-bit with nothing above a quarter of white, which is how cameras of
            10 to 14 bits are stored unscaled.
    """
    if not path.is_file():  # nor a pipe, which would be waited for
        raise BadFile(path)
    try:
        with Image.open(path, formats=_FORMATS) as image:
            if not _same_shape(image.size, size):
                found, needed = ("×".join(map(str, sides)) for sides in (image.size, size))
                raise BadFile(path, f"is {found} pixels, the tables say {needed}")
            if draft is not None:
                image.draft("RGB", draft)
            return to_rgb(image)
    except BadFile:
        raise
    except _NotRgb as error:
        raise BadFile(path, f"has {error}") from None
    except Exception as error:  # Pillow's decoders raise whatever they meet
        raise BadFile(path, f"is no whole picture: {str(error).partition(chr(10))[0]}") from error


class _NotRgb(ValueError):
    """The mode or the values of an image have no sure meaning in RGB."""


def to_rgb(image: Image.Image) -> Image.Image:
    """An image of any mode in RGB; ValueError where that has no sure meaning, see `read_picture`."""
    deep = image.mode.startswith("I;16") or any(";16" in str(tile) for tile in getattr(image, "tile", ()))
    if image.mode.startswith("I;16") and not image.has_transparency_data:
        grey = (np.array(image).astype(np.uint32) + 128) // 257  # 65535 is white
        rgb = Image.fromarray(grey.astype(np.uint8)).convert("RGB")
    elif image.mode in _WITH_ALPHA or (image.mode in _PLAIN and image.has_transparency_data):
        rgba = image.convert("RGBA")
        if rgba.getchannel("A").getextrema()[0] < 255:
            raise _NotRgb("transparent pixels")
        rgb = rgba.convert("RGB")
    elif image.mode in _PLAIN:
        rgb = image.convert("RGB")
    else:
        raise _NotRgb(f"colours of mode {image.mode}, which has no sure way to RGB; save it as 8-bit RGB")
    if deep and max(high for _, high in rgb.getextrema()) < 64:
        raise _NotRgb("16-bit values with nothing above a quarter of white; scale them to the full range")
    return rgb


def _same_shape(size, expected) -> bool:
    """Whether two (width, height) are in proportion, to a pixel of the first and to 2 %."""
    (width, height), (full_width, full_height) = size, expected
    off = abs(height * full_width - width * full_height)
    return off <= min(max(full_width, full_height), 0.02 * width * full_height)


def read_scan(path: Path) -> tuple[np.ndarray, int]:
    """The points of a LiDAR's file, and how many others it has that are not finite.

    Returns:
        (P, 5) float32: x, y, z in the LiDAR frame (metres), intensity (0 … 255), ring; and the number.

    Raises:
        BadFile: missing or empty, no whole number of points, no finite one, or values that no LiDAR gives: farther than
            1000 m, an intensity outside 0 … 255 (as those of a file with other columns).
    """
    if not path.is_file():
        raise BadFile(path)
    try:
        length = path.stat().st_size
        if not length or length % _ROW or length > _MOST_POINTS * _ROW:
            need = f"a multiple of {_ROW}, of at most {_MOST_POINTS} points"
            raise BadFile(path, f"has {length} bytes; a scan needs {need}")
        rows = np.frombuffer(path.read_bytes(), "<f4").reshape(-1, 5)
    except (OSError, ValueError) as error:
        raise BadFile(path, f"cannot be read: {error}") from error
    whole = np.isfinite(rows).all(axis=1)
    points = rows[whole]
    if not len(points):
        raise BadFile(path, "has no finite point")
    farthest, low, high = np.abs(points[:, :3]).max(), points[:, 3].min(), points[:, 3].max()
    if farthest > _FARTHEST:
        raise BadFile(path, f"has a coordinate of {farthest:.4g} m; needs at most {_FARTHEST:.0f}")
    if low < 0 or high > _BRIGHTEST:
        found = f"{low if low < 0 else high:.4g}"
        raise BadFile(path, f"has an intensity of {found}; needs 0 to {_BRIGHTEST:.0f} in the fourth of five columns")
    return points, len(rows) - len(points)
