"""Side-by-side measurements: each script prints its table from one run and, last, one line of
JSON.
"""
