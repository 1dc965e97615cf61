"""The first minutes of a GPU: what this library needs to know from one, in order of value. Run by `bench/gpu.sh`.

stages.py   what is done, stage by stage; measuring.py those that measure
runner.py   runs stages one after another within a limit; whatever is cut off costs only itself
build.py    the extension, where no prebuilt one is in place
smoke.py    every mapping, pair of dtypes and primitive against fp64 on the device
workers.py  work shared by processes of their own, so that a fault on the device costs one case
tuning.py   the free numbers of the CUDA back end as a benchmark suite
launches.py a few launches for a profiler
"""
