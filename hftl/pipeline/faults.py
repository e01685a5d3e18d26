"""Seek the faults of a recipe that need the source's features, for `hftl check`."""

from hftl.analysis.label_faults import LABEL_CHECKS
from hftl.analysis.source_faults import READING_CHECKS, examine_rows
from hftl.config.recipe import Recipe
from hftl.finetune.context import ExperimentContext
from hftl.train.facts import CheckFacts

SOURCE_CHECKS = (*READING_CHECKS, *LABEL_CHECKS)


def add_source_faults(recipe: Recipe, context: ExperimentContext, facts: CheckFacts) -> CheckFacts:
    """Return the preflight's facts with the faults that features of a sample of rows show."""
    examined = examine_rows(recipe, context)
    if examined is None:
        return facts
    findings = [finding for check in SOURCE_CHECKS for finding in check(examined)]
    count, rows = len(examined.rows), len(context.prepared.rows["train"])
    sample = f"all {count}" if count == rows else f"{count} of {rows}"
    return facts.model_copy(
        update={
            "findings": [*facts.findings, *findings],
            "warnings": [*facts.warnings, *(finding.sentence for finding in findings)],
            "examined": f"faults sought on {sample} rows of train, other readings on "
            f"{examined.read_rows}",
        }
    )
