#!/usr/bin/env python3
"""Export the network of a checkpoint as an ONNX file, for programs without PyTorch.

  python3 export.py --checkpoint runs/NAME/plane2_seed1_best.pth.tar --output student.onnx
  python3 export.py --checkpoint resnet8_XXXX_best.pth.tar --model resnet8 --dataset cifar100 --output student.onnx

The file takes any number of images (float32, RGB, pixels in 0..1), normalises them and returns logits. Its metadata
hold the names of the classes and where the network comes from. It is written only if ONNX Runtime's logits of all test
images equal PyTorch's to 1e-4. Needs requirements-export.txt; runs on the CPU.
"""

from takd import process

if __name__ == "__main__":
    process.start()

import argparse
import contextlib
import dataclasses
import hashlib
import io
import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any

from takd.config import flags, names
from takd.errors import UserError, first_line


# fmt: off
def build_parser() -> flags.Parser:
    parser = flags.Parser(__doc__)
    flag, switch = parser.flag, parser.switch
    flag("--checkpoint", required=True, metavar="FILE", help="file to export")
    flag("--output", required=True, metavar="FILE", help="ONNX file to write")
    flag("--model", type=flags.network, metavar="NAME", help="the network in the file, if it does not name it")
    flag("--dataset", type=flags.dataset, metavar="NAME", help=f"{' '.join(names.DATASETS)} (default: the file's own)")
    flag("--dataset-dir", default="./data", metavar="DIR", help="where the test images are, or are downloaded to")
    flag("--image-size", type=flags.number(int, minimum=8), metavar="N", help="input size, if the file lacks it")
    switch("--no-download", "never download a data set")
    return parser
# fmt: on


def parse(argv: list[str]) -> argparse.Namespace:
    """The arguments. Exits with a usage error if they are wrong, before anything is read."""
    args = build_parser().parse_args(argv)
    output = Path(args.output)
    try:
        special = output.exists() and not output.is_file()
    except OSError as error:
        sys.exit(flags.fail("export.py", f"--output {output}: {error.strerror}; give a file such as student.onnx", 2))
    if special or not os.access(output.parent, os.W_OK):
        why = "a folder or a device" if special else "in a folder that is absent or read-only"
        sys.exit(flags.fail("export.py", f"--output {output} is {why}; give a file such as student.onnx", 2))
    return args


if __name__ == "__main__":  # usage errors are reported before torch is imported, which takes seconds
    ARGUMENTS = parse(sys.argv[1:])
    flags.check_packages("export.py", "torch", "torchvision", "numpy")
    flags.check_packages("export.py", "onnx", "onnxscript", "onnxruntime", file="requirements-export.txt")

import torch
from torch import nn

import data_loader
import model_factory
import takd
from takd.distill import evaluation
from takd.files import replacing
from takd.images.split import Split, Transform, class_order
from takd.run import checkpoint
from takd.run.run_directory import processor
from takd.study.score_report import BATCHES, measured_sentence, text_table

TOLERANCE = 1e-4  # between PyTorch's logits and ONNX Runtime's
OPSET = 18  # ONNX Runtime reads it since 1.14


class Normalised(nn.Module):
    """A network and its normalisation: images (B, 3, H, W), pixels in 0..1, to logits (B, C)."""

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, network: nn.Module, metadata: dict[str, Any]) -> None:
        super().__init__()
        self.network = network
        for key in ("mean", "std"):
            self.register_buffer(key, torch.tensor(metadata[key]).reshape(3, 1, 1))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.network((images - self.mean) / self.std)


class Session(nn.Module):
    """An ONNX file in ONNX Runtime, on the CPU with PyTorch's number of threads; it is called as a network is."""

    def __init__(self, file: Path) -> None:
        import onnxruntime

        super().__init__()
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        self.session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(self.session.run(["logits"], {"images": images.contiguous().numpy()})[0])


