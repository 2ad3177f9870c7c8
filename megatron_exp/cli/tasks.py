"""The share of an array job that a command does: `--task I/N`, with I from 0, as SLURM counts."""

from megatron_exp.errors import UserError


def parsed_task(text: str) -> tuple[int, int]:
    """(I, N) of I/N; UserError where it is not of that form or no such task exists."""
    task, slash, num = text.partition("/")
    if not (slash and task.isdecimal() and num.isdecimal() and int(task) < int(num)):
        raise UserError(f"--task {text!r} is no task. Give I/N with I from 0 to N - 1, for example $SLURM_ARRAY_TASK_ID/$SLURM_ARRAY_TASK_COUNT.")
    return int(task), int(num)
