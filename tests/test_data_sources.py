"""Where images come from: every kind of source, and every kind of damage to one."""

import gzip
import os
import shutil
import urllib.request
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastgan.data import DataWarning, prepare
from fastgan.data.preparation import open_source
from fastgan.errors import DataError

DIGITS = Path(prepare.__code__.co_filename).parent / "digits"


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("FASTGAN_CACHE", str(tmp_path_factory.mktemp("cache")))


def grey(value: int, size: int = 8) -> Image.Image:
    return Image.new("L", (size, size), value)


def save(folder: Path, **values: int) -> Path:
    """Images of one grey each; a double underscore in a name is a sub-folder."""
    for name, value in values.items():
        path = folder / (name.replace("__", "/") + ".png")
        path.parent.mkdir(parents=True, exist_ok=True)
        grey(value).save(path)
    return folder


def greys(prepared) -> list[int]:
    assert (prepared.images == prepared.images[:, :1, :1]).all()
    return prepared.images[:, 0, 0, 0].tolist()


def write_idx(path: Path, values: np.ndarray, cut: int | None = None, promised: int | None = None) -> Path:
    sizes = np.array([promised or len(values), *values.shape[1:]], ">i4").tobytes()
    content = bytes([0, 0, 8, values.ndim]) + sizes + values.tobytes()
    with gzip.open(path, "wb") if path.suffix == ".gz" else open(path, "wb") as file:
        file.write(content[:cut])
    return path


# --- the bundled digits ---


@pytest.mark.parametrize("source", [None, "digits"])
def test_the_bundled_digits_are_all_there_with_a_margin(source):
    digits = prepare(source, 32)
    assert digits.images.shape == (10000, 32, 32, 1)
    assert digits.channels == 1
    assert digits.classes == list("0123456789")
    assert np.bincount(digits.labels).tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    assert digits.skipped == []
    assert digits.enlarged == 0
    with gzip.open(DIGITS / "t10k-images-idx3-ubyte.gz") as file:
        original = np.frombuffer(file.read()[16:], np.uint8).reshape(10000, 28, 28)
    assert np.array_equal(digits.images[:, 2:30, 2:30, 0], original), "no pixel is resampled"
    assert int(digits.images.sum(dtype=np.int64)) == int(original.sum(dtype=np.int64)), "the margin is background"


def test_the_digits_name_their_licence_and_authors():
    text = (DIGITS / "LICENSE").read_text()
    for expected in ("CC BY-SA 3.0", "LeCun", "Cortes", "Burges", "yann.lecun.com/exdb/mnist"):
        assert expected in text


# --- folders ---


def test_a_folder_is_read_in_the_order_of_its_paths_with_sub_folders_as_classes(tmp_path):
    prepared = prepare(save(tmp_path, dog__b=3, cat__a=1, cat__deep__er__z=2, dog__c=4), 8)
    assert greys(prepared) == [1, 2, 3, 4]
    assert prepared.classes == ["cat", "dog"]
    assert prepared.labels.dtype == np.int64
    assert prepared.labels.tolist() == [0, 0, 1, 1]
    assert prepared.source == str(tmp_path)


@pytest.mark.parametrize(
    "names",
    [("a", "b"), ("only__a", "only__b"), ("a", "cat__b"), ("x__a", "x__y__b")],
    ids=["flat", "one folder", "beside folders", "nested"],
)
def test_without_a_folder_for_each_class_there_are_no_labels(tmp_path, names):
    prepared = prepare(save(tmp_path, **dict.fromkeys(names, 7)), 8)
    assert len(prepared) == 2
    assert prepared.labels is None
    assert prepared.classes == []


def test_a_wrapping_folder_does_not_hide_the_classes(tmp_path):
    assert prepare(save(tmp_path, train__cat__a=1, train__dog__b=2), 8).classes == ["cat", "dog"]


def test_hidden_files_and_other_files_are_counted_and_passed_over(tmp_path):
    save(tmp_path, a=5)
    for name in ("Thumbs.db", "notes.txt", ".hidden.png", "README"):
        (tmp_path / name).write_text("no image")
    save(tmp_path / ".git", b=6)
    prepared = prepare(tmp_path, 8)
    assert greys(prepared) == [5]
    assert prepared.ignored == 5
    assert prepared.skipped == []


def test_upper_case_endings_and_odd_names_are_images_too(tmp_path):
    for name in ("A.PNG", "b c.JpEg", "ü 猫.png", os.fsdecode(b"\xff\xfe.png")):
        grey(9).save(tmp_path / name, "PNG")
    assert len(prepare(tmp_path, 8)) == 4
    assert len(prepare(tmp_path, 8)) == 4


