"""A language model small enough to check by hand: the next token depends on the last one only."""

import numpy as np
import torch

from megatron_exp.scoring.batched import BatchedScorer, TokenScores

VOCABULARY, LENGTH, HIDDEN = 12, 40, 4


class Bigram(BatchedScorer):
    """Logits of what follows token i are row i of a table [V, V]; `shapes` records the batches it was given."""

    def __init__(self, table: np.ndarray | None = None, max_tokens: int | None = None, replica: tuple[int, int] = (0, 1)):
        super().__init__(LENGTH, VOCABULARY, torch.float32, max_tokens)
        self.table = np.random.default_rng(0).normal(size=(VOCABULARY, VOCABULARY)) if table is None else table
        self.shapes: list[tuple[int, ...]] = []
        self.replica = replica

    @property
    def _replica(self) -> tuple[int, int]:
        return self.replica

    def log_probability(self, tokens: np.ndarray, start: int, end: int) -> float:
        logits = self.table - np.log(np.exp(self.table).sum(axis=1, keepdims=True))
        return float(sum(logits[tokens[i - 1], tokens[i]] for i in range(start, end)))

    def _token_scores(self, tokens: np.ndarray) -> TokenScores:
        self.shapes.append(tokens.shape)
        logits = self.table - np.log(np.exp(self.table).sum(axis=1, keepdims=True))
        losses = -logits[tokens[:, :-1], tokens[:, 1:]]
        return TokenScores(losses, self.table.argmax(axis=1)[tokens[:, :-1]] == tokens[:, 1:])

    def _next_logits(self, tokens: np.ndarray, positions: np.ndarray) -> np.ndarray:
        self.shapes.append(tokens.shape)
        return self.table[tokens[np.arange(len(tokens)), positions]]

    def _embedding_gradients(self, tokens: np.ndarray, loss_mask: np.ndarray) -> torch.Tensor:
        spread = tokens[:, :-1, None] * loss_mask[:, :, None] * np.arange(1, HIDDEN + 1)
        return torch.from_numpy(spread.astype(np.float32))


def sequences(num: int, seed: int = 1, longest: int = LENGTH) -> list[np.ndarray]:
    generator = np.random.default_rng(seed)
    return [generator.integers(0, VOCABULARY, generator.integers(2, longest)).astype(np.int32) for _ in range(num)]
