"""The sizes of a model: presets, overrides, parameter and operation counts. No torch here, so that planning stays light."""

import dataclasses
import difflib

from megatron_exp.config.schema import ModelConfig
from megatron_exp.errors import UserError

ROPE_THETA = 500_000
NORM_EPS = 1e-6
INIT_STD = 0.02
INIT_TRUNCATION = 3.0
"""Initial weights are normal with standard deviation INIT_STD, cut off at this many of them (OLMo-2 stage 1)."""
Z_LOSS_WEIGHT = 1e-5
VOCABULARY_MULTIPLE = 128
"""Embedding rows are padded to this multiple: 100,278 ids of the dolma2 tokenizer become OLMo-2's 100,352 rows."""


@dataclasses.dataclass(frozen=True)
class ModelShape:
    """The numbers that fix an OLMo-2 model up to its weights.

    `kv_groups` is the number of key and value heads (= `heads` without grouped queries), `ffn` the width inside the
    SwiGLU block, `vocabulary_size` the number of embedding rows, `sequence_length` the slot length S.
    """

    preset: str
    layers: int
    hidden: int
    heads: int
    kv_groups: int
    ffn: int
    vocabulary_size: int
    sequence_length: int

    @property
    def head_width(self) -> int:
        return self.hidden // self.heads

    @property
    def kv_width(self) -> int:
        return self.kv_groups * self.head_width

    @property
    def num_parameters(self) -> int:
        """All weights, both vocabulary matrices included."""
        norms = self.layers * (3 * self.hidden + self.kv_width) + self.hidden
        return self._layer_matrices + norms + 2 * self.vocabulary_size * self.hidden

    @property
    def flops_per_token(self) -> float:
        """Operations of forward and backward for one token.

        6 per matrix weight that is multiplied (the input embedding is a lookup), and the two attention products over the causal
        half of the square.
        """
        matrices = self._layer_matrices + self.vocabulary_size * self.hidden
        return 6.0 * matrices + 6.0 * self.layers * self.hidden * self.sequence_length

    @property
    def _layer_matrices(self) -> int:
        attention = 2 * self.hidden * self.hidden + 2 * self.hidden * self.kv_width
        return self.layers * (attention + 3 * self.hidden * self.ffn)


@dataclasses.dataclass(frozen=True)
class Preset:
    """A named size with the peak learning rate and batch (slots) x length (tokens) it was designed for."""

    layers: int
    hidden: int
    heads: int
    ffn: int
    peak_lr: float
    global_batch_size: int
    sequence_length: int
    source: str


PRESETS = {
    "tiny": Preset(4, 128, 4, 512, 3e-3, 8, 256, "ours, for CPU"),
    "olmo2-179m": Preset(18, 512, 8, 2048, 8e-4, 512, 4096, "dimensions ours (unpublished)"),
    "olmo2-546m": Preset(20, 1024, 16, 4096, 6e-4, 512, 4096, "dimensions ours"),
    "olmo2-1b": Preset(16, 2048, 16, 8192, 4e-4, 512, 4096, "AI2 OLMo2-1B-stage1"),
    "olmo2-2.7b": Preset(21, 2560, 20, 10240, 3e-4, 512, 4096, "dimensions ours"),
    "olmo2-7b": Preset(32, 4096, 32, 11008, 3e-4, 1024, 4096, "AI2 OLMo2-7B-stage1"),
}


def find_preset(name: str) -> Preset:
    """The preset called NAME; raises UserError with the list of presets and the nearest name."""
    if name in PRESETS:
        return PRESETS[name]
    nearest = difflib.get_close_matches(name, PRESETS, n=1)
    hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
    raise UserError(f"There is no model preset {name!r}; there are: {', '.join(PRESETS)}.{hint} Set model.preset to one of them.")


def resolve_shape(config: ModelConfig, vocabulary_size: int, sequence_length: int) -> ModelShape:
    """The shape of a configured model for a tokenizer of `vocabulary_size` ids and slots of `sequence_length` tokens.

    Raises UserError where the preset is unknown or the numbers do not fit together.
    """
    preset = find_preset(config.preset)
    heads = config.heads or preset.heads
    padded = -(-vocabulary_size // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE
    shape = ModelShape(
        preset=config.preset,
        layers=config.layers or preset.layers,
        hidden=config.hidden or preset.hidden,
        heads=heads,
        kv_groups=config.kv_groups or heads,
        ffn=config.ffn or preset.ffn,
        vocabulary_size=config.vocabulary_size or padded,
        sequence_length=sequence_length,
    )
    _check(shape, vocabulary_size)
    return shape


def _check(shape: ModelShape, vocabulary_size: int) -> None:
    if shape.hidden % shape.heads:
        raise UserError(
            f"model.hidden = {shape.hidden} cannot be divided among model.heads = {shape.heads}: every head needs the same width. "
            f"Choose a number of heads that divides {shape.hidden}."
        )
    if shape.head_width % 2:
        raise UserError(
            f"model.hidden = {shape.hidden} over model.heads = {shape.heads} gives heads of width {shape.head_width}; rotary positions "
            f"turn pairs of channels and need an even width. Change hidden or heads."
        )
    if shape.heads % shape.kv_groups:
        raise UserError(
            f"model.heads = {shape.heads} cannot share model.kv_groups = {shape.kv_groups} key and value heads evenly. "
            f"Choose kv_groups among the divisors of {shape.heads}."
        )
    if shape.vocabulary_size < vocabulary_size:
        raise UserError(
            f"model.vocabulary_size = {shape.vocabulary_size} is smaller than the tokenizer's {vocabulary_size} ids: some tokens would have "
            f"no embedding. Leave it out (the tokenizer's size is padded to a multiple of {VOCABULARY_MULTIPLE}) or raise it."
        )
