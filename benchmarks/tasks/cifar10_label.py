"""A CIFAR-10 class by ResNet20, judged by ResNet56, at equal cost; `cifar10` is the field's protocol with FID.

The model is trained by `python -m benchmarks.cifar10.train`. Settings: the default, and where it differs the best of
`run cifar10` (searched on other seeds).
"""

from .. import work_cifar
from ..task import USUAL, Method, Task

TASK = Task(
    works=[work_cifar.WORK],
    methods=[
        *USUAL,
        Method("mpgd", "mpgd"),
        Method("dps", "dps"),
        Method("tfg", "tfg"),
    ],
    budgets=(50, 100),
    pictures=100,
    quick=dict(budgets=(12,), pictures=10),
)
