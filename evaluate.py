#!/usr/bin/env python3
"""Score checkpoints on a data set's test images, in float32.

  python3 evaluate.py --checkpoint runs/NAME/plane2_seed1_best.pth.tar --dataset-dir data
  python3 evaluate.py --checkpoint resnet110_XXXX_best.pth.tar --model resnet110 --dataset cifar100 --json

Reads what train.py, the released TAKD code and RepDistiller write; --model and --dataset are needed only where a file does not say.
Several files give one table, or with --json one object a line.
"""

import json
import sys

import arguments
import names
from names import UserError


def build_parser():
    parser = arguments.Parser(__doc__)
    add = parser.flag
    add(parser, "--checkpoint", nargs="+", required=True, metavar="FILE", help="files to score")
    add(parser, "--model", type=arguments.network, metavar="NAME", help="the network in the files, where they do not say")
    add(parser, "--dataset", type=arguments.dataset, metavar="NAME",
        help=f"{' '.join(names.DATASETS)} (without: the one the file was trained on)")
    add(parser, "--dataset-dir", default="./data", metavar="DIR", help="where the data set is, or is downloaded to")
    add(parser, "--image-size", type=arguments.number(int, minimum=8), metavar="N", help="of the networks, where the files do not say")
    add(parser, "--no-download", dest="download", action="store_const", const=False, help="never touch the network")
    add(parser, "--cuda", type=arguments.cuda, metavar="N", help="1 or yes, 0 or no (without the flag: a GPU if there is one)")
    add(parser, "--json", action="store_const", const=True, help="print JSON; other lines go to standard error")
    return parser  # fmt: skip


def evaluate(path, args, device, splits):
    """One file's scores, a dict for JSON. `splits` keeps each data set's test split for the next file."""
    with arguments.requirements("evaluate.py"):
        import torch

        import data_loader
        import engine
        import model_factory

    network, about = model_factory.load_network(path, args.model, args.image_size)
    dataset = args.dataset or about.get("dataset")
    if dataset is None:
        raise UserError(f"{path} does not say what it was trained on; name the data set with --dataset")
    key = dataset, about["image_size"]
    if key not in splits:
        download = args.download is not False
        splits[key] = data_loader.load(dataset, args.dataset_dir, download, warn, about["image_size"])[1].to(torch.device(device))
    test = splits[key]
    if about["classes"] != len(test.classes):
        raise UserError(f"{path} tells {about['classes']} classes apart, {dataset} has {len(test.classes)}")
    network.to(test.device, memory_format=torch.channels_last)
    result = engine.score(engine.predict(network, test, about["mean"], about["std"]), test.labels)
    recorded = about.get("test_accuracy_percent") if dataset == about.get("dataset") else None
    if recorded is not None and abs(recorded - result["accuracy_percent"]) > 0.5:
        warn(f"warning: {path} records {recorded:.2f} %, {dataset} here gives {result['accuracy_percent']:.2f} %: other images?")
    if not result["accuracy_percent"] > engine.chance_percent(test.labels):
        warn(f"warning: {path} does not beat guessing: another data set, other normalisation, or not trained")
    return {
        "checkpoint": str(path),
        "model": about["model"],
        "path": about.get("path", [about["model"]]),
        "dataset": dataset,
        "images": result["images"],
        "test_accuracy_percent": result["accuracy_percent"],
        "test_top5_percent": result["top5_percent"],
        "test_loss": result["loss"],
        "recorded_test_accuracy_percent": recorded,
        "epoch": about.get("epoch"),
        "parameters": model_factory.count_parameters(network),
    }


def table(results):
    """Scores as aligned text."""
    rows = [("network", "learned from", "data", "parameters", "test %", "top-5 %", "loss")]
    for result in results:
        learned_from = " > ".join(result["path"][:-1]) or "labels"
        rows.append((
            result["model"], learned_from, result["dataset"], f"{result['parameters']:,}", f"{result['test_accuracy_percent']:.2f}",
            f"{result['test_top5_percent']:.2f}", f"{result['test_loss']:.4f}",
        ))  # fmt: skip
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(f"{cell:<{width}}" if i < 3 else f"{cell:>{width}}" for i, (cell, width) in enumerate(zip(row, widths, strict=True)))
        for row in rows
    ]
    return "\n".join(line.rstrip() for line in lines)


def warn(line):
    print(line, file=sys.stderr)


def main(argv=None):
    parser = build_parser()
    args = parser.parse_args(argv)
    args.dataset_dir = args.dataset_dir or parser.defaults["dataset_dir"]
    try:
        device = arguments.device_name(args.cuda)
        splits, results = {}, []
        for path in args.checkpoint:
            results.append(evaluate(path, args, device, splits))
            if args.json:
                print(json.dumps(results[-1]), flush=True)
    except UserError as error:
        sys.exit(arguments.fail("evaluate.py", error, 2))
    except (OSError, MemoryError) as error:
        sys.exit(arguments.fail("evaluate.py", error, 1))
    if not args.json:
        print(table(results))


if __name__ == "__main__":
    main()
