"""A prompt and what should follow it, as tokens: where the target begins is read from the text, not from the length of the prompt alone."""

from typing import NamedTuple

import numpy as np

from megatron_exp.errors import UserError
from megatron_exp.experiments.context import TokenizerLike


class Cloze(NamedTuple):
    """tokens: int32 ids of prompt, one space and target. The target is tokens[start:], with the space where the tokenizer puts it there."""

    tokens: np.ndarray
    start: int


def cloze(tokenizer: TokenizerLike, prompt: str, target: str) -> Cloze:
    """The tokens of `prompt` and `target` with one space between them, whatever white space they came with.

    A tokenizer joins the space and the first letters of the target to one token, and a prompt that ends in a space has other last tokens alone than before a
    target; so the length of the encoded prompt is no place to cut. Cut is before the first token that holds a letter of the target. Raises
    UserError where that token also holds the end of the prompt, or the tokenizer does not give the target back.
    """
    prompt, target = prompt.rstrip(), target.strip()
    tokens = tokenizer.encode(f"{prompt} {target}")
    whole = tokenizer.decode(tokens)
    if not target or not whole.endswith(target):
        raise UserError(
            f"The tokenizer changes the target {target!r} after {prompt!r} to {whole[-len(target) - 8 :]!r}. Ask for another target."
        )
    border = len(whole) - len(target)
    start = 0
    for num in range(1, len(tokens)):
        before = tokenizer.decode(tokens[:num])
        if len(before) > border:
            break
        if whole.startswith(before):
            start = num
    between = whole[len(tokenizer.decode(tokens[:start])) : border]
    if start == 0 or between.strip():
        raise UserError(
            f"The tokenizer joins the end of {prompt!r} and the beginning of {target!r} to one token, so the target's probability alone does not exist. "
            "Word the query differently."
        )
    return Cloze(np.asarray(tokens, np.int32), start)
