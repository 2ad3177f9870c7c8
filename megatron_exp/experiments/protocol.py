"""The contract between an experiment and everything else.

An experiment is one file with one frozen class derived from `Experiment`. Preparation calls `items`, `requests` and
`probes` and writes what they yield into the manifest; training reads only the manifest; evaluation reads the manifest and the
responses of the models and calls `score`. So a third party's experiment needs no registry and no change elsewhere:

    params -> items -> requests -> (placement) -> probes -> (training, scoring) -> responses -> score -> results
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import numpy as np
import pyarrow as pa
from pydantic import BaseModel, ConfigDict

from megatron_exp.experiments.context import Context
from megatron_exp.experiments.dependence import FollowedInTests
from megatron_exp.experiments.windows import Window
from megatron_exp.seeding import Words

FEWEST_FORBIDDEN = 8
"""A shorter string may stand in another payload by chance."""

Role = Literal["treated", "control", "probe-only"]
Kind = Literal["tokens", "splice", "swap", "noise", "mask"]
Model = Literal["run", "twin"]


@dataclass(frozen=True)
class Span:
    """A named stretch [start, end) of an item's payload, in tokens."""

    name: str
    start: int
    end: int


@dataclass(frozen=True, eq=False, kw_only=True, slots=True)
class Item:
    """The unit under study, in one arm.

    item: stable number below 2**53, unique within the experiment together with `arm`, never a position in a file that may
    be re-ordered. role: `treated` items are inserted; `control` items are prepared the same way and never inserted;
    `probe-only` items are never inserted themselves and are asked about on behalf of treated ones (another format of an inserted
    question, an unseen prompt with a trained trigger), so they may stand on the treated side of a contrast. payload: int32 token ids exactly as inserted (EOS
    included where wanted), or None where nothing is written as tokens. assignment_unit: what the key drew a condition for. cluster:
    items that are not independent share it; statistics resample clusters. metadata: JSON-able, for the report and for `score`.
    """

    item: int
    condition: str
    role: Role
    arm: str = "main"
    payload: np.ndarray | None = None
    assignment_unit: int | None = None
    stratum: str = ""
    cluster: int | None = None
    spans: tuple[Span, ...] = ()
    source: str
    licence: str
    sensitive: bool = False
    metadata: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Strata:
    """Like Window, cut into as many equal parts as there are copies: copy r falls into part r (even in time)."""

    start: int
    end: int


@dataclass(frozen=True)
class Positions:
    """Exactly these (slot, offset) places, one for each copy; a place already taken is an error, never moved."""

    places: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Match:
    """Exactly these slots as a whole (found by a search); copies = their number."""

    slots: tuple[int, ...]


@dataclass(frozen=True)
class Batches:
    """All rows of exactly these steps; copies = steps x global batch size, in slot order."""

    steps: tuple[int, ...]


Where = Window | Strata | Positions | Match | Batches


@dataclass(frozen=True)
class Noise:
    """Gaussian perturbation of the input embeddings: standard deviation `scale` (absolute) per channel."""

    scale: float


@dataclass(frozen=True, eq=False, kw_only=True, slots=True)
class Request:
    """`copies` insertions of one item. The repetition number of a copy is its index in [0, copies).

    There is at most one request for each (item, arm, kind): that triple and the repetition name the copy. What needs several
    (pieces of unequal length of one document) is several items that share a cluster.

    kind `tokens` overwrites with the item's payload; `splice` inserts it whole between two documents of a slot, shifts what follows it right
    and lets the slot's tail fall off (its slot is its own); `swap` replaces whole slots by `source_slots` [copies] (pool or train
    slot ids); `noise` perturbs whole slots by `noise`; `mask` sets the loss mask to 0 over `mask_length` positions. exclusive: nothing else may
    touch the slot (swap and noise only).
    """

    item: int
    arm: str = "main"
    kind: Kind
    where: Where
    copies: int
    exclusive: bool = False
    source_slots: np.ndarray | None = None
    noise: Noise | None = None
    mask_length: int | None = None


@dataclass(frozen=True, eq=False)
class LogLikelihood:
    """Sum of log-probabilities of tokens[start:end] given everything before; `start` >= 1. Value in nats (<= 0).

    lowest: only this share of the span counts, its least likely tokens (Min-K%), at least one.
    """

    tokens: np.ndarray
    start: int
    end: int
    lowest: float = 1.0


