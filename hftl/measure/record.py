"""Define the record: every number of a run with where it came from, in one JSON file.

`Record` is written to `record.json`, published as `hftl.json`, printed on the card, compared and
examined; `hftl schema record` prints its JSON schema. A key that is absent stays absent: only what
was set is written. Two identical runs differ in `environment` and `timings` alone, which the
record's hash leaves out.
"""

import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import PrivateAttr, ValidationError, field_serializer

from hftl.adapt.facts import AdaptedBase, AdaptStage
from hftl.analysis.advice_facts import AdviceSection
from hftl.analysis.facts import AnalysisSection
from hftl.config.recipe import Recipe
from hftl.data.facts import DataFacts, RecordPart
from hftl.errors import HftlError, RunFolderError, suggest_closest
from hftl.measure.facts import (
    AbstentionSection,
    CalibrationSection,
    ConformalSection,
    GainOutcome,
    Interval,
    SliceSection,
    ThresholdSection,
)
from hftl.measure.forgetting_facts import ForgettingSection
from hftl.runtime.run_folder import UnreadableJsonError, fingerprint, read_json, to_json
from hftl.train.facts import ArmEntry, CheckFacts, Score, ScratchSearch

SCHEMA_VERSION = 2
UNHASHED_KEYS = ("environment", "timings")
PACKAGES = ("hftl", "torch", "transformers", "peft", "accelerate", "datasets", "scikit-learn")
RECORD_FILE = "record.json"
PUBLISHED_FILE = "hftl.json"


# Scores and gains.


class Gain(RecordPart):
    """Describe how much better one arm is than another on the same items; positive is better."""

    metric: str
    value: float
    """The mean over seeds, in the metric's unit: 0.05 is five points."""
    ci95: Interval | None
    """None with one seed or one group of rows."""
    seeds: int
    p_value: float | None
    """None under 6 seeds."""
    relative_error_reduction: float | None
    outcome: GainOutcome


class BaselineGain(Gain):
    """Describe the least of the gains over several baselines."""

    baseline: str
    baselines: dict[str, Gain]


class LadderRow(RecordPart):
    """Describe one arm: its mean scores and what the own arm gains over it."""

    arm: str
    validation: float
    test: float
    sd: float | None
    """Over seeds; None with one."""
    gain_of_own: Gain | None


class ClassGain(RecordPart):
    """Compare the F1 of one class under the own arm and its baseline, means over seeds."""

    label: str
    own: float
    baseline: float
    rows: int


class ClassGains(RecordPart):
    """Compare every class with the baseline."""

    baseline: str
    rows: list[ClassGain]


class Verdict(RecordPart):
    """State whether to publish, and why."""

    decision: Literal["publish", "hold"]
    reasons: list[str]


# Source and preflight.


class SourceFacts(RecordPart):
    """Describe the source model as it was loaded."""

    model: str
    name: str
    local: bool
    published_as: str | None
    revision: str | None
    architecture: str | None
    weights_sha256: str
    prefix_tokens: int = 0
    """Tokens of a picture before those of its patches; 0 where the stock class alone pools it."""


# Adaptation.


class AdaptSection(RecordPart):
    """Describe the recipe's adaptations and what they were worth."""

    stages: list[AdaptStage]
    gain: BaselineGain | None
    """The own arm's gain over `source`, the same without adaptation."""
    outcome: str
    base: AdaptedBase | None


# The machine, and what is known once a run is pushed.


class Environment(RecordPart):
    """Name versions and hardware."""

    python: str
    platform: str
    device: str
    dtype: str
    packages: dict[str, str]
    processes: int | None = None
    """Processes that trained the arms, together or side by side."""
    threads: int | None = None
    """Of each of them on a CPU: with as many threads the same command gives the same bits."""
    energy_kwh: float | None = None
    co2_grams: float | None = None


class Published(RecordPart):
    """Name the repository that a run was pushed to."""

    repo_id: str
    license: str | None = None


class Forced(RecordPart):
    """State why a run was pushed although its verdict is hold."""

    reason: str


