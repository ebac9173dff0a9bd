"""The answer to a question of takd.study.arms: do assistants help? With statistics, a figure, and the doubts due."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from takd.study import figures, published, statistics
from takd.study.arms import Arm, Question, digests, top_digest
from takd.study.document import Document
from takd.study.formatting import listed, method_of, outcome, p_value, percent, points, recipe_of, seeds_of
from takd.study.plan import NetworkPath
from takd.study.statistics import Difference

MARGIN = 0.5  # points: arms that differ by less are equal in practice
ROWS = 45  # of a figure: ten arms, each against each
BETTER, WORSE, APART, UNTESTED = "better", "worse", "cannot be told apart", "no test"
EQUAL = f"equal within {MARGIN:g}"
HEADLINES = {
    BETTER: "help by",
    WORSE: "do not help",
    APART: "cannot be told apart from direct distillation",
    UNTESTED: "cannot be compared with it",
}
BRACKETS = "In brackets: 95 % confidence intervals of paired differences over n chains; p has Holm's correction."
METHOD = (
    "An arm is a way to train the student, and a chain is a seed with a teacher and assistants of its own. A "
    "difference is a mean over the chains that two arms share, in points of test accuracy at the last epoch, ± the "
    "standard deviation; the interval is Student's, for that pair alone. p is that of their two-sided t-test with "
    f"Holm's correction over {{pairs}}; better and worse are p < {statistics.LEVEL:g}. Equal: the whole "
    f"interval lies within ±{MARGIN:g} points. Detectable is the smallest true difference that this test, uncorrected, "
    f"finds with probability {statistics.POWER:g}, with so many chains and this deviation (exact, noncentral t). "
    "Assistants help if they are better than every direct arm of the same method; that it is they, and not more "
    "training, takes a direct arm with as many training steps. They do not help if an interval against a direct arm "
    "lies within the margin or below 0."
)


@dataclass
class Pair:
    """Two arms over the chains that both have."""

    arm: Arm
    reference: Arm
    values: list[float]  # differences of test accuracy at the last epoch, in points
    difference: Difference
    p: float | None = None  # with Holm's correction over all pairs of the question

    @property
    def verdict(self) -> str:
        interval = self.difference.interval
        if interval is None:
            return UNTESTED
        if self.p is not None and self.p < statistics.LEVEL:
            return BETTER if self.difference.mean > 0 else WORSE
        return EQUAL if self.negligible else APART

    @property
    def negligible(self) -> bool:
        """Whether the whole interval lies within the margin."""
        return self.difference.interval is not None and max(map(abs, self.difference.interval)) < MARGIN

    @property
    def no_better(self) -> bool:
        """Where not proven better: the whole interval lies within the margin, or below 0."""
        interval = self.difference.interval
        return self.verdict in (WORSE, EQUAL) or (interval is not None and interval[1] < 0)


def compare(arms: Sequence[Arm]) -> list[Pair]:
    """Each arm against each before it, where they share a chain."""
    pairs = []
    for reference, arm in itertools.combinations(arms, 2):
        ours, theirs = arm.values, reference.values
        if values := [ours[seed] - theirs[seed] for seed in ours if seed in theirs]:
            pairs.append(Pair(arm, reference, values, statistics.paired(values)))
    for pair, p in zip(pairs, statistics.holm([pair.difference for pair in pairs]), strict=True):
        pair.p = p
    return pairs


# --------------------------------------------------------------------------------------------------- the answer
@dataclass
class Outcome:
    """An arm with assistants against every arm that distils directly by the same method.

    Assistants help where it is better than all of these, and do not where it is no better than one of them. The arm
    with as many training steps as the whole path tells assistants from more training.
    """

    arm: Arm
    pairs: list[Pair]  # as many training steps first

    @property
    def tested(self) -> list[Pair]:
        return [pair for pair in self.pairs if pair.verdict != UNTESTED]

    @property
    def matched(self) -> bool:
        return bool(self.tested) and self.arm.length(self.tested[0].reference) == 1

    @property
    def verdict(self) -> str:
        if not self.tested:
            return UNTESTED
        if all(pair.verdict == BETTER for pair in self.tested):
            return BETTER
        return WORSE if any(pair.no_better for pair in self.tested) else APART

    @property
    def gain(self) -> str:
        """Over as much direct training, or over the best direct arm."""
        means = [pair.difference.mean for pair in self.tested]
        if self.matched:
            return f"{means[0]:.2f} points ({self.arm.name})"
        return f"{min(means):.2f} points ({self.arm.name}, training steps not matched)"


def outcomes(arms: Sequence[Arm], pairs: Sequence[Pair]) -> list[Outcome]:
    """One for each arm with assistants that shares a chain with another arm."""
    found = []
    for arm in (arm for arm in arms if arm.assisted and any(arm in (pair.arm, pair.reference) for pair in pairs)):
        direct = [pair for pair in pairs if pair.arm is arm and pair.reference.direct]
        direct = [pair for pair in direct if pair.reference.method == arm.method]
        found.append(Outcome(arm, sorted(direct, key=lambda pair: arm.length(pair.reference) != 1)))
    return found


def headline(question: Question, found: Sequence[Outcome]) -> str:
    """The answer in one sentence; empty where no arm has an assistant."""
    if not found:
        return ""
    about = f"Whether assistants help {question.student} "
    if not any(outcome.pairs for outcome in found):
        return f"{about}is open: no arm distils it directly by the same method in the same chains."
    if all(outcome.verdict == UNTESTED for outcome in found):
        seeds = {seed for outcome in found for seed in outcome.arm.values}
        return f"{about}cannot be told from {'one chain' if len(seeds) == 1 else 'these chains'}."
    parts = []
    for verdict, words in HEADLINES.items():
        if members := [outcome for outcome in found if outcome.verdict == verdict]:
            if verdict == BETTER:
                words += f" {' and '.join(outcome.gain for outcome in members)}"
            elif len(found) > 1:
                words += f" ({'; '.join(outcome.arm.name for outcome in members)})"
            parts.append(words)
    return f"Assistants {', '.join(parts[:-1])}{' and ' if parts[1:] else ''}{parts[-1]}."


def details(outcome: Outcome) -> Iterator[str]:
    """What the headline says of an arm with assistants rests on these."""
    arm = outcome.arm
    for pair in outcome.pairs:
        length = arm.length(pair.reference)
        known = f"{length:.2g} times the" if length else "an unknown number of"
        yield sentence(pair, f"with {'as many' if length == 1 else known} training steps")
    if not outcome.pairs:
        yield f"No direct arm by the same method shares a chain with {arm.name}."
    elif not outcome.matched and outcome.verdict == BETTER:
        yield f"No direct arm with as many training steps as {arm.name} can be tested: more training may be the cause."


def others(pairs: Sequence[Pair]) -> Iterator[str]:
    """What distilling directly and training longer do by themselves."""
    for pair in (pair for pair in pairs if pair.arm.direct and pair.arm.method == pair.reference.method):
        if pair.arm.length(pair.reference) != 1:
            yield sentence(pair, "for training longer")
    shortest = next((pair.arm for pair in pairs if pair.arm.direct), None)
    for pair in (pair for pair in pairs if pair.arm is shortest and len(pair.reference.path) == 1):
        yield sentence(pair)


def sentence(pair: Pair, remark: str = "") -> str:
    """A pair's difference, what is known of it, and the verdict."""
    name, n, interval = pair.arm.name, pair.difference.seeds, pair.difference.interval
    start = f"{name[0].upper()}{name[1:]} against {pair.reference.name}{remark and f', {remark}'}: "
    start += f"{points(pair.difference.mean)} points"
    if not interval:
        return f"{start} in {'one chain' if n == 1 else f'each of {n} chains, without any spread to test by'}."
    p = p_value(pair.p)
    p = f"< {p[1:]}" if p[0] == "<" else f"= {p}"
    found = f"[{', '.join(map(points, interval))}], p {p}, n = {n}: {pair.verdict}"
    if pair.verdict == APART:
        enough = f"a true difference of {pair.difference.detectable:.2f} or more"
        found += f"; {enough} would be found with probability {statistics.POWER:g} or more"
    if pair.verdict in (BETTER, WORSE) and pair.negligible:
        found += f", but by less than {MARGIN:g} points"
    return f"{start} {found}."


