"""An image set on disk becomes latents with their conditions, and what is none is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from data.images import image_latents
from tests.tiny_ilf import tiny_driver

COUNT = 5


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def pictures(size: tuple[int, int] = (16, 16)) -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)) for _ in range(COUNT)]


def write(folder: Path, images: list[Image.Image], **columns: list[Any]) -> Path:
    """An image folder with its metadata.jsonl."""
    folder.mkdir()
    rows = []
    for i, image in enumerate(images):
        image.save(folder / f"{i}.png")
        rows.append({"file_name": f"{i}.png"} | {name: values[i] for name, values in columns.items()})
    if columns:
        (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def as_tensor(images: list[Image.Image]) -> torch.Tensor:
    return torch.stack([torch.from_numpy(np.array(i)).permute(2, 0, 1) / 127.5 - 1 for i in images])


@pytest.mark.parametrize("column", ["text", "caption", "prompt"])
def test_captioned_images_become_latents_and_conditions(tmp_path: Path, column: str) -> None:
    driver, images = tiny_driver("pixart"), pictures()
    texts = ["a red circle", "a blue square", "green", "on grey", "a"]
    latents, conditions = image_latents(driver, str(write(tmp_path / "set", images, **{column: texts})), 4, 3)
    torch.testing.assert_close(latents, driver.latents_of(as_tensor(images[:4])), rtol=1e-4, atol=1e-4)
    want = driver.encode(texts[:4])
    assert len(conditions) == 4
    assert all(torch.equal(value, want.asked[name]) for name, value in conditions.asked.items())


def test_labelled_images_become_latents_and_labels(tmp_path: Path) -> None:
    """A label column serves a class-conditional backbone, also beside a caption."""
    driver, images = tiny_driver("dit"), pictures()
    folder = write(tmp_path / "set", images, label=[4, 0, 9, 1, 2], text=["a"] * COUNT)
    latents, conditions = image_latents(driver, str(folder), 99)
    assert latents.shape == (COUNT, 4, 8, 8) and conditions.asked["labels"].tolist() == [4, 0, 9, 1, 2]


def test_the_central_square_is_taken(tmp_path: Path) -> None:
    driver = tiny_driver("pixart")
    wide = np.zeros((16, 40, 3), dtype=np.uint8)
    wide[:, 12:28] = 255
    (latents, _) = image_latents(
        driver, str(write(tmp_path / "set", [Image.fromarray(wide)] * COUNT, text=["a"] * COUNT)), 1
    )
    torch.testing.assert_close(latents, driver.latents_of(torch.ones(1, 3, 16, 16)), rtol=1e-4, atol=1e-4)


def refusal(driver: Any, source: Any) -> str:
    with pytest.raises(ValueError, match="data.path") as caught:
        image_latents(driver, str(source), 4)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_is_no_image_set_is_refused(tmp_path: Path) -> None:
    driver = tiny_driver("pixart")
    (tmp_path / "empty").mkdir()
    assert "is no image folder and no data set that can be read" in refusal(driver, tmp_path / "empty")
    bare = write(tmp_path / "bare", pictures())
    assert "has the columns image: text, caption or prompt is missing" in refusal(driver, bare)
    labelled = write(tmp_path / "labelled", pictures(), label=list(range(COUNT)))
    assert "has the columns image, label: text, caption or prompt is missing" in refusal(driver, labelled)
    captioned = write(tmp_path / "captioned", pictures(), text=["a"] * COUNT)
    assert "has the columns image, text: label is missing" in refusal(tiny_driver("dit"), captioned)


def test_a_table_without_images_is_refused(tmp_path: Path) -> None:
    import datasets

    (tmp_path / "table").mkdir()
    datasets.Dataset.from_dict({"text": ["a", "b"]}).to_parquet(str(tmp_path / "table" / "part.parquet"))
    assert "has the columns text but needs one named image" in refusal(tiny_driver("pixart"), tmp_path / "table")


@pytest.mark.parametrize("damage", ["image", "metadata"])
def test_a_damaged_file_is_named(tmp_path: Path, damage: str) -> None:
    folder = write(tmp_path / "set", pictures(), text=["a"] * COUNT)
    path = folder / {"image": "3.png", "metadata": "metadata.jsonl"}[damage]
    path.write_bytes(path.read_bytes()[:-60])
    with pytest.raises(ValueError, match=rf"{'3.png of ' if damage == 'image' else ''}data.path .*set") as caught:
        image_latents(tiny_driver("pixart"), str(folder), COUNT, 2)
    assert "\n" not in str(caught.value)
