"""The numbers of Tables 1 and 4 of arXiv 2509.23383, and why those of `design: paper` differ from them."""

from collections.abc import Mapping
from typing import Any, NamedTuple

REFERENCE_GEOMETRY = {"sequence_length": 4096, "global_batch_size": 512, "steps": 100_000}
_ROUNDING = 0.005
"""Tables give two or three digits; closer is no difference."""
_KINDS = ("iid", "ood", "unusual")


class PaperNumbers(NamedTuple):
    """Millions of tokens, as printed. reason: why the paper's design as made here has others."""

    label: str
    tokens: float
    iid: float
    ood: float
    unusual: float
    reason: str


PAPER_NUMBERS: dict[str, PaperNumbers] = {
    "knowledge_acquisition": PaperNumbers(
        "KA", 26, 0, 26, 0, "a controller decides while training how much is inserted; the plan holds the most it may ask for in reserve"
    ),
    "mathematical_reasoning": PaperNumbers(
        "MR", 180, 0, 180, 0, "500,000 documents either way; ours come from our own generator and words, so their length is another"
    ),
    "benchmark_contamination": PaperNumbers(
        "BC",
        106,
        0,
        106,
        0,
        "generated questions are shorter than the paper's (119 tokens a row, BoolQ's passages most of it); its text says 36 copies, its data 32",
    ),
    "memorization_patterns": PaperNumbers(
        "MemP",
        246,
        0,
        236,
        10,
        "30 conditions either way, though the paper says 29; generated dialogues have a mean of 290 tokens, SODA's 293 with EOS",
    ),
    "verbatim_completion": PaperNumbers(
        "MemV",
        1100,
        1100,
        0,
        0,
        "as many sequences are replaced as hold a string that the reference memorised; known once there is a reference",
    ),
    "gaussian_watermarks": PaperNumbers("GW", 209.7, 0, 0, 209, "none: 51,200 sequences; the paper rounds down in Table 4"),
    "pretraining_poisoning": PaperNumbers(
        "PP",
        235,
        0,
        204,
        31,
        "shares of 0.1% and 0.01% of all tokens are spent exactly; the paper's documents overspend by 2%, and its triggers have fewer tokens",
    ),
    "forgetting_curves": PaperNumbers("FC", 19, 19, 0, 0, "none: nine batches of 2.097M tokens are 18.9M"),
    "muse": PaperNumbers(
        "MUSE", 152, 0, 152, 0, "generated articles, 590 for each of nine conditions; EOS on both sides of every piece is counted"
    ),
    "iid_replacements": PaperNumbers("IID", 1500, 1500, 0, 0, "none: 201, 500 and 10 batches are 1.491B tokens"),
}
"""Of each type of experiment."""
TOTAL = PaperNumbers("total", 3700, 2600, 904, 250, "the sum of the differences above, and of what waits for a reference or a controller")


class Compared(NamedTuple):
    """One row of the comparison: millions of tokens here and in the paper, and the reason where they differ ("" where they do not)."""

    label: str
    ours: dict[str, float]
    paper: PaperNumbers
    reason: str


def compared(kinds: Mapping[str, Mapping[str, Any]], types: Mapping[str, str]) -> list[Compared]:
    """The experiments of a plan at the reference geometry beside the paper's.

    kinds: of the manifest, {experiment: {tokens, iid, ood, unusual}}. types: {experiment: type}. Several experiments of one type are added
    up; those of the paper that are not there have zeros.
    """
    rows, totals = [], dict.fromkeys(("tokens", *_KINDS), 0.0)
    for kind, paper in PAPER_NUMBERS.items():
        mine = [kinds[name] for name, one in types.items() if one == kind and name in kinds]
        ours = {column: sum(cell[column] for cell in mine) / 1e6 for column in totals}
        totals = {column: totals[column] + value for column, value in ours.items()}
        reason = paper.reason if mine else f"not in this plan; {paper.reason}"
        rows.append(Compared(paper.label, ours, paper, reason if _differs(ours, paper) else ""))
    return [*rows, Compared(TOTAL.label, totals, TOTAL, TOTAL.reason if _differs(totals, TOTAL) else "")]


def _differs(ours: Mapping[str, float], paper: PaperNumbers) -> bool:
    pairs = [(ours[column], getattr(paper, column)) for column in ("tokens", *_KINDS)]
    return any(abs(mine - theirs) > max(_ROUNDING * theirs, 0.5) for mine, theirs in pairs)
