"""Format the results of the analyses as the tables that their commands print."""

from hftl.analysis.facts import (
    CurveAnalysis,
    CurveForecast,
    DistanceAnalysis,
    Estimate,
    Interval,
    LabelCount,
    ProbeAnalysis,
    RankAnalysis,
    SetShift,
    ShiftAnalysis,
    TrainedLayers,
)
from hftl.analysis.probe import FOLDS
from hftl.analysis.sweep_facts import PartEffect, SweepAnalysis, SweepTrial
from hftl.console import format_duration, render_table

SCORES = ("logme", "h_score", "leep", "nleep", "nce", "transrate", "gbc", "knn")


def format_number(value: float | None, digits: int = 3) -> str:
    """Return a number, or a dash where there is none."""
    return "-" if value is None else f"{value:.{digits}f}"


def format_interval(interval: Interval | None, digits: int = 3) -> str:
    """Return `[low, high]`, or a dash where there is none."""
    if interval is None:
        return "-"
    return f"[{interval[0]:.{digits}f}, {interval[1]:.{digits}f}]"


def format_rank(facts: RankAnalysis) -> str:
    """Return the ranked sources, those that failed, and whether the first is clearly the best."""
    header = [
        "source", "rank", "may be", f"probe {facts.metric}", "95 % interval", "best at",
        "parameters", "pass", "scores",
    ]  # fmt: skip
    rows = [
        [
            one.source,
            str(one.rank),
            "{}-{}".format(*one.rank_ci95),
            format_number(one.probe),
            format_interval(one.probe_ci95),
            f"{one.best} of {one.layers}",
            f"{one.parameters:,}",
            format_duration(one.pass_seconds) if one.pass_seconds else "stored",
            format_duration(one.score_seconds),
        ]
        for one in facts.sources
    ]
    absent = [
        name for name in SCORES if all(getattr(one.scores, name) is None for one in facts.sources)
    ]
    names = [name for name in SCORES if name not in absent]
    scores = [
        [one.source, *(format_number(getattr(one.scores, name)) for name in names)]
        for one in facts.sources
    ]
    read = (
        f"  {facts.rows:,} rows of train; probe: {facts.metric} at the best layer, each row by a "
        f"model of the other folds ({FOLDS}, fewer of few groups)"
    )
    notes = [f"{read}; more is better in every score"]
    if facts.lower_is_better:
        notes = [f"{read}; less is better in probe and knn"]
    if facts.constant is not None:
        notes.append(
            f"  without a source, one answer for all rows: {facts.metric} {facts.constant:.3f}"
        )
    if absent:
        why = "they score classes" if "gbc" in absent else "no source has a classifier of its own"
        notes.append(f"  not computed: {', '.join(absent)}; {why}")
    notes += [f"  not read: {one.source}: {one.why}" for one in facts.failed]
    notes += _describe_gap(facts)
    return "\n".join([render_table(header, rows), render_table(["", *names], scores), *notes])


def _describe_gap(facts: RankAnalysis) -> list[str]:
    """Say whether the first two sources can be told apart."""
    if facts.first_two is None:
        one = "one source was read" if facts.failed else "one source"
        return [f"  {one}: name others by --source MODEL; `hftl sources` lists well-known ones"]
    first, second = facts.sources[:2]
    interval = format_interval(facts.first_two.ci95)
    gap = f"{facts.first_two.value:.3f} {interval} in {facts.metric}"
    if facts.first_two.is_clear:
        return [f"  {first.source} is better than {second.source} by {gap}"]
    line = f"  {first.source} and {second.source} cannot be told apart: {gap}"
    if first.parameters > second.parameters:
        line += f"; {second.source} is the smaller"
    return [line]


def format_probe(facts: ProbeAnalysis) -> str:
    """Return both probes at every layer and pooling, and what the best gains over the recipe's."""
    header = ["pooling", "layer", "probe", "95 % interval", "neighbours"]
    rows = [
        [
            score.site.pooling, str(score.site.layer), format_number(score.probe.value),
            format_interval(score.probe.ci95), format_number(score.neighbours.value),
        ]
        for score in sorted(facts.sites, key=lambda one: (one.site.pooling, one.site.layer))
    ]  # fmt: skip
    notes = [
        f"  probe: {facts.metric} on {facts.validation_rows:,} validation rows, trained on "
        f"{facts.train_rows:,} of train, {facts.seeds} draw{'s' if facts.seeds > 1 else ''}",
        f"  best of {len(facts.sites)}, chosen on these rows: {facts.best}{_describe_own(facts)}",
        *(_describe_trained(facts, one) for one in facts.trained),
    ]
    return "\n".join([render_table(header, rows), *notes])


