"""TAKD: knowledge distillation through teacher assistants (Mirzadeh et al., AAAI 2020).

Each subpackage imports only those before it: config, images, distill, run, study; all import errors, process and files.
`cpu` is optional: train.py and the benchmarks import it for runs on a CPU, and without its folder everything works.
"""

__version__ = "1.0.0"
