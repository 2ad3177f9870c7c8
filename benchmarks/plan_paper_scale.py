"""What planning costs at the scale of the reference run: 51.2M slots of 4096 tokens, 5M rows from a million requests.

Usage: python benchmarks/plan_paper_scale.py [--requests N] [--copies M] [--verify]

Prints one JSON line: wall and CPU seconds and the peak memory after each stage, beside the goals (25 s and 2 GiB from requests to a written table, index
and fingerprint). No corpus: payloads of 80 to 1,400 tokens are pieces of one array, since storing tokens is a matter of the disk. `--verify` adds the checks
of `megatron-exp verify` on the rows.
"""

import argparse
import json
import os
import resource
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from megatron_exp import fingerprint
from megatron_exp.experiments.protocol import Item, Noise, Request, Window
from megatron_exp.experiments.requests import copies_of
from megatron_exp.experiments.tables import Wanted, insertions_table, item_rows, table_of
from megatron_exp.inspection import verify_rows
from megatron_exp.manifest import schema
from megatron_exp.manifest.overlay_index import build_index, write_index
from megatron_exp.manifest.payloads import payload_hash
from megatron_exp.manifest.writer import write_table
from megatron_exp.placement.place import place
from megatron_exp.placement.rows import Copies
from megatron_exp.seeding import Words
from megatron_exp.stream.slot import Geometry

GEOMETRY = Geometry(sequence_length=4096, global_batch_size=512, steps=100_000)
GOAL_SECONDS, GOAL_MIB = 25, 2048
AUTHORS_PER_SECOND = 570  # insertions that the tool of arXiv 2509.23383 plans and writes, measured once on such a machine
EXPERIMENTS = ["texts", "noise"]


class NumberedPayloads:
    """Numbers payloads without looking inside: every item has its own. Writes nothing."""

    def __init__(self) -> None:
        self._numbers: dict[int, int] = {}

    def add(self, tokens: np.ndarray) -> int:
        return self._numbers.setdefault(id(tokens), len(self._numbers))


class Clock:
    """Wall seconds, CPU seconds and peak memory of every stage."""

    def __init__(self) -> None:
        self.stages: dict[str, dict[str, float]] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        wall, cpu = time.perf_counter(), time.process_time()
        yield
        self.stages[name] = {
            "seconds": round(time.perf_counter() - wall, 2),
            "cpu_seconds": round(time.process_time() - cpu, 2),
            "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        }


def wanted_of(num_requests: int, num_copies: int, text: np.ndarray) -> list[Wanted]:
    """Requests over the whole run: one in a hundred is exclusive noise, the others write 80 to 1,400 tokens."""
    lengths = 80 + Words.of(0, "benchmark", "plan").integers(num_requests, 1321)
    conditions = [f"c{number}" for number in range(30)]  # names are shared, as those that `context.assign` gives
    window = Window(0, GEOMETRY.steps)
    wanted = []
    for number in range(num_requests):
        is_noise = number >= num_requests - num_requests // 100
        payload = None if is_noise else text[number : number + int(lengths[number])]
        item = Item(item=number, condition=conditions[number % 30], role="treated", payload=payload, source="made", licence="none")
        if is_noise:
            request = Request(item=number, kind="noise", where=window, copies=1, exclusive=True, noise=Noise(0.075))
        else:
            request = Request(item=number, kind="tokens", where=window, copies=num_copies)
        wanted.append(Wanted(EXPERIMENTS[is_noise], item, request))
    return wanted


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--requests", type=int, default=1_000_000)
    parser.add_argument("--copies", type=int, default=5, help="of each request")
    parser.add_argument("--verify", action="store_true")
    options = parser.parse_args()
    place([Copies("x", "c", 0, 0, 4, False, 1, 0, 9), Copies("y", "c", 0, 0, 0, True, 1, 0, 9)], GEOMETRY)  # compiles the inner loops
    text = Words.of(0, "benchmark", "text").integers(options.requests + 1401, 100_278).astype(np.int32)
    store, clock = NumberedPayloads(), Clock()
    with clock.stage("items"):  # what experiments make; not part of the goal
        wanted = wanted_of(options.requests, options.copies, text)
    with clock.stage("placement"):
        placement = place((copies_of(*one, GEOMETRY, 0) for one in wanted), GEOMETRY)
    with clock.stage("table"):
        table = insertions_table(wanted, placement, store, GEOMETRY, 0)
        del placement
    with tempfile.TemporaryDirectory() as directory:
        with clock.stage("index"):
            write_index(Path(directory), build_index(table, EXPERIMENTS))
        with clock.stage("parquet"):
            write_table(Path(directory) / "insertions.parquet", table)
    with clock.stage("fingerprint"):
        fingerprint.of_table(table)
    planned = [cost for name, cost in clock.stages.items() if name != "items"]
    result = {
        "benchmark": "plan_paper_scale",
        "requests": options.requests,
        "rows": table.num_rows,
        "payload_tokens": int(table["length"].to_numpy().astype(np.int64).sum()),
        "seconds": round(sum(cost["seconds"] for cost in planned), 1),
        "cpu_seconds": round(sum(cost["cpu_seconds"] for cost in planned), 1),
        "peak_mib": planned[-1]["peak_mib"],
        "goal": {"seconds": GOAL_SECONDS, "peak_mib": GOAL_MIB},
        "rows_per_second": round(table.num_rows / sum(cost["seconds"] for cost in planned)),
        "times_the_authors_tool": round(table.num_rows / sum(cost["seconds"] for cost in planned) / AUTHORS_PER_SECOND),
        "cores": len(os.sched_getaffinity(0)),
        "load_before": round(os.getloadavg()[0], 2),
    }
    if options.verify:
        _verify(wanted, table, store, clock)
    print(json.dumps(result | {"stages": clock.stages}))


def _verify(wanted: list[Wanted], table, store: NumberedPayloads, clock: Clock) -> None:  # type: ignore[no-untyped-def]  # a table of Arrow
    with clock.stage("items table"):
        rows = [row for name in EXPERIMENTS for row in item_rows(name, [one.item for one in wanted if one.experiment == name], store)]
        items = table_of(rows, schema.ITEMS)
        del rows
    with clock.stage("items fingerprint"):
        fingerprint.of_table(items)
    payloads = [one.item.payload for one in wanted if one.item.payload is not None]
    hashes, lengths = [payload_hash(payload) for payload in payloads], np.array([len(payload) for payload in payloads])
    manifest = SimpleNamespace(geometry=GEOMETRY, config=SimpleNamespace(seeds=SimpleNamespace(placement=0)))
    tables = verify_rows.Tables(manifest, table, items, items, hashes, lengths)  # type: ignore[arg-type]  # what the checks use of a manifest
    for check in verify_rows.ROW_CHECKS:
        with clock.stage(f"verify {check.__name__}"):
            found = list(check(tables))
        if found:
            raise SystemExit(f"{check.__name__}: {found[0]}")


if __name__ == "__main__":
    main()
