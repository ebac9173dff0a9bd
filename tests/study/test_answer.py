"""The answer over chains: real runs' records with other numbers, whose differences are known."""

import copy
import math
import random
import statistics
from pathlib import Path

import pytest
from conftest import ROOT, read_lines
from PIL import Image

from takd.study import answer, arms, collect
from takd.study.document import Document

KD = {"temperature": 4.0, "lambda": 0.5, "reduction": "batchmean"}
TOGETHER = {
    "path": ("plane10", "plane10 + plane4", "plane2"),
    "teacher": ["plane10", "plane4"],
    "method": "dgkd",
    "epochs": 20,
}
# Of plane2 in every chain: its settings, and its accuracy. Assistants help by .8 points, longer training does not.
ARMS = {
    "alone": ({"path": ("plane2",), "epochs": 10}, 44.0),
    "smoothed": ({"path": ("plane2",), "epochs": 10, "label_smoothing": 0.1}, 44.2),
    "direct": ({"path": ("plane10", "plane2"), "epochs": 20}, 47.0),
    "longer": ({"path": ("plane10", "plane2"), "epochs": 40}, 47.0),
    "through": ({"path": ("plane10", "plane4", "plane2"), "epochs": 20}, 47.8),
    "dgkd": (TOGETHER | {"method_options": KD | {"drop": 0.0}}, 47.05),
    "stochastic": (TOGETHER | {"method_options": KD | {"drop": 0.5}}, 47.0),
}


class Chains:
    """Records of chains, made from those of a real study."""

    def __init__(self, seed=0):
        self.found, self.random = collect.Collection(), random.Random(seed)
        lines = read_lines(ROOT / "results/paths-plane-cifar100.jsonl")
        self.real = {tuple(line["config"]["path"]): line for line in lines if "config" in line}

    def run(self, name, seed, accuracy, path, finished=True, chain=None, **settings):
        """A run s<seed>/<name> with this accuracy at its last epoch; its teacher is of the chain named, or its own."""
        line = copy.deepcopy(self.real[tuple(node.split(" + ")[-1] for node in path)])
        place = f"runs/answer/s{seed}"
        config = line["config"] | {"seed": seed, "path": path, "run_dir": f"{place}/{name}"} | settings
        if len(path) > 1:
            taught = config["teacher"] if isinstance(config["teacher"], list) else [config["teacher"]]
            files = [f"runs/answer/s{chain or seed}/{teacher}/last.pth.tar" for teacher in taught]
            digests = [f"{teacher} of {chain or seed}" for teacher in taught]
            config |= {"teacher_checkpoint": files, "teacher_weights": digests}
            if not isinstance(config["teacher"], list):
                config |= {"teacher_checkpoint": files[0], "teacher_weights": digests[0]}
        config |= {key: value for key, value in settings.items() if key.startswith("teacher_")}
        records = line["epochs"] if finished else line["epochs"][:4]
        records[-1]["test_accuracy_percent"] = accuracy
        folder, summary = Path("/elsewhere") / place / name, line["summary"] if finished else None
        self.found.runs[folder] = collect.Run(folder, None, config, records, summary)

    def add(self, seeds, names=ARMS, noise=0.2, shift=None, **settings):
        """Whole chains. Each has a level of its own, which pairing removes."""
        for seed in seeds:
            level = self.random.gauss(0, 1)
            self.run("plane10", seed, 58 + level, ("plane10",), epochs=20)
            self.run("plane4", seed, 52 + level, ("plane10", "plane4"), epochs=20)
            for name in names:
                own, mean = ARMS[name]
                value = mean + level + (shift or {}).get(name, 0) + self.random.gauss(0, noise)
                self.run(name, seed, round(value, 2), **own | settings)
        return self

    def question(self, student="plane2"):
        [found] = [each for each in arms.questions(self.found.runs.values()) if each.student == student]
        return found

    def answer(self):
        """(headline, the paragraphs after it)"""
        question = self.question()
        headline, *paragraphs = answer.paragraphs(question, answer.compare(question.arms))
        return headline, " ".join(paragraphs)


def pair_of(question, arm, reference):
    pairs = {(pair.arm.name, pair.reference.name): pair for pair in answer.compare(question.arms)}
    return pairs[arm, reference]


MAIN = ("alone", "direct", "longer", "through")


