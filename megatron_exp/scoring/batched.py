"""What can be asked of a language model, whatever runs it.

Shapes: b rows, W positions of a batch, S the model's sequence length, V its vocabulary, h its hidden size.
"""

import abc
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch

from megatron_exp.model.noise import applied_noise
from megatron_exp.scoring.batches import WIDTH_MULTIPLE, Batch, pack, padded, share
from megatron_exp.seeding import Words
from megatron_exp.stream.base import NoiseSpec

_LOGITS_PER_BATCH = 1 << 23
"""Bound on positions x vocabulary of one forward pass on CPU: 32 MiB of fp32 logits."""
_NEXT_LOGITS_PER_BATCH = 1 << 24
"""Bound on rows x vocabulary where only the last position's logits are made: 64 MiB."""


BROKEN = -1
"""Instead of token ids where a model cannot say what comes next."""


class LogLikelihoodRequest(NamedTuple):
    """log p(tokens[start:end] | tokens[:start]); 1 <= start < end <= len(tokens). lowest: share of the least likely tokens that counts."""

    tokens: np.ndarray
    start: int
    end: int
    lowest: float = 1.0

    @property
    def num_counted(self) -> int:
        """Tokens that the sum is over."""
        return max(1, int(np.ceil(self.lowest * (self.end - self.start) - 1e-9)))


class LogLikelihoods(NamedTuple):
    """Answers in the order of the requests.

    nats: float64 [n], sums of log-probabilities (<= 0). num_tokens: int64 [n]. greedy: bool [n], whether each token of the span
    is the most likely one (ties go to the lower id), which is what greedy decoding would have written.
    """

    nats: np.ndarray
    num_tokens: np.ndarray
    greedy: np.ndarray


class Reader(Protocol):
    """Reads the same rows further and further, with what it has read kept."""

    def __call__(self, tokens: np.ndarray) -> np.ndarray:
        """fp32 [b, V] logits of what follows, given the next tokens int64 [b, k]; k is 1 but for the first call."""
        ...


class TokenScores(NamedTuple):
    """Of one batch. losses: fp32 [b, W], nats of the token after each position. most_likely: bool [b, W], whether it is the argmax."""

    losses: np.ndarray
    most_likely: np.ndarray


_Generate = Callable[[Batch, list[np.ndarray]], np.ndarray]
"""From a batch and its prompts to int64 [b, num_tokens]."""
_Choose = Callable[[np.ndarray, np.ndarray, int], np.ndarray]
"""From logits [n, V], the rows [n] of a batch they belong to, and t, to the ids [n] of their tokens t."""


