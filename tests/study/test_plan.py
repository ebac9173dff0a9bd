"""The plan of a path study: which trainings, each once, in which order and with which settings."""

import pytest

from takd.study import plan
from takd.study.plan import Step

PLANE = plan.FAMILIES["plane"]


def planned(*paths, sizes=PLANE, seeds=(1,)):
    return plan.plan("runs", sizes, plan.choose_paths(sizes, paths), seeds, {}, [])


def test_five_sizes_need_sixteen_trainings_and_four_alone():
    trainings = planned()
    taught = [training for training in trainings if len(training.path) > 1]
    assert (len(trainings), len(taught)) == (20, 15)
    assert len({training.name for training in trainings}) == 20
    assert sorted(training.path[-1] for training in trainings if len(training.path) == 1) == sorted(PLANE)
    ends = [training.path for training in taught if training.path[-1] == "plane2"]
    assert len(ends) == 8, "2^3 subsets of three assistants"


def test_teachers_come_first_and_their_students_together():
    trainings = planned()
    place = {training.path: i for i, training in enumerate(trainings)}
    assert all(place[training.path[:-1]] < place[training.path] for training in trainings if training.teacher)
    teachers = [training.teacher for training in trainings if training.teacher]
    changes = sum(one is not other for one, other in zip(teachers, teachers[1:], strict=False))
    assert changes == len(set(teachers)) - 1, "each teacher's table is filled and used in one go"


def test_chosen_paths_share_their_beginnings():
    trainings = planned("10,6,2", "10,6,4,2")
    assert {training.path for training in trainings} == {
        *(("plane10", "plane6"), ("plane10", "plane6", "plane4"), ("plane10", "plane6", "plane2")),
        ("plane10", "plane6", "plane4", "plane2"),
        *(("plane10",), ("plane6",), ("plane4",), ("plane2",)),
    }


def test_each_seed_has_a_tree_of_its_own():
    trainings = planned("10,2", seeds=(1, 2))
    of_a_seed = ("plane10", "plane10-plane2", "plane2")
    assert [training.name for training in trainings] == [f"{name}-seed{seed}" for seed in (1, 2) for name in of_a_seed]
    assert trainings[4].teacher is trainings[3]


def test_the_most_specific_step_wins():
    """Settings for a longer ending of the path override those for a shorter one, and these the common settings."""
    steps = [
        Step("10,4,2:temperature=7", ("plane10", "plane4", "plane2"), {"temperature": 7.0}),
        Step("2:temperature=5,lambda=.15", ("plane2",), {"temperature": 5.0, "lambda": 0.15}),
    ]
    common = {"temperature": 3.0, "epochs": 2}
    trainings = plan.plan("runs", PLANE, plan.choose_paths(PLANE, ["10,4,2", "10,2"]), (1,), common, steps)
    words = {training.name: training.arguments for training in trainings}
    own = [plan.settings_of(training.path, common, steps) for training in trainings]
    assert dict(zip(words, own, strict=True)) == {
        "plane10-seed1": {"epochs": 2},
        "plane10-plane4-seed1": {"temperature": 3.0, "epochs": 2},
        "plane10-plane2-seed1": {"temperature": 5.0, "epochs": 2, "lambda": 0.15},
        "plane10-plane4-plane2-seed1": {"temperature": 7.0, "epochs": 2, "lambda": 0.15},
        "plane4-seed1": {"epochs": 2},
        "plane2-seed1": {"epochs": 2},
    }
    assert words["plane10-plane2-seed1"] == [
        *("--student", "plane2", "--teacher", "plane10", "--teacher-checkpoint"),
        "runs/plane10-seed1/plane10_seed1_best.pth.tar",
        *("--temperature", "5.0", "--epochs", "2", "--lambda", "0.15", "--seed", "1"),
        *("--run-dir", "runs/plane10-plane2-seed1"),
    ]


@pytest.mark.parametrize(
    "texts, sizes",
    [
        (["plane10,plane2", "plane10,plane4,plane2"], ["plane10", "plane4", "plane2"]),
        (["plane10>plane2", "plane10,plane8"], ["plane10", "plane8", "plane2"]),
        (["resnet20,plane10,plane2", "resnet20,plane2"], ["resnet20", "plane10", "plane2"]),
    ],
)
def test_sizes_are_taken_from_whole_names(texts, sizes):
    assert plan.sizes_among(texts) == sizes


def test_the_plan_of_a_folder_is_recorded(tmp_path):
    """A second plan in the same folder is added to the first; the report counts both."""
    for seeds in ((1,), (2,)):
        plan.record(tmp_path, plan.plan(tmp_path, PLANE, plan.choose_paths(PLANE, ["10,2"]), seeds, {}, []))
    recorded = plan.read(tmp_path)
    assert len(recorded) == 6 and recorded["plane10-plane2-seed2"] == {"path": ["plane10", "plane2"], "seed": 2}


@pytest.mark.parametrize("lost, finished", [("", True), ("best", False), ("metrics", False), ("best last", True)])
def test_a_training_is_finished_if_nothing_is_lost_that_can_be_restored(write_run, tmp_path, lost, finished):
    """Whoever deletes both checkpoints to save space does not train again."""
    folder = write_run(("plane4",), 1, (40,))
    (folder / "last.pth.tar").touch()
    for name in lost.split():
        [file] = folder.glob(f"*{name}*")
        file.unlink()
    assert plan.Training(folder.parent, ("plane4",), 1, {}, ()).finished is finished
