"""Which backbone and which settings an adapter accepts, and how the others are refused."""

from __future__ import annotations

import copy
import timeit

import pytest
import torch

from checkpoints.manifest import Manifest, check_valid_for, describe, fingerprint
from tests.adapters import Backbone, manifest_for, refusal


@pytest.fixture
def backbone() -> Backbone:
    return Backbone()


@pytest.fixture
def manifest(backbone: Backbone) -> Manifest:
    return manifest_for(backbone)


def test_the_fingerprint_does_not_depend_on_the_dtype_it_was_loaded_in(backbone):
    backbone.layers[0].weight.data[0] *= 1e-9  # underflows in float16
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        assert fingerprint(copy.deepcopy(backbone).to(dtype)) == fingerprint(backbone)


def test_the_fingerprint_of_a_loaded_pipeline_part_does_not_depend_on_its_dtype(tmp_path):
    from diffusers import PixArtTransformer2DModel

    torch.manual_seed(0)
    shape = {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 8, "cross_attention_dim": 16}
    model = PixArtTransformer2DModel(**shape, caption_channels=16, sample_size=8, out_channels=8, norm_num_groups=4)
    model.save_pretrained(tmp_path)
    wanted = fingerprint(model)
    assert min(timeit.repeat(lambda: fingerprint(model), number=1, repeat=5)) < 0.1
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        loaded = PixArtTransformer2DModel.from_pretrained(tmp_path, torch_dtype=dtype)
        assert (fingerprint(loaded), describe(loaded)) == (wanted, describe(model))


def test_the_fingerprint_tells_trainings_and_fine_tunings_apart(backbone):
    tuned = copy.deepcopy(backbone)
    with torch.no_grad():
        tuned.layers[1].weight += 0.01 * torch.randn_like(tuned.layers[1].weight)
    others = [tuned, Backbone(seed=1), Backbone(num_layers=4), Backbone(width=25)]
    assert len({fingerprint(model) for model in [backbone, *others]}) == 5


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (Backbone(num_layers=4, width=32), "num_layers 3 (here 4), hidden_size 24 (here 32): load"),
        (Backbone(width=32), "hidden_size 24 (here 32): load"),
        (Backbone(seed=1), "of the same architecture"),
        (Backbone().half(), "dtype 'float32' but dtype is 'float16' here"),
    ],
)
def test_a_wrong_backbone_is_refused_by_the_field_that_differs(manifest, other, words):
    assert words in refusal(check_valid_for, manifest, other)


def test_configuration_fields_that_only_one_side_knows_refuse_nothing(manifest, backbone):
    backbone.config = {**backbone.config, "new_in_a_later_library": 1, "eps": 1.0000000001e-6}
    check_valid_for(manifest, backbone)


@pytest.mark.parametrize(
    ("running", "words"),
    [
        ({"timesteps": [900, 300]}, "timesteps [900, 400] but timesteps is [900, 300] here"),
        ({"timesteps": [900]}, "timesteps [900, 400]"),
        ({"guidance": 4.0}, "guidance 4.5 but guidance is 4.0 here"),
        ({"scheduler": {"class": "DPM"}}, "scheduler.class 'DDIM' but scheduler.class is 'DPM' here"),
        ({"dtype": "float16"}, "dtype 'float32'"),
    ],
)
def test_a_setting_outside_valid_for_is_refused_by_name(manifest, backbone, running, words):
    check_valid_for(manifest, backbone, timesteps=(900, 400), guidance=4.5, scheduler={"class": "DDIM", "x": 1}, free=1)
    assert words in refusal(check_valid_for, manifest, backbone, **running)
