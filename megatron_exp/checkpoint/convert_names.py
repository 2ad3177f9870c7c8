"""Which tensors of transformers' Olmo2ForCausalLM are which of ours.

Nothing but names and the order of rows differs: rotary positions turn the same halves of a head in both. So the map holds for gradients and
moments as well as for weights.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch

from megatron_exp.checkpoint.stored import Place
from megatron_exp.model.presets import ModelShape

_LAYERS = "decoder.layers."
_LINEAR = ("self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2")


class Correspondence(NamedTuple):
    """One of our tensors (of one layer) and the tensors of transformers whose rows it holds.

    place: where it lies in a checkpoint. theirs: name to size, in the order of our rows. groups: those rows alternate in this many
    groups; a group of the attention matrix is the queries that share a key, that key, its value.
    """

    place: Place
    theirs: dict[str, tuple[int, ...]]
    groups: int = 1

    @property
    def parameter(self) -> str:
        """The name of our tensor in a model that is not divided into pipeline stages."""
        layer = "" if self.place.layer is None else f"{self.place.layer}."
        return self.place.name.replace(_LAYERS, _LAYERS + layer)

    def split(self, ours: torch.Tensor) -> dict[str, torch.Tensor]:
        """Their tensors, by name, from ours."""
        rows = [size[0] // self.groups for size in self.theirs.values()]
        pieces = ours.unflatten(0, (self.groups, -1)).split(rows, dim=1)
        return {name: piece.flatten(0, 1).contiguous() for name, piece in zip(self.theirs, pieces, strict=True)}

    def join(self, theirs: Sequence[torch.Tensor]) -> torch.Tensor:
        """Our tensor from theirs, given in the order of `theirs`."""
        if len(theirs) == 1:
            return theirs[0]
        return torch.cat([tensor.unflatten(0, (self.groups, -1)) for tensor in theirs], dim=1).flatten(0, 1)


def correspondences(shape: ModelShape) -> Iterator[Correspondence]:
    """Every weight of the model, once, in the order in which transformers names them."""
    vocabulary = (shape.vocabulary_size, shape.hidden)
    yield _of("embedding.word_embeddings.weight", {"model.embed_tokens.weight": vocabulary})
    for layer in range(shape.layers):
        for ours, theirs in _of_layer(shape).items():
            yield _of(
                _LAYERS + ours,
                {f"model.layers.{layer}.{name}": size for name, size in theirs.items()},
                groups=shape.kv_groups if "linear_qkv" in ours else 1,
                layer=layer,
                num_layers=shape.layers,
            )
    yield _of("decoder.final_layernorm.weight", {"model.norm.weight": (shape.hidden,)})
    yield _of("output_layer.weight", {"lm_head.weight": vocabulary})


def is_empty_state(name: str) -> bool:
    """Whether a checkpoint's object of this name is the state of a layer that has none to keep.

    Transformer Engine's norms and attention write one all the same, and PyTorch's do not; only linear layers have a history of FP8.
    """
    owner, is_state, _ = name.partition("._extra_state")
    return bool(is_state) and not owner.endswith(_LINEAR)


def empty_states(shape: ModelShape) -> Iterator[str]:
    """Names under which megatron's linear layers keep a state of their own in a checkpoint; without FP8 history there is nothing in it."""
    for layer in range(shape.layers):
        yield from (f"{_LAYERS}{name}._extra_state/shard_{layer}_{shape.layers}" for name in _LINEAR)


def _of(ours: str, theirs: Mapping[str, tuple[int, ...]], groups: int = 1, layer: int | None = None, num_layers: int = 1) -> Correspondence:
    first = next(iter(theirs.values()))
    size = (sum(one[0] for one in theirs.values()), *first[1:])
    return Correspondence(Place(ours, size, layer, num_layers), dict(theirs), groups)


def _of_layer(shape: ModelShape) -> dict[str, dict[str, tuple[int, ...]]]:
    """Our name within a layer to their names and sizes."""
    hidden, kv, ffn = shape.hidden, shape.kv_width, shape.ffn
    return {
        "self_attention.linear_qkv.weight": {
            "self_attn.q_proj.weight": (hidden, hidden),
            "self_attn.k_proj.weight": (kv, hidden),
            "self_attn.v_proj.weight": (kv, hidden),
        },
        "self_attention.q_layernorm.weight": {"self_attn.q_norm.weight": (hidden,)},
        "self_attention.k_layernorm.weight": {"self_attn.k_norm.weight": (kv,)},
        "self_attention.linear_proj.weight": {"self_attn.o_proj.weight": (hidden, hidden)},
        "self_attn_bda.norm.weight": {"post_attention_layernorm.weight": (hidden,)},
        "mlp.linear_fc1.weight": {"mlp.gate_proj.weight": (ffn, hidden), "mlp.up_proj.weight": (ffn, hidden)},
        "mlp.linear_fc2.weight": {"mlp.down_proj.weight": (hidden, ffn)},
        "mlp_bda.norm.weight": {"post_feedforward_layernorm.weight": (hidden,)},
    }