class BatchedScorer(abc.ABC):
    """Packs questions by length, runs them in batches of bounded size, and brings the answers back in order.

    Answers depend on the model and the questions alone: batches are the same whatever the number of processes. With several
    replicas of the model each scores every n-th batch and all get all answers, so every process asks the same questions.
    """

    def __init__(self, sequence_length: int, vocabulary_size: int, noise_dtype: torch.dtype, max_tokens: int | None = None):
        """`max_tokens` bounds the padded positions of a batch; default: by the size of the logits, at least one slot."""
        self.sequence_length = sequence_length
        self.vocabulary_size = vocabulary_size
        self.noise_dtype = noise_dtype
        self.max_tokens = max_tokens or max(sequence_length, _LOGITS_PER_BATCH // vocabulary_size)
        self.max_kept_tokens = self.max_tokens
        """Bound on rows x width of a batch whose keys and values are kept."""

    def loglikelihood(self, requests: Sequence[LogLikelihoodRequest]) -> LogLikelihoods:
        """Sum of log-probabilities of each span, given everything before it; equal sequences are run once."""
        for tokens, start, end, _ in requests:
            if not 1 <= start < end <= len(tokens):
                raise ValueError(f"a span [{start}, {end}) does not lie in {len(tokens)} tokens after a first one")
        sequences, answered_by = share([request.tokens[: request.end] for request in requests])
        asked: list[list[int]] = [[] for _ in sequences]
        for index, sequence in enumerate(answered_by):
            asked[sequence].append(index)
        nats, greedy = np.zeros(len(requests)), np.zeros(len(requests))

        def answer(batch: Batch) -> None:
            losses, most_likely = self._token_scores(padded([sequences[row] for row in batch.rows], batch.width + 1))
            for row, sequence in enumerate(batch.rows):
                for index in asked[sequence]:
                    span = slice(requests[index].start - 1, requests[index].end - 1)
                    nats[index] = -_counted(losses[row, span], requests[index]).sum(dtype=np.float64)
                    greedy[index] = most_likely[row, span].all()

        self._run([len(sequence) - 1 for sequence in sequences], answer)
        num_tokens = np.array([request.num_counted for request in requests], dtype=np.int64)
        return LogLikelihoods(self._over_replicas(nats), num_tokens, self._over_replicas(greedy).astype(bool))

    def greedy(self, prompts: Sequence[np.ndarray], num_tokens: int) -> np.ndarray:
        """int64 [n, num_tokens]: the most likely continuation of each prompt, token by token; ties go to the lower id.

        A row is BROKEN throughout where the model gave logits that are not finite.
        """

        def write(batch: Batch, chosen: list[np.ndarray]) -> np.ndarray:
            del batch
            return self._generate(chosen, num_tokens, lambda logits, rows, t: logits.argmax(axis=1))

        return self._continue(prompts, num_tokens, write)

    def least_likely(self, prompts: Sequence[np.ndarray], num_tokens: int, excluded: np.ndarray) -> np.ndarray:
        """int64 [n, num_tokens]: after each prompt the least likely token, then the least likely one after that, and so on; ties go to the lower id.

        excluded: ids that are never chosen (special tokens, rows that only pad the embedding). BROKEN rows as for `greedy`.
        """

        def lowest(logits: np.ndarray, rows: np.ndarray, t: int) -> np.ndarray:
            del rows, t
            logits = logits.copy()
            logits[:, excluded] = np.inf
            return logits.argmin(axis=1)

        def write(batch: Batch, chosen: list[np.ndarray]) -> np.ndarray:
            del batch
            return self._generate(chosen, num_tokens, lowest)

        return self._continue(prompts, num_tokens, write)

    def sample(self, prompts: Sequence[np.ndarray], num_tokens: int, temperature: float, keys: Sequence[int]) -> np.ndarray:
        """int64 [n, num_tokens]: a continuation of each prompt drawn at `temperature` > 0.

        Token t of prompt i is drawn with word t of `keys[i]` (a 64-bit key of `megatron_exp.seeding`), so a draw can be repeated
        and does not depend on the other prompts. BROKEN rows as for `greedy`.
        """
        if not temperature > 0:
            raise ValueError(f"temperature must be above 0, got {temperature}; the limit 0 is `greedy`")
        uniforms = np.stack([Words(key).uniforms(num_tokens) for key in keys]) if len(keys) else np.zeros((0, num_tokens))

        def draw(batch: Batch, chosen: list[np.ndarray]) -> np.ndarray:
            return self._generate(chosen, num_tokens, lambda logits, rows, t: drawn(logits, temperature, uniforms[batch.rows[rows], t]))

        return self._continue(prompts, num_tokens, draw)

    def slot_losses(self, tokens: np.ndarray, loss_mask: np.ndarray) -> np.ndarray:
        """float64 [n]: mean loss in nats over the unmasked tokens of each slot, NaN where all are masked.

        Args:
            tokens: int [n, S + 1], the last only a label.
            loss_mask: [n, S], 1 where the loss of a position counts.
        """
        sums = np.zeros(len(tokens))

        def answer(batch: Batch) -> None:
            losses = self._token_scores(np.asarray(tokens[batch.rows], dtype=np.int64)).losses
            sums[batch.rows] = (losses.astype(np.float64) * loss_mask[batch.rows]).sum(axis=1)

        self._run(np.full(len(tokens), tokens.shape[1] - 1), answer)
        counts = np.asarray(loss_mask, dtype=np.float64).sum(axis=1)
        return np.divide(self._over_replicas(sums), counts, out=np.full(len(tokens), np.nan), where=counts > 0)

    def embedding_gradient(self, tokens: np.ndarray, loss_mask: np.ndarray, noise: Sequence[NoiseSpec]) -> np.ndarray:
        """float64 [n]: -<g, w> / (scale |g|) for each slot, NaN where the gradient is zero.

        g is the fp32 gradient of the slot's mean loss with respect to the clean embeddings as looked up, w the noise of the row's
        spec as rounded in training. Where the model never saw w, the statistic is standard normal given g; a step on a loss
        at e + w lowers <g, w>, so a model that learnt from it gives positive values.

        Args:
            tokens: int [n, S + 1], the last only a label.
            loss_mask: [n, S].
            noise: one spec for each row.
        """
        statistics = np.zeros(len(tokens))

        def answer(batch: Batch) -> None:
            gradients = self._embedding_gradients(np.asarray(tokens[batch.rows], dtype=np.int64), np.asarray(loss_mask[batch.rows]))
            for row, gradient in zip(batch.rows, gradients, strict=True):
                statistics[row] = self._watermark_statistic(gradient, noise[row])

        self._run(np.full(len(tokens), tokens.shape[1] - 1), answer)
        return self._over_replicas(statistics)

    def _continue(self, prompts: Sequence[np.ndarray], num_tokens: int, generate: _Generate) -> np.ndarray:
        lengths = [len(prompt) + num_tokens - 1 for prompt in prompts]  # the last token written is never an input
        if any(not len(prompt) for prompt in prompts) or any(length > self.sequence_length for length in lengths):
            raise ValueError(
                f"a prompt is empty, or with {num_tokens} more tokens longer than the model's {self.sequence_length} positions"
            )
        written = np.zeros((len(prompts), num_tokens))

        def answer(batch: Batch) -> None:
            written[batch.rows] = generate(batch, [np.asarray(prompts[row]) for row in batch.rows])

        if not self._keeps:
            self._run(lengths, answer)
        else:
            # Rows are read together from the shortest prompt's end on, so longer ones spend a pass for each token they have more.
            rows = max(1, _NEXT_LOGITS_PER_BATCH // self.vocabulary_size)
            self._run(lengths, answer, pack(np.asarray(lengths), self.max_kept_tokens, self.sequence_length, rows, max(num_tokens, WIDTH_MULTIPLE)))
        return self._over_replicas(written).astype(np.int64)

    def _generate(self, prompts: list[np.ndarray], num_tokens: int, choose: _Choose) -> np.ndarray:
        """int64 [b, num_tokens] after the prompts."""
        if self._keeps:
            return self._read_on(prompts, num_tokens, choose)
        return self._read_anew(prompts, num_tokens, choose)

    def _read_on(self, prompts: list[np.ndarray], num_tokens: int, choose: _Choose) -> np.ndarray:
        """With keys and values kept: up to the end of the shortest prompt at once, then one position at a time.

        A row whose prompt goes on is given its prompt's next token, the others what they wrote.
        """
        lengths = np.array([len(prompt) for prompt in prompts])
        end = int(lengths.max()) + num_tokens
        text = padded(prompts, end)
        rows, is_broken = np.arange(len(prompts)), np.zeros(len(prompts), bool)
        read = self._reader(len(prompts), end - 1)
        first = 0
        for position in range(int(lengths.min()), end):
            logits = read(text[:, first:position])
            first = position
            writing = rows[(lengths <= position) & (position < lengths + num_tokens)]
            its_logits = logits[writing]
            is_broken[writing] |= ~np.isfinite(its_logits.max(axis=1))
            for t in np.unique(position - lengths[writing]).tolist():
                these = lengths[writing] == position - t
                text[writing[these], position] = choose(its_logits[these], writing[these], t)
        return np.where(is_broken[:, None], BROKEN, text[rows[:, None], lengths[:, None] + np.arange(num_tokens)])

    def _read_anew(self, prompts: list[np.ndarray], num_tokens: int, choose: _Choose) -> np.ndarray:
        """One forward pass for each token over the whole text so far."""
        lengths = np.array([len(prompt) for prompt in prompts])
        text = padded(prompts, int(lengths.max()) + num_tokens)
        rows, is_broken = np.arange(len(prompts)), np.zeros(len(prompts), bool)
        for t in range(num_tokens):
            logits = self._next_logits(text[:, : int(lengths.max()) + t], lengths + t - 1)
            is_broken |= ~np.isfinite(logits.max(axis=1))
            text[rows, lengths + t] = choose(logits, rows, t)
        return np.where(is_broken[:, None], BROKEN, text[rows[:, None], lengths[:, None] + np.arange(num_tokens)])

    def _watermark_statistic(self, gradient: torch.Tensor, spec: NoiseSpec) -> float:
        length, hidden = gradient.shape
        noise = applied_noise([spec], length, hidden, self.noise_dtype, gradient.device).double()
        gradient = gradient.double()
        size = float(gradient.norm())
        return -float((gradient * noise).sum()) / (spec.scale * size) if size > 0 else float("nan")

    def _run(self, lengths: Sequence[int] | np.ndarray, answer: Callable[[Batch], None], batches: list[Batch] | None = None) -> None:
        replica, num_replicas = self._replica
        if batches is None:
            batches = pack(np.asarray(lengths, dtype=np.int64), self.max_tokens, self.sequence_length)
        for batch in batches[replica::num_replicas]:
            answer(batch)

    @property
    def _keeps(self) -> bool:
        """Whether this model can keep the keys and values of what it has read."""
        return False

    def _reader(self, num_rows: int, max_positions: int) -> Reader:
        """Asked for only where `_keeps`."""
        raise NotImplementedError

    @property
    def _replica(self) -> tuple[int, int]:
        """(rank, number) of this process's replica of the model."""
        return 0, 1

    def _over_replicas(self, answers: np.ndarray) -> np.ndarray:
        """Answers of all replicas; each fills its own and leaves zeros (a sum with zeros is exact)."""
        return answers

    @abc.abstractmethod
    def _token_scores(self, tokens: np.ndarray) -> TokenScores:
        """Scores of int64 [b, W + 1] token ids."""

    @abc.abstractmethod
    def _next_logits(self, tokens: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """fp32 [b, V] logits of what follows tokens[i, positions[i]], given int64 [b, W] and [b]."""

    @abc.abstractmethod
    def _embedding_gradients(self, tokens: np.ndarray, loss_mask: np.ndarray) -> torch.Tensor:
        """fp32 [b, S, h]: for each row, the gradient of its summed unmasked loss by its looked-up embeddings."""


def _counted(losses: np.ndarray, request: LogLikelihoodRequest) -> np.ndarray:
    """The losses of a span that its request asks for: all in order, or the largest."""
    return losses if request.lowest == 1.0 else np.sort(losses)[len(losses) - request.num_counted :]


def drawn(logits: np.ndarray, temperature: float, uniforms: np.ndarray) -> np.ndarray:
    """int64 [b]: a token of each row of logits [b, V], by inverting the distribution function at `uniforms` [b] in (0, 1]."""
    scaled = logits.astype(np.float64) / temperature
    weights = np.exp(scaled - scaled.max(axis=1, keepdims=True))
    cumulative = weights.cumsum(axis=1)
    return (cumulative < uniforms[:, None] * cumulative[:, -1:]).sum(axis=1)
