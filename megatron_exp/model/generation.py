"""Reading a text piece by piece, with the keys and values of what was read kept: the logits of each next token cost one position.

Collective over the tensor-parallel group, like everything in `megatron_exp.model.scoring`.
"""

import torch
from megatron.core.inference.contexts import StaticInferenceContext

from megatron_exp.model.build import LanguageModel
from megatron_exp.model.precision import positions_multiple
from megatron_exp.model.scoring import reading


def keeps_keys(model: LanguageModel) -> bool:
    """Whether `CachedReader` works in the model's layout.

    Not where positions are divided among ranks, as under context and sequence parallelism: one new position cannot be. Nor with several
    pipeline stages, whose idle time per token is what a second pass over the text costs as well.
    """
    return model.layout.pp_size == 1 and model.layout.cp_size == 1 and not model.layout.sequence_parallel


def cache_bytes_per_position(model: LanguageModel) -> int:
    """What the keys and values of one position of one row take on all tensor ranks together."""
    return 2 * model.shape.layers * model.shape.kv_width * model.dtype.itemsize


class CachedReader:
    """Reads rows of one length, in one go up to some position and then token by token; at most `max_positions`."""

    def __init__(self, model: LanguageModel, num_rows: int, max_positions: int):
        assert keeps_keys(model)
        self._model = model
        # A decoding step has one position for each row.
        self._num_padding = -num_rows % positions_multiple(model.fp8_recipe, model.layout)
        self._read = StaticInferenceContext(num_rows + self._num_padding, max_positions)

    def __call__(self, tokens: torch.Tensor) -> torch.Tensor:
        """fp32 [b, vocabulary] logits of what follows, given the next tokens int64 [b, k]; k is 1 but for the first call."""
        assert self._read.sequence_len_offset == 0 or tokens.shape[1] == 1
        num_rows, length = tokens.shape
        # On the first call FP8 also wants a multiple in the product of rows and positions, which the rows alone give.
        tokens = torch.nn.functional.pad(tokens.to(self._model.layout.device), (0, 0, 0, self._num_padding))
        with reading(self._model), torch.no_grad():
            self._model.chunks[0].set_is_first_microbatch()  # FP8 copies of the weights are those of an earlier state
            logits = self._model.callable_chunks[0](tokens, None, None, inference_context=self._read, runtime_gather_output=True)
        self._read.sequence_len_offset += length
        self._read.enable_decode_mode()
        return logits[:num_rows, -1].float()
