"""config.json of an Olmo2ForCausalLM: written from the shape of a model, and read into one. No torch."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import orjson

from megatron_exp.errors import UserError
from megatron_exp.files import require_file
from megatron_exp.model.presets import INIT_STD, NORM_EPS, PRESETS, ROPE_THETA, ModelShape

ARCHITECTURE = "Olmo2ForCausalLM"
CONFIG_NAME = "config.json"
OURS = "megatron_exp"
"""The key under which config.json keeps what transformers has no word for; it passes the key on when it saves a model."""

TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")

_UNNAMED_PRESET = "custom"
_FIXED = {
    "hidden_act": ("silu", "silu"),
    "attention_bias": (False, False),
    "attention_dropout": (0.0, 0.0),
    "tie_word_embeddings": (False, False),
    "rms_norm_eps": (NORM_EPS, 1e-5),
}
"""What every model of ours has, and what transformers assumes where config.json is silent."""
_ROPE_THETA_ASSUMED = 10_000.0


def config_of(shape: ModelShape, dtype: str, token_ids: Mapping[str, Any], ours: Mapping[str, Any]) -> dict[str, Any]:
    """The content of config.json. dtype: `float32` or `bfloat16`. token_ids: those that are known. ours: kept under `megatron_exp`."""
    return {
        "architectures": [ARCHITECTURE],
        "model_type": "olmo2",
        "vocab_size": shape.vocabulary_size,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.ffn,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_groups,
        "max_position_embeddings": shape.sequence_length,
        "rope_theta": ROPE_THETA,
        "rope_scaling": None,
        **{name: value for name, (value, _) in _FIXED.items()},
        "initializer_range": INIT_STD,
        **{name: token_ids.get(name) for name in TOKEN_IDS},
        "use_cache": True,
        "torch_dtype": dtype,
        OURS: dict(ours),
    }


def read_config(directory: Path) -> dict[str, Any]:
    """config.json of a model directory; UserError where it is missing, damaged or of another architecture."""
    path = Path(directory) / CONFIG_NAME
    config = read_json(path)
    found = config.get("architectures")
    if found != [ARCHITECTURE]:
        raise UserError(
            f"{path} names the architecture {found}, and only {ARCHITECTURE} can be converted: other models have other layers, for which there is no "
            "place here. Give an OLMo-2 model."
        )
    return config


def read_json(path: Path) -> dict[str, Any]:
    """The object in a model's config.json, whatever its architecture; UserError where it is missing or damaged."""
    try:
        config = orjson.loads(require_file(path, f"the configuration of a Hugging Face {ARCHITECTURE}").read_bytes())
    except orjson.JSONDecodeError as error:
        raise UserError(f"{path} is not valid JSON ({error}). It is damaged: copy the model again.") from error
    return config if isinstance(config, dict) else {}


def shape_of(config: Mapping[str, Any], directory: Path) -> ModelShape:
    """The shape of the model that a config.json describes; UserError naming every value that no model of ours can have."""
    path = Path(directory) / CONFIG_NAME
    wrong = [
        f"{name} is {found!r} and must be {wanted!r}"
        for name, (wanted, assumed) in _FIXED.items()
        if (found := config.get(name, assumed)) != wanted
    ]
    wrong += _wrong_positions(config)
    heads, hidden = _size(config, "num_attention_heads", path), _size(config, "hidden_size", path)
    groups = _size(config, "num_key_value_heads", path) if config.get("num_key_value_heads") is not None else heads
    if hidden % heads or heads % groups or (hidden // heads) % 2 or config.get("head_dim", hidden // heads) != hidden // heads:
        wrong.append(f"hidden_size {hidden}, num_attention_heads {heads} and num_key_value_heads {groups} give no heads of one even width")
    if wrong:
        raise UserError(f"{path} describes a model that is not OLMo-2 as trained here: {'; '.join(wrong)}. It cannot be converted exactly.")
    numbers = (_size(config, "num_hidden_layers", path), hidden, heads, _size(config, "intermediate_size", path))
    layers, _, _, ffn = numbers
    names = (name for name, one in PRESETS.items() if (one.layers, one.hidden, one.heads, one.ffn) == numbers)
    return ModelShape(
        preset=next(names, _UNNAMED_PRESET),
        layers=layers,
        hidden=hidden,
        heads=heads,
        kv_groups=groups,
        ffn=ffn,
        vocabulary_size=_size(config, "vocab_size", path),
        sequence_length=_size(config, "max_position_embeddings", path),
    )


def _wrong_positions(config: Mapping[str, Any]) -> list[str]:
    """Rotary positions stand in `rope_parameters` since transformers 5, and in `rope_theta` and `rope_scaling` before."""
    rope = {
        "rope_theta": config.get("rope_theta", _ROPE_THETA_ASSUMED),
        **(config.get("rope_scaling") or {}),
        **(config.get("rope_parameters") or {}),
    }
    kind = rope.get("rope_type", rope.get("type", "default"))
    wrong = [] if kind == "default" else [f"the rotary positions are of type {kind!r} and must be 'default'"]
    return wrong if rope["rope_theta"] == ROPE_THETA else [*wrong, f"rope_theta is {rope['rope_theta']} and must be {ROPE_THETA}"]


def _size(config: Mapping[str, Any], name: str, path: Path) -> int:
    value = config.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UserError(
            f"{path} gives {name} as {value!r}; a whole number above 0 is needed there. Copy the model's own configuration again."
        )
    return value