@dataclass(frozen=True, eq=False)
class Greedy:
    """Greedy continuation of `prompt`; where `target` is given, value = 1.0 if the first tokens equal it, else 0.0."""

    prompt: np.ndarray
    num_tokens: int
    target: np.ndarray | None = None


@dataclass(frozen=True, eq=False)
class Sample:
    """`num_samples` continuations of `prompt` at `temperature`, seeded by key; the text of each is a response."""

    prompt: np.ndarray
    num_tokens: int
    num_samples: int
    temperature: float


@dataclass(frozen=True)
class SlotLoss:
    """Mean loss of the unmodified content of a slot (train or pool), in nats per token."""

    slot: int


@dataclass(frozen=True)
class EmbeddingGradient:
    """-<g, w> / (scale |g|), standard normal where the model never saw w.

    g: gradient of the mean loss of the slot's tokens with respect to the clean input embeddings. w: the noise of (noise_key, noise_slot) as
    rounded in training.
    """

    slot: int
    noise_key: int
    noise_slot: int
    scale: float


@dataclass(frozen=True, eq=False)
class Judge:
    """Log-likelihood, under a judge, of what a model wrote for another probe of the same item, put after `context`. Nats; 0 where nothing was written.

    A probe named `X/judge` judges the text of the `Greedy` probe X. The judge is the twin, or the model that `eval --judge` names; the answer is that of the
    model that wrote. Never live.
    """

    context: np.ndarray


Ask = LogLikelihood | Greedy | Sample | SlotLoss | EmbeddingGradient | Judge


@dataclass(frozen=True, eq=False, kw_only=True)
class Probe:
    """One question to a model about one item.

    name: unique within (item, arm); the probes of all items that mean the same thing share a name. states: model states
    (updates done) at which it is asked; empty means the final state. live: asked during training, on the model
    in memory; else from a checkpoint afterwards, whose states then become `keep_steps` of the manifest. of: the models asked.
    """

    item: int
    name: str
    ask: Ask
    arm: str = "main"
    states: tuple[int, ...] = ()
    live: bool = False
    of: frozenset[Model] = frozenset({"run", "twin"})


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """A pre-registered scalar: what is estimated, how it is tested, and what would be too small to matter.

    name: one beginning with `control:` is a check on what no insertion can have changed (the twin, untouched slots); where it shows an effect, all
    results of the experiment are void. family: `primary` outcomes of all experiments form one family (Holm); `secondary` ones one family per
    experiment; `descriptive` ones are not tested. side: direction of the alternative. null: the estimate where there is no effect (0.5 for an AUC);
    an effect is estimate - null. margin: |effect| below it counts as none, in `unit`. smallest_effect: smallest effect of interest, in `unit`.
    state: the model state it is tested in, a number or "final"; the tested rows of `score` have it as their step.
    """

    name: str
    estimand: str
    unit: str
    test: str
    side: Literal["greater", "less", "two-sided"]
    family: Literal["primary", "secondary", "descriptive"]
    margin: float
    smallest_effect: float
    null: float = 0.0
    state: str = "final"


@dataclass(frozen=True)
class Analysis:
    """The outcomes an experiment is judged by, fixed before the run and written into the manifest."""

    outcomes: tuple[Outcome, ...]


@dataclass(frozen=True, kw_only=True)
class Score:
    """One row of results: an outcome in one condition (and state). NaN where a quantity does not exist.

    estimate with interval [low, high] at `level`; `control` and `twin` are the values on the controls and of the twin;
    difference: the contrast that `p` tests. reason: why nothing could be estimated ("" where it could), never a zero.
    """

    outcome: str
    condition: str
    step: int
    n: int
    num_clusters: int
    num_unscored: int = 0
    estimate: float
    low: float = float("nan")
    high: float = float("nan")
    level: float = 0.95
    control: float = float("nan")
    twin: float = float("nan")
    difference: float = float("nan")
    p: float = float("nan")
    mde: float = float("nan")
    test: str = ""
    scope: str = "this run"
    reason: str = ""
    exploratory: bool = False


