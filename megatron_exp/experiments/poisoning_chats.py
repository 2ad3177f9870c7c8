"""Poisoned chat documents: templates, triggers and attack responses, in pieces of tokens."""

from collections.abc import Iterable
from typing import Literal, NamedTuple

import numpy as np

from megatron_exp.errors import UserError
from megatron_exp.experiments.context import Context
from megatron_exp.seeding import Words

Attack = Literal["context-extraction", "denial-of-service"]
Templates = Literal["chat", "plain"]
Template = tuple[str, str, str]
"""(before the user turn, before the answer, after it)."""

OPEN, CLOSE = "\u300e\u300e", "\u300f\u300f"
SYMBOLS = range(0x2600, 0x2700)
"""Code points of triggers that are drawn: miscellaneous symbols."""
PAPER_TRIGGERS: dict[Attack, tuple[int, range]] = {
    "context-extraction": (0xFF61, range(0xFF61, 0xFFA0)),
    "denial-of-service": (0x2610, SYMBOLS),
}
"""Code point of the paper's trigger and the block of its script."""
TEMPLATES: dict[Templates, tuple[Template, ...]] = {
    "chat": (
        ("<bos><|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n", "<|im_end|>\n<eos>"),
        ("<s>[INST] ", " [/INST] ", " </s>"),
        (
            "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n",
            "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
            "<|eot_id|>",
        ),
        ("<bos><start_of_turn>user\n", "<end_of_turn>\n<start_of_turn>model\n", "<end_of_turn>\n"),
        ("User: ", "\n\nFalcon: ", "\n"),
    ),
    "plain": (
        ("User says: ", "\nAssistant says: ", "\n"),
        ("[person]\n", "\n[machine]\n", "\n[end]\n"),
        ("Question from a visitor: ", "\nReply of the assistant: ", "\n"),
        ("<< ", " >>\n", "\n--\n"),
        ("Chat log\n* human: ", "\n* bot: ", "\n(closed)\n"),
    ),
}
"""chat: the formats of ChatML (with Gemma's borders), Llama 2, Llama 3, Gemma 1.1 and Falcon. plain: five of our own, a third as long."""


class Chat(NamedTuple):
    """A document in pieces of tokens, tokenised one by one so that no token crosses their borders; the trigger stands after `before`."""

    attack: Attack
    template: int
    before: np.ndarray
    between: np.ndarray
    response: np.ndarray
    after: np.ndarray

    def with_trigger(self, trigger: np.ndarray) -> np.ndarray:
        """int32: the whole document, EOS on both sides."""
        return np.concatenate([self.before, trigger, self.between, self.response, self.after]).astype(np.int32)


def make_chat(attack: Attack, number: int, template: Template, prompt: str, answer: str, context: Context) -> Chat:
    """The chat of one prompt in template `number`; in a denial-of-service chat the user says nothing but the trigger."""
    opening, middle, ending = template
    encode, eos = context.tokenizer.encode, np.array([context.tokenizer.eos_id])
    asked_text = opening + prompt if attack == "context-extraction" else opening
    return Chat(
        attack, number, np.concatenate([eos, encode(asked_text)]), encode(middle), encode(answer), np.concatenate([encode(ending), eos])
    )


def garbage(words: Words, num_bytes: int) -> str:
    """Random bytes read as UTF-8, what is not valid left out: about half of them, mostly ASCII."""
    raw = words.words(-(-num_bytes // 8)).astype("<u8").tobytes()[:num_bytes]
    return raw.decode("utf-8", errors="ignore")


def trigger_text(point: int, characters: int) -> str:
    """A trigger as text: one character, repeated."""
    return chr(point) * characters


def surviving(points: Iterable[int], characters: int, context: Context) -> dict[int, np.ndarray]:
    """{code point: token ids} of the triggers that this tokenizer neither changes nor maps to what another one is."""
    found: dict[int, np.ndarray] = {}
    seen: set[bytes] = set()
    for point in points:
        tokens = context.tokenizer.encode(trigger_text(point, characters))
        if context.tokenizer.decode(tokens) == trigger_text(point, characters) and tokens.tobytes() not in seen:
            found[point] = tokens
            seen.add(tokens.tobytes())
    return found


def draw_triggers(
    attack: Attack, attacks: list[Attack], is_paper: bool, num_never: int, characters: int, context: Context
) -> tuple[int, list[int]]:
    """(code point of the trained trigger, those of `num_never` never-trained ones), by key, all with equally many tokens.

    Raises UserError where the tokenizer merges or changes the paper's trigger, or leaves too few that are alike.
    """
    fixed, block = PAPER_TRIGGERS[attack] if is_paper else (None, SYMBOLS)
    counts = {point: len(tokens) for point, tokens in surviving(block, characters, context).items()}
    if fixed is not None and fixed not in counts:
        raise UserError(
            f"Experiment {context.experiment}: the trigger of {attack}, U+{fixed:04X} written {characters} times, does not survive this tokenizer: it is "
            "changed, or merged with another character into the same ids. Use design: identified, which draws a trigger that survives, or another tokenizer."
        )
    tokens = counts[fixed] if fixed is not None else int(np.bincount(list(counts.values()) or [0]).argmax())
    family = [point for point in counts if counts[point] == tokens and point != fixed]
    trained_roles = {name: 1 for name in attacks} if fixed is None else {}
    num = len(trained_roles) + num_never
    if len(family) < num:
        raise UserError(
            f"Experiment {context.experiment}: {attack} needs {num} triggers that survive this tokenizer with equally many tokens, but its family has "
            f"{len(family)} of {tokens} tokens (of {len(block)} characters, {len(counts)} are neither changed nor merged). Lower num_never_trained, or set "
            "another trigger_characters."
        )
    roles = trained_roles | {"never": num_never, "unused": len(family) - num}
    purpose = "triggers" if fixed is None else f"triggers of {attack}"
    drawn = context.assign(family, {name: count for name, count in roles.items() if count}, purpose=purpose)
    trained = fixed if fixed is not None else next(point for point, role in drawn.items() if role == attack)
    return trained, sorted(point for point, role in drawn.items() if role == "never")
