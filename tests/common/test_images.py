import base64
import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageOps

from imgen_common.errors import UserError
from imgen_common.images import content_hash, data_uri, decode, enlarge, from_pil, grid, to_pil, to_rgb, to_uint8


def noise_image(width: int = 16, height: int = 12, mode: str = "RGB") -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def encoded(image: Image.Image, form: str) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form)
    return buffer.getvalue()


def test_to_uint8_rounds_clamps_and_moves_channels_last() -> None:
    images = torch.tensor([-1.0, 0.4999 / 255, 0.5001 / 255, 1.0, 2.0, torch.nan]).view(1, 1, 1, 6).expand(2, 3, 1, 6)
    pixels = to_uint8(images)
    assert pixels.shape == (2, 1, 6, 3)
    assert pixels.dtype == np.uint8
    assert pixels[0, 0, :, 0].tolist() == [0, 0, 1, 255, 255, 0]


@given(st.integers(0, 255))
def test_every_byte_survives_the_way_through_a_tensor(byte: int) -> None:
    assert to_uint8(torch.full((1, 3, 1, 1), byte / 255))[0, 0, 0].tolist() == [byte] * 3


def test_to_uint8_takes_bfloat16_with_gradient() -> None:
    assert to_uint8(torch.ones(1, 3, 2, 2, dtype=torch.bfloat16, requires_grad=True)).min() == 255


@pytest.mark.parametrize("shape", [(3, 4, 4), (1, 4, 4, 4), (1, 4, 4, 3)])
def test_to_uint8_refuses_other_shapes(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="b, 3, h, w"):
        to_uint8(torch.zeros(shape))