# --------------------------------------------------------------------------------------------------- the doubts
def doubts(question: Question) -> Iterator[str]:
    """What one must know before believing the numbers."""
    seeds, arms = question.seeds, [arm for arm in question.arms if arm.values]
    for arm in arms:
        if len(arm.values) < len(seeds):
            have = " ".join(map(str, arm.values))
            yield f"{arm.name[0].upper() + arm.name[1:]} has {len(arm.values)} of {len(seeds)} chains (seeds {have})."
    unfinished = [(arm, run) for arm in question.arms for run in arm.group.runs if not run.finished]
    if lost := [f"{arm.name}, seed {run.seed} ({run.progress})" for arm, run in unfinished]:
        yield f"Not finished, and left out: {'; '.join(lost)}."
        yield "An arm looks better than it is if the runs that it lacks diverged."
    if question.repeated:
        again = ", ".join(str(run.folder) for run in question.repeated)
        yield f"Left out, because their arm has a run of the same seed: {again}."
    yield from dependence(arms)
    checkpoints = [str(run.config.get("teacher_checkpoint")) for arm in arms for run in arm.group.runs]
    if not arms[0].group.config["validation_split"] and any("_best." in name for name in checkpoints):
        yield "Teachers are from their best epoch on the test images, which arms with a teacher thus profit from."


