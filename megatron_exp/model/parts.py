"""The parts of a model that norms and distances are told apart by."""

PARTS = {"embedding.": "input", "decoder.": "hidden", "output_layer.": "output"}
"""First part of a parameter's name in a GPTModel, and what it is called in metrics."""


def part_of(name: str) -> str:
    """input, hidden or output; StopIteration where the name is of no parameter."""
    return next(part for start, part in PARTS.items() if name.startswith(start))
