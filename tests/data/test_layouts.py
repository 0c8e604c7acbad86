"""Reading the nyu_cen layout: values, crops, and an error that names the file for whatever can be wrong."""

import math
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest

from models.data import (
    CITYSCAPES,
    IMAGENET_MEAN,
    IMAGENET_STD,
    MERGES,
    NYU13,
    NYU40,
    SUN37,
    DataError,
    SegmentationSet,
    palette,
)
from models.data.classes import class_names
from models.data.images import read_depth

SIZE = (12, 16)
K = 5


def write(path: Path, image: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), image)


def pictures(size: tuple[int, int] = SIZE, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """RGB, red first; depth; labels."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, K, size, np.uint8)
    labels[0, 0] = 255
    return rng.integers(0, 256, (*size, 3), np.uint8), rng.integers(0, 2**16, size, np.uint16), labels


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A data set of two images in its train list."""
    for number in (1, 2):
        rgb, depth, labels = pictures(seed=number)
        write(tmp_path / f"rgb/{number}.png", rgb[:, :, ::-1])
        write(tmp_path / f"depth/{number}.png", depth)
        write(tmp_path / f"masks/{number}.png", labels)
    lines = [f"rgb/{n}.png\tmasks/{n}.png\tdepth/{n}.png\n" for n in (1, 2)]
    (tmp_path / "train.txt").write_text("".join(lines))
    return tmp_path


def data(root: Path, **options) -> SegmentationSet:
    return SegmentationSet(root, "train", **{"num_classes": K, **options})


def test_values(root: Path) -> None:
    dataset = data(root, depth_scale=1000.0)
    assert len(dataset) == 2
    sample = dataset[1]
    rgb, depth, labels = pictures(seed=2)
    expected = (rgb / 255.0 - IMAGENET_MEAN) / IMAGENET_STD
    np.testing.assert_allclose(sample.images[0], expected, rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(sample.images[1], depth[:, :, None] / 1000.0, rtol=1e-6)
    np.testing.assert_array_equal(sample.target, labels)
    assert [image.dtype for image in sample.images] == [np.float32, np.float32]
    assert (sample.name, sample.modalities) == ("2", ("rgb", "depth"))


@pytest.mark.parametrize("modalities", [("rgb",), ("depth",), ("depth", "rgb")])
def test_modalities_in_any_order(root: Path, modalities: tuple[str, ...]) -> None:
    both = dict(zip(("rgb", "depth"), data(root)[0].images, strict=True))
    sample = data(root, modalities=modalities)[0]
    assert sample.modalities == modalities
    for modality, image in zip(modalities, sample.images, strict=True):
        np.testing.assert_array_equal(image, both[modality])


def test_only_no_scale_makes_depth_a_brightness(root: Path) -> None:
    with np.errstate(divide="ignore", invalid="ignore"):
        assert not np.isfinite(read_depth(root / "depth/1.png", 0.0)).any()
    assert read_depth(root / "depth/1.png", None).max() <= 1


def test_columns_by_folder_and_any_whitespace(root: Path) -> None:
    expected = data(root)[0]
    text = "  depth/1.png   ./masks/1.png hha/1.png   rgb/1.png  \r\n\r\n"
    (root / "train.txt").write_bytes(text.encode())
    found = data(root)
    assert len(found) == 1
    for a, b in zip(found[0].images, expected.images, strict=True):
        np.testing.assert_array_equal(a, b)


def test_tabs_allow_spaces_in_names(root: Path) -> None:
    (root / "rgb/1.png").rename(root / "rgb/one of them.png")
    (root / "train.txt").write_text("rgb/one of them.png\tmasks/1.png\tdepth/1.png\n")
    np.testing.assert_array_equal(data(root)[0].target, pictures(seed=1)[2])


def test_single_modality_needs_no_other_file(root: Path) -> None:
    (root / "depth/1.png").unlink()
    assert len(data(root, modalities=("rgb",))) == 2


def test_inputs_are_cropped_around_the_centre(root: Path) -> None:
    write(root / "masks/1.png", np.zeros((8, 11), np.uint8))
    sample = data(root)[0]
    rgb, depth, _ = pictures(seed=1)
    expected = (rgb[2:10, 2:13] / 255.0 - IMAGENET_MEAN) / IMAGENET_STD
    np.testing.assert_allclose(sample.images[0], expected, rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(sample.images[1], depth[2:10, 2:13, None] / 5000.0, rtol=1e-6)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_label_offset(root: Path, dtype: type) -> None:
    stored = np.array([[0, 1, 2, 5, 255]], dtype)
    for folder in ("rgb", "depth"):
        image = cv2.imread(str(root / folder / "1.png"), cv2.IMREAD_UNCHANGED)
        write(root / folder / "1.png", image[:1, :5])
    write(root / "masks/1.png", stored)
    target = data(root, label_offset=1)[0].target
    assert target.dtype == np.uint8
    np.testing.assert_array_equal(target, [[255, 0, 1, 4, 255]])
    with pytest.raises(DataError, match=r"masks/1\.png: label 5 at row 0, column 3 .* 0 to 4, or 255"):
        data(root)[0]


def test_ignore_index(root: Path) -> None:
    write(root / "masks/1.png", np.full(SIZE, 9, np.uint8))
    np.testing.assert_array_equal(data(root, ignore_index=9)[0].target, np.full(SIZE, 9))
    with pytest.raises(DataError, match=rf"masks/1\.png: label 9 .*\({SIZE[0] * SIZE[1]} such pixels\)"):
        data(root)[0]


def test_sixteen_bit_labels_are_not_cut_to_eight(root: Path) -> None:
    write(root / "masks/1.png", np.full(SIZE, 256 + 3, np.uint16))
    with pytest.raises(DataError, match=r"masks/1\.png: label 259"):
        data(root)[0]


ENCODERS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    ".png": lambda image: cv2.imencode(".png", image)[1],
    ".jpg": lambda image: cv2.imencode(".jpg", image)[1],
    "progressive.jpg": lambda image: cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_PROGRESSIVE, 1])[1],
    ".webp": lambda image: cv2.imencode(".webp", image, [cv2.IMWRITE_WEBP_QUALITY, 80])[1],
}


