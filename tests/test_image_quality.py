"""Image quality against closed forms and against torchmetrics."""

import pytest
import torch
from torchmetrics.functional.image import structural_similarity_index_measure

from trainers.image_quality import MAX_PSNR_DB, mse, psnr_db, psnr_db_per_image, ssim


def images(seed, shape=(3, 3, 32, 32)):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def test_equal_images_reach_the_top():
    x = images(0)
    assert (mse(x, x), psnr_db(x, x)) == (0, MAX_PSNR_DB) and ssim(x, x) == pytest.approx(1, abs=1e-5)


def test_a_constant_error_has_the_textbook_psnr():
    """0.1 in 0..1 is 0.2 in -1..1, and is 20 dB."""
    x = torch.full((2, 3, 8, 8), -0.5)
    assert psnr_db(x + 0.2, x) == pytest.approx(20, abs=1e-4) and mse(x + 0.2, x) == pytest.approx(0.01, rel=1e-5)


def test_the_mean_is_over_the_decibels_of_each_image():
    x = torch.zeros(2, 1, 8, 8)
    noisy = x + torch.tensor([0.2, 0.02]).view(2, 1, 1, 1)
    assert psnr_db_per_image(noisy, x).tolist() == pytest.approx([20, 40], abs=1e-3)
    assert psnr_db(noisy, x) == pytest.approx(30, abs=1e-3)


def test_what_a_picture_file_cannot_hold_does_not_count():
    assert mse(torch.full((1, 1, 8, 8), 7.0), torch.ones(1, 1, 8, 8)) == 0


@pytest.mark.parametrize("shape", [(2, 3, 32, 32), (1, 1, 16, 24), (2, 1, 11, 11)], ids=str)
def test_ssim_agrees_with_torchmetrics_away_from_its_mirrored_border(shape):
    x = images(1, shape)
    y = (x + 0.3 * images(2, shape)).clamp(-1, 1)
    _, full = structural_similarity_index_measure((x + 1) / 2, (y + 1) / 2, data_range=1.0, return_full_image=True)
    assert ssim(x, y) == pytest.approx(full[..., 5:-5, 5:-5].mean().item(), abs=1e-4)


def test_ssim_of_an_image_smaller_than_its_window():
    x = images(3, (4, 1, 8, 8))
    assert -1 < ssim(x, images(4, (4, 1, 8, 8))) < ssim(x, x * 0.9) < 1


def test_shapes_must_match():
    with pytest.raises(ValueError, match="they must match"):
        psnr_db(torch.zeros(1, 3, 8, 8), torch.zeros(2, 3, 8, 8))
