"""Training a small byte-level BPE tokenizer, for corpora that come without one."""

from collections.abc import Iterable
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from megatron_exp.errors import UserError
from megatron_exp.files import write_file

EOS = "<|endoftext|>"
_NUM_BYTES = 256

# The splitting rule of the OLMo-2 tokenizer (allenai/dolma2-tokenizer, after OpenAI's cl100k_base).
_SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def train_bpe(texts: Iterable[str], vocabulary_size: int, path: Path) -> Path:
    """Train a byte-level BPE on texts and write it as a Hugging Face tokenizer.json; the same texts give the same file.

    Args:
        texts: read once, in order.
        vocabulary_size: number of ids, the EOS (`<|endoftext|>`, id 0) and 256 bytes included.
        path: the tokenizer.json to write.

    Raises:
        UserError: The vocabulary has no room for all bytes, or the texts are too few to fill it.
    """
    if vocabulary_size < _NUM_BYTES + 1:
        raise UserError(
            f"A byte-level vocabulary needs at least {_NUM_BYTES + 1} ids (256 bytes and the EOS); {vocabulary_size} were asked for. Ask for more."
        )
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(_SPLIT), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size, special_tokens=[EOS], initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() != vocabulary_size:
        raise UserError(
            f"The texts give only {tokenizer.get_vocab_size()} different tokens where a vocabulary of {vocabulary_size} was asked for. "
            "Give more text, or ask for a smaller vocabulary."
        )
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, tokenizer.to_str(pretty=False).encode())
    return path