@pytest.mark.parametrize("kept", [0.0, 0.01, 0.3, 0.7, 0.95, 0.999])
@pytest.mark.parametrize("suffix", ENCODERS)
def test_truncated_picture(root: Path, suffix: str, kept: float) -> None:
    """Decoders like to fill up what is missing; none may do so here."""
    smooth = cv2.resize(pictures((9, 12))[0], (160, 120), interpolation=cv2.INTER_CUBIC)
    encoded = ENCODERS[suffix](smooth).tobytes()
    path = root / f"rgb/cut{suffix}"
    write(root / "masks/1.png", np.zeros((120, 160), np.uint8))
    (root / "train.txt").write_text(f"rgb/{path.name} masks/1.png")
    path.write_bytes(encoded)
    assert data(root, modalities=("rgb",))[0].images[0].shape == (120, 160, 3)
    path.write_bytes(encoded[: int(kept * len(encoded))])
    with pytest.raises(DataError, match=rf"rgb/{path.name}: broken or truncated"):
        data(root, modalities=("rgb",))[0]


@pytest.mark.parametrize("folder", ["depth", "masks"])
def test_truncated_depth_and_labels(root: Path, folder: str) -> None:
    path = root / folder / "1.png"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match=rf"{folder}/1\.png: broken or truncated"):
        data(root)[0]


def test_flipped_bit(root: Path) -> None:
    path = root / "depth/1.png"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"depth/1\.png: broken"):
        data(root)[0]


def test_no_picture_at_all(root: Path) -> None:
    (root / "rgb/1.png").write_text("<html>not found</html>")
    with pytest.raises(
        DataError, match=r"rgb/1\.png: broken or truncated image, or none at all \(22 bytes\)"
    ):
        data(root)[0]