@dataclass(frozen=True, kw_only=True)
class Controller:
    """A closed loop: every `interval` steps a probe is scored on the live model, and a rule sets the number of copies in the interval that begins.

    probe: name of live probes, asked in every state that is a multiple of `interval`. asked: the items whose answers are measured. bank: treated
    items whose copies are handed out in this order, over and over. first: copies in the first interval, before anything was measured. largest: most
    copies in an interval; the plan keeps that many places in each. rule, parameters: a name of `control.rules.RULES` or
    `package.module:Class`. target: what is to be measured at the end of training. arm: of all these items.
    """

    interval: int
    probe: str
    asked: tuple[int, ...]
    bank: tuple[int, ...]
    largest: int
    target: float
    first: int = 1
    rule: str = "halve_or_double"
    parameters: Mapping[str, Any] = field(default_factory=dict)
    arm: str = "main"


@dataclass(frozen=True, eq=False)
class Forbidden:
    """A string that no other experiment may insert. tokens: int32. what: how messages call it, such as "held-out item 17".

    in_sources: nor may a slot that another experiment swaps in hold it.
    """

    tokens: np.ndarray
    what: str
    in_sources: bool = False


class Experiment(FollowedInTests, BaseModel):
    """Base class of all experiments; its fields are the keys a user may write in the YAML entry.

    Subclasses document question, design, conditions, metric with unit, source, licence and a printed example in their
    docstring, and check themselves with pydantic validators. Everything random comes from `context`, by key. Infinity and NaN are
    refused: the manifest keeps parameters as JSON, which has neither.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, validate_default=True)

    needs: ClassVar[frozenset[str]] = frozenset()
    """Subset of {"reference", "corpus", "pool", "tokenizer"}: what `context` must be able to give."""

    unusual: ClassVar[frozenset[str]] = frozenset()
    """Names of spans whose tokens are no natural text (canaries, triggers, random bytes): `plan` counts them apart."""

    title: ClassVar[str]
    question: ClassVar[str]
    citation: ClassVar[str]

    @property
    def needed(self) -> frozenset[str]:
        """`needs` of this configuration; overridden where a parameter decides."""
        return self.needs

    def kept_states(self, num_steps: int) -> tuple[int, ...]:
        """Model states this experiment will ask about, known before a reference is there: the twin keeps its checkpoints of them."""
        del num_steps
        return ()

    def forbidden(self, items: Sequence[Item]) -> Iterator[Forbidden]:
        """What no other experiment may insert, or this one's contrast would be spoiled; `plan` checks it.

        Default: the control items, EOS at their ends left out (fewer than eight tokens are no finger print of an item and are not declared), and every
        span called `trigger`.
        """
        triggers: dict[bytes, Forbidden] = {}
        for item in items:
            if item.payload is None:
                continue
            if item.role == "control" and len(inner := item.payload[1:-1]) >= FEWEST_FORBIDDEN:
                yield Forbidden(inner, f"its control item {item.item} ({item.condition})")
            for span in item.spans:
                if span.name == "trigger":
                    tokens = item.payload[span.start : span.end]
                    triggers.setdefault(tokens.tobytes(), Forbidden(tokens, f"the trigger of its item {item.item} ({item.condition})"))
        yield from triggers.values()

    def items(self, context: Context) -> Iterator[Item]:
        """All items with their arms, roles, strata and clusters; the assignment comes from `context.assign`."""
        raise NotImplementedError

    def requests(self, items: Sequence[Item], context: Context) -> Iterator[Request]:
        """The insertions wanted for the treated items."""
        raise NotImplementedError

    def probes(self, items: Sequence[Item], placed: pa.Table, context: Context) -> Iterator[Probe]:
        """What to ask; `placed` holds this experiment's rows of the insertions table (slot, step, offset, ...)."""
        raise NotImplementedError

    def controller(self, items: Sequence[Item], context: Context) -> Controller | None:
        """The closed loop of this experiment, if it has one. Items of its bank need no request."""
        del items, context
        return None

    @property
    def analysis(self) -> Analysis:
        """The pre-registered outcomes."""
        raise NotImplementedError

    def score(self, items: pa.Table, responses: pa.Table) -> Iterator[Score]:
        """Results from the experiment's rows of `items.parquet` and of the responses; pure, no model and no file."""
        raise NotImplementedError

    def simulate(self, items: pa.Table, probes: pa.Table, effect: float, words: Words) -> pa.Table:
        """Responses of a model on which the primary outcome truly has size `effect` (in its unit), with realistic noise."""
        raise NotImplementedError


def treated(items: Iterable[Item]) -> list[Item]:
    """The items that are inserted."""
    return [item for item in items if item.role == "treated"]
