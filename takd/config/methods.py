"""The methods' names and options: the schema of --method-option, --help-methods, error messages and reports.

The losses are the classes of the same names in takd/distill/methods.py, which take the options as keyword arguments. A
method of the user's own, FILE.py:CLASS, is imported and has its table in `options`.
"""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from takd.config.names import nearest
from takd.errors import UserError
from takd.files import import_class

Value = bool | int | float | str
TORCH_MODULE = ("torch.nn.modules.module", "Module")  # by name: importing torch takes seconds


@dataclass(frozen=True)
class Option:
    """One option of a method. The default's type is the option's."""

    default: Value
    help: str = ""
    minimum: float | None = 0  # of numbers
    maximum: float | None = None
    above: float | None = None  # an exclusive minimum, in place of `minimum`
    choices: tuple[str, ...] = ()  # of words; without: any word

    @property
    def bounds(self) -> str:
        """Such as 'above 0', '0 to 1', 'at least 1' or 'batchmean or mean'; empty for numbers from 0."""
        if self.choices:
            return " or ".join(self.choices)
        if self.above is not None:
            return f"above {self.above:g}" + (f", at most {self.maximum:g}" if self.maximum is not None else "")
        if self.maximum is not None:
            return f"{self.minimum:g} to {self.maximum:g}"
        return f"at least {self.minimum:g}" if self.minimum else ""


@dataclass(frozen=True)
class Method:
    """What is known of a method before its class is imported."""

    formula: str
    source: str
    options: Mapping[str, Option] = field(default_factory=dict)
    data_parallel: bool = True  # whether processes can share a batch: whether the loss is a mean over images
    label_smoothing: bool = True  # whether its cross-entropy heeds --label-smoothing
    several_teachers: bool = False  # whether it takes the logits of several


# fmt: off
TEMPERATURE = Option(4.0, "T, which softens both distributions", above=0, maximum=1000)
CE_WEIGHT = Option(1.0, "of cross-entropy with the labels")
KD_OPTIONS = {
    "temperature": TEMPERATURE,
    "lambda": Option(0.5, "weight of the distillation term", maximum=1),
    "reduction": Option("batchmean", "of KL; mean divides by the classes too, as the released code does",
                        choices=("batchmean", "mean")),
}
METHODS = {
    "base": Method("CE", "ordinary training with the labels, the paper's NOKD; the teacher is not used",
                   several_teachers=True),
    "kd": Method("(1 - lambda) CE + lambda T^2 KL(teacher || student)", "eq. 3 of Mirzadeh et al., AAAI 2020",
                 KD_OPTIONS, several_teachers=True),
    "logit": Method("ce_weight CE + weight MSE(logits)", "Ba and Caruana, NIPS 2014", {
        "weight": Option(1.0, "of the squared difference of the logits, a mean over images and classes"),
        "ce_weight": CE_WEIGHT,
    }, several_teachers=True),
    "st": Method("CE + alpha T^2 KL(teacher || student)", "soft targets, Hinton et al., 2015", {
        "temperature": TEMPERATURE,
        "alpha": Option(1.0, "weight of the soft targets"),
    }, several_teachers=True),
    "at": Method("CE + beta sum over stages of MSE(attention maps)", "Zagoruyko and Komodakis, ICLR 2017", {
        "beta": Option(1000.0, "weight of the attention maps"),
    }),
    "at_st": Method("CE + beta sum over stages of MSE(attention maps) + alpha T^2 KL(teacher || student)", "both", {
        "beta": Option(1000.0, "weight of the attention maps"),
        "alpha": Option(0.9, "weight of the soft targets"),
        "temperature": TEMPERATURE,
    }),
    "fsp": Method("CE + beta mean over neighbouring stages of MSE(G), G = F1 F2^T / (h w)", "Yim et al., CVPR 2017", {
        "beta": Option(1.0, "weight of the flow matrices"),
    }),
    "fitnet": Method("CE + beta MSE(r(F_s), F_t) of one stage", "hints, Romero et al., ICLR 2015", {
        "beta": Option(100.0, "weight of the hint"),
        "hint": Option(2, "which stage, counted from the end; 1 is the last", minimum=1),
    }),
    "sp": Method("CE + beta MSE(similarities of the batch's images)", "Tung and Mori, ICCV 2019", {
        "beta": Option(3000.0, "weight of the similarities"),
    }, data_parallel=False),
    "rkd": Method("CE + beta (distance D + angle A), the relations in a batch", "Park et al., CVPR 2019", {
        "beta": Option(1.0, "weight of both terms"),
        "distance": Option(25.0, "weight of the distances between two images"),
        "angle": Option(50.0, "weight of the angles between three"),
    }, data_parallel=False),
    "pkt": Method("CE + beta KL(the images' similarities as probabilities)", "Passalis and Tefas, ECCV 2018", {
        "beta": Option(30000.0, "weight of the divergence, which is a mean over B x B and so a small number"),
    }, data_parallel=False),
    "crd": Method("CE + beta (NCE of the student + NCE of the teacher)", "contrastive, Tian et al., ICLR 2020", {
        "beta": Option(0.8, "weight of the contrastive term"),
        "dimensions": Option(128, "of the embeddings", minimum=1, maximum=4096),
        "negatives": Option(16384, "K, images that the positive one is contrasted with", minimum=1, maximum=2**16),
        "tau": Option(0.07, "temperature of the similarities", above=0),
        "momentum": Option(0.5, "share of an embedding that its bank keeps at each visit", maximum=1),
    }, data_parallel=False),
    "dkd": Method("CE + w T^2 (alpha target-class KL + beta other-classes KL)", "decoupled, Zhao et al., CVPR 2022", {
        "alpha": Option(1.0, "weight of the label's class against the others"),
        "beta": Option(2.0, "weight of the other classes; 8 for more confident teachers"),
        "temperature": TEMPERATURE,
        "warmup": Option(20, "epochs in which w grows linearly to 1; 0 for none", maximum=10**6),
    }, several_teachers=True),
    "lskd": Method("ce_weight CE + weight T^2 KL(Z(teacher) || Z(student))", "standardised, Sun et al., CVPR 2024", {
        "temperature": Option(2.0, "T, which softens both distributions", above=0, maximum=1000),
        "weight": Option(9.0, "of the divergence"),
        "ce_weight": Option(0.1, "of cross-entropy with the labels"),
    }, several_teachers=True),
    "dgkd": Method("(1 - lambda) CE + lambda mean over teachers of T^2 KL(teacher || student)",
                   "densely guided, Son et al., ICCV 2021", KD_OPTIONS | {
        "drop": Option(0.0, "P, probability that a step leaves a teacher's term out; one always stays, which limits "
                            "it to 1 - 1 / teachers", maximum=1),
    }, several_teachers=True),
}
# fmt: on


