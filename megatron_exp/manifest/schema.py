"""Arrow schemas of all tables this project writes (docs/formats.md says what each column means)."""

import pyarrow as pa

SCHEMA_VERSION = 1

DICT = pa.dictionary(pa.int32(), pa.string())
LAYERS = {"swap": 0, "tokens": 1, "splice": 1, "noise": 2, "mask": 3}
"""Order in which insertions of a slot are applied."""

INSERTIONS = pa.schema(
    [
        ("insertion_id", pa.uint64()),
        ("experiment", DICT),
        ("condition", DICT),
        ("item", pa.uint64()),
        ("arm", DICT),
        ("repetition", pa.uint16()),
        ("layer", pa.uint8()),
        ("kind", DICT),
        ("exclusive", pa.bool_()),
        ("slot", pa.uint64()),
        ("step", pa.uint32()),
        ("row", pa.uint32()),
        ("offset", pa.uint32()),
        ("length", pa.uint32()),
        ("payload", pa.uint64()),
        ("source_slot", pa.uint64()),
        ("key", pa.uint64()),
        ("window_start", pa.uint32()),
        ("window_end", pa.uint32()),
        ("payload_hash", pa.binary(16)),
    ]
)

RESERVE = pa.schema(
    [
        ("place_id", pa.uint64()),
        ("experiment", DICT),
        ("interval", pa.uint32()),
        ("number", pa.uint16()),
        ("slot", pa.uint64()),
        ("step", pa.uint32()),
        ("row", pa.uint32()),
        ("offset", pa.uint32()),
        ("length", pa.uint32()),
    ]
)
"""Places kept free for what a controller will insert, sorted by experiment (in the manifest's order), interval and number."""

BANK = pa.schema(
    [
        ("experiment", DICT),
        ("position", pa.uint32()),
        *(INSERTIONS.field(name) for name in ("item", "condition", "arm", "payload", "length", "payload_hash")),
    ]
)
"""The items a controller hands out, in that order."""

SEGMENTS = pa.schema(
    [*INSERTIONS, ("control_step", pa.uint32()), ("probe_value", pa.float64()), ("target", pa.float64()), ("decision", pa.int64())]
)

SPANS = pa.list_(pa.struct([("name", pa.string()), ("start", pa.uint32()), ("end", pa.uint32())]))

ITEMS = pa.schema(
    [
        ("item", pa.uint64()),
        ("experiment", DICT),
        ("condition", DICT),
        ("arm", DICT),
        ("role", DICT),
        ("assignment_unit", pa.uint64()),
        ("stratum", DICT),
        ("cluster", pa.uint64()),
        ("payload", pa.uint64()),
        ("num_tokens", pa.uint32()),
        ("spans", SPANS),
        ("source", pa.string()),
        ("licence", DICT),
        ("sensitive", pa.bool_()),
        ("base_rate", pa.float32()),
        ("metadata", pa.string()),
    ]
)

PROBE_DEFINITIONS = pa.schema(
    [
        ("probe_id", pa.uint64()),
        ("experiment", DICT),
        ("item", pa.uint64()),
        ("arm", DICT),
        ("name", DICT),
        ("ask", DICT),  # loglikelihood, greedy, sample, slot_loss, embedding_gradient, judge
        ("payload", pa.uint64()),  # tokens or prompt
        ("start", pa.uint32()),
        ("end", pa.uint32()),
        ("num_tokens", pa.uint32()),  # to generate
        ("num_samples", pa.uint32()),
        ("temperature", pa.float64()),
        ("target", pa.uint64()),  # payload of the expected continuation
        ("slot", pa.uint64()),
        ("key", pa.uint64()),
        ("noise_slot", pa.uint64()),
        ("scale", pa.float64()),
        ("states", pa.list_(pa.uint32())),  # empty: the final state
        ("live", pa.bool_()),
        ("of", pa.list_(pa.string())),
    ]
)

PROBES = pa.schema(
    [
        ("attempt", pa.uint16()),
        ("step", pa.uint32()),
        ("experiment", DICT),
        ("item", pa.uint64()),
        ("arm", DICT),
        ("name", DICT),
        ("value", pa.float64()),
        ("num_tokens", pa.uint32()),
    ]
)

RESPONSES = pa.schema(
    [
        ("experiment", DICT),
        ("condition", DICT),
        ("item", pa.uint64()),
        ("arm", DICT),
        ("probe", DICT),
        ("model", DICT),  # run, twin, external
        ("step", pa.uint32()),
        ("value", pa.float64()),
        ("reason", DICT),
        ("nats", pa.float64()),
        ("num_tokens", pa.uint32()),
        ("greedy", pa.bool_()),
        ("text", pa.string()),
    ]
)

RESULTS = pa.schema(
    [
        ("experiment", DICT),
        ("condition", DICT),
        ("outcome", DICT),
        ("primary", pa.bool_()),
        ("step", pa.uint32()),
        ("n", pa.uint32()),
        ("num_clusters", pa.uint32()),
        ("num_unscored", pa.uint32()),
        ("estimate", pa.float64()),
        ("low", pa.float64()),
        ("high", pa.float64()),
        ("level", pa.float32()),
        ("control", pa.float64()),
        ("twin", pa.float64()),
        ("difference", pa.float64()),
        ("p", pa.float64()),
        ("p_corrected", pa.float64()),
        ("mde", pa.float64()),
        ("test", pa.string()),
        ("side", DICT),
        ("scope", DICT),
        ("verdict", DICT),
        ("exploratory", pa.bool_()),
    ]
)