def main(argv: list[str] | None = None) -> None:
    args = ARGUMENTS if argv is None else parse(argv)
    with flags.errors_in_one_line("export.py"):
        network, metadata = model_factory.load(args.checkpoint, args.model, args.image_size)
        test = test_images(args, metadata)
        size, inside = test.image_size, Normalised(network, metadata).eval()
        expected = evaluation.predict(network, test, Transform(tuple(metadata["mean"]), tuple(metadata["std"]), size))
        score = evaluation.score(expected, test.labels)
        contents = exported(inside, size, metadata["model"], provenance(args, metadata, test, score))
        with replacing(args.output) as temporary:
            temporary.write_bytes(contents)
            try:
                session = Session(temporary)
                logits = evaluation.predict(session, test, Transform((0.0,) * 3, (1.0,) * 3, size))
            except Exception as error:  # of one of its many classes
                why = f"ONNX Runtime cannot run the file: {first_line(error)}; nothing is written"
                sys.exit(flags.fail("export.py", why, 1))
            worst = difference(logits, expected)
            if not worst <= TOLERANCE:  # nor nan
                why = f"ONNX Runtime's logits differ from PyTorch's by {worst:.1e}; nothing is written"
                sys.exit(flags.fail("export.py", why, 1))
    inside.to(memory_format=torch.channels_last)  # for speed, as in training
    rows = [["", "test %", "MB", *(f"ms, batch of {images}" for images in BATCHES)]]
    for name, each, answers, stored in (
        ("PyTorch", inside, expected, evaluation.weights_bytes(network)),
        ("ONNX", session, logits, len(contents)),
    ):
        accuracy = evaluation.score(answers, test.labels)["accuracy_percent"]
        times = [f"{1000 * latency(each, size, images):.2f}" for images in BATCHES]
        rows.append([name, f"{accuracy:.2f}", f"{stored / 1e6:.2f}", *times])
    print(text_table(rows, left=1))
    print(f"\nThe logits of {len(test):,} test images differ by {worst:.1e} at most.")
    print(measured_sentence([{"device": processor(), "threads": torch.get_num_threads()}]))
    print(f"written   {args.output}")


def test_images(args: argparse.Namespace, metadata: dict[str, Any]) -> Split:
    """The test images of the checkpoint's data set, labelled in the order of the network's classes."""
    dataset, file = args.dataset or metadata.get("dataset"), args.checkpoint
    if dataset is None:
        raise UserError(f"{file} does not record its data set; name it with --dataset")
    download, size = args.download is not False, metadata["image_size"] or 0
    test = data_loader.read(dataset, args.dataset_dir, download, flags.warn, size).test
    recorded = metadata.get("class_names") or test.classes
    if metadata["classes"] != len(test.classes) or sorted(recorded) != sorted(test.classes):
        raise UserError(f"{file} was trained on other classes than those of {dataset} in {args.dataset_dir}")
    if order := class_order(recorded, test.classes):
        test = dataclasses.replace(test, labels=torch.tensor(order)[test.labels], classes=tuple(recorded))
    return test


def difference(logits: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest between two tensors of logits: absolute up to 1, relative above, as float32 rounds."""
    return float(((logits - expected).abs() / expected.abs().clamp(min=1)).max())


def latency(network: nn.Module, image_size: int, images: int) -> float:
    """Median seconds of a call on a batch in the layout that it is fastest with."""
    if not isinstance(network, Session):
        return evaluation.latency(network, image_size, images)
    batch = torch.rand(images, 3, image_size, image_size)
    return evaluation.median_seconds(lambda: network(batch))


def provenance(
    args: argparse.Namespace, metadata: dict[str, Any], test: Split, score: dict[str, float]
) -> dict[str, str]:
    """What the file says of itself: ONNX takes pairs of strings."""
    size, file = test.image_size, Path(args.checkpoint)
    known = {
        "input": f"images: float32 (N, 3, {size}, {size}), RGB, pixels in 0..1 (8-bit values / 255), not normalised",
        "output": f"logits: float32 (N, {len(test.classes)}), in the order of class_names, before softmax",
        "class_names": json.dumps(test.classes),
        "path": " > ".join(metadata.get("path", [metadata["model"]])),
        "dataset": test.name.split("/")[0],
        "seed": metadata.get("seed"),
        "test_accuracy_percent": f"{score['accuracy_percent']:.2f}",
        "test_images": len(test),
        "mean": json.dumps(metadata["mean"]),
        "std": json.dumps(metadata["std"]),
        "checkpoint": file.name,
        "checkpoint_sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
        "weights_digest": checkpoint.weights_digest(file),  # teacher_weights in the config.json of a run that it taught
        "takd_version": takd.__version__,
    }
    return {key: str(value) for key, value in known.items() if value is not None}


def exported(network: nn.Module, image_size: int, name: str, metadata: dict[str, str]) -> bytes:
    """The contents of an ONNX file: `images` with a free batch axis to `logits`."""
    import onnx

    images = torch.rand(2, 3, image_size, image_size)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):  # pages, where it fails
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                network,
                (images,),
                dynamo=True,
                opset_version=OPSET,
                input_names=["images"],
                output_names=["logits"],
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                verbose=False,
            )
    except Exception as error:  # the exporter's own, or whatever a user's network raises in it
        reason = first_line(error.__cause__ or error)
        raise UserError(f"{name} cannot be exported: {type(error).__name__}: {reason}") from None
    model = program.model_proto
    for part in (model.graph.node, model.graph.input, model.graph.output, model.graph.value_info):
        for each in part:
            del each.metadata_props[:]  # the exporter's stack traces, with the paths of this machine
    onnx.helper.set_model_props(model, metadata)
    return model.SerializeToString()


if __name__ == "__main__":
    main()