def _describe_trained(facts: ProbeAnalysis, one: TrainedLayers) -> str:
    """Say how alike every layer is to itself before training."""
    values = " ".join(f"{value:.2f}" for value in one.cka)
    return (
        f"  CKA of each layer ({facts.similarity.pooling}) before with after training, {one.arm} "
        f"seed {one.seed}: {values}"
    )


def _describe_own(facts: ProbeAnalysis) -> str:
    """Say how the best site compares with the one that the recipe's head reads."""
    if facts.own is None:
        return "; the recipe's head reads none of these"
    if facts.own == facts.best:
        return ", which the recipe's head reads"
    assert facts.over_own is not None
    gap = facts.over_own
    words = f"; {gap.value:+.3f} {format_interval(gap.ci95)} over {facts.own}, the recipe's own"
    clear = gap.ci95 is not None and gap.ci95[0] > 0
    return words + ("" if clear else ": not beyond noise")


def format_curve(facts: CurveAnalysis) -> str:
    """Return every arm's score a size, what labels are worth, and the forecasts."""
    unit = "labels a class" if facts.per_class else "labels"
    header = [unit]
    for arm in facts.arms:
        header += [arm.arm, "95 % interval"]
    header += [f"labels {one.baseline} needs" for one in facts.labels]
    rows = []
    for place, size in enumerate(facts.sizes):
        row = [str(size)]
        for arm in facts.arms:
            score = arm.points[place].score
            row += [format_number(score.value), format_interval(score.ci95)]
        row += [format_ratio(one.ratios[place], facts.sizes[-1] / size) for one in facts.labels]
        rows.append(row)
    notes = [
        f"  {facts.metric} on {facts.test_rows:,} test rows, {facts.draws} nested draws, the same "
        "for every arm"
    ]
    if facts.labels:
        notes.append(
            f"  labels needed: as a multiple, for the score of {facts.labels[0].arm} in that row; "
            f">: more than the {facts.sizes[-1]} tried, <=: the fewest tried are enough"
        )
    beyond = f"> {facts.sizes[-1]}"
    for one in facts.labels:
        if one.catches_up.value is None:
            notes.append(f"  {one.baseline} does not catch up with {one.arm} up to "
                         f"{facts.sizes[-1]} {unit}")  # fmt: skip
        else:
            notes.append(f"  {one.baseline} catches up with {one.arm} at "
                         f"{format_count(one.catches_up, beyond)} {unit}")  # fmt: skip
    for arm in facts.arms:
        if arm.forecast:
            notes += _describe_forecast(arm.arm, arm.forecast, unit, facts.sizes[-1])
    return "\n".join([render_table(header, rows), *notes])


def format_ratio(ratio: LabelCount, most: float) -> str:
    """Return `3.1x [2.0, 5.2]` labels; `> 4.0x` where the baseline never gets there, and `<= 0.5x`
    where its fewest are enough.

    Args:
        ratio: what to show.
        most: the ratio of the largest size to this one.
    """
    value = f"> {most:.1f}x" if ratio.value is None else f"{ratio.value:.1f}x"
    value = f"<= {value}" if ratio.is_at_most else value
    if ratio.ci95 is None or ratio.ci95[0] is None:
        return value
    low, high = (f"> {most:.1f}" if end is None else f"{end:.1f}" for end in ratio.ci95)
    return f"{value} [{low}, {high}]"


def format_count(count: LabelCount, beyond: str) -> str:
    """Return `40 [20, 80]` labels.

    Args:
        count: what to show.
        beyond: what stands for an end that no number of labels reaches.
    """

    def show(end: float | None) -> str:
        return beyond if end is None else f"{end:.0f}"

    value = f"{'<= ' if count.is_at_most else ''}{show(count.value)}"
    return value if count.ci95 is None else f"{value} [{', '.join(map(show, count.ci95))}]"


def _describe_forecast(arm: str, forecast: CurveForecast, unit: str, size: int) -> list[str]:
    """Say what twice the labels would give, and how well the largest size was foreseen."""
    ahead = f"{forecast.predicted.value:.3f} {format_interval(forecast.predicted.ci95)}"
    needed = "is out of its reach"
    if forecast.next_point.value is not None:
        needed = f"takes {format_count(forecast.next_point, 'never')}"
    outcome = {
        True: ", within noise of what came", False: ", beyond noise of what came", None: "",
    }[forecast.held_out_covered]  # fmt: skip
    return [
        f"  {arm} by its curve's shape: {ahead} at {forecast.labels} {unit}; {forecast.step:g} "
        f"better than at {size} {needed}",
        f"    checked: from the smaller sizes it foresees {forecast.held_out.value:.3f} at {size}"
        f"{outcome}",
    ]


