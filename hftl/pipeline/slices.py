"""Read the slices of a recipe, and refuse what cannot be measured before anything trains."""

from hftl.config.recipe import Recipe
from hftl.data.slices import SlicedColumn, read_slice_columns
from hftl.errors import DataError, HftlError
from hftl.finetune.build_context import pin_revisions
from hftl.finetune.context import ExperimentContext
from hftl.measure.metrics import Metric


def read_slices(recipe: Recipe, context: ExperimentContext) -> list[SlicedColumn]:
    """Return the slices of the test rows by each column of `measure.slices`; none without any.

    Raises:
        DataError: see `read_slice_columns`.
    """
    columns, prepared = recipe.measure.slices, context.prepared
    if not columns:
        return []
    data = pin_revisions(recipe.data, prepared.facts.hub_revisions)
    return read_slice_columns(data, prepared.rows["test"], prepared.modality, columns)


def check_slices(recipe: Recipe, context: ExperimentContext, metric: Metric) -> None:
    """Refuse slices that cannot be read, or in which the metric is not defined.

    Raises:
        DataError: naming the column or the slice.
    """
    labels = context.prepared.encode_for_metrics(context.prepared.rows["test"])
    for column in read_slices(recipe, context):
        for part in column.slices:
            try:
                metric.score(labels[part.rows], labels[part.rows])
            except HftlError as error:
                raise DataError(
                    f"measure.slices: {column.name} {part.value} ({len(part.rows)} test rows): "
                    f"{error.what}",
                    error.fix,
                ) from error
