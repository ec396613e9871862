"""The foreground of the real 64x64 model's faces in a disc, guided by U-2-Net, judged by the contrast of colours.

Settings are defaults, and dps in the middle of its grid: no strength was searched for this work.
"""

from .. import work_place
from ..task import USUAL, Method, Task

TASK = Task(
    works=work_place.WORKS,
    methods=[
        *USUAL,
        Method("mpgd", "mpgd"),
        Method("freedom", "freedom", dict(rule="rms")),
        Method("dps", "dps", dict(strength=20.0)),
    ],
    budgets=(50,),
    pictures=4,
    note="moved: how far the model itself moves a picture that it is given with some noise.",
)