@given(st.integers(1, 7), st.integers(1, 4), st.integers(1, 3), st.integers(0, 3))
def test_grid_puts_every_image_in_its_place(count: int, columns: int, scale: int, gap: int) -> None:
    images = torch.rand(count, 3, 4, 5)
    sheet = np.asarray(grid(images, columns, scale, gap))
    wide = min(columns, count)
    rows = -(-count // columns)
    assert sheet.shape == (rows * (4 * scale + gap) - gap, wide * (5 * scale + gap) - gap, 3)
    for index, pixels in enumerate(to_uint8(images)):
        top, left = (index // columns) * (4 * scale + gap), (index % columns) * (5 * scale + gap)
        assert np.array_equal(sheet[top : top + 4 * scale : scale, left : left + 5 * scale : scale], pixels)


def test_grid_takes_images_of_several_sizes() -> None:
    assert grid([noise_image(4, 4), noise_image(8, 6)], columns=2, gap=1).size == (17, 6)


def test_grid_refuses_nothing() -> None:
    with pytest.raises(ValueError, match="0 images"):
        grid([], columns=2)


def test_enlarge_repeats_pixels() -> None:
    small = noise_image(3, 2)
    large = np.asarray(enlarge(small, 4))
    assert np.array_equal(large, np.asarray(small).repeat(4, 0).repeat(4, 1))
    with pytest.raises(ValueError, match="factor"):
        enlarge(small, 0)


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP"])
def test_decode_reads_the_allowed_formats(form: str, tmp_path: Path) -> None:
    data = encoded(noise_image(), form)
    (tmp_path / "a").write_bytes(data)
    assert decode(data).size == (16, 12)
    assert decode(data).mode == "RGB"
    assert content_hash(decode(tmp_path / "a")) == content_hash(decode(data))


@pytest.mark.parametrize("form", ["GIF", "BMP", "TIFF", "PPM", "ICO"])
def test_decode_refuses_other_formats(form: str) -> None:
    with pytest.raises(UserError, match="PNG, JPEG, WEBP"):
        decode(encoded(noise_image(), form))


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP"])
@given(data=st.data())
def test_decode_never_makes_up_pixels_of_a_cut_file(form: str, data: st.DataObject) -> None:
    whole = encoded(noise_image(), form)
    cut = whole[: data.draw(st.integers(0, len(whole) - 1))]
    try:
        image = decode(cut)
    except UserError:
        return
    assert content_hash(image) == content_hash(decode(whole))


@given(
    st.binary(max_size=200),
    st.sampled_from([b"", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0", b"RIFF\x10\0\0\0WEBPVP8 "]),
)
def test_decode_of_noise_is_a_user_error(noise: bytes, start: bytes) -> None:
    with pytest.raises(UserError):
        decode(start + noise)


def png_of(depth: int, color: int, pixels: bytes, palette: bytes = b"") -> bytes:
    """A PNG of 20x30 pixels."""
    head = struct.pack(">IIBBBBB", 20, 30, depth, color, 0, 0, 0)
    colors = [(b"PLTE", palette)] if palette else []
    return png_file((b"IHDR", head), *colors, (b"IDAT", zlib.compress(pixels)), (b"IEND", b""))


@pytest.mark.parametrize(
    ("depth", "color", "row"), [(8, 2, 61), (1, 0, 4), (4, 3, 11), (16, 6, 161), (8, 4, 41)], ids=str
)
def test_decode_makes_up_no_rows_that_a_png_lacks(depth: int, color: int, row: int) -> None:
    palette = bytes(48) if color == 3 else b""
    assert decode(png_of(depth, color, bytes(30 * row), palette)).size == (20, 30)
    for num_bytes in (0, row, 30 * row - 1):
        with pytest.raises(UserError, match=rf"cut short \({num_bytes} of {30 * row} bytes of pixels\); save or"):
            decode(png_of(depth, color, bytes(num_bytes), palette))


@pytest.mark.parametrize("depth", [1, 8])
def test_decode_makes_up_no_palette(depth: int) -> None:
    with pytest.raises(UserError, match="a palette that it lacks; save it again"):
        decode(png_of(depth, 3, bytes(700)))


def test_decode_bounds_bytes_before_reading_all(tmp_path: Path) -> None:
    with (tmp_path / "big").open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(UserError, match="1000 bytes"):
        decode(tmp_path / "big", max_bytes=1000)
    with pytest.raises(UserError, match="10 bytes"):
        decode(encoded(noise_image(), "PNG"), max_bytes=10)


def test_decode_bounds_pixels_before_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    bomb = encoded(Image.new("L", (4000, 4000)), "PNG")
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    with pytest.raises(UserError, match="4000x4000 is more than the allowed 1000000 pixels"):
        decode(bomb, max_pixels=10**6)


def png(*chunks: tuple[bytes, bytes], width: int = 8, height: int = 8) -> bytes:
    """A black image with more chunks before its pixels."""
    rows = zlib.compress(bytes((width + 1) * height))
    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return png_file((b"IHDR", head), *chunks, (b"IDAT", rows), (b"IEND", b""))


def png_file(*parts: tuple[bytes, bytes]) -> bytes:
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in parts
    )


def jpeg_of_scans(num_scans: int, progressive: bool = True, fill: bytes = b"") -> bytes:
    """A JPEG whose last scan stands there many times, with fill bytes before each."""
    buffer = io.BytesIO()
    noise_image(64, 64).save(buffer, "JPEG", progressive=progressive)
    whole = buffer.getvalue()
    last = whole.rfind(b"\xff\xda")
    return whole[:last] + (fill + whole[last:-2]) * num_scans + b"\xff\xd9"


@pytest.mark.parametrize("progressive", [True, False])
@pytest.mark.parametrize("fill", [b"", b"\xff\xff", b"\xff\xe1\0\2", b"\xff\x01", b"\0\0"])
def test_decode_counts_the_scans_of_a_jpeg_before_it_decodes(
    progressive: bool, fill: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    if progressive:
        assert decode(jpeg_of_scans(5, progressive, fill), max_pixels=64 * 64).size == (64, 64)
    monkeypatch.setattr(Image, "open", lambda *_, **__: pytest.fail("given to the decoder"))
    with pytest.raises(UserError, match="scans of 4096 pixels, at most 32 are allowed"):
        decode(jpeg_of_scans(300, progressive, fill), max_pixels=64 * 64)


@pytest.mark.parametrize(
    "data",
    [
        png(*[(b"tEXt", b"")] * 70_000),
        png(*[(b"fdAT", b"")] * 70_000),
        png(*[(b"IDAT", b"")] * 70_000),
        b"\xff\xd8" + b"\xff\xe1\0\2" * 70_000,
        b"\xff\xd8" + b"\xff\xd8" * 70_000,
    ],
    ids=["text chunks", "frames", "data chunks", "segments", "starts"],
)
def test_decode_counts_the_parts_of_a_file_before_it_decodes(data: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "open", lambda *_, **__: pytest.fail("given to the decoder"))
    with pytest.raises(UserError, match="more than the allowed 65536"):
        decode(data)


def test_decode_reads_no_metadata_but_the_orientation(monkeypatch: pytest.MonkeyPatch) -> None:
    entries = [struct.pack("<HHII", tag, 7, 10**9, 8) for tag in range(300, 5000)]
    turned = struct.pack("<HHIHH", 0x0112, 3, 1, 6, 0)
    bomb = b"II*\0" + struct.pack("<IH", 8, len(entries) + 1) + b"".join(entries) + turned + bytes(4)
    chunks = (b"eXIf", bomb), (b"zTXt", b"a\0\0" + zlib.compress(bytes(10**7))), (b"iCCP", b"no profile")
    assert decode(png(*chunks, width=9, height=5)).size == (5, 9)
    segment = b"\xff\xe1" + struct.pack(">H", len(bomb) + 8) + b"Exif\0\0" + bomb
    photograph = encoded(noise_image(), "JPEG")
    assert decode(photograph[:2] + segment + photograph[2:]).size == (12, 16)


def test_decode_takes_the_scans_that_encoders_write() -> None:
    buffer = io.BytesIO()
    Image.new("CMYK", (64, 64)).save(buffer, "JPEG", progressive=True)
    assert decode(buffer.getvalue(), max_pixels=64 * 64).size == (64, 64)
    with pytest.raises(UserError, match="64x64 is more than the allowed 100 pixels"):
        decode(buffer.getvalue(), max_pixels=100)


def test_decode_bounds_the_sides() -> None:
    with pytest.raises(UserError, match="1x70000; a side may have 65535 pixels"):
        decode(png(width=1, height=70_000))


def test_decode_refuses_what_pillow_calls_a_bomb(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50)
    with pytest.raises(UserError, match="pixels"):
        decode(encoded(noise_image(), "PNG"), max_pixels=50)


def test_decode_shows_transparency_on_white() -> None:
    assert decode(encoded(Image.new("RGBA", (2, 2), (255, 0, 0, 0)), "PNG")).getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize(
    ("value", "byte"), [(0, 0), (128, 0), (129, 1), (255, 1), (30000, 117), (65407, 255), (65535, 255)]
)
def test_16_bit_gray_keeps_its_shades(value: int, byte: int) -> None:
    gray = Image.fromarray(np.full((2, 3), value, np.uint16))
    assert decode(encoded(gray, "PNG")).getpixel((0, 0)) == (byte,) * 3
    for mode in ("I;16", "I;16B"):
        assert to_rgb(gray.convert("I").convert(mode)).getpixel((0, 0)) == (byte,) * 3


def test_16_bit_gray_with_a_transparent_shade_is_on_white() -> None:
    gray = Image.fromarray(np.array([[0, 30000, 65535]], np.uint16))
    buffer = io.BytesIO()
    gray.save(buffer, "PNG", transparency=30000)
    assert np.asarray(decode(buffer.getvalue()))[0, :, 0].tolist() == [0, 255, 255]


@pytest.mark.parametrize(
    ("depth", "color", "row", "transparent", "shown"),
    [
        (2, 0, b"\x1b", b"\0\1", [0, 255, 170, 255]),
        (2, 0, b"\x1b", b"\0\0", [255, 85, 170, 255]),
        (4, 0, b"\x07\xf0", b"\0\7", [0, 255, 255, 0]),
        (1, 0, b"\x50", b"\0\0", [255] * 4),
        (16, 2, b"\1\x80\2\x80\3\x80" + bytes(18), b"\1\x80\2\x80\3\x80", [255, 0, 0, 0]),
    ],
)
def test_a_transparent_shade_of_other_depths_is_on_white(
    depth: int, color: int, row: bytes, transparent: bytes, shown: list[int]
) -> None:
    parts = {b"IHDR": struct.pack(">IIBBBBB", 4, 1, depth, color, 0, 0, 0), b"tRNS": transparent}
    parts |= {b"IDAT": zlib.compress(b"\0" + row), b"IEND": b""}
    png = b"\x89PNG\r\n\x1a\n"
    for kind, content in parts.items():
        png += struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
    assert np.asarray(decode(png))[0, :, 0].tolist() == shown


@pytest.mark.parametrize(
    ("values", "dtype", "bytes_"),
    [
        ([0, 100, 255], np.int32, [0, 100, 255]),
        ([-5, 30000, 65535], np.int32, [0, 117, 255]),
        ([0, 70000, 256], np.int32, [0, 255, 1]),
        ([0.0, 0.5, 1.0], np.float32, [0, 128, 255]),
        ([np.nan, -1.0, np.inf], np.float32, [0, 0, 255]),
        ([0.0, 100.4, 300.0], np.float32, [0, 100, 255]),
    ],
)
def test_gray_without_a_range_of_its_own(values: list[float], dtype: type, bytes_: list[int]) -> None:
    assert np.asarray(to_rgb(Image.fromarray(np.array([values], dtype))))[0, :, 1].tolist() == bytes_


@pytest.mark.parametrize(
    ("mode", "color", "rgb"),
    [
        ("1", 1, (255, 255, 255)),
        ("L", 90, (90, 90, 90)),
        ("LA", (90, 0), (255, 255, 255)),
        ("La", (0, 0), (255, 255, 255)),
        ("RGBA", (0, 0, 0, 51), (204, 204, 204)),
        ("RGBa", (0, 0, 0, 51), (204, 204, 204)),
        ("PA", (0, 0), (255, 255, 255)),
        ("CMYK", (0, 255, 255, 0), (255, 0, 0)),
        ("YCbCr", (255, 128, 128), (255, 255, 255)),
        ("HSV", (0, 255, 255), (255, 0, 0)),
    ],
)
def test_every_mode_becomes_rgb(mode: str, color: float | tuple[int, ...], rgb: tuple[int, ...]) -> None:
    assert to_rgb(Image.new(mode, (2, 2), color)).getpixel((1, 1)) == rgb


def test_a_transparent_color_of_a_palette_is_on_white() -> None:
    palette = Image.new("P", (2, 1))
    palette.putpalette([255, 0, 0, 0, 0, 255])
    palette.putpixel((1, 0), 1)
    buffer = io.BytesIO()
    palette.save(buffer, "PNG", transparency=1)
    shown = decode(buffer.getvalue())
    assert [shown.getpixel((x, 0)) for x in (0, 1)] == [(255, 0, 0), (255, 255, 255)]
    assert torch.equal(from_pil([Image.open(buffer)])[0, :, 0, 1], torch.ones(3))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "RGB", "L"])
def test_transparency_can_be_dropped(mode: str) -> None:
    """As `convert("RGB")` of Pillow's own reader: the color below shows, whatever covers it."""
    image = Image.new("RGBA", (2, 1), (200, 100, 50, 0)).convert("RGB" if mode == "P" else mode).convert(mode)
    hidden = image.convert("RGB").getpixel((0, 0))
    transparent = {"P": image.getpixel((0, 0)), "RGB": (200, 100, 50), "L": image.getpixel((0, 0))}.get(mode)
    buffer = io.BytesIO()
    image.save(buffer, "PNG", **({} if transparent is None else {"transparency": transparent}))
    assert decode(buffer.getvalue()).getpixel((0, 0)) == (255, 255, 255)
    assert decode(buffer.getvalue(), drop_alpha=True).getpixel((0, 0)) == hidden != (255, 255, 255)


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("orientation", range(10))
def test_decode_turns_photographs_upright(form: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    buffer = io.BytesIO()
    noise_image(16, 12).save(buffer, form, exif=exif)
    upright = ImageOps.exif_transpose(Image.open(buffer)).convert("RGB")
    assert content_hash(decode(buffer.getvalue())) == content_hash(upright)


def test_decode_names_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="No such file"):
        decode(tmp_path / "none.png")
    with pytest.raises(UserError, match="cannot be read"):
        decode(tmp_path / "no\0name.png")


def test_content_hash_sees_mode_size_and_pixels_only() -> None:
    image = noise_image()
    again = Image.open(io.BytesIO(encoded(image, "PNG")))
    assert content_hash(image) == content_hash(again)
    black = [Image.new("RGB", (2, 6)), Image.new("RGB", (6, 2)), Image.new("L", (6, 6)), image]
    assert len({content_hash(each) for each in black}) == 4
    red, blue = Image.new("P", (2, 2)), Image.new("P", (2, 2))
    red.putpalette([255, 0, 0])
    blue.putpalette([0, 0, 255])
    assert content_hash(red) != content_hash(blue)


def test_data_uri_holds_the_image() -> None:
    head, _, body = data_uri(noise_image()).partition(",")
    assert head == "data:image/png;base64"
    assert content_hash(decode(base64.b64decode(body))) == content_hash(noise_image())


def test_to_pil_gives_a_image_each() -> None:
    assert [image.size for image in to_pil(torch.zeros(2, 3, 4, 5))] == [(5, 4)] * 2


@pytest.mark.parametrize(("kind", "kept"), [("WEBP", 14), ("WEBP", 20), ("PNG", 10), ("JPEG", 3)])
def test_an_image_that_is_cut_in_its_header_is_damaged_not_of_another_format(kind: str, kept: int) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(buffer, kind)
    with pytest.raises(UserError, match="damaged or cut short"):
        decode(buffer.getvalue()[:kept])


def test_a_pointer_of_git_lfs_is_named() -> None:
    with pytest.raises(UserError, match=r"is a pointer of Git LFS; run `git lfs pull` there"):
        decode(b"version https://git-lfs.github.com/spec/v1\noid sha256:4d\nsize 9\n")


@pytest.mark.parametrize("data", [b"GIF89a", b"RIFF....WAVE", b"\x89PN", b"BM"])
def test_other_files_are_of_another_format(data: bytes) -> None:
    with pytest.raises(UserError, match="not an image of an allowed format"):
        decode(data)
