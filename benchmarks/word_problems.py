"""How fast word problems are drawn, written and checked step by step, by number of operations.

Usage: python benchmarks/word_problems.py [--problems N]

Goal: 2,000 problems/s on 2 cores; this uses one.
"""

import argparse

from measuring import seconds, show

from megatron_exp.experiments.igsm_check import check_solution
from megatron_exp.experiments.igsm_draws import draws_of
from megatron_exp.experiments.igsm_problem import draw_problem
from megatron_exp.experiments.igsm_text import write
from megatron_exp.seeding import Words


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--problems", type=int, default=3_000)
    options = parser.parse_args()
    words = Words.of(0, "benchmark", "word problems")

    def make(draw_operations, check: bool) -> None:
        for draws in draws_of(words, 0, options.problems):
            written = write(draw_problem(draws, draw_operations(draws)))
            assert written and (not check or check_solution(written.problem, written.solution).is_right)

    # As for training: the smaller of two draws on 1..15, folded into 1..10.
    mixed = lambda draws: 1 + min(draws.below(15), draws.below(15)) % 10  # noqa: E731
    rates = {"drawn_and_checked": seconds(lambda: make(mixed, True)), "drawn_only": seconds(lambda: make(mixed, False))}
    for operations in (1, 5, 10):
        rates[f"of_{operations}_operations"] = seconds(lambda operations=operations: make(lambda draws: operations, True))
    show("word problems", goal_per_second=2_000, **{f"{name}_per_second": round(options.problems / time) for name, time in rates.items()})


if __name__ == "__main__":
    main()
