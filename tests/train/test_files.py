"""Pictures of every mode are converted right or refused; scans are plausible or refused; nothing is waited for."""

import os
import pickle

import numpy as np
import pytest
from PIL import Image

from rigfuse.train.data.files import BadFile, read_picture, read_scan, to_rgb
from support.patience import within

V, U = np.mgrid[:24, :32]
RGB = np.stack([U * 8, V * 10, 255 - U * 7], axis=-1).astype(np.uint8)
GREY = (V * 10 + U * 0).astype(np.uint8)
DEEP = (GREY.astype(np.uint16) * 257 + (U % 3)).astype(np.uint16)  # up to 59,112 of 65,535


def image(mode):
    """A picture with the colours of RGB, or the brightness of GREY."""
    colour, grey = Image.fromarray(RGB), Image.fromarray(GREY)
    if mode.startswith("I;16"):
        return Image.frombytes(mode, (32, 24), DEEP.astype(">u2" if mode == "I;16B" else "<u2").tobytes())
    if mode in ("P", "PA"):
        quantised = colour.quantize(256)
        return quantised if mode == "P" else with_alpha(quantised, "PA")
    if mode in ("1", "L", "I", "F"):
        return grey.convert(mode)
    if mode in ("LA", "La"):
        return grey.convert("LA").convert(mode)
    return with_alpha(colour, mode) if mode in ("RGBA", "RGBa") else colour.convert(mode)


def with_alpha(picture, mode, alpha=255):
    rgba = picture.convert("RGBA")
    rgba.putalpha(Image.new("L", picture.size, alpha))
    if mode == "PA":
        palette = picture.copy().convert("PA")
        palette.putalpha(Image.new("L", picture.size, alpha))
        return palette
    return rgba.convert(mode)


COLOURED = {"RGB": 0, "RGBX": 0, "RGBA": 0, "RGBa": 0, "YCbCr": 3, "HSV": 6, "P": 40, "PA": 40}
GREYS = ["L", "LA", "I;16", "I;16L", "I;16B", "I;16N"]
REFUSED = ["I", "F", "CMYK", "LAB", "La"]


@pytest.mark.parametrize("mode", COLOURED)
def test_colours_stay_what_they_are(mode):
    out = to_rgb(image(mode))
    assert out.mode == "RGB" and out.size == (32, 24)
    off = np.abs(np.array(out).astype(int) - RGB)
    assert off.max() <= COLOURED[mode]


@pytest.mark.parametrize("mode", GREYS)
def test_greys_stay_what_they_are(mode):
    out = np.array(to_rgb(image(mode)))
    np.testing.assert_array_equal(out, np.repeat(GREY[..., None], 3, axis=-1))


def test_black_and_white_stay_so():
    bits = np.array([[True, False], [False, True]])
    np.testing.assert_array_equal(np.array(to_rgb(Image.fromarray(bits)))[..., 0], bits * 255)


def test_no_mode_is_left_out():
    """What Pillow learns to open tomorrow is refused until somebody looks at it."""
    known = {"1", *COLOURED, *GREYS, *REFUSED}
    from PIL import ImageMode

    unknown = [mode for mode in getattr(ImageMode, "_MODEINFO", Image.MODES) if mode not in known]
    assert unknown == []
    for mode in REFUSED:
        picture = Image.new(mode, (32, 24), 3 if mode in ("I", "F") else None) if mode in ("LAB", "La") else image(mode)
        with pytest.raises(ValueError, match=f"mode {mode}, which has no sure way to RGB"):
            to_rgb(picture)


@pytest.mark.parametrize("alpha", [0, 128, 254])
@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "RGBa"])
def test_what_is_transparent_is_refused(mode, alpha):
    source = image("P") if mode == "PA" else Image.fromarray(GREY if mode == "LA" else RGB)
    picture = with_alpha(source, mode, alpha)
    with pytest.raises(ValueError, match="transparent pixels"):
        to_rgb(picture)