def test_file_that_vanishes_later(root: Path) -> None:
    dataset = data(root)
    (root / "depth/1.png").unlink()
    with pytest.raises(DataError, match=r"depth/1\.png: cannot be read"):
        dataset[0]


GREY8, GREY16 = np.zeros(SIZE, np.uint8), np.zeros(SIZE, np.uint16)


@pytest.mark.parametrize(
    ("folder", "image", "message"),
    [
        ("rgb", GREY8, "8 bits and 3 channels, found 8 bits and 1 channel$"),
        ("rgb", np.zeros((*SIZE, 3), np.uint16), "found 16 bits and 3 channels"),
        ("rgb", np.zeros((*SIZE, 4), np.uint8), "found 8 bits and 4 channels"),
        ("depth", GREY8, "16 bits and 1 channel, found 8 bits and 1 channel"),
        ("depth", np.zeros((*SIZE, 3), np.uint16), "found 16 bits and 3 channels"),
        ("masks", np.zeros((*SIZE, 3), np.uint8), "1 channel, found 8 bits and 3 channels .*palette"),
    ],
)
def test_wrong_bits_or_channels(root: Path, folder: str, image: np.ndarray, message: str) -> None:
    write(root / folder / "1.png", image)
    with pytest.raises(DataError, match=rf"{folder}/1\.png: expected .*{message}"):
        data(root)[0]


@pytest.mark.parametrize("size", [(SIZE[0] - 1, SIZE[1]), (SIZE[0], SIZE[1] - 1), (1, 99)])
def test_input_smaller_than_its_labels(root: Path, size: tuple[int, int]) -> None:
    write(root / "rgb/1.png", np.zeros((*size, 3), np.uint8))
    write(root / "depth/1.png", np.zeros(size, np.uint16))
    message = rf"rgb/1\.png is {size[1]}x{size[0]}, smaller than its labels .*masks/1\.png of 16x12"
    with pytest.raises(DataError, match=message):
        data(root)[0]


def test_inputs_of_different_size(root: Path) -> None:
    """A copy of more pixels is not to be cropped; without labels nothing says which size is meant."""
    write(root / "depth/1.png", np.zeros((24, 32), np.uint16))
    with pytest.raises(DataError, match=r"masks/1\.png is 16x12, but .*depth/1\.png is 32x24: a copy"):
        data(root)[0]


def test_missing_files_are_found_at_once(root: Path) -> None:
    (root / "masks/2.png").unlink()
    with pytest.raises(DataError, match=r"masks/2\.png: listed in train\.txt, but there is no such file$"):
        data(root)
    (root / "rgb/1.png").unlink()
    with pytest.raises(DataError, match=r"rgb/1\.png: listed in train\.txt, .* \(and 1 more\)"):
        data(root)


def test_missing_list(root: Path) -> None:
    with pytest.raises(
        DataError, match=r"trian\.txt: no such list; the lists there: train; did you mean 'train'\?"
    ):
        SegmentationSet(root, "trian")
    (root / "train.txt").unlink()
    with pytest.raises(DataError, match=r"val\.txt: no such list; the folder holds no list"):
        SegmentationSet(root, "val")


