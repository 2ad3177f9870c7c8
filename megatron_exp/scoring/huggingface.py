"""Scoring a Hugging Face causal language model with the same questions, such as AI2's released OLMo-2 checkpoints."""

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from megatron_exp.errors import UserError
from megatron_exp.scoring.batched import BatchedScorer, Reader, TokenScores

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class HuggingFaceScorer(BatchedScorer):
    """The scorer of a causal language model of the transformers library, on one device.

    The model must have been trained with the tokenizer the questions are written in; nothing here can check that.
    """

    def __init__(self, model: "PreTrainedModel", noise_dtype: torch.dtype = torch.bfloat16, max_tokens: int | None = None):
        """`noise_dtype` is what embedding noise was rounded to when the model was trained with it."""
        super().__init__(int(model.config.max_position_embeddings), int(model.config.vocab_size), noise_dtype, max_tokens)
        self._model = model.eval().requires_grad_(False)

    @classmethod
    def open(
        cls,
        name: str,
        revision: str | None = None,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
        noise_dtype: torch.dtype = torch.bfloat16,
    ) -> "HuggingFaceScorer":
        """Load a local directory, or a hub name at a pinned revision; only safetensors weights, and no code of the repository, are read.

        Raises UserError where transformers is not installed or the model cannot be read.
        """
        try:
            from transformers import AutoModelForCausalLM
        except ImportError as error:
            raise UserError(
                f"Scoring the Hugging Face model {name} needs the transformers library, which is not installed. Run `pip install 'megatron-exp[hf]'`."
            ) from error
        try:
            model = AutoModelForCausalLM.from_pretrained(
                name, revision=revision, dtype=dtype, use_safetensors=True, trust_remote_code=False
            )
        except (OSError, ValueError) as error:
            raise UserError(
                f"The Hugging Face model {name} cannot be loaded ({error}). Give a directory with config.json and safetensors weights, or a hub name."
            ) from error
        return cls(model.to(device), noise_dtype)  # type: ignore[arg-type]

    def _token_scores(self, tokens: np.ndarray) -> TokenScores:
        labels = self._tensor(tokens[:, 1:])
        with torch.no_grad():
            logits = self._logits(self._tensor(tokens[:, :-1]))
            losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view(labels.shape)
        # torch.argmax does not say which of several equal maxima it returns
        vocabulary = torch.arange(logits.shape[-1], device=logits.device)
        first = torch.where(logits == logits.amax(dim=-1, keepdim=True), vocabulary, logits.shape[-1]).amin(dim=-1)
        return TokenScores(losses.cpu().numpy(), (first == labels).cpu().numpy())

    def _next_logits(self, tokens: np.ndarray, positions: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            hidden = self._model.base_model(self._tensor(tokens), use_cache=False).last_hidden_state
            last = hidden[torch.arange(len(tokens), device=hidden.device), self._tensor(positions)]
            return self._model.get_output_embeddings()(last).float().cpu().numpy()

    @property
    def _keeps(self) -> bool:
        return True

    def _reader(self, num_rows: int, max_positions: int) -> Reader:
        del num_rows, max_positions  # its memory grows with what is read
        kept: list[Any] = [None]

        def read(tokens: np.ndarray) -> np.ndarray:
            with torch.no_grad():
                made = self._model.base_model(self._tensor(tokens), past_key_values=kept[0], use_cache=True)
                kept[0] = made.past_key_values
                return self._model.get_output_embeddings()(made.last_hidden_state[:, -1]).float().cpu().numpy()

        return read

    def _embedding_gradients(self, tokens: np.ndarray, loss_mask: np.ndarray) -> torch.Tensor:
        with torch.no_grad():
            embeddings = self._model.get_input_embeddings()(self._tensor(tokens[:, :-1]))
        embeddings.requires_grad_(True)
        with torch.enable_grad():
            logits = self._model(inputs_embeds=embeddings, use_cache=False).logits.float()
            losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), self._tensor(tokens[:, 1:]).flatten(), reduction="none")
            (gradients,) = torch.autograd.grad((losses * self._tensor(loss_mask).flatten()).sum(), embeddings)
        return gradients.float()

    def _logits(self, tokens: torch.Tensor) -> torch.Tensor:
        return self._model(tokens, use_cache=False).logits.float()

    def _tensor(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self._model.device)
