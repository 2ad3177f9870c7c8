import subprocess
import sys

import pytest

from megatron_exp.config.schema import ModelConfig
from megatron_exp.errors import UserError
from megatron_exp.model.presets import PRESETS, resolve_shape


@pytest.mark.parametrize(
    ("preset", "billions"), [("olmo2-179m", 0.178), ("olmo2-546m", 0.541), ("olmo2-1b", 1.485), ("olmo2-2.7b", 2.72), ("olmo2-7b", 7.30)]
)
def test_presets_have_the_published_number_of_parameters(preset, billions):
    shape = resolve_shape(ModelConfig(preset=preset), 100_278, 4096)
    assert shape.vocabulary_size == 100_352
    assert shape.num_parameters / 1e9 == pytest.approx(billions, rel=0.006)


def test_overrides_replace_single_numbers():
    shape = resolve_shape(ModelConfig(preset="tiny", layers=2, kv_groups=2), 4096, 256)
    assert (shape.layers, shape.hidden, shape.kv_groups, shape.vocabulary_size, shape.sequence_length) == (2, 128, 2, 4096, 256)


def test_an_unknown_preset_names_those_that_exist():
    with pytest.raises(UserError, match="olmo2-1b.*Did you mean 'olmo2-1b'"):
        resolve_shape(ModelConfig(preset="olmo-1b"), 4096, 256)


@pytest.mark.parametrize(
    ("overrides", "complaint"),
    [
        ({"heads": 3}, "model.hidden = 128 cannot be divided among model.heads = 3"),
        ({"kv_groups": 3}, "model.heads = 4 cannot share model.kv_groups = 3"),
        ({"hidden": 132, "heads": 4}, "even width"),
        ({"vocabulary_size": 4000}, "smaller than the tokenizer's 4096"),
    ],
)
def test_numbers_that_do_not_fit_together_are_refused(overrides, complaint):
    with pytest.raises(UserError, match=complaint):
        resolve_shape(ModelConfig(**overrides), 4096, 256)


def test_an_operation_count_is_six_per_multiplied_weight_and_token_plus_attention():
    shape = resolve_shape(ModelConfig(), 4096, 256)
    multiplied = 4 * (4 * 128**2 + 3 * 128 * 512) + 4096 * 128
    assert shape.flops_per_token == 6 * multiplied + 6 * 4 * 128 * 256


def test_presets_are_read_without_torch():
    program = "import sys, megatron_exp.model.presets; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_every_preset_divides_evenly():
    for name in PRESETS:
        resolve_shape(ModelConfig(preset=name), 100_278, 4096)
