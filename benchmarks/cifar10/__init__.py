"""CIFAR-10: its data, a diffusion model trained here, the field's two classifiers, and label guidance with them."""


def run(**options) -> None:
    """The task `cifar10`: see `benchmarks.cifar10.label`."""
    from . import label

    label.run(**options)