def test_a_known_effect_is_found_and_measured():
    question = Chains().add(range(1, 11)).question()
    assert [arm.name for arm in question.arms] == [
        "alone", "alone (label smoothing 0.1)", "direct (20 epochs)", "direct (40 epochs)", "through 4",
        "10 and 4 together (drop 0)", "10 and 4 together (drop 0.5)",
    ]  # fmt: skip
    pair = pair_of(question, "through 4", "direct (40 epochs)")
    through, longer = ([arm.values[seed] for seed in range(1, 11)] for arm in (pair.arm, pair.reference))
    assert statistics.stdev(through) > 0.5, "between chains"
    differences = [a - b for a, b in zip(through, longer, strict=True)]
    mean, deviation = statistics.fmean(differences), statistics.stdev(differences)
    half = 2.2621571628 * deviation / math.sqrt(10)
    assert pair.difference.interval == (pytest.approx(mean - half), pytest.approx(mean + half))
    assert 0.5 < mean < 1.1 and deviation < 0.5
    assert pair.difference.detectable == pytest.approx(0.9960 * deviation, rel=1e-3)
    every = sorted(each.difference.p for each in answer.compare(question.arms))
    assert len(every) == 21 and pair.p >= pair.difference.p * (21 - every.index(pair.difference.p))
    assert pair.verdict == "better"


def test_the_paragraph_names_what_helps_by_how_much():
    headline, text = Chains().add(range(1, 11)).answer()
    assert (
        headline.startswith("Assistants help by 0.") and "points (through 4) and do not help (10 and 4 to" in headline
    )
    assert "Through 4 against direct (40 epochs), with as many training steps: +0." in text
    assert "Through 4 against direct (20 epochs), with 2 times the training steps: +0." in text
    assert "independent" not in text and "best epoch on the test images" not in text, "nothing to be doubted here"


@pytest.mark.parametrize(
    "shift, noise, headline",
    [
        ({"longer": 0.8}, 0.2, "Assistants do not help."),  # more training does as much
        ({"longer": 2}, 0.2, "Assistants do not help."),
        ({"direct": 0.8}, 0.2, "Assistants do not help."),  # longer training harms: no merit of the assistants
        ({"through": -0.4}, 0.6, "Assistants cannot be told apart from direct distillation."),
    ],
)
def test_the_headline_takes_every_direct_arm(shift, noise, headline):
    assert Chains(1).add(range(1, 9), MAIN, noise, shift).answer()[0] == headline


def test_without_a_direct_arm_as_long_more_training_may_be_the_cause():
    headline, text = Chains().add(range(1, 11), ("alone", "direct", "through")).answer()
    assert headline.startswith("Assistants help by") and "(through 4, training steps not matched)" in headline
    assert "more training may be the cause" in text


def test_equal_needs_the_whole_interval_within_the_margin():
    wide = pair_of(
        Chains(3).add((1, 2, 3), MAIN, noise=0.4, shift={"longer": 0.8}).question(), "through 4", "direct (40 epochs)"
    )
    assert wide.verdict == "cannot be told apart" and wide.difference.detectable > 0.5
    assert f"a true difference of {wide.difference.detectable:.2f} or more would be found" in answer.sentence(wide)
    narrow = pair_of(
        Chains(3).add(range(30), MAIN, shift={"longer": 0.6}).question(), "through 4", "direct (40 epochs)"
    )
    assert narrow.verdict == "better" and answer.sentence(narrow).endswith("better, but by less than 0.5 points.")


# ---------------------------------------------------------------------------------------------------- the arms
def test_names_have_exactly_the_settings_that_differ():
    chains = Chains()
    for seed in (1, 2):
        chains.add([seed], ("direct",)).add([seed], ())
        chains.run("warm", seed, 47, ("plane10", "plane2"), epochs=20, method_options=KD | {"temperature": 10.0})
        chains.run("dkd", seed, 47, ("plane10", "plane2"), epochs=20, method="dkd", method_options={"alpha": 1.0})
        chains.run("slow", seed, 47, ("plane10", "plane2"), epochs=20, milestones=[3], origins={})
        chains.run("better", seed, 59, ("plane10",), epochs=50)
        file = f"runs/answer/s{seed}/better/last.pth.tar"
        chains.run("taught", seed, 47, ("plane10", "plane2"), epochs=20, teacher_checkpoint=file)
    found = {arm.name for arm in chains.question().arms}
    assert len(found) == 5 and {"direct (dkd, plane10 with 20 epochs)"} < found, found
    assert any("T 10" in name and "milestones" not in name for name in found)
    assert any("plane10 with 50 epochs" in name for name in found) and any("milestones 3" in name for name in found)