@pytest.mark.parametrize("mode", ["P", "L", "RGB", "1"])
def test_a_colour_declared_transparent_counts_where_it_is_used(mode, tmp_path):
    picture = image(mode)
    used = picture.getpixel((5, 5))
    for value, good in ((used, False), ((1, 2, 3) if mode == "RGB" else 255 if mode in "PL" else None, True)):
        if value is None:
            continue
        if mode == "P" and good:
            picture = image("L").quantize(16)  # 255 is not in its palette
            value = 15 if 15 not in np.array(picture) else 255
        picture.save(tmp_path / "a.png", transparency=value)
        if good:
            assert read_picture(tmp_path / "a.png", (32, 24)).mode == "RGB"
        else:
            with pytest.raises(BadFile, match="has transparent pixels"):
                read_picture(tmp_path / "a.png", (32, 24))


def save(path, pixels):
    """Writes what Pillow cannot: 16 bits of colour."""
    cv2 = pytest.importorskip("cv2")
    cv2.imwrite(str(path), pixels[..., ::-1] if pixels.ndim == 3 else pixels)


@pytest.mark.parametrize("suffix", ["png", "tif"])
@pytest.mark.parametrize("colours", [None, 3])
def test_sixteen_bits_of_full_range_and_less(tmp_path, suffix, colours):
    deep = DEEP if colours is None else np.stack([DEEP, DEEP // 2, DEEP // 4], axis=-1)
    expected = deep / 257 if colours else np.repeat(deep[..., None] / 257, 3, axis=-1)
    save(tmp_path / f"a.{suffix}", deep)
    found = np.array(read_picture(tmp_path / f"a.{suffix}", (32, 24)))
    assert found.dtype == np.uint8 and np.abs(found - expected).max() <= 1
    for bits in (0, 8, 10, 12, 14):
        save(tmp_path / f"b.{suffix}", deep >> (16 - bits) if bits else deep * 0)
        with pytest.raises(BadFile, match="nothing above a quarter of white; scale them"):
            read_picture(tmp_path / f"b.{suffix}", (32, 24))


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "bmp", "tif"])
def test_formats(tmp_path, suffix):
    Image.fromarray(RGB).resize((320, 240)).save(tmp_path / f"a.{suffix}", quality=98)
    found = np.array(read_picture(tmp_path / f"a.{suffix}", (320, 240))).astype(int)
    expected = np.array(Image.fromarray(RGB).resize((320, 240))).astype(int)
    assert np.abs(found - expected).mean() < 4


def test_what_starts_programs_or_is_no_picture_is_not_opened(tmp_path):
    """Pillow hands PostScript to Ghostscript, whatever the file is called."""
    ran = tmp_path / "ran"
    script = f"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 32 24\n({ran}) (w) file closefile\nshowpage\n"
    (tmp_path / "a.jpg").write_text(script)
    Image.fromarray(GREY).save(tmp_path / "b.gif")  # whole, but of no kind that cameras write
    for name in ("a.jpg", "b.gif"):
        with pytest.raises(BadFile, match="is no whole picture"):
            read_picture(tmp_path / name, (32, 24))
    assert not ran.exists()


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "bmp", "tif"])
def test_damaged_pictures_are_bad_files_or_pictures(tmp_path, suffix):
    rng, path = np.random.default_rng(0), tmp_path / f"a.{suffix}"
    Image.fromarray(RGB).save(path)
    whole = path.read_bytes()
    bad = 0
    for _ in range(150):
        damaged = bytearray(whole)
        for place in rng.integers(min(len(whole), 400), size=3):
            damaged[place] = int(rng.integers(256))
        path.write_bytes(damaged[: int(rng.integers(1, len(whole) + 1))] if rng.random() < 0.3 else damaged)
        try:
            assert read_picture(path, (32, 24)).mode == "RGB"
        except BadFile as error:
            assert "\n" not in str(error)
            bad += 1
    assert bad > 10


