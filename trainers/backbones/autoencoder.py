"""The latent spaces of the embedded backbones: a trained one for scenes, an exact identity for digits."""

from __future__ import annotations

import time

import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from torch import Tensor, nn
from torch.nn.functional import l1_loss, mse_loss

from data.scenes import scene_batch


def train_autoencoder(steps: int, batch_size: int = 32, lr: float = 2e-3, log_every: int = 50) -> AutoencoderKL:
    """An `AutoencoderKL` of scenes, 32x32x3 to 8x8x4, whose latents have zero mean and identity covariance per channel.

    Reconstruction only, with noise on the latents instead of a KL term: it asks for the same smoothness, without
    a weight to tune.
    """
    torch.manual_seed(0)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 32),
        latent_channels=4,
        norm_num_groups=8,
        sample_size=32,
        mid_block_add_attention=False,
    ).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.05)
    start = time.time()
    for step in range(steps):
        images, _ = scene_batch(1_000_000 + step, batch_size)
        latents = vae.encode(images).latent_dist.mean
        noisy = latents + 0.03 * torch.randn_like(latents)
        decoded = vae.decode(noisy).sample
        # The second term keeps latents near unit scale, so that the noise above means something.
        loss = mse_loss(decoded, images) + 0.2 * l1_loss(decoded, images) + 1e-3 * (latents.pow(2).mean() - 1).abs()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % log_every == 0 or step == steps - 1:
            print(
                f"autoencoder {step} mse {mse_loss(decoded, images).item():.5f} {time.time() - start:.0f}s", flush=True
            )
    _whiten(vae.eval())
    return vae


@torch.no_grad()
def _whiten(vae: AutoencoderKL) -> None:
    """Folds the latents' whitening into the two 1x1 convolutions, so that scaling_factor is exactly 1."""
    latents = torch.cat([vae.encode(scene_batch(2_000_000 + i, 64)[0]).latent_dist.mean for i in range(16)])
    flat = latents.permute(0, 2, 3, 1).reshape(-1, latents.shape[1]).double()
    mean, covariance = flat.mean(0), torch.cov(flat.T)
    values, vectors = torch.linalg.eigh(covariance)
    into = vectors / values.sqrt() @ vectors.T  # symmetric square roots keep channels recognisable
    back = vectors * values.sqrt() @ vectors.T
    channels = latents.shape[1]
    quant, post = vae.quant_conv, vae.post_quant_conv
    weight, bias = quant.weight[:channels, :, 0, 0].double(), quant.bias[:channels].double()
    quant.weight[:channels, :, 0, 0] = (into @ weight).float()
    quant.bias[:channels] = (into @ (bias - mean)).float()
    # The encoder is used through its mean: its predicted variance is set to the floor.
    quant.weight[channels:] = 0
    quant.bias[channels:] = -12.0
    weight = post.weight[:, :, 0, 0].double()
    post.bias += (weight @ mean).float()
    post.weight[:, :, 0, 0] = (weight @ back).float()
    vae.register_to_config(scaling_factor=1.0)


@torch.no_grad()
def identity_autoencoder(channels: int, sample_size: int) -> AutoencoderTiny:
    """An `AutoencoderTiny` that hands images through, in latents scaled down by 64.

    Diffusers' pipelines need a decoder.  This one is linear up to a saturating tanh, which at a 64th of the scale
    departs from the identity by less than 1e-4.
    """
    scale = 64.0
    width = 2 * channels
    vae = AutoencoderTiny(
        in_channels=channels, out_channels=channels, latent_channels=channels,
        encoder_block_out_channels=(width,), decoder_block_out_channels=(width,),
        num_encoder_blocks=(0,), num_decoder_blocks=(0,), scaling_factor=scale,
    )  # fmt: skip
    for parameter in vae.parameters():
        parameter.zero_()
    eye = torch.eye(channels)
    enter, leave = vae.encoder.layers
    enter.weight[:channels, :, 1, 1] = eye
    # The encoder maps images to 0..1 first; the decoder maps 0..1 back to -1..1.
    leave.weight[:, :channels, 1, 1] = 2 * eye / scale
    leave.bias.fill_(-1.0 / scale)
    first, last = vae.decoder.layers[0], vae.decoder.layers[-1]
    # A ReLU stands between the two convolutions: carry x and -x, and take the difference.
    first.weight[:channels, :, 1, 1], first.weight[channels:, :, 1, 1] = eye, -eye
    last.weight[:, :channels, 1, 1], last.weight[:, channels:, 1, 1] = eye * scale / 2, -eye * scale / 2
    last.bias.fill_(0.5)
    return vae.eval()


def reconstruction_error(vae: nn.Module, images: Tensor) -> float:
    """Mean squared error of a round trip through the latents."""
    with torch.no_grad():
        encoded = vae.encode(images)
        latents = encoded.latent_dist.mean if hasattr(encoded, "latent_dist") else encoded.latents
        return float(mse_loss(vae.decode(latents).sample, images))