def test_records_without_the_runs_above_join_the_arm_of_those_with_them():
    chains = Chains().add(range(1, 5), MAIN)
    del chains.found.runs[Path("/elsewhere/runs/answer/s4/plane4")]
    assert [len(arm.values) for arm in chains.question().arms] == [4, 4, 4, 4]


def test_folders_may_have_been_moved_and_named_by_other_paths():
    chains = Chains().add((1, 2), MAIN)
    for run in chains.found.runs.values():
        if "teacher_checkpoint" in run.config:
            run.config["teacher_checkpoint"] = f"/scratch/{run.config['teacher_checkpoint']}"
    assert [arm.epochs for arm in chains.question().arms] == [[10], [20], [40], [20, 20]]


def test_a_searchs_trials_are_no_arms():
    found = collect.collect([ROOT / "results/sweep-cifar100.jsonl", ROOT / "results/nni-cifar100.jsonl"])
    assert len(found.runs) > 50 and arms.questions(found.runs.values()) == []


# -------------------------------------------------------------------------------------------------- the doubts
def test_unequal_chains_unfinished_and_repeated_runs_are_named():
    chains = Chains().add(range(1, 6), ("alone", "direct")).add(range(6, 9), MAIN)
    chains.run("through", 9, 99, ("plane10", "plane4", "plane2"), epochs=20, finished=False)
    chains.run("again", 6, 99, ("plane10", "plane2"), epochs=20)
    _, text = chains.answer()
    assert "Through 4 has 3 of 8 chains (seeds 6 7 8)." in text
    assert "Not finished, and left out: through 4, seed 9 (epoch 4 of 20)." in text and "diverged" in text
    assert "a run of the same seed: /elsewhere/runs/answer/s6/direct." in text or "/s6/again." in text
    assert pair_of(chains.question(), "through 4", "alone").difference.seeds == 3


def test_one_chain_allows_no_test(tmp_path):
    document = Document(tmp_path)
    headlines = answer.sections(document, [Chains().add((1,), MAIN).question()])
    assert headlines == ["Whether assistants help plane2 cannot be told from one chain."]
    assert document.markdown() == f"## Do assistants help?\n\n{headlines[0]}\n"


def test_two_chains_are_tested_with_one_degree_of_freedom():
    question = Chains().add((1, 2), MAIN).question()
    pair = pair_of(question, "through 4", "alone")
    half = 12.7062047362 * pair.difference.deviation / math.sqrt(2)
    assert pair.difference.interval[1] - pair.difference.mean == pytest.approx(half)
    assert pair.difference.detectable == pytest.approx(11.55 * pair.difference.deviation, rel=1e-3)


def test_no_spread_is_no_test():
    headline, text = Chains().add((1, 2, 3), MAIN, noise=0).answer()
    assert headline == "Whether assistants help plane2 cannot be told from these chains."
    assert "+0.80 points in each of 3 chains, without any spread to test by." in text and "95 %" not in text


def test_without_assistants_or_direct_arms_the_question_stays_open():
    headline, text = Chains().add(range(5), ("alone", "direct")).answer()
    assert headline == "" and text.startswith("Direct against alone: +2.89 points [")
    assert (
        Chains()
        .add(range(5), ("alone", "through"))
        .answer()[0]
        .endswith("is open: no arm distils it directly by the same method in the same chains.")
    )


@pytest.mark.parametrize("shared, count", [({2: 1, 3: 1, 4: 1}, 1), ({2: 1, 4: 3}, 2), ({4: 1}, 3)])
def test_chains_that_share_a_teacher_are_counted_as_what_they_are(shared, count):
    chains = Chains()
    chains.add((1, 2, 3, 4), ())
    for seed in (1, 2, 3, 4):
        for name, accuracy in (("direct", 47), ("longer", 47.5)):
            chain = shared.get(seed)
            chains.run(name, seed, accuracy + seed**2 / 10, chain=chain, **ARMS[name][0])
    _, text = chains.answer()
    assert f"These 4 seeds are {count} independent chain{'s' * (count > 1)}:" in text
    assert "for these teachers only" in text