class Example(RecordPart):
    """Show one mistake of the published model: an image, a word in its context, or texts."""

    true: str
    said: str
    surety: float
    picture: str | None = None
    words: tuple[str, str, str] | None = None
    texts: list[str] | None = None


class WidgetScore(RecordPart):
    """Hold the probability of one class."""

    label: str
    score: float


class WidgetExample(RecordPart):
    """Show one input with the model's output on the hub's page."""

    text: str
    example_title: str
    output: list[WidgetScore]


class Record(RecordPart):
    """Hold every number of a run. Keys are those of `record.json`, also as `record["key"]`."""

    schema_version: Literal[2]
    recipe: Recipe
    source: SourceFacts
    data: DataFacts
    check: CheckFacts
    advice: AdviceSection | None = None
    """From training rows alone; null where a run was made before there was advice."""
    forward: dict[str, bool | str] | None
    """What the model takes besides the inputs: arguments of forward, or `prompt`, which the picture
    and the text of a row stand in."""
    adapt: AdaptSection | None
    metric: str | None
    """The metric that gains are measured in; null without a task, as all that follows."""
    own_arm: str | None
    arms: list[ArmEntry]
    scratch_search: ScratchSearch | None = None
    ladder: list[LadderRow]
    transfer_gain: BaselineGain | None
    test_metrics: dict[str, Score] | None = None
    """Every metric of the own arm on test, means over seeds."""
    classes: ClassGains | None = None
    slices: SliceSection | None = None
    """Null where `measure.slices` names no column."""
    calibration: CalibrationSection | None = None
    """Null for targets and for words."""
    thresholds: ThresholdSection | None = None
    """Null where `measure.thresholds` is."""
    conformal: ConformalSection | None = None
    """Null for words."""
    abstention: AbstentionSection | None = None
    """Null where an input has not exactly one class, and for fewer than 100 rows of test."""
    forgetting: ForgettingSection | None
    analysis: AnalysisSection | None = None
    """Of the source's frozen features, for the names in `measure.analyses`."""
    reload_difference: float | None = None
    weight_files: dict[str, str] | None = None
    """The sha256 of each file of the published model's tensors; null in older records."""
    verdict: Verdict
    published_seed: int | None = None
    environment: Environment
    timings: dict[str, dict[str, float]]
    published: Published | None = None
    forced: Forced | None = None
    examples: list[Example] | None = None
    widget: list[WidgetExample] | None = None
    _folder: Path | None = PrivateAttr(default=None)
    _recipe_json: dict[str, object] | None = PrivateAttr(default=None)

    @field_serializer("recipe")
    def _dump_recipe(self, recipe: Recipe) -> dict[str, object]:
        # The recipe as it was read: parsed and dumped again, 5 epochs would become 5.0.
        return self._recipe_json or {**recipe.to_dict()}

    @classmethod
    def read(cls, folder: Path | str) -> Self:
        """Read the record of a finished run folder.

        Raises:
            RunFolderError: if there is none, or it does not read; see `parse`.
        """
        folder = Path(folder)
        if not (folder / RECORD_FILE).exists():
            raise RunFolderError(
                f"{folder} is no finished run: it has no {RECORD_FILE}",
                "Give a run folder, or finish it with `hftl run`",
            )
        record = cls.read_file(folder / RECORD_FILE)
        record._folder = folder
        return record

    @classmethod
    def read_file(cls, path: Path, fix: str = "Run the same `hftl run` again to mend it") -> Self:
        """Read `record.json` or `hftl.json`.

        Raises:
            RunFolderError: naming the file, and the key where one is wrong.
        """
        try:
            tree = read_json(path)
        except (OSError, UnreadableJsonError) as error:
            raise RunFolderError(f"{path} does not read", fix) from error
        return cls.parse(tree, str(path), fix)

    @classmethod
    def parse(cls, tree: object, where: str = "record", fix: str = "Run `hftl run` again") -> Self:
        """Build a record from plain JSON.

        Raises:
            RunFolderError: naming `where` and the first key that is missing, unknown or wrong, or
                the schema version of an older record.
        """
        if not isinstance(tree, dict):
            raise RunFolderError(f"{where} is no mapping in JSON", fix)
        schema_version = tree.get("schema_version")
        if schema_version != SCHEMA_VERSION:
            # Running again would not mend it: parts of another version are never continued.
            raise RunFolderError(
                f"{where}: schema_version is {schema_version!r}, this version of hftl reads "
                f"{SCHEMA_VERSION}",
                "Use the version of hftl that made the run, or make it anew with "
                "`hftl run --restart`",
            )
        try:
            record = cls.model_validate(tree)
        except ValidationError as error:
            raise RunFolderError(f"{where}: {_describe_fault(tree, error)}", fix) from error
        except HftlError as error:
            raise RunFolderError(f"{where}: recipe: {error.what}", fix) from error
        record._recipe_json = tree["recipe"]
        return record

    @property
    def own_row(self) -> LadderRow:
        """Return the ladder's row of the own arm."""
        return next(row for row in self.ladder if row.arm == self.own_arm)

    @property
    def own_entries(self) -> list[ArmEntry]:
        """The own arm's entries, one a seed."""
        return [entry for entry in self.arms if entry.arm == self.own_arm]

    @property
    def stages(self) -> list[AdaptStage]:
        """The adaptations, one after the other; none without."""
        return self.adapt.stages if self.adapt is not None else []

    @property
    def place(self) -> str:
        """The place that a reader loads the model from: the repository, once it was pushed."""
        return self.published.repo_id if self.published is not None else "."

    def to_json(self) -> str:
        """Return the text of the file: sorted, a number that is not finite as null."""
        return to_json(self.to_dict())

    @property
    def folder(self) -> Path:
        """The run folder that the record was read from.

        Raises:
            ValueError: if it was not read from one.
        """
        if self._folder is None:
            raise ValueError("the record was not read from a run folder")
        return self._folder

    @property
    def hash(self) -> str:
        """sha256 of all that two identical runs share."""
        return fingerprint({k: v for k, v in self.to_dict().items() if k not in UNHASHED_KEYS})


