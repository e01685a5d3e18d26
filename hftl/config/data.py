"""Define the section `data` of a recipe: the tables, the task and the splits."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Discriminator, Field, Tag, model_validator

from hftl.config.section import MAX_SEED, Section, find_repeated, name_by_label

Task = Literal["classification", "multi-label", "regression", "token-classification"]
BadRowsRule = Literal["refuse", "skip"]


class Table(Section):
    """Locate a dataset: a file, a folder, `package:<import name>/<path>` or a Hub id."""

    path: str = Field(min_length=1)
    format: Literal["csv", "jsonl", "parquet", "txt", "textfolder", "imagefolder", "hub"] | None = (
        None
    )
    name: str | None = None
    split: str | None = None
    revision: str | None = None
    text: str | list[str] = "text"
    image: str = "image"
    label: str | list[str] = "label"

    @model_validator(mode="after")
    def _check_columns(self) -> Self:
        self._check_distinct_columns()
        if isinstance(self.label, list) and len(self.label) < 2:
            raise ValueError("label is one column, or for multi-label several of 0 and 1")
        return self

    def _check_distinct_columns(self) -> None:
        """Refuse more than two text columns, and a column that is named twice."""
        if isinstance(self.text, list) and not 1 <= len(self.text) <= 2:
            raise ValueError("text is one column or two (a sentence pair)")
        for key, columns in (("text", self.text_columns), ("label", self.label_columns)):
            repeated = find_repeated(columns)
            if repeated is not None:
                raise ValueError(f"{key} names the column {repeated!r} twice")

    @property
    def text_columns(self) -> list[str]:
        """Return the text columns, one or two."""
        return [self.text] if isinstance(self.text, str) else list(self.text)

    @property
    def label_columns(self) -> list[str]:
        """Return the label columns: one, or for multi-label several of 0 and 1."""
        return [self.label] if isinstance(self.label, str) else list(self.label)


class GeneralTable(Table):
    """Locate general data: one half may be replayed, the other only measures forgetting.

    The halves are by document: by the column `data.group` where the table has it, else by the
    first label with too many values for classes, else every row is a document.
    """

    label: str | list[str] | None = None  # pyright: ignore[reportIncompatibleVariableOverride]
    """Control tasks: columns whose value the nearest rows share in a good encoder."""
    rows: int = Field(default=1000, ge=20)
    """Rows that forgetting is measured on, at most; documents stay whole."""

    @model_validator(mode="after")
    def _check_columns(self) -> Self:
        self._check_distinct_columns()
        return self

    @property
    def label_columns(self) -> list[str]:
        """Return the columns of the control tasks in their order, possibly none."""
        return [] if self.label is None else super().label_columns


class Fraction(Section):
    """Take a share of train, chosen by content."""

    fraction: float = Field(gt=0, lt=1)


def _tag_split(value: Any) -> str:
    """Return the name of the class by which pydantic validates a split."""
    is_table = isinstance(value, Table) or (isinstance(value, dict) and "path" in value)
    return "Table" if is_table else "Fraction"


SplitSource = Annotated[
    Annotated[Fraction, Tag("Fraction")] | Annotated[Table, Tag("Table")], Discriminator(_tag_split)
]


DEFAULT_PROMPT = "What is in this picture?"
TEXT_PLACE = "{}"
"""Where a row's text stands in a prompt."""


class Data(Section):
    """Describe the task, its tables and how they are split."""

    task: Task | None = "classification"
    train: Table
    validation: SplitSource = Fraction(fraction=0.2)
    test: SplitSource = Fraction(fraction=0.2)
    unlabeled: Table | None = None
    general: GeneralTable | None = None
    group: str | None = None
    shots: int | None = Field(default=None, ge=1)
    seed: int = Field(default=0, ge=0, le=MAX_SEED)
    bad_rows: BadRowsRule = "refuse"
    max_length: int = Field(default=128, ge=2, le=10_000_000)
    image_size: int | None = Field(default=None, ge=1, le=4096)
    augment: Literal["none", "light"] = "none"
    max_pixels: int = Field(default=40_000_000, ge=1)
    prompt: str | None = Field(default=None, min_length=1)
    """What a vision-language source is asked of each picture; `{}` is where the row's own text
    stands, of at most `max_length` tokens. null: `DEFAULT_PROMPT`."""
    label_names: Annotated[Mapping[str, str], BeforeValidator(name_by_label)] | None = None
    """Words for labels, as {0: negative, 1: positive}. Zero-shot classification reads them and the
    card shows them; the labels stay as the table has them."""

    @model_validator(mode="before")
    @classmethod
    def _inherit_from_train(cls, tree: Any) -> Any:
        """Let the other tables take from train the keys that they do not set."""
        if not isinstance(tree, dict) or not isinstance(tree.get("train"), dict):
            return tree
        tree = dict(tree)
        inherited = {
            key: tree["train"][key]
            for key in ("format", "name", "revision", "text", "image", "label")
            if key in tree["train"]
        }
        columns = {k: v for k, v in inherited.items() if k in ("text", "image", "label")}
        for part in ("validation", "test", "unlabeled", "general"):
            if isinstance(tree.get(part), dict) and "path" in tree[part]:
                same = tree[part].get("path") == tree["train"].get("path")
                defaults = dict(inherited if same else columns)
                if part == "general":
                    # The task's label is a control task only where the user names it as one.
                    defaults.pop("label", None)
                tree[part] = defaults | tree[part]
        return tree

    @model_validator(mode="after")
    def _check_task(self) -> Self:
        tables = [t for t in (self.train, self.validation, self.test) if isinstance(t, Table)]
        for table in tables:
            if isinstance(table.label, list) and self.task != "multi-label":
                raise ValueError("several label columns are for the task multi-label")
            if len(table.text_columns) > 1 and self.task == "token-classification":
                raise ValueError("token-classification reads one column, of lists of words")
        total = sum(p.fraction for p in (self.validation, self.test) if isinstance(p, Fraction))
        if total >= 1:
            raise ValueError(f"the fractions of validation and test add up to {total:g}")
        if self.prompt is not None and self.prompt.count(TEXT_PLACE) > 1:
            raise ValueError(f"prompt has several places {TEXT_PLACE} for a text, expected one")
        if self.reads_text_beside and len(self.train.text_columns) > 1:
            raise ValueError("prompt takes one text a row, and text names two columns")
        if self.label_names and self.task in (None, "regression"):
            raise ValueError(f"label_names are words for classes, and task={self.task} has none")
        return self

    def get_label_words(self, label: str) -> str:
        """Return the words for a label: its entry of `label_names`, else the label itself, with
        spaces for underscores."""
        return (self.label_names or {}).get(label) or label.replace("_", " ").strip()

    @property
    def reads_text_beside(self) -> bool:
        """Return whether a row is a picture and a text."""
        return self.prompt is not None and TEXT_PLACE in self.prompt

    @property
    def has_labelled_general(self) -> bool:
        """Return whether general data have the task's labels, in the same column as train."""
        named = self.general is not None and self.train.label in self.general.label_columns
        return named and self.task == "classification"
