"""Faces of the real 64x64 model in the style of a painting, guided in VGG-16, judged in AlexNet.

Settings: the best of the grids of `run methods` (results/methods.jsonl, searched on other seeds).
"""

from .. import work_look
from ..task import USUAL, Method, Task

TASK = Task(
    works=[work for work in work_look.WORKS if work.name == "real-style"],
    methods=[
        *USUAL,
        Method("mpgd", "mpgd", dict(strength=4.0)),
        Method("freedom", "freedom", dict(rule="rms")),
        Method("tfg", "tfg", dict(rho=3000.0, mu=6000.0, sigma=0.01)),
    ],
    budgets=(50,),
    pictures=4,
    note="moved: how far the model itself moves a picture that it is given with some noise; unguided ones are moved by "
    "as much as natural ones are.",
)
