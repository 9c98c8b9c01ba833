"""A study, from its first proposal to its last trial: Optuna, claims among commands, the
scheduler.
"""
