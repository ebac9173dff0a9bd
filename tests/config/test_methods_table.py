"""The table of methods and their options: complete, equal to the constructors, printed; and a user's own class."""

import argparse
import inspect
import re

import pytest

from takd.config import flags, methods, run_config
from takd.distill import methods as classes
from takd.errors import UserError


def parse(*argv):
    command = ("--teacher", "plane4", "--student", "plane2", "--dataset", "digits", "--cuda", "0", *argv)
    return run_config.parse([str(argument) for argument in command])


# ------------------------------------------------------------------------------------------------- the table
def test_every_method_has_a_row_and_every_row_a_class():
    assert list(methods.METHODS) == list(classes.METHODS)


@pytest.mark.parametrize("name", methods.METHODS)
def test_options_are_the_constructors_keyword_only_arguments(name):
    """Without defaults in the constructor: the table has them."""
    arguments = inspect.signature(classes.METHODS[name]).parameters.values()
    options = {each.name.rstrip("_"): each.default for each in arguments if each.kind is each.KEYWORD_ONLY}
    assert options == dict.fromkeys(methods.METHODS[name].options, inspect.Parameter.empty)


@pytest.mark.parametrize("name", methods.METHODS)
def test_a_loss_that_is_not_a_mean_over_images_is_not_data_parallel(name):
    together = any(getattr(classes.METHODS[name], key, False) for key in ("one_process", "needs_index"))
    assert methods.METHODS[name].data_parallel is (not together) is (name not in ("sp", "rkd", "pkt", "crd"))


@pytest.mark.parametrize("name", methods.METHODS)
def test_help_methods_lists_every_option_with_default_meaning_and_bounds(name):
    row, found = (
        methods.METHODS[name],
        re.search(rf"^{name} +(.+)\n?((?: .+\n?)*)", methods.help_methods(), re.MULTILINE),
    )
    assert found[1] == f"{row.formula}: {row.source}"
    assert re.search(r"[A-Z]\w+.* (19|20)\d\d", row.source) or name in ("base", "at_st"), "paper and year"
    lines = {line.split()[0]: line for line in found[2].splitlines()}
    assert lines.keys() == row.options.keys()
    for key, option in row.options.items():
        assert option.help and re.fullmatch(rf" +{key} +{option.default} +{re.escape(option.help)}.*", lines[key])
        assert lines[key].endswith(f"({option.bounds})") or not option.bounds


@pytest.mark.parametrize("name", methods.METHODS)
def test_defaults_are_values_that_may_be_given(name):
    for option in methods.METHODS[name].options.values():
        value = flags.option_value(option, str(option.default))
        assert value == option.default and type(value) is type(option.default)


def test_help_methods_is_printed(run_command, tmp_path):
    outcome = run_command("train.py", "--help-methods", cwd=tmp_path)
    assert outcome == (0, methods.help_methods() + "\n", "")


@pytest.mark.parametrize("spelling, name", [("KD", "kd"), ("At_St", "at_st"), ("crd", "crd")])
def test_spellings(spelling, name):
    assert methods.method_name(spelling) == name and methods.find(name) is methods.METHODS[name]


def test_an_unknown_method_is_refused_with_the_nearest():
    with pytest.raises(UserError, match=r"unknown method 'cdr' \(did you mean crd\?\); methods: base kd .* or my_file"):
        methods.method_name("cdr")


# ---------------------------------------------------------------------------------------------------- values
Option = methods.Option
WORDS = Option("mean", choices=("mean", "sum"))


@pytest.mark.parametrize(
    "option, text, value",
    [
        (Option(1.0), "0", 0.0),
        (Option(0.5, maximum=1), "1", 1.0),
        (Option(4, minimum=2), "2", 2),
        (Option(True), "NO", False),
        (Option(False), "1", True),
        (WORDS, "Sum", "sum"),
        (Option("soft"), "Anything", "Anything"),
    ],
)
def test_a_value_has_its_defaults_type(option, text, value):
    found = flags.option_value(option, text)
    assert found == value and type(found) is type(option.default)


@pytest.mark.parametrize(
    "option, text, message",
    [
        (Option(1.0), "-1", "-1 is not a number at least 0"),
        (Option(1.0), "nan", "nan is not a number"),
        (Option(1.0), "one", "'one' is not a number"),
        (Option(1.0, above=0), "0", "0 is not a number above 0"),
        (Option(0.5, maximum=1), "1.5", "1.5 is not a number at least 0 and at most 1"),
        (Option(4, minimum=2), "1", "1 is not a whole number at least 2"),
        (Option(4), "2.5", "'2.5' is not a whole number at least 0"),
        (Option(False), "maybe", "'maybe' is not yes or no"),
        (WORDS, "max", "'max' is not mean or sum"),
    ],
)
def test_a_value_is_within_its_bounds(option, text, message):
    with pytest.raises(argparse.ArgumentTypeError, match=re.escape(message)):
        flags.option_value(option, text)


def test_options_may_be_given_either_way():
    short, long = (
        parse("--method", "st", "--temperature", 3),
        parse("--method", "st", "--method-option", "temperature=3"),
    )
    assert short.identity() == long.identity()
    assert (short.temperature, short.lambda_, short.method_options) == (3.0, None, {"temperature": 3.0, "alpha": 1.0})
    several = parse("--method", "CRD", "--method-option", "tau=.1", "negatives=5", "--method-option", "momentum=0")
    assert several.method_options == {"beta": 0.8, "dimensions": 128, "negatives": 5, "tau": 0.1, "momentum": 0.0}
    assert several.temperature is None