def _describe_fault(tree: object, error: ValidationError) -> str:
    """Return the first finding in the words of the file: the dotted key and what is wrong."""
    first = error.errors(include_url=False)[0]
    keys: list[str] = []
    value: Any = tree
    for part in first["loc"]:
        # Between the keys pydantic names the members of a union, which the file does not hold.
        if _has_key(value, part):
            value = value[part]
            keys.append(str(part))
    if first["type"] == "missing":
        return f"{'.'.join([*keys, str(first['loc'][-1])])} is missing"
    key = ".".join(keys)
    if first["type"] == "extra_forbidden":
        return f"unknown key {key}" + (
            suggest_closest(key, list(Record.model_fields)) if len(keys) == 1 else ""
        )
    if first["type"] == "value_error":
        return f"{key}: {first['msg'].removeprefix('Value error, ')}"
    expected = first["msg"].removeprefix("Input should be ")
    return f"{key} is {repr(value)[:40]}, expected {expected}"


def _has_key(value: object, part: str | int) -> bool:
    if isinstance(value, dict):
        return part in value
    return isinstance(value, list) and isinstance(part, int) and part < len(value)


def describe_environment(
    device: str, dtype: str, energy: dict[str, float] | None = None, processes: int | None = None,
    threads: int | None = None,
) -> Environment:  # fmt: skip
    """Return versions and hardware, without host or user names.

    Args:
        device: where the arms were trained.
        dtype: what training multiplied in.
        energy: `energy_kwh` and `co2_grams`, as far as they are known.
        processes: that trained the arms.
        threads: of each of them on a CPU.
    """
    return Environment(
        python=platform.python_version(),
        platform=f"{platform.system()} {platform.machine()}",
        device=device,
        dtype=dtype,
        packages={name: version(name) for name in PACKAGES},
        processes=processes,
        threads=threads,
        **(energy or {}),
    )