def test_links_are_followed_but_not_in_circles(tmp_path):
    save(tmp_path / "elsewhere", a=1)
    save(tmp_path / "data", b=2)
    os.symlink(tmp_path / "elsewhere", tmp_path / "data" / "linked")
    os.symlink(tmp_path / "data", tmp_path / "data" / "round")
    os.symlink(tmp_path / "nowhere", tmp_path / "data" / "dangling.png")
    os.mkfifo(tmp_path / "data" / "pipe.png")
    prepared = prepare(tmp_path / "data", 8)
    assert greys(prepared) == [2, 1]
    assert prepared.ignored == 2


@pytest.mark.parametrize("files", [[], ["notes.txt", "more.txt", "x.gz"]])
def test_a_folder_without_images_is_an_error_that_says_what_is_there(tmp_path, files):
    for name in files:
        (tmp_path / name).touch()
    message = r"3 files \(2 .txt, 1 .gz\) have none of the endings .*\.png" if files else "is empty; expected images"
    with pytest.raises(DataError, match=message) as error:
        prepare(tmp_path, 8)
    assert str(tmp_path) in str(error.value)


def damage(folder: Path) -> Path:
    save(folder, a=1, z=2)
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(noise).save(folder / "cut.jpg")
    whole = (folder / "cut.jpg").read_bytes()
    (folder / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "text.png").write_text("this is no image")
    (folder / "void.png").touch()
    return folder


def test_damaged_files_among_good_ones_are_named_skipped_and_counted(tmp_path):
    with pytest.warns(DataWarning, match=r"3 of 5 images in .* left out; cut.jpg: .*truncated"):
        prepared = prepare(damage(tmp_path), 8)
    assert greys(prepared) == [1, 2]
    reasons = dict(prepared.skipped)
    assert list(reasons) == ["cut.jpg", "text.png", "void.png"]
    assert "truncated" in reasons["cut.jpg"]
    assert reasons["text.png"] == reasons["void.png"] == "not an image in a known format"
    with pytest.warns(DataWarning, match="3 of 5"):
        assert prepare(tmp_path, 8).skipped == prepared.skipped, "the cache forgets nothing"


def test_if_every_file_is_damaged_that_is_an_error(tmp_path):
    damage(tmp_path)
    for name in ("a.png", "z.png"):
        (tmp_path / name).unlink()
    with pytest.raises(DataError, match=r"none of the 3 images in .* can be read; cut.jpg: .*truncated"):
        prepare(tmp_path, 8)


def test_a_decompression_bomb_is_skipped(tmp_path, monkeypatch):
    save(tmp_path, good=3)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    grey(1, size=16).save(tmp_path / "bomb.png")  # over twice the limit: Pillow itself raises
    grey(1, size=12).save(tmp_path / "small bomb.png")  # over the limit: Pillow only warns
    with pytest.warns(DataWarning, match="2 of 3 images") as caught:
        prepared = prepare(tmp_path, 8)
    assert greys(prepared) == [3]
    assert [name for name, _ in prepared.skipped] == ["bomb.png", "small bomb.png"]
    assert all("decompression bomb" in reason for _, reason in prepared.skipped)
    assert len(caught) == 1, "no nameless warning of Pillow's beside ours"
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    assert len(prepare(tmp_path, 8)) == 3, "with a higher limit the images are read again"


def test_small_images_are_enlarged_with_a_counted_warning(tmp_path):
    save(tmp_path, a=1, b=2)
    grey(3, size=64).save(tmp_path / "c.png")
    with pytest.warns(DataWarning, match=r"2 of 3 images .* smaller than 32 x 32 pixels and were enlarged"):
        prepared = prepare(tmp_path, 32)
    assert prepared.enlarged == 2
    assert greys(prepared) == [1, 2, 3]


def test_channels_follow_the_data_unless_given(tmp_path):
    save(tmp_path, a=10, b=20, d=40)
    assert prepare(tmp_path, 8).channels == 1
    Image.new("RGB", (8, 8), (1, 2, 3)).save(tmp_path / "c.png")
    mixed = prepare(tmp_path, 8)
    assert mixed.images[:, 0, 0].tolist() == [[10] * 3, [20] * 3, [1, 2, 3], [40] * 3]
    Image.new("RGBA", (8, 8), (1, 2, 3, 255)).save(tmp_path / "e.png")
    assert prepare(tmp_path, 8).channels == 3
    assert prepare(tmp_path, 8, channels=4).images[3, 0, 0].tolist() == [40, 40, 40, 255]
    assert prepare(tmp_path, 8, channels=1).channels == 1


