"""Methods side by side: which runs make a table, and what it says."""

import re

import report
from takd.study import collect, pairs

OPTIONS = {"base": {}, "st": {"temperature": 4.0, "alpha": 1.0}, "at": {"beta": 1000.0}}


def write_methods(write_run, networks=("resnet20", "resnet110"), seeds=(1, 2, 3), **settings):
    """st is better than base by .9, 1.0 and 1.1 points, at is as good."""
    for i, network in enumerate(networks):
        for seed in seeds:
            for method, options in OPTIONS.items():
                accuracy = 80 + 5 * i + seed + (0.8 + seed / 10) * (method == "st")
                own = {"method": method, "method_options": options, "dataset": "cifar10"}
                write_run((network, network), seed, (50, accuracy), **own | settings)


def tables_of(folder):
    found = collect.collect([folder])
    return pairs.tables(found, collect.studies(found))


def test_pairs_of_one_setup_are_a_table_with_gains_and_an_average(write_run, tmp_path, call):
    write_methods(write_run)
    assert call(report, tmp_path / "runs").status == 0
    text = (tmp_path / "runs/report.md").read_text()
    rows = [
        [cell.strip("* ") for cell in line[2:-2].split(" | ")] for line in text.splitlines() if line.startswith("|")
    ]
    assert rows[0][1:] == ["resnet110 > resnet110, cifar10", "resnet20 > resnet20, cifar10", "average"]
    assert rows[2] == ["base", "87.00 ± 1.00", "82.00 ± 1.00", "84.50"]
    assert rows[3] == ["st", "88.00 ± 1.10 (+1.00)", "83.00 ± 1.10 (+1.00)", "85.50 (+1.00)"]
    assert rows[4] == ["at", "87.00 ± 1.00 (+0.00)", "82.00 ± 1.00 (+0.00)", "84.50 (+0.00)"]
    assert "All paths" not in text, "a network that teaches its own kind is in no path study"
    assert "Better than base by more than the noise between seeds: st." in text
    assert "| resnet20 > resnet20 | st | best | 83.00 | 92.80 | −9.80 | hankyul2 |" in text


def test_another_setting_is_another_table(write_run, tmp_path):
    write_methods(write_run, ["resnet20"], [1])
    write_methods(write_run, ["resnet20"], [1], train_images=1000)
    write_methods(write_run, ["resnet20"], [1], dataset="folder", images="1a2b3c4d5e", dataset_dir="pets")
    names = [(pair.name, len(pair.cells)) for table in tables_of(tmp_path / "runs") for pair in table.pairs]
    here, pets = "resnet20 > resnet20, cifar10", "resnet20 > resnet20, folder pets (images 1a2b3c4d)"
    assert sorted(names) == [(here, 3), (here, 3), (pets, 3)]


def test_methods_are_compared_over_the_seeds_in_common(write_run, tmp_path):
    write_methods(write_run, ["resnet20"], [1])
    write_run(("resnet20", "resnet20"), 2, (50, 99), dataset="cifar10", method="st", method_options=OPTIONS["st"])
    [table] = tables_of(tmp_path / "runs")
    assert {name: cell.mean("best") for name, cell in table.pairs[0].cells.items()} == {
        "base": 81,
        "st": 81.9,
        "at": 81,
    }


def test_a_network_alone_is_the_base(write_run, tmp_path):
    write_run(("plane2",), 1, (40, 41))
    write_run(("plane10", "plane2"), 1, (40, 42))
    [table] = tables_of(tmp_path / "runs")
    assert table.methods == ["base", "kd"] and table.best == "kd"


def test_the_narrow_figure_has_its_panels_one_below_the_other(write_run, tmp_path, call):
    write_methods(write_run, seeds=[1])
    assert call(report, tmp_path / "runs").status == 0
    page = (tmp_path / "runs/report.html").read_text()
    [wide, narrow] = [tuple(map(float, box)) for box in re.findall(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', page)]
    assert wide[0] > wide[1] and narrow[1] > narrow[0] and narrow[0] < 350
