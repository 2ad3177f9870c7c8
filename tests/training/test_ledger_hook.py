"""What the processes of a replica read is compared before it is written."""

from types import SimpleNamespace
from typing import Any

import pytest

from megatron_exp.errors import UserError
from megatron_exp.training.hooks.ledger import refuse_disagreement

WAITING = [(3, {12: 111, 13: 222}), (4, {16: 333, 17: 444})]


def processes(*read: Any) -> Any:
    """A layout seen from process 0; (replica, content) of each process, None where it reads nothing."""

    def gather(mine: tuple[int, str]) -> list[Any]:
        return [None if one is None else (one[0], mine[1] if one[1] == "same" else one[1]) for one in read]

    return SimpleNamespace(dp_rank=0, reads_data=True, gather=gather)


def test_processes_of_one_replica_that_read_other_content_are_named() -> None:
    with pytest.raises(UserError, match=r"steps 3 to 4 the processes 0 and 2 .* different content"):
        refuse_disagreement(processes((0, "same"), (1, "a"), (0, "other"), (1, "a")), WAITING)
    with pytest.raises(UserError, match="processes 1 and 3"):
        refuse_disagreement(processes((0, "same"), (1, "a"), (0, "same"), (1, "b")), WAITING)


def test_other_replicas_and_stages_without_data_may_differ() -> None:
    refuse_disagreement(processes((0, "same"), None, (0, "same"), (1, "a"), None, (1, "a")), WAITING)
