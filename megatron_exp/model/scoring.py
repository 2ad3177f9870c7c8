"""Forward passes that read a model and leave it as it was: losses, next tokens, gradients by input embeddings; in any layout.

Collective: the ranks of a model replica (tensor, context and pipeline groups) call each function together with the same rows.
Data-parallel replicas are independent and may score different rows.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func

from megatron_exp.model.build import LanguageModel
from megatron_exp.model.fp8_scaling import preserved_scaling
from megatron_exp.model.loss import is_most_likely, token_losses
from megatron_exp.model.precision import positions_multiple
from megatron_exp.model.step import from_last_stage, split_batch
from megatron_exp.parallel.slices import batch_positions, embedding_positions, length_multiple


class TokenScores(NamedTuple):
    """losses: fp32 [b, S], negative log-likelihood in nats. most_likely: bool [b, S], whether the label is the argmax (ties go to the lower id)."""

    losses: torch.Tensor
    most_likely: torch.Tensor


def token_scores(model: LanguageModel, tokens: torch.Tensor) -> TokenScores:
    """Scores of tokens[:, 1:], given int64 [b, S + 1]; on every rank of the replica. S is free."""
    length = tokens.shape[1] - 1
    padded = _pad(tokens, _padded_length(model, length) + 1)
    inputs, labels, _ = split_batch(model.layout, padded, padded[:, 1:])
    group = parallel_state.get_tensor_model_parallel_group()

    def keep(logits: torch.Tensor, rows: slice) -> torch.Tensor:
        losses, _ = token_losses(logits, labels[rows], group)
        return torch.stack([losses, is_most_likely(logits, labels[rows], group)], dim=-1)

    with reading(model), torch.no_grad():
        scores = _run(model, lambda chunk, rows: chunk(inputs[rows], None, None), keep, inputs.shape)
    if scores is None:
        scores = torch.empty((*inputs.shape, 2), dtype=torch.float32, device=inputs.device)
    held = batch_positions(model.layout, padded.shape[1] - 1)
    whole = _whole(model, from_last_stage(model.layout, scores), held, sequence_parallel=False)[:, :length]
    return TokenScores(whole[..., 0], whole[..., 1] > 0)


def next_token_logits(model: LanguageModel, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """fp32 [b, vocabulary] logits of what follows tokens[i, positions[i]], given int64 [b, L] and [b]; on every rank of the replica.

    What stands right of a row's position is not seen (attention is causal), so ragged prompts are padded on the right.
    """
    padded = _pad(tokens, _padded_length(model, tokens.shape[1]))
    held = batch_positions(model.layout, padded.shape[1])
    inputs = padded.to(model.layout.device)[:, held]
    found = held[None, :] == positions.to(held.device)[:, None]  # [b, s], one hit over all context-parallel ranks

    def pick(output: torch.Tensor, rows: slice) -> torch.Tensor:
        hits, columns = found[rows].nonzero(as_tuple=True)
        picked = output.new_zeros((len(output), output.shape[2]), dtype=torch.float32)
        picked[hits] = output[hits, columns].float()
        return picked

    with reading(model), torch.no_grad():
        logits = _run(model, lambda chunk, rows: chunk(inputs[rows], None, None), pick, inputs.shape)
    if logits is None:
        logits = torch.empty((len(inputs), model.shape.vocabulary_size // model.layout.tp_size), dtype=torch.float32, device=inputs.device)
    dist.all_reduce(from_last_stage(model.layout, logits), group=parallel_state.get_context_parallel_group())
    return torch.cat(gather(logits, parallel_state.get_tensor_model_parallel_group()), dim=1)


def embedding_gradients(model: LanguageModel, tokens: torch.Tensor, loss_mask: torch.Tensor) -> torch.Tensor:
    """fp32 [b, S, hidden]: for each row, the gradient of its summed unmasked losses by its input embeddings; on every rank of the replica.

    Given int64 [b, S + 1] and [b, S]. No parameter receives a gradient. The loss is the likelihood alone, without z-loss.
    """
    length = loss_mask.shape[1]
    padded = _padded_length(model, length)
    inputs, labels, mask = split_batch(model.layout, _pad(tokens, padded + 1), _pad(loss_mask, padded))
    captured: list[torch.Tensor] = []

    def capture(module: torch.nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        del module, args
        captured.append(output.detach().requires_grad_())
        return captured[-1]

    def loss(output: torch.Tensor, rows: slice) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        total = (output[..., 0] * mask[rows]).sum()
        return total, mask[rows].sum(dtype=torch.int32), total.detach().clone()

    with reading(model), _frozen(model), contextlib.ExitStack() as hooks:
        for chunk in model.chunks:
            if chunk.pre_process:
                hooks.enter_context(contextlib.closing(_Hook(chunk.embedding.register_forward_hook(capture))))
        _schedule(model, lambda chunk, rows: chunk(inputs[rows], None, None, labels=labels[rows]), loss, inputs.shape, forward_only=False)
    held = embedding_positions(model.layout, padded)
    gradient = torch.empty((len(inputs), len(held), model.shape.hidden), device=inputs.device)
    for rows, embeddings in zip(_row_groups(model, len(inputs)), captured, strict=False):  # captured on the first stage only
        assert embeddings.grad is not None
        gradient[rows] = embeddings.grad.transpose(0, 1).float()
    if model.layout.pp_size > 1:
        group = parallel_state.get_pipeline_model_parallel_group()
        dist.broadcast(gradient, src=parallel_state.get_pipeline_model_parallel_first_rank(), group=group)
    return _whole(model, gradient, held, sequence_parallel=model.layout.sequence_parallel)[:, :length]


class _Hook:
    """A hook handle that `contextlib.closing` can remove."""

    def __init__(self, handle: torch.utils.hooks.RemovableHandle):
        self.close = handle.remove


@contextlib.contextmanager
def reading(model: LanguageModel) -> Iterator[None]:
    """Evaluation mode, without noise; the mode before and what FP8 remembers of training are restored."""
    was_training = [chunk.training for chunk in model.callable_chunks]
    model.noise.clear()
    for chunk in model.callable_chunks:
        chunk.eval()
    try:
        with preserved_scaling(model.chunks if model.precision == "fp8" else ()):
            yield
    finally:
        for chunk, training in zip(model.callable_chunks, was_training, strict=True):
            chunk.train(training)


@contextlib.contextmanager
def _frozen(model: LanguageModel) -> Iterator[None]:
    """No parameter takes part in gradients, and no gradient is reduced."""
    finalize = model.config.finalize_model_grads_func
    parameters = [parameter for chunk in model.chunks for parameter in chunk.parameters()]
    model.config.finalize_model_grads_func = None
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        model.config.finalize_model_grads_func = finalize
        for parameter in parameters:
            parameter.requires_grad_(True)


_Call = Callable[[torch.nn.Module, slice], torch.Tensor]
"""A forward pass of one part of the model over some rows of the batch."""


def _run(model: LanguageModel, call: _Call, keep: Callable[[torch.Tensor, slice], torch.Tensor], shape: torch.Size) -> torch.Tensor | None:
    """What `keep` makes of the last stage's output for one batch [b, s]; None on the other stages."""
    outputs = _schedule(model, call, keep, shape, forward_only=True)
    if not outputs:
        return None
    whole = outputs[0].new_empty((shape[0], *outputs[0].shape[1:]))
    for rows, output in zip(_row_groups(model, shape[0]), outputs, strict=True):
        whole[rows] = output
    return whole