def dependence(arms: Sequence[Arm]) -> Iterator[str]:
    """Whether each chain has a teacher of its own, and all its arms that same one, by the digests of their weights."""
    taught = [(run, arm.above[run.seed]) for arm in arms if arm.teachers for run in arm.group.runs]
    weights: dict[int, set[str]] = {}
    teachers: dict[int, set[str]] = {}
    for run, above in taught:
        weights.setdefault(run.seed, set()).update(digests(run, above))
        teachers.setdefault(run.seed, set()).update(top_digest(run, above))
    if not all(weights.values()):
        yield "Not all runs record which weights they learned from, so whether the chains are independent is unknown."
    independent: list[set[int]] = []  # seeds that share a network above the student, transitively
    for seed in weights:
        linked = [group for group in independent if any(weights[seed] & weights[other] for other in group)]
        independent = [group for group in independent if group not in linked] + [{seed}.union(*linked)]
    if len(independent) < len(weights):
        chains = f"{len(independent)} independent chain{'s' * (len(independent) > 1)}"
        yield f"These {len(weights)} seeds are {chains}: they share networks above the student. n counts the student's"
        yield "seeds; intervals and p hold for these teachers only."
    if mixed := " ".join(str(seed) for seed, found in teachers.items() if len(found) > 1):
        yield f"Arms of one seed have different teachers (seeds {mixed}): such pairs share the seed alone."