def format_sweep(facts: SweepAnalysis) -> str:
    """Return every setting at its rungs, every part's effect, and what the best by layer gains."""
    shares = sorted({rung.share for trial in facts.trials for rung in trial.rungs})
    header = ["learning rates", "mean below head", *(f"{share:.0%} of epochs" for share in shares)]
    rows = []
    for trial in sorted(facts.trials, key=lambda trial: _order_trial(facts, trial)):
        scores = {rung.share: rung for rung in trial.rungs}
        cells = [
            "" if share not in scores
            else "diverged" if scores[share].score is None
            else format_number(scores[share].score)
            for share in shares
        ]  # fmt: skip
        rows.append([trial.setting.name, f"{trial.mean_rate:.2g}", *cells])
    factors = sorted({effect.factor for effect in facts.parts})
    by_part = {(effect.part, effect.factor): effect for effect in facts.parts}
    names = list(dict.fromkeys(effect.part for effect in facts.parts))
    parts = [
        [name, *(_format_effect(by_part[name, factor]) for factor in factors)] for name in names
    ]
    titles = ["frozen" if factor == 0 else f"rate x {factor:g}" for factor in factors]
    tables = [render_table(header, rows), render_table(["one part changed", *titles], parts)]
    return "\n".join([*tables, *_describe_sweep(facts)])


def _order_trial(facts: SweepAnalysis, trial: SweepTrial) -> tuple[float, float]:
    last = trial.rungs[-1]
    sign = 1 if facts.lower_is_better else -1
    return -last.share, float("inf") if last.score is None else sign * last.score


def _format_effect(effect: PartEffect) -> str:
    """Return a gain with its interval, marked where that excludes 0."""
    if effect.gain is None:
        return "diverged"
    mark = " *" if effect.is_clear else ""
    return f"{effect.gain:+.3f} {format_interval(effect.ci95)}{mark}"


def _describe_sweep(facts: SweepAnalysis) -> list[str]:
    """Say what the figures are of, what was best, and what it gains where nothing was chosen."""
    held, gain = facts.held, facts.held.gain
    clear = {
        "positive": "beyond noise", "negative": "worse, beyond noise",
        "equivalent": "none that matters", "undetermined": "not beyond noise",
    }[held.outcome]  # fmt: skip
    marked = "; * beyond noise, all parts at once" if any(e.is_clear for e in facts.parts) else ""
    lines = [
        f"  {facts.metric} on the {facts.choosing_rows:,} validation rows that choose, seed "
        f"{facts.search_seed}, {facts.trainings} trainings of {facts.strategy}",
        f"  parts: against {facts.single} at {facts.part_share:.0%} of the epochs{marked}",
        f"  best: {facts.single}; by layer: {facts.layerwise}",
        f"  by layer {format_estimate(held.layerwise)}, one rate {format_estimate(held.single)} on "
        f"the other {held.rows:,} rows, fresh seeds {', '.join(map(str, held.seeds))}",
        f"  gain by layer {gain.value:+.3f} {format_interval(gain.ci95)}: {clear}",
    ]
    rates = sorted(t.setting.learning_rate for t in facts.trials if t.setting.is_single)
    best = facts.get_setting(facts.single).learning_rate
    if len(rates) > 1 and best in (rates[0], rates[-1]):
        end = "highest" if best == rates[-1] else "lowest"
        lines.append(f"  the best one rate is the {end} tried: give --rates beyond it")
    return lines