def _row_groups(model: LanguageModel, num_rows: int) -> list[slice]:
    """The rows that go through the model together: all, or with interleaved stages one group per stage, all of one size.

    Interleaved stages take turns over as many micro-batches as there are stages. Where rows do not divide, groups overlap: some rows are
    computed twice, with the same result.
    """
    num_groups = model.layout.pp_size if model.layout.virtual_size > 1 else 1
    size = -(-num_rows // num_groups)
    starts = [min(group * size, num_rows - size) for group in range(num_groups)]
    return [slice(start, start + size) for start in starts]


def _schedule(model: LanguageModel, call: _Call, use: Callable[..., Any], shape: torch.Size, forward_only: bool) -> list[Any]:
    """Run megatron's schedule over the rows [b, s]; `use(output, rows)` is what the last stage does with an output. Its results, in order of rows."""
    groups = _row_groups(model, shape[0])

    def step(rows: Iterator[slice], chunk: torch.nn.Module) -> tuple[torch.Tensor, Callable[..., Any]]:
        these = next(rows)
        return call(chunk, these), lambda output, non_loss_data=False: use(output, these)

    return get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=[iter(groups) for _ in model.chunks],
        model=model.callable_chunks,
        num_microbatches=len(groups),
        # The schedule divides the length over context-parallel ranks for the shape of what stages send each other.
        seq_length=shape[1] * model.layout.cp_size,
        micro_batch_size=groups[0].stop - groups[0].start,
        forward_only=forward_only,
        collect_non_loss_data=forward_only,
    )


def _padded_length(model: LanguageModel, length: int) -> int:
    """The length that can be divided over ranks, and into the multiples that FP8 products need."""
    multiple = length_multiple(model.layout) * positions_multiple(model.fp8_recipe, model.layout)
    return -(-length // multiple) * multiple


def _pad(rows: torch.Tensor, length: int) -> torch.Tensor:
    """Rows [b, L] with zeros on the right; causal attention keeps them from being seen."""
    return torch.nn.functional.pad(rows, (0, length - rows.shape[1]))


def _whole(model: LanguageModel, part: torch.Tensor, held: torch.Tensor, sequence_parallel: bool) -> torch.Tensor:
    """[b, S, ...] of all positions from each rank's [b, s, ...] and the int64 [s] positions it holds."""
    groups = [parallel_state.get_tensor_model_parallel_group()] if sequence_parallel else []
    for group in [*groups, parallel_state.get_context_parallel_group()]:
        part, held = torch.cat(gather(part, group), dim=1), torch.cat(gather(held, group))
    whole = torch.empty_like(part)
    whole[:, held] = part
    return whole


def gather(part: torch.Tensor, group: dist.ProcessGroup) -> list[torch.Tensor]:
    """The tensors of all ranks of the group, which have one shape."""
    if group.size() == 1:
        return [part]
    parts = [torch.empty_like(part) for _ in range(group.size())]
    dist.all_gather(parts, part.contiguous(), group=group)
    return parts
