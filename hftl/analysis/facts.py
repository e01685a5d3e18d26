"""Describe the results of the analyses: what is written to `RUN/analysis/<name>.json`."""

from typing import Literal

from pydantic import Field

from hftl.data.facts import RecordPart

Interval = tuple[float, float]


class Provenance(RecordPart):
    """Hold what an analysis was computed from: hashes of the source, its inputs and the rows."""

    weights: str
    config: str
    preprocessing: str
    max_length: int | None
    pooling: str
    data: str
    seeds: list[int]


class SiteFacts(RecordPart):
    """Name where features are read, see `LayerSite`."""

    layer: int
    pooling: str

    def __str__(self) -> str:
        return f"layer {self.layer} {self.pooling}"


class TransferScores(RecordPart):
    """Hold the scores of one source's features, more is better; null where one is not defined.

    `leep` and `nce` read the source's own classifier; `nleep` reads clusters instead, and so does
    `nce` where the source has none.
    """

    logme: float
    knn: float
    h_score: float | None = None
    leep: float | None = None
    nleep: float | None = None
    nce: float | None = None
    transrate: float | None = None
    transrate_by_class: float | None = None
    gbc: float | None = None


class RankedSource(RecordPart):
    """Describe one source: its best site, its scores there, its rank, and what it costs."""

    source: str
    architecture: str
    parameters: int
    layers: int
    best: SiteFacts
    probe: float
    """The metric, out of fold, at the best site."""
    probe_ci95: Interval
    """Over rows."""
    rank: int
    rank_ci95: tuple[int, int]
    scores: TransferScores
    pass_seconds: float
    """0 where all features were stored already."""
    score_seconds: float
    provenance: Provenance | None = None


class FailedSource(RecordPart):
    """Name a source that could not be read, and why."""

    source: str
    why: str


class SourceGap(RecordPart):
    """Compare the first two sources in the metric; positive where the first is better."""

    value: float
    ci95: Interval

    @property
    def is_clear(self) -> bool:
        """Return whether the interval excludes 0."""
        return self.ci95[0] > 0


class RankAnalysis(RecordPart):
    """Rank source models for a task before any training, the best first."""

    metric: str
    lower_is_better: bool
    rows: int
    constant: float | None = None
    """The score of the same prediction for every row, chosen in hindsight of the rows: the
    commonest class; of mean and median target the better one. Null for other tasks, and where the
    metric has none."""
    sources: list[RankedSource]
    failed: list[FailedSource]
    first_two: SourceGap | None
    """Null with one source."""


# Layers.


class Estimate(RecordPart):
    """Hold a score, the mean over seeds, with its interval over seeds and items."""

    value: float
    ci95: Interval | None


class SiteScore(RecordPart):
    """Score the two probes of one site on validation."""

    site: SiteFacts
    width: int
    probe: Estimate
    neighbours: Estimate


class SiteGap(RecordPart):
    """Compare the best site with the one that the recipe reads; more is better."""

    value: float
    ci95: Interval | None
    """One of those that hold for all sites at once: the best was chosen by these scores."""


class LayerSimilarity(RecordPart):
    """Hold the debiased CKA between all layers in one pooling."""

    pooling: str
    rows: int
    cka: list[list[float]]


class TrainedLayers(RecordPart):
    """Hold the debiased CKA of each layer before training with itself after it."""

    arm: str
    seed: int
    cka: list[float]


class ProbeAnalysis(RecordPart):
    """Probe every layer and pooling of a source model."""

    source: str
    metric: str
    lower_is_better: bool
    train_rows: int
    validation_rows: int
    seeds: int
    """Draws of training rows; 1 where every seed trains on the same."""
    sites: list[SiteScore]
    best: SiteFacts
    """The best mean on validation: of so many it looks better than it is."""
    own: SiteFacts | None
    """What the recipe's head reads; null where it is none of the sites, as behind a new pooler."""
    over_own: SiteGap | None
    similarity: LayerSimilarity
    trained: list[TrainedLayers] = []
    """Of the arms of the run that have trained the encoder, one seed each."""
    provenance: Provenance | None = None


# Few-shot curves.


class LabelCount(RecordPart):
    """Hold a number of labels a class, or a ratio of two; null is beyond all sizes."""

    value: float | None
    ci95: tuple[float | None, float | None] | None
    """Null where the rows are of one unit."""
    is_at_most: bool = False
    """The smallest size is enough, and fewer may be."""


class CurvePoint(RecordPart):
    """Score an arm at one number of labels."""

    labels: int
    score: Estimate