def test_many_gray_images_before_the_first_in_colour_are_widened(tmp_path, monkeypatch):
    monkeypatch.setattr("fastgan.data.cache._BLOCK_BYTES", 8 * 8 * 3 * 4)
    values = np.random.default_rng(0).integers(0, 256, (101, 8, 8, 3), np.uint8)
    values[:100] = values[:100, :, :, :1]
    np.save(tmp_path / "x.npy", values)
    assert np.array_equal(prepare(tmp_path / "x.npy", 8).images, values)


# --- zip ---


def zipped(folder: Path, path: Path, prefix: str = "") -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted(folder.rglob("*"), reverse=True):
            archive.write(file, prefix + str(file.relative_to(folder)))
    return path


def test_a_zip_gives_what_its_folder_gives(tmp_path):
    folder = save(tmp_path / "f", cat__a=1, dog__b=2, cat__sub__c=3, **{"cat-x__d": 4})
    (folder / "Thumbs.db").touch()
    from_folder, from_zip = prepare(folder, 8), prepare(zipped(folder, tmp_path / "f.ZIP", "wrapped/"), 8)
    assert np.array_equal(from_zip.images, from_folder.images)
    assert from_zip.labels.tolist() == from_folder.labels.tolist()
    assert from_zip.classes == from_folder.classes
    assert from_zip.ignored == from_folder.ignored == 1
    assert from_zip.fingerprint == from_folder.fingerprint


def test_zip_members_that_lead_outside_are_skipped_and_nothing_is_unpacked(tmp_path):
    grey(1).save(tmp_path / "good.png")
    evil = ("../evil.png", "a/../../evil.png", "/evil.png", "..\\evil.png", "C:/evil.png")
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.write(tmp_path / "good.png", "good.png")
        for name in evil:
            archive.writestr(zipfile.ZipInfo(name), (tmp_path / "good.png").read_bytes())
    before = sorted(tmp_path.rglob("*"))
    with pytest.warns(DataWarning, match=r"5 of 6 .* its path leads out of the archive"):
        prepared = prepare(tmp_path / "x.zip", 8)
    assert len(prepared) == 1
    assert sorted(name for name, _ in prepared.skipped) == sorted(evil)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_zip_of_evil_paths_only_is_an_error(tmp_path):
    grey(1).save(tmp_path / "good.png")
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.write(tmp_path / "good.png", "../evil.png")
    with pytest.raises(DataError, match=r"none of the 1 images in .*x.zip can be read; \.\./evil.png: its path"):
        prepare(tmp_path / "x.zip", 8)


def test_damage_inside_a_zip_is_named(tmp_path):
    folder = save(tmp_path / "f", a=1, b=2)
    path = zipped(folder, tmp_path / "f.zip")
    content = bytearray(path.read_bytes())
    at = content.index(b"b.png") + 20
    content[at] ^= 0xFF
    path.write_bytes(content)
    with pytest.warns(DataWarning, match="1 of 2 images"):
        assert [name for name, _ in prepare(path, 8).skipped] == ["b.png"]
    (tmp_path / "no.zip").write_text("no archive")
    with pytest.raises(DataError, match=r"no\.zip cannot be read as a zip archive"):
        prepare(tmp_path / "no.zip", 8)
    with zipfile.ZipFile(tmp_path / "empty.zip", "w") as archive:
        archive.writestr("notes.txt", "nothing to see")
    with pytest.raises(DataError, match=r"no images in .*empty\.zip: its 1 files \(1 .txt\)"):
        prepare(tmp_path / "empty.zip", 8)


