"""Seek the faults of a recipe that need the source's features, for `hftl check`."""

from hftl.analysis.label_faults import LABEL_CHECKS
from hftl.analysis.own_labels import check_own_labels
from hftl.analysis.readings import MIN_COST
from hftl.analysis.source_faults import add_costs, check_readings, examine_rows, multiply_fast
from hftl.analysis.tokenizer_faults import check_tokenizer
from hftl.config.recipe import Recipe
from hftl.finetune.context import ExperimentContext
from hftl.train.facts import CheckFacts, FaultKind, Finding

SOURCE_CHECKS = (check_readings, check_tokenizer, *LABEL_CHECKS, check_own_labels)

MISLEADING: set[FaultKind] = {"groups", "tokenizer"}
"""Faults under which a probe errs where it is sure, whatever the labels: it knows rows of the same
group by what they share, or reads tokens that mean nothing."""
READINGS: set[FaultKind] = {"normalization", "rescale", "channels", "casing"}
"""Faults under which it does so where they cost as much as a better reading must gain."""


def add_source_faults(recipe: Recipe, context: ExperimentContext, facts: CheckFacts) -> CheckFacts:
    """Return the preflight's facts with the faults that features of a sample of rows show.

    A fault that a checkpoint declares and a probe confirms is one finding.
    """
    with multiply_fast(context):
        return _add_source_faults(recipe, context, facts)


def _add_source_faults(recipe: Recipe, context: ExperimentContext, facts: CheckFacts) -> CheckFacts:
    examined = examine_rows(recipe, context)
    if examined is None:
        return facts
    declared = add_costs(facts.findings, examined)
    sentences = {
        before.sentence: after.sentence
        for before, after in zip(facts.findings, declared, strict=True)
    }
    priced = {finding.kind for finding in declared if finding.cost is not None}
    findings = [
        finding
        for check in SOURCE_CHECKS
        for finding in check(examined)
        if finding.cost is None or finding.kind not in priced
    ]
    later = ""
    if any(_misleads_probe(finding) for finding in (*declared, *findings)):
        findings = [finding for finding in findings if finding.kind != "label errors"]
        later = "; wrong labels are sought once the faults below are mended"
    count, rows = len(examined.rows), len(context.prepared.rows["train"])
    sample = f"all {count}" if count == rows else f"{count} of {rows}"
    warnings = [sentences.get(warning, warning) for warning in facts.warnings]
    return facts.model_copy(
        update={
            "findings": [*declared, *findings],
            "warnings": [*warnings, *(finding.sentence for finding in findings)],
            "examined": f"faults sought on {sample} rows of train, other readings on "
            f"{examined.read_rows}{later}",
        }
    )


def _misleads_probe(finding: Finding) -> bool:
    """Return whether a probe errs where it is sure, whatever the labels."""
    if finding.kind in MISLEADING:
        return True
    return finding.kind in READINGS and finding.cost is not None and finding.cost >= MIN_COST
