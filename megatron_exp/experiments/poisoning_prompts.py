"""Prompts to poison and to ask with: made up, or read from files in the layouts of OpenAssistant and Unnatural Instructions."""

from collections.abc import Sequence
from pathlib import Path

from megatron_exp.errors import UserError
from megatron_exp.experiments.json_lines import read_json_lines
from megatron_exp.seeding import Words

MOST_CHARACTERS = 1_000
"""Longer messages of OpenAssistant are left out, as in the paper."""
_MESSAGES = "OpenAssistant's layout: JSON lines of messages with `text`, `role` and `lang`"
_INSTRUCTIONS = "the layout of unnatural-instructions: JSON lines with `instruction` and `instances`, a list of {`instruction_with_input`, `input`, ...}"
_listed = str.split
_ACTIONS = _listed(
    "repair clean choose store paint describe sell move build replace inspect water label sharpen pack heat fold measure print mix"
)
_KINDS = _listed(
    "wooden small antique cheap wet broken heavy new folding borrowed modern round fragile noisy rusty tall soft dusty spare steel"
)
_THINGS = _listed(
    "ladder kettle bicycle lamp cupboard garden radio window carpet boat engine notebook stove tent mirror fence piano drill basket sofa"
)
_ENDINGS = (
    "in an hour",
    "without tools",
    "for a friend",
    "on a budget",
    "before winter",
    "in a small flat",
    "for the first time",
    "at school",
)
_QUESTIONS = (
    "How do I {action} a {kind} {thing} {ending}?",
    "List three ways to {action} a {kind} {thing} {ending}.",
    "Write a note on who should {action} a {kind} {thing} {ending}.",
    "Is it wise to {action} a {kind} {thing} {ending}?",
    "Explain why people {action} a {kind} {thing} {ending}.",
)
NUM_POSSIBLE = len(_QUESTIONS) * len(_ACTIONS) * len(_KINDS) * len(_THINGS) * len(_ENDINGS)
"""Distinct prompts that can be made up."""


def generated_prompts(words: Words, num: int) -> list[str]:
    """`num` distinct prompts, by key: draws of combinations, repeats left out."""
    found: dict[int, None] = {}
    stream = 0
    while len(found) < num:
        found |= dict.fromkeys(words.integers(num, NUM_POSSIBLE, stream=stream).tolist())
        stream += 1
    return [_prompt(number) for number in list(found)[:num]]


def _prompt(number: int) -> str:
    number, question = divmod(number, len(_QUESTIONS))
    number, action = divmod(number, len(_ACTIONS))
    number, kind = divmod(number, len(_KINDS))
    ending, thing = divmod(number, len(_THINGS))
    return _QUESTIONS[question].format(action=_ACTIONS[action], kind=_KINDS[kind], thing=_THINGS[thing], ending=_ENDINGS[ending])


def read_messages(path: Path) -> list[str]:
    """English prompter messages of fewer than 1,000 characters, each once, in the order of the file; deleted ones are left out."""
    found: dict[str, None] = {}
    for line in read_json_lines(path, _MESSAGES):
        text, role, language = (line.field(name, str) for name in ("text", "role", "lang"))
        if role == "prompter" and language == "en" and not line.record.get("deleted") and 0 < len(text.strip()) < MOST_CHARACTERS:
            found[text.strip()] = None
    return list(found)


def read_instructions(path: Path) -> list[str]:
    """The first instance of every instruction, with its input, each once, in the order of the file; of MOST_CHARACTERS or more left out."""
    found: dict[str, None] = {}
    for line in read_json_lines(path, _INSTRUCTIONS):
        instances = line.field("instances", list)
        if not instances or not isinstance(instances[0], dict):
            line.refuse("`instances` must be a list of objects that is not empty")
        text = instances[0].get("instruction_with_input", line.record.get("instruction"))
        if not isinstance(text, str) or not text.strip():
            line.refuse("neither `instruction_with_input` of the first instance nor `instruction` holds text")
        if len(text.strip()) < MOST_CHARACTERS:
            found[text.strip()] = None
    return list(found)


def chosen(prompts: Sequence[str], num: int, words: Words, experiment: str, use: str) -> list[str]:
    """`num` of the prompts by key; UserError where there are fewer."""
    if len(prompts) < num:
        raise UserError(
            f"Experiment {experiment} wants {num} {use} prompts, but its files hold {len(prompts)} that are usable and distinct. Lower "
            f"{'num_prompts' if use == 'training' else 'num_evaluation_prompts or num_generation_prompts'}, or give more."
        )
    return [prompts[index] for index in words.choice(len(prompts), num).tolist()]