def test_a_zip_member_that_unpacks_to_too_much_is_skipped(tmp_path, monkeypatch):
    monkeypatch.setattr("fastgan.data.files.MAX_FILE_BYTES", 500)
    grey(1).save(tmp_path / "good.png")
    with zipfile.ZipFile(tmp_path / "x.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.write(tmp_path / "good.png", "good.png")
        archive.writestr("huge.bmp", bytes(501))
    with pytest.warns(DataWarning, match=r"huge.bmp: unpacks to 501 bytes, the limit is 500"):
        assert len(prepare(tmp_path / "x.zip", 8)) == 1


# --- arrays ---


@pytest.mark.parametrize("ending", ["", ".gz"])
def test_idx_files_are_read_with_the_labels_beside_them(tmp_path, ending):
    images = np.random.default_rng(0).integers(0, 256, (5, 8, 8), np.uint8)
    path = write_idx(tmp_path / f"my-images-idx3-ubyte{ending}", images)
    unlabelled = prepare(path, 8)
    assert np.array_equal(unlabelled.images[..., 0], images)
    assert unlabelled.labels is None
    write_idx(tmp_path / "my-labels-idx1-ubyte.gz", np.array([3, 0, 3, 9, 0], np.uint8))
    labelled = prepare(path, 8)
    assert labelled.labels.tolist() == [1, 0, 1, 2, 0]
    assert labelled.classes == ["0", "3", "9"]
    assert labelled.fingerprint != unlabelled.fingerprint


@pytest.mark.parametrize("ending", ["", ".gz"])
def test_idx_files_cut_short_are_refused(tmp_path, ending):
    images = np.zeros((5, 8, 8), np.uint8)
    path = write_idx(tmp_path / f"x-images-idx3{ending}", images, promised=6)
    with pytest.raises(DataError, match=r"x-images-idx3.* cut short: .* 6 images of 64 bytes, .* inside image 5"):
        prepare(path, 8)
    write_idx(path, images, cut=10)
    with pytest.raises(DataError, match=r"x-images-idx3.* cannot be read: it ends inside its header"):
        prepare(path, 8)
    write_idx(path, images)
    write_idx(tmp_path / "x-labels-idx1", np.zeros(4, np.uint8), promised=5)
    with pytest.raises(DataError, match=r"x-labels-idx1 is cut short"):
        prepare(path, 8)
    write_idx(tmp_path / "x-labels-idx1", np.zeros(4, np.uint8))
    with pytest.raises(DataError, match=r"x-images-idx3.*expected labels .* \[5\], .* got uint8 of shape \[4\]"):
        prepare(path, 8)


def test_a_gzip_file_cut_short_is_refused(tmp_path):
    whole = (DIGITS / "t10k-images-idx3-ubyte.gz").read_bytes()
    path = tmp_path / "digits-images.gz"
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"digits-images.gz cannot be read"):
        prepare(path, 32)
    path.write_bytes(whole[:1000] + bytes(100) + whole[1100:])
    with pytest.raises(DataError, match=r"digits-images.gz cannot be read"):
        prepare(path, 32)


@pytest.mark.parametrize("shape", [(4, 8, 8), (4, 8, 8, 1), (4, 8, 8, 3), (4, 1, 8, 8), (4, 3, 8, 8)])
def test_npy_and_npz_of_every_layout(tmp_path, shape):
    values = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    expected = values.reshape(4, 8, 8, 1) if 3 not in shape else values
    expected = expected.transpose(0, 2, 3, 1) if shape[1] == 3 else expected
    np.save(tmp_path / "a.npy", values)
    np.savez(tmp_path / "b.npz", images=values, labels=np.array([[5], [6], [5], [7]]))
    np.savez_compressed(tmp_path / "c.npz", x=values, y=np.array(["cat", "dog", "cat", "ant"]))
    plain, named, packed = (prepare(tmp_path / name, 8) for name in ("a.npy", "b.npz", "c.npz"))
    for prepared in (plain, named, packed):
        assert np.array_equal(prepared.images, expected)
    assert plain.labels is None
    assert named.classes == ["5", "6", "7"]
    assert packed.classes == ["ant", "cat", "dog"]
    assert packed.labels.tolist() == [1, 2, 1, 0]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.zeros((4, 8, 8), np.float32), r"dtype uint8, got float32; .* \* 255"),
        (np.zeros((4, 8, 8), np.int64), r"dtype uint8, got int64"),
        (np.zeros((8, 8), np.uint8), r"got the shape \[8, 8\]"),
        (np.zeros((4, 8, 8, 2), np.uint8), r"got the shape \[4, 8, 8, 2\]"),
        (np.zeros((0, 8, 8), np.uint8), r"at least one image .* got the shape \[0, 8, 8\]"),
        (np.zeros((4, 0, 8), np.uint8), r"got the shape \[4, 0, 8\]"),
        (np.asfortranarray(np.zeros((4, 8, 8), np.uint8)), r"Fortran order"),
        (np.array([{"a": 1}], object), r"dtype uint8, got object"),
    ],
)
def test_arrays_that_are_no_images_are_refused(tmp_path, values, message):
    np.save(tmp_path / "bad.npy", values, allow_pickle=True)
    np.savez(tmp_path / "bad.npz", images=values)
    for name in ("bad.npy", "bad.npz"):
        with pytest.raises(DataError, match=rf"{name}.*{message}"):
            prepare(tmp_path / name, 8)