@pytest.mark.parametrize(
    "size, whole",
    [
        ((1600, 900), True), ((800, 450), True), ((853, 480), True), ((640, 360), True), ((2400, 1350), True),
        ((801, 450), True), ((802, 450), False), ((800, 600), False), ((900, 1600), False), ((1, 1), False),
        ((1600, 896), False), ((1600, 899), True),
    ],
)  # fmt: skip
def test_another_size_of_the_same_shape(tmp_path, size, whole):
    Image.new("RGB", size).save(tmp_path / "a.png")
    if whole:
        assert read_picture(tmp_path / "a.png", (1600, 900)).size == size
    else:
        with pytest.raises(BadFile, match=f"a.png is {size[0]}×{size[1]} pixels, the tables say 1600×900"):
            read_picture(tmp_path / "a.png", (1600, 900))


def scan(path, rows, dtype=np.float32):
    np.asarray(rows, dtype).tofile(path)
    return path


POINT = [3.0, 4.0, 0.5, 51.0, 7.0]


@pytest.mark.parametrize(
    "rows, why",
    [
        ([], "has 0 bytes"),
        ([*POINT, 1.0], "has 24 bytes"),
        ([POINT, [1001.0, 0, 0, 5, 1]], "a coordinate of 1001 m"),
        ([POINT, [0, 0, -3e38, 5, 1]], "a coordinate of 3e\\+38 m"),
        ([POINT, [0, 9, 0, 3e38, 1]], "an intensity of 3e\\+38"),
        ([POINT, [0, 9, 0, 255.5, 1]], "an intensity of 255.5"),
        ([POINT, [0, 9, 0, -0.5, 1]], "an intensity of -0.5"),
        ([[np.nan] * 5] * 3, "has no finite point"),
    ],
    ids=str,
)
def test_absurd_scans_are_bad_files(tmp_path, rows, why):
    with pytest.raises(BadFile, match=why):
        read_scan(scan(tmp_path / "a.bin", rows))


def test_points_that_are_not_finite_are_dropped_and_counted(tmp_path):
    rows = [POINT, [np.nan, 1, 1, 1, 1], POINT, [1, np.inf, 1, 1, 1], [1, 1, -np.inf, 1, 1], [1, 1, 1, np.nan, 1]]
    points, dropped = read_scan(scan(tmp_path / "a.bin", rows))
    assert points.tolist() == [POINT, POINT] and dropped == 4


def test_four_columns_are_no_five(tmp_path, ddad_root):
    """A real scan without its fifth column, its length still a multiple of 20 bytes."""
    file = next((ddad_root / "samples" / "LIDAR_TOP").iterdir())
    rows = np.fromfile(file, np.float32).reshape(-1, 5)[:, :4]
    rows = rows[: len(rows) // 5 * 5]
    with pytest.raises(BadFile, match="needs 0 to 255 in the fourth of five columns"):
        read_scan(scan(tmp_path / "a.bin", rows))
    assert read_scan(file)[1] == 0


def test_what_is_no_file_is_missing_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path, tmp_path / "nothing", tmp_path / "nothing" / "below"):
        for read in (lambda: read_picture(path, (32, 24)), lambda: read_scan(path)):
            with within(5), pytest.raises(BadFile, match="is missing"):
                read()


def test_a_scan_of_endless_size_is_not_read(tmp_path):
    with (tmp_path / "a.bin").open("wb") as file:
        file.truncate(20 * 10**11)  # takes no room
    with pytest.raises(BadFile, match="of at most 10000000 points"):
        read_scan(tmp_path / "a.bin")


def test_a_bad_file_crosses_processes_with_its_reason():
    error = pickle.loads(pickle.dumps(BadFile("a.jpg", "is upside down")))
    assert error.args == ("a.jpg",) and error.reason == "is upside down" and str(error) == "a.jpg is upside down"
