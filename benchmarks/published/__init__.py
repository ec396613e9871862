"""Published comparisons, for those who have the weights: `python -m benchmarks run published-NAME --weights FOLDER`.

What each task is, what it needs and what was published is data, in `tasks`.
"""