def test_other_damage_to_arrays_is_explained(tmp_path):
    np.save(tmp_path / "cut.npy", np.zeros((5, 8, 8), np.uint8))
    os.truncate(tmp_path / "cut.npy", 128 + 3 * 64 + 7)
    with pytest.raises(DataError, match=r"cut.npy is cut short: .* 5 images of 64 bytes, .* inside image 3"):
        prepare(tmp_path / "cut.npy", 8)
    (tmp_path / "text.npy").write_text("hello")
    with pytest.raises(DataError, match=r"text.npy cannot be read"):
        prepare(tmp_path / "text.npy", 8)
    np.savez(tmp_path / "other.npz", weights=np.zeros(3), biases=np.zeros(3))
    with pytest.raises(DataError, match=r"other.npz: expected images under .* images, .* found weights, biases"):
        prepare(tmp_path / "other.npz", 8)
    np.savez(tmp_path / "labels.npz", images=np.zeros((4, 8, 8), np.uint8), labels=np.zeros(4))
    with pytest.raises(DataError, match=r"labels.npz: expected labels as integers or names of shape \[4\]"):
        prepare(tmp_path / "labels.npz", 8)
    np.savez(tmp_path / "pickle.npz", images=np.zeros((1, 8, 8), np.uint8), labels=np.array([{}], object))
    with pytest.raises(DataError, match=r"pickle.npz cannot be read: Object arrays cannot be loaded"):
        prepare(tmp_path / "pickle.npz", 8)


# --- torchvision ---


def test_a_torchvision_data_set_that_is_there_is_read(tmp_path, monkeypatch):
    pytest.importorskip("torchvision")
    monkeypatch.setenv("FASTGAN_DATASETS", str(tmp_path))
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for part in ("train", "t10k"):
        for kind in ("images-idx3-ubyte", "labels-idx1-ubyte"):
            with gzip.open(DIGITS / f"t10k-{kind}.gz") as packed, open(raw / f"{part}-{kind}", "wb") as file:
                shutil.copyfileobj(packed, file)
    source = open_source("torchvision:MNIST")
    assert len(source) == 10000
    assert source.classes[7] == "7 - seven"
    digits = prepare("digits", 32)
    for item, expected, label in zip(source, digits.images[:20], digits.labels, strict=False):
        assert np.array_equal(item.open(), expected), "the same margin as from IDX"
        assert item.label == label


def test_torchvision_names_and_missing_files_are_explained(tmp_path, monkeypatch):
    pytest.importorskip("torchvision")

    def no_network(*_, **__):
        raise urllib.error.URLError("no network here")

    monkeypatch.setenv("FASTGAN_DATASETS", str(tmp_path / "sets"))
    monkeypatch.setattr(urllib.request, "urlopen", no_network)
    with pytest.raises(DataError, match=r"torchvision has no data set 'CIFAR11'; it has .*CIFAR10"):
        prepare("torchvision:CIFAR11", 32)
    with pytest.raises(DataError, match=r"CIFAR10 is not in .*sets and could not .*FASTGAN_DATASETS"):
        prepare("torchvision:CIFAR10", 32)


# --- arguments ---


def test_sources_that_are_nothing_are_named(tmp_path):
    with pytest.raises(DataError, match=r"there is no .*nowhere; expected a folder or \.zip"):
        prepare(tmp_path / "nowhere", 8)
    (tmp_path / "photo.png").write_bytes(b"\x89PNG")
    with pytest.raises(DataError, match=r"photo.png cannot be read: .*like an IDX file.*; expected a folder"):
        prepare(tmp_path / "photo.png", 8)


@pytest.mark.parametrize("size", [0, -32, 5000, 32.0, "32", True, None])
def test_nonsense_sizes_are_refused(size):
    with pytest.raises(DataError, match=r"image_size: expected a whole number of pixels from 1 to 4096, got"):
        prepare(None, size)


def test_unknown_choices_list_the_known_ones():
    with pytest.raises(DataError, match=r"crop: expected one of center, random, none, got 'middle'"):
        prepare(None, 32, crop="middle")
    with pytest.raises(DataError, match=r"channels: expected 1, 3, 4 or None .*, got 2"):
        prepare(None, 32, channels=2)