def test_arms_of_one_seed_with_different_teachers_are_named():
    chains = Chains().add((1, 2), ("alone", "direct"))
    chains.run("other", 1, 47, chain=7, **ARMS["longer"][0])
    chains.run("other", 2, 46, **ARMS["longer"][0])
    assert "Arms of one seed have different teachers (seeds 1)" in chains.answer()[1]


def test_teachers_chosen_on_the_test_images_and_unrecorded_weights_are_named():
    file = "runs/answer/s1/plane10/plane10_seed1_best.pth.tar"
    text = Chains().add((1, 2, 3), ("alone", "direct"), teacher_checkpoint=file, teacher_weights=None).answer()[1]
    assert "best epoch on the test images" in text and "whether the chains are independent is unknown" in text


# -------------------------------------------------------------------------------------------- the rule of thumb
def rule(hits, chains=5, alone=True, assistants=("plane8", "plane6", "plane4")):
    """Chains of which some obey the rule: plane4, 51 % alone, is nearest the mean of 58 and 44."""
    made = Chains()
    for seed in range(chains):
        made.run("plane10", seed, 58, ("plane10",))
        made.run("plane2", seed, 44, ("plane2",))
        for network, accuracy in (("plane8", 57), ("plane6", 55), ("plane4", 51)):
            made.run(network, seed, accuracy, (network,) if alone else ("plane10", network))
        best = "plane4" if seed < hits else "plane8"
        for network in assistants:
            made.run(f"through {network}", seed, 48 if network == best else 47, ("plane10", network, "plane2"))
    return answer.rule_of_thumb(made.question())


@pytest.mark.parametrize("hits, p", [(5, (1 / 3) ** 5), (4, 11 / 243), (0, 1)])
def test_the_rule_of_thumb_is_tested_against_chance(hits, p):
    text = rule(hits)
    assert (
        f"in {hits} of 5 chains; by chance it would be in 1.7, and in as many or more with probability {p:.2g}." in text
    )
    assert "(alone)" in text and "The rule names plane4 in 5; the best is" in text


def test_the_rule_of_thumb_takes_distilled_assistants_if_none_were_trained_alone():
    assert "(distilled from plane10)" in rule(3, alone=False)


def test_of_several_runs_alone_the_plainest_counts():
    question = Chains().add((1,), ("alone", "smoothed", "direct"), noise=0).question()
    alone, smoothed = (arm.values[1] for arm in question.arms[:2])
    assert question.accuracies([("plane2",)], 1) == {("plane2",): alone} and alone != smoothed


def test_one_chain_has_the_rule_and_no_test(tmp_path):
    made = Chains().add((1,), ("alone",), noise=0)
    for network in ("plane8", "plane6", "plane4"):
        made.run(network, 1, 50, (network,))
        made.run(f"through {network}", 1, 47, ("plane10", network, "plane2"))
    document = Document(tmp_path)
    assert answer.sections(document, [made.question()]) == [
        "Whether assistants help plane2 cannot be told from one chain."
    ]
    text = document.markdown()
    assert (
        "names plane4, and the best is plane4, plane6 and plane8; a guess is right with probability 1." in text
        and "95 %" not in text
    )


def test_the_rule_of_thumb_needs_three_assistants():
    assert rule(5, assistants=("plane8", "plane4")) == ""


# ------------------------------------------------------------------------------------------------- the section
def test_the_section_has_arms_pairs_and_a_figure(tmp_path):
    document = Document(tmp_path)
    headline = answer.section(document, Chains().add(range(1, 11)).question())
    document.write()
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert text.startswith(f"## Do assistants help? plane2 from plane10 on cifar100\n\n{headline}\n")
    assert "| best test epoch, % | the paper's, % |" in text and "| 20 + 20 | 10 |" in text and "| 42.56 |" in text
    assert text.count("| better |") > 10 and "Holm's correction over all 21 pairs" in text
    with Image.open(tmp_path / "figures/plane10-plane2-cifar100-answer.png") as image:
        colors = dict(map(reversed, image.convert("RGB").getcolors(1 << 24)))
    assert min(colors.get(color, 0) for color in ((31, 111, 178), (107, 119, 133), (227, 239, 250))) > 50
