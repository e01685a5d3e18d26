"""The section `retain` of a recipe: what keeps a model near the original, and how much of it."""

from typing import Annotated, Any, Literal, Self

from pydantic import Discriminator, Field, Tag, field_validator, model_validator

from hftl.config.section import Section


class KL(Section):
    """KL to the original: of what distribution, on which inputs, how much of it."""

    weight: float | Literal["auto"] = 0.1
    """auto: of a short grid the one that forgets least within one standard error of the best."""
    on: Literal["probe", "relational", "features", "mlm", "zero_shot"] = "relational"
    temperature: float = Field(default=1.0, gt=0)
    direction: Literal["forward", "reverse"] = "forward"
    inputs: Literal["target", "general", "both"] = "target"
    tau: float | None = Field(default=None, gt=0)
    """relational: cosines are divided by it; null: 0.05 for texts, 0.07 for pictures."""
    anchors: int = Field(default=256, ge=0)
    """relational: rows of the fixed bank that similarities are taken to; 0: the batch's others."""

    @field_validator("weight")
    @classmethod
    def _not_negative(cls, weight: float | str) -> float | str:
        if weight != "auto" and float(weight) < 0:
            raise ValueError(f"a weight below 0 would drive the model away, got {weight}")
        return weight


class L2SP(Section):
    """The distance of the weights to where they started."""

    weight: float = Field(default=0.01, ge=0)
    head: float = Field(default=0.0, ge=0)
    """Of the new head, whose distance is taken to zero."""
    decoupled: bool = False
    """Outside the optimizer's moments, as AdamW decays weights."""


class EWC(Section):
    """The same distance, each weight by how much the original's outputs depend on it."""

    weight: float = Field(default=1.0, ge=0)
    fisher: Literal["features", "exact", "sampled", "empirical"] = "features"
    samples: int = Field(default=256, ge=1)
    """Rows of general data that the Fisher information is taken over."""


class Replay(Section):
    """General data beside the target's in every batch."""

    ratio: float = Field(default=0.5, gt=0)
    """Rows of general data for each row of the target."""
    labelled: bool = False
    """Whether they are learnt from, too: by the column of data.general that is named as the one of
    the task's labels."""
    weight: float = Field(default=1.0, ge=0)
    """labelled: of their mean loss, beside the mean over the target's rows."""

    @model_validator(mode="after")
    def _weighs_a_loss(self) -> Self:
        if not self.labelled and "weight" in self.model_fields_set and self.weight != 1:
            raise ValueError("weight is of the loss on labelled rows, and labelled is false")
        return self


def _tag_kl(value: Any) -> str:
    return "several" if isinstance(value, list) else "one"


class Retain(Section):
    """What keeps the model near the original."""

    reference: Literal["start", "source"] = "start"
    """start: what fine-tuning starts from, after any adaptation; source: before it."""
    kl: (
        Annotated[
            Annotated[KL, Tag("one")] | Annotated[list[KL], Tag("several"), Field(min_length=1)],
            Discriminator(_tag_kl),
        ]
        | None
    ) = None
    l2sp: L2SP | None = None
    ewc: EWC | None = None
    replay: Replay | None = None
    interpolate: list[Annotated[float, Field(ge=0, le=1)]] | None = Field(
        default=None, min_length=1
    )
    """Shares of the way from the original to the trained weights, of which the best is kept."""

    @property
    def kl_terms(self) -> list[KL]:
        """The KL terms as a list."""
        if self.kl is None:
            return []
        return self.kl if isinstance(self.kl, list) else [self.kl]

    @property
    def reads_general_data(self) -> bool:
        """Whether it reads general data."""
        on_general = any(kl.inputs != "target" for kl in self.kl_terms)
        return on_general or self.ewc is not None or self.replay is not None

    @property
    def reads_general_labels(self) -> bool:
        """Whether it reads the task's labels of general data."""
        empirical = self.ewc is not None and self.ewc.fisher == "empirical"
        return empirical or (self.replay is not None and self.replay.labelled)
