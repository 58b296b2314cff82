"""The sweep verb: arms of a recipe, run as a study of Optuna's and judged by the same rulers."""