def method_name(name: str) -> str:
    """The canonical spelling: a name in any case, or FILE.py:CLASS of the user's own, which is imported."""
    if ":" in name:
        find(name)
        return name
    if name.lower() in METHODS:
        return name.lower()
    known = f"{' '.join(METHODS)}, or my_file.py:MyClass"
    raise UserError(f"unknown method '{name}'{nearest(name.lower(), METHODS)}; methods: {known}")


def find(name: str) -> Method:
    """The Method of a canonical name; a user's class has its `options` table or keyword-only arguments."""
    if name in METHODS:
        return METHODS[name]
    method_class: Any = import_class(name)
    if not inspect.isclass(method_class):
        raise UserError(f"--method {name}: it is a {type(method_class).__name__}, not a class")
    if not any((base.__module__, base.__name__) == TORCH_MODULE for base in method_class.__mro__):
        raise UserError(f"--method {name}: a method is a torch.nn.Module, and this class is not derived from it")
    options = getattr(method_class, "options", {})
    if not isinstance(options, dict) or not all(isinstance(option, Option) for option in options.values()):
        raise UserError(f"--method {name}: its options must be a dict, each value an Option of takd.config.methods")
    options = dict(options)
    for parameter in inspect.signature(method_class).parameters.values():
        key = parameter.name.rstrip("_")
        if parameter.kind is parameter.KEYWORD_ONLY and key not in options:
            if not isinstance(parameter.default, bool | int | float | str):
                raise UserError(
                    f"--method {name}: its option {key} needs a default that is a number, a word, True or False"
                )
            options[key] = Option(parameter.default)
        elif parameter.kind is parameter.POSITIONAL_OR_KEYWORD and key not in ("student", "teacher", "labels"):
            fix = "options come after a *, and only student, teacher and labels before it"
            raise UserError(f"--method {name}: its constructor requires {key}; {fix}")
    together = getattr(method_class, "needs_index", False) or getattr(method_class, "one_process", False)
    several = vars(method_class).get("several_teachers", False)  # not inherited with another forward
    return Method("", "", options, not together, hasattr(method_class, "label_smoothing"), several)


def help_methods() -> str:
    """Every method with its options, their defaults and their meaning, as --help-methods prints them."""
    lines = []
    for name, method in METHODS.items():
        lines.append(f"{name:<7} {method.formula}: {method.source}")
        for key, option in method.options.items():
            bounds = f" ({option.bounds})" if option.bounds else ""
            lines.append(f"          {key:<12} {str(option.default):<10} {option.help}{bounds}")
    return "\n".join(lines)