class CurveForecast(RecordPart):
    """Extrapolate an arm by error = a * labels^-b + c."""

    a: float
    b: float
    c: float
    labels: int
    """Twice the largest size."""
    predicted: Estimate
    held_out: Estimate
    """The largest size, predicted from the smaller ones."""
    held_out_covered: bool | None
    """Whether what came there is within noise of it; null where the rows are of one unit."""
    step: float
    next_point: LabelCount
    """Labels for a score that is better by `step` than at the largest size."""


class CurveArm(RecordPart):
    """Hold one arm's curve."""

    arm: str
    points: list[CurvePoint]
    area: float
    """The mean score over the logarithm of the labels."""
    forecast: CurveForecast | None


class LabelValue(RecordPart):
    """Compare the labels of two arms: `ratios` says, a size, how many times as many are needed."""

    arm: str
    baseline: str
    catches_up: LabelCount
    ratios: list[LabelCount]


class CurveAnalysis(RecordPart):
    """Score arms against the number of labels, the first arm that of the frozen features."""

    source: str
    metric: str
    lower_is_better: bool
    per_class: bool
    """False where labels are counted in all: targets and words."""
    sizes: list[int]
    draws: int
    test_rows: int
    arms: list[CurveArm]
    labels: list[LabelValue]
    provenance: Provenance | None = None


# Learning rates by layer.


# Distances between domains.


class DomainFacts(RecordPart):
    """Describe one set of rows: what it is compared with itself, in halves, is the null."""

    name: str
    rows: int
    """That are compared, of all."""
    pieces_per_word: float | None
    """Of texts: how many tokens the source's vocabulary needs for a word."""
    null_a_distance: float
    null_frechet: float
    null_word_divergence: float | None


class DomainPair(RecordPart):
    """Compare two sets of as many rows; an interval is over rows."""

    first: str
    second: str
    rows: int
    a_distance: Estimate
    saturated: bool
    """The A-distance is so near 2 that it no longer tells domains apart."""
    h_divergence: Estimate
    mmd: Estimate
    """The squared discrepancy."""
    mmd_p_value: float
    frechet: Estimate
    """Squared, in 16 principal components, extrapolated to infinitely many rows."""
    word_overlap: Estimate | None
    word_divergence: Estimate | None


class DistanceAnalysis(RecordPart):
    """Hold the distances between all sets of rows on the source's features."""

    source: str
    site: SiteFacts
    site_is_own: bool = True
    """Whether the recipe's head reads there."""
    domains: list[DomainFacts]
    pairs: list[DomainPair]
    left_out: list[str] = Field(default_factory=list[str])
    """Sets with too few rows to be compared, and how few, in words."""
    provenance: Provenance | None = None


# Shift between train and other sets.

ShiftOutcome = Literal["none", "label shift", "covariate shift", "both"]


class ClassShare(RecordPart):
    """Hold the share of a class in train, and in another set: estimated, and by its labels."""

    label: str
    train: float
    estimated: Estimate | None
    """By EM. Null where the probe confuses classes so much that their shares are not determined."""
    bbse: float | None = None
    """By black-box shift estimation, from predicted classes alone; null as above."""
    bbse_ci95: Interval | None = None
    """The 95 % interval; null in older analyses, too."""
    rlls: float | None = None
    """The same, with weights drawn towards those of train."""
    rlls_ci95: Interval | None = None
    labelled: float | None


class SetShift(RecordPart):
    """Compare one set with train; a p-value is that of no difference."""

    name: str
    rows: int
    shares: list[ClassShare]
    """Empty where the labels are no classes."""
    label_p_value: float | None
    """Of the shares of the predicted classes."""
    mmd: Estimate
    """The squared discrepancy, at as many rows of both."""
    mmd_p_value: float
    auc: float
    """Of a classifier of the two sets on rows that it has not seen: .5 where they are the same."""
    auc_p_value: float
    matched_p_value: float | None
    """The same with train's classes drawn in the estimated shares: what differs still is no label
    shift."""
    outcome: ShiftOutcome


class ShiftAnalysis(RecordPart):
    """Say how the classes and inputs of test and unlabelled rows differ from train's."""

    source: str
    site: SiteFacts
    train_rows: int
    separability: float | None
    """The least singular value of the probe's confusion: 1 of no error."""
    sets: list[SetShift]
    left_out: list[str] = Field(default_factory=list[str])
    """Sets with too few rows to be compared, and how few, in words."""
    provenance: Provenance | None = None


class AnalysisSection(RecordPart):
    """Hold the analyses that were made with a run; one that was not is absent."""

    probe: ProbeAnalysis | None = None
    curve: CurveAnalysis | None = None
    distance: DistanceAnalysis | None = None
    shift: ShiftAnalysis | None = None
