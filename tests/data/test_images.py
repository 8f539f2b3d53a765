import io

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from qwen_vl_utils.vision_process import smart_resize
from transformers.image_transforms import convert_to_rgb
from transformers.image_utils import load_image

from qwenvl_dist.data.images import decode, resize, to_rgb
from qwenvl_dist.data.sizes import ImageSizeRule, UnreadableImage

Pixels = NDArray[np.uint8]


def noise(height: int, width: int, channels: int = 3, seed: int = 0) -> Pixels:
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


def smooth(height: int, width: int) -> Pixels:
    """Soft blobs of colour, as photos have them."""
    small = Image.fromarray(noise(max(2, height // 32), max(2, width // 32)))
    return np.asarray(small.resize((width, height), Image.Resampling.BICUBIC))


def edges(height: int, width: int) -> Pixels:
    """Black or white in each channel, where a bicubic kernel overshoots."""
    return noise(height, width) // 128 * 255


def encode(pixels: Pixels, kind: str = "JPEG", mode: str | None = None, **options: object) -> bytes:
    stream = io.BytesIO()
    image = Image.fromarray(pixels)
    (image.convert(mode) if mode else image).save(stream, kind, **options)
    return stream.getvalue()


def hub_decode(data: bytes) -> Pixels:
    return convert_to_rgb(Image.open(io.BytesIO(data)), return_numpy=True)


# --- decode ---


@pytest.mark.parametrize("pixels", [smooth(123, 217), noise(97, 61)], ids=["smooth", "noise"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"progressive": True},
        {"mode": "L"},
        {"mode": "L", "progressive": True},
        {"mode": "CMYK"},  # Pillow decodes it: simplejpeg's conversion differs
        {"keep_rgb": True},  # a JPEG that stores RGB, not YCbCr
        {"subsampling": 0},
        {"subsampling": 1},
        {"subsampling": 2},
        {"quality": 100},
        {"quality": 5},
        {"kind": "PNG"},
        {"kind": "PNG", "mode": "L"},
        {"kind": "PNG", "mode": "P"},
        {"kind": "PNG", "mode": "LA"},
        {"kind": "PNG", "mode": "1"},
        {"kind": "PNG", "mode": "P", "transparency": 0},
        {"kind": "PNG", "mode": "P", "transparency": bytes(range(256))},
        {"kind": "PNG", "mode": "L", "transparency": 100},
        {"kind": "PNG", "transparency": (255, 255, 255)},
        {"kind": "GIF"},
        {"kind": "GIF", "transparency": 3},
        {"kind": "BMP"},
        {"kind": "TIFF"},
        {"kind": "TIFF", "mode": "CMYK"},
        {"kind": "TIFF", "mode": "F"},
        {"kind": "WEBP"},
    ],
    ids=str,
)
def test_decoded_pixels_are_those_of_the_hubs_path(pixels: Pixels, options: dict) -> None:
    data = encode(pixels, **options)
    decoded = decode(data)
    assert decoded.dtype == np.uint8 and decoded.shape == pixels.shape
    assert np.array_equal(decoded, hub_decode(data))


def test_transparent_parts_lie_over_white() -> None:
    pixels = noise(40, 30, channels=4)
    pixels[:10, :, 3], pixels[10:20, :, 3] = 0, 255
    decoded = decode(encode(pixels, "PNG"))
    assert (decoded[:10] == 255).all() and np.array_equal(decoded[10:20], pixels[10:20, :, :3])
    assert np.array_equal(decoded, hub_decode(encode(pixels, "PNG")))


def test_what_a_palette_or_grey_hides_lies_over_white() -> None:
    hidden = Image.new("P", (6, 4), 1)
    hidden.putpalette([200, 0, 0, 0, 0, 0])
    for image, options in (
        (hidden, {"transparency": 1}),
        (Image.new("L", (6, 4), 7), {"transparency": 7}),
        (Image.new("LA", (6, 4), (7, 0)), {}),
    ):
        data = io.BytesIO()
        image.save(data, "PNG", **options)
        assert (decode(data.getvalue()) == 255).all()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_honoured_as_transformers_does(kind: str, orientation: int) -> None:
    tags = Image.Exif()
    tags[0x112] = orientation
    data = encode(smooth(40, 90), kind, exif=tags)
    hub = np.asarray(load_image(Image.open(io.BytesIO(data))))
    assert hub.shape == ((40, 90, 3) if orientation < 5 else (90, 40, 3))
    assert np.array_equal(decode(data), hub)


def test_an_orientation_nobody_defined_changes_nothing() -> None:
    tags = Image.Exif()
    tags[0x112] = 9
    data = encode(smooth(40, 90), exif=tags)
    assert np.array_equal(decode(data), hub_decode(data))


def test_sixteen_bits_are_scaled_to_eight() -> None:
    """Pillow's own conversion makes all that is above 255 of 65535 white."""
    values = np.arange(256, dtype=np.uint16).reshape(8, 32) * 257
    data = io.BytesIO()
    Image.fromarray(values).save(data, "PNG")
    assert Image.open(data).mode == "I;16"
    assert np.array_equal(decode(data.getvalue()), np.repeat((values // 257)[:, :, None], 3, axis=2))


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_an_animation_is_its_first_frame(kind: str) -> None:
    frames = [Image.fromarray(noise(20, 30, seed=seed)) for seed in range(3)]
    data = io.BytesIO()
    frames[0].save(data, kind, save_all=True, append_images=frames[1:], lossless=True)
    assert getattr(Image.open(data), "n_frames", 1) == 3
    assert np.array_equal(decode(data.getvalue()), hub_decode(data.getvalue()))


@pytest.mark.parametrize(
    "options", [{}, {"mode": "L"}, {"kind": "PNG"}, {"kind": "PNG", "mode": "RGBA"}], ids=str
)
def test_a_picture_of_one_pixel_becomes_one_square_of_its_colour(options: dict) -> None:
    pixels = decode(encode(noise(1, 1), **options))
    assert pixels.shape == (1, 1, 3)
    rule = ImageSizeRule(None, 56 * 56, 112 * 112)
    assert rule.target(1, 1) == (56, 56) == smart_resize(1, 1, 28, 56 * 56, 112 * 112)
    made = resize(pixels, *rule.target(1, 1))
    assert (made == torch.tensor(pixels[0, 0])[:, None, None]).all()


def test_a_picture_too_narrow_for_the_hub_is_unreadable() -> None:
    pixels = decode(encode(noise(3, 1000)))
    with pytest.raises(ValueError):
        smart_resize(3, 1000, 28)
    with pytest.raises(UnreadableImage, match="1000x3 pixels: aspect ratio above 200"):
        ImageSizeRule(None, 56 * 56, 112 * 112).target(pixels.shape[1], pixels.shape[0])


def test_rgb_pictures_are_not_converted() -> None:
    image = Image.fromarray(noise(4, 4))
    assert np.array_equal(np.asarray(to_rgb(image)), np.asarray(image))


@pytest.mark.parametrize("left", [0.02, 0.3, 0.9])
@pytest.mark.parametrize(
    "options", [{}, {"progressive": True}, {"mode": "CMYK"}, {"kind": "PNG"}, {"kind": "WEBP"}], ids=str
)
def test_truncated_picture_is_unreadable(options: dict, left: float) -> None:
    data = encode(noise(64, 64), **options)
    with pytest.raises(UnreadableImage, match=r"cannot be decoded: .+"):
        decode(data[: int(len(data) * left)])


@pytest.mark.parametrize("cut", [1, 2, 3, 50])
def test_jpeg_that_lacks_its_last_bytes_is_answered_as_pillow_does(cut: int) -> None:
    data = encode(smooth(123, 217))[:-cut]
    with pytest.raises(OSError, match="truncated"):
        hub_decode(data)
    with pytest.raises(UnreadableImage, match="truncated"):
        decode(data)


@pytest.mark.parametrize(
    "data", [b"hello", b'{"messages": []}', b"\xff\xd8\xff" + b"x" * 100, b"GIF89a", b"RIFF\0\0\0\0WEBPVP8 "]
)
def test_what_is_no_picture_is_unreadable_with_a_reason_that_is_always_the_same(data: bytes) -> None:
    with pytest.raises(UnreadableImage) as caught:
        decode(data)
    assert str(caught.value) and "object at 0x" not in str(caught.value)


def test_empty_file_is_unreadable() -> None:
    with pytest.raises(UnreadableImage, match="cannot be decoded: an empty file"):
        decode(b"")


@pytest.mark.parametrize("times", [1.5, 3])
@pytest.mark.parametrize("options", [{}, {"mode": "L"}, {"mode": "CMYK"}, {"kind": "PNG"}], ids=str)
def test_decompression_bomb_is_unreadable(
    options: dict, times: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = encode(smooth(100, 100), **options)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", int(100 * 100 / times))
    with pytest.raises(UnreadableImage, match="too large"):
        decode(data)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100 * 100)
    assert decode(data).shape == (100, 100, 3)


def test_any_damage_ends_in_pixels_or_in_unreadable() -> None:
    # Warnings of Pillow about damaged metadata are of no interest here.
    random = np.random.default_rng(0)
    kinds = [
        {},
        {"progressive": True},
        {"mode": "CMYK"},
        {"kind": "PNG"},
        {"kind": "PNG", "mode": "P"},
        {"kind": "WEBP"},
    ]
    whole = [encode(smooth(40, 60), **options) for options in kinds]
    for trial in range(600):
        data = bytearray(whole[trial % len(whole)])
        reach = min(len(data), int(random.choice([40, 700, 1 << 30])))
        for _ in range(int(random.choice([1, 3, 20]))):
            data[random.integers(reach)] = random.integers(256)
        try:
            pixels = decode(bytes(data))
        except UnreadableImage:
            continue
        assert pixels.ndim == 3 and pixels.shape[2] == 3 and pixels.dtype == np.uint8


# --- resize ---

SIZES = [
    ((427, 640), (280, 280)),
    ((100, 150), (280, 280)),
    ((640, 480), (84, 308)),
    ((280, 500), (280, 280)),
    ((33, 29), (28, 28)),
    ((600, 450), (56, 56)),
    ((1, 1), (56, 56)),
    ((5, 900), (28, 1036)),
]


@pytest.mark.parametrize("make", [noise, smooth, edges])
@pytest.mark.parametrize(("before", "after"), SIZES)
def test_exact_resize_is_pillows(make, before: tuple[int, int], after: tuple[int, int]) -> None:
    pixels = make(*before)
    expected = Image.fromarray(pixels).resize(after[::-1], Image.Resampling.BICUBIC)
    resized = resize(pixels, *after)
    assert resized.dtype == torch.uint8 and resized.is_contiguous()
    assert np.array_equal(resized.permute(1, 2, 0).numpy(), np.asarray(expected))


@pytest.mark.parametrize("make", [noise, smooth, edges])
@pytest.mark.parametrize(("before", "after"), SIZES)
def test_fast_resize_is_a_level_off_at_times_and_two_hardly_ever(
    make, before: tuple[int, int], after: tuple[int, int]
) -> None:
    pixels = make(*before)
    resized = resize(pixels, *after, exact=False)
    assert resized.dtype == torch.uint8 and resized.is_contiguous() and resized.shape == (3, *after)
    difference = (resized.int() - resize(pixels, *after).int()).abs()
    assert difference.max() <= 2
    assert (difference > 0).float().mean() < 0.01
    assert (difference > 1).float().mean() < 2e-4


@pytest.mark.parametrize("exact", [True, False])
def test_picture_of_the_right_size_is_left_as_it_is(exact: bool) -> None:
    pixels = noise(28, 56)
    pixels.flags.writeable = False  # as Pillow hands it out
    assert np.array_equal(resize(pixels, 28, 56, exact).permute(1, 2, 0).numpy(), pixels)


# --- the model's size ---

SIDES = st.integers(1, 6000)


@given(width=SIDES, height=SIDES, low=st.integers(1, 3000), high=st.integers(1, 3000))
def test_area_rule_is_smart_resize(width: int, height: int, low: int, high: int) -> None:
    low, high = sorted((low * 784, high * 784))
    rule = ImageSizeRule(min_pixels=low, max_pixels=high)
    try:
        expected = smart_resize(height, width, 28, low, high)
    except ValueError:
        with pytest.raises(UnreadableImage, match="aspect ratio above 200"):
            rule.target(width, height)
        return
    assume(0 not in expected)  # smart_resize rounds a narrow side to nothing, which no resize can make
    assert rule.target(width, height) == expected


@given(width=SIDES, height=SIDES, low=st.integers(1, 3000), high=st.integers(1, 3000))
def test_area_rule_gives_whole_tokens(width: int, height: int, low: int, high: int) -> None:
    assume(max(width, height) <= 200 * min(width, height))
    low, high = sorted((low * 784, high * 784))
    rows, columns = ImageSizeRule(min_pixels=low, max_pixels=high).target(width, height)
    assert rows >= 28 and columns >= 28 and rows % 28 == columns % 28 == 0


def test_narrow_side_keeps_one_token() -> None:
    assert smart_resize(10, 1500, 28, 784, 7840)[0] == 0
    assert ImageSizeRule(min_pixels=784, max_pixels=7840).target(1500, 10) == (28, 1064)


def test_fixed_side_is_square_whatever_comes() -> None:
    rule = ImageSizeRule(side=280)
    assert rule.target(640, 427) == rule.target(10, 10) == (280, 280)
    with pytest.raises(UnreadableImage, match="2010x10 pixels: aspect ratio above 200"):
        rule.target(2010, 10)