# -------------------------------------------------------------------------------------------- the rule of thumb
def rule_of_thumb(question: Question) -> str:
    """How often the paper's rule names the best of three or more single assistants; empty where that was not tried.

    The rule: the best assistant's own accuracy is nearest the mean of the teacher's and the student's, each alone. An
    assistant's own is its accuracy alone where that is recorded for all, or else as distilled from the teacher.
    """
    singles: dict[str, Arm] = {}
    for arm in sorted(question.arms, key=lambda arm: len(arm.values)):  # the setting with most chains stays
        if len(arm.path) == 3 and len(arm.teachers) == 1:
            singles[arm.path[1]] = arm
    if question.teacher is None or len(singles) < 3:
        return ""
    own, chains = "alone", _named_and_best(question, singles, ())
    if not chains:
        own, chains = f"distilled from {question.teacher}", _named_and_best(question, singles, (question.teacher,))
    if not chains:
        return "The rule of thumb cannot be tested: no chain has all assistants and each network's own accuracy."
    chances = [len(best) / len(singles) for _, best in chains]
    hits = sum(named in best for named, best in chains)
    rule = (
        f"The paper's rule of thumb: of the single assistants {', '.join(singles)} the best is the one whose own "
        f"accuracy ({own}) is nearest the mean of {question.teacher}'s and {question.student}'s alone."
    )
    if len(chains) == 1:
        [(named, best)] = chains
        right = f"a guess is right with probability {chances[0]:.2g}"
        return f"{rule} It names {named}, and the best is {listed(best)}; {right}."
    names, tops = _counts([named for named, _ in chains]), _counts([name for _, best in chains for name in best])
    return (
        f"{rule} So it is in {hits} of {len(chains)} chains; by chance it would be in {sum(chances):.1f}, and in as "
        f"many or more with probability {statistics.at_least(hits, chances):.2g}. The rule names {names}; the best is "
        f"{tops}. Where one assistant is best in most chains one lucky guess is repeated, so this tells the rule from "
        "chance alone."
    )


def _named_and_best(
    question: Question, singles: dict[str, Arm], prefix: NetworkPath
) -> list[tuple[str, tuple[str, ...]]]:
    """For each chain that has everything: the assistant that the rule names, and the best, more than one if equal."""
    found = []
    for seed in question.seeds:
        reached = {network: arm.values[seed] for network, arm in singles.items() if seed in arm.values}
        ends = question.accuracies([(question.teacher or "",), (question.student,)], seed)
        own = question.accuracies([(*prefix, network) for network in reached], seed)
        if len(own) == len(reached) == len(singles) and len(ends) == 2:
            distance = {path[-1]: abs(accuracy - sum(ends.values()) / 2) for path, accuracy in own.items()}
            top = max(reached.values())
            best = tuple(network for network, accuracy in reached.items() if accuracy == top)
            found.append((min(distance, key=lambda network: distance[network]), best))
    return found


def _counts(names: Sequence[str]) -> str:
    return listed([f"{name} in {names.count(name)}" for name in dict.fromkeys(names)])


# --------------------------------------------------------------------------------------------------- the section
def sections(document: Document, questions: Sequence[Question]) -> list[str]:
    """A section for each question that has several chains, and a sentence on the others. Returns the headlines."""
    headlines = [section(document, question) for question in questions if question.chains > 1]
    single = [each for each in questions if each.chains == 1 and any(arm.assisted for arm in each.arms)]
    if single:
        students = dict.fromkeys(each.student for each in single)
        headlines.append(f"Whether assistants help {', '.join(students)} cannot be told from one chain.")
        document.heading("Do assistants help?")
        document.text(headlines[-1])
        for question in single:
            document.text(rule_of_thumb(question))
    return headlines


def paragraphs(question: Question, pairs: Sequence[Pair]) -> list[str]:
    """The headline, what it rests on, and the doubts, each possibly empty."""
    found = outcomes(question.arms, pairs)
    evidence = [*(line for outcome in found for line in details(outcome)), *others(pairs)]
    if any(pair.verdict != UNTESTED for pair in pairs) and evidence:
        evidence.append(BRACKETS)
    return [headline(question, found), " ".join(evidence), " ".join(doubts(question))]


