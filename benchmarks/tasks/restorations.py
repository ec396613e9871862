"""Three restorations by the real 64x64 model, beside deepinv's code on the same pictures.

Settings: the best of the grids of `run methods` (results/methods.jsonl) and, for deepinv, of `python -m
benchmarks.peers`, both by LPIPS on other pictures at 50 steps; `auto` is at its default, and dps in the middle of its
grid.
"""

from lossguide.guidance.steps import Adam, Chain, LevelRatio

from .. import work_restore
from ..task import USUAL, Method, Task

SUPER, INPAINT, DEBLUR = (work.name for work in work_restore.WORKS)

TASK = Task(
    works=work_restore.WORKS,
    methods=[
        Method("trivial", "trivial"),
        *USUAL,
        Method(
            "mpgd", "mpgd", by_work={SUPER: dict(strength=8.0), INPAINT: dict(strength=4.0), DEBLUR: dict(strength=4.0)}
        ),
        Method(
            "dps",
            "dps",
            by_work={SUPER: dict(strength=20.0), INPAINT: dict(strength=15.0), DEBLUR: dict(strength=10.0)},
        ),
        Method(
            "freedom",
            "freedom",
            by_work={
                SUPER: dict(rule="rms", strength=3.0),
                INPAINT: dict(rule="sqrt-alpha", strength=75.0),
                DEBLUR: dict(rule="rms", strength=3.0),
            },
        ),
        Method(
            "tfg",
            "tfg",
            by_work={
                SUPER: dict(rho=20.0, mu=5.0),
                INPAINT: dict(rho=24.0, mu=48.0, sigma=0.01),
                DEBLUR: dict(rho=4.0, mu=8.0, sigma=0.01),
            },
        ),
        Method(
            "adam_dps",
            "adam_dps",
            dict(strength=2.0),
            by_work={SUPER: dict(rule=Chain((Adam(0.03, 0.69, 0.735), LevelRatio())), strength=4)},
        ),
        Method(
            "deepinv DPS",
            "peer:deepinv-dps",
            dict(guidance="annealed", weight=3.0),
            by_work={SUPER: dict(weight=30.0)},
        ),
        Method(
            "deepinv DiffPIR",
            "peer:deepinv-diffpir",
            dict(lambda_=2.0, zeta=0.5),
            by_work={SUPER: dict(lambda_=0.7)},
        ),
    ],
    budgets=(50, 25),
    pictures=4,
    note="deepinv 0.5.0, its samplers unmodified, gets the same model, operators and noise level. The community "
    "pipelines of diffusers, CLIP guidance among them, do not come with its package, so that none of them is here.",
)
