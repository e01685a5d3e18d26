"""Decode every image faithfully, or refuse it with a reason."""

import io
import struct
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from hftl.data.images import ImageDecodeError, decode_image, hash_pixels, is_too_small
from hftl.data.tables import has_mostly_images, read_image_files, read_imagefolder
from hftl.errors import DataError

MOST = 1_000_000


def saved(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def scene(mode: str = "RGB") -> Image.Image:
    """Return a smooth picture, 60 wide and 40 high, with four different corners."""
    rows, columns = np.mgrid[0:40, 0:60]
    colours = np.stack([columns * 4, rows * 6, 255 - columns * 2 - rows * 3], axis=-1)
    return Image.fromarray(colours.astype(np.uint8)).convert(mode)


def read(value: Any, folder: Path | None = None) -> np.ndarray:
    image = decode_image(value, folder, MOST)
    assert image.mode == "RGB"
    return np.asarray(image).astype(int)


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(width: int, height: int, bits: int, colour: int, rows: bytes, *more: bytes) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    body = chunk(b"IHDR", header) + b"".join(more) + chunk(b"IDAT", zlib.compress(rows))
    return b"\x89PNG\r\n\x1a\n" + body + chunk(b"IEND", b"")


def giant(side: int = 12990) -> bytes:
    """Return a few bytes whose header claims 168 million pixels."""
    return png(side, side, 8, 2, b"")


def gif_beyond_its_screen(width: int, height: int) -> bytes:
    """Return a GIF of a 1 x 1 screen whose only frame is larger."""
    screen = b"GIF89a" + struct.pack("<HHBBB", 1, 1, 0x80, 0, 0) + b"\0\0\0\xff\xff\xff"
    return screen + b"," + struct.pack("<HHHHB", 0, 0, width, height, 0) + b"\x02\x02D\x01\0;"


@pytest.mark.parametrize(
    ("value", "why"),
    [
        (b"", "0 bytes"),
        (b"colour,label\nred,1\n", "not an image"),
        (b"BM is how this text begins", "header is damaged"),
        (saved(scene())[:20], "header is damaged"),
        (saved(scene())[:-40], "truncated"),
        (saved(scene(), "JPEG")[:-200], "truncated"),
        (saved(scene("P"), "GIF")[:-60], "truncated"),
        (saved(scene(), "WEBP")[:-60], "damaged or truncated"),
        (saved(scene(), "TIFF")[:-60], "damaged or truncated"),
        (saved(Image.new("LAB", (3, 3)), "TIFF"), "mode LAB"),
        (saved(Image.new("I", (3, 3), 7), "TIFF"), "mode I "),
        (saved(Image.new("F", (3, 3), 7.5), "TIFF"), "floats are not within 0 and 1"),
        (saved(Image.new("F", (3, 3), float("nan")), "TIFF"), "floats are not within"),
        (giant(), "168,740,100 pixels, more than the 1,000,000"),
        (giant(30000), "900,000,000 pixels"),
        (gif_beyond_its_screen(60000, 60000), "more than the 1,000,000"),
        ({"bytes": None, "path": None}, "no picture is given"),
        ({"bytes": b"", "path": "a.png"}, "0 bytes"),
        (None, "no picture is given"),
        ("  ", "no picture is given"),
        (3.5, "a float is no picture"),
        ("no\0name.png", "damaged|missing|cannot be opened"),
        ("missing.png", "the file is missing"),
        (".", "not a file"),
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_unreadable_image_is_refused_with_its_reason(value: Any, why: str, tmp_path: Path) -> None:
    with pytest.raises(ImageDecodeError, match=why):
        decode_image(value, tmp_path, MOST)


def test_the_reason_does_not_repeat_the_name_of_the_file(tmp_path: Path) -> None:
    for name, body in [("zzz1.png", b""), ("zzz2.png", b"text"), ("zzz3.png", giant())]:
        (tmp_path / name).write_bytes(body)
        with pytest.raises(ImageDecodeError) as refusal:
            decode_image(name, tmp_path, MOST)
        assert "zzz" not in str(refusal.value)


def test_giants_are_refused_by_the_header_in_every_thread_without_a_warning() -> None:
    def refused(_: int) -> str:
        with pytest.raises(ImageDecodeError) as refusal:
            decode_image(giant(), None, MOST)
        return str(refusal.value)

    with warnings.catch_warnings(record=True) as leaked:
        warnings.simplefilter("always")
        with ThreadPoolExecutor(4) as pool:
            reasons = set(pool.map(refused, range(40)))
    assert not leaked
    assert reasons == {"168,740,100 pixels, more than the 1,000,000 of data.max_pixels"}
    assert len(giant()) < 100


def test_limit_above_that_of_pillow_holds() -> None:
    with pytest.raises(ImageDecodeError, match="truncated"):
        decode_image(giant(), None, 200_000_000)


@pytest.mark.parametrize("pixels", [2399, 2400])
def test_the_limit_itself_is_allowed(pixels: int) -> None:
    if pixels < 2400:
        with pytest.raises(ImageDecodeError, match="2,400 pixels, more than the 2,399"):
            decode_image(saved(scene()), None, pixels)
    else:
        assert decode_image(saved(scene()), None, pixels).size == (60, 40)


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "PPM"])
def test_lossless_formats_give_the_very_pixels(kind: str) -> None:
    assert (read(saved(scene(), kind)) == np.asarray(scene())).all()


@pytest.mark.parametrize(("kind", "mode"), [("JPEG", "RGB"), ("WEBP", "RGB"), ("JPEG", "CMYK")])
def test_lossy_formats_give_nearly_the_pixels(kind: str, mode: str) -> None:
    pixels = read(saved(scene(mode), kind, quality=95))
    assert np.abs(pixels - np.asarray(scene())).mean() < 4


def test_content_and_not_the_suffix_says_the_format(tmp_path: Path) -> None:
    (tmp_path / "photo.png").write_bytes(saved(scene(), "JPEG"))
    (tmp_path / "nothing").write_bytes(saved(scene()))
    assert (read("photo.png", tmp_path) == read(saved(scene(), "JPEG"))).all()
    assert (read("nothing", tmp_path) == np.asarray(scene())).all()


def test_a_cell_of_any_kind_gives_the_same_picture(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(saved(scene()))
    relative = Path("a.png")
    cells = [
        "a.png", relative, str(tmp_path / "a.png"), tmp_path / "a.png", saved(scene()), scene(),
        {"bytes": saved(scene()), "path": "elsewhere.png"}, {"bytes": None, "path": "a.png"},
    ]  # fmt: skip
    for cell in cells:
        assert (read(cell, tmp_path) == np.asarray(scene())).all()


def test_a_picture_held_in_memory_is_left_as_it_was() -> None:
    image = Image.open(io.BytesIO(saved(scene(), "JPEG", exif=turned(6))))
    read(image)
    assert image.getexif()[274] == 6


def turned(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[274] = orientation
    return exif


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF"])
def test_pictures_are_turned_upright(kind: str, orientation: int) -> None:
    # How EXIF says to undo each orientation, as numpy would: rows and columns, then mirrored.
    undo = {
        1: lambda a: a, 2: lambda a: a[:, ::-1], 3: lambda a: a[::-1, ::-1], 4: lambda a: a[::-1],
        5: lambda a: a.swapaxes(0, 1), 6: lambda a: np.rot90(a, -1),
        7: lambda a: a[::-1, ::-1].swapaxes(0, 1), 8: lambda a: np.rot90(a),
    }  # fmt: skip
    plain = read(saved(scene(), kind))
    pixels = read(saved(scene(), kind, exif=turned(orientation)))
    assert (pixels == undo[orientation](plain)).all()


def test_transparency_shows_white_in_every_mode() -> None:
    clear = np.zeros((4, 4, 4), dtype=np.uint8)
    clear[:, :2] = (200, 100, 0, 255)
    half = clear.copy()
    half[:, :2, 3] = 128
    rgba = Image.fromarray(clear)
    assert (read(saved(rgba)) == np.where(clear[..., 3:] > 0, clear[..., :3], 255)).all()
    expected = 255 + (np.array([200, 100, 0]) - 255) * 128 / 255
    assert np.abs(read(saved(Image.fromarray(half)))[0, 0] - expected).max() <= 1
    grey = saved(rgba.convert("LA"))
    assert (read(grey)[0, 3] == 255).all() and (read(grey)[0, 0] == read(grey)[0, 0, 0]).all()
    palette = Image.new("P", (2, 1))
    palette.putpalette([200, 100, 0, 10, 20, 30])
    palette.putdata([0, 1])
    for transparency in (1, b"\xff\x00"):
        pixels = read(saved(palette, transparency=transparency))
        assert pixels.tolist() == [[[200, 100, 0], [255, 255, 255]]]
    assert read(saved(palette, "GIF", transparency=1))[0, 1].tolist() == [255, 255, 255]
    with_alpha = palette.convert("PA")
    with_alpha.putalpha(Image.fromarray(np.array([[255, 0]], dtype=np.uint8)))
    assert read(with_alpha).tolist() == [[[200, 100, 0], [255, 255, 255]]]


@pytest.mark.parametrize(
    ("bits", "colour", "row", "key", "expected"),
    [
        (1, 0, b"\x40", (0,), [[255] * 3, [255] * 3]),
        (2, 0, b"\x60", (1,), [[255] * 3, [170] * 3]),
        (4, 0, b"\x3c", (3,), [[255] * 3, [204] * 3]),
        (8, 0, b"\x03\x0c", (3,), [[255] * 3, [12] * 3]),
        (16, 0, b"\x03\x00\x0c\x00", (0x300,), [[255] * 3, [12] * 3]),
        (8, 2, b"\x01\x02\x03\x04\x05\x06", (1, 2, 3), [[255] * 3, [4, 5, 6]]),
        (16, 2, b"\x40\xff\x50\x00\x60\x00\x04\x00\x05\x00\x06\x00", (0x40FF, 0x5000, 0x6000),
         [[255] * 3, [4, 5, 6]]),
    ],
)  # fmt: skip
def test_transparent_colour_of_a_png_is_read_at_every_depth(
    bits: int, colour: int, row: bytes, key: tuple[int, ...], expected: list[list[int]]
) -> None:
    named = chunk(b"tRNS", b"".join(struct.pack(">H", part) for part in key))
    assert read(png(2, 1, bits, colour, b"\0" + row, named)).tolist() == [expected]


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_sixteen_bits_of_grey_are_scaled_and_not_clipped(kind: str) -> None:
    deep = np.linspace(0, 65535, 600).astype(np.uint16).reshape(20, 30)
    pixels = read(saved(Image.fromarray(deep), kind))
    assert (pixels[..., 0] == np.rint(deep / 257)).all()
    assert (pixels[..., 0] == pixels[..., 1]).all() and pixels.max() == 255


def test_a_tiff_that_pillow_would_misread_is_refused() -> None:
    white_is_zero = saved(Image.fromarray(np.zeros((4, 4), np.uint16)), "TIFF", tiffinfo={262: 0})
    with pytest.raises(ImageDecodeError, match="white as zero"):
        read(white_is_zero)


def test_one_bit_and_floats_span_black_to_white() -> None:
    bits = Image.fromarray(np.array([[0, 255], [255, 0]], dtype=np.uint8)).convert("1")
    assert read(saved(bits))[..., 0].tolist() == [[0, 255], [255, 0]]
    floats = Image.fromarray(np.array([[0.0, 0.5, 1.0]], dtype=np.float32))
    assert read(saved(floats, "TIFF"))[..., 2].tolist() == [[0, 128, 255]]


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP"])
def test_the_first_frame_of_an_animation_is_read(kind: str) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime", "blue")]
    options = {"lossless": True} if kind == "WEBP" else {}
    moving = saved(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert (read(moving) == [255, 0, 0]).all()


def test_the_same_picture_has_the_same_content_in_every_lossless_file() -> None:
    picture = decode_image(saved(scene()), None, MOST)
    assert hash_pixels(picture) == hash_pixels(decode_image(saved(scene(), "BMP"), None, MOST))
    assert hash_pixels(picture) == hash_pixels(
        decode_image(saved(scene(), exif=turned(1)), None, MOST)
    )
    assert hash_pixels(picture) != hash_pixels(picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT))
    one, other = Image.new("RGB", (6, 4), "red"), Image.new("RGB", (4, 6), "red")
    assert hash_pixels(one) != hash_pixels(other)


def test_only_a_picture_below_a_patch_on_both_sides_is_too_small() -> None:
    sizes = {(13, 13): True, (14, 3): False, (3, 14): False, (14, 14): False}
    assert {size: is_too_small(Image.new("RGB", size), 14) for size in sizes} == sizes


def test_random_damage_is_read_or_refused() -> None:
    draw = np.random.default_rng(0)
    counts = {"read": 0, "refused": 0}
    with warnings.catch_warnings():
        # Pillow tells of damaged EXIF, which is no damage to the picture.
        warnings.simplefilter("ignore", UserWarning)
        for kind in ("JPEG", "PNG", "GIF", "BMP", "WEBP", "PPM"):
            whole = saved(scene("P" if kind == "GIF" else "RGB"), kind)
            for _ in range(60):
                hurt = bytearray(whole)
                for place in draw.integers(0, min(len(hurt), 400), 4):
                    hurt[place] = draw.integers(256)
                try:
                    read(bytes(hurt))
                    counts["read"] += 1
                except ImageDecodeError:
                    counts["refused"] += 1
    assert min(counts.values()) > 30


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Write two classes, a file that is no image, hidden files, and a link that leads nowhere."""
    root = tmp_path / "pictures"
    for name in ("cat/b.png", "cat/deep/a.png", "dog/c.jpg"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(saved(scene(), "JPEG" if name.endswith("jpg") else "PNG"))
    (root / "dog" / "notes.png").write_text("not an image")
    (root / "dog" / ".hidden.png").write_bytes(b"")
    (root / "cat" / ".thumbnails").mkdir()
    (root / "cat" / ".thumbnails" / "b.png").write_bytes(b"")
    (root / ".git").mkdir()
    (root / "dog" / "lost.png").symlink_to(tmp_path / "gone.png")
    return root


NAMES = ["cat/b.png", "cat/deep/a.png", "dog/c.jpg", "dog/lost.png", "dog/notes.png"]


def test_an_imagefolder_gives_a_row_a_file_labelled_by_its_folder(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    rows = list(read_imagefolder(Path("pictures")))
    assert [row.where for row in rows] == NAMES
    assert [row.index for row in rows] == list(range(5))
    assert [row.values["label"] for row in rows] == ["cat", "cat", "dog", "dog", "dog"]
    assert [row.values["image"] for row in rows] == [pictures / name for name in NAMES]
    reasons = []
    for row in rows:
        try:
            decode_image(row.values["image"], None, MOST)
        except ImageDecodeError as error:
            reasons.append((row.where, str(error)))
    assert reasons == [
        ("dog/lost.png", "the file is missing"),
        ("dog/notes.png", "not an image, or of a format that is not read"),
    ]


def test_pictures_to_predict_are_named_by_their_place_in_the_folder(pictures: Path) -> None:
    rows = list(read_image_files(pictures))
    assert [row.values for row in rows] == [{"image": name} for name in NAMES]
    assert decode_image(rows[0].values["image"], pictures, MOST).size == (60, 40)
    assert [row.where for row in rows] == NAMES


def test_a_folder_without_folders_is_no_imagefolder(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(saved(scene()))
    (tmp_path / ".cache").mkdir()
    with pytest.raises(DataError, match="has no folders, one a class"):
        list(read_imagefolder(tmp_path))


def test_most_suffixes_decide_whether_a_folder_holds_images(pictures: Path, tmp_path: Path) -> None:
    assert has_mostly_images(pictures)
    texts = tmp_path / "texts" / "news"
    texts.mkdir(parents=True)
    assert not has_mostly_images(tmp_path / "texts")
    for name in ("a.txt", "b.txt", "c.PNG"):
        (texts / name).write_bytes(b"")
    assert not has_mostly_images(tmp_path / "texts")