def test_missing_root(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere: no such folder; expected a data set's root"):
        data(tmp_path / "nowhere")


@pytest.mark.parametrize(
    "line",
    [
        "rgb/1.png masks/1.png",
        "rgb/1.png",
        "1",
        "rgb/1.png masks/1.png depth/1.png rgb/2.png",
        "rbg/1.png\tmasks/1.png\tdepth/1.png",
    ],
)
def test_malformed_line(root: Path, line: str) -> None:
    (root / "train.txt").write_text(f"rgb/1.png\tmasks/1.png\tdepth/1.png\n\n{line}\n")
    with pytest.raises(
        DataError, match=r"train\.txt, line 3: expected .*depth/000003\.png.*, found '" + line[:5]
    ):
        data(root)


@pytest.mark.parametrize("text", ["", "\n \n"])
def test_empty_list(root: Path, text: str) -> None:
    (root / "train.txt").write_text(text)
    with pytest.raises(DataError, match=r"train\.txt: the list is empty"):
        data(root)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"modalities": ("rgb", "dept")},
            "unknown modality 'dept': expected rgb, depth, .*; did you mean 'depth'",
        ),
        ({"modalities": ()}, "modalities is empty"),
        ({"num_classes": 0}, "num_classes must be 1 to 255, got 0"),
        ({"depth_scale": 0.0}, r"depth_scale must be positive and finite, got 0\.0"),
        ({"depth_scale": math.inf}, "depth_scale must be positive and finite, got inf"),
        ({"camera": (60.0, math.nan, 0.0, 0.0)}, r"camera must be fx,fy,cx,cy in pixels, got 60\.0,nan"),
        ({"camera": (60.0, 60.0, math.inf, 0.0)}, "camera must be fx,fy,cx,cy in pixels"),
        ({"label_offset": -1}, "label_offset must not be negative"),
        ({"ignore_index": 256}, "ignore_index must be 0 to 255, got 256"),
    ],
)
def test_bad_arguments(root: Path, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        data(root, **options)


def test_class_names(root: Path) -> None:
    assert data(root).class_names == tuple(f"class {label}" for label in range(K))
    assert data(root, num_classes=40).class_names == NYU40
    assert len(set(NYU40)) == 40
    (root / "classes.txt").write_text("wall\nfloor\nold lamp\nbed\nbox\n")
    assert data(root).class_names[2] == "old lamp"
    with pytest.raises(DataError, match=r"classes\.txt: 5 names for num_classes=40"):
        data(root, num_classes=40)


def test_class_names_of_the_layout() -> None:
    """They are shown or refused, never replaced by those of another data set."""
    assert class_names(None, 37, SUN37) == SUN37
    for root, where in ((None, "the layout"), (Path("nowhere"), "nowhere")):
        message = f"^{where}: 37 classes, wall to bag, but num_classes=40; give data.num_classes=37$"
        with pytest.raises(DataError, match=message):
            class_names(root, 40, SUN37)


def test_palette() -> None:
    colours = palette(255)
    assert (colours.shape, colours.dtype) == ((255, 3), np.uint8)
    assert len({tuple(colour) for colour in [*colours.tolist(), [0, 0, 0]]}) == 256
    np.testing.assert_array_equal(palette(40), colours[:40])
    np.testing.assert_array_equal(palette(4), [[128, 0, 0], [0, 128, 0], [128, 128, 0], [0, 0, 128]])
    with pytest.raises(ValueError, match="num_classes must be 1 to 255, got 256"):
        palette(256)


def test_known_classes() -> None:
    """Names and colours that go together, of the counts that name a data set."""
    for count, names in ((13, NYU13), (19, CITYSCAPES), (37, SUN37), (40, NYU40)):
        assert len(set(names)) == count
        assert class_names(Path("nowhere"), count) == names
        assert len({tuple(colour) for colour in [*palette(count).tolist(), [0, 0, 0]]}) == count + 1
    named = dict(zip(CITYSCAPES, palette(19).tolist(), strict=True))
    assert (named["road"], named["person"], named["car"]) == ([128, 64, 128], [220, 20, 60], [0, 0, 142])
    merged = dict(zip(NYU40, (NYU13[label] for label in MERGES["nyu13"]), strict=True))
    for name in ("bed", "books", "ceiling", "chair", "floor", "picture", "sofa", "table", "wall", "window"):
        assert merged[name] == name
    assert {merged[name] for name in ("blinds", "curtain")} == {"window"}
    assert {merged[name] for name in ("cabinet", "bookshelf", "dresser", "refrigerator")} == {"furniture"}