def format_distance(facts: DistanceAnalysis) -> str:
    """Return the distances of all pairs, and what each set is from itself."""
    rows = [
        [
            f"{pair.first} - {pair.second}",
            str(pair.rows),
            format_estimate(pair.a_distance) + (" saturated" if pair.saturated else ""),
            format_estimate(pair.h_divergence),
            format_estimate(pair.mmd, 4),
            f"{pair.mmd_p_value:.3f}",
            format_estimate(pair.frechet),
        ]
        for pair in facts.pairs
    ]
    rows += [
        [
            f"halves of {domain.name}", str(domain.rows // 2),
            f"{domain.null_a_distance:.3f}", "", "", "", f"{domain.null_frechet:.3f}",
        ]
        for domain in facts.domains
    ]  # fmt: skip
    tables = [
        render_table(["", "rows", "A-distance", "H-divergence", "MMD^2", "p", "Frechet"], rows)
    ]
    words = [
        [
            f"{pair.first} - {pair.second}",
            format_estimate(pair.word_overlap),
            format_estimate(pair.word_divergence),
        ]
        for pair in facts.pairs
        if pair.word_overlap is not None
    ]
    if words:
        words += [
            [f"halves of {domain.name}", "", format_number(domain.null_word_divergence)]
            for domain in facts.domains
        ]
        tables.append(render_table(["", "words shared", "word divergence"], words))
    notes = [f"  on {facts.site} of {facts.source}; A-distance and H-divergence are at most 2"]
    if [domain.name for domain in facts.domains] == ["train", "test"]:
        notes.append("  no unlabelled data: give data.unlabeled, data.general or --to TABLE")
    if not facts.site_is_own:
        notes.append(f"  the recipe's head reads elsewhere: {_explain_site(facts)}")
    if words:
        pieces = [f"{d.name} {format_number(d.pieces_per_word, 2)}" for d in facts.domains]
        notes.append(f"  tokens a word: {', '.join(pieces)}")
    notes += [f"  left out: {one}" for one in facts.left_out]
    if any(pair.saturated for pair in facts.pairs):
        notes.append("  saturated: the A-distance no longer tells these apart; compare their MMD^2")
    return "\n".join([*tables, *notes])


def format_shift(facts: ShiftAnalysis) -> str:
    """Return for each set what differs from train, and the shares of its classes."""
    header = ["", "rows", "differs by", "classes p", "AUC", "p", "p at equal classes", "MMD^2", "p"]
    rows = [
        [
            one.name, str(one.rows), one.outcome, _format_p(one.label_p_value),
            format_number(one.auc), format_number(one.auc_p_value),
            format_number(one.matched_p_value), format_estimate(one.mmd, 4),
            format_number(one.mmd_p_value),
        ]
        for one in facts.sets
    ]  # fmt: skip
    tables = [render_table(header, rows)]
    shares = [
        [
            f"{one.name}: {row.label}", format_number(row.train), format_estimate(row.estimated),
            _format_share(row.bbse, row.bbse_ci95), _format_share(row.rlls, row.rlls_ci95),
            format_number(row.labelled),
        ]
        for one in facts.sets
        for row in one.shares
    ]  # fmt: skip
    if shares:
        header = ["share of", "train", "by EM", "by BBSE", "by RLLS", "by labels"]
        tables.append(render_table(header, shares))
    notes = [f"  {facts.train_rows:,} rows of train, on {facts.site} of {facts.source}"]
    if [one.name for one in facts.sets] == ["test"]:
        notes.append("  no unlabelled data: give data.unlabeled to compare it, too")
    notes += [note for one in facts.sets if (note := _advise_on_shift(one))]
    notes += [f"  left out: {one}" for one in facts.left_out]
    return "\n".join([*tables, *notes])


def _format_share(value: float | None, interval: Interval | None) -> str:
    """Return a share with its interval, where there is one."""
    if value is None or interval is None:
        return format_number(value)
    return f"{format_number(value)} {format_interval(interval)}"


def _format_p(value: float | None) -> str:
    """Return a p-value that may be tiny: of classes in hundreds of rows it often is."""
    return "<0.0001" if value is not None and value < 1e-4 else format_number(value, 4)


def _advise_on_shift(one: SetShift) -> str | None:
    """Say what to do about a set that is not as train; None where it is."""
    if one.outcome == "none":
        return None
    if one.outcome == "label shift":
        advice = (
            f"  {one.name}: correct for its shares by hftl predict --prior auto, or --prior FILE"
        )
        unknown = "; whether its inputs differ, too, is not known"
        return f"{advice}{unknown if one.matched_p_value is None else ''}"
    if one.outcome == "covariate shift":
        return f"  {one.name}: other inputs than train's; no prior corrects that, adaptation may"
    return f"  {one.name}: other classes and other inputs; the estimated shares may be off"


def _explain_site(facts: DistanceAnalysis) -> str:
    """Say why the input of the recipe's head is not compared."""
    if facts.provenance is None or facts.provenance.pooling == "native":
        return "below it are weights that the checkpoint lacks, new for every seed"
    return f"finetune.pooling={facts.provenance.pooling} is not one of a layer's"


def format_estimate(estimate: Estimate | None, digits: int = 3) -> str:
    """Return `0.123 [0.101, 0.145]`, or a dash where there is none."""
    if estimate is None:
        return "-"
    return f"{estimate.value:.{digits}f} {format_interval(estimate.ci95, digits)}"
