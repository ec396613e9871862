"""A class of the demo model's ten, by the guide classifier, judged by another; distances to real pictures.

Settings: the default, and where it differs the best of the grids of `run methods` (results/methods.jsonl, searched on
other seeds).
"""

from .. import work_demo
from ..task import USUAL, Method, Task

TASK = Task(
    works=[work for work in work_demo.WORKS if work.name == "demo-label"],
    methods=[
        *USUAL,
        Method("mpgd", "mpgd", dict(strength=8.0)),
        Method("dps", "dps", dict(strength=30.0)),
        Method("freedom", "freedom", dict(rule="rms")),
        Method("tfg", "tfg", dict(rho=4.0, mu=8.0, sigma=0.01)),
        Method("adam_dps", "adam_dps"),
    ],
    budgets=(50, 25),
    pictures=40,
    likelihood=True,
    quick=dict(budgets=(12,), pictures=10),
    note="Frechet and kernel distance: to the 10,000 real test pictures, in the judge's 64 penultimate features, with "
    "jackknife errors; the Frechet distance of so few pictures is too large by about the same amount in every row.",
)