def section(document: Document, question: Question) -> str:
    """The section of a report on one question. Returns its headline."""
    arms, pairs, student = question.arms, compare(question.arms), question.student
    answer, *_ = found = paragraphs(question, pairs)
    ask = "Do assistants help?" if any(arm.assisted for arm in arms) else "Ways to train"
    origin = f" from {question.teacher}" if question.teacher else ""
    document.heading(f"{ask} {student}{origin} on {question.dataset}")
    for paragraph in found:
        document.text(paragraph)
    if all(pair.verdict == UNTESTED for pair in pairs):
        return answer
    name = "-".join(word for word in (question.teacher, student, question.dataset, "answer") if word)
    caption = (
        f"Differences in the test accuracy of {student} at the last epoch: mean and 95 % interval of each pair of "
        f"arms, one faint point a chain. Blue: p < {statistics.LEVEL:g} after Holm's correction. The band is "
        f"±{MARGIN:g} points."
    )
    document.figure(f"figures/{name}", draw(pairs), caption)
    rows, papers = [], [published.papers_number(arm.group) for arm in arms]
    for arm, paper in zip(arms, papers, strict=True):
        best = outcome(arm.group, "best") if paper is not None else ""
        trained = " + ".join(map(str, arm.epochs)) if arm.steps else f"unknown + {arm.epochs[-1]}"
        made = [recipe_of(arm.group), method_of(arm.group), trained, seeds_of(arm.group)]
        rows.append([arm.name, *made, outcome(arm.group, "last"), best, percent(paper)])
    header = ["arm", "recipe, epochs", "method", "epochs below the teacher", "chains", "last epoch, %"]
    document.table([*header, "best test epoch, %", "the paper's, %"], rows)
    header = ["arm", "against", "n", "difference, points", "95 % interval", "p (Holm)", "detectable", "verdict"]
    document.table(header, [_row(pair) for pair in pairs])
    tested = sum(pair.p is not None for pair in pairs)
    document.text(METHOD.format(pairs=f"all {tested} pairs" if tested > 1 else "one pair"))
    document.text(rule_of_thumb(question))
    return answer


def _row(pair: Pair) -> list[str]:
    found = pair.difference
    interval = " to ".join(map(points, found.interval or ()))
    numbers = [str(found.seeds), points(found.mean, found.deviation), interval, p_value(pair.p)]
    return [pair.arm.name, pair.reference.name, *numbers, percent(found.detectable), pair.verdict]


# ---------------------------------------------------------------------------------------------------- the figure
@figures.panels
def draw(columns: int, pairs: Sequence[Pair]) -> Any:
    """Intervals by the arm that is compared against; of very many, those against arms without assistants."""
    from matplotlib.figure import Figure

    shown = [pair for pair in pairs if len(pairs) <= ROWS or not pair.reference.assisted]
    labels: list[str] = []
    figure = Figure(figsize=(6, 1))
    axes = figure.subplots()
    for reference in dict.fromkeys(pair.reference.name for pair in shown):
        labels.append(f"against {reference}")
        for pair in (pair for pair in shown if pair.reference.name == reference):
            y, mean, interval = len(labels), pair.difference.mean, pair.difference.interval
            color = figures.BLUE if pair.verdict in (BETTER, WORSE) else figures.GREY
            axes.plot(pair.values, [y] * len(pair.values), "o", ms=3, color=figures.FAINT, alpha=0.7, zorder=2)
            if interval:
                axes.hlines(y, *interval, color=color, lw=1.8, zorder=3)
            axes.plot(mean, y, "o", ms=5.5, color=color, zorder=4)
            labels.append(pair.arm.name)
    axes.axvspan(-MARGIN, MARGIN, color=figures.PALE, zorder=0)
    axes.axvline(0, color=figures.INK, lw=0.9, zorder=1)
    axes.set_yticks(range(len(labels)), labels, fontsize=8.5)
    for label in axes.get_yticklabels():
        if label.get_text().startswith("against "):
            label.set(weight="bold", color=figures.INK)
    axes.set(ylim=(len(labels) - 0.4, -0.6), xlabel="difference, points")
    axes.grid(axis="y", visible=False)
    long_names = 0.06 * max(0, max(map(len, labels)) - 30)
    figure.set_size_inches((6 if columns > 1 else 4.2) + long_names, 0.23 * len(labels) + 0.8)
    figure.tight_layout(pad=0.5)
    return figure
