#!/usr/bin/env python3
"""Measure for some seconds what networks take on this machine: a JSON line each, with images per second and parameters.

  python3 calibrate.py --networks plane10 plane2 --dataset cifar100 --cuda 0

Real training steps and evaluation on random images of the data set's shape: nothing is read, nothing is written.
`distill_paths.py --dry-run` calls it where no earlier run tells.
"""

import json
import time

from takd.config import flags as arguments
from takd.config import names
from takd.config.flags import number
from takd.config.names import UserError

SECONDS = 1.5  # of steps, after a first one that is not counted


def build_parser():
    parser = arguments.Parser(__doc__)
    add = parser.flag
    add(parser, "--networks", nargs="+", type=arguments.network, required=True, metavar="NAME", help="what to measure")
    add(parser, "--dataset", type=arguments.dataset, required=True, metavar="NAME", help=" ".join(names.DATASETS))
    add(parser, "--image-size", type=number(int, minimum=8), metavar="N", help="as in train.py")
    add(parser, "--batch-size", type=number(int, minimum=1), default=128, metavar="N", help="images a step")
    add(parser, "--precision", choices=("auto", "fp32", "bf16"), default="auto", help="as in train.py")
    add(parser, "--cuda", type=arguments.cuda, metavar="N", help="1 or yes, 0 or no (without the flag: a GPU if there is one)")
    return parser


def measure(name, data, image_size, batch_size, precision, device):
    import torch

    import data_loader
    import model_factory
    from takd.distill import methods as losses
    from takd.run import cuda_graph as graphs
    from takd.run import engine

    images = torch.randint(256, (8 * batch_size, 3, 32, 32), dtype=torch.uint8)
    labels = torch.arange(len(images)) % data.classes
    classes = tuple(range(data.classes))
    split = data_loader.Split("random", images, labels, classes, data.mean, data.std, image_size).to(torch.device(device))
    network = model_factory.create_network(name, data.classes, split.image_size).to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-4, momentum=0.9, nesterov=True, fused=True)
    graph = graphs.StepGraph([network], optimizer, lambda line: None) if device == "cuda" else None

    def train(seconds):
        sums, until = engine.EpochSums(), time.perf_counter() + seconds
        while not sums.rows or time.perf_counter() < until:
            batches = (data_loader.train_draws if graph else data_loader.train_batches)(split, batch_size, "none", seed=1, epoch=0)
            engine.train_epoch(network, losses.CrossEntropy(), None, optimizer, split, batches, sums, precision,
                               lambda: time.perf_counter() > until, graph)  # fmt: skip
        return sums

    def evaluate(images):
        engine.score(engine.predict(network, split.subset(slice(0, images), "random")), split.labels[:images])

    train(0)
    sums = train(SECONDS)
    evaluate(100)
    started = time.perf_counter()
    evaluate(len(split))
    return {
        "network": name,
        "train_images_per_second": sum(sums.images) / sums.seconds,
        "evaluation_images_per_second": len(split) / (time.perf_counter() - started),
        "parameters": model_factory.count_parameters(network),
    }


def main(argv=None):
    parser = build_parser()
    args = parser.parse_args(argv)
    try:
        device = arguments.device_name(args.cuda)
        if names.DATASETS[args.dataset].classes is None:
            raise UserError(f"--dataset {args.dataset}: only data sets of a known size can be measured")
    except UserError as error:
        parser.error(str(error))
    import torch

    from takd.run import trainer as training

    precision = args.precision or "auto"
    if precision == "auto":
        precision = "bf16" if training.native_bf16(torch.device(device)) else "fp32"
    for name in args.networks:
        batch_size = args.batch_size or parser.defaults["batch_size"]
        print(json.dumps(measure(name, names.DATASETS[args.dataset], args.image_size, batch_size, precision, device)), flush=True)


if __name__ == "__main__":
    main()
