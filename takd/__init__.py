"""TAKD: knowledge distillation through teacher assistants (Mirzadeh et al., AAAI 2020).

Rooms, each of which imports only those before it: config, images, distill, run, study; below them errors, process and
files. `cpu` is an annex that train.py, evaluate.py and the benchmarks open on a CPU; without its folder everything
still works.
"""
