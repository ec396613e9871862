"""Scenes of two garments with relations between them: does guidance by language put things where a text says?"""


def run(**options) -> None:
    """The task `relations`: see `benchmarks.relations.evaluate`."""
    from . import evaluate

    evaluate.run(**options)