@pytest.mark.parametrize(
    "argv, message",
    [
        (["st", "--lambda", "0.5"], "--lambda: method st has no option 'lambda'; options of st: temp"),
        (
            ["base", "--temperature", "3"],
            "--temperature: method base has no option 'temperature'; options of base: none",
        ),
        (
            ["st", "--method-option", "alpha"],
            "--method-option alpha: write key=value; options of st: temperature alpha",
        ),
        (["st", "--method-option", "alhpa=1"], "did you mean alpha?"),
        (["st", "--temperature", "3", "--method-option", "temperature=3"], "temperature is given twice"),
        (["crd", "--method-option", "tau=0"], "--method-option tau=0: 0 is not a number above 0"),
    ],
)
def test_wrong_options_are_one_line(argv, message, capsys):
    with pytest.raises(SystemExit) as end:
        parse("--method", *argv)
    error = capsys.readouterr().err
    assert end.value.code == 2 and message in error and error.count("\n") == 1


# --------------------------------------------------------------------------------------- a user's own class
OWN = '''
from torch import nn
from takd.config.methods import Option

class Table(nn.Module):
    """L = a table.

    More of it.
    """
    options = {"alpha": Option(2.0, "help", above=0), "lambda": Option(0.5, maximum=1), "size": Option(4, minimum=2)}
    one_process = True
    def __init__(self, student, teacher, labels, *, alpha, lambda_, size):
        super().__init__()

class Defaults(nn.Module):
    needs_features = False
    def __init__(self, *, temperature=3.0, lambda_=0.25, sharp=False, kind="soft", size=4):
        super().__init__()

class Both(nn.Module):
    options = {"alpha": Option(2.0, maximum=3)}
    def __init__(self, *, alpha, beta=1.0):
        super().__init__()

class Index(nn.Module):
    needs_index = True

class Inherited(Table):
    pass

class Network(nn.Module):
    def __init__(self, network, *, beta=1.0):
        super().__init__()

class NoDefault(nn.Module):
    def __init__(self, *, beta):
        super().__init__()

class ListDefault(nn.Module):
    def __init__(self, *, beta=[1, 2]):
        super().__init__()

class NoTable(nn.Module):
    options = None

class NoOption(nn.Module):
    options = {"alpha": 2.0}
    def __init__(self, *, alpha):
        super().__init__()

def function(*, beta=1.0):
    return nn.Identity()
'''


@pytest.fixture
def own(tmp_path):
    (tmp_path / "own.py").write_text(OWN)
    return f"{tmp_path}/own.py"


@pytest.mark.parametrize("name", ["Table", "Inherited"])
def test_a_users_class_with_a_table_of_options(own, name):
    row = methods.find(f"{own}:{name}")
    assert {key: (option.default, option.bounds) for key, option in row.options.items()} == {
        "alpha": (2.0, "above 0"),
        "lambda": (0.5, "0 to 1"),
        "size": (4, "at least 2"),
    }
    assert row.data_parallel is False
    config = parse("--method", f"{own}:{name}", "--method-option", "size=3", "--lambda", 1)
    assert config.method_options == {"alpha": 2.0, "lambda": 1.0, "size": 3} and config.lambda_ == 1.0
    assert config.origins["lambda"] == "command line"


def test_a_users_class_without_a_table_has_its_keyword_only_arguments_as_options(own):
    row = methods.find(f"{own}:Defaults")
    defaults = {"temperature": 3.0, "lambda": 0.25, "sharp": False, "kind": "soft", "size": 4}
    assert row == methods.Method(
        "", "", {key: methods.Option(value) for key, value in defaults.items()}, label_smoothing=False
    )
    config = parse("--method", f"{own}:Defaults", "--method-option", "sharp=yes", "kind=hard", "size=7")
    assert config.method_options == defaults | {"sharp": True, "kind": "hard", "size": 7}
    assert (config.temperature, config.origins["temperature"]) == (3.0, f"default of {own}:Defaults")


def test_a_users_class_may_have_both_and_neither(own):
    both = methods.find(f"{own}:Both").options
    assert both == {"alpha": methods.Option(2.0, maximum=3), "beta": methods.Option(1.0)}
    neither = methods.find(f"{own}:Index")
    assert (neither.options, neither.data_parallel) == ({}, False)


@pytest.mark.parametrize(
    "name, message",
    [
        (
            "Network",
            "its constructor requires network; options come after a *, and only student, teacher and labels before it",
        ),
        ("NoDefault", "its option beta needs a default that is a number, a word, True or False"),
        ("ListDefault", "its option beta needs a default that is a number, a word, True or False"),
        ("NoTable", "its options must be a dict, each value an Option"),
        ("NoOption", "its options must be a dict, each value an Option"),
        ("function", "it is a function, not a class"),
        ("Tabel", "defines no 'Tabel'"),
    ],
)
def test_what_is_wrong_with_a_users_class_is_one_line(own, name, message, capsys):
    with pytest.raises(UserError, match=re.escape(message)):
        methods.find(f"{own}:{name}")
    with pytest.raises(SystemExit) as end:
        parse("--method", f"{own}:{name}")
    error = capsys.readouterr().err
    assert end.value.code == 2 and message in error and f"{own}" in error and error.count("\n") == 1


def test_a_changed_users_file_is_another_run(own, tmp_path):
    before = parse("--method", f"{own}:Defaults")
    (tmp_path / "own.py").write_text(OWN + "# another line\n")
    after = parse("--method", f"{own}:Defaults")
    assert before.method_file != after.method_file and before.run_path != after.run_path
    assert before.replace(method_file=None).identity() == after.replace(method_file=None).identity()
    assert (after.origins["method_file"], len(after.method_file)) == ("its content", 16)
