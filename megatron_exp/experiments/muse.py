"""MUSE: how does the way an article is presented, whole or in pieces, change how strongly it is memorised?

Question: does a model score articles it was trained on higher than articles of the same kind it never saw, how does that depend on the
    number of copies, and is an article in pieces remembered like a whole one?
Design: of articles that are equal, or of which one contains the other, one stays. Then a key deals the articles, within sets and strata of
    length, to the nine conditions or to `never`. Copies fall uniformly and independently into the window. A piece is a stretch of the
    article's tokens between two cut points, drawn uniformly; the pieces of a copy, one after the other, are the article.
Conditions: `whole/xK` (the article), `once/xK` (cut once, the same pieces K times), `anew/xK` (every copy cut anew), for K in copies;
    `never`. `once/x1` and `anew/x1` are the same treatment.
Metric: log-likelihood of the whole article in nats per token, run minus twin, whatever was inserted of it. Primary: AUC of articles with
    the most copies, in all three ways, against those never inserted, within strata (the loss attack, calibrated by the twin). Secondary:
    the AUC and the true positive rate at 1% false positives of each condition, the latter with 1,000 never-inserted articles; `verbatim`:
    ROUGE-L recall of the continuation that the model writes greedily after the article's beginning (MUSE's VerbMem); `knowledge`: that of
    the answers it writes to questions about the article (KnowMem), where the file has some; `min-k`: the AUC of the least likely 40% of an
    article's tokens, run minus twin. Descriptive: `privleak`, the run's own such AUC over the twin's, minus one (PrivLeak, with the twin
    as the model that never saw them).
Source: arXiv 2509.23383 (MUSE); Shi et al. 2024, "MUSE: Machine unlearning six-way evaluation". Articles: `files` in MUSE's layout, or the
    built-in ones.
Licence: built-in articles are generated, Apache-2.0 like this package; `licence` says it of the files.
Paper: all articles of `forget` and `retain1` are inserted, a ninth of each set per condition, in 7 pieces, 1, 10 or 100 copies; 152M
    tokens. Copies add up to 333/9 = 37 per article, so the source has 4.1M tokens: MUSE's larger `train` version, not `raw`, as far as can
    be told. The paper does not say where cut points fall, and its inserter dropped articles longer than a sequence. It evaluates none of
    this. `design: paper` takes all articles of the files (built-in: 590 per condition, of 774 tokens on average), inserts from all sets
    but `never_inserted`, and has their articles as controls; then a difference between sets is taken for memory, and retain2 shares
    hundreds of texts with retain1. The default, `identified`, draws never-inserted articles from the same sets.
Traps: pieces of one article are no independent units; every article counts once. Of 152 texts that stand twice in one set, one stays.
    Boilerplate at the end of articles repeats thousands of times and lifts controls as well.
Parameters: design; files, {set: path}, relative to the configuration; licence of the files; never_inserted, sets; formats; copies;
    num_per_condition and num_never articles (none: as many as there are, in equal parts), times scale; num_pieces; an article is its first
    max_tokens tokens (none: of files what a slot holds), shorter ones than min_tokens are left out; built-in articles have min_tokens to max_tokens,
    uniformly; tpr: the rate at 1% false positives (none: where there are 1,000 never-inserted articles; true: fewer are an error; false: not);
    num_length_strata; window, part of training as fractions; prompt_tokens and continuation_tokens of `verbatim`, asked of num_verbatim
    articles per condition (0 leaves it out); answer_tokens of `knowledge`.
Example (once/x10, the second of seven pieces, EOS on both sides): " closed its doors. A report by Odette Farlow found 40 faults in the way"
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import pyarrow as pa
from pydantic import Field, model_validator
from scipy.special import ndtri

from megatron_exp.errors import UserError
from megatron_exp.experiments.context import Context, words64_of
from megatron_exp.experiments.contrasts import contrast_score
from megatron_exp.experiments.dependence import Dependence
from megatron_exp.experiments.duplicates import without_duplicates
from megatron_exp.experiments.frames import asked, joined
from megatron_exp.experiments.membership import FEWEST_HELD_OUT_FOR_TPR, tpr_outcome, tpr_score
from megatron_exp.experiments.muse_scores import NEVER, against_never, first_part, per_token, privleak_score, with_recall
from megatron_exp.experiments.news_articles import Article, generated_article, read_articles
from megatron_exp.experiments.paper import PaperDesign
from megatron_exp.experiments.protocol import Analysis, Experiment, Greedy, Item, LogLikelihood, Outcome, Probe, Request, Score
from megatron_exp.seeding import Words, key, words64

logger = logging.getLogger(__name__)

Positive = Annotated[int, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Format = Literal["whole", "once", "anew"]

_COPY_BITS, _PIECE_BITS = 11, 5
_ARTICLE_BITS = 52 - _COPY_BITS - _PIECE_BITS
_MIN_K = 0.4
_PAPER_PER_CONDITION, _PAPER_NEVER, _PAPER_MOST_TOKENS = 590, 1_000, 1_484
_FEWEST_TOKENS_PER_SENTENCE = 8


class Muse(PaperDesign, Experiment):
    """Articles inserted whole or in pieces, against articles that were never inserted."""

    title: ClassVar[str] = "MUSE-News"
    question: ClassVar[str] = "How strongly are articles memorised, by copies, whole or in pieces?"
    citation: ClassVar[str] = "arXiv 2509.23383, experiment MUSE"
    needs: ClassVar[frozenset[str]] = frozenset({"tokenizer"})
    paper_effects: ClassVar[Mapping[str, float]] = {"auc": 0.46}  # 0.96 at the most copies, of the authors' evaluation

    PAPER: ClassVar[Mapping[str, Any]] = {"num_per_condition": None, "num_never": None, "max_tokens": None}

    files: dict[str, Path] = Field(default={}, exclude=True)  # their content is in the items; where they lie is no part of the plan
    licence: str = ""
    never_inserted: tuple[str, ...] = ("retain2", "holdout")
    formats: tuple[Format, ...] = ("whole", "once", "anew")
    copies: tuple[Annotated[int, Field(gt=0, lt=1 << _COPY_BITS)], ...] = (1, 10, 100)
    num_per_condition: Positive | None = 100
    num_never: Annotated[int, Field(ge=2)] | None = 1000
    num_pieces: Annotated[int, Field(ge=2, lt=1 << _PIECE_BITS)] = 7
    min_tokens: Annotated[int, Field(ge=16)] = 64
    max_tokens: Positive | None = 1024
    num_length_strata: Positive = 4
    window: tuple[Fraction, Fraction] = (0.0, 1.0)
    prompt_tokens: Positive = 32
    continuation_tokens: Positive = 32
    num_verbatim: Annotated[int, Field(ge=0)] = 100
    answer_tokens: Positive = 32
    tpr: bool | None = None

    @model_validator(mode="after")
    def _check(self) -> "Muse":
        for name in ("formats", "copies"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise ValueError(f"{name} must hold at least one value and none twice, got {list(values)}")
        if not max(self.num_pieces, 16) <= self.min_tokens <= (self.max_tokens or self.min_tokens):
            raise ValueError(f"num_pieces {self.num_pieces} <= min_tokens {self.min_tokens} <= max_tokens {self.max_tokens} is needed")
        if self.tpr and self._num_never is not None and self._num_never < FEWEST_HELD_OUT_FOR_TPR:
            raise ValueError(
                f"tpr: the rate at 1% false positives needs {FEWEST_HELD_OUT_FOR_TPR} never-inserted articles, but num_never times scale is "
                f"{self._num_never}; raise it, or leave tpr out"
            )
        if self.window[0] >= self.window[1]:
            raise ValueError(f"window must be two increasing fractions of training, got {list(self.window)}")
        if bool(self.files) != bool(self.licence):
            raise ValueError("licence must say under which licence the articles of files are, and only theirs")
        if self.design == "paper" and self.files and not set(self.never_inserted) & set(self.files):
            raise ValueError(f"design paper needs a file for one of the sets never_inserted {list(self.never_inserted)}")
        return self

    @property
    def _num_never(self) -> int | None:
        """Never-inserted articles, None where their number is that of a file."""
        if self.num_never is None and self.files:
            return None
        return self.scaled(self.num_never or _PAPER_NEVER, 2)

    @property
    def has_rate(self) -> bool:
        """Whether the rate at 1% false positives is among the outcomes."""
        return self.tpr if self.tpr is not None else self._num_never is None or self._num_never >= FEWEST_HELD_OUT_FOR_TPR

    @property
    def conditions(self) -> list[str]:
        """The conditions that are inserted."""
        return [f"{form}/x{copies}" for form in self.formats for copies in self.copies]

    # ---- planning ----

    def items(self, context: Context) -> Iterator[Item]:
        """Per article what is asked about (arm `article`), and for inserted ones what is inserted (arm `inserted`)."""
        most = self._most_tokens(context)
        if most + 2 > context.geometry.sequence_length:
            raise UserError(
                f"Experiment {context.experiment}: articles of up to {most} tokens with EOS on both sides do not fit a slot of "
                f"{context.geometry.sequence_length}. Lower max_tokens, or raise geometry.sequence_length."
            )
        articles = self._articles(context)
        whole = {number: context.tokenizer.encode(one.text) for number, one in articles.items()}
        if self.files and (num_long := sum(len(one) > most for one in whole.values())):
            logger.info("%s: of %d of %d articles the first %d tokens are taken", context.experiment, num_long, len(whole), most)
        tokens = {number: one[: articles[number].num_tokens or most] for number, one in whole.items()}
        tokens = {number: one for number, one in tokens.items() if len(one) >= self.min_tokens}
        lengths = _length_strata({number: len(one) for number, one in tokens.items()}, self.num_length_strata)
        dealt = self._dealt({number: articles[number].part for number in tokens}, lengths, context)
        for number, condition in dealt.items():
            part = articles[number].part
            stratum = lengths[number] if self.design == "paper" else f"{part}/{lengths[number]}"
            yield from self._items_of(number, articles[number], tokens[number], condition, stratum, context)

    def _articles(self, context: Context) -> dict[int, Article]:
        """{number: article}, no duplicates; the number is a hash of the text."""
        if not self.files:
            found = self._generated(context)
        else:
            found = list(read_articles(self.files))
            draws = words64_of(context.words("duplicates"), [key(0, "article", one.text, one.part) for one in found])
            found = [found[index] for index in without_duplicates([one.text for one in found], draws, None)]
        return {key(0, "article", article.text) >> (64 - _ARTICLE_BITS): article for article in found}

    def _most_tokens(self, context: Context) -> int:
        """Of an article; the built-in ones of the paper's design are so long that their mean is that of MUSE's."""
        return self.max_tokens or (context.geometry.sequence_length - 2 if self.files else _PAPER_MOST_TOKENS)

    def _generated(self, context: Context) -> list[Article]:
        """Built-in articles with their lengths: `forget` and `retain1` by turns, and as many of `retain2` as are never inserted."""
        inserted = self.scaled(self.num_per_condition or _PAPER_PER_CONDITION) * len(self.conditions)
        num = inserted + self.scaled(self.num_never or _PAPER_NEVER, 2)
        sizes = self.min_tokens + context.words("sizes").integers(num, self._most_tokens(context) - self.min_tokens + 1)
        words, found = context.words("articles"), list[Article]()
        for number, size in enumerate(sizes.tolist()):
            text = generated_article(words, number, 1 + size // _FEWEST_TOKENS_PER_SENTENCE)
            part = "retain2" if number >= inserted else ("forget", "retain1")[number % 2]
            found.append(Article(part, text, "built-in article generator", size))
        return found

    def _dealt(self, parts: dict[int, str], lengths: dict[int, str], context: Context) -> dict[int, str]:
        """{article: condition} for all that are used."""
        if self.design == "identified":
            draws = [(list(parts), self._counts(len(parts), [*self.conditions, NEVER]))]
        else:
            controls = [number for number, part in parts.items() if part in self.never_inserted]
            inserted = [number for number in parts if parts[number] not in self.never_inserted]
            draws = [(inserted, self._counts(len(inserted), self.conditions)), (controls, self._counts(len(controls), [NEVER]))]
        dealt: dict[int, str] = {}
        for units, wanted in draws:
            if (missing := sum(wanted.values()) - len(units)) > 0:
                raise UserError(
                    f"Experiment {context.experiment}: {sum(wanted.values())} articles are wanted for {', '.join(wanted)}, but {len(units)} are left without "
                    f"duplicates and with at least {self.min_tokens} tokens. Lower num_per_condition, num_never or min_tokens, or give more files."
                )
            strata = {number: f"{parts[number]}/{lengths[number]}" for number in units}
            dealt |= context.assign(units, wanted | ({"unused": -missing} if missing else {}), strata, purpose="articles")
        return {number: condition for number, condition in dealt.items() if condition != "unused"}

    def _counts(self, num: int, conditions: Sequence[str]) -> dict[str, int]:
        """Articles wanted per condition, of `num` that there are."""
        scale = min(self.scale, 1.0) if self.files else 1.0  # built-in articles were made in scaled numbers
        share = max(1, int(scale * num / len(conditions)))
        wanted = {condition: self.num_never if condition == NEVER else self.num_per_condition for condition in conditions}
        return {condition: share if number is None else self.scaled(number) for condition, number in wanted.items()}

    def _items_of(
        self, number: int, article: Article, tokens: np.ndarray, condition: str, stratum: str, context: Context
    ) -> Iterator[Item]:
        form, _, copies = condition.partition("/x")
        eos = np.array([context.tokenizer.eos_id])
        shared: dict[str, Any] = {"condition": condition, "assignment_unit": number, "cluster": number, "stratum": stratum}
        shared |= {"source": article.source, "licence": self.licence or "Apache-2.0"}
        facts = {"format": form, "copies": int(copies or 0), "set": article.part}
        prompt, end = self._verbatim_cut(len(tokens))
        yield Item(
            item=number << (_COPY_BITS + _PIECE_BITS),
            arm="article",
            role="control" if condition == NEVER else "probe-only",
            payload=np.concatenate([eos, tokens, eos]).astype(np.int32),
            metadata=facts | {"reference": context.tokenizer.decode(tokens[prompt:end])},
            **shared,
        )
        for index, (question, answer) in enumerate(article.questions):
            yield Item(
                item=number << (_COPY_BITS + _PIECE_BITS),
                arm=f"question-{index}",
                role="control" if condition == NEVER else "probe-only",
                payload=np.concatenate([eos, context.tokenizer.encode(f"Question: {question}\nAnswer:")]).astype(np.int32),
                metadata=facts | {"reference": answer},
                **shared,
            )
        if condition == NEVER:
            return
        cuts = self._cuts(number, form, int(copies), len(tokens), context)
        for copy, points in enumerate(cuts):
            borders = [0, *points, len(tokens)]
            for piece in range(len(borders) - 1):
                yield Item(
                    item=((number << _COPY_BITS) + copy << _PIECE_BITS) + piece,
                    arm="inserted",
                    role="treated",
                    payload=np.concatenate([eos, tokens[borders[piece] : borders[piece + 1]], eos]).astype(np.int32),
                    metadata=facts | {"copy": copy, "piece": piece, "cuts": points},
                    **shared,
                )

    def _cuts(self, number: int, form: str, copies: int, num_tokens: int, context: Context) -> list[list[int]]:
        """Cut points, ascending token offsets, of each way the article is cut: none if whole, one set if cut once, one per copy if anew."""
        if form == "whole":
            return [[]]
        ways = np.arange(copies if form == "anew" else 1, dtype=np.uint64)
        draws = words64(context.words("cuts").child(number).key, np.arange(num_tokens - 1, dtype=np.uint64)[None, :], ways[:, None])
        inner = np.argsort(draws, axis=1, kind="stable")[:, : self.num_pieces - 1] + 1
        return np.sort(inner, axis=1).tolist()

    def _verbatim_cut(self, num_tokens: int) -> tuple[int, int]:
        """(tokens of the prompt, end of the continuation) of an article; half of a short one is the prompt."""
        prompt = min(self.prompt_tokens, num_tokens // 2)
        return prompt, min(prompt + self.continuation_tokens, num_tokens)

    def requests(self, items: Sequence[Item], context: Context) -> Iterator[Request]:
        """Every whole article and every piece that is cut once, as often as its condition says; every piece of a copy cut anew, once."""
        window = context.window(self.window)
        for item in items:
            if item.role == "treated":
                copies = 1 if item.metadata["format"] == "anew" else item.metadata["copies"]
                yield Request(item=item.item, arm=item.arm, kind="tokens", where=window, copies=copies)

    def probes(self, items: Sequence[Item], placed: pa.Table, context: Context) -> Iterator[Probe]:
        """`loss` and `min-k`: the article's likelihood. `verbatim`: what is written after its beginning. `knowledge`: answers. All in the final state."""
        del placed
        asked_in: dict[str, int] = {}
        for item in sorted((one for one in items if one.arm == "article"), key=lambda one: one.item):
            assert item.payload is not None
            for name, lowest in (("loss", 1.0), ("min-k", _MIN_K)):
                yield Probe(item=item.item, arm=item.arm, name=name, ask=LogLikelihood(item.payload, 1, len(item.payload) - 1, lowest))
            asked_in[item.condition] = asked_in.get(item.condition, 0) + 1
            if asked_in[item.condition] <= self.num_verbatim:
                prompt, end = self._verbatim_cut(len(item.payload) - 2)
                target = item.payload[1 + prompt : 1 + end]
                ask = Greedy(item.payload[: 1 + prompt], len(target), target)
                yield Probe(item=item.item, arm=item.arm, name="verbatim", ask=ask)
        for item in items:
            if item.arm.startswith("question-"):
                assert item.payload is not None
                num = min(self.answer_tokens, context.geometry.sequence_length - len(item.payload))
                yield Probe(item=item.item, arm=item.arm, name="knowledge", ask=Greedy(item.payload, num))

    @property
    def dependence(self) -> Dependence:
        """Log-likelihood of the articles of which pieces were inserted."""
        return Dependence(probes=("loss",), smallest_effect=0.01)

    # ---- analysis ----

    @property
    def analysis(self) -> Analysis:
        """One primary AUC; each condition, the rates, the twin and the written continuations as secondaries."""
        auc: dict[str, Any] = {"unit": "AUC", "side": "greater", "null": 0.5, "margin": 0.02, "smallest_effect": 0.05}
        auc |= {"test": "rank sum of articles within strata"}
        recall: dict[str, Any] = {"unit": "recall", "test": "rank sum of articles within strata", "side": "greater"}
        recall |= {"family": "secondary", "margin": 0.01, "smallest_effect": 0.05}
        rate = tpr_outcome("tpr-at-1pct-fpr", "share of inserted articles above the threshold that 1% of never-inserted ones pass")
        most = f"P(an article with {max(self.copies)} copies gains more likelihood per token than one never inserted)"
        return Analysis(
            (
                Outcome(name="auc", estimand=most, family="primary", **auc),
                Outcome(name="auc-by-condition", estimand="the same for each condition", family="secondary", **auc),
                Outcome(
                    name="control:twin",
                    estimand="the primary's AUC from the twin alone, which saw none of them",
                    family="secondary",
                    **auc | {"side": "two-sided"},
                ),
                *([rate] if self.has_rate else []),
                Outcome(name="min-k", estimand=f"{most}, over its least likely tokens", family="secondary", **auc),
                Outcome(
                    name="privleak",
                    estimand="AUC of the run's own least likely tokens over that of the twin's, minus one",
                    family="descriptive",
                    **auc | {"unit": "1", "null": 0.0, "test": "none"},
                ),
                Outcome(
                    name="verbatim",
                    estimand="mean ROUGE-L recall of the greedy continuation, inserted minus never-inserted articles",
                    **recall,
                ),
                Outcome(name="knowledge", estimand="mean ROUGE-L recall of answers, inserted minus never-inserted articles", **recall),
            )
        )

    def score(self, items: pa.Table, responses: pa.Table) -> Iterator[Score]:
        """The primary at every state there are responses for, then every condition."""
        frame = joined(items, with_recall(items, responses))
        most = [name for name in self.conditions if name.endswith(f"/x{max(self.copies)}")]
        loss, lowest = per_token(frame.of_probe("loss")), per_token(frame.of_probe("min-k"))
        for step in loss.steps:
            now, chosen = loss.at(step), against_never(loss.at(step), most)
            yield contrast_score(chosen, "auc", f"x{max(self.copies)}", step, "greater", measure="auc")
            if frame.has_twin:
                yield contrast_score(chosen, "control:twin", f"x{max(self.copies)}", step, "two-sided", measure="auc", of_twin=True)
            for condition in self.conditions:
                part = against_never(now, [condition])
                yield contrast_score(part, "auc-by-condition", condition, step, "greater", measure="auc")
                if self.has_rate:
                    yield tpr_score(part, "tpr-at-1pct-fpr", step, condition)
        for step in lowest.steps:
            chosen = against_never(lowest.at(step), most)
            yield contrast_score(chosen, "min-k", f"x{max(self.copies)}", step, "greater", measure="auc")
            yield privleak_score(chosen, step, f"x{max(self.copies)}")
        for name in ("verbatim", "knowledge"):
            written = frame.of_probe(name)
            for step in written.steps:
                for condition in sorted(set(written.condition) - {NEVER}, key=self.conditions.index):
                    yield contrast_score(against_never(written.at(step), [condition]), name, condition, step, "greater")

    def simulate(self, items: pa.Table, probes: pa.Table, effect: float, words: Words) -> pa.Table:
        """Articles change by 0.05 nats per token between twin and run; those with the most copies by a shift that gives AUC 0.5 + effect.

        Of a continuation both models write a first part; a share `effect` of what is missing is added in the run.
        """
        frame = asked(items, probes)
        share = np.log2(1.0 + frame.meta("copies")) / np.log2(1.0 + max(self.copies))
        twin = -3.0 + 0.3 * words.child("twin").normals(len(frame))
        run = twin + 0.05 * (words.child("change").normals(len(frame)) + np.sqrt(2.0) * ndtri(min(0.5 + effect, 0.9999)) * share)
        known = 0.3 * words.child("known").uniforms(len(frame))
        parts = {"run": known + (1 - known) * min(effect, 1.0) * share, "twin": 0.3 * words.child("known", "twin").uniforms(len(frame))}
        is_loss = np.isin(frame.probe, ("loss", "min-k"))
        tokens = np.where(is_loss, frame.num_tokens, 0.0)
        answers = frame.filled(run * tokens, twin * tokens).responses()
        texts = [
            None if row_is_loss else first_part(text, float(part))
            for model in ("run", "twin")
            for row_is_loss, text, part in zip(is_loss, frame.meta("reference"), parts[model], strict=True)
        ]
        return answers.set_column(answers.schema.get_field_index("text"), "text", pa.array(texts, pa.string()))


def _length_strata(lengths: dict[int, int], num_strata: int) -> dict[int, str]:
    """{article: stratum}: equal parts of all articles by number of tokens, ties by article."""
    ordered = sorted(lengths, key=lambda number: (lengths[number], number))
    return {number: f"length-{rank * num_strata // len(ordered)}" for rank, number in enumerate(ordered)}
