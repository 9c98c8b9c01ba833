"""The functional core: distillation in plain PyTorch. Knows no MLflow, no Optuna, no command
line.
"""
