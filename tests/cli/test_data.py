"""Data sources, normalisation, augmentation and batch order of the command line."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from backmatch.cli import images as images_module
from backmatch.cli.data import load_data
from backmatch.cli.images import ImageData, crop_flip

CIFAR10 = Path(__file__).parents[3] / "shared" / "data" / "cifar10"


@pytest.fixture(scope="module")
def digits() -> ImageData:
    pytest.importorskip("sklearn")
    return load_data("digits")


def sorted_rows(*images: Tensor) -> Tensor:
    """All images as rows, in lexicographic order: equal for equal collections."""
    rows = torch.cat([tensor.flatten(1) for tensor in images]).numpy()
    return torch.from_numpy(rows[np.lexsort(rows.T)])


def png(pixels: np.ndarray) -> bytes:
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def random_images(count: int, shape: tuple[int, ...] = (4, 4, 3), seed: int = 0) -> list[np.ndarray]:
    return list(np.random.default_rng(seed).integers(0, 256, (count, *shape), dtype=np.uint8))


@pytest.fixture
def parquet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A function that writes a split into a folder of parquet files, as the Hugging Face hub has them."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "set"
    folder.mkdir()

    def write(split: str, images: list, labels: list, label_feature=None) -> str:
        stored = [image and {"bytes": image, "path": None} for image in (png(i) if isinstance(i, np.ndarray) else i for i in images)]
        features = datasets.Features({"picture": datasets.Image(), "label": label_feature or datasets.Value("int64")})
        datasets.Dataset.from_dict({"picture": stored, "label": labels}, features=features).to_parquet(folder / f"{split}.parquet")
        return str(folder)

    return write


def test_digits_are_the_embedded_set(digits: ImageData) -> None:
    from sklearn.datasets import load_digits

    source = torch.from_numpy(load_digits().images)[:, None]
    assert digits.in_shape == (1, 8, 8)
    assert len(digits.train_images) == len(digits.train_labels) == 1437
    assert len(digits.test_images) == len(digits.test_labels) == 360
    found = sorted_rows(digits.train_images, digits.test_images)
    torch.testing.assert_close(found, sorted_rows((source * 255 / 16).round().to(torch.uint8)), rtol=0, atol=0)
    again = load_data("digits", seed=5)
    assert torch.equal(again.test_images, digits.test_images)


def test_validation_comes_out_of_the_training_set(digits: ImageData) -> None:
    tuning = load_data("digits", validation=True)
    assert len(tuning.test_labels) == 144
    both = sorted_rows(tuning.train_images, tuning.test_images)
    torch.testing.assert_close(both, sorted_rows(digits.train_images), rtol=0, atol=0)


def test_normalized_training_set_has_mean_0_and_deviation_1() -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (50, 3, 5, 4), dtype=torch.uint8, generator=generator)
    images[:, 2] = 7
    data = ImageData(images, torch.zeros(50).long(), images[:1], torch.zeros(1).long(), ("a",))
    normalized = data.normalize(images).double()
    reference = images[:, :2].double()
    mean, std = reference.mean((0, 2, 3), keepdim=True), reference.std((0, 2, 3), correction=0, keepdim=True)
    torch.testing.assert_close(normalized[:, :2], (reference - mean) / std, rtol=1e-5, atol=1e-6)
    assert torch.equal(normalized[:, 2], torch.zeros(50, 5, 4).double())  # a constant channel


def test_crop_flip_is_pad_shift_and_mirror_of_every_image() -> None:
    images = torch.randint(256, (64, 3, 9, 7), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    found = crop_flip(images, torch.Generator().manual_seed(2))
    generator = torch.Generator().manual_seed(2)
    top, left = torch.randint(9, (2, 64), generator=generator).tolist()
    mirrored = (torch.rand(64, generator=generator) < 0.5).tolist()
    for index, image in enumerate(images):
        padded = torch.zeros(3, 17, 15, dtype=torch.uint8)
        padded[:, 4:13, 4:11] = image
        crop = padded[:, top[index] : top[index] + 9, left[index] : left[index] + 7]
        assert torch.equal(found[index], crop.flip(-1) if mirrored[index] else crop)
    assert {0, 8} <= set(top) | set(left)
    assert 16 < sum(mirrored) < 48


@pytest.mark.parametrize("augment", ["none", "crop-flip"])
def test_batches_depend_on_seed_epoch_and_index_only(digits: ImageData, augment: images_module.Augment) -> None:
    settings = {"epoch": 3, "seed": 1, "batch_size": 100, "augment": augment}
    whole = list(digits.batches(**settings))
    assert len(whole) == digits.steps_per_epoch(100) == 14
    torch.rand(1)  # the global generator has no part in it
    for (images, labels), (later_images, later_labels) in zip(whole[9:], digits.batches(**settings, start=9), strict=True):
        assert torch.equal(images, later_images)
        assert torch.equal(labels, later_labels)
    for change in ({"epoch": 4}, {"seed": 2}):
        other = next(digits.batches(**(settings | change)))
        assert not torch.equal(whole[0][0], other[0])


def test_an_epoch_takes_every_image_at_most_once() -> None:
    images = torch.arange(10, dtype=torch.uint8).view(10, 1, 1, 1)
    data = ImageData(images, torch.arange(10), images, torch.arange(10), tuple("0123456789"))
    labels = torch.cat([labels for _, labels in data.batches(epoch=0, seed=0, batch_size=3)])
    assert len(labels) == len(labels.unique()) == 9  # the last, smaller batch is dropped
    (_, all_labels), *rest = data.batches(epoch=0, seed=0, batch_size=64)
    assert not rest
    assert torch.equal(all_labels.sort().values, torch.arange(10))
    pixels, _ = next(data.batches(epoch=0, seed=0, batch_size=64))
    torch.testing.assert_close(pixels.flatten(), data.normalize(images).flatten()[all_labels])
    assert torch.equal(torch.cat([labels for _, labels in data.evaluation_batches()]), torch.arange(10))


def test_labels_that_number_something_else_are_refused(parquet) -> None:
    source = parquet("train", random_images(20), [0, 10**9] * 10)
    with pytest.raises(ValueError, match="highest label is 1000000000, of only 2 that are used"):
        load_data(source)


def test_parquet_round_trip(parquet, capsys: pytest.CaptureFixture[str]) -> None:
    import datasets

    feature = datasets.ClassLabel(names=["cat", "dog"])
    train, test = random_images(20), random_images(5, seed=1)
    parquet("train", train, [0, 1] * 10, feature)
    folder = parquet("test", test, [1, 0, 0, 1, 1], feature)
    data = load_data(folder)
    assert data.class_names == ("cat", "dog")
    assert torch.equal(data.train_images, torch.from_numpy(np.stack(train)).permute(0, 3, 1, 2))
    assert torch.equal(data.test_images, torch.from_numpy(np.stack(test)).permute(0, 3, 1, 2))
    assert data.train_labels.tolist() == [0, 1] * 10
    assert data.test_labels.tolist() == [1, 0, 0, 1, 1]
    few = load_data(folder, limit=6)
    assert len(few.train_images) == 6
    assert len(few.test_images) == 5
    tuning = load_data(folder, validation=True)
    assert torch.equal(sorted_rows(tuning.train_images, tuning.test_images), sorted_rows(data.train_images))
    assert "held out" not in capsys.readouterr().err


def test_without_a_test_split_a_tenth_is_held_out_and_said(parquet, capsys: pytest.CaptureFixture[str]) -> None:
    grey, coloured = random_images(10, (4, 4)), random_images(10)
    data = load_data(parquet("train", grey + coloured, [0, 1, 2, 3, 4] * 4))
    assert (len(data.train_images), len(data.test_images)) == (18, 2)
    assert data.in_shape == (3, 4, 4)  # grey images among coloured ones become coloured
    assert data.class_names == ("0", "1", "2", "3", "4")
    assert "10% of the training images are held out" in capsys.readouterr().err


def test_image_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    for split, count in (("train", 4), ("test", 2)):
        for kind in ("oak", "pine"):
            folder = tmp_path / "trees" / split / kind
            folder.mkdir(parents=True)
            for index, pixels in enumerate(random_images(count, (3, 5))):
                (folder / f"{index}.png").write_bytes(png(pixels))
    data = load_data(str(tmp_path / "trees"))
    assert data.class_names == ("oak", "pine")
    assert data.in_shape == (1, 3, 5)
    assert data.train_labels.bincount().tolist() == [4, 4]
    assert data.test_labels.bincount().tolist() == [2, 2]


def test_limit_draws_at_random(digits: ImageData) -> None:
    few = load_data("digits", limit=50)
    assert len(few.train_images) == 50
    assert torch.equal(few.test_images, digits.test_images)
    with pytest.raises(ValueError, match="Invalid limit: 1"):
        load_data("digits", limit=1)


IMAGES = random_images(20)
BROKEN = [
    (
        "different sizes",
        [*IMAGES[:19], *random_images(1, (5, 4, 3))],
        [0, 1] * 10,
        r"is \dx4 \(height x width\), the first is \dx4",
    ),
    ("damaged image", [*IMAGES[:19], b"\x89PNG no"], [0, 1] * 10, "cannot decode train image 19: "),
    ("truncated image", [*IMAGES[:19], png(IMAGES[0])[:50]], [0, 1] * 10, "cannot decode train image 19: "),
    ("no image", [*IMAGES[:19], None], [0, 1] * 10, "train image 19 is missing"),
    ("16 bits", [*IMAGES[:19], png(np.full((4, 4), 999, np.uint16))], [0, 1] * 10, "more than 8 bits"),
    ("negative label", IMAGES, [0, -1] * 10, "label of train image 1 is -1"),
    ("no label", IMAGES, [0, None] * 10, "label of train image 1 is missing"),
    ("too small", IMAGES[:1], [0], "too small: 1 images to train and 0 to test"),
]


@pytest.mark.parametrize(("images", "labels", "text"), [case[1:] for case in BROKEN], ids=[case[0] for case in BROKEN])
def test_broken_images_and_labels_are_named(parquet, images: list, labels: list, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        load_data(parquet("train", images, labels))


def test_label_out_of_range(parquet, tmp_path: Path) -> None:
    import datasets
    import pyarrow.parquet as pq

    folder = parquet("train", IMAGES, [0, 1] * 10, datasets.ClassLabel(names=["cat", "dog"]))
    file = tmp_path / "set" / "train.parquet"
    table = pq.read_table(file)
    labels = table.column("label").to_numpy().copy()
    labels[7] = 2
    pq.write_table(table.set_column(1, "label", [labels]), file)
    with pytest.raises(ValueError, match="label 2 is out of range for 2 classes"):
        load_data(folder)


def test_sources_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets, "load_dataset", lambda source: pytest.fail(f"asked the hub for {source!r}"))
    for source in (str(tmp_path / "nowhere"), "./nowhere", "some.txt", ""):
        with pytest.raises(FileNotFoundError, match=f"No file or folder '{source}'. Give 'digits', a folder .* a text file"):
            load_data(source)
    monkeypatch.undo()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="is empty"):
        load_data(str(tmp_path / "empty"))
    for name, file, content, text in [
        ("damaged", "train.parquet", b"PAR1 but no more", "Cannot read data set"),
        ("table", "train.csv", b"a,label\n" + 20 * b"1,2\n", r"one image column, but has 0. Columns: a \(int64\), label"),
    ]:
        (tmp_path / name).mkdir()
        (tmp_path / name / file).write_bytes(content)
        with pytest.raises(ValueError, match=text):
            load_data(str(tmp_path / name))
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'backmatch\[data\]'"):
        load_data(str(tmp_path))


@pytest.mark.skipif(not CIFAR10.is_dir(), reason="the CIFAR-10 files are not beside the repository")
def test_cifar10_parquet() -> None:
    pytest.importorskip("datasets")
    data = load_data(str(CIFAR10), limit=512)
    assert data.in_shape == (3, 32, 32)
    assert data.class_names[:2] == ("airplane", "automobile")
    assert len(data.train_images) == 512
    assert data.test_labels.bincount().tolist() == [1000] * 10
    assert int(data.train_labels.bincount().min()) > 20  # a random draw, not the first images
