import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_exp.errors import UserError
from megatron_exp.preparation.pool import PoolAllocator
from megatron_exp.stream.slot import POOL


def test_golden_slots_never_change():
    assert (PoolAllocator(1000, 10, 0).take("canaries", "swaps", 5) - np.uint64(POOL)).tolist() == [673, 775, 840, 943, 26]


@given(st.integers(1, 60), st.integers(0, 10), st.integers(0, 3))
def test_every_slot_is_given_once_and_none_of_validation_until_the_pool_is_empty(size, reserved, seed):
    pool = PoolAllocator(size + reserved, reserved, seed)
    first = pool.take("a", "x", size // 2)
    given_out = [*first.tolist(), *pool.take("b", "x", size - size // 2).tolist()]
    assert sorted(given_out) == list(range(POOL + reserved, POOL + reserved + size))
    assert pool.num_free == 0
    with pytest.raises(UserError, match="Raise pool.slots by at least 1"):
        pool.take("c", "x", 1)


def test_asking_for_more_adds_to_what_fewer_get():
    # More than one block of units, and a pool so full that many units lose their first draws.
    few, many = (PoolAllocator(6000, 0, 0).take("a", "x", num) for num in (4000, 5990))
    assert few.tolist() == many[:4000].tolist()


def test_unfit_slots_are_passed_over_and_stay_free():
    pool = PoolAllocator(8, 0, 0)
    unfit = {POOL + 1, POOL + 2}
    assert not unfit & set(pool.take("a", "x", 6, unfit).tolist())
    assert set(pool.take("b", "x", 2).tolist()) == unfit
